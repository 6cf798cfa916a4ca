"""The report page in a browser without a screen: it draws, filters and says no error, wide and narrow, light and dark.

Skipped without playwright (`pip install playwright`) or without Chromium (`apt-get install chromium`).
"""

import shutil

import pytest

from scripts import report
from tests.tiny_run import tiny_run

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("plotly")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for grad, k in (("upg", 1), ("upg", 2), ("npg", 2)):
        tiny_run(folder / "runs", "steps=3", f"grad={grad}", f"k={k}", "subset=8", "test_subset=4")
    report.main(["html", f"runs={folder / 'runs'}", f"out={folder / 'page.html'}"])
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, address):
    """Return a function that opens the page; at the end no error may have been said, and nothing asked of a network."""
    said, pages = [], []

    def open_page(width=1366, height=768, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url))
        page.goto(address)
        page.wait_for_selector("html[data-ready=yes]", timeout=120_000)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_it_fits_the_screen_and_its_colours_the_scheme(opened, width, height, scheme):
    page = opened(width, height, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in ground[4:-1].split(",")) > 384) == (scheme == "light")
    for chart in ("curves", "bars", "front"):
        assert page.locator(f"#{chart} svg.main-svg").count() > 0
        assert page.locator(f"#{chart}").get_attribute("aria-label")


def test_filters_choose_runs_curves_and_maps(opened):
    page = opened()
    rows = page.locator("#table tbody tr")
    every = rows.count()
    page.select_option("[name=data]", "digits")
    assert rows.count() == 3 and page.locator("#count").text_content() == f"3 of {every} records"
    page.select_option("[name=grad]", "upg")
    assert rows.count() == 2 and page.locator("#maps figure").count() == 1
    page.select_option("#curve", label="train/residual")
    lines = page.locator("#curves-legend li").all_text_contents()
    assert [line.split(" ", 1)[1] for line in lines] == ["k=1 lam=0.5 seed 0", "k=2 lam=0.5 seed 0"]
    assert page.locator("#curves-caption summary").text_content() == "From 2 records"
    page.select_option("[name=k]", "2")
    assert rows.count() == 1 and page.locator("#maps figure").count() == 0
    record = rows.first.get_attribute("data-record")
    assert page.locator("#curves-caption").text_content() == f"From {record.replace('record.json', 'metrics.jsonl')}"
    page.get_by_role("button", name="Show all").click()
    assert rows.count() == every


def test_maps_and_names_tell_trainings_apart(opened):
    """Of one k and lam, two learning rates and a second seed of the first one; and the same run in a second folder."""
    page = opened()
    page.evaluate(
        """() => {
          const made = (record, others, k, value, training) => ({ ...payload.runs[0], model: "m", record, others, k,
            lam: "0.5", training, label: "m", numbers: { best: { value }, seed: { value: training % 10 } } });
          const fast = ["optimizer.lr=0.1", "x=1"], slow = ["optimizer.lr=0.01", "x=1"];
          window.made = [made("a", fast, "1", 10, 10), made("b", fast, "1", 20, 11), made("c", fast, "1", 20, 11),
            made("d", fast, "2", 40, 20), made("e", slow, "1", 70, 30), made("f", slow, "3", 80, 40)];
          showMaps(window.made);
        }"""
    )
    captions = page.locator("#maps figcaption").all_text_contents()
    assert [caption.split(": ")[0].split(", ")[-1] for caption in captions] == ["optimizer.lr=0.1", "optimizer.lr=0.01"]
    assert captions[0].endswith("best, means over seeds (3 runs in all)"), "of the four records two are of one run"
    assert page.evaluate("byId('map-1').data[0].z") == [[15, 40]] and page.evaluate("byId('map-2').data[0].x") == [
        "1",
        "3",
    ]
    names = page.evaluate("lineNames(made.map((run) => ({ ...run, run: run.record })))")
    assert names[0] == "m k=1 lam=0.5 seed 0 optimizer.lr=0.1" and names[4].endswith("seed 0 optimizer.lr=0.01")
    assert names[3] == "m k=2 lam=0.5 seed 0", "what tells no runs apart is not said"
    page.evaluate("showMaps(made.slice(0, 1))")
    assert page.locator("#maps").text_content() == "No map: it needs runs that have this value at several k or lam."


def test_numbers_are_sorted_as_numbers(opened):
    found = opened().evaluate("unique(['0.1', '10', '--', '1', '0.05', '9', '0.5', '0.25', '1e-3'])")
    assert found == ["--", "1e-3", "0.05", "0.1", "0.25", "0.5", "1", "9", "10"]


def test_on_paper_nothing_is_cut(opened):
    page = opened()
    page.emulate_media(media="print")
    cut = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollHeight > one.clientHeight + 1).length"
    assert page.evaluate(cut) == 0
    assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")


def test_it_is_used_by_keyboard_alone(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("[name=scale]").focus()
    page.keyboard.press("s")  # smoke
    page.keyboard.press("Enter")
    scales = page.locator("#table tbody tr td:nth-child(7)").all_text_contents()
    assert scales and set(scales) == {"smoke"}


def test_a_screen_reader_finds_names(opened):
    page = opened()
    for select in page.locator("select").all():
        assert select.evaluate("one => one.labels.length") == 1
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    own = [name for name in ids if not name.startswith(("clip", "legend"))]
    assert len(set(own)) == len(own)
    assert page.get_by_role("main").count() == 1 and page.get_by_role("heading", level=1).count() == 1
