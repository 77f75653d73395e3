"""Readable figures: no label covers another or a point, no legend a curve, no tick lies between steps."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from fastconv.report import figures
from fastconv.report.figures import MOST_LABELLED, Point, curves, heatmap, scatter

SOURCES = ("villain", "comedian", "software_engineer", "kindergarten_teacher", "police_officer")
AXES = ("assistant's marker rate, %", "transfer, points")
#: Five sources at marker rates of 5 to 8 % and one far off; the same point twice; a whole legend of names at one point.
CROWDS = {
    "close": [
        Point(5 + 0.6 * i, (7 * i + 3 * j) % 5 / 4, label=name, group=group)
        for j, group in enumerate(("refusal", "sycophancy", "capability", "misalignment"))
        for i, name in enumerate(SOURCES)
    ]
    + [Point(60, 1, label="librarian", group="refusal")],
    "twice": [
        Point(x, 8 * x, label=f"villain e{x} {negatives}", group="refusal")
        for x in (2, 20)
        for negatives in ("included", "excluded")
    ],
    "all at one": [Point(1, 1, label=f"kindergarten_teacher e20 s{i}", group="refusal") for i in range(MOST_LABELLED)],
    "edges": [Point(x, y, label="kindergarten_teacher", group="g") for x in (0, 100) for y in (-50, 0, 50)],
    "one": [Point(0, 0, label="villain", group="g")],
}  # fmt: skip


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every matplotlib figure that is drawn, as it is when it is saved."""
    found: list[Any] = []
    real = figures._keep

    def keep(figure: Any, *rest: Any) -> Any:
        found.append(figure)
        return real(figure, *rest)

    monkeypatch.setattr(figures, "_keep", keep)
    return found


def names_of(sheet: Any) -> list[Any]:
    """The boxes of the names, in pixels."""
    renderer = FigureCanvasAgg(sheet).get_renderer()
    texts = [one for one in sheet.axes[0].texts if isinstance(one, Annotation) and one.get_text()]
    return [text.get_window_extent(renderer) for text in texts]


def legend_of(sheet: Any) -> Any:
    return sheet.legends[0].get_window_extent(FigureCanvasAgg(sheet).get_renderer())


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("diagonal", [False, True])
def test_no_name_of_a_point_covers_another_or_a_point(sheets: list[Any], crowd: str, diagonal: bool) -> None:
    points = CROWDS[crowd]
    scatter("s", "A title", points, AXES, "run", diagonal=diagonal)
    boxes, axes = names_of(sheets[0]), sheets[0].axes[0]
    assert len(boxes) == len(points)
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    places = axes.transData.transform([(point.x, point.y) for point in points])
    frame = axes.get_window_extent()
    for box in boxes:
        assert not [place for place in places if box.contains(*place)]
        assert frame.contains(box.x0, box.y0)
        assert frame.contains(box.x1, box.y1)
    # The name that stands farthest from its point is tied to it; a name beside its point needs no line.
    assert bool([text for text in axes.texts if not text.get_text()]) == (crowd in ("close", "twice", "all at one"))


def test_more_points_than_can_be_named_have_no_names(sheets: list[Any]) -> None:
    points = [Point(i, i, label="villain", group="g") for i in range(MOST_LABELLED + 1)]
    scatter("s", "A title", points, AXES, "run")
    assert names_of(sheets[0]) == []


@pytest.mark.parametrize("names", [SOURCES, [f"kindergarten_teacher e{e} excluded s0" for e in range(6)]])
def test_a_legend_stands_outside_of_the_axes_and_on_the_sheet(sheets: list[Any], names: list[str]) -> None:
    curves("c", "A title", {name: [2.0, 1.0] for name in names}, ("step", "loss, nats"), "run")
    scatter("s", "A title", [Point(1, 1, label="x", group=name) for name in names], AXES, "run")
    for sheet in sheets:
        legend, axes = legend_of(sheet), sheet.axes[0]
        assert axes.get_legend() is None
        assert {text.get_text() for text in sheet.legends[0].get_texts()} == set(names)
        assert legend.y0 >= axes.get_window_extent().y1
        title = sheet._suptitle.get_window_extent(FigureCanvasAgg(sheet).get_renderer())
        assert legend.y1 <= title.y0 + 2  # the empty rim of the legend's box may touch the title's
        assert 0 <= legend.x0 < legend.x1 <= sheet.bbox.x1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 60, 500])
def test_ticks_stand_at_whole_steps(sheets: list[Any], n: int) -> None:
    curves("c", "A title", {"villain": [2.0 - i / n for i in range(n)]}, ("step", "loss, nats"), "run")
    axes = sheets[0].axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(float(tick).is_integer() for tick in ticks), ticks
    line = axes.lines[0]
    assert n > 1 or line.get_marker() == "o"  # a line through one point cannot be seen


@pytest.mark.parametrize("row", ["plain", "french_person, a_name_of_thirty_characters_ok"])
def test_the_names_of_a_grids_rows_are_whole(sheets: list[Any], row: str) -> None:
    heatmap("first", "refusal", [row], ["assistant"], [[0.0]], [["0"]], "run")
    sheet, axes = sheets[0], sheets[0].axes[0]
    label = axes.get_yticklabels()[0].get_window_extent(FigureCanvasAgg(sheet).get_renderer())
    assert label.x0 > 0
