"""The card of weights that ship: Markdown for a reader, below the YAML that the Hugging Face hub reads."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.reporting import markdown
from scripts.reporting.provenance import command

NAME = "README.md"
LICENCE = "mit"
CHOSEN = {"best": "best", "last": "final"}  # where a record has the metrics of a checkpoint


def render(name: str, record: Mapping[str, Any]) -> str:
    """Return the card of the weights `name` whose record this is; its numbers are those of the record.

    Args:
        record: with the field `weights`, see `phantom.engine.artifacts.shipped`.
    """
    choices, about = record["choices"], record["weights"]
    head = {
        "license": LICENCE,
        "library_name": "phantom-gradients",
        "tags": ["implicit-model", "deep-equilibrium-model", *(choices[key] for key in ("model", "data", "grad"))],
    }
    begun = ["python", "train.py", *record["overrides"], f"init=weights/{name}/model.safetensors"]
    model, data, grad = (f"`{key}={choices[key]}`" for key in ("model", "data", "grad"))
    return markdown.page(
        markdown.front_matter(head),
        f"# {name}",
        f"Weights of {model} on {data}, trained by {grad}: the run `{record['label']}`, seed {record['seed']}.",
        markdown.table(["of the record", ""], _facts(record)),
        *_remarks(record),
        "## Use",
        "In a checkout of the code, with its requirements. The first command measures the number above.",
        f"```\npython evaluate.py weights={name}\n{shlex.join(begun)}\n```",
        f'```python\nfrom evaluate import pretrained\n\nmodel = pretrained("{name}")  # needs no data\n```',
        "## Train again",
        f"```\n{command(record)}\npython scripts/publish.py pack run=<folder> name=<name> "
        f"checkpoint={about['checkpoint']}\n```",
    )


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of the weights in `folder`, which has their name."""
    (folder / NAME).write_text(render(folder.name, record), "utf-8")


def headline(record: Mapping[str, Any]) -> str:
    """Return the metric of the weights that a record is about."""
    about = record["weights"]
    return _number(record, CHOSEN[about["checkpoint"]], about["split"])


def _number(record: Mapping[str, Any], part: str, split: str) -> str:
    """Return the headline metric in a part of the record; null there is a number that was not finite."""
    value = record[part][split][record["metric"]]
    return "not finite" if value is None else f"{value:.2f}"


def _facts(record: Mapping[str, Any]) -> list[list[str]]:
    about, best = record["weights"], record["weights"]["checkpoint"] == "best"
    metric, split = record["metric"], about["split"]
    chosen = f"the evaluation with the best {metric} on {split}" if best else "the end of the run"
    commit = record["commit"] or "not known"
    return [
        [f"{metric} on {split}", headline(record)],
        ["taken at", f"step {about['step']} of {record['steps']}: {chosen}"],
        *([[f"{metric} at the end", _number(record, "final", split)]] if best else []),
        ["budget", f"scale={record['scale']}"],
        ["parameters", f"{record['num_parameters']:,}"],
        ["trained on", f"{record['device']}, {record['wall_seconds']:.0f} s"],
        ["commit", f"{commit}{'*' if record['dirty'] else ''}"],
        ["data, by hash", ", ".join(f"{key} {value}" for key, value in record["data_digests"].items()) or "--"],
        ["file, by hash", about["digest"]],
        ["licence", f"{LICENCE.upper()}, of the weights; data sets have terms of their own"],
    ]


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """Return what a reader might take the number for, and it is not."""
    about = record["weights"]
    found = []
    fold = next((item for item in record["overrides"] if item.startswith("data.fold=")), None)
    if fold is not None:
        found.append(f"One fold of several (`{fold}`): a table's number is the mean over all of them.")
    if about["checkpoint"] == "best" and about["split"] == "test":
        found.append("The test split itself chose the checkpoint, as in the paper: the number is optimistic.")
    return found
