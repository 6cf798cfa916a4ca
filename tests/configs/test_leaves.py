"""Every leaf of every group is one constructor with its keywords, and nothing but its keywords."""

import functools
import itertools
from dataclasses import replace

import hydra.utils
import pytest
import torch

from phantom.engine.build import build_model, build_source
from phantom.engine.config.configs import LAYERS
from phantom.engine.config.instantiate import instantiate
from phantom.engine.errors import ConfigError
from phantom.engine.plan import optimizer_factory
from phantom.engine.source import Shard
from tests.configs.tiny_data import INPUTS, spec, tiny
from tests.plans import composed, plan
from train import CONFIGS

# data sets that a model leaf serves; the first model of a data set is chosen with it
SERVED = {
    "mdeq_tiny": ["digits", "cifar10", "cifar10_small", "images_synthetic", "imagenet"],
    "mdeq_large": ["cifar10"],
    "mdeq_small": ["imagenet"],
    "deq_transformer_small": ["pydocs", "wikitext103"],
    "deq_transformer": ["text_synthetic", "wikitext103"],
    "ignn": ["cox2", "cox2_synthetic", "proteins", "proteins_synthetic", "ppi", "ppi_synthetic", "chains"],
    "ignn_spectral": ["ppi"],
    **{
        f"reasoner_{leaf}": ["sudoku", "sudoku_files", "maze"]
        for leaf in ("eqr", "hrm", "small", "trm", "trm_attention")
    },
}
LEAVES = [
    (group, leaf)
    for group in CONFIGS.groups
    if group not in (*LAYERS, "model")
    for leaf in CONFIGS.leaves(group)
    if (group, leaf) != ("adjoint_solver", "rollout")  # it measures no residual, and is refused there
]


@pytest.mark.parametrize(
    ("group", "table", "file", "known"),
    [
        ("model", "SERVED", "tests/configs/test_leaves.py", set(SERVED)),
        ("data", "SERVED", "tests/configs/test_leaves.py", set(itertools.chain(*SERVED.values()))),
        ("data", "INPUTS", "tests/configs/tiny_data.py", set(INPUTS)),
    ],
)
def test_nothing_is_forgotten(group, table, file, known):
    leaves = set(CONFIGS.leaves(group))
    new, gone = sorted(leaves - known), sorted(known - leaves)
    assert not new, f"configs/{group} has {', '.join(new)}, and {table} of {file} has not: add it there"
    assert not gone, f"{table} of {file} has {', '.join(gone)}, and configs/{group} has not: remove it there"


def chosen_with(group: str, leaf: str) -> list[str]:
    """Return what has to be chosen besides, for the leaf to be of use."""
    if group == "adjoint_solver":
        return ["grad=implicit"]
    return [f"model={model}" for model, served in SERVED.items() if group == "data" and leaf in served][:1]


def keywords(leaf: dict) -> dict:
    return {key: value for key, value in leaf.items() if not key.startswith("_")}


@pytest.mark.parametrize(("group", "leaf"), LEAVES, ids=lambda part: part)
def test_a_leaf_is_its_constructor(group, leaf, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    more = chosen_with(group, leaf)
    if group == "data" and leaf != "ppi":
        more += tiny(leaf, tmp_path / "data")
    node = composed([f"{group}={leaf}", *more])[0][group]
    target = hydra.utils.get_object(node["_target_"])
    made = instantiate(node, group)
    if node.get("_partial_"):
        assert isinstance(made, functools.partial) and made.func is target and made.keywords == keywords(node)
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        parameter.sum().backward()
        optimizer_factory(node)([parameter]).step()
        assert (parameter < 1).all(), "a step goes downhill"
        refused = functools.partial(optimizer_factory, {**node, "nonsense": 1})
    else:
        assert type(made) is target
        for key, value in keywords(node).items():
            if group != "data" and not isinstance(value, dict):
                assert getattr(made, key) == (tuple(value) if isinstance(getattr(made, key), tuple) else value), key
        refused = functools.partial(instantiate, {**node, "nonsense": 1}, group)
    if leaf != "timm":  # hands every keyword on
        with pytest.raises(ConfigError, match=rf"{group}: .* has no key nonsense; valid keys: "):
            refused()


@pytest.mark.parametrize(("group", "leaf"), LEAVES, ids=lambda part: part)
def test_a_run_with_it_resumes_its_own_checkpoint(group, leaf):
    made = plan([f"{group}={leaf}", *chosen_with(group, leaf)])
    assert made.differences(made.text) == []


@pytest.mark.parametrize("leaf", CONFIGS.leaves("data"))
def test_data_says_what_it_is(leaf, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    made = plan([f"data={leaf}", *chosen_with("data", leaf), *tiny(leaf, tmp_path / "data")])
    source = build_source(made)
    expected = spec(leaf)
    assert source.spec.kind == expected.kind == source.kind and source.spec.inputs.keys() == expected.inputs.keys()
    if leaf not in ("imagenet", "wikitext103", "pydocs"):  # classes and words are counted in the files
        assert source.spec.inputs == expected.inputs
    assert {"train", "test"} <= set(source.splits)
    digests = source.digests()
    assert {"train", "test"} <= digests.keys() and all(len(value) == 16 for value in digests.values())
    assert build_source(made).digests() == digests
    assert len(next(iter(source.train(epoch=0, start=0, shard=Shard(micro=2))))) in (1, 2)
    assert next(iter(source.evaluate("test", shard=Shard()))) is not None


@pytest.mark.parametrize(("leaf", "data"), [(leaf, data) for leaf, many in SERVED.items() for data in many])
def test_a_model_serves_its_data(leaf, data):
    made = plan([f"model={leaf}", f"data={data}"])
    with torch.device("meta"):
        model = build_model(made, spec(data))
    assert type(model) is hydra.utils.get_class(made.model_config["_target_"])
    with pytest.raises(ConfigError, match=r"model: .* has no key nonsense; valid keys: "):
        build_model(replace(made, model_config={**made.model_config, "nonsense": 1}), spec(data))
