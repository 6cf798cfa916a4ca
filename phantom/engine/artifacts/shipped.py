"""Weights that ship: a folder with the weights of a run, its config and its record, and nothing else that it left.

    model.safetensors   the tensors, by the names of the model
    config.yaml         the run's config
    record.json         the run's record with one more field, `weights`: see `About`
    README.md           the card, written from the record

The folder needs neither the run nor its data to build the model, and may be copied to anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from phantom.engine.artifacts import files, records
from phantom.engine.artifacts.weights import digest, read_tensors
from phantom.engine.errors import CheckpointError

WEIGHTS = "model.safetensors"
# keys of a config that name folders of one machine
PLACES = ("root", "cache")


@dataclass(frozen=True, kw_only=True)
class About:
    """What the field `weights` of the record says.

    Args:
        checkpoint: that of the run, `last` or `best`.
        step: of the training.
        split: on which the metric was measured.
        inputs: the numbers that the model took from the data, see `Spec.inputs`.
        digest: a short hash of the file of tensors.
    """

    checkpoint: str
    step: int
    split: str
    inputs: dict[str, int]
    digest: str


class Shipped(NamedTuple):
    """A folder of weights as it was read; `config` is YAML, and `path` is the file of tensors."""

    config: str
    record: dict[str, Any]
    about: About
    tensors: dict[str, torch.Tensor]
    path: Path


def read(folder: Path) -> Shipped:
    """Read a folder of weights; code inside it is not run.

    Raises:
        CheckpointError: the folder holds no weights, or others than its record says.
    """
    found, path = records.read(folder), folder / WEIGHTS
    if found is None or not path.is_file():
        raise CheckpointError(
            f"{folder} holds no weights that ship: it needs {WEIGHTS}, config.yaml and record.json, as "
            "`python scripts/publish.py pack run=<folder> name=<name>` writes them"
        )
    record, config = found
    try:
        about = About(**record["weights"])
        inputs = dict(about.inputs)
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(About.__dataclass_fields__)
        raise CheckpointError(
            f"{folder}/record.json has no field `weights` with {names}: pack the run again"
        ) from error
    # they become arguments beside a config: a `_target_` among them would choose what is built
    wrong = [key for key, value in inputs.items() if key[:1] == "_" or not isinstance(value, int)]
    if wrong:
        raise CheckpointError(f"{folder}/record.json: weights.inputs.{wrong[0]} is refused: inputs are whole numbers")
    if digest(path) != about.digest:
        raise CheckpointError(
            f"{path} is not the file that its record names (hash {digest(path)} there, {about.digest} in the record): "
            "copy the folder again"
        )
    return Shipped(config, record, about, read_tensors(path), path)


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write all of a folder of weights but its card; return the record as written.

    Places of this machine leave the config. The record comes last: without it the folder holds no weights.

    Args:
        about: the fields of `About` but the digest.
    """
    from safetensors.torch import save

    # tensors that share memory are written once each: a model that ties them has both names
    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    files.write(folder / WEIGHTS, data)
    places = {key: None for key in PLACES if key in config["data"]}
    kept = {**config, "runs": "runs", "data": {**config["data"], **places}}
    files.write(folder / "config.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).encode())
    whole = {**record, "weights": asdict(About(**about, digest=digest(folder / WEIGHTS)))}
    records.write_json(folder / "record.json", whole)
    return whole
