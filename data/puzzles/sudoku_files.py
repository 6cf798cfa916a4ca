"""Sudoku from CSV files of puzzle and solution, the form of the public 9 x 9 sets."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.paths import data_root, root_hint
from data.puzzles.base import PuzzleSet, split_of
from data.puzzles.orbits import mix
from data.puzzles.sudoku import SudokuTokens
from data.puzzles.sudoku_grid import check_size, is_solution
from data.puzzles.sudoku_search import candidates_of, count_solutions
from phantom.engine.errors import DataError
from phantom.validate import check_count

COLUMNS = (("puzzle", "solution"), ("quizzes", "solutions"), ("question", "answer"))


@dataclass(kw_only=True, eq=False)
class SudokuFiles(SudokuTokens):
    """Puzzles and solutions from CSV files.

    A file has a header with the columns puzzle and solution, quizzes and solutions, or question and answer; a grid is
    one word of n * n characters in reading order, with `.` or `0` for a blank cell. Of every puzzle that is used, the
    solution is checked: a full grid that keeps the clues, and the only one.

    Args:
        size: digits, 4, 6 or 9.
        root: folder of the files; None takes $PHANTOM_DATA/sudoku or the cache folder.
        train_file, test_file: names in it. Without a `test_file` a fifth of the training puzzles is held out, by orbit
            (see `Sudoku`). Two files are taken as they are, even where puzzles of one orbit lie in both.
        num_train, num_test: puzzles drawn from each file; None takes all.
        draw_seed: of that draw.
        batch_size, eval_batch_size, passes, augment, subset, test_subset, seed: see `Puzzles`.

    Raises:
        ValueError: an argument is out of range.
        DataError: a file is missing or malformed, or a solution is wrong or not the only one; names file and line.
    """

    size: int
    root: str | None
    train_file: str
    test_file: str | None
    num_train: int | None
    num_test: int | None
    draw_seed: int

    def __post_init__(self) -> None:
        check_size(self.size)
        for name, value in (("num_train", self.num_train), ("num_test", self.num_test)):
            check_count(name, value, least=1, optional=True)
        if self.test_file is None and self.num_test is not None:
            raise ValueError(
                f"num_test={self.num_test!r} needs a test_file: without one a fifth of the puzzles is held out"
            )
        super().__post_init__()

    def load(self) -> Mapping[str, PuzzleSet]:
        both = self._draw(self.train_file, self.num_train)
        if self.test_file is not None:
            return {"train": both, "test": self._draw(self.test_file, self.num_test)}
        # mixed once more, so that a file which is one split of `Sudoku` still falls into two parts
        keys = mix(self.orbit_keys(both))
        test = split_of(keys, {"test": 1, "train": 4}) == 0
        return {"train": both.take(~test), "test": both.take(test)}

    def _draw(self, name: str, count: int | None) -> PuzzleSet:
        path = data_root(self.root, "sudoku") / name
        if not path.is_file():
            raise DataError(f"there is no file {path}. {root_hint('sudoku')}")
        lines, puzzles, solutions = read_pairs(path, self.size)
        if count is not None and count > len(lines):
            raise DataError(f"{path} has {len(lines)} puzzles, fewer than the {count} asked for")
        drawn = np.sort(np.random.default_rng(self.draw_seed).permutation(len(lines))[:count])
        puzzles, solutions = puzzles[drawn], solutions[drawn]
        check_pairs(puzzles, solutions, self.size, path=path, lines=lines[drawn])
        return PuzzleSet(puzzles + 1, solutions + 1)


def read_pairs(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return line numbers (N,), puzzles and solutions (N, n * n) with 0 for a blank.

    Raises:
        DataError: no known columns, or a grid that is not n * n characters `.`, 0 to n.
    """
    try:
        return _read_pairs(path, size)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}): unpack it, or save it as UTF-8") from error


def _read_pairs(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(reader, [])]
        pair = next((names for names in COLUMNS if set(names) <= set(header)), None)
        if pair is None:
            known = ", ".join(" and ".join(names) for names in COLUMNS)
            raise DataError(
                f"{path} has the columns {', '.join(header) or 'of an empty file'}; known pairs are {known}"
            )
        at = [header.index(name) for name in pair]
        # a byte per cell: the public sets have millions of lines
        lines, codes = array("q"), (bytearray(), bytearray())
        for row in reader:
            if not row:
                continue
            grids = [row[i].strip() if i < len(row) else "" for i in at]
            for name, grid in zip(pair, grids, strict=True):
                if len(grid) != size * size:
                    raise DataError(
                        f"{path}, line {reader.line_num}: {name} has {len(grid)} characters, a {size} x {size} grid "
                        f"has {size * size}: choose data.size to fit the file"
                    )
            lines.append(reader.line_num)
            for kept, grid in zip(codes, grids, strict=True):
                kept += grid.encode("ascii", errors="replace")
    if not lines:
        raise DataError(f"{path} has a header and no puzzle")
    numbers = np.frombuffer(lines, dtype=np.int64)
    questions, answers = (_digits(np.frombuffer(kept, dtype=np.uint8), size, path, numbers) for kept in codes)
    return numbers, questions, answers


def check_pairs(puzzles: np.ndarray, solutions: np.ndarray, size: int, *, path: Path, lines: np.ndarray) -> None:
    """Check that every solution (N, n * n) is a full grid, keeps the clues of its puzzle and is the only one.

    Raises:
        DataError: names the first line that is wrong.
    """
    counts, _ = count_solutions(candidates_of(puzzles, size), size)
    problems = (
        (counts == 0, "the puzzle has no solution"),
        (counts > 1, "the puzzle has more than one solution"),
        (~is_solution(solutions, size), "the solution breaks the rules: a row, column or box repeats a digit"),
        (((puzzles > 0) & (puzzles != solutions)).any(axis=1), "the solution changes a given digit"),
    )
    for wrong, text in problems:
        if wrong.any():
            first = lines[wrong.argmax()]
            raise DataError(f"{path}, line {first}: {text} ({int(wrong.sum())} such line(s)); remove or correct them")


def _digits(codes: np.ndarray, size: int, path: Path, lines: np.ndarray) -> np.ndarray:
    codes = codes.reshape(len(lines), size * size)
    digits = np.where(codes == ord("."), np.uint8(0), codes - np.uint8(ord("0")))  # what lies below "0" becomes large
    wrong = (digits > size).any(axis=1)
    if wrong.any():
        i = int(wrong.argmax())
        word = codes[i].tobytes().decode("ascii")
        raise DataError(f"{path}, line {lines[i]}: {word!r} is not a grid: use 1 to {size}, and . or 0 for a blank")
    return digits
