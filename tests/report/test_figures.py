"""Figures: SVG that a browser reads, with every name as text."""

from xml.etree import ElementTree as ET

import pytest

from aliprod.forecast.simulate import Span
from aliprod.report import figures
from aliprod.report.error_analysis import Bin, Size
from aliprod.report.figures import Course, Scale

HOSTILE = "<script>&\"'"
INTERVAL = {"top1_error": 0.1, "interval": [0.05, 0.2]}
DRAWN = {
    "gantt": figures.gantt(Course({HOSTILE: [Span(0, 5, 1)]}, {HOSTILE: [Span(0, 4, 1)], "b": [Span(4, 9, 2)]}, 5.0)),
    "errors": figures.errors([("ensemble", INTERVAL, None), (HOSTILE, INTERVAL, INTERVAL)]),
    "disagreement": figures.disagreement([HOSTILE, "b"], [[0, 0.25], [0.25, 0]]),
    "by_size": figures.by_size([Size(1, 9, 3, 0.0), Size(10, 10, 1, 0.0)]),
    "reliability": figures.reliability([Bin(3, 0.4, 0.0), Bin(1, 1.0, 1.0)]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_well_formed_and_says_what_it_shows(name: str) -> None:
    root = ET.fromstring(DRAWN[name])
    assert root.tag == "svg"
    assert root.get("aria-label")
    assert root.get("viewBox", "").startswith(f"0 0 {figures.WIDTH} ")
    words = [text.text for text in root.iter("text")]
    if name in ("gantt", "errors"):
        assert HOSTILE in words


def test_nothing_wrong_and_nothing_disagreed_upon_is_drawn_too() -> None:
    right = {"top1_error": 0.0, "interval": [0.0, 0.0]}
    for drawn in (figures.errors([("ensemble", right, None)]), figures.disagreement(["a", "b"], [[0, 0], [0, 0]])):
        assert "nan" not in drawn


@pytest.mark.parametrize(
    ("epochs", "ticks"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (12, [0, 5, 10]), (300, [0, 100, 200, 300])]
)
def test_epochs_are_told_in_whole_numbers(epochs: int, ticks: list[float]) -> None:
    assert Scale(epochs, 0, 1).ticks(least=1.0) == ticks


def test_a_scale_ends_where_it_should() -> None:
    scale = Scale(40, 100, 300)
    assert [scale(value) for value in (0, 20, 40)] == [100, 200, 300]
    assert scale.ticks() == [0, 10, 20, 30, 40]
