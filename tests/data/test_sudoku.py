"""Generated Sudoku against a plain backtracking solver and a brute-force canonical form."""

from itertools import permutations, product

import numpy as np
import pytest
import torch

from data.puzzles import maze
from data.puzzles.sudoku import Sudoku
from data.puzzles.sudoku_grid import BOXES, orbit_keys, random_symmetries, transform
from data.puzzles.sudoku_search import candidates_of, count_solutions, random_grids
from phantom.engine.errors import DataError
from phantom.engine.source import Shard

CLUES = {4: [5, 7], 6: [9, 13], 9: [26, 32]}


def make(size: int = 4, **changes) -> Sudoku:
    settings = {
        "clues": CLUES.get(size),
        "num_train": 300 if size == 4 else 30,
        "num_valid": 0,
        "num_test": 100 if size == 4 else 12,
        "generation_seed": 0,
        "batch_size": 16,
        "eval_batch_size": 7,
        "passes": 2,
        "augment": True,
        "subset": None,
        "test_subset": None,
        "seed": 0,
    }
    return Sudoku(size=size, **(settings | changes))


def grids(source: Sudoku, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return puzzles and solutions of a split, 0 for a blank."""
    batches = list(source.evaluate(split, shard=Shard()))
    return tuple(torch.cat([batch[i] for batch in batches]).numpy() - 1 for i in (0, 1))


def solutions(puzzle: list[int], size: int) -> list[list[int]]:
    """Return all solutions of a puzzle by plain backtracking, at a cell with the fewest digits left."""
    rows, columns = BOXES[size]

    def allowed(cell: int) -> set[int]:
        i, j = divmod(cell, size)
        top, left = i // rows * rows, j // columns * columns
        box = {(a, b) for a in range(top, top + rows) for b in range(left, left + columns)}
        seen = box | {(i, b) for b in range(size)} | {(a, j) for a in range(size)}
        return set(range(1, size + 1)) - {puzzle[a * size + b] for a, b in seen - {(i, j)}}

    blank = [cell for cell, digit in enumerate(puzzle) if digit == 0]
    if any(digit not in allowed(cell) for cell, digit in enumerate(puzzle) if digit):
        return []
    if not blank:
        return [puzzle]
    cell = min(blank, key=lambda cell: len(allowed(cell)))
    return [found for d in allowed(cell) for found in solutions([*puzzle[:cell], d, *puzzle[cell + 1 :]], size)]


def symmetries_of_four() -> list[list[int]]:
    """Return the 128 permutations of the cells of a 4 x 4 grid that keep its rows, columns and boxes."""
    lines = [[2 * band + row for band, rows in zip(bands, inside, strict=True) for row in rows]
             for bands in permutations(range(2)) for inside in product(permutations(range(2)), repeat=2)]  # fmt: skip
    plain = [[4 * i + j for i in rows for j in columns] for rows in lines for columns in lines]
    return plain + [[4 * (cell % 4) + cell // 4 for cell in cells] for cells in plain]


def canonical(puzzle: np.ndarray, solution: np.ndarray) -> tuple[int, ...]:
    """Return the least version of a 4 x 4 puzzle and its solution under all 3072 symmetries."""
    versions = []
    for cells in symmetries_of_four():
        names = {0: 0}
        for digit in solution[cells]:  # the best relabelling numbers the digits as they appear
            names.setdefault(int(digit), len(names))
        versions.append(tuple(names[int(d)] for d in (*solution[cells], *puzzle[cells])))
    return min(versions)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_every_puzzle_has_its_solution_alone(size):
    source = make(size)
    for split in source.splits:
        puzzles, answers = grids(source, split)
        assert len(puzzles) == source.spec.sizes[split]
        assert len(np.unique(puzzles, axis=0)) == len(puzzles)
        clues = (puzzles > 0).sum(axis=1)
        assert clues.min() >= CLUES[size][0] and clues.max() <= CLUES[size][1] and len(set(clues)) > 1
        for puzzle, answer in zip(puzzles[: 40 // size], answers[: 40 // size], strict=True):
            assert solutions(puzzle.tolist(), size) == [answer.tolist()]


@pytest.mark.parametrize("size", [4, 6])
def test_solutions_are_counted_as_backtracking_counts_them(size):
    random = np.random.default_rng(1)
    full = random_grids(40, size, random)
    # few clues: some have one solution, most have several; a changed clue leaves most with none
    puzzles = np.where(random.random(full.shape) < 0.45, full, 0)
    puzzles[20:, 0] = random.integers(1, size + 1, size=20)
    counts, found = count_solutions(candidates_of(puzzles, size), size, limit=10**6)
    expected = [solutions(puzzle.tolist(), size) for puzzle in puzzles]
    assert counts.tolist() == [len(answers) for answers in expected]
    assert {0, 1} < set(counts.tolist())
    for answer, answers in zip(found.tolist(), expected, strict=True):
        assert answer in answers or not answers


def test_there_are_288_grids_of_four():
    empty = np.zeros((1, 16), dtype=np.uint8)
    assert count_solutions(candidates_of(empty, 4), 4, limit=1000)[0].tolist() == [288]
    assert len(np.unique(random_grids(5000, 4, np.random.default_rng(0)), axis=0)) == 288


def test_no_test_puzzle_is_a_symmetric_version_of_a_training_puzzle():
    source = make(num_valid=50)
    orbits = {split: {canonical(*pair) for pair in zip(*grids(source, split), strict=True)} for split in source.splits}
    assert not orbits["train"] & orbits["test"]
    assert not orbits["train"] & orbits["valid"] and not orbits["test"] & orbits["valid"]
    assert min(len(found) for found in orbits.values()) > 20
    notes = source.spec.notes
    assert notes["test_puzzles_in_training_orbits"] == notes["valid_puzzles_in_training_orbits"] == 0
    assert 0.9 * len(orbits["train"]) < notes["train_orbits"] <= len(orbits["train"])


def test_keys_tell_almost_all_orbits_of_four_apart():
    puzzles, answers = grids(make(), "train")
    keys = orbit_keys(puzzles, answers, 4).tolist()
    orbits = [canonical(*pair) for pair in zip(puzzles, answers, strict=True)]
    assert len(set(zip(keys, orbits, strict=True))) == len(set(orbits)), "one orbit, one key"
    assert len(set(keys)) > 0.9 * len(set(orbits))


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_keep_solutions_and_keys(size):
    puzzles, answers = grids(make(size), "test")
    cells, digits = random_symmetries(len(puzzles), size, np.random.default_rng(3))
    moved, moved_answers = transform(puzzles, cells, digits), transform(answers, cells, digits)
    assert (moved != puzzles).any(axis=1).all()
    assert (orbit_keys(moved, moved_answers, size) == orbit_keys(puzzles, answers, size)).all()
    for puzzle, answer in zip(moved[:2], moved_answers[:2], strict=True):
        assert solutions(puzzle.tolist(), size) == [answer.tolist()]


def test_all_symmetries_of_four_are_drawn():
    cells, digits = random_symmetries(4000, 4, np.random.default_rng(0))
    assert {tuple(row) for row in cells.tolist()} == {tuple(row) for row in symmetries_of_four()}
    assert {tuple(row) for row in digits.tolist()} == {(0, *rest) for rest in permutations(range(1, 5))}


def test_training_batches():
    source = make(batch_size=16)
    assert source.steps(0) == 300 * 2 // 16 == len(list(source.train(epoch=0, start=0, shard=Shard())))
    whole = [batch for (batch,) in source.train(epoch=1, start=0, shard=Shard())]
    resumed = [batch for (batch,) in source.train(epoch=1, start=20, shard=Shard())]
    assert all(torch.equal(a, b) for x, y in zip(whole[20:], resumed, strict=True) for a, b in zip(x, y, strict=True))
    ranks = [next(source.train(epoch=1, start=0, shard=Shard(rank=r, world=2, micro=2))) for r in range(2)]
    assert torch.equal(torch.cat([inputs for micro in zip(*ranks, strict=True) for inputs, _ in micro]), whole[0][0])
    inputs, labels = whole[3]
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.shape == labels.shape == (16, 16)
    for puzzle, answer in zip(inputs - 1, labels - 1, strict=True):
        assert solutions(puzzle.tolist(), 4) == [answer.tolist()]


def test_a_pass_shows_every_puzzle_once_and_the_next_one_another_version():
    plain, augmented = (make(augment=augment, batch_size=300, passes=2) for augment in (False, True))
    passes = [batch[0] for (batch,) in plain.train(epoch=0, start=0, shard=Shard())]
    assert len(passes) == 2 and not torch.equal(*passes)
    rows = [sorted(map(tuple, inputs.tolist())) for inputs in passes]
    assert rows[0] == rows[1] == sorted(map(tuple, (grids(plain, "train")[0] + 1).tolist()))
    shown = [sorted(map(tuple, batch[0].tolist())) for (batch,) in augmented.train(epoch=0, start=0, shard=Shard())]
    assert shown[0] != shown[1] and shown[0] != rows[0]


def test_puzzles_follow_from_their_seed_and_order_from_the_other():
    a, b, c = make(), make(seed=1), make(generation_seed=1)
    assert a.spec.digests == b.spec.digests == make().spec.digests != c.spec.digests
    first = [next(source.train(epoch=0, start=0, shard=Shard()))[0][0] for source in (a, make(), b)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 5}, "size=5 is not known; choose one of 4, 6, 9"),
        ({"clues": [7, 5]}, r"clues=\[7, 5\] must be the least and the greatest number of given cells"),
        ({"clues": 5}, "clues=5 must be"),
        ({"clues": [5, 16]}, "between 1 and 15"),
        ({"num_train": 0}, "num_train=0 must be an integer >= 1"),
        ({"passes": 0}, "passes=0 must be"),
        ({"augment": 1}, "augment=1 must be true or false"),
        ({"batch_size": 1000}, "fewer than batch_size=1000"),
        ({"clues": [1, 3]}, "there seem to be no more puzzles of this kind: test 0 of 100"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_too_many_processes_are_refused():
    with pytest.raises(DataError, match="20 processes cannot share batch_size=16"):
        next(make().train(epoch=0, start=0, shard=Shard(world=20)))


def test_keys_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch):
    source = make(size=4)
    puzzles, answers = grids(source, "train")
    mazes = np.random.default_rng(0).integers(0, 4, (30, 25)).astype(np.uint8)
    whole = orbit_keys(puzzles, answers, 4), maze.orbit_keys(mazes, 5)
    monkeypatch.setattr("data.puzzles.orbits.BLOCK", 7)
    for found, expected in zip((orbit_keys(puzzles, answers, 4), maze.orbit_keys(mazes, 5)), whole, strict=True):
        assert (found == expected).all()
    assert orbit_keys(puzzles[:0], answers[:0], 4).shape == (0,)


def test_every_number_of_clues_that_is_asked_for_occurs():
    source = make(4, clues=[5, 7])
    batches = source.evaluate("test", shard=Shard())
    assert {int(count) for inputs, _ in batches for count in (inputs > 1).sum(dim=1)} == {5, 6, 7}
