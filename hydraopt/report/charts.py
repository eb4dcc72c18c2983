"""Charts, drawn without a display."""

from __future__ import annotations

import html
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hydraopt.adapters.similarity import Similarity
from hydraopt.atomic_files import write_atomically
from hydraopt.errors import HydraoptError
from hydraopt.merging.frontier import FrontierPoint


class PlotError(HydraoptError, ValueError):
    """A plot cannot be written in the asked form."""


_COLOURS = {"hydraopt": "#0b7285", "paper": "#e8590c", "separate": "#868e96", "two-sided": "#9c36b5"}
_DASHES = {"auto": ("-", "none"), 16: ("--", "6 4")}
"""Line styles of PNG and HTML by bits."""

Line = tuple[str, int | str]


def check_plot(file: Path) -> None:
    """Refuse a form nothing is drawn in.

    Raises:
        PlotError: Unless the name ends in ``.png`` or ``.html``.
    """
    if file.suffix not in {".png", ".html"}:
        raise PlotError(f"{file}: a plot is a .png or a .html file")


def plot_frontier(points: Sequence[FrontierPoint], file: Path) -> Path:
    """Draw error over storage, one line per method: ``.png``, or ``.html`` that needs nothing else.

    Raises:
        PlotError: If the file name ends otherwise.
    """
    check_plot(file)
    return _png(points, file) if file.suffix == ".png" else _html(points, file)


def _lines(points: Sequence[FrontierPoint]) -> dict[Line, list[FrontierPoint]]:
    lines: dict[Line, list[FrontierPoint]] = defaultdict(list)
    for point in points:
        lines[point.method, point.bits].append(point)
    return {key: sorted(line, key=lambda p: p.storage_ratio) for key, line in lines.items()}


def _label(line: Line) -> str:
    method, bits = line
    return f"{method}, bits {bits}" if bits == "auto" else f"{method}, {bits} bits"


def _png(points: Sequence[FrontierPoint], file: Path) -> Path:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for key, line in _lines(points).items():
        axes.plot(
            [100 * p.storage_ratio for p in line],
            [p.relative_error for p in line],
            marker="o",
            markersize=4,
            color=_COLOURS.get(key[0]),
            linestyle=_DASHES.get(key[1], ("-", ""))[0],
            label=_label(key),
        )
    axes.set(
        xlabel="storage, % of the adapters' bytes",
        ylabel="relative error |dW - merged| / |dW|",
        xlim=(0, None),
    )
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return write_atomically(file, buffer.getvalue())


def plot_similarity(found: Similarity, file: Path) -> Path:
    """Draw how much the tasks overlap on either side as heat maps: ``.png``, or ``.html`` that needs nothing else.

    Raises:
        PlotError: If the file name ends otherwise.
    """
    check_plot(file)
    size = max(4.0, 0.35 * len(found.tasks) + 2.5)
    figure = Figure(figsize=(2 * size, size), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (side, matrix) in enumerate((("A", found.a), ("B", found.b)), start=1):
        axes = figure.add_subplot(1, 2, place)
        image = axes.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"overlap of {side} (mean between tasks {found.mean(matrix):.2f})")
        axes.set_xticks(range(len(found.tasks)), found.tasks, rotation=90)
        axes.set_yticks(range(len(found.tasks)), found.tasks)
        if len(found.tasks) <= _MOST_NUMBERED:
            for (row, column), value in np.ndenumerate(matrix.numpy()):
                colour = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    buffer = io.BytesIO()
    if file.suffix == ".png":
        figure.savefig(buffer, format="png")
        return write_atomically(file, buffer.getvalue())
    figure.savefig(buffer, format="svg")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>similarity</title>{buffer.getvalue().decode()}'
    return write_atomically(file, page.encode())


_MOST_NUMBERED = 15
"""Tasks up to which the values stand in the cells."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 440, 60, 50


def _html(points: Sequence[FrontierPoint], file: Path) -> Path:
    widest = max(p.storage_ratio for p in points) * 1.05
    highest = max(max(p.relative_error for p in points) * 1.05, 1e-6)

    def place(point: FrontierPoint) -> tuple[float, float]:
        x = _LEFT + point.storage_ratio / widest * (_WIDTH - _LEFT - 10)
        y = (_HEIGHT - _BOTTOM) * (1 - point.relative_error / highest) + 5
        return round(x, 1), round(y, 1)

    shapes, legend = [], []
    for key, line in _lines(points).items():
        name, colour = html.escape(_label(key)), _COLOURS.get(key[0], "#333")
        path = " ".join(f"{x},{y}" for x, y in map(place, line))
        dashes = _DASHES.get(key[1], ("", "none"))[1]
        shapes.append(
            f'<g data-line="{name}"><polyline points="{path}" stroke="{colour}" stroke-dasharray="{dashes}"/>'
        )
        for point in line:
            x, y = place(point)
            label = (
                f"{_label(key)}: {100 * point.storage_ratio:.2f} % storage, error {point.relative_error:.4f} "
                f"(budget {point.budget:g})"
            )
            shapes.append(
                f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"><title>{html.escape(label)}</title></circle>'
            )
        shapes.append("</g>")
        legend.append(
            f'<label style="color:{colour}"><input type="checkbox" checked value="{name}"> {name}</label>'
        )
    for share in range(6):
        x = _LEFT + share / 5 * (_WIDTH - _LEFT - 10)
        y = (_HEIGHT - _BOTTOM) * (1 - share / 5) + 5
        shapes.append(
            f'<text x="{x}" y="{_HEIGHT - 28}" text-anchor="middle">{100 * widest * share / 5:.0f} %</text>'
        )
        shapes.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{highest * share / 5:.3f}</text>')
        shapes.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y}" y2="{y}"/>')
    data = json.dumps([vars(p) for p in points])
    page = _PAGE.format(
        width=_WIDTH, height=_HEIGHT, shapes="".join(shapes), legend=" ".join(legend), data=data
    )
    return write_atomically(file, page.encode())


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>hydraopt frontier</title>
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2rem; color: #212529; background: #fff }}
svg polyline {{ fill: none; stroke-width: 2 }} svg line {{ stroke: #dee2e6 }}
svg text {{ font-size: 12px; fill: #495057 }}
label {{ margin-right: 1.5em; font-weight: 600 }}
</style>
<h1>Error over storage</h1>
<p>Relative error |dW - merged| / |dW| over bundle bytes as a share of the adapters' bytes.
Point at a dot for its values.</p>
<p>{legend}</p>
<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{shapes}</svg>
<script type="application/json" id="points">{data}</script>
<script>
for (const box of document.querySelectorAll("input")) box.addEventListener("change", () => {{
  document.querySelector(`g[data-line="${{box.value}}"]`).style.display = box.checked ? "" : "none";
}});
</script></html>
"""
