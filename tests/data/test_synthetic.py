"""Generated stand-ins have the shape of the real sets, are the same every time, and can be learnt from."""

import numpy as np
import pytest
import torch

from phantom.engine.build import build_source
from phantom.engine.errors import UserError
from phantom.engine.source import Shard
from tests.configs.tiny_data import spec
from tests.plans import plan


def source(*items: str):
    return build_source(plan(["wandb=disabled", *items]))


@pytest.mark.parametrize(
    ("items", "real"),
    [
        (["data=images_synthetic"], "cifar10"),
        (["data=images_synthetic", "data.num_classes=1000"], "imagenet"),
        (["model=deq_transformer", "data=text_synthetic"], "wikitext103"),
        (["model=ignn", "data=cox2_synthetic"], "cox2"),
        (["model=ignn", "data=proteins_synthetic"], "proteins"),
    ],
    ids=lambda part: part if isinstance(part, str) else part[-1],
)
def test_a_model_is_built_as_for_the_real_set(items, real):
    made = source(*items).spec
    assert made.kind == spec(real).kind and made.inputs == spec(real).inputs


def test_pictures_of_a_class_look_alike():
    made = source("data=images_synthetic", "data.num_train=40", "data.size=16")
    again = source("data=images_synthetic", "data.num_train=40", "data.size=16", "seed=3")
    assert made.spec.digests == again.spec.digests
    [batch] = next(iter(made.train(epoch=0, start=0, shard=Shard())))
    images, labels = batch
    assert images.shape == (40, 3, 16, 16) and labels.bincount().tolist() == [4] * 10
    distance = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(float("inf"))
    assert (labels[distance.argmin(1)] == labels).float().mean() > 0.9, "the nearest picture is of the same class"


def test_words_follow_their_frequencies():
    few = ["data.vocab_size=50", "data.num_train=40000", "data.num_eval=500", "data.segment=8", "data.eval_streams=2"]
    made = source("model=deq_transformer_small", "data=text_synthetic", *few)
    counts = np.bincount(made._tokens["train"], minlength=50) / 40000
    expected = 1 / np.arange(1, 51)
    assert np.abs(counts - expected / expected.sum()).max() < 0.01
    entropy = -(expected / expected.sum() * np.log(expected / expected.sum())).sum()
    assert made.spec.baseline["valid"] == pytest.approx(np.exp(entropy), rel=0.1)


def test_sizes_of_another_set_are_not_known():
    with pytest.raises(UserError, match=r"name must be one of COX2, PROTEINS, got 'MUTAG'"):
        source("model=ignn", "data=cox2_synthetic", "data.name=MUTAG", "data.folds=stratified")


def test_generated_graphs_have_the_folds_and_classes_of_the_set():
    made = source("model=ignn", "data=cox2_synthetic", "data.fold=3")
    batches = list(made.evaluate("test", shard=Shard()))
    graphs, labels = batches[0]
    assert sum(len(labels) for _, labels in batches) == made.spec.sizes["test"] == 47
    assert graphs.features.shape[1] == 35 and set(labels.tolist()) == {0, 1}
    raw = made.raw
    parts = raw.features.argmax(1).reshape(467, 12) // 17  # 35 labels: two parts of 17, and one that is not used
    assert torch.equal(parts, raw.labels[:, None].expand(-1, 12))


def test_a_stream_that_ends_with_a_segment_has_no_empty_one():
    sizes = ["data.vocab_size=5", "data.num_train=18", "data.num_eval=9", "data.segment=4"]
    made = source("model=deq_transformer_small", "data=text_synthetic", *sizes, "data.streams=2", "data.eval_streams=1")
    assert made.steps(0) == 2
    assert [batch[0].shape[1] for [batch] in made.train(epoch=0, start=0, shard=Shard())] == [4, 4]
    assert [batch[0].shape[1] for batch in made.evaluate("valid", shard=Shard())] == [4, 4]


def test_the_validation_graphs_do_not_follow_the_seed_of_the_run():
    settings = ["model=ignn", "data=cox2_synthetic", "data.folds=stratified", "data.validation=0.1"]
    a, b, c = (source(*settings, *more).ids for more in (["seed=0"], ["seed=1"], ["seed=0", "data.split_seed=7"]))
    assert a == b and a["valid"] != c["valid"] and a["train"] != c["train"]
