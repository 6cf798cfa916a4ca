"""Load checkpoints of the official code bases into the models of this project, by their official names.

To add a model family: write `models/official/<family>.py` with one function per code base that turns an official
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

# model class -> code base -> converter of its state dict to our names
REFERENCES: dict[str, dict[str, Convert]] = {
    "MDEQ": MDEQ_SOURCES,
    "DEQTransformer": DEQ_TRANSFORMER_SOURCES,
    **IGNN_SOURCES,
    "Reasoner": REASONER_SOURCES,
}


def load_reference(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load an official state dict into `model`.

    The loader drops the prefixes `module.` and `_orig_mod.` that all names share. Several official names may map to one
    of ours (tied weights, copies); their tensors must be equal. If anything does not fit, the model does not change.

    Args:
        model: a model of this project, not wrapped.
        state_dict: official names and tensors.
        source: code base of the official names, a key of `REFERENCES[type(model).__name__]`.

    Raises:
        TypeError: `state_dict` does not map names to tensors.
        ValueError: the model or source is unknown, or names do not fit: the message lists all that are unknown,
            missing, differ from their alias or have another shape.
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
            problems.append(f"alias: {official} and {first} both map to {name}, but differ")
    problems += [f"missing: {name}" for name in ours if name not in found]
    if problems:
        raise ValueError(f"this state dict is not a {family} of {source} with these sizes:\n  " + "\n  ".join(problems))
    model.load_state_dict({name: tensor for name, (_, tensor) in found.items()})


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(state_dict)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # torch.compile and DistributedDataParallel, in any order
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found
