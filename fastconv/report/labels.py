"""Where names stand beside their points, so that none covers another name or a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]
#: Points (1/72 inch) around a drawn point that stay free, between a name and its point, and between two names.
MARK, GAP, BETWEEN = 3.5, 1.5, 0.8
#: A name whose nearer end is farther from its point than this (in points) is tied to it by a line.
FAR = 7.0
FONT_SIZE = 6.5


def name_points(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name (x, y, name) at the free place nearest to its point. The axes' limits must be final."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    unit = figure.dpi / 72
    renderer = FigureCanvasAgg(figure).get_renderer()
    anchors = axes.transData.transform([(x, y) for x, y, _ in points]) / unit
    back = {"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"}  # no line strikes a name out
    style = {"textcoords": "offset points", "fontsize": FONT_SIZE, "va": "baseline", "zorder": 4, "bbox": back}
    names = [axes.annotate(name, (x, y), (0, 0), **style) for x, y, name in points]
    drawn = [name.get_window_extent(renderer) for name in names]  # at the point itself until it is moved
    sizes = np.array([(box.width, box.height) for box in drawn]) / unit
    inside = axes.get_window_extent(renderer).padded(-2 * unit)
    corners = free_places(anchors, sizes, inside.extents / unit)
    for name, box, corner, anchor, size in zip(names, drawn, corners, anchors, sizes, strict=True):
        shift = corner - np.array([box.x0, box.y0]) / unit
        name.set_position(tuple(shift))
        near = _nearer_end(anchor, corner, size)
        if np.hypot(*(near - anchor)) > FAR:
            axes.annotate(
                "", axes.transData.inverted().transform(near * unit),
                xytext=axes.transData.inverted().transform(anchor * unit),
                arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.5, "shrinkA": 2, "shrinkB": 0}, zorder=2,
            )  # fmt: skip


def free_places(anchors: Boxes, sizes: Boxes, frame: Boxes) -> Boxes:
    """Left lower corner of each name in the frame (left, bottom, right, top), one after another, the nearest free one.

    Free is what covers no point and no name placed before, and where there is such a place no line that ties one.
    Where nothing is free the nearest place is taken: more names than the frame has room for.
    """
    taken = [np.concatenate([anchors - MARK, anchors + MARK], axis=1)]
    ties = np.empty((0, 2))
    found = np.empty_like(anchors)
    # From the right, so that names at the edge get the little room that there is for them.
    for at in np.lexsort((-anchors[:, 1], -anchors[:, 0])):
        corners = _candidates(anchors[at], sizes[at], frame)
        boxes = np.concatenate([corners - BETWEEN, corners + sizes[at] + BETWEEN], axis=1)
        near = _nearer_end(anchors[at], corners, sizes[at])
        others = np.concatenate(taken)
        covered = _overlap(boxes, others).any(axis=1)
        lines = anchors[at] + np.linspace(0, 1, 12)[:, None, None] * (near - anchors[at])
        names_met = _inside(lines.reshape(-1, 2), others[len(anchors) :]).any(axis=1).reshape(12, -1).any(axis=0)
        crossed = _inside(ties, boxes).any(axis=0) | names_met
        distance = np.hypot(*(near - anchors[at]).T)
        best = int(np.argmin(distance + 1e3 * crossed + 1e6 * covered))
        found[at] = corners[best]
        taken.append(boxes[best : best + 1])
        ties = np.concatenate([ties, lines[:, best]])
    return found


def _nearer_end(anchor: Boxes, corners: Boxes, size: Boxes) -> Boxes:
    """Where a name begins or ends, at half its height: whichever is nearer to the point."""
    left, right = corners[..., 0], corners[..., 0] + size[0]
    x = np.where(np.abs(left - anchor[0]) <= np.abs(right - anchor[0]), left, right)
    return np.stack([x, corners[..., 1] + size[1] / 2], axis=-1)


def _candidates(anchor: Boxes, size: Boxes, frame: Boxes) -> Boxes:
    """Corners at which the name could stand: beside its point on either side, then anywhere in the frame."""
    right, left = anchor[0] + MARK + GAP, anchor[0] - MARK - GAP - size[0]
    above, below, middle = anchor[1] + MARK, anchor[1] - MARK - size[1], anchor[1] - size[1] / 2
    beside = [(x, y) for x in (right, left) for y in (above, middle, below)]
    xs = np.arange(frame[0], frame[2] - size[0], 4.0)
    ys = np.arange(frame[1], frame[3] - size[1], 3.0)
    anywhere = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    corners = np.concatenate([np.array(beside), anywhere])
    within = (corners >= frame[:2]).all(axis=1) & (corners + size <= frame[2:]).all(axis=1)
    return corners[within] if within.any() else corners


def _overlap(boxes: Boxes, others: Boxes) -> NDArray[np.bool_]:
    """Which boxes [n, 4] lie on which others [m, 4]."""
    a, b = boxes[:, None], others[None]
    return np.logical_and.reduce((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:]), axis=-1)


def _inside(points: Boxes, boxes: Boxes) -> NDArray[np.bool_]:
    """Which points [n, 2] lie in which boxes [m, 4]."""
    at = points[:, None]
    return np.logical_and.reduce((at > boxes[None, :, :2]) & (at < boxes[None, :, 2:]), axis=-1)
