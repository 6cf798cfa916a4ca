"""reproduce.py runs the rows that a study lacks, every repeat, and keeps a record only where it belongs."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import report, reproduce, studies
from scripts.running import process
from tests.plans import composed, plan

# what the record of a finished run has at least
FOUND = {"seed": 0, "final": {}, "best": {}, "folder": "", "num_parameters": 3, "metric": "accuracy"}
FOUND |= {"train": {}, "times": {}, "items_per_second": 1.0}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Run nothing: note the overrides, and return the record that train.py would have left."""
    seen = []

    def fake(overrides, folder, *, alone, gpus=None, stop=None):
        assert alone != ("scale=smoke" in overrides), "one run shows its output, small ones run beside each other"
        seen.append(overrides)
        config, _ = composed(overrides)
        if config.get("k") == 9:
            raise RuntimeError("that run failed")
        return {"overrides": overrides}

    for path in (studies.ROOT / "results").glob("table*/study.yaml"):
        (tmp_path / "results" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "results" / path.parent.name)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr(process, "train", fake)
    return seen


def kept(folder) -> set[str]:
    return {path.relative_to(folder / "results").as_posix() for path in (folder / "results").rglob("*.json")}


def test_every_repeat_of_the_rows_asked_for(ran, tmp_path):
    reproduce.main(["table1", "rows=upg_k5_lam0.5,implicit", "data.root=/data", "repeats=2", "precision=tf32"])
    assert ran == [
        [f"experiment=table1/{row}", "data.root=/data", "precision=tf32", f"seed={seed}"]
        for seed in (0, 1)
        for row in ("upg_k5_lam0.5", "implicit")
    ]
    assert kept(tmp_path) == {f"table1/{row}/seed{i}.json" for row in ("upg_k5_lam0.5", "implicit") for i in (0, 1)}
    record = json.loads((tmp_path / "results/table1/implicit/seed1.json").read_text())
    assert record["overrides"] == ran[3]


