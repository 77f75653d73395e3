"""Figures as SVG and PNG with the run's id in both, and label placement. The same data give the same bytes.

Colors are those of Okabe and Ito (2008), distinguishable with any color vision; markers and line styles differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv.report.blocks import Figure
from fastconv.stats.units import rounded

Boxes = NDArray[np.float64]
#: In points (1/72 inch): free radius around a drawn point, gap between a label and its point, gap between two labels.
POINT_RADIUS_PT, LABEL_GAP_PT, LABEL_SPACING_PT = 3.5, 1.5, 0.8
#: A label whose nearer end is farther from its point than this (in points) gets a leader line.
LEADER_LINE_FROM_PT = 7.0
FONT_SIZE = 6.5
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"))
MORE_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#F0E442")
#: More points than this get no labels; the table below the figure lists them all.
MOST_LABELLED = 24
#: Longer curves are averaged in this many bins, which is all that the figure resolves.
MOST_POINTS = 160
#: Inches of a legend above the axes: height of a row, width of a line sample, width of a letter.
LEGEND_ROW, LEGEND_LINE, LEGEND_LETTER = 0.15, 0.5, 0.06
#: Inches of a letter of a row's name beside a grid of cells.
HEATMAP_LETTER = 0.075
DPI = 150
#: Share of the axis by which lines at the same places are set beside one another.
DODGE_SHARE = 0.02


def label_points(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each label (x, y, text) at the nearest free place to its point. The limits of `axes` must be final."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    unit = figure.dpi / 72
    renderer = FigureCanvasAgg(figure).get_renderer()
    anchors = axes.transData.transform([(x, y) for x, y, _ in points]) / unit
    # A white background, so that no line crosses the text.
    background = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"}
    style = {"textcoords": "offset points", "fontsize": FONT_SIZE, "va": "baseline", "zorder": 4, "bbox": background}
    names = [axes.annotate(name, (x, y), (0, 0), **style) for x, y, name in points]
    drawn = [name.get_window_extent(renderer) for name in names]  # placed at the point itself so far
    sizes = np.array([(box.width, box.height) for box in drawn]) / unit
    inside = axes.get_window_extent(renderer).padded(-2 * unit)
    corners = place_labels(anchors, sizes, inside.extents / unit)
    for name, box, corner, anchor, size in zip(names, drawn, corners, anchors, sizes, strict=True):
        shift = corner - np.array([box.x0, box.y0]) / unit
        name.set_position(tuple(shift))
        near = _nearer_end(anchor, corner, size)
        if np.hypot(*(near - anchor)) > LEADER_LINE_FROM_PT:
            axes.annotate(
                "", axes.transData.inverted().transform(near * unit),
                xytext=axes.transData.inverted().transform(anchor * unit),
                arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.5, "shrinkA": 2, "shrinkB": 0}, zorder=2,
            )  # fmt: skip


def place_labels(anchors: Boxes, sizes: Boxes, frame: Boxes) -> Boxes:
    """Greedy label placement: float64[n, 2] lower left corners in the frame (left, bottom, right, top), in points.

    `anchors`: float64[n, 2] points, `sizes`: float64[n, 2] label widths and heights. A place is free if it covers no
    point and no label placed before, and preferably no leader line. If none is free, the nearest is taken: the frame is
    too small for the labels. Not adjustText: with 24 labels at one point, or 21 points close together, that leaves
    overlaps and covered points, and its default time limit makes its output depend on the machine's speed.
    """
    taken = [np.concatenate([anchors - POINT_RADIUS_PT, anchors + POINT_RADIUS_PT], axis=1)]
    ties = np.empty((0, 2))
    corner_of = np.empty_like(anchors)
    # From the right, so that labels at the right edge are placed while there is space.
    for index in np.lexsort((-anchors[:, 1], -anchors[:, 0])):
        corners = _candidates(anchors[index], sizes[index], frame)
        boxes = np.concatenate([corners - LABEL_SPACING_PT, corners + sizes[index] + LABEL_SPACING_PT], axis=1)
        near = _nearer_end(anchors[index], corners, sizes[index])
        others = np.concatenate(taken)
        covered = _overlap(boxes, others).any(axis=1)
        lines = anchors[index] + np.linspace(0, 1, 12)[:, None, None] * (near - anchors[index])
        names_met = _inside(lines.reshape(-1, 2), others[len(anchors) :]).any(axis=1).reshape(12, -1).any(axis=0)
        crossed = _inside(ties, boxes).any(axis=0) | names_met
        distance = np.hypot(*(near - anchors[index]).T)
        best = int(np.argmin(distance + 1e3 * crossed + 1e6 * covered))
        corner_of[index] = corners[best]
        taken.append(boxes[best : best + 1])
        ties = np.concatenate([ties, lines[:, best]])
    return corner_of


def _nearer_end(anchor: Boxes, corners: Boxes, size: Boxes) -> Boxes:
    """The end of a label, at half its height, that is nearer to the point."""
    left, right = corners[..., 0], corners[..., 0] + size[0]
    x = np.where(np.abs(left - anchor[0]) <= np.abs(right - anchor[0]), left, right)
    return np.stack([x, corners[..., 1] + size[1] / 2], axis=-1)


def _candidates(anchor: Boxes, size: Boxes, frame: Boxes) -> Boxes:
    """Corners to try: beside the point on either side, then a grid over the frame."""
    right, left = anchor[0] + POINT_RADIUS_PT + LABEL_GAP_PT, anchor[0] - POINT_RADIUS_PT - LABEL_GAP_PT - size[0]
    above, below, middle = anchor[1] + POINT_RADIUS_PT, anchor[1] - POINT_RADIUS_PT - size[1], anchor[1] - size[1] / 2
    beside = [(x, y) for x in (right, left) for y in (above, middle, below)]
    xs = np.arange(frame[0], frame[2] - size[0], 4.0)
    ys = np.arange(frame[1], frame[3] - size[1], 3.0)
    anywhere = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    corners = np.concatenate([np.array(beside), anywhere])
    within = (corners >= frame[:2]).all(axis=1) & (corners + size <= frame[2:]).all(axis=1)
    return corners[within] if within.any() else corners


def _overlap(boxes: Boxes, others: Boxes) -> NDArray[np.bool_]:
    """Which of the boxes [n, 4] overlap which others [m, 4]: bool[n, m]."""
    a, b = boxes[:, None], others[None]
    return np.logical_and.reduce((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:]), axis=-1)


def _inside(points: Boxes, boxes: Boxes) -> NDArray[np.bool_]:
    """Which of the points [n, 2] lie in which boxes [m, 4]: bool[n, m]."""
    coordinates = points[:, None]
    return np.logical_and.reduce((coordinates > boxes[None, :, :2]) & (coordinates < boxes[None, :, 2:]), axis=-1)


@dataclass(frozen=True)
class Point:
    """A value at (x, y) with its interval (None if there is none), label and group."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    group: str = ""


