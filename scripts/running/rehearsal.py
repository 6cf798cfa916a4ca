"""How a run is cut down at scale=smoke, so that a study is rehearsed end to end on two cores in minutes.

A row keeps its model at its full width, its solver, its estimator and its protocol. Batch, tokens, crop and, for large
models, the number of steps shrink; where the files of its data set are not at hand, generated data takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data.paths import data_root
from phantom.engine.errors import ConfigError


class Rehearsal(NamedTuple):
    """The items of a pair of model and data.

    Args:
        folder: the name that the data set is looked for by; empty for one that is generated anyway.
        items: what changes in any case.
        real: what changes where the folder is there.
        generated: what changes where it is not.
    """

    folder: str
    items: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()


IMAGES = ("data=images_synthetic",)
REHEARSALS = {
    # a step of these models at its own size takes minutes on a CPU: two steps of a few examples
    ("deq_transformer", "wikitext103"): Rehearsal(
        "wikitext103",
        (
            "steps=2",
            "data.streams=2",
            "data.eval_streams=2",
            "data.segment=8",
            "model.mem_len=8",
            "model.eval_mem_len=8",
        ),
        real=("data.eval_tokens=40",),
        generated=("data=text_synthetic", "data.num_train=1000", "data.num_eval=40"),
    ),
    ("mdeq_small", "imagenet"): Rehearsal(
        "imagenet",
        ("steps=2", "test_subset=4", "data.batch_size=2", "data.eval_batch_size=2"),
        real=("data.crop=64", "data.resize=72", "data.workers=0"),
        generated=(*IMAGES, "data.num_classes=1000", "data.size=64"),
    ),
    ("mdeq_large", "cifar10"): Rehearsal(
        "cifar10", ("steps=2", "test_subset=4", "data.batch_size=2"), generated=IMAGES
    ),
    ("mdeq_tiny", "cifar10"): Rehearsal("cifar10", ("test_subset=32", "data.batch_size=8"), generated=IMAGES),
    ("ignn", "ppi"): Rehearsal("PPI", ("steps=2",), generated=("data=ppi_synthetic", "data.scale=0.05")),
    ("ignn", "ppi_synthetic"): Rehearsal("", ("data.scale=0.05",)),
    ("ignn", "cox2"): Rehearsal("COX2", generated=("data=cox2_synthetic",)),
    ("ignn", "proteins"): Rehearsal("PROTEINS", generated=("data=proteins_synthetic",)),
    # a row that trains on the text's test split and evaluates on its validation split
    ("deq_transformer_small", "wikitext103"): Rehearsal(
        "wikitext103", generated=("data=text_synthetic", "data.num_train=20000", "data.num_eval=2000")
    ),
}


def items(model: str, data: str, overrides: Sequence[str]) -> list[str]:
    """Return what a row of this model and data changes at scale=smoke; `overrides` may name the folder of the data.

    Raises:
        ConfigError: they name one that is not there.
    """
    found = REHEARSALS.get((model, data), Rehearsal(""))
    root = next((item.partition("=")[2] for item in overrides if item.startswith("data.root=")), None)
    named = root not in (None, "null")
    if named and not root.startswith("hf:") and not data_root(root, found.folder).is_dir():
        raise ConfigError(f"data.root={root} is no folder: correct it, or leave it out for generated data")
    there = not found.folder or named or data_root(None, found.folder).is_dir()
    return [*(found.real if there else found.generated), *found.items]
