"""The page as HTML, and what a figure on it has."""

import csv
import io
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from fastproj.core.errors import InputError
from fastproj.reporting import figures
from fastproj.reporting.curves import Panel
from fastproj.reporting.page import Download, Missing, Page, Section, Table, Text, themed
from fastproj.reporting.run import count

PANEL = Panel("A share", "of all (%)", {}, "Higher is better.", 100.0)


class Parsed(HTMLParser):
    """Every element with its attributes, and the text outside of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def links(self) -> list[str]:
        names = ("href", "src", "xlink:href", "action", "data", "srcset")
        return [str(of[name]) for _, of in self.tags for name in names if name in of]


def numbers(page: str, name: str) -> list[list[str]]:
    """The CSV behind the link that saves ``name``."""
    (link,) = [of["href"] for tag, of in Parsed(page).tags if of.get("download") == name]
    kind, _, data = link.partition(",")
    assert kind == "data:text/csv;charset=utf-8"
    return list(csv.reader(io.StringIO(unquote(data))))


def test_what_is_shown_is_escaped_and_in_its_place():
    evil = "<script>alert(1)</script>&\"'"
    page = Page(
        evil, evil, [
            Section(evil, [Table(evil, [evil], [[evil], [None], [1 / 3]], how=evil), Text(evil),
                           Text(evil, evil, code=True), Missing(evil, evil),
                           Download("x.csv", "text/csv", evil)]),
            Section("nothing in it", []),
        ], [evil],
    ).html()  # fmt: skip
    parsed = Parsed(page)
    assert not [tag for tag, _ in parsed.tags if tag == "script"]
    assert parsed.text.count(evil) == 15 and "nothing in it" not in page
    assert "0.333333" in parsed.text and numbers(page, "x.csv") == list(csv.reader([evil]))
    assert 'http-equiv="refresh"' not in page
    assert '<meta http-equiv="refresh" content="7">' in Page("", "", []).html(7)


def test_a_figure_has_a_unit_a_sentence_and_its_numbers():
    curves = {"one": ([1, 2, 3], [0.1, 0.2, 0.3]), "a, b": ([2], [0.5])}
    bands = {"one": ([1, 2, 3], [0.01, 0.02, 0.03])}
    picture = figures.lines("share", PANEL, curves, bands=bands)
    (axes,) = picture.figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "of all (%)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "a, b"]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]
    assert drawn == [([1, 2, 3], pytest.approx([10, 20, 30])), ([2], [50.0])]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(1.0, 9.0), (3.0, 33.0)} <= {(float(x), round(float(y), 9)) for x, y in corners}
    page = Page("t", "", [Section("s", [picture])]).html()
    assert numbers(page, "share.csv") == [
        ["epoch", "one: of all (%)", "one: of all (%), standard deviation", "a, b: of all (%)"],
        ["1", "10", "1", ""], ["2", "20", "2", "50"], ["3", "30", "3", ""],
    ]  # fmt: skip
    assert "Higher is better." in Parsed(page).text


def test_the_page_loads_nothing_and_repeats_no_id():
    pictures = [figures.lines(n, PANEL, {"": ([1, 2], [0.1, 0.2])}) for n in ("one", "two")]
    stacked = figures.stacked("three", "t", "h.", {"a": ([1, 2], [1.0, 2.0])}, "s")
    page = Page("t", "", [Section("s", [*pictures, stacked])]).html()
    parsed = Parsed(page)
    assert {link.partition(",")[0].partition("-")[0] for link in parsed.links()} <= {
        *("data:", "data:text/csv;charset=utf"), "#part", "#one", "#two", "#three",
    }  # fmt: skip
    ids = [of["id"] for _, of in parsed.tags if "id" in of]
    assert len(ids) == len(set(ids)) and {"one", "two", "three"} <= set(ids)
    assert {link[1:] for link in parsed.links() if link.startswith("#")} <= set(ids)
    assert "@import" not in page and "url(http" not in page


def test_colors_follow_the_page():
    picture = figures.lines("one", PANEL, {n: ([1, 2], [0.1, 0.2]) for n in "abcdefg"})
    svg = themed(picture)
    for color in (*figures.COLORS, figures.INK, figures.FAINT):
        assert color in picture.svg() and color not in svg
    assert {f"var(--{name})" in svg for name in ("c0", "c5", "ink", "faint")} == {True}
    assert "#000000" not in svg  # black text would vanish on a dark page
    assert svg.startswith('<svg role="img" aria-label="A share"')


def test_more_lines_than_a_legend_holds_are_told_apart():
    names = [f"run {n}" for n in range(20)]
    many = figures.lines("many", PANEL, {name: ([1, 2], [0.1, 0.2]) for name in names})
    (axes,) = many.figure.axes
    assert axes.get_legend() is None
    styles = [(line.get_color(), line.get_linestyle()) for line in axes.get_lines()]
    assert len(set(styles)) == 20
    legend = figures.legend(names)
    of_legend = [(line.get_color(), line.get_linestyle()) for line in legend.figure.axes[0].lines]
    assert of_legend == styles and [row[0] for row in legend.rows] == names


def test_figures_as_files(tmp_path):
    picture = figures.lines("one", PANEL, {"": ([1, 2], [0.1, 0.2])})
    before = picture.svg()
    picture.save(tmp_path)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "A share" in (tmp_path / "one.svg").read_text() and "A share" not in before
    with pytest.raises(InputError, match="cannot write"):
        picture.save(tmp_path / "one.png")


def test_the_confusion_matrix_is_scikit_learns():
    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 4, 200), draw.integers(0, 4, 200)
    found = count(labels, predicted, 4)
    assert (found == confusion_matrix(labels, predicted, labels=range(4))).all()
    labels[:50] = -1  # without a label
    wanted = confusion_matrix(labels[50:], predicted[50:], labels=range(4))
    assert (count(labels, predicted, 4) == wanted).all()
    picture = figures.confusion(found, [*"abcd"])
    assert sum(row[2] for row in picture.rows) == 200
    assert ("a", "b", int(found[0, 1])) in picture.rows
    for wrong in (predicted[:10], predicted + 1, predicted.astype(float)):
        with pytest.raises(InputError):
            count(labels, wrong, 4)
