"""The ImageNet tree: seeded augmentation whatever the workers, and clear errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.imagenet import ImageNet
from phantom.engine.errors import DataError
from phantom.engine.source import Shard

SETTINGS = dict(
    batch_size=3,
    eval_batch_size=4,
    crop=24,
    resize=28,
    scale=[0.1, 1.0],
    ratio=[0.8, 1.25],
    workers=0,
    subset=None,
    test_subset=None,
    seed=1,
)


def make(root, **changes):
    return ImageNet(**(SETTINGS | {"root": str(root)} | changes))


@pytest.fixture
def tree(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                size = (40 + 5 * i, 50 - 3 * i, 3)
                pixels = generator.integers(0, 255, size, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.JPEG")
    return tmp_path


def epoch_of(source, **settings):
    return list(source.train(**({"epoch": 0, "start": 0, "shard": Shard()} | settings)))


def test_shapes_classes_and_steps(tree):
    source = make(tree)
    steps = epoch_of(source)
    assert [tuple(batch[0].shape) for [batch] in steps] == [(3, 3, 24, 24), (3, 3, 24, 24), (2, 3, 24, 24)]
    assert source.steps(0) == 3 and source.spec.inputs == {"in_channels": 3, "num_classes": 2}
    assert sorted(label for [batch] in steps for label in batch[1].tolist()) == [0] * 4 + [1] * 4


def test_order_and_augmentation_do_not_depend_on_workers_start_or_shards(tree):
    torch.manual_seed(5)
    whole = epoch_of(make(tree))
    for [a], [b] in zip(whole, epoch_of(make(tree, workers=1)), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    [late] = epoch_of(make(tree), start=2)
    assert torch.equal(late[0][0], whole[2][0][0])
    ranks = [epoch_of(make(tree), shard=Shard(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([rank[0][0][0] for rank in ranks]), whole[0][0][0])
    assert not torch.equal(epoch_of(make(tree), epoch=1)[0][0][0], whole[0][0][0])


def test_a_picture_is_cut_anew_in_every_epoch(tree):
    """One picture, so that neither order nor batch can make the difference; seed and epoch fix the cut."""

    def cut(epoch: int, **changes) -> torch.Tensor:
        [(pictures, _)] = epoch_of(make(tree, subset=1, **changes), epoch=epoch)[0]
        return pictures

    cuts = [cut(0), cut(1), cut(2), cut(0, seed=2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(cuts) for b in cuts[:i])
    assert torch.equal(cut(1), cuts[1])


def test_two_copies_of_a_picture_are_cut_differently(tree):
    names = [tree / "train" / name / f"{i}.JPEG" for name in ("n01", "n02") for i in range(4)]
    for name in names[1:]:
        name.write_bytes(names[0].read_bytes())
    pictures = torch.cat([batch[0] for [batch] in epoch_of(make(tree))])
    assert len(pictures.flatten(1).unique(dim=0)) == len(names)


def test_drawing_augmentation_leaves_the_random_state_alone(tree):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    epoch_of(make(tree))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_the_centre_crop_and_sees_everything_once(tree):
    source = make(tree)
    batches = [batch for rank in range(2) for batch in source.evaluate("test", shard=Shard(rank, 2))]
    assert sorted(label for batch in batches for label in batch[1].tolist()) == [0, 0, 1, 1]
    from torchvision.transforms.v2 import functional

    picture = Image.open(tree / "val" / "n01" / "0.JPEG").convert("RGB")
    resized = functional.resize(functional.pil_to_tensor(picture), [28], antialias=True)
    expected = functional.center_crop(resized, [24]).float() / 255
    got = batches[0][0][0] * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    got = got + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    assert (got - expected).abs().max() < 2 / 255  # resized as a picture rather than a tensor: rounding differs


def test_a_missing_val_folder_names_path_and_layout(tree):
    (tree / "val").rename(tree / "validation")
    with pytest.raises(DataError, match=r"val is missing. Expected train/<wnid>.*data.root"):
        make(tree)


def test_classes_that_differ_are_named(tree):
    (tree / "val" / "n02").rename(tree / "val" / "n03")
    with pytest.raises(DataError, match="differ in the classes n02, n03"):
        make(tree)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_is_named(tree, workers):
    path = tree / "train" / "n02" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"^the picture .*n02/1.JPEG is damaged"):
        epoch_of(make(tree, workers=workers))
