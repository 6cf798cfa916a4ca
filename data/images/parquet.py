"""Pictures in Parquet files, as Hugging Face `datasets` reads them: from the hub or from a folder.

A row has a picture `image` (its bytes) and a class `label`, as in ILSVRC/imagenet-1k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from data.digests import digest
from data.images.decoding import Example
from data.seeding import generator
from phantom.engine.errors import DataError

COLUMNS = ["image", "label"]


class Group(NamedTuple):
    """A row group, the unit that is read at once; `first` is the index of its first row in the split."""

    file: str
    number: int
    first: int
    count: int


class Parquet:
    """The pictures of one split, by index or as a stream.

    Its fingerprint is made from the sizes of all row groups, in their order: it reads no picture, and two sets whose
    row groups have equal numbers of rows and bytes pass as the same.

    Args:
        path: a data set of the hub, or a folder with `train-*.parquet` and `validation-*.parquet`.
        streaming: read the files where they are, in one pass; otherwise `datasets` keeps an indexed copy in its cache.

    Raises:
        DataError: there is no such data set or split, it is not Parquet, or it has no pictures with a class each. A row
            without either is found at once where the files have statistics, as most have, and else when it is read.
    """

    def __init__(self, path: str, split: str, *, streaming: bool) -> None:
        try:
            from datasets import ClassLabel, Features, Image, load_dataset_builder
        except ImportError as error:
            raise DataError("data.root=hf:... needs Hugging Face `datasets`: pip install datasets") from error
        self.path, self.split = path, split
        try:
            builder: Any = load_dataset_builder(path)
            found = builder.config.data_files
            files = sorted(map(str, found.get(split, ()))) if found else []
            if not files or not all(name.endswith(".parquet") for name in files):
                there = ", ".join(map(str, found or ())) or "no split"
                raise DataError(
                    f"{path} has no Parquet files of the split {split}; it has {there}. Expected files such as "
                    f"{split}-00000-of-00001.parquet"
                )
            self.groups, metadata, schema = _groups(files)
            features = Features.from_arrow_schema(schema)
            if not isinstance(features.get("image"), Image) or not isinstance(features.get("label"), ClassLabel):
                raise DataError(
                    f"{path} has the columns {dict(features)}; expected a picture `image` (datasets.Image) and a class "
                    "`label` (datasets.ClassLabel)"
                )
            self.classes: list[str] = features["label"].names
            for group, found in zip(self.groups, metadata, strict=True):
                if _doubtful(found, len(self.classes)):
                    for _ in self.read([group], frozenset(range(group.first, group.first + group.count))):
                        pass  # until the row that it refuses by name
            self.rows: Any = None
            if not streaming:
                builder.download_and_prepare()
                self.rows = builder.as_dataset(split).select_columns(COLUMNS).cast_column("image", Image(decode=False))
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{path} could not be read by Hugging Face `datasets` ({str(error).partition(chr(10))[0]}): name a "
                "folder of Parquet files, or a data set of the hub that you may read (`hf auth login`)"
            ) from error
        self.digest = digest(f"{group.num_rows} {group.total_byte_size}\n".encode() for group in metadata)

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __getitem__(self, index: int) -> Example:
        return self._example(self.rows[index], index)

    def sequence(self, key: str | None) -> list[Group]:
        """Return the row groups in the order of a pass: their own, or one that `key` draws."""
        if key is None:
            return list(self.groups)
        return [self.groups[i] for i in torch.randperm(len(self.groups), generator=generator(key)).tolist()]

    def read(self, sequence: Sequence[Group], wanted: frozenset[int]) -> Iterator[tuple[int, Example]]:
        """Yield (index, example) of the wanted rows; row groups with none of them are not read."""
        import fsspec
        import pyarrow.parquet as pq

        for group in sequence:
            places = [i for i in range(group.count) if group.first + i in wanted]
            if places:
                with fsspec.open(group.file, "rb") as file:
                    rows = pq.ParquetFile(file).read_row_group(group.number, columns=COLUMNS).take(places).to_pylist()
                for i, row in zip(places, rows, strict=True):
                    yield group.first + i, self._example(row, group.first + i)

    def _example(self, row: dict[str, Any], index: int) -> Example:
        image, label = row["image"] or {}, row["label"]
        name = f"{image.get('path') or ''} (row {index} of {self.split} in {self.path})".strip()
        if not image.get("bytes"):
            raise DataError(f"the picture {name} has no bytes: leave the row out, or embed the picture's file in it")
        if label is None or not 0 <= label < len(self.classes):
            raise DataError(
                f"the picture {name} has the label {label}, which must be in 0..{len(self.classes) - 1} (-1 stands for "
                "a hidden one): leave the row out, or use a copy with its label"
            )
        return Example(image["bytes"], label, name)


def through_buffer(indices: Sequence[int], buffer: int, key: str) -> list[int]:
    """Return the indices as they leave a shuffle buffer.

    The buffer is filled with the first ones. Each step sends out one of those in it, drawn by `key`, and the next index
    takes its place: an index leaves at most `buffer` - 1 steps before its own place.
    """
    draws = torch.rand(len(indices), generator=generator(key), dtype=torch.float64).tolist()
    held, order = list(indices[:buffer]), []
    for following, draw in enumerate(draws, start=len(held)):
        slot = int(draw * len(held))
        order.append(held[slot])
        held[slot] = indices[following] if following < len(indices) else held[-1]
        if following >= len(indices):
            held.pop()
    return order


def _groups(files: Sequence[str]) -> tuple[list[Group], list[Any], Any]:
    """Return the row groups of some files, what pyarrow says of each, and the schema of the first file."""
    import fsspec
    import pyarrow.parquet as pq

    groups, metadata, first, schema = [], [], 0, None
    for name in files:
        with fsspec.open(name, "rb") as file:
            opened = pq.ParquetFile(file)
            schema = opened.schema_arrow if schema is None else schema
            for number in range(opened.metadata.num_row_groups):
                group = opened.metadata.row_group(number)
                groups.append(Group(name, number, first, group.num_rows))
                metadata.append(group)
                first += group.num_rows
    return groups, metadata, schema


def _doubtful(metadata: Any, classes: int) -> bool:
    """Return whether the statistics of a row group tell of a row without a picture, or without one of the classes."""
    columns = map(metadata.column, range(metadata.num_columns))
    found = {column.path_in_schema: column.statistics for column in columns if column.statistics is not None}
    if any(found[name].null_count for name in ("image.bytes", "label") if name in found):
        return True
    label = found.get("label")
    return label is not None and label.has_min_max and not 0 <= label.min <= label.max < classes
