"""The ImageNet tree: seeded augmentation whatever the workers, and clear errors."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import decoding
from data.images.base import normalise
from data.images.decoding import decode
from data.images.imagenet import MEAN, STD, ImageNet
from data.seeding import generator, seed_of
from phantom.engine.errors import DataError
from phantom.engine.source import Shard

ROOT = Path(__file__).parents[2]
SETTINGS = dict(
    batch_size=3,
    eval_batch_size=4,
    crop=24,
    resize=28,
    scale=[0.1, 1.0],
    ratio=[0.8, 1.25],
    streaming=False,
    shuffle_buffer=3,
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
    picture = Image.open(tree / "val" / "n01" / "0.JPEG").convert("RGB")
    small = picture.resize((round(28 * 50 / 40), 28), Image.Resampling.BILINEAR)
    expected = np.asarray(small.crop((6, 2, 30, 26))).transpose(2, 0, 1)  # torchvision rounds (35 - 24) / 2 to 6
    got = batches[0][0][0] * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    got = (got + torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) * 255
    assert (got - torch.tensor(expected)).abs().max() < 1.01, "Pillow and torch round a resized byte differently"


def test_training_pixels_are_those_of_pillow_but_for_one_level(tree):
    """The pipeline of the paper's code: decoded by Pillow, cut and resized as a picture, then a normalised tensor."""
    from torchvision.transforms import v2

    area = v2.RandomResizedCrop(24, scale=(0.1, 1.0), ratio=(0.8, 1.25), antialias=True)
    floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    pipeline = v2.Compose([area, v2.RandomHorizontalFlip(), *floats])
    source = make(tree, batch_size=8)
    [[(images, _)]] = epoch_of(source)
    order = torch.randperm(8, generator=generator("order/1/0")).tolist()
    for index, image in zip(order, images, strict=True):
        path, _ = source._sets["train"].samples[index]
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(f"augment/1/0/{index}"))
            expected = pipeline(Image.open(path).convert("RGB"))
        assert (image - expected).abs().max() <= 1.01 / 255 / min(STD)


