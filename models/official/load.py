"""Load checkpoints of the official code bases into the models of this project, by their own names.

To add a model family: write `models/reference_<family>.py` with one function per code base that turns an official
state dict into pieces (see `Convert`), and add its table to `REFERENCES`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.official.deq_transformer import DEQ_TRANSFORMER_SOURCES
from models.official.ignn import IGNN_SOURCES
from models.official.mdeq import MDEQ_SOURCES
from models.official.piece import Convert
from models.official.reasoner import REASONER_SOURCES

# model class -> code base -> how its state dict becomes ours
REFERENCES: dict[str, dict[str, Convert]] = {
    "MDEQ": MDEQ_SOURCES,
    "DEQTransformer": DEQ_TRANSFORMER_SOURCES,
    **IGNN_SOURCES,
    "Reasoner": REASONER_SOURCES,
}


def load_reference(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load an official state dict into `model`.

    A prefix `module.` common to all names is dropped. Several official names may stand for one of ours (tied weights,
    alias copies); their tensors must agree. Nothing is loaded unless everything fits.

    Args:
        model: a model of this project, not wrapped.
        state_dict: official names and tensors.
        source: the code base the names are from, a key of `REFERENCES[type(model).__name__]`.

    Raises:
        TypeError: `state_dict` does not map names to tensors.
        ValueError: unknown model or source; or one list of all names that are unknown, missing, disagree with their
            alias or have another shape.
    """
    family = type(model).__name__
    if family not in REFERENCES:
        raise ValueError(f"no official checkpoints are known for {family}; known models: {', '.join(REFERENCES)}")
    sources = REFERENCES[family]
    if source not in sources:
        raise ValueError(f"source={source!r} is not known for {family}; choose one of {', '.join(sources)}")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state_dict must map names to tensors, got {type(value).__name__} for {name!r}: "
                "pass the entry of the checkpoint that holds the weights"
            )
    ours = model.state_dict()
    found: dict[str, tuple[str, Tensor]] = {}
    problems = []
    for official, name, tensor in sources[source](_without_prefix(state_dict)):
        first, other = found.setdefault(name, (official, tensor))
        if name not in ours:
            problems.append(f"unknown: {official}")
        elif tensor.shape != ours[name].shape:
            problems.append(f"shape: {official} is {tuple(tensor.shape)}, {name} is {tuple(ours[name].shape)}")
        elif not torch.equal(other, tensor):
            problems.append(f"alias: {official} and {first} both stand for {name}, but differ")
    problems += [f"missing: {name}" for name in ours if name not in found]
    if problems:
        raise ValueError(f"this state dict is not {family} of {source} at these sizes:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: tensor for name, (_, tensor) in found.items()})


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module." if all(name.startswith("module.") for name in state_dict) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
