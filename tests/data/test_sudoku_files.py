"""Pairs of puzzle and solution from CSV files: good ones are read, others refused with file and line."""

from pathlib import Path

import pytest
import torch

from data.puzzles.sudoku_files import SudokuFiles
from phantom.engine.errors import DataError
from phantom.engine.source import Shard
from tests.data.test_sudoku import canonical, grids, make

SOLUTION = "1234341221434321"
PUZZLE = "1.3.3..22..34..1"


def write(folder: Path, rows: list[str], *, name: str = "train.csv", header: str = "puzzle,solution") -> Path:
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder


def read(folder: Path, **changes) -> SudokuFiles:
    settings = {
        "size": 4,
        "root": str(folder),
        "train_file": "train.csv",
        "test_file": "test.csv",
        "num_train": None,
        "num_test": None,
        "draw_seed": 0,
        "batch_size": 1,
        "eval_batch_size": 10,
        "passes": 1,
        "augment": False,
        "subset": None,
        "test_subset": None,
        "seed": 0,
    }
    return SudokuFiles(**(settings | changes))


def words(source, split: str) -> list[tuple[str, str]]:
    """Return the generated puzzles of a split as words."""
    pairs = zip(*grids(source, split), strict=True)
    return [tuple("".join(map(str, grid.tolist())) for grid in pair) for pair in pairs]


@pytest.mark.parametrize("header", ["puzzle,solution", "quizzes,solutions", "source,question,answer,rating"])
def test_pairs_are_read_as_they_stand(tmp_path, header):
    pairs = words(make(), "test")[:5]
    rows = [f"{p.replace('0', '.')},{s}" for p, s in pairs]
    if header.startswith("source"):
        rows = [f"x,{row},3" for row in rows]
    write(tmp_path, rows, header=header)
    write(tmp_path, [f"{p},{s}" for p, s in pairs[:2]], name="test.csv")
    source = read(tmp_path)
    assert words(source, "train") == pairs and words(source, "test") == pairs[:2]
    assert source.spec.inputs == {"vocab_size": 6, "height": 4, "width": 4}
    assert source.spec.notes["test_puzzles_in_training_orbits"] == 2


def test_a_held_out_part_shares_no_orbit(tmp_path):
    write(tmp_path, [",".join(pair) for pair in words(make(), "train")])
    source = read(tmp_path, test_file=None)
    orbits = [{canonical(*pair) for pair in zip(*grids(source, split), strict=True)} for split in ("train", "test")]
    assert not orbits[0] & orbits[1]
    assert 30 < source.spec.sizes["test"] < 110 and sum(source.spec.sizes.values()) == 300


def test_a_draw_is_a_part_of_the_file(tmp_path):
    pairs = words(make(), "test")
    for name in ("train.csv", "test.csv"):
        write(tmp_path, [",".join(pair) for pair in pairs], name=name)
    first, again, other = (read(tmp_path, num_train=20, draw_seed=seed) for seed in (0, 0, 1))
    assert words(first, "train") == words(again, "train") != words(other, "train")
    assert set(words(first, "train")) < set(pairs) and first.spec.sizes == {"train": 20, "test": 100}
    inputs, labels = next(first.train(epoch=0, start=0, shard=Shard()))[0]
    assert torch.equal(inputs[inputs > 1], labels[inputs > 1])
    with pytest.raises(DataError, match="has 100 puzzles, fewer than the 101 asked for"):
        read(tmp_path, num_train=101)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{PUZZLE[:-1]},{SOLUTION}", r"train.csv, line 3: puzzle has 15 characters, a 4 x 4 grid has 16"),
        (PUZZLE, r"line 3: solution has 0 characters"),
        (f"{PUZZLE[:-1]}x,{SOLUTION}", r"line 3: .* is not a grid: use 1 to 4, and \. or 0 for a blank"),
        (f"{PUZZLE[:-1]}5,{SOLUTION}", "line 3: .* is not a grid"),
        (f"{PUZZLE[:-1]}/,{SOLUTION}", "line 3: .* is not a grid"),  # stands before "0"
        (f"{PUZZLE[:-1]}\u0663,{SOLUTION}", "line 3: .* is not a grid"),  # a digit of another script
        (f"{'.' * 16},{SOLUTION}", "line 3: the puzzle has more than one solution"),
        (f"11{'.' * 14},{SOLUTION}", "line 3: the puzzle has no solution"),
        (f"{PUZZLE},{SOLUTION[:-1]}2", "line 3: the solution breaks the rules"),
        (f"{PUZZLE},{SOLUTION.translate(str.maketrans('12', '21'))}", "line 3: the solution changes a given digit"),
    ],
)
def test_a_wrong_pair_is_named_by_its_line(tmp_path, row, message):
    write(tmp_path, [f"{PUZZLE},{SOLUTION}"], name="test.csv")
    write(tmp_path, [f"{PUZZLE},{SOLUTION}", row])
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*train.csv. Set the folder with data.root"):
        read(tmp_path)
    write(tmp_path, [], header="a,b")
    with pytest.raises(DataError, match="has the columns a, b; known pairs are puzzle and solution"):
        read(tmp_path)
    write(tmp_path, [])
    with pytest.raises(DataError, match="has a header and no puzzle"):
        read(tmp_path)
    with pytest.raises(ValueError, match="num_test=3 needs a test_file"):
        read(tmp_path, test_file=None, num_test=3)


def test_a_byte_order_mark_is_no_letter_and_another_encoding_is_named(tmp_path):
    for name in ("train.csv", "test.csv"):
        write(tmp_path, [f"{PUZZLE},{SOLUTION}"], name=name)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert read(tmp_path).spec.sizes["train"] == 1
    (tmp_path / "train.csv").write_bytes((tmp_path / "train.csv").read_text("utf-8-sig").encode("utf-16"))
    with pytest.raises(DataError, match=r"train\.csv is no text in UTF-8"):
        read(tmp_path)
