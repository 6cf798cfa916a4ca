"""ImageNet (ILSVRC 2012) from its folder tree or from Parquet files, decoded by worker processes.

Images are (B, 3, H, W) float32, normalised per channel on the device of the run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.images.base import normalise
from data.images.decoding import Transform
from data.images.loading import Indexed, Keys, Loader, Streamed, batches
from data.images.parquet import Parquet, through_buffer
from data.images.tree import Tree
from data.paths import data_root, root_hint
from data.seeding import generator
from phantom.engine.errors import DataError
from phantom.engine.source import Shard, Source, Spec
from phantom.validate import check_count, check_counts

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HUB = "hf:"  # what a root begins with that `datasets` finds
TREE, PARQUET = {"train": "train", "test": "val"}, {"train": "train", "test": "validation"}
log = logging.getLogger(__name__)


class ImageNet(Source):
    """ImageNet from a tree `train/<wnid>/*.JPEG`, `val/<wnid>/*.JPEG`, or by Hugging Face `datasets`.

    Training: crop a random area in `scale` with an aspect in `ratio`, resize it to `crop` (antialiased bilinear), flip
    it with probability 1/2; order and draws depend on (seed, epoch, index) alone. Evaluation: resize the short side to
    `resize`, take the centre `crop`. Pixels stay bytes until they are on the device.

    Args:
        root: folder of the tree, or of Parquet files `train-*.parquet` and `validation-*.parquet`, there or in its
            folder `data`; `hf:<name>` is what `datasets` finds by that name, such as hf:ILSVRC/imagenet-1k on the hub.
            None means $PHANTOM_DATA/imagenet, or the cache folder without that variable.
        streaming: read Parquet files in one pass an epoch, without an indexed copy. Row groups come in an order drawn
            from (seed, epoch), and their pictures through a shuffle buffer.
        shuffle_buffer: pictures in it; their files are held in memory, by all workers of a process together.
        scale, ratio: the official code of the paper uses [0.1, 1] and [0.8, 1.25]; torchvision's defaults, used by the
            implicit baseline, are [0.08, 1] and [3/4, 4/3].
        workers: number of decoding processes; 0 decodes in the training process.
        subset: maximum number of training images: drawn at random, of a stream the first ones.

    Raises:
        DataError: the data are missing or have another layout, or train and val differ in their classes.

    Source: Russakovsky et al., *ImageNet Large Scale Visual Recognition Challenge* (2015).
    """

    kind = "image_classification"

    def __init__(
        self,
        *,
        root: str | None,
        streaming: bool,
        shuffle_buffer: int,
        batch_size: int,
        eval_batch_size: int,
        crop: int,
        resize: int,
        scale: Sequence[float],
        ratio: Sequence[float],
        workers: int,
        subset: int | None,
        test_subset: int | None,
        seed: int,
    ) -> None:
        check_counts(least=1, batch_size=batch_size, eval_batch_size=eval_batch_size, crop=crop)
        check_count("resize", resize, least=crop, also=": the short side, of which evaluation takes the centre crop")
        check_count("shuffle_buffer", shuffle_buffer, least=1)
        check_count("workers", workers, least=0)
        from torchvision.transforms import v2

        (least, most), (narrow, wide) = scale, ratio
        area = v2.RandomResizedCrop(crop, scale=(least, most), ratio=(narrow, wide), antialias=True)
        self._augment: Transform = v2.Compose([area, v2.RandomHorizontalFlip()])
        self._plain: Transform = v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop)])
        self._sets = _open(root, streaming)
        train, test = self._sets["train"], self._sets["test"]
        if train.classes != test.classes:
            unmatched = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(
                f"train and val in {_named(root)} differ in the classes {', '.join(unmatched[:5])} "
                f"({len(unmatched)} in all)"
            )
        limits = {"train": subset, "test": test_subset}
        self._indices = {name: _first(len(found), limits[name], streaming) for name, found in self._sets.items()}
        if not streaming:
            transforms = {"train": self._plain, "test": self._plain, "augmented": self._augment}
            self._loaders = {
                name: Loader(Indexed(self._sets["test" if name == "test" else "train"], transform, seed), workers)
                for name, transform in transforms.items()
            }
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.workers, self.seed = workers, seed
        self._device = torch.device("cpu")
        self._scale = torch.tensor([MEAN, STD])[:, :, None, None]
        self.splits = ("train", "test")
        sizes = {name: len(indices) for name, indices in self._indices.items()}
        self.spec = Spec(
            kind=self.kind,
            inputs={"in_channels": 3, "num_classes": len(train.classes)},
            sizes=sizes,
            digests={name: found.digest for name, found in self._sets.items()},
        )
        log.info("ImageNet in %s: %s images of %d classes", _named(root), sizes, len(train.classes))

    def to(self, device: torch.device) -> None:
        """Normalise on `device`; bytes go there."""
        self._device, self._scale = device, self._scale.to(device)

    def steps(self, epoch: int) -> int:
        return -(-self.spec.sizes["train"] // self.batch_size)

    def train(self, *, epoch: int, start: int, shard: Shard) -> Iterator[list[tuple[Tensor, Tensor]]]:
        key = f"order/{self.seed}/{epoch}"
        order = self._order(key)
        shares, lengths = [], []
        for step in range(start, self.steps(epoch)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            parts = shard.parts(len(batch))
            shares += [[(epoch, i) for i in batch[part.start : part.stop]] for part in parts]
            lengths.append(len(parts))
        found = self._batches("train", shares, augmented=True, key=key)
        for length in lengths:
            yield [next(found) for _ in range(length)]

    def evaluate(self, split: str, *, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        self.check_split(split)
        indices = self._indices[split][shard.rank :: shard.world].tolist()
        size = self.eval_batch_size
        shares = [[(0, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
        yield from self._batches(split, shares, augmented=False, key=None)

    def _order(self, key: str) -> list[int]:
        """Return the indices of an epoch in the order of training."""
        indices, pictures = self._indices["train"], self._sets["train"]
        if not isinstance(pictures, Parquet) or not self.streaming:
            return indices[torch.randperm(len(indices), generator=generator(key))].tolist()
        passed = [
            i
            for group in pictures.sequence(key)
            for i in range(group.first, min(group.first + group.count, len(indices)))
        ]
        return through_buffer(passed, self.shuffle_buffer, f"buffer of {key}")

    def _batches(
        self, split: str, shares: Sequence[Keys], *, augmented: bool, key: str | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pictures = self._sets[split]
        if isinstance(pictures, Parquet) and self.streaming:
            read = functools.partial(pictures.read, pictures.sequence(key))
            transform = self._augment if augmented else self._plain
            found = batches(Streamed(read, transform, self.seed, shares), self.workers)
        else:
            found = self._loaders["augmented" if augmented else split].batches(shares)
        for images, labels in found:
            images = normalise(images.to(self._device, non_blocking=True), self._scale)
            yield images, labels.to(self._device, non_blocking=True)


def _named(root: str | None) -> str:
    return root if root is not None and root.startswith(HUB) else str(data_root(root, "imagenet"))


def _open(root: str | None, streaming: bool) -> dict[str, Tree | Parquet]:
    """Return the training and the test pictures that the root names.

    Raises:
        DataError: it has neither layout, or streaming was asked for a tree.
    """
    folder, name = data_root(root, "imagenet"), _named(root)
    if name.startswith(HUB):
        path = name.removeprefix(HUB)
        return {split: Parquet(path, own, streaming=streaming) for split, own in PARQUET.items()}
    if any(any(place.glob("*.parquet")) for place in (folder, folder / "data")):
        return {split: Parquet(name, own, streaming=streaming) for split, own in PARQUET.items()}
    for own in TREE.values():
        if not (folder / own).is_dir():
            raise DataError(
                f"no ImageNet in {folder}: {folder / own} is missing. Expected train/<wnid>/*.JPEG and "
                "val/<wnid>/*.JPEG, or train-*.parquet and validation-*.parquet. "
                f"{root_hint('imagenet')}; request the images at https://image-net.org, or name "
                "data.root=hf:ILSVRC/imagenet-1k"
            )
    if streaming:
        raise DataError(f"data.streaming=true reads Parquet files, and {folder} is a tree of pictures: leave it out")
    return {split: Tree(folder, own) for split, own in TREE.items()}


def _first(total: int, count: int | None, streaming: bool) -> Tensor:
    if count is None or count >= total:
        return torch.arange(total)
    return torch.arange(count) if streaming else torch.randperm(total, generator=generator("subset"))[:count]
