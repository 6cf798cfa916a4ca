"""MDEQ: the multiscale equilibrium network for images.

Shapes: B images, C_i channels and H_i x W_i pixels of branch i (0 the finest); every branch halves the size, rounding
up. The state of a solve is one (B, C_i, H_i, W_i) tensor per branch.
Source: Bai et al., *Multiscale Deep Equilibrium Models* (2020), with the details of the code of Geng et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.mdeq.cell import Branches, MDEQCell
from models.mdeq.head import MDEQHead, make_stage0, make_stem
from phantom import DEQ, Solution
from phantom.validate import check_choice, check_counts, check_flag

Init = Literal["normal", "default"]


class MDEQ(nn.Module):
    """Classify images by the equilibrium of a multiscale cell.

    The stem makes the injection u_0; its BatchNorm runs once per forward, outside the solve. The solver finds
    z = F(z, u) from zeros, and the head reads all branches. All evaluations of f in a forward share the effective
    weights and dropout masks.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        channels: C_i, finest branch first; at least two.
        head_channels: h_i, planes of the head's bottleneck of branch i (it ends in 4 h_i channels).
        final_channels: input features of the classifier.
        num_downsamples: strided convolutions of the stem, 0 to 2. A 1x1 block ("stage0") follows the stem, except with
            no strides and two branches.
        expansion: ratio of inner to outer channels of a residual block.
        num_groups: groups of every GroupNorm of the cell; the last norm of a branch has half as many.
        num_blocks: residual blocks per branch.
        dropout: probability of the variational dropout in the cell.
        init: `normal` draws weights and biases of all plain convolutions from N(0, 0.01^2), as in the official CIFAR
            code (where weight-normalised convolutions and the classifier also keep PyTorch's initialisation);
            `default` is PyTorch's initialisation throughout, as in the official ImageNet code.
        channels_last: keep images, states and weights in channels_last memory format.
        deq: solver and gradient estimator.

    Raises:
        ValueError: an argument is out of range; the message says what is allowed.
    """

    kinds = ("image_classification",)

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int],
        head_channels: Sequence[int],
        final_channels: int,
        num_downsamples: int,
        expansion: int,
        num_groups: int,
        num_blocks: int,
        dropout: float,
        init: Init,
        channels_last: bool,
        deq: DEQ,
    ) -> None:
        super().__init__()
        channels, head_channels = tuple(channels), tuple(head_channels)
        check_counts(
            least=1,
            in_channels=in_channels,
            num_classes=num_classes,
            final_channels=final_channels,
            expansion=expansion,
            num_blocks=num_blocks,
            **{f"channels[{i}]": c for i, c in enumerate(channels)},
            **{f"head_channels[{i}]": c for i, c in enumerate(head_channels)},
        )
        if len(channels) < 2 or len(head_channels) != len(channels):
            raise ValueError(
                f"channels={channels} and head_channels={head_channels} must have one entry per branch, "
                "and an MDEQ has at least two branches"
            )
        if num_downsamples not in (0, 1, 2):
            raise ValueError(f"num_downsamples={num_downsamples!r} must be 0, 1 or 2")
        if num_groups < 2 or any(c % num_groups or c % (num_groups // 2) for c in channels):
            raise ValueError(
                f"num_groups={num_groups!r} must be at least 2, and num_groups and num_groups // 2 must divide every "
                f"entry of channels={channels}"
            )
        check_choice("init", init, get_args(Init))
        check_flag("channels_last", channels_last)
        self.in_channels = in_channels
        self.num_downsamples = num_downsamples
        self.stem = make_stem(in_channels, channels[0], num_downsamples=num_downsamples)
        has_stage0 = num_downsamples > 0 or len(channels) > 2
        self.stage0 = make_stage0(channels[0]) if has_stage0 else nn.Identity()
        self.cell = MDEQCell(
            channels=channels, expansion=expansion, num_groups=num_groups, num_blocks=num_blocks, dropout=dropout
        )
        self.head = MDEQHead(
            channels=channels, head_channels=head_channels, final_channels=final_channels, num_classes=num_classes
        )
        self.deq = deq
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if init == "normal":
            self._draw_plain_convolutions()
        self.to(memory_format=self.memory_format)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Solution]]:
        """Return logits (B, classes) and the one Solution in a tuple.

        Raises:
            ValueError: `images` are not (B, in_channels, H, W), or too small for the branches.
        """
        solution = self.deq(*self.bind(images))
        return self.head(solution.value), (solution,)

    def bind(self, images: Tensor) -> tuple[Callable[[Branches], Branches], Branches]:
        """Return the map f of these images and its initial guess, zeros on every branch.

        In training mode, this updates the stem's running statistics and draws the dropout masks.
        """
        self._check_images(images)
        u = self.stage0(self.stem(images.contiguous(memory_format=self.memory_format)))
        # the injection of the coarser branches is zero: None saves the cell the addition
        return self.cell.bind((u, *(None for _ in self.cell.channels[1:]))), self._zeros(u)

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of each part; the parts add up to all parameters."""
        parts = {
            "stem": self.stem,
            "stage0": self.stage0,
            "cell_blocks": self.cell.branches,
            "cell_fusion": self.cell.fusion,
            "cell_post_fuse": self.cell.post_fuse,
            "head_incre": self.head.incre,
            "head_downsamp": self.head.downsamp,
            "head_final": self.head.final,
            "head_classifier": self.head.classifier,
        }
        return {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}

    def _zeros(self, u: Tensor) -> Branches:
        batch, _, height, width = u.shape
        dtype = self.head.classifier.weight.dtype  # the parameters', even if autocast gives u a narrower one
        zeros = []
        for c in self.cell.channels:
            zero = torch.zeros((batch, c, height, width), device=u.device, dtype=dtype)
            zeros.append(zero.contiguous(memory_format=self.memory_format))
            height, width = (height + 1) // 2, (width + 1) // 2
        return tuple(zeros)

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}: "
                "the data that the model was built for sets in_channels"
            )
        min_size = 2 ** (len(self.cell.channels) - 1 + self.num_downsamples)
        if min(images.shape[2:]) < min_size:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels are too small: num_downsamples="
                f"{self.num_downsamples} and {len(self.cell.channels)} branches need at least {min_size}x{min_size}; "
                "use fewer branches or larger images"
            )
        if self.training and len(images) == 1 and max(images.shape[2:]) <= min_size:
            raise ValueError(
                f"one image of {images.shape[2]}x{images.shape[3]} pixels has one pixel in the coarsest branch, and "
                "batch norm trains on two numbers a channel at least: use another batch size, larger images or fewer "
                "branches"
            )

    def _draw_plain_convolutions(self) -> None:
        # the loop must skip weight-normalised convolutions, and does: they are not nn.Conv2d modules
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.01)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0.0, 0.01)
