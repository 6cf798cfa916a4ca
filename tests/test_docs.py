"""The pages of docs/ print what they say, their tables are those of the records, and the notebooks run."""

import contextlib
import io
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

import phantom
from phantom import report

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
NOTEBOOKS = sorted(path.name for path in (DOCS / "notebooks").glob("*.ipynb"))


def printed(code: str, names: dict) -> str:
    """Run `code` and return what its reader sees: what it prints, warns of and raises."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}")
        try:
            exec(code, names)
        except (ValueError, RuntimeError) as error:
            print(f"{type(error).__name__}: {error}")
    return out.getvalue()


def check_alike(found: str, shown: str, rel: float) -> None:
    """Check that two texts have the same words, and numbers that differ by `rel` at most."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (found, shown)]
    assert words[0] == words[1], found
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (found, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=1e-12), found


@pytest.mark.parametrize("page", ["start", "failures"])
def test_the_blocks_of_a_page_print_what_stands_below_them(page, monkeypatch):
    monkeypatch.setattr(report, "_said", set())  # a process warns once, and this is the reader's
    examples, names = EXAMPLE.findall((DOCS / f"{page}.md").read_text()), {}
    assert len(examples) >= 3
    for code, shown in examples:
        check_alike(printed(code, names), shown, rel=0.1)


def test_a_model_inside_of_other_libraries(tmp_path, monkeypatch):
    """Needs `pip install transformers peft lightning`."""
    for name in ("transformers", "peft", "lightning"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    examples, names = EXAMPLE.findall((DOCS / "ecosystem.md").read_text()), {}
    for code, shown in examples:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings(action="ignore"):
            exec(code, names)
        assert out.getvalue() == shown != ""
    assert all(p.grad.isfinite().all() and p.grad.any() for p in names["adapted"].parameters() if p.grad is not None)


def test_a_number_that_differs_is_noticed():
    check_alike("residual 1.0e-04 of\n8 rows", "residual 1.05e-04 of 8 rows", rel=0.1)
    for other in ("residual 1.2e-04 of 8 rows", "residual 1e-04 of 7 rows", "residual 1e-04 in 8 rows"):
        with pytest.raises(AssertionError):
            check_alike("residual 1.0e-04 of 8 rows", other, rel=0.1)


def tables(text: str) -> list[tuple[int, list[list[str]]]]:
    """Return the tables of a page with where they stand: their rows of cells, the header first."""
    found = []
    for table in re.finditer(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.group().splitlines()]
        found.append((table.start(), [row for row in rows if not set("".join(row)) <= set(":-")]))
    return found


@pytest.mark.parametrize(("page", "least"), [("choosing", 30), ("reasoners", 6)])
def test_measured_numbers_are_those_of_the_records(page, least):
    text = (DOCS / f"{page}.md").read_text()
    number_of_rows = 0
    for start, (header, *rows) in tables(text):
        paragraph = text[:start].rstrip().rpartition("\n\n")[2]
        record = re.search(r"\[record\]\((.*?)\)", paragraph)
        if record is None:
            assert not any(NUMBER.fullmatch(cell) for row in rows for cell in row), (
                "a table of numbers names its record"
            )
            continue
        measured = []
        for _, (names, *lines) in tables((DOCS / record.group(1)).read_text()):
            if set(header) <= set(names):
                measured += [[line[names.index(name)] for name in header] for line in lines]
        for row in rows:
            assert row in measured, (record.group(1), row)
        number_of_rows += len(rows)
    assert number_of_rows >= least


def test_the_index_names_every_page():
    text = (DOCS / "index.md").read_text()
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix()
        for path in [*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.ipynb")]
    }
    trees = re.findall(r"^```{toctree}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    assert {entry for entry in entries if entry[0] != "/"} == pages - {"index"}
    assert all((ROOT / f"{entry[1:]}.md").exists() for entry in entries if entry[0] == "/")
    linked = {link.partition(".")[0] for link in re.findall(r"\]\((\w[\w/.]*)\)", text)}
    assert linked == pages - {"index"}, "the list for readers and the tree for the site"


def test_a_link_between_pages_stays_on_the_site():
    source = re.search(r"^include_patterns = \[(.*?)\]", (DOCS / "conf.py").read_text(), flags=re.MULTILINE)[1]
    patterns = [re.escape(pattern) for pattern in re.findall(r'"(.*?)"', source)]
    form = "|".join(pattern.replace(r"\*\*", ".*").replace(r"\*", "[^/]*") for pattern in patterns)
    folders = [ROOT / name for name in ("docs", "results", "scripts", "weights")]
    files = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    pages = {path for path in files if re.fullmatch(form, path.relative_to(ROOT).as_posix())}
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(\s*([^)#:\s]+\.md)[)#]", page.read_text("utf-8"))
    ]
    assert len(links) > 100
    assert [(page.name, link) for page, link in links if (page.parent / link).resolve() not in pages] == []


def test_the_reference_has_every_public_name():
    listed = re.findall(r"(?:class|function|exception|module|data):: phantom\.(\w+)", (DOCS / "api.md").read_text())
    assert sorted(listed) == sorted(phantom.__all__)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_prints_what_it_shows(name, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    cells = json.loads((DOCS / "notebooks" / name).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], "run it from its first cell"
    assert any("assert " in line for cell in code for line in cell["source"])
    names = {}
    with torch.random.fork_rng(devices=[]):
        for cell in code:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec("".join(cell["source"]), names)
            shown = "".join("".join(output.get("text", [])) for output in cell["outputs"])
            check_alike(out.getvalue(), shown, rel=0.25)
    drawn = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(drawn) == len(plt.get_fignums()) == 1
    plt.close("all")
