"""The report page: every number on it lies in the record that it names, and it needs nothing from outside."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from scripts import report, studies
from scripts.reporting import pages
from scripts.reporting.html.chosen import chosen
from scripts.reporting.html.others import others
from scripts.reporting.provenance import command
from tests.plans import composed
from tests.tiny_run import tiny_run

pytest.importorskip("plotly")
pytest.importorskip("jinja2")

from scripts.reporting.html import page
from scripts.reporting.html.payload import _local, at


class Reader(HTMLParser):
    """Collect the text of table cells by section, what is loaded, and the payload."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: dict[str, list[str]] = {}
        self.text: dict[str, list[str]] = {}
        self.sources, self.payload, self._section, self._cell, self._script = [], "", "", False, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [found[key] for key in ("src", "href") if key in found]
        self._script = found.get("id", "script") if tag == "script" else ""
        if tag == "section":
            self._section = found["id"]
        if tag in ("td", "th"):
            self._cell = True
            self.cells.setdefault(self._section, []).append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")
        self._script = "" if tag == "script" else self._script

    def handle_data(self, data):
        if self._script == "payload":
            self.payload += data
        elif self._cell:
            self.cells[self._section][-1] += data
        elif not self._script:
            self.text.setdefault(self._section, []).append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for k in (1, 2):
        tiny_run(folder, "steps=3", "eval_every=3", f"k={k}", "subset=8", "test_subset=4")
    return folder


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "a new folder" / "report.html"
    report.main(["html", f"runs={runs}", f"out={out}"])
    return out.read_text()


@pytest.fixture(scope="module")
def reader(text):
    return Reader(text)


def record_of(name: str):
    path = studies.ROOT / name
    lines = path.read_text()
    return [json.loads(line) for line in lines.splitlines()] if name.endswith(".jsonl") else json.loads(lines)


def numbers(payload):
    """Yield (record, place, value) of every number that the page draws or lists."""
    for run in payload["runs"]:
        for found in run["numbers"].values():
            yield run["record"], found["place"], found["value"]
    for curve in payload["curves"]:
        for row, value in zip(curve["rows"], curve["y"], strict=True):
            yield curve["record"], [row if key is None else key for key in curve["place"]], value
    for benchmark in payload["benchmarks"]:
        for bar in benchmark["bars"]:
            for found in bar["phases"].values():
                yield benchmark["record"], found["place"], found["value"]
    for exploration in payload["explorations"]:
        for point in exploration["points"]:
            for key in ("seconds", "cosine"):
                yield exploration["record"], point[key]["place"], point[key]["value"]


def test_every_number_of_the_charts_lies_in_its_record(reader):
    found = list(numbers(json.loads(reader.payload)))
    records = {name: record_of(name) for name in {name for name, _, _ in found}}
    assert len(found) > 1000 and len(records) > 30
    for name, place, value in found:
        assert at(records[name], place) == value, (name, place)


def test_every_benchmark_to_choose_has_bars(reader):
    shown = json.loads(reader.payload)["benchmarks"]
    assert shown and all(all(bar["phases"] for bar in one["bars"]) for one in shown)


def test_every_exploration_to_choose_has_its_rows(reader):
    shown = json.loads(reader.payload)["explorations"]
    assert shown
    for one in shown:
        rows = json.loads((studies.ROOT / one["record"]).read_text())["rows"]
        measured = [row["estimator"] for row in rows if row["cosine"] is not None]
        assert [point["label"] for point in one["points"]] == measured != []


def test_every_committed_run_is_there_with_its_command(reader):
    kept = {
        path.relative_to(studies.ROOT).as_posix()
        for path in studies.results().rglob("*.json")
        if isinstance(content := json.loads(path.read_text()), dict) and {"metric", "commit"} <= set(content)
    }
    shown = {run["record"]: run for run in json.loads(reader.payload)["runs"]}
    assert kept and kept <= set(shown)
    assert all(run["command"].startswith("python ") for run in shown.values())