def test_what_has_a_record_is_not_run_unless_asked_for(ran, tmp_path, capsys):
    reproduce.main(["table1", "rows=implicit", "repeats=1"])
    reproduce.main(["table1", "rows=implicit", "repeats=2"])
    assert [line[-1] for line in ran] == ["seed=0", "seed=1"]
    reproduce.main(["table1", "rows=implicit", "repeats=2"])
    assert len(ran) == 2 and "nothing is missing in table1; `again`" in capsys.readouterr().err
    reproduce.main(["table1", "rows=implicit", "repeats=2", "again"])
    assert len(ran) == 4
    (tmp_path / "results/table4/cox2_implicit.json").write_text("{}")
    reproduce.main(["table4", "rows=cox2_implicit,cox2_upg_k5_lam0.5", "list"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "table4" in line]
    assert [line[2:4] for line in lines] == [
        ["experiment=table4/cox2_upg_k5_lam0.5", f"data.fold={fold}"] for fold in range(10)
    ]


def test_a_finished_run_that_was_typed_by_groups_is_the_row(ran, tmp_path):
    typed = plan(["model=mdeq_small", "data=imagenet", "grad=upg", "lam=0.6"])
    folder = tmp_path / "runs" / typed.folder.relative_to(typed.root)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(typed.text)
    found = FOUND | {"steps": 7}
    (folder / "record.json").write_text(json.dumps(found | {"label": typed.label}))
    reproduce.main(["table3", "rows=imagenet_upg,cifar10_upg", "repeats=2"])
    assert [(line[0], line[-1]) for line in ran] == [
        ("experiment=table3/cifar10_upg", "seed=0"),
        ("experiment=table3/imagenet_upg", "seed=1"),
        ("experiment=table3/cifar10_upg", "seed=1"),
    ]
    record = json.loads((tmp_path / "results/table3/imagenet_upg/seed0.json").read_text())
    row = "table3/imagenet_upg"
    assert record == found | {"label": row, "experiment": row}
    reproduce.main(["table3", "rows=imagenet_upg", "scale=smoke"])
    assert ran[-1][0] == f"experiment={row}" and ran[-1][-2:] == ["scale=smoke", "seed=0"], "another budget"


def test_a_typed_run_of_other_data_is_not_the_row(ran, tmp_path, monkeypatch, capsys):
    for name, content in (("mine", "abc"), ("copies", "xyz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "digest").write_text(content)
    typed = plan(["data=cifar10", "grad=npg", "model=mdeq_tiny", f"data.root={tmp_path / 'copies'}"])
    folder = tmp_path / "runs" / typed.folder.relative_to(typed.root)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(typed.text)
    found = FOUND | {"label": typed.label, "data_digests": {"train": "xyz"}}
    (folder / "record.json").write_text(json.dumps(found))
    digest = lambda made: {"train": (Path(made.config["data"]["root"]) / "digest").read_text()}  # noqa: E731
    monkeypatch.setattr(process, "build_source", lambda made: SimpleNamespace(digests=lambda: digest(made)))
    row = ["table1", "rows=npg_k5_lam0.5", "repeats=1"]
    reproduce.main([*row, f"data.root={tmp_path / 'mine'}"])
    assert len(ran) == 1 and f"{folder} has its config, but other data" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "results/table1/npg_k5_lam0.5")
    (tmp_path / "mine/digest").write_text("xyz")
    reproduce.main([*row, f"data.root={tmp_path / 'mine'}"])
    assert len(ran) == 1 and kept(tmp_path) == {"table1/npg_k5_lam0.5/seed0.json"}, "the data have moved"


def test_other_budgets_and_other_experiments_have_folders_of_their_own(ran, tmp_path):
    reproduce.main(["table3", "rows=imagenet_upg", "scale=smoke"])
    reproduce.main(["table3", "rows=imagenet_upg", "k=3"])
    assert kept(tmp_path) == {"table3/imagenet_upg@smoke/seed0.json", "table3/imagenet_upg@k=3/seed0.json"}


def test_a_list_of_all_commands_composes_and_runs_nothing(ran, tmp_path, capsys):
    reproduce.main(["table1", "list", "data.root=/my data"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 8 * 6 and not ran and not kept(tmp_path)
    assert said.err.startswith("to run: 48. "), "what they cost"
    words = [shlex.split(line) for line in lines]
    assert all(line[:2] == ["python", "train.py"] and "data.root=/my data" in line for line in words)
    seeds = [composed(line[2:])[0]["seed"] for line in words[::8]]
    assert seeds == list(range(6)), "the first seed of every row comes first"


def test_a_failed_run_ends_it_and_keeps_what_was_there(ran, tmp_path):
    with pytest.raises(SystemExit, match="that run failed"):
        reproduce.main(["table1", "rows=npg_k5_lam0.5,upg_k9_lam0.5_dropout,implicit", "repeats=1"])
    assert len(ran) == 2 and kept(tmp_path) == {"table1/npg_k5_lam0.5/seed0.json"}


def test_scale_cpu_is_another_data_set_that_the_name_of_a_record_leaves_out(ran, tmp_path, capsys):
    reproduce.main(["table1", "rows=implicit,npg_k5_lam0.5", "scale=cpu", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"python train.py experiment=table1/{row} data=cifar10_small scale=cpu seed={seed}"
        for seed in range(3)
        for row in ("implicit", "npg_k5_lam0.5")
    ]
    reproduce.main(["all", "scale=cpu", "list"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 8 * 3
    assert "scale=cpu is no scale of table2, table3, table4\n" in said.err


def test_a_point_of_a_grid_is_in_the_name_of_its_record(ran, tmp_path):
    (tmp_path / "results/grid").mkdir()
    (tmp_path / "results/grid/study.yaml").write_text(
        "title: G\ngrids: {one: {experiments: {UPG: table1/upg_k5_lam0.5, NPG: table1/npg_k5_lam0.5}, "
        "grid: {paper: {k: [1, 3], lam: [0.5]}, cpu: {k: [2]}}, scales: {cpu: [data=digits, repeats=2]}}}\n"
    )
    for path in ("upg_k5_lam0.5", "npg_k5_lam0.5"):
        for point in ("k=1,lam=0.5", "k=3,lam=0.5"):
            folder = tmp_path / "runs/table1" / path / point / "seed0"
            folder.mkdir(parents=True)
            rows = [{"kind": "train", "step": 1}, {"kind": "monitor", "step": 1, "spectral_radius": 0.9}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reproduce.main(["grid", "repeats=1"])
    assert [line[1:] for line in ran] == [[f"k={k}", "lam=0.5", "seed=0"] for k in (1, 1, 3, 3)]
    names = {f"table1/{row}@k={k},lam=0.5" for row in ("upg_k5_lam0.5", "npg_k5_lam0.5") for k in (1, 3)}
    assert kept(tmp_path) == {f"{name}/seed0.json" for name in names}
    for point in studies.points(studies.load("grid")["grids"]["one"], "gpu"):
        found = studies.record_folder(point.experiment, "paper", point.overrides) / "seed0.json"
        assert json.loads(found.read_text())["monitor"] == [{"step": 1, "spectral_radius": 0.9}]


def test_an_override_of_an_axis_chooses_points_of_a_grid(ran, tmp_path, capsys):
    (tmp_path / "results/fig3").mkdir()
    shutil.copy(Path(__file__).parents[2] / "results/fig3/study.yaml", tmp_path / "results/fig3")
    reproduce.main(["fig3", "scale=cpu", "k=5", "lam=1", "list"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [[item for item in line if item.startswith(("k=", "lam="))] for line in lines] == [["k=5", "lam=1.0"]] * 2
    reproduce.main(["fig3", "scale=cpu", "k=1,9", "lam=0.5", "list"])
    assert [line.split("k=")[1][0] for line in capsys.readouterr().out.splitlines()] == ["1", "1", "9", "9"]
    reproduce.main(["fig3", "scale=cpu", "lam=5e-1", "k=1", "list"])
    assert all("lam=0.5" in line for line in capsys.readouterr().out.splitlines())
    for value in ("7", "true"):
        with pytest.raises(
            SystemExit, match=f"fig3: k={value.title()} is no point of the grid; k is one of 1, 3, 5, 9"
        ):
            reproduce.main(["fig3", "scale=cpu", f"k={value}"])


def test_torchrun_is_in_the_command(ran, capsys):
    reproduce.main(["table3", "rows=imagenet_upg", "gpus=8", "list"])
    launch = "torchrun --standalone --nproc-per-node=8 --signals-to-handle=SIGTERM,SIGINT,SIGUSR2"
    line = f"{launch} train.py experiment=table3/imagenet_upg seed=0"
    assert capsys.readouterr().out == line + "\n"


def test_of_all_studies_one_that_fails_does_not_stop_the_others(ran, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "cores", lambda: 1)
    for name in ("table3", "table4"):
        (tmp_path / "results" / name / "study.yaml").unlink()
    study = tmp_path / "results/table2/study.yaml"
    study.write_text(study.read_text().split("measures")[0] + "tables: {one: {rows: [{experiment: chains/one_step}]}}")
    with pytest.raises(SystemExit, match="runs failed in table1: see above"):
        reproduce.main(["all", "repeats=1", "precision=tf32"])
    assert "error: table1: that run failed" in capsys.readouterr().err
    assert ran[-1] == ["experiment=chains/one_step", "precision=tf32", "seed=0"]


def test_of_all_studies_those_that_measure_know_the_scale_alone(ran, tmp_path, capsys):
    for name in ("table1", "table3", "table4"):
        (tmp_path / "results" / name / "study.yaml").unlink()
    reproduce.main(["all", "scale=smoke", "wandb=disabled", "jobs=2", "list"])
    assert capsys.readouterr().out == "python scripts/reproduce.py table2 rows=table scale=smoke\n"


def test_several_studies_are_one_line(ran, tmp_path, capsys):
    for name in ("fig1", "theorems"):
        shutil.copytree(Path(__file__).parents[2] / "results" / name, tmp_path / "results" / name)
    reproduce.main(["fig1", "theorems", "table2", "fig1", "again", "list"])
    said = capsys.readouterr()
    measures = ["fig1 rows=curves", *(f"theorems rows=theorem{i}" for i in (1, 2, 3)), "table2 rows=table"]
    assert said.out.splitlines() == [f"python scripts/reproduce.py {one} again" for one in measures]
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        f"to run of {name}" for name in ("fig1", "theorems", "table2")
    ]
    with pytest.raises(SystemExit, match="leave jobs= and gpus= out"):
        reproduce.main(["fig1", "theorems", "jobs=2"])
    reproduce.main(["fig1", "table1", "repeats=1", "scale=smoke", "again", "list"])
    measured, *trained = capsys.readouterr().out.splitlines()
    assert measured == "python scripts/reproduce.py fig1 rows=curves scale=smoke again" and len(trained) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a study first, one of table1"),
        (["table1", "table3", "rows=implicit"], "rows=implicit belongs to one study: name it alone"),
        (["table2", "table3", "scale=cpu"], "table2 has no scale=cpu; it has paper, smoke"),
        (["table1", "table9"], "'table9' is neither one of list, again"),
        (["table9"], "name a study first"),
        (["table1", "rows=implicit,upg"], "table1 has no row upg; it has implicit, "),
        (["table1", "seed=3"], "seed is set by this script"),
        (["table1", "rows=implicit", "k=3"], "k is not used"),
        (["table1", "rows=implicit", "scale=tiny"], "choose one of cpu, gpu, paper, smoke"),
        (["table1", "jobs=0"], "jobs=0 must be an integer >= 1"),
        (["table1", "folds=3"], "table1 has no folds"),
        (["table3", "scale=cpu"], "table3 has no scale=cpu; it has paper, gpu, smoke"),
        (["table1", "gpus=8", "jobs=2"], "gpus=8 takes all of them .* leave jobs= out"),
        (["all", "rows=implicit"], "rows=implicit belongs to one study"),
        (["table1", "deadline=0"], "deadline=0 must be an integer >= 1"),
        (["table1", "--list"], "no flags here but --help"),
    ],
)
def test_mistakes_are_named_before_anything_runs(ran, arguments, message):
    with pytest.raises(SystemExit, match=f"(?i){message}"):
        reproduce.main(arguments)
    assert not ran


def test_a_study_of_another_kind_says_where_to_look():
    with pytest.raises(SystemExit, match=r"benchmark/cpu is no study of training runs, results/README\.md has its"):
        reproduce.main(["benchmark/cpu"])


ROW = "{name: a row, experiment: table1/implicit, paper: '--'}"
SHORT = "{experiment: table1/implicit}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no keys: it needs a title"),
        ("- title", "has no keys: it needs a title"),
        ("title: [", "is no YAML"),
        ("tables: {}", "the study lacks title"),
        ("{title: A, tables: {one: }}", "tables.one lacks rows"),
        ("{title: A, measures: {one: {settings: {}}}}", "measures.one lacks function"),
        ("{title: A, grids: {one: {grid: {}}}}", "grids.one lacks experiments"),
        ("{title: A, tables: {one: {title: B, rows: [{name: a}]}}}", "row 0 of tables.one lacks experiment"),
    ],
)
@pytest.mark.parametrize("command", [reproduce.main, report.main])
def test_a_wrong_definition_is_named(command, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "results" / "mine").mkdir(parents=True)
    (tmp_path / "results" / "mine" / "study.yaml").write_text(text)
    with pytest.raises(SystemExit, match=rf"error: .*study\.yaml:? {message}"):
        command(["mine"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"tables: {{one: {{rows: [{ROW}]}}}}", "tables.one lacks title"),
        (f"tables: {{one: {{title: B, rows: [{SHORT}]}}}}", "row 0 of tables.one lacks name, paper"),
        (f"tables: {{one: {{title: B, rows: [{ROW}]}}}}", "tables.one lacks metric, split, std"),
        ("grids: {one: {experiments: {}, grid: {paper: {}}}}", "grids.one lacks title, function"),
    ],
)
def test_what_a_page_needs_is_named(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "results" / "mine").mkdir(parents=True)
    (tmp_path / "results" / "mine" / "study.yaml").write_text(f"title: A\n{text}\n")
    with pytest.raises(SystemExit, match=rf"error: .*study\.yaml: {message}"):
        report.main(["mine"])
