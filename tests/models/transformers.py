"""Small DEQ Transformers in float64, and F written out position by position."""

import math

import torch
import torch.nn.functional as F

from models.deq_transformer.cell import CellMasks, TransformerCell
from models.deq_transformer.model import DEQTransformer
from phantom import DEQ, UPG, Broyden

V = 40


def make(*, dtype=torch.float64, scale: float = 1.0, solver=None, grad=None, **options) -> DEQTransformer:
    torch.manual_seed(0)
    arguments = {
        "vocab_size": V,
        "d_model": 12,
        "num_heads": 3,
        "d_inner": 20,
        "cutoffs": [10, 25],
        "div_val": 2,
        "norm": "post",
        "preln_residual": "normalised",
        "mem_len": 6,
        "eval_mem_len": 6,
        "window": 1000,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.01,
    } | options
    deq = DEQ(solver=solver or Broyden(max_steps=60, tol=1e-12), grad=grad or UPG(k=5, lam=0.8))
    model = DEQTransformer(**arguments, deq=deq).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("cell.") or name.endswith("bias"):
                parameter.normal_(0, 0.3 * scale)
            elif name.endswith("weight_g"):
                parameter.mul_(0.5 * scale)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randint(V, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return both[:, :-1], both[:, 1:]


def weight(layer) -> torch.Tensor:
    return layer.weight_v * layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True)


def written_out(
    cell: TransformerCell, z, u, history, window: int, *, masks: CellMasks | None = None, positions=None
) -> torch.Tensor:
    """Return F(z; u, history) position by position, with every key and value computed from scratch.

    Args:
        masks: factors on the cell's parts, all of them given; None for none.
        positions: (D,) factors on the sinusoids; None for none.
    """
    (batch, q, width), m, heads = z.shape, history.shape[1], cell.num_heads
    a, d = cell.attention, width // cell.num_heads
    ln = (lambda x: F.layer_norm(x, (width,))) if cell.norm == "pre" else (lambda x: x)
    qkv = ln(torch.cat([history, z], dim=1)) @ weight(a.qkv).T + u
    rate = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    attended = torch.zeros(batch, q, width, dtype=z.dtype)
    for b in range(batch):
        for h in range(heads):
            columns = slice(h * d, (h + 1) * d)
            query, key, value = (qkv[b, :, part * width : (part + 1) * width][:, columns] for part in range(3))
            for i in range(q):
                seen = [j for j in range(m + q) if 0 <= i + m - j < window]
                scores = []
                for j in seen:
                    phase = (i + m - j) * rate
                    wave = torch.cat([phase.sin(), phase.cos()])
                    r = (weight(a.position) @ (wave if positions is None else wave * positions))[columns]
                    content = (query[m + i] + a.content_bias[h]) @ key[j]
                    scores.append((content + (query[m + i] + a.position_bias[h]) @ r) / math.sqrt(d))
                shares = torch.softmax(torch.stack(scores), dim=0)
                shares = shares if masks is None else shares * masks.attention[b, h, i, seen]
                attended[b, i, columns] = shares @ value[seen]
    attended = attended @ weight(a.out).T + a.out_bias
    s = z + (attended if masks is None else attended * masks.out)

    def ffn(x):
        hidden = torch.relu(x @ weight(cell.ffn.inner).T + cell.ffn.inner_bias)
        hidden = hidden if masks is None else hidden * masks.inner
        output = hidden @ weight(cell.ffn.outer).T + cell.ffn.outer_bias
        return output if masks is None else output * masks.ffn

    if cell.norm == "post":
        s = F.layer_norm(s, (width,))
        return F.layer_norm(s + ffn(s), (width,))
    n = F.layer_norm(s, (width,))
    return (n if cell.preln_residual == "normalised" else s) + ffn(n)
