"""The page: what is in it, that nothing in it can do harm, its pictures, and how a real browser shows it."""

import json
import re
import zlib
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import Mapped, caused, every, hostile, judged, matrix
from screenshots import SETTINGS, Browser, chromium, colours

import lorax_np as lx
from lorax_np.verify import Report
from lorax_np.verify.diagnosis.told import Name
from lorax_np.verify.pages import heat
from lorax_np.verify.pages.html import html

# ---- HTML --------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "img", "br", "hr"}
ENDED_BY = {"td": {"td", "th", "tr"}, "th": {"td", "th", "tr"}}  # HTML lets their closing tags go


class Outline(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def test_html_fetches_and_runs_nothing_whatever_a_subject_says():
    for page in (html(hostile()), html(every())):
        found = Outline(page)
        tags = {tag for tag, _ in found.elements}
        assert not tags & {"script", "iframe", "object", "embed", "form", "base", "svg"}
        for _, attrs in found.elements:
            assert not any(name.startswith("on") for name in attrs)
            for name in ("src", "href", "action", "srcset", "data"):
                assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,", "data:,"))
        policy = next(attrs["content"] for _, attrs in found.elements if "http-equiv" in attrs)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        assert "url(" not in page
        assert "@import" not in page
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)
        page.encode()
    assert "<script>alert(1)</script>" in Outline(html(hostile())).words


def test_html_says_what_a_reader_needs():
    report = judged("fail")[0]
    words = Outline(html(report)).words
    for said in ("Wrong", "FAIL", *report.diagnosis, "no DoRA | here", lx.__version__, np.__version__):
        assert said in words
    for line in report.conventions.splitlines():
        assert line in words
    assert "lorax-np verify Wrong --profile fp32 --case lattice/lora" in words
    assert "not finite: nan" in words
    mine = [c for c in report.checks if (c.battery, c.kind, c.tensor) == ("generic", "lora", "B")]
    worst = max(mine, key=lambda c: c.ratio)
    assert f"{worst.got:.9g}" in words
    assert f"{worst.want:.9g}" in words


def test_html_names_the_cause_first_and_what_to_compare_and_to_run():
    report = judged("D5")[0]
    (name,) = report.cause.names
    page = html(report)
    words = re.sub(r"\s+", " ", Outline(page).words)
    order = (
        "1 failed" if report.count("fail") == 1 else f"{report.count('fail')} failed",
        f"D5 {name.titles[0]}",
        f"Compare equation ({name.line}) in {name.file}; its replay is {name.z:.1f}σ away",
        report.cause.branch.why,
        f"Only with{report.cause.only}",
        report.cause.findings[0].words,
        report.cause.case,
        report.cause.reproduce,
        report.diagnosis[0],
        "Error ÷ bound, the largest of each kind of layer",
        "Refused",
    )
    at = [words.index(said, words.index("judged by") + 1 if i else 0) for i, said in enumerate(order)]
    assert at == sorted(at)
    found = Outline(page).elements
    assert ("pre", {"class": "copy"}) in found
    assert "cause" not in html(judged("pass")).partition("</style>")[2]


def test_a_class_of_causes_is_printed_as_one():
    one, other = (Name((f"{a}1", f"{a}2"), ("first", "second"), 1.0, "lora.8", "f.py:1") for a in "XY")
    page = html(replace(judged("D5")[0], cause=caused("t", names=(one, other))))
    words = Outline(page).words
    assert words.count("One of these; their answers are the same.") == 2
    assert words.index("X1 first") < words.index("X2 second") < words.index("Y1 first")
    assert "<ol class=names>" in page


def test_html_has_a_name_for_every_picture_table_and_link():
    page = html(every(), matrix())
    found = Outline(page)
    ids = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    for tag, attrs in found.elements:
        if tag == "img":
            assert "entries beyond the bound" in attrs["alt"]
        if tag == "th":
            assert attrs["scope"] in ("col", "row", "rowgroup")
        if attrs.get("role") == "region":
            assert attrs["aria-label"]
            assert attrs["tabindex"] == "0"
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids
        if tag == "a":
            assert attrs["href"].removeprefix("#") in ids
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_kill_matrix_tells_what_was_missed():
    page = html(judged("pass"), matrix())
    words = Outline(page).words
    assert page.count("<table class=matrix>") == 2  # one for each kind
    assert "differences *" in words
    assert "119 of 120 faults are refused by at least one of 9 checks" in words
    assert "Missed by all: S5." in words
    assert "in place of alpha/r <b>" in words


def test_a_kill_matrix_of_words_and_pairs_counts_exceptions_as_refusals():
    faults = ["a", ("b", "of title")]
    cell = lambda fault, check: "E" if fault == "a" else "."  # noqa: E731
    found = SimpleNamespace(faults=faults, checks=["c"], cell=cell)
    words = Outline(html(judged("pass"), found)).words
    assert "1 of 2 faults are refused by at least one of 1 checks, 1 by one alone" in words
    assert "Missed by all: b." in words
    assert "b of title" in words


def test_a_full_page_of_failures_stays_small():
    rows = tuple(tuple(np.random.default_rng(i).uniform(0, 10, 64)) for i in range(64))
    checks = [
        Mapped(
            f"weights/layer.{i}/lora/{t}",
            "weights",
            f"layer.{i}",
            t,
            "fail",
            2.0,
            (0, 0),
            1.0,
            2.0,
            "n" * 900,
            rows,
        )
        for i in range(60)
        for t in ("y", "x", "A", "B", "m", "b")
    ]
    page = html([Report("s", p, 0, "c", checks) for p in ("fp64", "fp32")], matrix())
    assert len(page.encode()) < 400_000
    assert re.search(r"and \d+ more kinds of check, all in the JSON", page)


