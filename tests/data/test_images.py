"""In-memory images: order, augmentation, shards and splits are exact functions of (seed, epoch, index)."""

import inspect
import pickle

import pytest
import torch

from data.images import base
from data.images.base import PADDING, ImageSet, InMemoryImages, crop_flip
from data.images.digits import Digits
from phantom.engine.source import Shard

SETTINGS = dict(batch_size=8, eval_batch_size=7, augment="none", validation=0, subset=None, test_subset=None, seed=3)


class Numbered(InMemoryImages):
    """Images whose every pixel is their number, so that a batch tells where it came from."""

    num_classes = 2
    mean = (0.0,)
    std = (1.0 / 255,)

    def load(self):
        def numbered(count):
            images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 6, 6).clone()
            return ImageSet(images, torch.arange(count) % 2)

        return numbered(45), numbered(20)


def make(**changes):
    return Numbered(**(SETTINGS | changes))


def numbers(batch):
    return batch[0][:, 0, 3, 3].round().long().tolist()


def epoch_of(source, *, epoch=0, start=0, shard=Shard()):  # noqa: B008 - a frozen value
    return list(source.train(epoch=epoch, start=start, shard=shard))


def test_a_set_names_all_its_arguments_and_equals_itself_alone():
    parameters = inspect.signature(Digits).parameters.values()
    assert {(p.name, p.kind, p.default) for p in parameters} == {
        (name, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty) for name in SETTINGS
    }
    one, other = Digits(**SETTINGS), Digits(**SETTINGS)
    assert one != other and len({one, other}) == 2
    assert pickle.loads(pickle.dumps(one)).spec == one.spec == other.spec


def test_a_digest_tells_pixels_and_labels_and_not_their_order():
    images = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1, 0])
    digest = ImageSet(images, labels).digest()
    assert len(digest) == 16
    assert ImageSet(images, labels).take(torch.tensor([3, 0, 4, 1, 2])).digest() == digest
    assert ImageSet(images, labels.roll(1)).digest() != digest
    images[2, 1, 0, 1] ^= 1
    assert ImageSet(images, labels).digest() != digest
    assert ImageSet(images[:4], labels[:4]).digest() != digest


def test_digests_are_of_the_sets_as_loaded():
    assert make().spec.digests == make(validation=10, subset=5, test_subset=5).spec.digests
    assert make().spec.digests.keys() == {"train", "test"}


def test_an_epoch_visits_every_image_once_and_keeps_the_short_last_batch():
    steps = epoch_of(make())
    assert [len(batch[0]) for [batch] in steps] == [8, 8, 8, 8, 8, 5]
    assert sorted(n for [batch] in steps for n in numbers(batch)) == list(range(45))
    assert all((torch.tensor(numbers(batch)) % 2 == batch[1]).all() for [batch] in steps)


def test_order_is_a_function_of_seed_and_epoch():
    order = [numbers(batch) for [batch] in epoch_of(make())]
    assert order == [numbers(batch) for [batch] in epoch_of(make())]
    assert order != [numbers(batch) for [batch] in epoch_of(make(), epoch=1)]
    assert order != [numbers(batch) for [batch] in epoch_of(make(seed=4))]


def test_starting_later_skips_exactly_the_steps_before():
    source = make(augment="crop_flip")
    whole, rest = epoch_of(source, epoch=2), epoch_of(source, epoch=2, start=4)
    assert len(rest) == 2
    for [a], [b] in zip(whole[4:], rest, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("world", "micro"), [(2, 1), (1, 3), (2, 2)])
def test_ranks_and_micro_batches_together_are_the_global_batch(world, micro):
    source = make(augment="crop_flip")
    ranks = [epoch_of(source, shard=Shard(rank=r, world=world, micro=micro)) for r in range(world)]
    for step, [whole] in enumerate(epoch_of(source)):
        parts = [part for micro in zip(*(rank[step] for rank in ranks), strict=True) for part in micro]
        assert len(parts) == world * micro
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    seen = {}
    for size in (8, 13):
        for [batch] in epoch_of(make(augment="crop_flip", batch_size=size)):
            for image in batch[0]:
                number = round(float(image.max()))
                if number:  # image 0 is black like the padding
                    assert torch.equal(seen.setdefault(number, image), image)
    assert len(seen) == 44


