"""Tables of the records of experiments: a row per experiment, over its seeds or over its folds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts import studies
from scripts.reporting import markdown, provenance

DIFFERENCE = ("difference", "in spread")
SPEEDS = ("training h", "speed", "by timed steps", "paper's speed")
TIMED = (
    " Training time is the median step times the steps; speed is relative to the first row. `by timed steps` is the "
    "ratio of single steps in a record of benchmark/gpu, on the card that it names; unrolled pretraining is not in it."
)
COMPARED = "`difference`: ours less the paper's; `in spread`: whether it is at most the ± that the paper prints."

SCALES = ("paper", "gpu", "cpu", "smoke")


def render(table: dict[str, Any]) -> markdown.Page:
    """Return the page of a table; one with `protocols` is over folds, any other over seeds."""
    return _folds(table) if "protocols" in table else _seeds(table)


def _seeds(table: dict[str, Any]) -> markdown.Page:
    """Return the paper's number, ours by the paper's protocol, and the honest one."""
    metric, split, std = table["metric"], table["split"], table["std"]
    groups: dict[str, dict[str, Any]] = {}
    for row in table["rows"]:
        groups.setdefault(row.get("group"), row)
    timed = list(groups) != [None]
    compared = any(row["paper"] != "--" for row in table["rows"])
    heads = ["row", "paper", "best", *(DIFFERENCE if compared else ()), "last", "budget", "parameters", "step ms"]
    heads += [*(SPEEDS if timed else ()), "peak MB", "commit"]
    about = (
        f"`best`: the best evaluation of a run on `{split}`, as the paper reports; `last`: its last one. "
        f"mean ± {std} std (n runs). Smaller budgets are labelled, with the data where they are told; * marks "
        "uncommitted changes; -- means not run. "
        + (COMPARED + " " if compared else "")
        + "`step ms`: the median of the timed steps, in brackets their 10th and 90th percentile; of several runs, the "
        "median of their medians, the lowest 10th and the highest 90th percentile. "
        "Peak memory is that allocated on a GPU, or resident for the whole process on a CPU." + (TIMED if timed else "")
    )
    rows = []
    for row, scale, records in _shown(table):
        best = [record["best"][split][metric] for record in records]
        last = [record["final"][split][metric] for record in records]
        gap = difference(row["paper"], best if scale == "paper" else []) if compared else []
        times = _speeds(row, groups[row["group"]], records) if timed else []
        parameters, step, peak, commits = measured(records)
        label = label_of(scale, records)
        cells = [cell(best, std, label), *gap, cell(last, std, label), budget(row, scale, records), parameters, step]
        rows.append([row["name"], row["paper"], *cells, *times, peak, commits])
    return markdown.page(f"# {table['title']}", about, markdown.table(heads, rows))


def _shown(table: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[dict[str, Any]]]]:
    """Yield (row, scale, records): every row at its largest budget, and at scale=cpu, too, where the table has that.

    Rows are compared at one budget.
    """
    for row in table["rows"]:
        largest, records = records_of(row["experiment"])
        yield row, largest, records
        smaller = read(studies.record_folder(row["experiment"], "cpu")) if "cpu" in table.get("scales", {}) else []
        if smaller and largest != "cpu":
            yield row, "cpu", smaller


def records_of(experiment: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (scale, records) of an experiment at the largest budget that has any."""
    for scale in SCALES:
        records = read(studies.record_folder(experiment, scale))
        if records:
            return scale, records
    return "paper", []


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records in a folder, by seed."""
    return [studies.record(path) for path in sorted(folder.glob("*.json"))]


def label_of(scale: str, records: list[dict[str, Any]]) -> str:
    """Return the label of a smaller budget, with the data that it was trained on: ` [cpu, cifar10_small]`."""
    data = sorted({record["choices"]["data"] for record in records if "choices" in record})
    return "" if scale == "paper" else f" [{', '.join([scale, *data])}]"


def cell(values: Sequence[float | None], std: str, label: str = "") -> str:
    """Return `mean ± std (n)` and a label; `std` is sample or population. A value that is None was not finite."""
    if not values:
        return "--"
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return f"not finite ({len(values) - len(finite)} of {len(values)}){label}"
    mean = statistics.fmean(finite)
    if len(finite) == 1:
        return f"{mean:.2f} (1){label}"
    deviation = statistics.stdev(finite) if std == "sample" else statistics.pstdev(finite)
    return f"{mean:.2f} ± {deviation:.2f} ({len(values)}){label}"


def difference(paper: str, values: Sequence[float | None]) -> list[str]:
    """Return the cells of `DIFFERENCE`: the mean less the paper's, and whether that is at most the paper's spread.

    Args:
        paper: as printed, `85.0 ± 0.2`, or without a spread.
        values: at the paper's budget; none are compared with it at another one.
    """
    printed = [float(part) for part in paper.split("±")] if paper != "--" else []
    finite = [value for value in values if value is not None]
    if not printed or not values or len(finite) < len(values):
        return ["--", "--"]
    # as both are printed: 84.5 + 0.3 is 84.8, whatever the binary fractions say
    gap = round(statistics.fmean(finite) - printed[0], 2)
    return [f"{gap:+.2f}", "--" if len(printed) < 2 else "yes" if abs(gap) <= printed[1] else "no"]


def training_seconds(records: list[dict[str, Any]]) -> float | None:
    """Return the time of a training without evaluations: median step time times steps, the median over the runs.

    None where no run was timed, or where they ran on several devices.
    """
    if len({record["device"] for record in records}) > 1:
        return None
    times = [record["times"]["step"]["median"] * record["steps"] for record in records if "step" in record["times"]]
    return statistics.median(times) if times else None


def _speeds(row: dict[str, Any], first: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """Return the cells of `SPEEDS`; `first` is the first row of the group."""
    seconds = training_seconds(records)
    hours = "--" if seconds is None else f"{seconds / 3600:.2f}"
    return [hours, speed(row, first), timed_speed(row, first), row["speed"]]


def speed(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Return how many times faster `row` trains than the `first` one of its group; -- unless both ran alike."""
    (scale, records), (other, reference) = records_of(row["experiment"]), records_of(first["experiment"])
    mine, theirs = training_seconds(records), training_seconds(reference)
    if mine is None or theirs is None or scale != other:
        return "--"
    if len({(record["device"], precision(record)) for record in (*records, *reference)}) > 1:
        return "--"
    return f"{theirs / mine:.1f}x"