def test_bytes_are_normalised_as_by_torchvision_but_for_rounding():
    from torchvision.transforms import v2

    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    expected = v2.Normalize(MEAN, STD)(v2.functional.to_dtype(levels, torch.float32, scale=True))
    got = normalise(levels, torch.tensor([MEAN, STD])[:, :, None, None])
    assert (got - expected).abs().max() < 8e-7, "torchvision multiplies by the rounded 1 / 255"
    exact = (levels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert (got - exact).abs().max() <= (expected - exact).abs().max()


def test_grey_and_png_pictures_have_three_channels(tree):
    grey = Image.new("L", (40, 40), 77)
    grey.save(tree / "train" / "n01" / "0.JPEG")
    grey.save(tree / "train" / "n02" / "0.JPEG", format="PNG")
    for [(images, _)] in epoch_of(make(tree)):
        assert images.shape[1:] == (3, 24, 24)
    encoded = (tree / "train" / "n02" / "0.JPEG").read_bytes()
    assert (decode(encoded, "grey") == 77).all()
    deep = io.BytesIO()
    Image.fromarray(np.full((40, 40), 77 * 257, dtype=np.uint16)).save(deep, format="PNG")
    assert decode(deep.getvalue(), "deep").dtype == torch.uint8 and (decode(deep.getvalue(), "deep") == 77).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_formats_without_a_loss_keep_their_pixels(kind, mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert("L")
    picture, file = picture.convert(mode), io.BytesIO()
    try:
        picture.save(file, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    except OSError:
        pytest.skip(f"{kind} has no mode {mode}")
    expected = np.array(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode(file.getvalue(), "small").numpy(), expected)


def stored(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    first, second = (Image.new("RGB", (5, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    file = io.BytesIO()
    first.save(file, format=kind, save_all=True, append_images=[second, first])
    assert torch.equal(decode(file.getvalue(), "moving"), torch.tensor([255, 0, 0]).view(3, 1, 1).expand(3, 4, 5))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", [0, 30000, 65535])
def test_of_16_bits_8_are_kept(kind, value):
    deep = stored(Image.fromarray(np.full((4, 4), value, dtype=np.uint16)), kind)
    assert (decode(deep, "deep") == round(value / 257)).all()


def test_numbers_of_another_kind_are_refused():
    wide = stored(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match=r"the picture wide .*mode F: save it with 8 or 16 bits"):
        decode(wide, "wide")


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it makes of the damage
@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_damage_anywhere_is_an_error_of_the_data_or_another_picture(kind):
    """Cut off, or with a byte changed: sizes of billions of pixels among them. torchvision crashes on some."""
    draws = np.random.default_rng(0)
    whole = stored(Image.fromarray(draws.integers(0, 256, (6, 5, 3), dtype=np.uint8)), kind)
    damaged = [whole[:length] for length in range(len(whole))]
    for place in draws.integers(0, min(60, len(whole)), 200):
        damaged.append(whole[:place] + bytes([draws.integers(256)]) + whole[place + 1 :])
    found = []
    for encoded in damaged:
        try:
            found.append(decode(encoded, "small").shape[0] == 3)
        except DataError as error:
            found.append("the picture small is damaged" in str(error))
    assert all(found)


def test_evaluation_cuts_no_more_than_there_is(tree):
    with pytest.raises(ValueError, match="resize=28 must be an integer >= 32: the short side"):
        make(tree, crop=32)


def test_workers_stay_and_passes_may_overlap(tree):
    source = make(tree, workers=1)
    whole = epoch_of(source)
    begun = source.train(epoch=0, start=0, shard=Shard())
    first = next(begun)
    for [a], [b] in zip(epoch_of(source), whole, strict=True):  # beside the pass that has begun
        assert torch.equal(a[0], b[0])
    for [a], [b] in zip([first, *begun], whole, strict=True):
        assert torch.equal(a[0], b[0])
    next(source.train(epoch=1, start=0, shard=Shard()))  # given up after its first batch
    for [a], [b] in zip(epoch_of(source), whole, strict=True):
        assert torch.equal(a[0], b[0])


def test_a_missing_val_folder_names_path_and_layout(tree):
    (tree / "val").rename(tree / "validation")
    with pytest.raises(DataError, match=r"val is missing. Expected train/<wnid>.*data.root"):
        make(tree)


def test_classes_that_differ_are_named(tree):
    (tree / "val" / "n02").rename(tree / "val" / "n03")
    with pytest.raises(DataError, match="differ in the classes n02, n03"):
        make(tree)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", [0, 300, 900], ids=["empty", "its head alone", "cut short"])
def test_a_truncated_picture_is_named(tree, workers, kept):
    path = tree / "train" / "n02" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"^the picture .*n02/1.JPEG is damaged"):
        epoch_of(make(tree, workers=workers))


def test_torchcodec_takes_over_where_torchvision_has_no_decoder(tree, monkeypatch):
    pytest.importorskip("torchcodec")
    encoded = (tree / "train" / "n01" / "0.JPEG").read_bytes()
    expected = decode(encoded, "0.JPEG")
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    decoding._decoder.cache_clear()
    try:
        assert torch.equal(decode(encoded, "0.JPEG"), expected)
        with pytest.raises(DataError, match=r"the picture 0.JPEG is damaged"):
            decode(encoded[:300], "0.JPEG")
    finally:
        decoding._decoder.cache_clear()


ENDS = """
import subprocess
import sys
from data.images.imagenet import ImageNet
from phantom.engine.source import Shard
source = ImageNet(root=sys.argv[1], **{settings!r})
list(source.train(epoch=0, start=0, shard=Shard()))
begun = source.train(epoch=1, start=0, shard=Shard())
next(begun)
raise SystemExit(7)
"""


def test_a_program_may_end_in_the_middle_of_a_pass(tree):
    """Workers leave SIGTERM to their parent, and Python waits for what it has sent SIGTERM."""
    program = ENDS.format(settings=SETTINGS | {"workers": 1})
    line = [sys.executable, "-c", program, str(tree)]
    done = subprocess.run(line, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert done.returncode == 7 and "Error" not in done.stderr, done.stderr


def test_the_colours_are_those_of_every_imagenet_code():
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
