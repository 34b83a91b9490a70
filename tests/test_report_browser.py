"""The report in a real browser: Chromium without a window, driven by the mouse and the keyboard."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_data import columns, write_scores
from report_hands import (
    TRACES,
    change,
    contrast,
    drawn,
    js,
    move,
    pixel,
    prefer,
    search,
    text,
    width,
)

from bench.browser import chromium, missing, opened, requests, until
from fastfi.report import write_report

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")

HOSTILE = "</script><b>1</b>&amp;'\""


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def driver(session: Any) -> Iterator[Any]:
    """The browser as it comes, whatever the test before has done."""
    session.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    prefer(session, "light")
    session.get("about:blank")
    for log in ("browser", "performance"):
        session.get_log(log)
    yield session
    assert [e["message"] for e in session.get_log("browser")] == []


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """Few samples, whose FI grows with the row: no point hides another one. Sample 2 is infinite,
    sample 5 zero, sample 7 has no score, 9 and 11 are misclassified."""
    found = columns(40, classes=4, wrong=0.0)
    found["label"] = np.arange(40) % 4
    found["predicted"] = found["label"].copy()
    found["predicted"][[9, 11]] = 0
    found["fi"] = 10.0 ** np.linspace(-6, 2, 40)
    found["fi"][2], found["fi"][5] = np.inf, 0.0
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: Any, values: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("one")
    names = ["zero", "<b>one</b>", "two", "three"]
    scores = write_scores(folder / "scores", values, class_names=names, errors={7: "broken"})
    np.savez(folder / "images.npz", x=np.zeros((40, 6, 6), np.uint8))
    return write_report(scores, folder / "r.html", images=folder / "images.npz", top=4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("two")
    names = [f"{head}fi:{block}" for head in ("", "predicted_") for block in ("first", "second")]
    for set_, n in (("train", 300), ("test", 90)):
        write_scores(folder / set_, columns(n, seed=n, classes=3, names=names))
    return write_report(folder / "train", folder / "r.html", folder / "test")


def test_opens_without_errors_or_requests(driver: Any, page: Path) -> None:
    opened(driver, page)
    asked = [a for a in requests(driver) if not a.startswith(("data:", "blob:"))]
    assert asked == [page.resolve().as_uri()]
    assert js(driver, "document.title") == "FI of scores"
    assert js(driver, "[...document.querySelectorAll('.modebar-btn')].map((b) => b.ariaLabel)")
    assert not js(driver, "document.querySelector('[aria-label*=\"hare\"], .modebar-btn--logo')")


def test_the_policy_forbids_requests(driver: Any, page: Path) -> None:
    opened(driver, page)
    failed = driver.execute_async_script(
        "const done = arguments[0];"
        "fetch('https://example.com').then(() => done('sent'), () => done('refused'))"
    )
    assert failed == "refused"
    log = [entry["message"] for entry in driver.get_log("browser")]
    assert log and all("Content Security Policy" in message for message in log)


def test_the_points_are_those_of_the_scores(driver: Any, page: Path, values: Any) -> None:
    opened(driver, page)
    points = drawn(driver)
    assert len(points) == 39  # one has no score
    heights = {int(label.split("<br>")[0].removeprefix("id ")): y for _, y, label in points}
    plain = [row for row in range(40) if row not in (2, 5, 7)]
    np.testing.assert_allclose([heights[i] for i in plain], values["fi"][plain], rtol=1e-6)
    low, high = min(heights[i] for i in plain), max(heights[i] for i in plain)
    assert heights[2] > high and heights[5] < low
    low, high = js(driver, "document.getElementById('manhattan').layout.yaxis.range")
    assert 10**low < heights[5] and heights[2] < 10**high
    shown = js(
        driver, "[...document.querySelectorAll('#manhattan .annotation')].map((a) => a.textContent)"
    )
    assert {"FI = 0", "FI infinite: P underflows"} == set(shown)
    assert "at the edges" in text(driver, "edges")
    wrong = js(
        driver, f"{TRACES}.filter((t) => t.name.includes('misclassified')).flatMap((t) => t.text)"
    )
    assert sorted(label.split("<br>")[0] for label in wrong) == ["id 11", "id 9"]
    by_class = sorted((x, label) for x, _, label in points)
    classes = [label.split("true class ")[1].split("<br>")[0] for _, label in by_class]
    assert classes == sorted(classes, key=["zero", "&lt;b&gt;one&lt;/b&gt;", "two", "three"].index)


def test_the_points_are_painted(driver: Any, page: Path) -> None:
    opened(driver, page)
    source = driver.execute_async_script(
        "Plotly.toImage('manhattan', {format: 'png', width: 900, height: 460}).then(arguments[0])"
    )
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
    pixels = np.asarray(image).astype(int)
    for colour in ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)):
        # at an opacity of 0.75, on nothing, that is black or white
        near = np.abs(pixels - np.array(colour)).max(-1) < 80
        assert near.sum() > 50, colour


@pytest.mark.parametrize("row", [0, 2, 5, 9, 39])
def test_hover_tells_the_sample(driver: Any, page: Path, values: Any, row: int) -> None:
    opened(driver, page)
    move(driver, pixel(driver, f"id {row}<"))
    until(driver, "document.querySelector('#manhattan .hoverlayer .hovertext') !== null", 10)
    said = js(driver, "document.querySelector('#manhattan .hoverlayer').textContent")
    assert said.startswith(f"id {row}true class ")
    expected = {2: "FI ∞", 5: "FI 0", 0: "FI 1e-6", 39: "FI 100"}.get(row)
    assert expected is None or said.endswith(expected)
    if row == 9:
        assert "true class <b>one</b>predicted zero" in said  # markup is text


def test_filters(driver: Any, page: Path) -> None:
    opened(driver, page)
    assert text(driver, "status").startswith("39 of 40 samples")
    change(driver, "class", "three")
    assert {label.split("<br>")[1] for *_, label in drawn(driver)} == {"true class three"}
    assert text(driver, "status").startswith("9 of 40 samples")  # one of its ten has no score
    driver.find_element("id", "wrong").click()
    assert [label.split("<br>")[0] for *_, label in drawn(driver)] == ["id 11"]
    driver.find_element("css selector", "#filter button[type=reset]").click()
    until(driver, "document.getElementById('status').textContent.startsWith('39 of 40')", 5)
    field = driver.find_element("id", "threshold")
    field.send_keys("1")
    # 10 ** linspace(-6, 2, 40) >= 1: rows 30 to 39, and the infinite one
    until(driver, "document.getElementById('status').textContent.startsWith('11 of 40')", 5)
    assert js(driver, "document.querySelectorAll('#top tbody tr').length") == 10
    driver.find_element("id", "more").click()
    assert js(driver, "document.querySelectorAll('#top tbody tr').length") == 11
    assert not driver.find_element("id", "more").is_displayed()
    field.send_keys("x")
    until(driver, "document.getElementById('threshold').ariaInvalid === 'true'", 5)
    assert "expected a number" in text(driver, "status") and len(drawn(driver)) == 39
    change(driver, "grouping", "predicted class")
    ticks = js(driver, "document.getElementById('manhattan').layout.xaxis.ticktext")
    assert ticks == ["zero", "&lt;b&gt;one&lt;/b&gt;", "two", "three"]
    assert (
        js(driver, "document.getElementById('manhattan').layout.xaxis.title.text")
        == "predicted class"
    )


def test_search(driver: Any, page: Path, values: Any) -> None:
    opened(driver, page)
    assert search(driver, "11") == "11: FI 0.0001805, predicted zero."
    assert js(
        driver, "[...document.querySelectorAll('#sample tbody tr > *')].map((c) => c.textContent)"
    )[:4] == ["11", "three", "zero", "0.0001805"]
    shapes = js(driver, "document.getElementById('manhattan').layout.shapes")
    rings = [s for s in shapes if s["type"] == "path"]
    assert len(rings) == 1 and rings[0]["yanchor"] == pytest.approx(values["fi"][11], rel=1e-6)
    assert search(driver, "7") == "7 has no score: broken."
    unknown = search(driver, "400")
    assert unknown == "No sample has the id “400”. The first is “0”, the last “39”."
    assert not driver.find_element("id", "sample").is_displayed()
    assert js(driver, "document.getElementById('found').getAttribute('role')") == "status"
    driver.find_element("id", "wrong").click()
    assert "The filter leaves it out" in search(driver, "12")
    driver.find_element("id", "query").send_keys("\b" * 3 + "9")  # without Enter
    until(driver, "document.getElementById('found').textContent.startsWith('9: FI')", 5)
    driver.find_element("id", "clear").click()
    assert text(driver, "found") == ""


def test_search_takes_any_text(driver: Any, tmp_path: Path) -> None:
    values = columns(3, classes=3)
    values["id"] = [HOSTILE, "a/b c.png", "猫.png"]
    scores = write_scores(tmp_path / "scores", values, class_names=[HOSTILE] * 3)
    opened(driver, write_report(scores, tmp_path / "r.html", title=HOSTILE))
    for row, identity in enumerate(values["id"]):
        assert search(driver, identity).startswith(f"{identity}: FI ")
        assert js(driver, "document.querySelector('#sample th[scope=row]').textContent") == identity
        said = js(
            driver, "[...document.querySelectorAll('#manhattan .annotation')].pop().textContent"
        )
        assert said == identity, row
    assert js(driver, "document.title") == HOSTILE
    assert not js(driver, "document.querySelector('main b, header b')")


def test_click_on_a_point_and_on_an_image(driver: Any, page: Path) -> None:
    opened(driver, page)
    move(driver, pixel(driver, "id 20<"), click=True)
    until(driver, "document.getElementById('found').textContent.startsWith('20: FI')", 10)
    button = driver.find_element("css selector", "#gallery button")
    assert button.get_attribute("data-row") == "2"  # infinite
    button.click()
    assert text(driver, "found").startswith("2: FI ∞")
    assert button.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(driver: Any, page: Path, scheme: str) -> None:
    prefer(driver, scheme)
    opened(driver, page)
    search(driver, "11")
    other = {"light": "dark", "dark": "light"}[scheme]
    colours = []
    for theme in (scheme, other):
        assert js(driver, "document.documentElement.dataset.theme") == theme
        for selector in ("body", ".note", "#sample .wrong", "#top button", "caption", ".under"):
            assert contrast(driver, selector) >= 4.5, (theme, selector)
        plots = ("manhattan", "histogram", "ecdf")
        inks = [js(driver, f"document.getElementById('{p}').layout.font.color") for p in plots]
        assert len(set(inks)) == 1
        trace = js(driver, f"{TRACES}[0].marker.color")
        colours.append((inks[0], trace))
        driver.find_element("id", "theme").click()
    assert colours[0] != colours[1] and colours[0][1] != colours[1][1]


def test_keyboard(driver: Any, page: Path) -> None:
    opened(driver, page)
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    wanted = js(
        driver,
        "[...document.querySelectorAll('button, main select, main input, summary')].filter("
        "(e) => e.checkVisibility()).map((e, i) => e.dataset.tested = String(i))",
    )
    reached: set[str] = set()
    for step in range(3 * len(wanted)):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        now, kind, outlined = js(
            driver,
            "[document.activeElement.dataset.tested, document.activeElement.className,"
            " getComputedStyle(document.activeElement).outlineStyle]",
        )
        assert step > 0 or kind == "skip"
        assert outlined != "none", (now, kind)
        reached.add(now)
        if reached >= set(wanted):
            break
    assert set(wanted) <= reached
    driver.find_element("css selector", "#top tbody button").send_keys(Keys.ENTER)
    assert text(driver, "found").startswith("2: FI ∞")


def test_narrow_pages_do_not_scroll_sideways(driver: Any, page: Path, two: Path) -> None:
    for path in (page, two):
        width(driver, 400)
        opened(driver, path)
        until(driver, "document.getElementById('manhattan')._fullLayout.width < 400", 10)
        assert js(driver, "document.documentElement.scrollWidth") <= 400
        width(driver, 1280)
        until(driver, "document.getElementById('manhattan')._fullLayout.width > 1000", 10)


def test_two_sets_layers_and_the_predicted_class(driver: Any, two: Path) -> None:
    opened(driver, two)
    points = drawn(driver)
    sets = [label.split("<br>")[0] for *_, label in points]
    assert (sets.count("train"), sets.count("test")) == (300, 90)
    assert js(driver, "document.querySelectorAll('#histogram .legend .traces').length") == 2
    found = search(driver, "7")
    assert found.count("in train") == found.count("in test") == 1
    assert js(driver, "document.querySelectorAll('#sample tbody tr').length") == 2
    lines = "document.getElementById('layers').data"
    assert js(driver, f"{lines}.filter((t) => t.visible === true && t.name).length") == 4
    shown = "[...document.querySelectorAll('.percentiles')].find((t) => !t.hidden).dataset.column"
    assert js(driver, shown) == "fi:first"
    before = {label: y for _, y, label in points}
    median = js(driver, f"[...{lines}[2].y]")
    change(driver, "block", "second")
    assert js(driver, shown) == "fi:second"
    assert len({y for _, y, _ in drawn(driver)} & set(before.values())) == 0
    change(driver, "variant", "FI of the predicted class (cross_entropy)")
    assert js(driver, shown) == "predicted_fi:second"
    assert js(driver, f"[...{lines}[2].y]") != median
    assert text(driver, "found").count("FI") == 2  # the chosen samples stay


def test_print(driver: Any, page: Path) -> None:
    prefer(driver, "dark")
    opened(driver, page)
    sheet = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    content = base64.b64decode(sheet["data"])
    assert content.startswith(b"%PDF")
    # the canvas of the points, as wide as a sheet at a device's two or three pixels each
    widths = [int(w) for w in re.findall(rb"/Subtype /Image\s*/Width (\d+)", content)]
    assert widths and max(widths) <= 3 * 680
    assert js(driver, "document.documentElement.dataset.theme") == "dark"
    until(driver, "document.getElementById('manhattan')._fullLayout.width > 1000", 10)