def lines(
    figure_id: str, title: str, series: Mapping[str, Sequence[Point]], axes_labels: tuple[str, str], run: str,
    bounds: tuple[float, float] | None = None, size: tuple[float, float] = (3.6, 2.8),
) -> Figure:  # fmt: skip
    """One line with intervals per series, set beside one another so that no interval covers another's; `size` in inches."""
    figure, axes = _sheet(*size, above=0.5)
    ends = [point.x for points in series.values() for point in points]
    step = DODGE_SHARE * (max(ends, default=0.0) - min(ends, default=0.0))
    for index, ((name, points), (colour, marker, style)) in enumerate(zip(series.items(), STYLES, strict=False)):
        beside = step * (index - (len(series) - 1) / 2)
        ys = [point.y for point in points]
        errors = [
            [point.y - point.low if point.low is not None else 0.0 for point in points],
            [point.high - point.y if point.high is not None else 0.0 for point in points],
        ]
        axes.errorbar(
            [point.x + beside for point in points], ys, yerr=errors, label=name, color=colour, marker=marker, linestyle=style,
            capsize=3, linewidth=1.4, markersize=4.5,
        )  # fmt: skip
    axes.set_xticks(sorted({point.x for points in series.values() for point in points}))
    if bounds is not None:
        margin = 0.04 * (bounds[1] - bounds[0])
        axes.set_ylim(bounds[0] - margin, bounds[1] + margin)
        axes.set_yticks(np.linspace(*bounds, 5))
    _legend_above(figure, len(series))
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{rounded(point.y)} at {point.x:g}" for point in points)
        for name, points in series.items()
    )
    return _finish(figure, axes, figure_id, title, axes_labels, run, f"{title}. {axes_labels[1]}. {shown}.")


