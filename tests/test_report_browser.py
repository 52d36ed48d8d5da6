"""Laws of a report page in a real browser: silent console, no request, readable colors."""

from __future__ import annotations

import browser
import pytest
from tenfold.report import (
    Badges,
    Bars,
    Columns,
    Details,
    Heading,
    Histogram,
    Lines,
    Paragraph,
    Preformatted,
    Scatter,
    Table,
    TokenHeat,
    render_html,
)

EXECUTABLE = browser.find_browser()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"no browser installed (looked for {', '.join(browser.NAMES)})"
)

ATTACK = (
    "<script>window.hacked = 1</script><img src=https://example.invalid/x.png "
    "onerror='window.hacked = 1'><svg/onload='window.hacked = 1'>"
    "</script><style>@import 'https://example.invalid/x.css';</style>"
)

CONTRASTS = """(() => {
  const channel = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = (text) => {
    const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
    return [r / 255, g / 255, b / 255, a === undefined ? 1 : a];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const background = (node) => {
    if (!node) return [1, 1, 1];
    const own = parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, background(node.parentElement));
  };
  return [...document.querySelectorAll(".tokens span, p, td, th, dd, dt, figcaption, nav a")]
    .filter((node) => node.textContent.trim())
    .map((node) => {
      const under = background(node);
      const ink = over(parse(getComputedStyle(node).color), under);
      const [high, low] = [light(ink), light(under)].sort((a, b) => b - a);
      return (high + 0.05) / (low + 0.05);
    });
})()"""


def blocks(text):
    """One of each block, with a full ramp of heat."""
    ramp = [i / 20 for i in range(-20, 21)]
    return [
        Paragraph(text),
        Badges({text: text}),
        Heading("Heat"),
        TokenHeat([f" {v}" for v in ramp], ramp, text, positive=text, negative=text),
        Heading("Charts", 3),
        Columns(
            [
                [Bars([text, "b"], [1, -2], [(0, 2), None], "s", text)],
                [Histogram({text: 3, "b": 1})],
            ]
        ),
        Lines({text: [(1, 1), (10, 2)], "b": [(1, 2), (10, 1)]}, text, text, text, log_x=True),
        Scatter([(0.1, 0.2, text), (0.3, 0.1)], text, text, diagonal=True),
        Details(text, [Preformatted(text, text), Table([text, "n"], [[text, 1.5]])], open=True),
    ]


@pytest.fixture(scope="module")
def chromium():
    assert EXECUTABLE
    with browser.running(EXECUTABLE) as running:
        yield running


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder and the address it is served at."""
    folder = tmp_path_factory.mktemp("pages")
    with browser.serving(folder) as address:
        yield folder, address


def outside(page, address):
    """Requests other than the page itself."""
    return [url for url in page.requests if url != address and not url.startswith("data:")]


@pytest.mark.parametrize("text", ["plain words", ATTACK], ids=["plain", "attack"])
def test_page_is_silent_and_asks_for_nothing(chromium, served, text):
    folder, origin = served
    (folder / "report.html").write_text(render_html(text, blocks(text), {text: text}))
    address = f"{origin}/report.html"
    page = chromium.open(address)
    assert page.requests.count(address) == 1
    assert outside(page, address) == []
    assert page.problems == []
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('img, script').length") == 1
    assert text[:40] in page.evaluate("document.querySelector('h1').textContent")


def test_page_opens_from_a_file(chromium, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_html("t", blocks("x")))
    page = chromium.open(path.as_uri())
    assert page.problems == []
    assert outside(page, path.as_uri()) == []


def test_the_same_check_notices_a_page_that_misbehaves(chromium, served):
    folder, origin = served
    evil = render_html("t", [Paragraph("MARK")]).replace("MARK", ATTACK + "<img src='/gone.png'>")
    (folder / "evil.html").write_text(evil)
    page = chromium.open(f"{origin}/evil.html")
    assert any("Content Security Policy" in problem for problem in page.problems)
    bare = evil.replace("Content-Security-Policy", "X-Nothing")
    (folder / "bare.html").write_text(bare)
    page = chromium.open(f"{origin}/bare.html")
    assert f"{origin}/gone.png" in outside(page, f"{origin}/bare.html")
    assert page.evaluate("window.hacked") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_is_at_least_that_of_wcag_aa(chromium, tmp_path, scheme):
    path = tmp_path / "report.html"
    path.write_text(render_html("Title", blocks("words"), {"fact": "value"}))
    page = chromium.open(path.as_uri())
    page.prefer(scheme)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert min(contrasts) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(253, 253, 251)"
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_page_fits_its_window(chromium, tmp_path, width):
    path = tmp_path / "report.html"
    path.write_text(render_html("A title of some words", blocks("w" * 300), {"f": "v" * 90}))
    page = chromium.open(path.as_uri(), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_contents_follow_the_reader(chromium, tmp_path):
    path = tmp_path / "report.html"
    filler = [Paragraph("words\n\n" * 60)]
    path.write_text(render_html("t", [Heading("One"), *filler, Heading("Two"), *filler]))
    page = chromium.open(path.as_uri())
    current = "document.querySelector('nav a[aria-current]').textContent"
    assert page.evaluate(current) == "One"
    page.evaluate("scrollTo({top: document.body.scrollHeight, behavior: 'instant'})")
    page.call(
        "Runtime.evaluate",
        expression="new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))",
        awaitPromise=True,
    )
    assert page.evaluate(current) == "Two"
