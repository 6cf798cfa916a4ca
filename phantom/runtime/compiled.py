"""Where torch.compile meets a solve. The first solve that it traces imports this: torch._dynamo takes long to load."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import disable, skip
from torch._dynamo.eval_frame import _callback_from_stance, skip_code

from phantom import deq
from phantom.gradient.adjoint import Equilibrium
from phantom.gradient.inverse import Inverse
from phantom.solution import Solution
from phantom.state import Map, State

REASON = (
    "phantom runs a solve between two compiled halves of the model, and compiles f there alone: one graph break, which "
    "fullgraph=True refuses. Traced whole is BPTT, which has no solve; torch.export(strict=False) records solvers with "
    "tol=None"
)


@skip
def outside(f: Map, z0: State, **settings: Any) -> Solution:
    """Return `fixed_point(f, z0, **settings)`, run eagerly, with f compiled in the solve as the model around it.

    With a graph f runs eagerly: the backward of a compiled f is one piece, and would compute the gradients of all
    parameters with every vjp. Compile the cell itself to have both.
    """
    callback = set_eval_frame(None)

    def inner(z: State) -> State:
        if torch.is_grad_enabled():
            return f(z)
        set_eval_frame(_callback_from_stance(callback))
        try:
            return f(z)
        finally:
            set_eval_frame(None)

    try:
        return deq.fixed_point(inner, z0, **settings)
    finally:
        set_eval_frame(callback)


outside._torchdynamo_disable_msg = REASON
# these frames lead to `outside` and have nothing to compile: each would be a graph break of its own
for function in (deq.fixed_point, deq.DEQ.forward, deq._is_compiled_around, deq._check_settings, deq._check_extras):
    skip_code(function.__code__)
# a backward that compiled code starts, a whole training step for one, would be compiled line by line
EAGER = "phantom runs the backward of an equilibrium eagerly"
for node in (Equilibrium, Inverse):
    setattr(node, "backward", staticmethod(disable(node.backward, reason=EAGER)))  # noqa: B010 - torch types it otherwise
