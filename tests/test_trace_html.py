"""The page that steps through a convolution, and what notebooks show, looked at in a browser."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import browser as chromium
import numpy as np
import pytest

import gpuconv
from gpuconv import notation

RAMP = np.arange(10, 251, 10).reshape(5, 5)
EDGES = [[1, 0, -1]] * 3
rng = np.random.default_rng(11)

# Stride, dilation, padding and channels, apart and together; each output's window is computed here once more.
CASES = {
    "the example": gpuconv.trace(RAMP, EDGES),
    "stride": gpuconv.trace(rng.integers(-9, 10, (7, 8)), rng.integers(-2, 3, (3, 2)), stride=(2, 3)),
    "dilation": gpuconv.trace(rng.integers(-9, 10, (7, 9)), rng.integers(-2, 3, (2, 3)), dilation=(3, 2)),
    "padding": gpuconv.trace(rng.integers(-9, 10, (4, 3)), rng.integers(-2, 3, (3, 3)), padding=((2, 0), (1, 3))),
    "reflected": gpuconv.trace(rng.integers(-9, 10, (4, 5)), EDGES, padding=2, padding_mode="reflect"),
    "two channels": gpuconv.trace(rng.integers(-9, 10, (2, 5, 5)), rng.integers(-2, 3, (2, 3, 3))),
    "everything": gpuconv.trace(
        rng.normal(size=(2, 6, 7)), rng.normal(size=(2, 2, 3)), (2, 1), ((1, 2), (3, 0)), (2, 3)
    ),
    "complex": gpuconv.trace(RAMP * (1 - 2j), [[1j, -1]]),
    "not finite": gpuconv.trace([[1, np.nan, -np.inf], [0.25, -1e-9, 2e20]], [[1, -1]]),
    "wide": gpuconv.trace([[2**63 - 1, -(2**63)], [0, 1]], [[1]]),
    "empty": gpuconv.trace(np.ones((0, 2)), [[3]], padding=1),
    "one": gpuconv.trace([[7]], [[-2]]),
    "large": gpuconv.trace(rng.integers(0, 256, (32, 32)), np.ones((5, 5), int), padding="same"),
}

READ = """
const texts = (selector) => [...document.querySelectorAll(selector)].map((element) => element.textContent);
const place = (td) => [td.closest("tr").rowIndex, td.cellIndex];
const boards = (mark) => [...document.querySelectorAll(".input")].map(
  (board) => [...board.querySelectorAll(mark)].map(place));
