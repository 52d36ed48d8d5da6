"""Laws of the report: nothing escapes its place, nothing is dropped silently, nothing loads."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from tenfold import report
from tenfold.errors import ComponentError
from tenfold.report import (
    Badges,
    Bars,
    Columns,
    Details,
    Heading,
    HeatMap,
    Histogram,
    Lines,
    Paragraph,
    Preformatted,
    Scatter,
    Table,
    TokenHeat,
    render_csv,
    render_html,
    render_markdown,
    table_csv,
)
from tenfold.report import html as html_report
from tenfold.report.scales import LEVELS, fit_axis, heat_level, heat_scale
from tenfold.report.text import clean, number

HOSTILE = (
    "<script>alert(1)</script>",
    "</script></style></title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "<!-- --><![CDATA[x]]>",
    "\x00\x1b[31m\x07\u202eabc\u2066",
    "lone \ud800 surrogate",
    "&lt;b&gt; &#x3C;",
    "a" * 300_000,
    "̶̙" * 2_000,
)


def every_block(text: str) -> list[report.Block]:
    """One of each block with `text` in every place that takes text."""
    return [
        Heading(text),
        Heading(text, 3),
        Paragraph(text),
        Preformatted(text, text),
        Table([text, "n"], [[text, 1], [None, 2.5]], text),
        TokenHeat([text, " b"], [0.5, None], text, positive=text, negative=text),
        Bars([text, "b"], [1.0, -2.0], [(0.5, 1.5), None], text, text),
        Histogram({text: 3, "b": 1}, text),
        Lines({text: [(0, 1), (1, 2)], "b": [(0, 1)]}, text, text, text),
        Scatter([(0.1, 0.2, text), (0.3, 0.1)], text, text, text, diagonal=True),
        HeatMap([text, "b"], [text], [[1.0], [-1.0]], [[text], [""]], text, text, text),
        Columns([[Paragraph(text)], [Details(text, [Paragraph(text)])]]),
        Badges({text: text, "n": 1}),
    ]


class Tags(html.parser.HTMLParser):
    """Collects elements, attribute names and the character data outside script and style."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_adds_no_element_and_no_handler(text):
    safe = Tags(render_html("plain", every_block("plain"), {"plain": "plain"}))
    page = render_html(text, every_block(text), {text: text})
    seen = Tags(page)
    assert set(seen.tags) <= {*safe.tags, "nav", "ol", "li"}
    assert seen.tags.count("script") == 1
    assert seen.tags.count("style") == 1
    assert "img" not in seen.tags
    assert not [a for a in seen.attributes if a[1].startswith("on") or a[1] in ("style", "src")]
    assert page.encode()  # no lone surrogate is left


def test_hostile_text_is_shown_as_it_is():
    page = render_html("t", [Paragraph("<script>alert('&lt;')</script>")])
    assert "<script>alert('&lt;')</script>" in "".join(Tags(page).text)


def test_control_and_direction_characters_are_made_visible():
    shown = clean("a\x00b\x1bc\u202ed\x7fe\x9bf\r\ng\th\ud800", 100)
    assert shown == "a␀b␛c⟦U+202E⟧d␡e\ufffdf\ng\th\ufffd"
    page = render_html("\x00", every_block("\x1b[2J\u202e\x08"), {"\x01": "\x02"})
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)


