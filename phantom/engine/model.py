"""What the engine asks of a model, and the defaults of what a model may leave out.

A model is an `nn.Module` of the form of `Model`. It inherits and imports nothing of the engine.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from torch import nn

from phantom.deq import DEQ, deqs_of
from phantom.engine.errors import ConfigError


class Model(Protocol):
    """A model that trains.

    Its constructor takes keywords: those of its leaf in configs/model, the numbers that the data has in `Spec.inputs`
    (such as `in_channels` and `num_classes`), and `deq`, the DEQ layer of the run. It keeps `deq` as a child module and
    calls `self.deq(f, z0)` for every solve, so that the engine can find it and change its settings. A DEQ that it makes
    itself, with other settings, keeps those.

    The engine reads three more names where they are there:

    cell: the child module that computes f, for compile=true; its `forward` takes all that varies as arguments.
    parameter_counts(): the number of parameters of each part, which add up to all, for the record. By default the
        parts are the children and the parameters that belong to no child.
    official_parameter_count: the number that the authors' script prints, where it counts in another way.
    """

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of task that the model serves; see `Task.kind`."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Return (output, solutions): what the task scores, and one `Solution` per solve, in order.

        The task says what it calls the model with, and what it takes besides: `ImageClassification` calls
        `model(images)` for (logits, solutions), `LanguageModelling` calls `model(tokens, targets, memory)` for
        (losses, solutions, memory).
        """
        ...


def check_model(model: object, deq: DEQ) -> nn.Module:
    """Return the model that a constructor made with `deq`, if the engine can train it.

    Raises:
        ConfigError: it is no module, or holds neither `deq` nor a copy.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {name} is no torch.nn.Module, so that there is nothing to train")
    held = deqs_of(model)
    if not any((own.solver, own.grad) == (deq.solver, deq.grad) for own in held):
        found = "no DEQ but its own, which the config does not set" if held else "no DEQ"
        raise ConfigError(f"model: {name} holds {found}: keep the argument `deq` as a child module, self.deq = deq")
    return model


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of every part of a model, and of `dead` ones; they add up to all parameters.

    By default the parts are the child modules, and parameters without a gradient are dead.
    """
    own = getattr(model, "parameter_counts", None)
    if own is not None:
        return own()
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if parameter.requires_grad else "dead"
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def official_parameter_count(model: nn.Module) -> int | None:
    """Return the number of parameters that the authors' script prints; None where it is the number of parameters."""
    return getattr(model, "official_parameter_count", None)
