"""A tiny recursive reasoner in float64, and puzzles for it."""

from functools import partial

import torch

from models.reasoner import Reasoner
from models.reasoner.cell import OneSpeed, TwoSpeeds
from models.reasoner.layers import AttentionBlock, MixerBlock, Stack
from models.reasoner.supervision import Supervision
from phantom import DEQ, UPG, FixedPoint

ATTENTION = partial(AttentionBlock, num_heads=2, expansion=1, multiple=4)
MIXER = partial(MixerBlock, expansion=1, multiple=4)
TIGHT = FixedPoint(max_steps=400, tol=1e-13)
WIDTH = 8


def make(
    *,
    block=MIXER,
    speeds: int = 2,
    num_fast: int = 2,
    shared: bool = True,
    lam: float = 1.0,
    contracting: bool = False,
    deq: DEQ | None = None,
    supervision: Supervision | None = None,
    **changes,
) -> Reasoner:
    """Return a tiny model of 2 x 3 cells in float64; `contracting`: with small blocks and a strong injection."""
    torch.manual_seed(0)
    stack = partial(Stack, num_layers=1, block=block)
    cell = partial(TwoSpeeds, num_fast=num_fast, shared=shared) if speeds == 2 else OneSpeed
    settings = {
        "d_model": WIDTH,
        "prefix_tokens": 1,
        "positions": "rope" if block is ATTENTION else "none",
        "start": "fixed",
        "noise": 0.0,
        "differentiate": "cycle",
        "vocab_size": 5,
        "height": 2,
        "width": 3,
    }
    model = Reasoner(
        **(settings | changes),
        cell=partial(cell, stack=stack, lam=lam),
        supervision=supervision or Supervision(steps=4, halting="halt", exploration=0.0),
        deq=deq or DEQ(solver=TIGHT, grad=UPG(k=1, lam=1.0)),
    ).double()
    with torch.no_grad():
        for parameter in model.cell.parameters():
            parameter.mul_(0.3 if contracting else 1.0)
        model.embedding.weight.mul_(6.0 if contracting else 1.0)
        if model.prefix is not None:
            model.prefix.normal_()
        if model.halting is not None:
            model.halting.weight.normal_()
            model.halting.bias.fill_(0.1)
    return model


def batch(count: int = 3, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, 5, (count, 6), generator=generator) for _ in range(2))


def flat(state) -> torch.Tensor:
    parts = state if isinstance(state, tuple) else (state,)
    return torch.cat([part.flatten(1) for part in parts], dim=1)
