"""The lines of a figure: every experiment in every panel, and the curves they leave in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from phantom.engine.errors import ConfigError
from scripts import studies
from scripts.running import measuring
from scripts.running.costs import kind_of
from scripts.running.process import Run, Work, curve, folder_of, plan, variant_of

KEPT = ("label", "overrides", "scale", "seed", "num_parameters", "steps", "cpu_seconds")
KEPT += ("precision", "gradient_precision", "device", "versions", "commit", "dirty", "started", "finished")


def work(figure: dict[str, Any], folder: Path, overrides: Sequence[str], *, panels: Sequence[str], again: bool) -> Work:
    """Return the runs of some panels that the figure lacks, or all of them.

    The curves go to curves.json in `folder`; with overrides that make it another figure, these are in the file's name.

    Raises:
        ConfigError: the overrides do not compose, or set the seed.
    """
    if any(item.startswith(("seed=", "repeats=")) for item in overrides):
        raise ConfigError("a line of a figure is one run with its experiment's seed; use train.py for another one")
    own = {item.split("=")[0] for panel in figure["panels"] for item in panel["overrides"]}
    if fixed := [item for item in overrides if item.split("=")[0] in own]:
        names = ", ".join(panel["name"] for panel in figure["panels"])
        raise ConfigError(
            f"{fixed[0]} is what the panels differ in: choose some of them by panels=<name,...>, of {names}"
        )
    runs, places = [], {}
    for panel in [panel for panel in figure["panels"] if panel["name"] in panels]:
        for line in figure["lines"]:
            items = [f"experiment={line['experiment']}", *figure["overrides"], *panel["overrides"], *overrides]
            items = list({item.split("=")[0]: item for item in items}.values())  # the last one of a key counts
            made = plan(items)
            if figure["split"] not in made.config["eval_splits"]:
                raise ConfigError(
                    f"the figure shows {figure['split']}, which eval_splits={made.config['eval_splits']} must have"
                )
            scale = "" if made.config["scale"] == "paper" else f"@{made.config['scale']}"
            kept = folder / f"curves{scale}{variant_of(overrides)}.json"
            place = (panel["name"], line["name"])
            if again or place not in {(entry["panel"], entry["line"]) for entry in studies.curves(kept)}:
                where = folder_of(made, items, made.config["seed"])
                kind = kind_of(made.choices, made.config["scale"])
                run = Run(", ".join(place), items, where, kept, label=made.label, kind=kind)
                runs.append(run)
                places[run.name] = place

    def keep(run: Run, record: dict[str, Any]) -> None:
        panel, line = places[run.name]
        entry = {"panel": panel, "line": line, **{key: record.get(key) for key in KEPT}}
        epochs, values = curve(run.folder, figure["split"], figure["metric"])
        entry |= {"metric": figure["metric"], "split": figure["split"], "epochs": epochs, "values": values}
        run.kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(run.kept.with_suffix(".lock")):  # another panel may be run beside this one
            entries = {(old["panel"], old["line"]): old for old in studies.curves(run.kept)}
            entries[panel, line] = entry
            measuring.write({"runs": list(entries.values())}, run.kept)
        print(f"{run.name}: best {max(values):.2f}, last {values[-1]:.2f}", flush=True)

    return Work(runs, keep, small=figure.get("small", False))