def test_policy_allows_exactly_the_inline_style_and_script():
    page = render_html("t", every_block("x"))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    directives = dict(part.split(" ", 1) for part in policy[1].replace("&#39;", "'").split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data:"
    assert "unsafe" not in policy[1]
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert content
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert directives[kind] == f"'sha256-{digest}'"


def test_page_names_no_outside_address():
    page = render_html("t", every_block("x"), {"a": 1})
    addresses = [
        value for _, name, value in Tags(page).attributes if name in ("href", "src", "srcset")
    ]
    assert addresses
    assert all(value and value.startswith(("#", "data:")) for value in addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_same_blocks_give_the_same_page():
    blocks, facts = every_block("x"), {"seed": 1}
    assert render_html("t", blocks, facts) == render_html("t", blocks, facts)


def test_contents_list_the_top_headings_in_order_with_working_anchors():
    blocks = [Heading("One"), Heading("Two", 3), Heading("Three", 4), Heading("One")]
    page = render_html("t", [*blocks, Details("d", [Heading("Inner")])])
    links = re.findall(r'<li class="l(\d)"><a href="#([^"]+)">([^<]+)</a>', page)
    assert [(level, name) for level, _, name in links] == [("2", "One"), ("3", "Two"), ("2", "One")]
    anchors = [anchor for _, anchor, _ in links]
    assert len(set(anchors)) == 3
    assert all(page.count(f'id="{anchor}"') == 1 for anchor in anchors)


def test_large_inputs_are_cut_and_the_page_says_so():
    many = 50_000
    page = render_html(
        "t",
        [
            Table(["a"], [[i] for i in range(many)]),
            TokenHeat(["x "] * many, [1.0] * many),
            Bars([str(i) for i in range(many)], [1.0] * many),
            Histogram({str(i): 1 for i in range(many)}),
            Lines({str(i): [(0, 0), (1, 1)] for i in range(100)}, "x", "y"),
            Lines({"long": [(i, i) for i in range(many)]}, "x", "y"),
            Scatter([(i, i) for i in range(many)], "x", "y"),
            HeatMap([str(i) for i in range(150)], ["a", "b"], [[1.0, None]] * 150),
            Preformatted("y" * 1_000_000),
        ],
    )
    assert len(page) < 4_000_000
    for note in (
        "49,000 more rows not shown",
        "44,000 more tokens not shown",
        "49,800 more bars not drawn",
        "49,800 more bins not drawn",
        "84 more series not drawn",
        "46,000 more points not drawn",
        "100 more cells not drawn",
        "900,000 more characters",
    ):
        assert note in page


def test_a_page_of_endless_blocks_ends_with_a_note():
    page = render_html("t", (Paragraph("x") for _ in range(10**6)))
    assert "The page is full" in page
    assert page.count("<p>x</p>") == html_report.MAX_BLOCKS


def test_deep_nesting_ends_with_a_note():
    block: report.Block = Paragraph("bottom")
    for _ in range(200):
        block = Details("d", [block])
    assert "The page is full" in render_html("t", [block])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 0.0])
def test_extreme_numbers_never_break_a_chart(bad):
    blocks: list[report.Block] = [
        TokenHeat(["a", "b"], [bad, 1.0]),
        Bars(["a", "b"], [bad, 1.0], [(bad, bad), (0.5, bad)]),
        Histogram({"a": bad, "b": 2}),
        Lines({"s": [(bad, bad), (1.0, 2.0), (3.0, 1.0)]}, "x", "y", log_x=True),
        Lines({"s": [(bad, bad), (1.0, 2.0)]}, "x", "y", intervals={"s": [(bad, bad), (1.0, bad)]}),
        Scatter([(bad, 1.0), (1.0, bad), (2.0, 3.0)], "x", "y", log_x=True, log_y=True),
        HeatMap(["a"], ["b", "c"], [[bad, 1.0]]),
        Table(["v"], [[bad]]),
    ]
    page = render_html("t", blocks)
    drawn = " ".join(value or "" for tag, name, value in Tags(page).attributes if name != "title")
    assert "nan" not in drawn
    assert not re.search(r"\binf\b", drawn)
    assert render_markdown("t", blocks)
    assert render_csv("t", blocks)


@pytest.mark.parametrize(
    "block",
    [
        Table([], []),
        TokenHeat([], []),
        Bars([], []),
        Histogram({}),
        Lines({}, "x", "y"),
        Lines({"empty": []}, "x", "y"),
        Scatter([], "x", "y"),
        HeatMap([], [], []),
        Columns([]),
        Details("d", []),
        Badges({}),
        Paragraph(""),
    ],
    ids=lambda block: type(block).__name__,
)
def test_empty_blocks_render(block):
    assert "<main>" in render_html("", [block])
    assert render_markdown("", [block]).startswith("#")
    assert render_csv("", [block]).startswith("report,")


