"""How the cell of MDEQ convolves: as torch does, with padded channels, or with one weight gradient per backward.

Each form takes an odd kernel that keeps the size of the image, up to the stride. `bind` prepares a weight once per
solve; the call convolves with what it returns.

Shapes: B images, C channels read and O written, H x W pixels, K x K weights of a kernel, k evaluations of f.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phantom.layers import cast_for_autocast

# the depth of a product of matrix units in half precision; wider blocks cost more arithmetic, and nobody timed them
BLOCK = 16


class Convolution(Protocol):
    """One form of the convolution without bias."""

    def bind(self, weight: Tensor) -> Tensor:
        """Return `weight` (O, C, K, K) as the call takes it."""
        ...

    def __call__(self, x: Tensor, weight: Tensor, channels: int, *, stride: int = 1) -> Tensor:
        """Return the convolution of x (B, C, H, W) with a bound weight; `channels` is O."""
        ...


class Plain:
    """The definition: torch's convolution."""

    def bind(self, weight: Tensor) -> Tensor:
        return weight

    def __call__(self, x: Tensor, weight: Tensor, channels: int, *, stride: int = 1) -> Tensor:
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


class Padded:
    """Pad C and O with zeros to multiples of `BLOCK`, and cut the output: 24 channels fill a matrix unit badly.

    Value and gradients are those of `Plain`, up to rounding. Parameters, state and norms keep their channels. Where C
    and O are multiples already, this is `Plain`. Each evaluation pads x, which is a copy: compile f, and it is part of
    the pass that makes x.
    """

    def bind(self, weight: Tensor) -> Tensor:
        write, read = (-channels % BLOCK for channels in weight.shape[:2])
        return F.pad(weight, (0, 0, 0, 0, 0, read, 0, write)) if read or write else weight

    def __call__(self, x: Tensor, weight: Tensor, channels: int, *, stride: int = 1) -> Tensor:
        read = weight.shape[1] - x.shape[1]
        x = F.pad(x, (0, 0, 0, 0, 0, read)) if read else x
        out = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return out[:, :channels] if out.shape[1] > channels else out


class Tied:
    """Compute the weight's gradient of the k evaluations that share a bound weight by one convolution of k B images.

    dL/dW = sum_j conv_backward(x_j, g_j) = conv_backward([x_1 .. x_k], [g_1 .. g_k]), concatenated along the batch. The
    gradient of x is computed step by step, as ever. Cost: until backward has passed the last evaluation, it holds all
    x_j and g_j of every convolution, k B (C H W + O H' W') numbers for each, where torch would drop them one by one;
    then it copies those of one convolution after the other. `checkpoint` of an estimator saves no memory of them.

    Second derivatives are right; that of `Implicit`, which has to see the weights that f reads, is refused in words.
    Compiled code and evaluations without a graph take the plain way. Torch refuses forward mode and torch.func.
    """

    def bind(self, weight: Tensor) -> Tensor:
        return _Tie.apply(weight)

    def __call__(self, x: Tensor, weight: Tensor, channels: int, *, stride: int = 1) -> Tensor:
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
            return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        # the cast stays outside: what backward reads of x is then narrow, too
        return _Convolve.apply(cast_for_autocast(x), weight, stride)


class _Tie(torch.autograd.Function):
    """The identity on a weight. Its backward, which runs after those of all uses, computes the gradient of them all.

    `uses` holds (x_j, g_j, stride) by the number of the backward that is under way: one that failed leaves nothing to
    the next.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.uses = {}
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        task = torch._C._current_graph_task_id()
        if task not in ctx.uses:
            return g
        (weight,) = ctx.saved_tensors
        x, grads, stride = _together(ctx.uses.pop(task))
        of_uses = _gradient(1, grads, x, weight, stride)
        return of_uses if g is None else g + of_uses


class _Convolve(torch.autograd.Function):
    """The convolution with a weight from `_Tie`, to whose node backward leaves the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        tie: Any = weight.grad_fn
        # a vjp with respect to x alone, as those of NPG and Implicit, never gets to the tie
        if torch._C._will_engine_execute_node(tie):
            tie.uses.setdefault(torch._C._current_graph_task_id(), []).append((x, g, ctx.stride))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return _gradient(0, g, x, weight, ctx.stride), None, None


def _gradient(of: int, g: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return the gradient of x (`of` = 0) or of the weight (1), which is wider than g and x under autocast."""
    settings = ([stride] * 2, [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1)
    wanted = [of == 0, of == 1, False]
    return torch.ops.aten.convolution_backward(g, x, weight.to(g.dtype), None, *settings, wanted)[of]


def _together(uses: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int]:
    """Return x (k B, C, H, W), g (k B, O, H', W') and the stride of all k uses."""
    x, g, strides = zip(*uses, strict=True)
    return (x[0], g[0], strides[0]) if len(uses) == 1 else (torch.cat(x), torch.cat(g), strides[0])