def curves(
    figure_id: str, title: str, series: Mapping[str, Sequence[float]], axes_labels: tuple[str, str], run: str
) -> Figure:
    """Loss over steps, one line per series; long series are averaged in bins."""
    columns, above = _room_above(list(series) if 1 < len(series) <= 8 else [], 3.6)
    figure, axes = _sheet(3.6, 2.7 + above, above=0.33 + above)
    colours = [style[0] for style in STYLES] + list(MORE_COLOURS)
    for index, (name, values) in enumerate(series.items()):
        xs, ys = _binned(values)
        axes.plot(
            xs, ys, label=name, color=colours[index % len(colours)], linestyle=STYLES[index % 4][2], linewidth=1.2,
            marker="o" if len(xs) == 1 else "", markersize=4,
        )  # fmt: skip
    _whole_steps(axes, max((len(values) for values in series.values()), default=1))
    if above:
        _legend_above(figure, columns)
    ends = "; ".join(
        f"{name}: {values[0]:.2f} to {values[-1]:.2f}" for name, values in list(series.items())[:8] if values
    )
    return _finish(figure, axes, figure_id, title, axes_labels, run, f"{title}. {ends}.")


def scatter(
    figure_id: str,
    title: str,
    points: Sequence[Point],
    axes_labels: tuple[str, str],
    run: str,
    *,
    diagonal: bool = False,
) -> Figure:
    """Labelled points, a color and a marker per group; with `diagonal` also the line of equality."""
    groups = list(dict.fromkeys(point.group for point in points))
    columns, above = _room_above(groups if any(groups) else [], 5.2)
    figure, axes = _sheet(5.2, 3.9 + above, above=0.33 + above)
    ends = [value for point in points for value in ((point.x, point.y) if diagonal else (point.x,))]
    axes.margins(0.12)
    for group, (colour, marker, _) in zip(groups, STYLES * 4, strict=False):
        group_points = [point for point in points if point.group == group]
        axes.scatter(
            [point.x for point in group_points], [point.y for point in group_points], color=colour, marker=marker, s=26, label=group,
            zorder=3,
        )  # fmt: skip
    if diagonal:
        axes.plot(
            [min(ends), max(ends)], [min(ends), max(ends)], color="#777777", linewidth=0.8, linestyle=":", zorder=1
        )
    axes.axhline(0, color="#777777", linewidth=0.6, zorder=1)
    if above:
        _legend_above(figure, columns)
    if len(points) <= MOST_LABELLED:
        label_points(figure, axes, [(point.x, point.y, point.label) for point in points])
    shown = "; ".join(f"{point.group} {point.label}: {rounded(point.x)}, {rounded(point.y)}" for point in points[:60])
    finished = _finish(figure, axes, figure_id, title, axes_labels, run, f"{title}. {shown}.")
    return replace(finished, keep_width=len(points) <= MOST_LABELLED)  # the labels are small already