def test_crop_and_flip_against_plain_slicing():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (9, 3, 5, 6), generator=generator, dtype=torch.uint8)
    shifts = torch.randint(0, 2 * PADDING + 1, (9, 2), generator=generator)
    flips = torch.rand(9, generator=generator) < 0.5
    for image, (row, column), flip, got in zip(images, shifts, flips, crop_flip(images, shifts, flips), strict=True):
        black = torch.zeros(3, 5 + 2 * PADDING, 6 + 2 * PADDING, dtype=torch.uint8)
        black[:, PADDING:-PADDING, PADDING:-PADDING] = image
        expected = black[:, row : row + 5, column : column + 6]
        assert torch.equal(got, expected.flip(2) if flip else expected)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_example_once_over_all_ranks(world):
    source = make(augment="crop_flip")
    seen = [n for r in range(world) for b in source.evaluate("test", shard=Shard(r, world)) for n in numbers(b)]
    assert sorted(seen) == list(range(20))


def test_held_out_images_are_disjoint_fixed_and_named():
    source, other = make(validation=10), make(validation=10, seed=99)
    held = [n for b in source.evaluate("valid", shard=Shard()) for n in numbers(b)]
    train = [n for [b] in epoch_of(source) for n in numbers(b)]
    assert len(held) == 10 and sorted(held + train) == list(range(45))
    assert held == [n for b in other.evaluate("valid", shard=Shard()) for n in numbers(b)]
    assert source.splits == ("train", "test", "valid") and source.spec.sizes == {"train": 35, "test": 20, "valid": 10}


def test_subsets_are_fixed_and_at_most_what_there_is():
    source = make(subset=12, test_subset=5)
    assert source.spec.sizes == {"train": 12, "test": 5}
    chosen = sorted(n for [b] in epoch_of(source) for n in numbers(b))
    assert chosen == sorted(n for [b] in epoch_of(make(subset=12, seed=5), epoch=7) for n in numbers(b))
    assert make(subset=1000).spec.sizes["train"] == 45


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"augment": "cutout"}, "augment='cutout' is not known; choose one of none, crop_flip"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"validation": 45}, "validation=45"),
    ],
)
def test_impossible_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        make(**change)
    with pytest.raises(ValueError, match="choose one of train, test"):
        list(make().evaluate("dev", shard=Shard()))


def test_a_batch_too_small_for_all_ranks_is_empty_on_every_rank():
    assert [Shard(r, 4).parts(3) for r in range(4)] == [[], [], [], []]
    assert [len(Shard(r, 4, 5).parts(9)) for r in range(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_cuts_between_micro_batches_are_those_of_one_process(world):
    """So that a norm over all ranks sees the same images."""
    ranks = [Shard(rank, world, 3).parts(14) for rank in range(world)]
    whole = Shard(0, 1, 3).parts(14)
    assert [sorted(i for part in micro for i in part) for micro in zip(*ranks, strict=True)] == [list(m) for m in whole]
    sizes = [len(part) for own in ranks for part in own]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 2


def test_digits_are_the_real_set_with_a_fixed_stratified_split():
    digits = Digits(**(SETTINGS | {"batch_size": 1437, "eval_batch_size": 360}))
    assert digits.spec.sizes == {"train": 1437, "test": 360}
    assert digits.spec.inputs == {"in_channels": 1, "num_classes": 10}
    [[(images, labels)]] = epoch_of(digits)
    assert images.shape == (1437, 1, 8, 8)
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    [(_, test_labels)] = digits.evaluate("test", shard=Shard())
    assert (torch.bincount(test_labels) - torch.bincount(labels) / 1437 * 360).abs().max() < 1


def test_the_draws_of_an_augmentation_fill_their_range(monkeypatch):
    seen = []
    monkeypatch.setattr(base, "crop_flip", lambda images, *drawn: seen.append(drawn) or images)
    source = make(augment="crop_flip")
    for epoch in range(60):
        list(source.train(epoch=epoch, start=0, shard=Shard()))
    shifts, flips = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert shifts.unique().tolist() == list(range(2 * 4 + 1)), "as the paper's code pads by 4"
    assert flips.double().mean().item() == pytest.approx(0.5, abs=0.04)


def test_seed_and_epoch_are_two_numbers():
    orders = [[numbers(b) for [b] in epoch_of(make(seed=seed), epoch=epoch)] for seed, epoch in ((3, 1), (4, 0))]
    assert orders[0] != orders[1]