"""


@pytest.fixture(scope="module")
def driver():
    yield from chromium.start()


@pytest.fixture
def look(driver, tmp_path):
    """Open a page; at the end the console must be empty and nothing else have been asked for."""
    path = tmp_path / "page.html"

    def opened(page: str, width: int = 1000, height: int = 1500, **media: str) -> Any:
        chromium.show(driver, path, page, width, height, **media)
        return driver

    chromium.complaints(driver), chromium.requests(driver)
    yield opened
    assert chromium.complaints(driver) == []
    assert set(chromium.requests(driver)) <= {path.as_uri()}


def read(driver: Any, script: str, *arguments: Any) -> Any:
    return driver.execute_script(READ + script, *arguments)


def text(driver: Any, selector: str) -> str:
    return read(driver, "return document.querySelector(arguments[0]).textContent.trim()", selector)


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def click(driver: Any, selector: str) -> None:
    driver.find_element("css selector", selector).click()


def to_step(driver: Any, at: int) -> None:
    """Scrub."""
    read(driver, """
        const scrub = document.getElementById("scrub");
        scrub.value = arguments[0];
        scrub.dispatchEvent(new Event("input", {bubbles: true}));
    """, at)  # fmt: skip


def written(value: Any) -> str:
    return notation.number(value).replace("nan", "NaN").replace("inf", "∞")


def window(trace: gpuconv.Trace, i: int, j: int) -> list[list[int]]:
    """Rows and columns of the padded input that output (i, j) reads."""
    KH, KW = trace.k.shape[-2:]
    (s, t), (d, e) = trace.stride, trace.dilation
    return [[i * s + p * d, j * t + q * e] for p in range(KH) for q in range(KW)]


def test_the_example_by_keys_and_buttons(look):
    from selenium.webdriver.common.keys import Keys

    driver = look(CASES["the example"].to_html())
    seen = []

    def note() -> None:
        i, j = divmod(len(seen), 3)
        assert text(driver, "#position") == f"Position ({i}, {j})"
        assert text(driver, "#count") == f"{len(seen) + 1} / 9"
        assert read(driver, "return boards('.tap')") == [window(CASES["the example"], i, j)]
        assert text(driver, ".result td.now") == text(driver, "#sum b") == text(driver, "#ledger .end .total") == "−60"
        outputs = read(driver, "return texts('.result td')")
        assert outputs == ["−60"] * (len(seen) + 1) + [""] * (8 - len(seen))
        seen.append(outputs[-1])

    note()
    products = "10 0 −30 60 0 −80 110 0 −130".split()
    assert read(driver, "return texts('.matrices .term:last-child td')") == products
    assert read(driver, "return texts('#ledger .total')") == "10 10 −20 40 40 −40 70 70 −60".split()
    assert read(driver, "return texts('#ledger li > :first-child')") == [
        "10", "+ 0", "+ (−30)", "+ 60", "+ 0", "+ (−80)", "+ 110", "+ 0", "+ (−130)",
    ]  # fmt: skip
    assert "(10−30)+(60−80)+(110−130) = −60" in text(driver, "#sum")
    assert text(driver, "#sizes") == "Output size = ⌊(n − k + 2p) / s⌋ + 1 = ⌊(5 − 3 + 2·0) / 1⌋ + 1 = 3"
    for at in range(8):
        if at % 2:
            click(driver, "#forward")
        else:
            press(driver, Keys.ARROW_RIGHT)
        note()
    assert text(driver, "#live") == "Row 2, column 2: (130−150)+(180−200)+(230−250) = −60"
    click(driver, "#forward")
    focused = "return [document.activeElement.id, document.activeElement.getAttribute('aria-disabled')]"
    assert read(driver, focused) == ["forward", "true"], "the end does not take the focus away"
    press(driver, Keys.ARROW_RIGHT)  # there is no tenth
    assert text(driver, "#count") == "9 / 9"
    places = []
    for key in (Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.HOME, Keys.ARROW_UP, Keys.ARROW_DOWN, Keys.END, Keys.ARROW_DOWN):
        press(driver, key)
        places.append(text(driver, "#count").split()[0])
    assert places == ["6", "5", "1", "1", "4", "9", "9"]
    for selector, place in (("#first", "1"), ("#last", "9"), ("#back", "8"), (".result td[data-at='4']", "5")):
        click(driver, selector)
        assert text(driver, "#count").split()[0] == place
    to_step(driver, 2)
    assert text(driver, "#position") == "Position (0, 2)"


STEP = """
const frame = (board) => {
  const ours = board.querySelector(".frame").getBoundingClientRect();
  const taps = [...board.querySelectorAll(".tap")].map((td) => td.getBoundingClientRect());
  const corner = (side, choose) => choose(...taps.map((tap) => tap[side])) - ours[side];
  return [corner("left", Math.min), corner("top", Math.min), corner("right", Math.max), corner("bottom", Math.max)];
};
return {
  taps: boards(".tap"), frames: [...document.querySelectorAll(".input")].map(frame),
  patch: texts(".matrices > figure:not(.term) td"), product: texts(".matrices .term:last-child td"),
  totals: texts("#ledger .total"), partial: texts(".partial b"), sum: texts("#sum b")[0],
  now: texts(".result td.now")[0],
};
"""


@pytest.mark.parametrize("name", CASES)
def test_every_step_shows_what_the_trace_holds(look, name):
    trace = CASES[name]
    driver = look(trace.to_html(), reduced_motion="reduce")  # or the frame would still be on its way
    ours = [0, *rng.integers(len(trace), size=5).tolist(), len(trace) - 1] if name == "large" else range(len(trace))
    for at in ours:
        to_step(driver, at)
        step = trace.steps[at]
        shown = read(driver, STEP)
        channels = 1 if trace.x.ndim == 2 else len(trace.x)
        assert shown["taps"] == [window(trace, *step.position)] * channels
        assert np.abs(shown["frames"]).max() <= 1.5, "the frame stands around its pixels"
        assert shown["patch"] == [written(value) for value in step.patch.ravel().tolist()]
        assert shown["product"] == [written(value) for value in step.products.ravel().tolist()]
        assert shown["totals"] == [written(value) for value in step.running.ravel().tolist()]
        assert shown["partial"] == ([] if channels == 1 else [written(value) for value in step.channel_sums.tolist()])
        assert shown["now"] == shown["sum"] == shown["totals"][-1] == written(step.sum)
    padded = np.pad(np.zeros(trace.x.shape[-2:], int), trace.padding, constant_values=1)
    assert read(driver, "return boards('.pad')")[0] == np.argwhere(padded).tolist()


FIELDS = """return [...document.querySelectorAll(".result td")].map((td) => {
  td.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  return boards(".peek");
});"""

# The other way round: the outputs that read a pixel.
READERS = """return [...document.querySelector(".input").querySelectorAll("td")].map((td) => {
  td.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  return [place(td), [...document.querySelectorAll(".result .peek")].map(place)];
});"""


@pytest.mark.parametrize(
    "name", ["the example", "stride", "dilation", "padding", "reflected", "two channels", "everything"]
)
def test_pointing_at_an_output_marks_what_it_reads(look, name):
    from selenium.webdriver.common.action_chains import ActionChains

    trace = CASES[name]
    driver = look(trace.to_html())
    channels = 1 if trace.x.ndim == 2 else len(trace.x)
    assert read(driver, "return boards('.peek')") == [[]] * channels
    cells = driver.find_elements("css selector", ".result td")
    for at in (len(trace) - 1, len(trace) // 2):
        ActionChains(driver).move_to_element(cells[at]).perform()
        assert read(driver, "return boards('.peek')") == [window(trace, *trace.steps[at].position)] * channels
    fields = read(driver, FIELDS)
    assert fields == [[window(trace, *step.position)] * channels for step in trace]
    assert text(driver, "#count").startswith("1 /"), "pointing does not move"
    for pixel, outputs in read(driver, READERS):
        assert outputs == [list(step.position) for step in trace if pixel in window(trace, *step.position)]
    ActionChains(driver).move_to_element(driver.find_element("css selector", "#caption")).perform()
    assert read(driver, "return boards('.peek')") == [[]] * channels


def test_what_is_pointed_at_is_said(look):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = look(CASES["everything"].to_html())
    for selector, said in (
        (
            ".result td[data-at='0']",
            f"Output (0, 0) = {written(CASES['everything'].steps[0].sum)} reads rows −1, 1, columns ",
        ),
        (".result td[data-at='5']", "Output (1, 1) reads rows 1, 3, columns −2, 1, 4."),
        (".input td.pad", "Pixel (−1, −3) = 0 is read by 1 output."),
        ("#caption", "Point at an output to see what it reads, at a pixel to see what reads it."),
    ):
        ActionChains(driver).move_to_element(driver.find_element("css selector", selector)).perform()
        assert text(driver, "#hint").startswith(said)


def test_an_output_reached_by_keys_is_marked_too(look):
    from selenium.webdriver.common.keys import Keys

    driver = look(CASES["two channels"].to_html())
    for _ in range(3):  # the theme, an output
        press(driver, Keys.TAB)
        if read(driver, "return document.activeElement.matches('.result td')"):
            break
    press(driver, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert read(driver, "return place(document.activeElement)") == [1, 1]
    assert read(driver, "return boards('.peek')") == [window(CASES["two channels"], 1, 1)] * 2
    assert (
        read(driver, "return [...document.querySelectorAll('.result td')].filter((td) => td.tabIndex === 0).length")
        == 1
    )


def test_pointing_at_a_product_links_it_with_its_factors(look):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = look(CASES["two channels"].to_html())
    ActionChains(driver).move_to_element(driver.find_elements("css selector", "#ledger li")[9 + 5]).perform()
    assert read(driver, "return boards('.linked')") == [[], [[1, 2]]]
    assert read(driver, "return document.querySelectorAll('.linked').length") == 6


# What passes by is written down where it happens: a test may be stopped for longer than a step takes.
WITNESS = """
window.seen = {counts: [], names: []};
const count = document.getElementById("count");
new MutationObserver(() => seen.counts.push(count.textContent.split(" ")[0])).observe(count, {childList: true});
const play = document.getElementById("play");
new MutationObserver(() => {
  if (seen.names.at(-1) !== play.getAttribute("aria-label")) seen.names.push(play.getAttribute("aria-label"));
}).observe(play, {attributes: true});
"""


def test_it_plays_and_pauses(look):
    from selenium.webdriver.common.keys import Keys

    driver = look(CASES["the example"].to_html(), reduced_motion="no-preference")
    frame = "return getComputedStyle(document.querySelector('.frame')).transitionDuration"
    assert read(driver, frame) != "0s"
    read(driver, WITNESS + "document.getElementById('speed').value = '4'")
    click(driver, "#play")
    chromium.wait(driver, lambda: read(driver, "return seen.names.length === 2"), "it does not play to its end")
    seen = read(driver, "return seen")
    assert seen["names"] == ["Pause", "Play"]
    assert list(dict.fromkeys(seen["counts"])) == list("23456789")
    assert text(driver, "#live").startswith("Row 2, column 2:"), "what it arrives at is read out"

    read(driver, "seen.counts = []; document.getElementById('speed').value = '0.5'; document.activeElement.blur()")
    press(driver, " ")
    chromium.wait(driver, lambda: read(driver, "return seen.counts.length > 1"), "the space bar does not play")
    assert read(driver, "return seen.counts.slice(0, 2)") == ["1", "2"], "from the end it starts again"
    press(driver, Keys.HOME)
    assert driver.find_element("css selector", "#play").accessible_name == "Play", "a step by hand pauses"
    assert text(driver, "#count") == "1 / 9"
    look(CASES["the example"].to_html(), reduced_motion="reduce")
    assert read(driver, frame) == "0s"


CONTRAST = """
const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const paint = (...colours) => {
  pen.clearRect(0, 0, 1, 1);
  for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
const behind = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
  return layers;
};
return arguments[0].map((selector) => [selector, Math.min(...[...document.querySelectorAll(selector)].map((element) => {
  const layers = behind(element);
  const inks = (element.dataset.weight ? ["", "::after"] : [""]).map((part) => getComputedStyle(element, part).color);
  return Math.min(...inks.map((ink) => ratio(paint(...layers), paint(...layers, ink))));
}))]);
"""


def test_light_and_dark_and_the_contrast_of_both(look):
    page = CASES["padding"].to_html()
    paper = "return getComputedStyle(document.body).backgroundColor"
    colours = {}
    for scheme in ("light", "dark"):
        driver = look(page, color_scheme=scheme)
        to_step(driver, 3)
        colours[scheme] = read(driver, paper)
        texts = [
            "h1",
            "#caption",
            ".input td",
            ".input td.pad",
            ".input td.tap",
            ".kernel td",
            ".result td:not(.later)",
        ]
        texts += [".op", ".size", "#hint", "#count", ".matrix td", ".matrix td.nil", "#ledger .total", ".formula"]
        texts += ["footer p", "#speed"]
        for selector, ratio in read(driver, CONTRAST, texts):
            assert ratio >= 4.5, (scheme, selector, ratio)
    assert colours["light"] != colours["dark"]
    button = driver.find_element("css selector", "#theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert (read(driver, paper), button.get_attribute("aria-pressed")) == (colours["light"], "false")
    button.click()
    assert (read(driver, paper), button.get_attribute("aria-pressed")) == (colours["dark"], "true")


def test_every_control_has_a_name(look):
    driver = look(CASES["padding"].to_html())
    controls = driver.find_elements("css selector", "button, input, select, table[aria-label]")
    assert len(controls) == 7 + 1 + 1 + 3 - 1
    assert all(control.accessible_name for control in controls)
    assert driver.find_element("css selector", "#live").get_attribute("aria-live") == "polite"
    assert driver.find_element("css selector", ".result table").aria_role == "grid"
    grid = driver.find_elements("css selector", ".result td")
    assert [cell.aria_role for cell in grid[:2]] == ["gridcell"] * 2
    assert grid[0].accessible_name.startswith("Row 0, column 0:")


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_sticks_out(look, width):
    for name in ("the example", "everything", "complex", "wide", "large"):
        driver = look(CASES[name].to_html(), width)
        edge, room, boards = read(
            driver,
            """
            const root = document.documentElement;
            const edges = [...document.querySelectorAll(".board")].map((board) => board.getBoundingClientRect().right);
            return [root.scrollWidth, root.clientWidth, Math.max(...edges)];
        """,
        )
        assert edge <= room <= width and boards <= room, name
        # Numbers that can be seen stand inside their cells.
        cut = read(
            driver,
            """return [...document.querySelectorAll(".board:not(.dense) td")]
            .filter((td) => td.scrollWidth > td.clientWidth + 1).map((td) => td.textContent)""",
        )
        assert cut == [], name


def test_the_page_runs_no_script_but_its_own(look):
    hostile = "</title><script>window.stranger = 1</script><img src=x onerror='window.stranger = 1'>"
    driver = look(replace(CASES["padding"], padding_mode=hostile).to_html())
    assert hostile in text(driver, "#caption")
    assert read(driver, "return [window.stranger === undefined, document.images.length]") == [True, 0]
    read(
        driver,
        """
        const script = document.createElement("script");
        script.textContent = "window.stranger = 1";
        document.body.append(script);
        const image = document.createElement("img");
        image.src = "https://example.org/pixel.png";
        document.body.append(image);
    """,
    )
    assert read(driver, "return window.stranger === undefined")
    said: list[str] = []
    chromium.wait(driver, lambda: said.extend(chromium.complaints(driver)) or len(said) >= 2, "nothing was refused")
    assert all("Content Security Policy" in message for message in said)
    chromium.requests(driver)  # the picture's, which was refused


def test_what_notebooks_show(look):
    shown = {
        "trace": CASES["the example"],
        "explain": gpuconv.explain((1, 3, 9, 9), (4, 3, 3, 3)),
        "Conv2d": gpuconv.Conv2d(EDGES, padding="same"),
        "info": gpuconv.info(),
    }
    for ink, paper in itertools.pairwise(("#111", "#fff", "#111")):  # a light notebook, then a dark one
        parts = "".join(f"<section id='{name}'>{value._repr_html_()}</section>" for name, value in shown.items())
        style = f"<style>body {{ color: {ink}; background: {paper} }}</style>"
        driver = look(f"<!doctype html><meta charset='utf-8'><title>Notebook</title>{style}{parts}")
        assert "numpy.reference" in text(driver, "#explain") and "numpy.reference" in text(driver, "#info")
        assert read(driver, "return texts('#Conv2d td')")[-9:] == ["1", "0", "−1"] * 3
        cells = ["#explain th", "#explain td", "#Conv2d td", "#Conv2d p", "#info th", "#trace summary"]
        for selector, ratio in read(driver, CONTRAST, cells):
            assert ratio >= 4.5, (paper, selector, ratio)
        assert read(driver, "return document.documentElement.scrollWidth <= innerWidth")
        driver.switch_to.frame(driver.find_element("css selector", "iframe"))
        click(driver, "#forward")
        assert (text(driver, "#count"), text(driver, "#sum b")) == ("2 / 9", "−60")
        assert read(driver, "return document.documentElement.scrollHeight <= innerHeight"), "the frame shows all of it"
        driver.switch_to.default_content()