def timed_speed(row: dict[str, Any], first: dict[str, Any]) -> str:
    """Return the step time of the `first` row of a group over that of `row`, and the card; -- unless both were timed.

    The times are medians of a benchmark, of one record: never of two machines.
    """
    if "timed" not in row or "timed" not in first or row["timed"][0] != first["timed"][0]:
        return "--"
    path = studies.results() / "benchmark" / "gpu" / f"{row['timed'][0]}.json"
    if not path.exists():
        return "--"
    result = studies.record(path)
    seconds = {found["label"]: found["seconds"]["total"]["median"] for found in result["rows"]}
    return f"{seconds[first['timed'][1]] / seconds[row['timed'][1]]:.1f}x on {result['about']['machine']}"


def precision(record: dict[str, Any]) -> str:
    """Return the precision of a run, and that of its gradient part where it has another one."""
    own = record["gradient_precision"]
    return record["precision"] + (f" (gradient part {own})" if own else "")


def other_precisions(records: list[dict[str, Any]]) -> list[str]:
    """Return the precisions of some runs, sorted; none where all of them are float32."""
    found = {precision(record) for record in records}
    return [] if found <= {"fp32"} else sorted(found)


def budget(row: dict[str, Any], scale: str, records: list[dict[str, Any]]) -> str:
    """Return the scale, the steps and a precision other than float32; a row without a number of the paper is `full`."""
    if not records:
        return "--"
    name = "full" if scale == "paper" and row["paper"] == "--" else scale
    return ", ".join([name, f"{records[0]['steps']} steps", *other_precisions(records)])


def measured(records: list[dict[str, Any]]) -> list[str]:
    """Return the cells on parameters, step time, peak memory and commits."""
    if not records:
        return ["--"] * 4
    timed: dict[str, list[dict[str, float]]] = {}
    for record in records:
        if "step" in record["times"]:
            timed.setdefault(record["device"], []).append(record["times"]["step"])
    return [
        f"{records[0]['num_parameters']:,}",
        "; ".join(f"{_milliseconds(steps)} on {device}" for device, steps in sorted(timed.items())) or "--",
        f"{max(record['peak_memory'] / 1e6 for record in records):,.0f}",
        provenance.commits(records),
    ]


def _milliseconds(runs: list[dict[str, float]]) -> str:
    """Return `median [p10, p90] (n steps)` of the steps of some runs; the median alone where a record has no more."""
    middle = f"{1e3 * statistics.median(run['median'] for run in runs):.1f}"
    if not all({"p10", "p90", "n"} <= set(run) for run in runs):
        return middle
    low, high = 1e3 * min(run["p10"] for run in runs), 1e3 * max(run["p90"] for run in runs)
    return f"{middle} [{low:.1f}, {high:.1f}] ({sum(run['n'] for run in runs)} steps)"


def _folds(table: dict[str, Any]) -> markdown.Page:
    """Return the paper's number, and ours by every protocol of scripts/running/folds.py."""
    protocols = table["protocols"]
    about = (
        "mean ± population std. The paper chooses the best test epoch of each fold, which is optimistic; an epoch "
        f"chosen by the other folds, or by validation graphs held out of training, is not. {COMPARED} Both compare the "
        "first protocol. Smaller budgets are labelled; * marks uncommitted changes; -- means not run."
    )
    first, *others = protocols.values()
    heads = ["row", "paper", first, *DIFFERENCE, *others, "folds", "parameters", "CPU s per fold", "commit"]
    rows = []
    for row in table["rows"]:
        # the record of all folds lies where the folder of seeds would
        folders = [studies.record_folder(row["experiment"], scale) for scale in SCALES]
        paths = [folder.with_name(f"{folder.name}.json") for folder in folders]
        record = next((studies.record(path) for path in paths if path.exists()), None)
        cells = ["--"] * (len(protocols) + 6) if record is None else _folds_cells(record, list(protocols), row["paper"])
        rows.append([row["name"], row["paper"], *cells])
    return markdown.page(f"# {table['title']}", about, markdown.table(heads, rows))


def _folds_cells(record: dict[str, Any], protocols: list[str], paper: str) -> list[str]:
    results = [record["protocols"].get(name) for name in protocols]
    seconds = record["cpu_seconds"]
    label = label_of(record["scale"], [record] if record.get("choices") else [])
    first, *others = (
        "--" if result is None else f"{result['mean']:.2f} ± {result['std']:.2f}{label}" for result in results
    )
    top = results[0] if record["scale"] == "paper" else None
    return [
        first,
        *difference(paper, [] if top is None else [top["mean"]]),
        *others,
        str(len(record["folds"])),
        f"{record['num_parameters']:,}",
        f"{seconds['mean']:.0f} ({seconds['min']:.0f} to {seconds['max']:.0f})" if seconds else "--",
        provenance.commit(record),
    ]