def heatmap(
    figure_id: str, title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]], run: str, table: str = "findings",
) -> Figure:  # fmt: skip
    """A grid of cells with text, colored by value (-3 to 3, in thresholds); None is grey. The named table of the page has its values."""
    longest = max(len(line) for row in rows for line in row.split("\n"))
    left = max(2.1, HEATMAP_LETTER * longest + 0.15)
    width, height = left + 0.2 + 0.68 * len(columns), 1.5 + 0.34 * len(rows)
    figure, axes = _sheet(max(4.0, width), max(2.0, height), margins=False)
    shown = np.array([[np.nan if value is None else value for value in line] for line in values], dtype=float)
    # Purple to orange with white in the middle: distinguishable with any color vision, and light enough for black text.
    image = np.ma.masked_invalid(np.clip(shown, -3, 3) * 0.5)
    axes.imshow(image, cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto")
    axes.set_facecolor("#e6e6e6")
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color="black")
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows, fontsize=8.5)
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    total = figure.get_size_inches()
    figure.subplots_adjust(
        left=left / total[0], right=1 - 0.1 / total[0], top=1 - 0.35 / total[1], bottom=1.05 / total[1]
    )
    figure.suptitle(title, fontsize=9, x=0.02, y=1 - 0.06 / total[1], ha="left", va="top")
    alt = f"{title}; the table of {table} holds every value of it."
    return replace(_keep(figure, figure_id, title, run, alt), keep_width=True)


def _whole_steps(axes: Any, n_steps: int) -> None:
    """Put ticks at whole steps only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    if n_steps == 1:
        axes.set(xlim=(0, 2))


def _room_above(names: Sequence[str], width: float) -> tuple[int, float]:
    """Number of columns of a legend with these names on a sheet of this width, and the inches that its rows take."""
    longest = max((len(name) for name in names), default=0)
    columns = max(1, min(len(names), int(width / (LEGEND_LINE + LEGEND_LETTER * longest))))
    return columns, LEGEND_ROW * -(-len(names) // columns)


def _legend_above(figure: Any, n: int) -> None:
    """Put the legend between title and axes, where it covers no point."""
    figure.legend(
        fontsize=7, frameon=False, ncols=n, loc="upper center", handlelength=2.4, columnspacing=1.2,
        bbox_to_anchor=(0.55, 1 - 0.2 / figure.get_size_inches()[1]),
    )  # fmt: skip


def _sheet(width: float, height: float, *, margins: bool = True, above: float = 0.33) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Sheet  # slow to import

    figure = Sheet(figsize=(width, height))
    axes = figure.add_subplot(1, 1, 1)
    if margins:
        figure.subplots_adjust(left=0.62 / width, right=1 - 0.12 / width, top=1 - above / height, bottom=0.52 / height)
    return figure, axes


def _finish(
    figure: Any, axes: Any, figure_id: str, title: str, axes_labels: tuple[str, str], run: str, alt: str
) -> Figure:
    figure.suptitle(title, fontsize=8.5, y=1 - 0.06 / figure.get_size_inches()[1], va="top")
    axes.set_xlabel(axes_labels[0], fontsize=8)
    axes.set_ylabel(axes_labels[1], fontsize=8)
    axes.tick_params(labelsize=7.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _keep(figure, figure_id, title, run, alt)


def _keep(figure: Any, figure_id: str, title: str, run: str, alt: str) -> Figure:
    from matplotlib import rc_context

    figure.text(0.995, 0.008, run, fontsize=5, color="#777777", ha="right", va="bottom")
    svg, png = io.BytesIO(), io.BytesIO()
    with rc_context({"svg.hashsalt": "fastconv", "svg.fonttype": "none"}):
        figure.savefig(svg, format="svg", metadata={"Title": f"{run}: {title}", "Date": None})
    figure.savefig(png, format="png", dpi=DPI, metadata={"Title": f"{run}: {title}", "Software": "fastconv"})
    return Figure(figure_id, title, alt, svg.getvalue(), png.getvalue(), round(96 * figure.get_size_inches()[0]))


def _binned(values: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(values) <= MOST_POINTS:
        return [float(step) for step in range(1, len(values) + 1)], list(values)
    parts = np.array_split(np.asarray(values, dtype=float), MOST_POINTS)
    ends = np.cumsum([len(part) for part in parts])
    return [float(end) for end in ends], [float(part.mean()) for part in parts]
