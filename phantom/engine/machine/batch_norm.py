"""Batch normalisation over the images of all ranks, where torch has none: on the CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SumBatchNorm(_BatchNorm):
    """Batch norm over all ranks by a differentiable sum, with gloo too; torch's SyncBatchNorm runs on GPUs alone.

    Per channel, over all positions of all ranks: mu = sum x / n, v = sum (x - mu)^2 / n, y = (x - mu) / sqrt(v + eps)
    * weight + bias. Two sums over ranks forward and two backward; ranks may have unlike numbers of images. The
    gradients are those of the sum of the losses of all ranks, each rank holding its part.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = torch.full((), input.numel() // input.shape[1], dtype=wide.dtype)
        dist.all_reduce(count)
        mean = _SumOverRanks.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        self._keep(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        result = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"a batch norm needs (B, C) or (B, C, ...), got {tuple(input.shape)}")

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, the unbiased variance among them."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronise(model: nn.Module) -> None:
    """Replace every batch norm in `model` by one over all ranks, with the same parameters and statistics."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            options = (child.eps, child.momentum, child.affine, child.track_running_stats)
            norm = SumBatchNorm(child.num_features, *options)
            norm.train(child.training)
            for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(norm, part, getattr(child, part))
            setattr(model, name, norm)
        else:
            synchronise(child)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; backward it sums the cotangents, of which every rank has its own."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *cotangents: Tensor) -> Tensor:
        return _SumOverRanks.apply(cotangents[0])