def test_blocks_of_unequal_lengths_are_refused():
    for build in (
        lambda: TokenHeat(["a"], []),
        lambda: Bars(["a"], [1.0, 2.0]),
        lambda: Bars(["a"], [1.0], []),
        lambda: Table(["a", "b"], [[1, 2], [1]]),
        lambda: HeatMap(["a"], ["b"], []),
        lambda: HeatMap(["a"], ["b"], [[1.0, 2.0]]),
        lambda: HeatMap(["a"], ["b"], [[1.0]], [["x", "y"]]),
        lambda: Lines({"s": [(0, 1)]}, "x", "y", intervals={"s": []}),
        lambda: Lines({"s": [(0, 1)]}, "x", "y", intervals={"t": [(0, 1)]}),
    ):
        with pytest.raises(ComponentError, match="must be equal"):
            build()


def test_lines_have_error_bars_where_intervals_are_known():
    """One bar with two ends per interval, inside the axis; every renderer has the numbers."""
    points, ranges = [(1, 2.0), (3, 4.0)], [(1.5, 9.25), None]
    block = Lines({"a": points, "b": points}, "k", "y", intervals={"a": ranges})
    page = render_html("t", [block])
    bars = re.findall(r'<line [^>]*class="whisker s0"[^>]*>', page)
    assert len(bars) == 3
    assert "whisker s1" not in page
    heights = [float(v) for bar in bars for v in re.findall(r' y[12]="([\d.]+)"', bar)]
    assert min(heights) >= 0
    assert max(heights) - min(heights) > 100
    assert ">10<" in page
    assert "| a | 1 | 2 | 1\\.5, 9.25 |" in render_markdown("t", [block])
    rows = list(csv.DictReader(io.StringIO(render_csv("t", [block]))))
    assert [(r["row"], r["column"], r["value"]) for r in rows][2:4] == [
        ("a", "1 low", "1.5"), ("a", "1 high", "9.25"),
    ]  # fmt: skip
    plain = render_markdown("t", [Lines({"a": points}, "k", "y")])
    assert "interval" not in plain


def test_heat_map_cells_have_the_shade_and_the_text_of_their_values():
    block = HeatMap(["N=4", "N=8"], ["f=0", "f=1"], [[1.0, 0.5], [0.0, None]], scale=1.0)
    page = render_html("t", [block])
    for shade, tip in [
        (f"cell p{LEVELS}", "N=4, f=0: 1"),
        (f"cell p{LEVELS // 2}", "N=4, f=1: 0.5"),
        ("cell zero", "N=8, f=0: 0"),
        ("cell empty", "N=8, f=1: –"),
    ]:
        assert re.search(rf'<rect class="{shade}"[^>]*><title>{re.escape(tip)}</title>', page)
    assert re.search(rf"\.p{LEVELS}{{[^}}]*fill:rgb", page)
    assert "| N=4 | 1 | 0\\.5 |" in render_markdown("t", [block])
    rows = list(csv.DictReader(io.StringIO(render_csv("t", [block]))))
    assert [(r["row"], r["column"], r["value"]) for r in rows][1] == ("N=4", "f=1", "0.5")
    texts = HeatMap(["a"], ["r1"], [[-1.0]], [["abstain"]])
    assert ">abstain</text>" in render_html("t", [texts])
    narrow = HeatMap(["a"], [str(i) for i in range(60)], [[1.0] * 60], [["stop"] * 60])
    assert ">stop</text>" not in render_html("t", [narrow])
    assert "<title>a, 7: stop</title>" in render_html("t", [narrow])


def test_a_chart_stands_alone_as_well_formed_svg():
    for block in every_block("<b>&amp;"):
        if isinstance(block, Bars | Histogram | Lines | Scatter | HeatMap):
            root = ElementTree.fromstring(report.render_svg(block))
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "svg.chart .cell" in str(root[0].text)
    with pytest.raises(ComponentError, match="Paragraph cannot be drawn"):
        report.render_svg(Paragraph("x"))


@pytest.mark.parametrize("render", [render_html, render_markdown, render_csv])
def test_a_foreign_object_is_refused_by_name(render):
    with pytest.raises(ComponentError, match="a str, which is no report block"):
        render("t", ["<p>raw html</p>"])


