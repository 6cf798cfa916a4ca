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