# ---- pictures ----------------------------------------------------------------------------------------------


def decoded(png):
    """The colour numbers of a picture of heat.png."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        size, name = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        chunks[name] = png[at + 8 : at + 8 + size]
        assert int.from_bytes(png[at + 8 + size : at + 12 + size], "big") == zlib.crc32(name + chunks[name])
        at += size + 12
    width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()  # no filter
    return np.stack([lines[:, 1:] >> 4, lines[:, 1:] & 15], axis=-1).reshape(height, -1)[:, :width]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32))
def test_a_picture_is_its_map(height, width, seed):
    rng = np.random.default_rng(seed)
    rows = heat.shrink(10.0 ** rng.uniform(-4, 14, (height, width)) * (rng.random((height, width)) > 0.1))
    codes = decoded(heat.png(rows))
    assert codes.tolist() == [[heat.colour(value) for value in row] for row in rows]
    assert ((codes >= 5) == (np.array(rows) > 1)).all()
    assert b64decode(heat.data_uri(rows).partition(",")[2]) == heat.png(rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 300), st.integers(0, 2**32))
def test_a_shrunk_map_keeps_every_failure(lead, last, seed):
    rng = np.random.default_rng(seed)
    share = rng.uniform(0, 0.5, (*lead, last))
    entry = tuple(rng.integers(share.shape))
    share[entry] = rng.choice([1.0000001, 30.0, np.inf, np.nan])
    rows = heat.shrink(share)
    assert len(rows) <= 64
    assert len(rows[0]) <= 64
    beyond = [(i, j) for i, row in enumerate(rows) for j, value in enumerate(row) if value > 1]
    assert len(beyond) == 1
    flat = share.reshape(-1, last)
    row, column = (int(at) for at in np.argwhere(~(flat <= 1))[0])
    (i, j) = beyond[0]
    for block, blocks, place, size in ((i, len(rows), row, len(flat)), (j, len(rows[0]), column, last)):
        assert block * size // blocks <= place < (block + 1) * size // blocks
    json.dumps(rows, allow_nan=False)


def test_a_map_of_nothing_and_of_one_number():
    assert heat.shrink(np.zeros((0, 3))) is None
    assert heat.shrink(np.array(0.25)) == ((0.25,),)
    said = "1 of 4 entries beyond the bound, in rows 1 and columns 1; the largest is 4 × the bound, "
    assert heat.in_words(((0.1, 0.2), (0.3, 4.0))) == f"{said}at row 1, column 1"


# ---- a real browser ----------------------------------------------------------------------------------------

CONTRAST = """(() => {
  const channels = text => [...text.match(/[\\d.]+/g).map(Number), 1];
  const light = c => { const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const low = [];
  document.querySelectorAll("body *").forEach(e => {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) return;
    let ground = null;
    for (let p = e; p && !ground; p = p.parentElement) {
      const c = channels(getComputedStyle(p).backgroundColor);
      if (c[3] === 1) ground = c; else if (c[3] > 0) low.push("half transparent: " + p.className);
    }
    if (!ground) { low.push("no ground: " + e.textContent.slice(0, 20)); return; }
    const [a, b] = [light(channels(getComputedStyle(e).color)), light(ground)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([ratio.toFixed(2), e.tagName, e.className, e.textContent.slice(0, 20)].join(" "));
  });
  return low;
})()"""
OUTSIDE = """[...document.querySelectorAll("body *")].filter(e =>
  !e.closest(".scroll, pre, details:not([open])") && e.getBoundingClientRect().right > innerWidth + 1
).map(e => e.tagName + "." + e.className).slice(0, 5)"""
HIDDEN = """[...document.querySelectorAll("table.grid")].filter(
  t => t.scrollWidth > t.parentElement.clientWidth).length"""


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    if path is None:
        pytest.skip("no chromium or chrome on this machine: pages are not looked at")
    with Browser(path) as one:
        yield one


def page_of(name):
    if name == "hostile":
        return html(hostile())
    what = {"named": "D5", "matrix": "pass"}.get(name, name)
    return html(judged(what), matrix() if name == "matrix" else None)


@pytest.mark.parametrize(
    "name",
    [
        "fail",
        "hostile",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("matrix", "pass", "crash", "named")),
    ],
)
def test_pages_in_a_browser(name, browser, tmp_path):
    """In each setting: no overflow, enough contrast, a picture that is not blank, light or dark as asked."""
    path = tmp_path / f"{name}.html"
    path.write_text(page_of(name), encoding="utf-8")
    for setting, (width, _, scheme, medium) in SETTINGS.items():
        browser.open(path, setting)
        assert browser.value("innerWidth") == width
        assert browser.value("document.documentElement.scrollWidth") == width, setting
        assert browser.value(OUTSIDE) == [], setting
        if name in ("pass", "fail"):
            assert browser.value(HIDDEN) == 0, setting
        assert browser.value(CONTRAST) == [], setting
        assert (
            browser.value(
                "document.scripts.length + performance.getEntriesByType('resource').filter("
                "e => !e.name.startsWith('data:')).length"
            )
            == 0
        )
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        dark = scheme == "dark" and medium == "screen"
        assert ground == ("rgb(17, 21, 26)" if dark else "rgb(255, 255, 255)"), setting
        if name == "fail" and width == 390:
            assert len(colours(browser.picture(), enough=20)) > 20
            assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
def test_a_page_keeps_its_structure_whatever_the_text(text):
    page = html(hostile(f"t{text}")).encode().decode()
    assert [tag for tag, _ in Outline(page).elements] == [
        tag for tag, _ in Outline(html(hostile("t"))).elements
    ]
