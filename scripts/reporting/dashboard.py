"""The dashboards on Weights & Biases: the panels of a project's workspace, and a report for accuracy and speed.

Keys are those that a run logs: `train/...`, `<split>/...` and `monitor/...`, its config, and its record as a summary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from wandb_workspaces import expr
from wandb_workspaces import workspaces as ws
from wandb_workspaces.reports import v2 as wr

from scripts import studies
from scripts.reporting import markdown, pages, suites

WALL = "RelativeTime(Wall)"
PHASES = ("solve", "attach", "backward", "optimizer")


class Target(NamedTuple):
    """Where the dashboards go, and what they show.

    Args:
        metric, split: the headline metric, and the split that it is measured on.
    """

    entity: str
    project: str
    metric: str
    split: str


def sections(target: Target) -> dict[str, list[Any]]:
    """Return the panels by section; seeds and the runs of a sweep are in one group."""
    # the rows of training itself are train/...
    where = "eval_train" if target.split == "train" else target.split
    headline = f"{where}/{target.metric}"
    best = wr.SummaryMetric(f"best.{target.split}.{target.metric}")
    k, lam, grad = wr.Config("k"), wr.Config("lam"), wr.Config("grad._target_")
    line, mean = _line, {"groupby": grad, "groupby_aggfunc": "mean", "aggregate": True}
    return {
        "Accuracy": [
            line(f"{headline} against steps", headline),
            line(f"{headline} against the clock", headline, x=WALL),
            line("training loss", "train/loss", log_y=True),
            wr.ScatterPlot(title=f"best {headline} against k, by lam", x=k, y=best, z=lam),
            wr.ParallelCoordinatesPlot(
                columns=[wr.ParallelCoordinatesPlotColumn(metric=key) for key in (grad, k, lam, best)]
            ),
        ],
        "Speed": [
            wr.BarPlot(
                title="backward, seconds: implicit over the others is the speed-up",
                metrics=["train/time/backward"],
                **mean,
            ),
            wr.BarPlot(title="a step, seconds", metrics=["train/time/step"], **mean),
            line("seconds of a step by phase", *(f"train/time/{phase}" for phase in PHASES)),
            line("items per second", "train/items_per_second"),
        ],
        "Solver": [
            line("relative residual", "train/residual", f"{where}/residual", log_y=True),
            line("solver steps", "train/num_steps", f"{where}/num_steps"),
            line("vector-Jacobian products of the backward", "train/num_vjps"),
        ],
        "Gradient": [
            line(
                "spectral radius of J, and of lam J + (1 - lam) I",
                "monitor/spectral_radius",
                "monitor/damped_spectral_radius",
            ),
            line("cosine to the exact gradient", "monitor/gradient_cosine"),
            line("norm over that of the exact gradient", "monitor/gradient_norm_ratio"),
            line("norm of the gradient", "train/gradient_norm", log_y=True),
        ],
        "Memory": [line("peak memory, bytes", "train/peak_memory")],
    }


def workspace(target: Target) -> ws.Workspace:
    """Return the workspace of a project."""
    return ws.Workspace(
        entity=target.entity,
        project=target.project,
        name="Accuracy and speed",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections(target).items()],
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=ws.RunsetSettings(groupby=[expr.Metric("Group")]),
    )


def report(target: Target) -> wr.Report:
    """Return the report: the panels, and the speed-ups of the committed benchmarks as tables."""
    grids = []
    for name, panels in sections(target).items():
        runs = wr.Runset(entity=target.entity, project=target.project, name="by group", groupby=["Group"])
        grids += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
        grids += [wr.MarkdownBlock(speed_ups())] if name == "Speed" else []
    about = "Implicit models by gradient estimator. Runs of a sweep, and the seeds of an experiment, are one group."
    return wr.Report(
        entity=target.entity,
        project=target.project,
        title="Accuracy and speed of phantom gradients",
        description=about,
        blocks=[wr.TableOfContents(), *grids],
        width="fluid",
    )


def speed_ups() -> str:
    """Return implicit differentiation over the other estimators by measured steps, from the committed records."""
    blocks = ["Implicit differentiation over phantom gradients, by measured steps:"]
    for study in map(studies.load, studies.names()):
        for path, page in pages.of(study).items() if "benchmark" in study else ():
            for table in page.tables:
                if table.heads == list(suites.IMPLICIT):
                    blocks += [f"{study['title']} (`{path.relative_to(studies.ROOT).as_posix()}`)", table]
    return markdown.page(*blocks)


def save(target: Target, say: Callable[[str], None]) -> None:
    """Make workspace and report on the server, and say where they are."""
    for made in (workspace(target), report(target)):
        say(made.save().url)


def _line(title: str, *keys: str, x: str = "step", **options: Any) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=x, y=list(keys), **options)
