"""Generated mazes against a count of shortest paths that knows nothing of how they were made."""

import numpy as np
import pytest
import torch

from phantom.engine.errors import DataError
from data.puzzles.maze import GOAL, OPEN, PATH, START, WALL, Mazes, orbit_keys
from phantom.engine.source import Shard

LENGTHS = {8: [4, 12], 13: [12, 40], 30: [100, 140]}


def make(size: int = 8, **changes) -> Mazes:
    settings = {
        "path": LENGTHS.get(size, [3, 9]),
        "num_train": 60 if size == 8 else 6,
        "num_valid": 0,
        "num_test": 30 if size == 8 else 3,
        "generation_seed": 0,
        "batch_size": 5,
        "eval_batch_size": 7,
        "passes": 2,
        "augment": True,
        "subset": None,
        "test_subset": None,
        "seed": 0,
    }
    return Mazes(size=size, **(settings | changes))


def mazes(source: Mazes, split: str) -> tuple[np.ndarray, np.ndarray]:
    batches = list(source.evaluate(split, shard=Shard()))
    size = source.spec.inputs["height"]
    return tuple(torch.cat([batch[i] for batch in batches]).numpy().reshape(-1, size, size) for i in (0, 1))


def shortest_paths(maze: np.ndarray) -> tuple[int, int, set[tuple[int, int]]]:
    """Return length and number of the shortest paths from start to goal, and the cells on them.

    Powers of the adjacency matrix of the open cells: entry (start, goal) of A^n counts the walks of n moves.
    """
    cells = [tuple(cell) for cell in np.argwhere(maze != WALL).tolist()]
    index = {cell: i for i, cell in enumerate(cells)}
    adjacency = np.zeros((len(cells), len(cells)))
    for i, j in cells:
        for near in ((i + 1, j), (i, j + 1)):
            if near in index:
                adjacency[index[i, j], index[near]] = adjacency[index[near], index[i, j]] = 1
    start, goal = (index[tuple(np.argwhere(maze == token)[0].tolist())] for token in (START, GOAL))
    walks = [np.eye(len(cells))[start]]
    while walks[-1][goal] == 0:
        walks.append(walks[-1] @ adjacency)
    back = np.eye(len(cells))[goal]
    on_path = set()
    for forward in reversed(walks):
        on_path |= {cells[i] for i in np.flatnonzero(forward * back)}
        back = back @ adjacency
    return len(walks) - 1, int(walks[-1][goal]), on_path


@pytest.mark.parametrize("size", [8, 13, 30])
def test_the_marked_path_is_the_only_shortest_one(size):
    source = make(size)
    assert source.spec.inputs == {"vocab_size": 6, "height": size, "width": size}
    lengths = set()
    for split in source.splits:
        for maze, solution in zip(*mazes(source, split), strict=True):
            assert (maze == START).sum() == (maze == GOAL).sum() == 1
            length, number, cells = shortest_paths(maze)
            assert number == 1 and LENGTHS[size][0] <= length <= LENGTHS[size][1]
            marked = {tuple(cell) for cell in np.argwhere(np.isin(solution, (START, PATH, GOAL))).tolist()}
            assert marked == cells and len(cells) == length + 1
            assert (solution[solution != PATH] == maze[solution != PATH]).all() and (
                maze[solution == PATH] == OPEN
            ).all()
            lengths.add(length)
    assert len(lengths) > 2


def test_no_maze_of_one_split_is_a_turned_one_of_another():
    source = make(num_valid=20)
    orbits = {}
    for split in source.splits:
        versions = [[turn[:7, :7] for turn in turns(maze)] for maze in mazes(source, split)[0]]
        orbits[split] = {min(version.tobytes() for version in found) for found in versions}
    assert not orbits["train"] & orbits["test"] and not orbits["train"] & orbits["valid"]
    assert not orbits["valid"] & orbits["test"] and len(orbits["train"]) > 50


def turns(maze: np.ndarray) -> list[np.ndarray]:
    """Return the eight symmetric versions of an 8 x 8 maze, whose last row and column are wall."""
    inner = [np.rot90(part, k) for part in (maze[:7, :7], maze[:7, :7].T) for k in range(4)]
    return [np.pad(part, ((0, 1), (0, 1)), constant_values=WALL) for part in inner]


def test_augmentation_turns_maze_and_path_together():
    source = make(augment=True, batch_size=60, passes=3)
    plain = {maze.tobytes(): solution for maze, solution in zip(*mazes(source, "train"), strict=True)}
    drawn = set()
    for ((inputs, labels),) in source.train(epoch=0, start=0, shard=Shard()):
        for maze, solution in zip(inputs.numpy().reshape(-1, 8, 8), labels.numpy().reshape(-1, 8, 8), strict=True):
            found = [
                i
                for i, (a, b) in enumerate(zip(turns(maze), turns(solution), strict=True))
                if a.tobytes() in plain and (plain[a.tobytes()] == b).all()
            ]
            assert found
            drawn |= set(found)
    assert drawn == set(range(8))


def test_keys_are_those_of_the_orbit():
    source = make()
    found = mazes(source, "train")[0]
    keys = orbit_keys(found.reshape(len(found), -1), 8)
    assert len(set(keys.tolist())) > 50
    for i in range(8):
        turned = np.stack([turns(maze)[i] for maze in found])
        assert (orbit_keys(turned.reshape(len(found), -1).astype(np.uint8), 8) == keys).all()


def test_mazes_follow_from_their_seed():
    assert make().spec.digests == make(seed=5).spec.digests != make(generation_seed=1).spec.digests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 7}, "size=7 must be an integer from 8 to 30"),
        ({"size": 31}, "size=31 must be"),
        ({"path": [9, 4]}, r"path=\[9, 4\] must be the least and the greatest number of moves"),
        ({"path": [1, 17]}, "between 1 and 16, the most that fit a maze of size=8"),
        ({"num_test": 0}, "num_test=0 must be an integer >= 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_more_mazes_than_there_are_is_an_error():
    # 16 moves visit all nine rooms: a 3 x 3 grid has 40 such walks
    with pytest.raises(
        DataError, match=r"there seem to be no more puzzles of this kind: test \d+ of 30, train \d+ of 30"
    ):
        make(8, path=[16, 16], num_train=30)
