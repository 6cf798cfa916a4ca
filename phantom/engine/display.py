"""What a person sees: a bar on a terminal, plain lines in a log, a short table at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from phantom.engine.errors import printable


class Progress:
    """Show the state of training; on anything but a terminal, one line per evaluation.

    Args:
        total: steps of the run.
        metric: the task's headline number, shown beside the loss.
        enabled: False shows nothing, as on all ranks but the first.
    """

    def __init__(self, total: int, *, done: int, enabled: bool, metric: str) -> None:
        self._bar = None
        self._metric = metric
        self._enabled = enabled
        if not enabled or sys.stderr is None or not sys.stderr.isatty():
            return
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
        )
        self._task = self._bar.add_task("train", total=total, completed=done, epoch=0, text="")
        self._bar.start()

    def step(self, step: int, epoch: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=epoch)

    def train_row(self, row: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, text=_line(row, self._metric))

    def eval_row(self, row: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        line = f"epoch {row['epoch']} step {row['step']} {row['split']}: {_line(row, self._metric)}"
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print(line, flush=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _line(row: Mapping[str, Any], metric: str) -> str:
    names = dict.fromkeys(("loss", metric, "items_per_second", "num_evals", "num_steps", "residual"))
    return "  ".join(f"{name} {row[name]:.4g}" for name in names if isinstance(row.get(name), (int, float)))


def summary_table(record: Mapping[str, Any]) -> str:
    """Return the short closing table of a run: its metrics, evaluations of f, and time by phase."""
    rows = [("run", str(record["label"])), ("parameters", f"{record['num_parameters']:,}")]
    for split, values in record["final"].items():
        best = record["best"].get(split)
        name = record["metric"]
        shown = f"{_number(values[name])} (last)"
        shown += f", {_number(best[name])} (best, epoch {best['epoch']})" if best else ""
        if split in record.get("baseline", {}):
            shown += f", {record['baseline'][split]:.2f} (without input)"
        rows.append((f"{split} {name}", shown))
    if "num_evals" in record["train"]:
        rows.append(("evaluations of f per step", f"{record['train']['num_evals']:.1f}"))
        rows.append(("vjps per step", f"{record['train']['num_vjps']:.1f}"))
        rows.append(("residual", _number(record["train"]["residual"], ".2e")))
    for phase, times in record["times"].items():
        rows.append((f"{phase} time", f"{1e3 * times['median']:.1f} ms per step (median of {times['n']})"))
    if record["items_per_second"]:
        rows.append(("throughput", f"{record['items_per_second']:.0f} {record['unit']}/s"))
    if record.get("target") is not None:
        state = "reached" if record["reached"] else "not reached"
        rows.append(("target", f"{record['target']:g} {state} in {record['training_seconds']:.1f} s of training"))
    if "wall_seconds" in record:  # which early records do not have
        rows.append(("wall clock", f"{record['wall_seconds']:.0f} s, evaluations included"))
    rows.append(("record", str(record["folder"])))
    width = max(len(name) for name, _ in rows)
    return printable("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))


def _number(value: float | None, form: str = ".2f") -> str:
    """Return a number as text; in a record, null stands for one that was not finite or not measured."""
    return "--" if value is None or not math.isfinite(value) else format(value, form)
