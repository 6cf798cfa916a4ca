"""Loading official checkpoints: names, aliases, the differences between code bases, one error for all problems."""

import re

import pytest
import torch

from models.mdeq.model import MDEQ
from models.official.deq_transformer import rename_deq_transformer
from models.official.load import REFERENCES, load_reference
from models.official.mdeq import rename_mdeq
from phantom import DEQ, UPG, Broyden


def make(seed: int) -> MDEQ:
    torch.manual_seed(seed)
    model = MDEQ(
        in_channels=3,
        num_classes=5,
        channels=(4, 8, 12),
        head_channels=(2, 3, 4),
        final_channels=6,
        num_downsamples=1,
        expansion=2,
        num_groups=2,
        num_blocks=2,
        dropout=0.0,
        init="normal",
        channels_last=False,
        deq=DEQ(solver=Broyden(max_steps=4, tol=None), grad=UPG(k=1, lam=1.0)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def official(name: str) -> str:
    """Return the official name of one of our tensors: the scheme of phantom_grad, written the other way round."""
    if match := re.match(r"cell\.fusion\.(\d+)\.(\d+)\.(\d+)\.(conv|norm)\.(.*)", name):
        i, j, stage, layer, rest = match.groups()
        layer = {"conv": "conv", "norm": "gnorm"}[layer]
        return (
            f"fullstage.fuse_layers.{i}.{j}.net.{layer}.{rest}"
            if int(j) > int(i)
            else (f"fullstage.fuse_layers.{i}.{j}.net.{stage}.{layer}.{rest}")
        )
    for ours, theirs in (
        (r"^stem\.", r"downsample."),
        (r"^cell\.branches\.(\d+)\.(\d+)\.norm", r"fullstage.branches.\1.blocks.\2.gn"),
        (r"^cell\.branches\.(\d+)\.", r"fullstage.branches.\1.blocks."),
        (r"^cell\.post_fuse\.(\d+)\.norm", r"fullstage.post_fuse_layers.\1.gnorm"),
        (r"^cell\.post_fuse\.", r"fullstage.post_fuse_layers."),
        (r"^head\.incre\.(\d+)\.shortcut\.", r"incre_modules.\1.0.downsample."),
        (r"^head\.incre\.(\d+)\.", r"incre_modules.\1.0."),
        (r"^head\.downsamp\.", r"downsamp_modules."),
        (r"^head\.final\.", r"final_layer."),
        (r"^head\.", r""),
    ):
        if re.match(ours, name):
            return re.sub(ours, theirs, name)
    return name


def official_state(model: MDEQ) -> dict[str, torch.Tensor]:
    return {official(name): tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: MDEQ) -> torch.Tensor:
    return model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("downsample.4.running_var", "stem.4.running_var"),
        ("stage0.0.weight", "stage0.0.weight"),
        ("fullstage.branches.1.blocks.0.conv2.weight_g", "cell.branches.1.0.conv2.weight_g"),
        ("fullstage.branches.0.blocks.0.gn3.bias", "cell.branches.0.0.norm3.bias"),
        ("fullstage.fuse_layers.0.1.net.gnorm.weight", "cell.fusion.0.1.0.norm.weight"),
        ("fullstage.fuse_layers.3.1.net.1.conv.weight", "cell.fusion.3.1.1.conv.weight"),
        ("fullstage.post_fuse_layers.2.conv.weight_v", "cell.post_fuse.2.conv.weight_v"),
        ("incre_modules.1.0.downsample.1.bias", "head.incre.1.shortcut.1.bias"),
        ("incre_modules.0.0.bn2.running_mean", "head.incre.0.bn2.running_mean"),
        ("downsamp_modules.0.0.bias", "head.downsamp.0.0.bias"),
        ("final_layer.1.weight", "head.final.1.weight"),
        ("classifier.bias", "head.classifier.bias"),
    ],
)
def test_names(theirs, ours):
    assert rename_mdeq(theirs) == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("crit.out_projs.0.weight", "softmax.head_projection"),
        ("crit.out_projs.2.weight", "embedding.projections.2"),
        ("func.dec_attn.o_net.weight_g", "cell.attention.out.weight_g"),
        ("func.dec_attn.o_net.bias_g", "func.dec_attn.o_net.bias_g"),
    ],
)
def test_names_of_the_transformer_are_whole(theirs, ours):
    assert rename_deq_transformer(theirs) == ours