def test_a_record_that_was_set_apart_has_a_label_of_its_own(reader):
    labels = {run["record"]: run["label"] for run in json.loads(reader.payload)["runs"]}
    assert labels["results/table1/upg_k5_lam0.5/seed0.json"] == "table1/upg_k5_lam0.5"
    apart = "table1/upg_k5_lam0.5@jpeg_copies"  # on other pictures than those of the row
    assert labels[f"results/{apart}/seed0.json"] == apart
    assert labels["results/fig3/npg@cpu@k=1,lam=0.5/seed0.json"] == "fig3/npg@cpu"


def test_every_table_is_that_of_the_rendered_pages(reader):
    """Those are rendered from records, which tests/scripts/test_pages.py holds them to."""
    for study in map(studies.load, studies.names()):
        cells = [
            plain(cell)
            for page in pages.of(study).values()
            for table in page.tables
            for row in (table.heads, *table.rows)
            for cell in row
        ]
        assert [plain(cell) for cell in reader.cells.get(study["name"].replace("/", "-"), [])] == cells, study["name"]


def plain(cell: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[*`\\]|\[|\]\([^)]*\)", "", cell)).strip()


def test_every_study_names_its_command_and_its_records(reader):
    for study in map(studies.load, studies.names()):
        said = " ".join(reader.text[study["name"].replace("/", "-")])
        assert pages.command(study) in said and study["title"] in said
        for path in study["folder"].rglob("*.json"):
            assert path.relative_to(studies.ROOT).as_posix() in said


def test_the_curves_of_run_folders(reader, runs):
    payload = json.loads(reader.payload)
    mine = [curve for curve in payload["curves"] if curve["record"].startswith(str(runs))]
    names = {curve["name"] for curve in mine}
    assert {"train/loss", "train/accuracy", "train/residual", "train/num_steps"} <= names
    assert {curve["run"] for curve in mine} == {run["record"] for run in payload["runs"] if str(runs) in run["record"]}
    assert {run["k"] for run in payload["runs"] if str(runs) in run["record"]} == {"1", "2"}


def test_nothing_is_loaded_from_outside(text, reader):
    assert all(source.startswith(("#", "data:", "https://")) for source in reader.sources)
    loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?!data:)', text)
    assert not loaded and "@import" not in text
    assert len(text) < 6e6


def test_what_a_record_was_made_with():
    upg = {"model": "ignn", "data": "cox2", "grad": "upg", "k": "5", "lam": "0.8", "scale": "paper"}
    assert chosen({"experiment": "table4/cox2_upg_k5_lam0.8"}) == upg, "the recipe has model and data"
    changed = chosen({"experiment": "table4/cox2_upg_k5_lam0.8", "overrides": ["k=9", "data.fold=3"], "scale": "smoke"})
    assert changed == upg | {"k": "9", "scale": "smoke"}
    assert chosen({"label": "x", "choices": {"model": "m", "data": "d", "grad": "implicit"}, "overrides": ["k=3"]}) == {
        **{"model": "m", "data": "d", "grad": "implicit", "scale": "paper"},
        **{"k": "--", "lam": "--"},
    }
    leaf = yaml.safe_load((studies.ROOT / "configs/grad/upg.yaml").read_text())
    default = chosen({"label": "x", "choices": {"grad": "upg"}, "overrides": []})
    assert (default["k"], default["lam"]) == (f"{leaf['k']:g}", f"{leaf['lam']:g}")


@pytest.mark.parametrize(
    "name",
    [
        *("ppi_synthetic/full_size_npg_k5_lam0.5", "ppi_synthetic/full_size_implicit", "chains/upg_k5_lam0.8"),
        *("chains/one_step", "reasoners/sudoku4_warm_up", "table4/ppi_upg_k5_lam1.0", "language/pydocs"),
    ],
)
def test_a_record_by_its_experiment_says_what_is_composed(name):
    """Of an experiment that starts from another one, or from a recipe, too."""
    config, choices = composed([f"experiment={name}"])
    groups = {group: choices[group] for group in ("model", "data", "grad")}
    varied = [key for key in ("k", "lam") if (config["course"] or {}).get(key)]
    numbers = {key: f"{config[key]:g}" if key in config and key not in varied else "--" for key in ("k", "lam")}
    expected = {**groups, **numbers, "scale": "paper"}
    assert chosen({"label": name}) == chosen({"experiment": name, "choices": choices}) == expected


def test_a_child_says_more_than_its_parent(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    written = {
        "grad/npg": {"k": 5, "lam": 0.5},
        "recipe/r": {"defaults": [{"override /model": "ignn"}, {"override /data": "cox2"}], "k": 1, "lam": 0.1},
        "experiment/t/one": {"defaults": [{"override /recipe": "r"}, {"override /grad": "upg"}], "k": 2},
        "experiment/t/two": {"defaults": ["t/one", {"override /grad": "npg"}, "_self_"], "lam": 0.3},
        "experiment/t/three": {"defaults": ["t/two", "_self_"], "steps": 3},
    }
    for name, node in written.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(node))
    expected = {"model": "ignn", "data": "cox2", "grad": "npg", "k": "2", "lam": "0.3", "scale": "paper"}
    assert chosen({"label": "t/three"}) == chosen({"label": "t/two"}) == expected


def test_an_estimator_s_own_numbers_and_those_that_a_course_changes():
    run = {"label": "x", "choices": {"grad": "upg"}}
    own = chosen(run | {"overrides": ["grad.k=3", "grad.lam=0.25", "k=7"]})
    assert (own["k"], own["lam"]) == ("3", "0.25")
    warm = chosen(run | {"overrides": ["course=warm_up_k", "k=3"]})
    assert (warm["k"], warm["lam"]) == ("--", "0.5"), "it has no one k"
    chose = {"label": "x", "choices": {"grad": "upg", "course": "warm_up_k"}}
    assert chosen(chose)["k"] == "--" and chosen(chose | {"overrides": ["course.k=null"]})["k"] == "5"
    assert chosen(run | {"overrides": ["course=random_depth", "k=8"]})["k"] == "8", "this one changes the depth"


def test_what_else_a_command_says():
    items = ["+grad.k=3", "data=cifar10", "experiment=table1/upg_k9_lam0.5_dropout", "lam=1", "optimizer.lr=0.1"]
    items += ["model=mdeq_tiny", "grad=upg", "k=9", "grad.lam=0.5", "scale=cpu"]  # there is a filter for each
    assert others({"overrides": items}) == ["experiment=table1/upg_dropout", "optimizer.lr=0.1"]
    assert others({"experiment": "table4/cox2_upg_k5_lam1.0", "overrides": ["k=3"]}) == ["experiment=table4/cox2_upg"]
    assert others({"label": "x"}) == []


def test_experiments_whose_names_differ_in_k_and_lam_differ_in_nothing_else():
    kinds = {}
    for path in sorted((studies.ROOT / "configs" / "experiment").rglob("*.yaml")):
        name = path.relative_to(studies.ROOT / "configs" / "experiment").with_suffix("").as_posix()
        content = {key: value for key, value in studies.leaf("experiment", name).items() if key not in ("k", "lam")}
        kinds.setdefault(str(others({"experiment": name})), []).append(content)
    assert all(content == several[0] for several in kinds.values() for content in several)
    assert any(len(several) > 2 for several in kinds.values())


def test_a_training_is_one_wherever_its_record_is_kept(runs, tmp_path):
    for path in runs.rglob("record.json"):
        kept = tmp_path / path.relative_to(runs)
        kept.parent.mkdir(parents=True)
        kept.write_text(path.read_text())
    found = [run["training"] for folder in (runs, tmp_path) for run, _ in _local(folder)]
    assert len(found) == 4 and len(set(found)) == 2


def test_a_damaged_or_foreign_folder_is_left_out_with_its_reason(runs, tmp_path, capsys):
    whole = next(runs.rglob("record.json"))
    record, lines = json.loads(whole.read_text()), whole.with_name("metrics.jsonl").read_text().splitlines()
    unlike = {name: {**record, name: value} for name, value in {"best": {}, "overrides": [1], "seed": "0"}.items()}
    without = {key: value for key, value in record.items() if key != "metric"}
    texts = {name: json.dumps(content) for name, content in {**unlike, "metric": without, "list": []}.items()}
    for name, text in (texts | {"cut": whole.read_text()[:40], "binary": "\udcff"}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text, errors="surrogateescape")
    strange = json.dumps(
        {**record, "peak_memory": float("inf"), "steps": float("-inf"), "final": {"test": {"accuracy": float("nan")}}}
    )
    (tmp_path / "good").mkdir()
    (tmp_path / "good/record.json").write_text(strange)
    rows = [lines[0].replace('"loss": ', '"loss": NaN, "of": '), "no row", *lines[1:], lines[-1][:20]]
    (tmp_path / "good/metrics.jsonl").write_text("\n".join(rows))
    ((run, curves),) = _local(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("/record.json is left out: ")[0] for line in said] == [
        *(str(tmp_path / name) for name in ("best", "binary", "cut")),
        f"{tmp_path / 'good/metrics.jsonl'}: damaged lines are left out (1)",
        *(str(tmp_path / name) for name in ("list", "metric", "overrides", "seed")),
    ]
    reasons = "\n".join(said)
    for reason in ("the run has no evaluation", "another field metric", "another field seed", "no record of a run"):
        assert reason in reasons
    json.dumps([run, curves], allow_nan=False)
    assert not {"peak_bytes", "steps", "last"} & set(run["numbers"])
    (loss,) = [curve for curve in curves if curve["name"] == "train/loss"]
    assert loss["x"] == [2, 3], "and not the step whose loss was not finite"


def test_the_command_of_a_record():
    folds = {
        "folds": [],
        "experiment": "table4/cox2_implicit",
        "overrides": ["data.x=1", "experiment=table4/cox2_implicit"],
    }
    assert command(folds) == "python scripts/reproduce.py table4 rows=cox2_implicit data.x=1"
    assert command({"overrides": ["experiment=a/b"], "seed": 2}) == "python train.py experiment=a/b seed=2"


def test_a_table_is_a_group_with_the_name_of_the_heading_before_it(text):
    made = page.as_html("| a |\n| --- |\n\n# One *two* `<3`\n\ntext\n\n| a |\n| --- |\n\n| b |\n| --- |\n")
    assert re.findall('role="group" tabindex="0" aria-label="([^"]*)"', made) == ["table", *2 * ["One two &lt;3"]]
    assert text.count('role="region"') == 1, "of landmarks there is the table of runs"


def test_it_can_be_printed(text):
    assert 'loading="lazy"' not in text, "a picture that was not scrolled to is missing on paper"
    (rules,) = re.findall(r"@media print \{(.*?)\n\}", text, flags=re.DOTALL)
    assert re.search(r"\.scroll \{[^}]*max-height: none", rules)


def test_text_of_a_record_is_no_markup():
    assert "<script>" not in page.as_html("# <script>alert(1)</script>")


@pytest.mark.parametrize("items", [["runs=no-such-folder"], ["model=mdeq_tiny"], ["table1"], ["sweep=runs"]])
def test_mistakes_are_one_sentence(items, tmp_path):
    with pytest.raises(SystemExit, match=f"html has runs=<folder> and out=<file>, not {items[0]}"):
        report.main(["html", *items, f"out={tmp_path / 'x.html'}"])


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "render", lambda runs: "")
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file/x.html", "x.html cannot be written: "),
        (tmp_path, "html has .*, not out=.*, which is a folder"),
        ("", "html has .*, not out= without a name"),
    ):
        with pytest.raises(SystemExit, match=message):
            report.main(["html", f"out={out}"])
    with pytest.raises(SystemExit, match=r"out=x\.html is not known here"):
        report.main(["out=x.html"])
