"""Ten folds for graph classification, official or stratified."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.seeding import generator
from phantom.engine.errors import DataError

NUM_FOLDS = 10

Folds = Literal["official", "stratified"]


def fold_size(count: int, fold: int) -> int:
    """Return the number of test graphs of `fold`: count // 10, and one more in the first count % 10 folds."""
    return count // NUM_FOLDS + int(fold < count % NUM_FOLDS)


def check_fold(fold: int) -> None:
    """Raise ValueError unless `fold` is one of 0..9."""
    if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < NUM_FOLDS:
        raise ValueError(
            f"fold={fold!r} must be an integer 0..{NUM_FOLDS - 1}: a run trains one, scripts/reproduce.py all ten"
        )


def official_names() -> tuple[str, ...]:
    """Return the names of the data sets with recorded official folds."""
    return tuple(_official())


def official_fold(name: str, fold: int) -> tuple[list[int], list[int]]:
    """Return the (train, test) graph ids of an official IGNN fold, in the official order.

    The official code permutes the data set, but stratifies by the labels in their original order, so its folds are in
    effect random. The ids were recorded with its seed, 42.
    """
    permutation, fold_of = _official()[name]["permutation"], _official()[name]["fold_of_position"]
    test = [graph for graph, digit in zip(permutation, fold_of, strict=True) if int(digit) == fold]
    train = [graph for graph, digit in zip(permutation, fold_of, strict=True) if int(digit) != fold]
    return train, test


def stratified_fold(labels: Tensor, fold: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the (train, test) graph ids of a fold stratified by class, in a seeded order."""
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    try:
        test = set(list(splitter.split(labels.numpy(), labels.numpy()))[fold][1].tolist())
    except ValueError as error:
        raise DataError(f"the graphs cannot be cut into {NUM_FOLDS} folds by class: {error}") from error
    order = torch.randperm(labels.numel(), generator=generator(f"folds/{seed}")).tolist()
    return [graph for graph in order if graph not in test], [graph for graph in order if graph in test]


@cache
def _official() -> dict[str, dict]:
    return json.loads((Path(__file__).parent / "ignn_folds.json").read_text("utf-8"))