def test_heat_shades_are_linear_symmetric_and_clipped():
    scale = heat_scale([0.5, -2.0, None, float("nan")], None)
    assert scale == 2.0
    assert [heat_level(v, scale) for v in (2.0, -2.0, 1.0, -1.0, 0.0, None)] == [
        LEVELS, -LEVELS, LEVELS // 2, -LEVELS // 2, 0, 0,
    ]  # fmt: skip
    assert heat_level(99.0, scale) == LEVELS
    assert heat_scale([], None) == heat_scale([0.0, None], None) == 1.0
    assert heat_scale([5.0], 10.0) == 10.0
    page = render_html("t", [TokenHeat(["a", "b", "c"], [1.0, -1.0, None], scale=2.0)])
    assert f'<span class="p{LEVELS // 2}" title="+1">a</span>' in page
    assert f'<span class="n{LEVELS // 2}" title="−1">b</span>' in page
    assert '<span title="no value">c</span>' in page


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1e-9, 3e-9), (-5.0, 70.0), (3.0, 3.0), (2.0, 5e6)])
def test_axes_hold_their_values_and_ticks_rise(ends, log):
    usable = [v for v in ends if v > 0 or not log]
    axis = fit_axis(ends, log=log)
    assert all(-1e-9 <= axis.position(v) <= 1 + 1e-9 for v in usable)
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert 2 <= len(axis.ticks) <= 30


def test_numbers_keep_four_significant_digits():
    cases = {
        0.0: "0", 1.0: "1", -0.123456: "−0.1235", 1234.5678: "1,235", 1e-7: "1.000e−07",
        float("inf"): "∞", 12: "12", 1_234_567: "1,234,567",
    }  # fmt: skip
    assert {value: number(value) for value in cases} == cases
    assert number(True) == "yes"
    assert number(None) == "–"


def test_markdown_text_cannot_become_markup():
    text = "# h\n> q\n- l\n1. n\n    code\n*b* _i_ `c` [l](http://x.y) <b> | ~s~ www.x.y a@b.c"
    shown = render_markdown("t", [Paragraph(text)])
    for forbidden in ("\n# h", "\n> ", "\n- ", "\n1. ", "<b>", "\n    ", "http://", "www.x"):
        assert forbidden not in shown
    assert not re.search(r"(?<!\\)[*_`\[\]|~@]", shown)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_markdown_and_csv_twins_take_hostile_text(text):
    shown = render_markdown(text, every_block(text), {text: text})
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", shown, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside
    assert shown.encode()
    assert render_csv(text, every_block(text)).encode()


def test_markdown_fence_is_longer_than_any_fence_inside():
    shown = render_markdown("t", [Preformatted("a\n`````\nb")])
    assert shown.count("``````") == 2


def test_markdown_has_a_twin_of_every_block():
    shown = render_markdown("t", every_block("words"), {"seed": 3})
    for piece in ("## words", "### words", "```text", "| words | n |", "█", "strongest tokens"):
        assert piece in shown
    assert "| seed | 3 |" in shown


def test_csv_keeps_full_precision_and_every_number():
    blocks = [
        Heading("Part"),
        Columns([[Bars(["a"], [0.1 + 0.2], [(0.0, 1.0)])]]),
        Details("d", [Lines({"s": [(1.0, 2.0)]}, "x", "y", "cap")]),
    ]
    rows = list(csv.DictReader(io.StringIO(render_csv("t", blocks))))
    assert [(r["section"], r["block"], r["row"], r["column"], r["value"]) for r in rows] == [
        ("Part", "bars", "a", "value", "0.30000000000000004"),
        ("Part", "bars", "a", "low", "0.0"),
        ("Part", "bars", "a", "high", "1.0"),
        ("Part", "lines", "s", "1.0", "2.0"),
    ]


def test_csv_text_cannot_become_a_formula():
    shown = table_csv(Table(["=a", "b"], [["=1+1", -2.5], ["@x", "-3"], ["+cmd|x", None]]))
    rows = list(csv.reader(io.StringIO(shown)))
    assert rows == [["'=a", "b"], ["'=1+1", "-2.5"], ["'@x", "-3"], ["'+cmd|x", ""]]


def test_blocks_import_no_template_engine():
    code = (
        "import sys, tenfold.report as r; r.TokenHeat(['a'], [1.0]);"
        "assert not {'jinja2', 'markupsafe', 'numpy', 'torch'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
