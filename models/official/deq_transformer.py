"""Names of the DEQ Transformer in public code bases.

deq (locuslab/deq, DEQ-Sequence) and torchdeq (locuslab/torchdeq, deq-zoo/deq-seq) share one naming scheme. Tied output
tables and projections appear under two names; they must agree.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from models.official.piece import Convert, Piece, rename

# official name -> ours
_RULES = {
    r"word_emb\.emb_layers\.(\d+)\.weight$": r"embedding.tables.\1",
    r"word_emb\.emb_projs\.(\d+)\.weight$": r"embedding.projections.\1",
    r"inject_conv\.(weight|bias)$": r"injection.\1",
    r"func\.dec_attn\.r_w_bias$": r"cell.attention.content_bias",
    r"func\.dec_attn\.r_r_bias$": r"cell.attention.position_bias",
    r"func\.dec_attn\.qkv_net\.(weight_[gv])$": r"cell.attention.qkv.\1",
    r"func\.dec_attn\.r_net\.(weight_[gv])$": r"cell.attention.position.\1",
    r"func\.dec_attn\.o_net\.(weight_[gv])$": r"cell.attention.out.\1",
    r"func\.dec_attn\.o_net\.bias$": r"cell.attention.out_bias",
    r"func\.pos_ff\.ff1_net\.(weight_[gv])$": r"cell.ffn.inner.\1",
    r"func\.pos_ff\.ff1_net\.bias$": r"cell.ffn.inner_bias",
    r"func\.pos_ff\.ff2_net\.(weight_[gv])$": r"cell.ffn.outer.\1",
    r"func\.pos_ff\.ff2_net\.bias$": r"cell.ffn.outer_bias",
    r"crit\.cluster_(weight|bias)$": r"softmax.cluster_\1",
    r"crit\.out_layers\.(\d+)\.bias$": r"softmax.biases.\1",
    r"crit\.out_layers\.(\d+)\.weight$": r"embedding.tables.\1",
    r"crit\.out_projs\.0\.weight$": r"softmax.head_projection",
    r"crit\.out_projs\.(\d+)\.weight$": r"embedding.projections.\1",
}


def rename_deq_transformer(official: str) -> str:
    """Return our name of an official parameter; a name that no rule matches stays unchanged."""
    return rename(official, _RULES)


def deq(state: dict[str, Tensor]) -> Iterator[Piece]:
    """Convert a state dict of locuslab/deq, including its older versions.

    1x1 convolutions become matrices (older versions have them in the feed-forward layers as well). The converter leaves
    out the frequencies of the sinusoids, which are constants, and the cell's copies in older versions, `func_copy.*`
    and `deq.*`.
    """
    for official, tensor in state.items():
        if official == "pos_emb.inv_freq" or official.startswith(("func_copy.", "deq.")):
            continue
        yield Piece(official, rename_deq_transformer(official), tensor.squeeze(-1) if tensor.dim() == 3 else tensor)


DEQ_TRANSFORMER_SOURCES: dict[str, Convert] = {
    "deq": deq,
    "torchdeq": deq,
}
