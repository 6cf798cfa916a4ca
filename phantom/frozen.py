"""What products with the Jacobian of a compiled f need: f with everything but z held, or f as written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch._functorch import config
from torch.utils._pytree import tree_map_only

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
    held = dict(chain(module.named_parameters(), module.named_buffers()))
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in held.values()):
        return None  # a sharded weight gathers itself
    held = {name: tensor.detach() for name, tensor in held.items()}
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (call.args, call.keywords))

    def map_of_z(z: State) -> State:
        # several products run backward through one evaluation, which may not overwrite what it has saved
        with config.patch(donated_buffer=False):
            return torch.func.functional_call(module, held, (*args, z), kwargs)

    return map_of_z


def uncompiled() -> AbstractContextManager:
    """Run f as written during the body: the backward of a compiled f is one piece, and has no derivative of its own.

    In one piece, every vjp computes the gradients of all weights. torch._dynamo takes seconds to load, and has nothing
    compiled where nobody has loaded it.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _is_compiled(module: nn.Module) -> bool:
    # by module.compile(), or wrapped by torch.compile(module), whose class would take torch._dynamo to name
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
