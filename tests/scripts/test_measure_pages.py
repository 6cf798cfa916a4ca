"""The pages and figures of measures show what their records say, and nothing else."""

import copy
import json

import pytest

from scripts import report, studies
from scripts.reporting import claims
from scripts.reporting.measures import ascent, complexity, convergence, cosine, descent, reasoner

ABOUT = {
    "command": "python scripts/reproduce.py study rows=one",
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": "x86_64 CPU, 1 threads",
    "versions": {"torch": "2.0"},
    "finished": "2021-12-06T00:00:00+00:00",
    "cpu_seconds": 12.3,
    "claims": [
        {"claim": "|a| is small: the largest", "measured": 0.25, "needed": "< 1", "holds": True},
        {"claim": "b", "measured": None, "needed": "> 0", "holds": False},
    ],
}
COSINE = ABOUT | {
    "settings": {
        "seeds": [0, 1],
        "activations": ["relu"],
        "lams": [0.5, 1.0],
        "spectral_norm": 0.9,
        "dim": 4,
        "batch": 2,
    },
    "checks": [{"steps": 30}, {"steps": 40}],
    "rows": [
        {"activation": "relu", "estimator": name, "lam": lam, "seed": seed, "cosine": [lam / 2, lam / 2 + seed / 10]}
        for name in ("NPG", "UPG")
        for lam in (0.5, 1.0)
        for seed in (0, 1)
    ],
}
ASCENT = ABOUT | {
    "settings": {"dim": 4, "lams": [0.5]},
    "counts": {"cases": 6, "condition holds": 3},
    "rows": [
        {"family": "matrix", "k": 1, "lam": 0.5, "ratio": [0.5, 2.0, 1e9], "least": [0.9, 0.1, -0.2]},
        {"family": "UPG", "k": 3, "lam": 0.5, "ratio": [0.5, 0.6, 0.7], "least": [1.0, 1.0, 1.0]},
    ],
}
CONVERGENCE = ABOUT | {
    "settings": {"seeds": [0], "dim": 4, "spectral_norm": 0.9, "lams": [0.5], "ks": [1, 2], "start_steps": 3},
    "rows": [
        {"estimator": name, "start": start, "lam": 0.5, "seed": 0, "error": [0.5, 0.0], "rate": 0.61}
        for name in ("NPG", "UPG")
        for start in ("exact", "inexact")
    ],
    "damped": [{"lam": 0.5, "seed": 0, "norm": 0.8, "radius": 0.6}],
    "conditioning": [{"lam": 0.5, "mean": [1.0, 1.5]}],
    "conditioning_limit": 2.0,
}
DESCENT = ABOUT | {
    "settings": {"seeds": [0], "steps": 100, "ks": [1], "lam": 0.5},
    "n": [1, 10, 100],
    "rows": [
        {"k": None, "seed": 0, "eps": 1e-12, "radius": 0.1, "mean": [1.0, 0.5, 0.25]},
        {"k": 1, "seed": 0, "eps": 0.5, "radius": 0.2, "mean": [1.0, 0.6, 0.375]},
    ],
}
FIT = {"ms": 10.0, "ms_per_step": 2.5, "bytes": 3e6, "bytes_per_step": 1e6}
COMPLEXITY = ABOUT | {
    "settings": {
        **{"model": ["model=m", "batch=2"], "repeats": 3, "solver_steps": 22, "adjoint_steps": 21},
        **{"pretraining_steps": 10, "protocol_k": 5},
    },
    "rows": [
        {"method": method, "steps": n, "ms": [2.0, 9.0, 3.0], "bytes": 5e6, "evals": n, "vjps": 0}
        for method in complexity.PAPER
        for n in (1, 2)
    ],
    "fits": {method: FIT for method in complexity.PAPER},
    "protocols": {"pretraining": 9e6, "implicit": 7e6, "implicit_protocol": 9e6, "upg": 6e6, "npg": 4e6},
}
REASONER = ABOUT | {
    "settings": {"experiment": "reasoners/one", "cycles": 3, "implicit_steps": 60},
    "rows": [
        {
            **{"weights": name, "supervision_step": step, "spectral_radius": 3.456, "residual": 2.71e-16},
            **{"cosine": {"last": -0.125, "implicit": 0.999}, "norm_ratio": {"last": 0.0812, "implicit": 1.0}},
        }
        for name in ("random", "shipped")
        for step in (1, 4)
    ],
}
PAGES = [
    (cosine, COSINE, ["| NPG lam=0.5 | 0.2500 ± 0.0000 | 0.3000 ± 0.0707 |", "took 30 to 40 steps"]),
    (ascent, ASCENT, ["| Neumann series of random matrices, lam=0.5 | 33% |  |", "cases: 6; condition holds: 3"]),
    (convergence, CONVERGENCE, ["| 0.5 | 0.610 | 0.600 | 0.800 |", "| 0.5 | 1.00 | 1.50 |", "is 2.00 on average"]),
    (
        descent,
        DESCENT,
        ["| NPG k=1 lam=0.5 | 0.5 | 0.2 | 0.375 |", "| implicit differentiation | 1e-12 | 0.1 | 0.25 |"],
    ),
    (
        complexity,
        COMPLEXITY,
        [
            "| UPG | O(k) | 10 + 2.5 n ms | O(k) | 3.0 + 1.00 n MB | O(k) | 6.0 MB |",
            "| Implicit, Broyden | O(K) | 10 + 2.5 n ms | O(1) | 3.0 + 1.00 n MB | O(k) | 9.0 MB |",
            "| NPG | 2 | 3 | 5.0 | 2 | 0 |",
            "in CPU time",
        ],
    ),
    (
        reasoner,
        REASONER,
        [
            "| shipped, 4 | -0.12 | 1.00 | 3.5 | 2.7e-16 |",
            "| random, 1 | 0.081 | 1 |",
            "backward by 60 Broyden steps",
        ],
    ),
]


