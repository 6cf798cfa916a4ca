"""f for products with its Jacobian, where torch compiles, fuses, keeps elsewhere or caches what f computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from phantom.runtime.threads import Shared
from phantom.state import Map, State


def frozen(f: Map) -> Map | None:
    """Return f as a map whose value has a graph to z alone, where f is a compiled module, or `partial` of one.

    The backward of compiled code is one piece: a product with the Jacobian of f would compute the gradients of all
    weights, too. Here they need none. The module compiles itself once more for this. Of any other f it is None.
    """
    call = f if isinstance(f, partial) else partial(f)
    module = call.func
    if not isinstance(module, nn.Module) or not _is_compiled(module):
        return None
    held = {
        f"{path}.{name}" if path else name: tensor
        for path, part in module.named_modules()  # each once, though a cell may hold one under two names
        for name, tensor in chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
    }
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in held.values()):
        return None  # a sharded weight gathers itself
    held = {name: tensor.detach() for name, tensor in held.items()}
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (call.args, call.keywords))

    def map_of_z(z: State) -> State:
        with reusable():
            # tied names are all there; torch would swap such a weight twice, and put the detached one back for good
            return torch.func.functional_call(module, held, (*args, z), kwargs, tie_weights=False)

    return map_of_z


def reusable() -> AbstractContextManager:
    """Let several products run backward through one evaluation of compiled code, which may not overwrite what it saved.

    torch asks when it compiles such a backward, and again when it runs one of changing shapes.
    """
    return config.patch(donated_buffer=False)


# torch.compile's stance and the choice of an attention kernel are the process's
_EAGER = Shared(lambda: torch.compiler.set_stance("force_eager"))
_UNFUSED = Shared(lambda: sdpa_kernel(SDPBackend.MATH))


def uncompiled() -> AbstractContextManager:
    """Run f as written during the body: the backward of a compiled f is one piece, and has no derivative of its own.

    In one piece, every vjp computes the gradients of all weights. torch._dynamo takes seconds to load, and has nothing
    compiled where nobody has loaded it.
    """
    return _EAGER.inside() if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run f in steps that have a second derivative during the body: as written, and without fused attention.

    The backward of a fused kernel of `torch.nn.functional.scaled_dot_product_attention` has no derivative of its own,
    and no such kernel has forward mode.
    """
    with uncompiled(), _UNFUSED.inside():
        yield


def is_kept_elsewhere() -> bool:
    """Return whether hooks keep what a graph saves, as those of torch's checkpointing and of save_on_cpu.

    Every product with the Jacobian would fetch all of it again, under checkpointing by running the model once more.
    """
    hooks: Any = torch._C  # torch declares nothing of them
    return hooks._autograd._top_saved_tensors_default_hooks(False) is not None


def forget_without_graph() -> None:
    """Forget what a solve has left in torch's caches: weights without a graph would silently cut the gradient.

    These are the casts of autocast, and what `torch.nn.utils.parametrize.cached` keeps.
    """
    torch.clear_autocast_cache()
    cached = parametrize._cache
    for key in [key for key, weight in cached.items() if weight is not None and not weight.requires_grad]:
        del cached[key]


def _is_compiled(module: nn.Module) -> bool:
    # by module.compile(), or wrapped by torch.compile(module), whose class would take torch._dynamo to name
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
