"""Figures 2 and 3 are drawn from the records of their grids, of one scale, and labelled where it is not the paper's."""

import pytest

from scripts import report, studies
from scripts.reporting.grids import accuracy, cosine
from scripts.reporting.grids.runs import runs_of
from scripts.running import measuring

ABOUT = {"commit": "0123456789", "dirty": False, "device": "card", "precision": "fp32", "gradient_precision": None}
ABOUT |= {"steps": 100}
FIG2 = {"title": "F2", "experiments": {"Implicit": "f/implicit"}, "grid": {"paper": {}}, "function": "cosine"}
FIG3 = {
    **{"title": "F3", "function": "accuracy", "metric": "accuracy", "split": "test"},
    "experiments": {"UPG": "f/upg", "NPG": "f/npg"},
    "grid": {"paper": {"k": [1, 3, 5], "lam": [0.5]}, "cpu": {"k": [1, 3], "lam": [0.5, 1.0]}},
}


@pytest.fixture
def keep(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda canvas, path, **_: drawn.append((canvas, path)))
    drawn.clear()

    def write(name: str, **content) -> None:
        measuring.write({**ABOUT, **content}, tmp_path / "results" / name / "seed0.json")

    return write


drawn: list = []


def cosines(values: dict[int, tuple[float, float]]) -> list[dict]:
    """Return what a monitor keeps: step, cosine of UPG and NPG."""
    return [
        {"step": step, "gradient_cosine": 0.999, "gradient_norm_ratio": 1.0, "pretraining": float(step <= 5)}
        | {"exact_residual": step * 1e-4, "exact_unsolved": step / 500}
        | {f"gradient_cosine/{name}": value for name, value in zip(("upg", "npg"), pair, strict=True)}
        | {f"gradient_norm_ratio/{name}": 0.5 for name in ("upg", "npg")}
        for step, pair in values.items()
    ]


def trained(best: float, last: float, radii: list[float]) -> dict:
    monitor = [{"step": 10 * (i + 1), "damped_spectral_radius": value} for i, value in enumerate(radii)]
    scores = {"best": {"test": {"accuracy": best}}, "final": {"test": {"accuracy": last}}}
    return {**scores, "monitor": monitor, "choices": {"data": "cifar10_small"}}


def test_the_table_of_figure_2_has_median_and_percentiles_of_every_tenth(keep):
    first = {step: (step / 10, 0.9) for step in range(1, 11)}
    keep("f/implicit", monitor=cosines({**first, 95: (0.25, 0.5)}))
    text = cosine.page(FIG2, runs_of(FIG2))
    heads = "| steps | batches | cosine of NPG | cosine of UPG | norm ratio of NPG | norm ratio of UPG |"
    assert f"{heads} adjoint residual | images above 0.01 |" in text
    # UPG in steps 1 to 10: 0.1, ..., 1.0, whose inclusive tenths are 0.19 and 0.91
    one = "0.500 [0.500, 0.500]"
    assert f"| 1 to 10 | 10 | 0.900 [0.900, 0.900] | 0.550 [0.190, 0.910] | {one} | {one} | 5.5e-04 | 1.1 % |" in text
    assert f"| 91 to 100 | 1 | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | {one} | {one} | 9.5e-03 | 19.0 % |" in text
    assert "Up to step 5 the run itself trains by unrolling, its pretraining." in text
    assert text.startswith("# F2\n") and "Budget of the paper: 100 steps, 1 runs on card. Commit 01234567" in text


@pytest.mark.parametrize(("nulls", "shown"), [([5], "6.5e-04"), ([1, 2, 3, 4, 5, 6], "inf")])
def test_an_adjoint_residual_that_was_not_finite_is_the_largest(keep, nulls, shown):
    """A diverging run has null there."""
    monitor = cosines({step: (0.5, 0.9) for step in range(1, 11)})
    for step in nulls:
        monitor[step - 1]["exact_residual"] = None
    keep("f/implicit", monitor=monitor)
    assert f"| {shown} | 1.1 % |" in cosine.page(FIG2, runs_of(FIG2))


def test_every_measurement_of_figure_2_is_drawn(keep, tmp_path):
    keep("f/implicit@cpu", monitor=cosines({10: (0.7, 0.9), 20: (0.6, 0.8)}), choices={"data": "cifar10_small"})
    cosine.draw(FIG2, runs_of(FIG2), tmp_path / "one.png")
    assert [path.name for _, path in drawn] == ["one.png", "one.pdf"]
    canvas = drawn[0][0]
    along, spread = canvas.axes
    points = [
        sorted(map(tuple, part.get_offsets().tolist())) for part in along.collections if len(part.get_offsets()) == 2
    ]
    assert points == [[(10, 0.9), (20, 0.8)], [(10, 0.7), (20, 0.6)]]  # NPG, UPG
    assert canvas.get_suptitle().endswith(" [cpu, cifar10_small]")
    assert sum(bar.get_width() for bar in spread.patches) == 4