@pytest.mark.parametrize(("drawing", "record", "lines"), PAGES)
def test_a_page_shows_the_numbers_and_verdicts_of_its_record(drawing, record, lines):
    text = drawing.page(record)
    for line in lines:
        assert line in text, text
    assert "| \\|a\\| is small: the largest | 0.25 | < 1 | yes |\n| b | -- | > 0 | **no** |" in text
    assert "12 CPU seconds on one thread (x86_64 CPU), 2021-12-06, commit 01234567, torch 2.0." in text


def test_a_cosine_of_a_reasoner_that_is_not_finite_is_shown(tmp_path):
    rows = [{**row, "cosine": {"last": None, "implicit": 0.999}} for row in REASONER["rows"]]
    assert "| random, 1 | not finite | 1.00 | 3.5 |" in reasoner.page(REASONER | {"rows": rows})
    reasoner.draw(REASONER | {"rows": rows}, tmp_path / "one.png")


def test_a_record_of_changed_code_says_so():
    assert "commit 01234567*, " in claims.source(copy.deepcopy(ASCENT) | {"dirty": True})
    long = claims.source(ASCENT | {"settings": {"seeds": list(range(9)), "lams": [0.5, 1.5, 2.5, 3.5, 4.5], "dim": 3}})
    assert long.startswith("Settings: seeds 0 ... 8, lams (0.5, 1.5, 2.5, 3.5, 4.5), dim 3.")


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are drawn, and write none."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda canvas, path, **_: found.append(canvas))
    return found


@pytest.mark.parametrize(("drawing", "record"), [(drawing, record) for drawing, record, _ in PAGES])
def test_every_figure_is_drawn(drawing, record, drawn, tmp_path):
    drawing.draw(record, tmp_path / "one.png")
    canvas, same = drawn  # a PNG and a PDF
    assert canvas is same
    assert all(axis.get_xlabel() or axis.get_title() for axis in canvas.axes)
    assert all(axis.lines or axis.collections for axis in canvas.axes), "an empty panel"


def test_the_lines_of_figure_1_are_means_with_a_band_of_one_std(drawn, tmp_path):
    cosine.draw(COSINE, tmp_path / "one.png")
    npg, upg = drawn[0].axes
    assert [line.get_label() for line in npg.lines] == ["lam = 0.5", "lam = 1"]
    assert npg.lines[0].get_xdata().tolist() == [1, 2]
    assert npg.lines[0].get_ydata().tolist() == pytest.approx([0.25, 0.30])
    edges = npg.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.30 - 0.0707107, 0.30 + 0.0707107))
    assert npg.lines[0].get_color() == upg.lines[0].get_color() != npg.lines[1].get_color()


def test_points_outside_the_window_lie_on_its_edge(drawn, tmp_path):
    ascent.draw(ASCENT, tmp_path / "one.png")
    points = drawn[0].axes[0].collections[0].get_offsets().tolist()
    assert points == [[0.5, 0.9], [2.0, 0.1], [ascent.HIGH, -0.2]]


def test_a_study_shows_the_paper_s_scale_alone(tmp_path, monkeypatch):
    folder = tmp_path / "results" / "study"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(
        "title: A study\nmeasures: {one: {function: descent}, two: {function: ascent}}\n"
    )
    (folder / "one.json").write_text(json.dumps(DESCENT))
    (folder / "two@smoke.json").write_text(json.dumps(ASCENT))
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    report.main(["study"])
    assert {path.name for path in folder.iterdir()} == {
        *("study.yaml", "one.json", "two@smoke.json"),
        *("one.md", "one.png", "one.pdf", "one.tex", "one-1.csv", "one-2.csv"),
    }
    assert (
        "| study | A study | [one](study/one.md) | `python scripts/reproduce.py study` |"
        in (tmp_path / "results" / "README.md").read_text()
    )
