"""Run MDEQ's kernels in Triton's interpreter, which needs no GPU, and print their errors.

Triton reads TRITON_INTERPRET=1 as it decorates a kernel: the test gives it to a process of its own.
"""

import copy
import json
import sys

import torch

from models.mdeq import kernels
from models.mdeq.cell import MDEQCell, ResidualBlock
from phantom import FixedPoint, fixed_point

# batch, channels, expansion, groups, height, width, whether there is a dropout mask, and an injection
BLOCKS = [
    (2, 24, 5, 8, 8, 8, True, True),
    (1, 16, 2, 4, 7, 5, False, True),
    (3, 32, 5, 8, 4, 4, True, False),
    (1, 24, 5, 8, 16, 16, False, False),
    (2, 8, 3, 2, 3, 9, True, True),
    (1, 6, 1, 3, 1, 2, False, True),
]


def relative(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@torch.no_grad()
def errors_of_a_block(batch, channels, expansion, groups, height, width, has_mask, has_u):
    """Return the relative errors of the plain block in float32, and of the kernels, to float64."""
    block = ResidualBlock(channels, expansion=expansion, num_groups=groups)
    for parameter in block.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    z = torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)
    mask = (torch.rand(batch, channels, 1, 1) > 0.3) / 0.7 if has_mask else None
    u = torch.randn_like(z) if has_u else None
    wide = copy.deepcopy(block).double()
    exact = wide(z.double(), wide.bind(*(None if t is None else t.double() for t in (u, mask))))
    plain = block(z, block.bind(u, mask))
    block.fused = True
    fused = block(z, block.bind(u, mask))
    return relative(plain, exact), relative(fused, exact)


@torch.no_grad()
def error_of_a_cell():
    """Return the relative errors of a plain cell, and of the same one fused, to float64."""
    cell = MDEQCell(channels=(8, 16), expansion=2, num_groups=4, num_blocks=2, dropout=0.0)
    z = tuple(torch.randn(2, c, s, s).contiguous(memory_format=torch.channels_last) for c, s in ((8, 6), (16, 3)))
    u = (torch.randn_like(z[0]), None)
    wide = copy.deepcopy(cell).double()
    exact = torch.cat([t.flatten() for t in wide.bind((u[0].double(), None))(tuple(t.double() for t in z))])
    found = []
    for fused in (False, True):
        if fused:
            cell.fuse()
        found.append(relative(torch.cat([t.flatten() for t in cell.bind(u)(z)]), exact))
    return found


def with_a_graph():
    """Return whether a fused cell gives the plain one's gradients, bit by bit: kernels serve no graph."""
    torch.manual_seed(0)
    cell = MDEQCell(channels=(8, 16), expansion=2, num_groups=4, num_blocks=1, dropout=0.0)
    z = tuple(torch.randn(2, c, s, s).contiguous(memory_format=torch.channels_last) for c, s in ((8, 6), (16, 3)))
    gradients = []
    for fused in (False, True):
        if fused:
            cell.fuse()
        cell.zero_grad()
        sum(t.square().sum() for t in cell.bind((z[0], None))(z)).backward()
        gradients.append([p.grad.clone() for p in cell.parameters() if p.grad is not None])
    return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def in_a_solve():
    """Return how often the kernels ran in four steps of a solve, and the errors of both cells to float64."""
    torch.manual_seed(0)
    cell = MDEQCell(channels=(8, 16), expansion=2, num_groups=4, num_blocks=1, dropout=0.0)
    z = tuple(torch.zeros(3, c, s, s).contiguous(memory_format=torch.channels_last) for c, s in ((8, 6), (16, 3)))
    u = torch.randn_like(z[0])
    solver = FixedPoint(max_steps=4, tol=None)

    def solved(cell, u, z):
        parts = fixed_point(cell.bind((u, None)), z, solver=solver, returns="last").value
        return torch.cat([part.flatten() for part in parts])

    exact = solved(copy.deepcopy(cell).double(), u.double(), tuple(part.double() for part in z))
    plain, calls, block = relative(solved(cell, u, z), exact), [], kernels.residual_block
    cell.fuse()
    kernels.residual_block = lambda *args: (calls.append(1), block(*args))[1]
    fused = relative(solved(cell, u, z), exact)
    kernels.residual_block = block
    return len(calls), plain, fused


if __name__ == "__main__":
    torch.manual_seed(0)
    found = {"blocks": [errors_of_a_block(*case) for case in BLOCKS], "cell": error_of_a_cell()}
    json.dump(found | {"graph": with_a_graph(), "solve": in_a_solve()}, sys.stdout)