def test_the_table_of_figure_3_has_a_cell_per_point(keep):
    keep("f/upg@cpu@k=1,lam=0.5", **trained(60, 59, [0.5] * 19 + [0.9, 0.7]))
    keep("f/npg@cpu@k=3,lam=1.0", **trained(50, 40, [1.5]))
    text = accuracy.page(FIG3, runs_of(FIG3))
    assert text.startswith("# F3 [cpu, cifar10_small]\n")
    best, last, radius = (part.splitlines() for part in text.split("| estimator |")[1:])
    assert "| UPG | 0.5 | 60.00 (1) | -- |" in best and "| NPG | 1.0 | -- | 50.00 (1) |" in best
    assert "| UPG | 0.5 | 59.00 (1) | -- |" in last and "| NPG | 1.0 | -- | 40.00 (1) |" in last
    # the last two of 21 measurements
    assert "| UPG | 0.5 | 0.800 | -- |" in radius and "| NPG | 1.0 | -- | 1.500 |" in radius
    assert (
        "images of the batch, and over the last tenth of a run's measurements, at least one (1 of 1, 2 of 21). " in text
    )


def test_runs_of_two_scales_are_in_no_one_figure(keep):
    keep("f/upg@cpu@k=1,lam=0.5", **trained(60, 59, [0.5]))
    keep("f/upg@k=5,lam=0.5", **trained(90, 89, [0.5]))
    text = accuracy.page(FIG3, runs_of(FIG3))
    assert "| UPG | 0.5 | -- | -- | 90.00 (1) |" in text and "60.00" not in text and text.startswith("# F3\n")


def test_the_lines_of_figure_3_are_the_records(keep, tmp_path):
    for k, best in ((1, 50), (3, 70)):
        keep(f"f/upg@cpu@k={k},lam=0.5", **trained(best, 0, [0.5, 0.6]))
        keep(f"f/npg@cpu@k={k},lam=0.5", **trained(best - 5, 0, [0.8, 1.1]))
    accuracy.draw(FIG3, runs_of(FIG3), tmp_path / "one.png")
    upg, both, *radii = drawn[0][0].axes
    assert [(line.get_label(), line.get_xydata().tolist()) for line in upg.lines] == [("lam = 0.5", [[1, 50], [3, 70]])]
    assert {line.get_label(): line.get_ydata().tolist() for line in both.lines} == {
        "UPG, lam = 0.5": [50, 70],
        "NPG, lam = 0.5": [45, 65],
    }
    lines = [[list(line.get_ydata()) for line in panel.lines] for panel in radii]
    # and the line at 1, where the series ends to converge
    assert lines == [[[0.5, 0.6], [0.5, 0.6], [1, 1]], [[0.8, 1.1], [0.8, 1.1], [1, 1]]]


def test_measurements_that_were_not_finite_are_left_out_with_their_steps(keep, tmp_path):
    keep("f/upg@cpu@k=1,lam=0.5", **trained(float("nan"), 0, [0.5, float("nan"), 0.7]))
    keep("f/upg@cpu@k=3,lam=0.5", **trained(70, float("nan"), [0.8, 0.9]))
    accuracy.draw(FIG3, runs_of(FIG3), tmp_path / "one.png")
    upg, _, radius, _ = drawn[0][0].axes
    assert [line.get_xydata().tolist() for line in upg.lines] == [[[3, 70]]]
    assert [line.get_xydata().tolist() for line in radius.lines][:2] == [[[10, 0.5], [30, 0.7]], [[10, 0.8], [20, 0.9]]]
    assert accuracy.page(FIG3, runs_of(FIG3)).count("| not finite (1 of 1) |") == 2


def test_the_radius_over_runs_is_a_mean_where_all_of_them_have_one():
    runs = [trained(0, 0, values) for values in ([0.5, None, 0.75, 0.5], [1.0, 0.5, 0.25])]
    assert accuracy._mean_radius(runs) == {10: 0.75, 30: 0.5}


def test_nothing_is_drawn_that_was_not_run(keep, tmp_path):
    folder = tmp_path / "results" / "f"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(f"title: F\ngrids: {{two: {FIG2}, three: {FIG3}}}\n")
    report.main(["f"])
    assert not drawn
    assert "Nothing has been run yet." in (folder / "two.md").read_text()
    assert "| UPG | 0.5 | -- | -- | -- |" in (folder / "three.md").read_text()
