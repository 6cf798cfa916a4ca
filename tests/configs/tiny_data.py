"""What is known of every data set without its files, and tiny files in its real format."""

from pathlib import Path

from PIL import Image

from data.images.cifar10 import CLASSES
from phantom.engine.source import Spec

# the kind of every data set, and the numbers a model is built from
INPUTS = {
    "digits": ("image_classification", {"in_channels": 1, "num_classes": 10}),
    "cifar10": ("image_classification", {"in_channels": 3, "num_classes": 10}),
    "cifar10_small": ("image_classification", {"in_channels": 3, "num_classes": 10}),
    "images_synthetic": ("image_classification", {"in_channels": 3, "num_classes": 10}),
    "imagenet": ("image_classification", {"in_channels": 3, "num_classes": 1000}),
    "wikitext103": ("language_modelling", {"vocab_size": 267_735}),
    "text_synthetic": ("language_modelling", {"vocab_size": 267_735}),
    "pydocs": ("language_modelling", {"vocab_size": 9_000}),
    "cox2": ("graph_classification", {"in_features": 35, "num_classes": 2}),
    "proteins": ("graph_classification", {"in_features": 3, "num_classes": 2}),
    "cox2_synthetic": ("graph_classification", {"in_features": 35, "num_classes": 2}),
    "proteins_synthetic": ("graph_classification", {"in_features": 3, "num_classes": 2}),
    "ppi": ("node_labelling", {"in_features": 50, "num_labels": 121}),
    "ppi_synthetic": ("node_labelling", {"in_features": 50, "num_labels": 121}),
    "chains": ("node_classification", {"in_features": 100, "num_classes": 2}),
    "sudoku": ("puzzle_solving", {"vocab_size": 6, "height": 4, "width": 4}),
    "sudoku_files": ("puzzle_solving", {"vocab_size": 11, "height": 9, "width": 9}),
    "maze": ("puzzle_solving", {"vocab_size": 6, "height": 9, "width": 9}),
}
GRAPHS = {"cox2": ("COX2", 467, 35), "proteins": ("PROTEINS", 1113, 3)}
SOLUTION = "".join(str((3 * (row % 3) + row // 3 + column) % 9 + 1) for row in range(9) for column in range(9))
PUZZLE = "." + SOLUTION[1:]
TEXT = "the cat sat on the mat <unk> \n\n the dog and the bird ran on \n" * 6


def spec(leaf: str) -> Spec:
    """Return the spec that a data set has once its files are there.

    Raises:
        LookupError: the data set has no row in `INPUTS`.
    """
    if leaf not in INPUTS:
        raise LookupError(f"data={leaf} has no row in INPUTS of tests/configs/tiny_data.py: add its kind and inputs")
    kind, inputs = INPUTS[leaf]
    return Spec(kind=kind, inputs=inputs, sizes={})


def tiny(leaf: str, folder: Path) -> list[str]:
    """Write files of the data set into `folder`, where it has any, and return the overrides that make it tiny."""
    if leaf in ("cifar10", "cifar10_small"):
        pictures(folder, ("train", "test"), CLASSES, "png", size=32)
        return [f"data.root={folder}", "data.allow_partial=true", "data.batch_size=2", "data.eval_batch_size=5"]
    if leaf == "imagenet":
        pictures(folder, ("train", "val"), ("n01", "n02"), "JPEG", size=48)
        small = ["data.crop=32", "data.resize=40", "data.workers=0"]
        return [f"data.root={folder}", "data.batch_size=2", "data.eval_batch_size=2", *small]
    if leaf in GRAPHS:
        paths(folder, *GRAPHS[leaf])
        return [f"data.root={folder}"]
    if leaf == "wikitext103":
        for split in ("train", "valid", "test"):
            (folder / f"wiki.{split}.tokens").write_text(TEXT)
        small = ["data.streams=2", "data.eval_streams=2", "data.segment=5", "data.allow_partial=true"]
        return [f"data.root={folder}", f"data.cache={folder}", *small]
    if leaf in ("sudoku", "maze"):
        return ["data.num_train=12", "data.num_test=6", "data.batch_size=4", "data.eval_batch_size=4"]
    if leaf == "sudoku_files":
        for split in ("train", "test"):
            (folder / f"{split}.csv").write_text(f"source,question,answer,rating\nx,{PUZZLE},{SOLUTION},0\n")
        return [f"data.root={folder}", "data.num_train=1", "data.batch_size=2", "data.passes=4"]
    if leaf == "ppi":  # the real one has its nodes counted: the same spec from generated graphs
        return ["data=ppi_synthetic", "data.scale=0.02"]
    small = {
        "ppi_synthetic": ["data.scale=0.02"],
        "images_synthetic": ["data.batch_size=2", "data.eval_batch_size=5"],
        "text_synthetic": ["data.streams=2", "data.eval_streams=2", "data.segment=5"],
    }
    return small.get(leaf, [])


def pictures(folder: Path, splits: tuple[str, ...], classes: tuple[str, ...], suffix: str, *, size: int) -> None:
    for split in splits:
        for i, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (size, size), (20 * i, 128, 255 - 20 * i)).save(folder / split / name / f"0.{suffix}")


def paths(folder: Path, name: str, count: int, num_labels: int) -> None:
    """Write `count` paths of three nodes, whose node labels run over 0 to `num_labels` - 1."""
    (folder / "raw").mkdir()
    nodes = range(3 * count)
    pairs = [(i + 1, i + 2) for i in nodes if i % 3 < 2]
    files = {
        "A": [f"{a}, {b}\n{b}, {a}" for a, b in pairs],
        "graph_indicator": [str(1 + i // 3) for i in nodes],
        "node_labels": [str(i % num_labels) for i in nodes],
        "graph_labels": [str(1 - 2 * (i % 2)) for i in range(count)],
    }
    for part, lines in files.items():
        (folder / "raw" / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