def test_phantom_grad_from_data_parallel_with_aliases():
    source, target = make(0), make(1)
    state = official_state(source)
    state |= {n.replace("fullstage", "deq.func", 1): t.clone() for n, t in state.items() if n.startswith("fullstage")}
    assert not torch.equal(logits(source), logits(target))
    load_reference(target, {f"module.{name}": tensor for name, tensor in state.items()}, "phantom_grad")
    assert torch.equal(logits(source), logits(target))


def test_mdeq_has_a_second_cell_that_may_lag_behind():
    source, target = make(0), make(1)
    state = official_state(source)
    for name, tensor in official_state(make(2)).items():
        if name.startswith("fullstage"):
            state[name.replace("fullstage", "fullstage_copy", 1)] = tensor
            state[name.replace("fullstage", "deq.func_copy", 1)] = tensor.clone()
    load_reference(target, state, "mdeq")
    assert torch.equal(logits(source), logits(target))
    state["deq.func_copy.branches.0.blocks.0.gn1.bias"] += 1
    with pytest.raises(ValueError, match=r"unknown: deq\.func_copy\.branches\.0\.blocks\.0\.gn1\.bias$"):
        load_reference(target, state, "mdeq")


def test_deq_without_the_last_affines():
    source, target = make(0), make(1)
    with torch.no_grad():
        for layer in source.cell.post_fuse:
            layer.norm.weight.fill_(1.0), layer.norm.bias.zero_()
    state = {n: t for n, t in official_state(source).items() if "post_fuse" not in n or "gnorm" not in n}
    load_reference(target, state, "deq")
    assert torch.equal(logits(source), logits(target))
    with pytest.raises(ValueError, match=r"missing: cell\.post_fuse\.0\.norm\.weight"):
        load_reference(target, state, "phantom_grad")


def test_torchdeq_normalises_the_fusion_convolutions_too():
    source, target = make(0), make(1)
    state = {}
    for name, tensor in official_state(source).items():
        name = name.replace("fullstage", "full_stage")
        if "fuse_layers" in name and name.endswith("conv.weight") and "post" not in name:
            state[f"{name}_v"] = 3 * tensor
            state[f"{name}_g"] = tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        else:
            state[name] = tensor
    load_reference(target, state, "torchdeq")
    torch.testing.assert_close(logits(target), logits(source), rtol=1e-4, atol=1e-5)
    del state["full_stage.fuse_layers.0.1.net.conv.weight_g"]
    with pytest.raises(ValueError, match=r"unknown: full_stage\.fuse_layers\.0\.1\.net\.conv\.weight_v"):
        load_reference(target, state, "torchdeq")
    load_reference(
        target, {n.replace("fullstage", "full_stage"): t for n, t in official_state(source).items()}, "torchdeq"
    )
    assert torch.equal(logits(source), logits(target))


def test_one_error_lists_every_problem_and_nothing_is_loaded():
    model = make(0)
    before = logits(model)
    state = official_state(make(1))
    del state["classifier.bias"], state["fullstage.post_fuse_layers.1.gnorm.bias"]
    state["classifier.weight"] = state["classifier.weight"][:3]
    state["downsample.9.weight"] = torch.zeros(1)
    state["deq.func.branches.0.blocks.0.conv1.weight_g"] = torch.zeros(8, 1, 1, 1)
    with pytest.raises(ValueError) as error:
        load_reference(model, state, "phantom_grad")
    text = str(error.value)
    for problem in (
        "unknown: downsample.9.weight",
        "missing: head.classifier.bias",
        "missing: cell.post_fuse.1.norm.bias",
        "shape: classifier.weight is (3, 6), head.classifier.weight is (5, 6)",
        "alias: deq.func.branches.0.blocks.0.conv1.weight_g and fullstage.branches.0.blocks.0.conv1.weight_g",
    ):
        assert problem in text
    assert len(text.splitlines()) == 1 + 5
    assert torch.equal(logits(model), before)


def test_unknown_source_model_and_form():
    with pytest.raises(ValueError, match="choose one of " + ", ".join(REFERENCES["MDEQ"])):
        load_reference(make(0), {}, "timm")
    with pytest.raises(ValueError, match="Linear"):
        load_reference(torch.nn.Linear(2, 2), {}, "mdeq")
    with pytest.raises(TypeError, match="'epoch'"):
        load_reference(make(0), {"epoch": 3, "state_dict": {}}, "mdeq")
