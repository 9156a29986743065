"""Draw what a run did: its schedule, the indicator per block and step, its mean per step; and the frontier of a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bwcache_compile.html_report.drawing import Drawing, shortened
from bwcache_compile.html_report.formatting import count_text, number_text

Place = Callable[[float, float], tuple[float, float]]
"""From values to a place in a drawing."""

LEVELS = 9
"""Shades of a heat map."""

_CELL = 16
"""Width of a step."""
_NAMES = 132
"""Room for names to the left of the steps."""


def _steps_axis(drawing: Drawing, y: float, steps: Sequence[int]) -> None:
    """Number every fifth step."""
    for i, step in enumerate(steps):
        if step % 5 == 0:
            drawing.text(_NAMES + i * _CELL + _CELL / 2, y, step, "tiny", "middle")


def _width(steps: Sequence[Any]) -> float:
    return _NAMES + max(len(steps), 8) * _CELL + 8


def schedule(name: str, context: dict[str, Any], anchors: int) -> Drawing:
    """Draw the steps of a context as a strip, and below each reused one the weights of the anchors, where they are known."""
    steps, weights = context["steps"], context["weights"]
    rows = anchors if weights else 0
    description = (
        f"{count_text(context['computed'], 'step')} computed: {ranges([s['step'] for s in steps if s['computed']])}."
        f" {context['reused']} reused: {ranges([s['step'] for s in steps if not s['computed']])}."
    )
    drawing = Drawing(f"Schedule of context {name}", description, _width(steps), 46 + rows * _CELL)
    drawing.text(_NAMES - 8, 14, "steps", "label", "end")
    for i, step in enumerate(steps):
        partly = step["computed"] and not all(step["blocks_computed"])
        kind = "partly" if partly else "computed" if step["computed"] else "reused"
        done = "some blocks computed" if partly else kind
        drawing.rect(_NAMES + i * _CELL + 1, 2, _CELL - 2, 18, kind, f"step {step['step']}: {done}", radius=3)
    for row in range(rows):
        y = 26 + row * _CELL
        drawing.text(_NAMES - 8, y + 11, "newest anchor" if row == 0 else f"anchor {row + 1}", "small", "end")
        for i, step in enumerate(steps):
            weight = weights.get(str(step["step"]))
            if weight is not None:
                style = f"{'plus' if weight[row] >= 0 else 'minus'} s{_shade(abs(weight[row]))}"
                hint = f"step {step['step']}, anchor {row + 1}: {number_text(weight[row])}"
                drawing.rect(_NAMES + i * _CELL + 2, y, _CELL - 4, _CELL - 3, style, hint, radius=2)
    _steps_axis(drawing, 40 + rows * _CELL, [step["step"] for step in steps])
    return drawing


def _shade(weight: float) -> int:
    """Return how strongly a weight is drawn, 0 to 8; 1 and more fully, by its square root, as small weights matter too."""
    return min(LEVELS - 1, round(math.sqrt(weight) * (LEVELS - 1)))


def ranges(numbers: Sequence[int]) -> str:
    """Print numbers with runs of neighbors joined: `0 to 3, 7`; "none" if there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"


def finite(values: Sequence[Any]) -> list[float]:
    """Return those that are numbers; infinite ones and NaN are text already."""
    return [value for value in values if isinstance(value, float)]


def heat_bounds(run: dict[str, Any]) -> tuple[float, float] | None:
    """Return the changes between which all heat maps of a run are shaded, zeros left out; None if nothing was measured."""
    values = finite([v for context in run["contexts"].values() for step in context["steps"] for v in step["change"] or ()])
    above = [value for value in values if value > 0] or [0.0]
    return (min(above), max(above)) if values else None


def heat_level(value: float, bounds: tuple[float, float]) -> int:
    """Return the shade of a change, 0 to 8, by its logarithm."""
    low, high = bounds
    if value <= low or high <= low:
        return 0
    return min(LEVELS - 1, int(math.log(value / low) / math.log(high / low) * LEVELS))


def heat_map(name: str, context: dict[str, Any], blocks: Sequence[str], bounds: tuple[float, float]) -> Drawing:
    """Draw the change of each measured block at each step; steps without a value are left out or outlined."""
    steps = context["steps"]
    cell = 12 if len(blocks) > 20 else _CELL
    drawing = Drawing(f"Indicator by block and step, context {name}", _heat_description(context, blocks), _width(steps), 0)
    for row, block in enumerate(blocks):
        if cell == _CELL or row % 2 == 0 or row == len(blocks) - 1:
            drawing.text(_NAMES - 8, row * cell + cell - 3, shortened(block, 20), "small", "end")
        for i, step in enumerate(steps):
            x, y = _NAMES + i * _CELL + 1, row * cell + 1
            value = step["change"][row] if step["change"] else None
            if step["blocks_computed"] and not step["blocks_computed"][row]:
                continue
            if isinstance(value, float):
                hint = f"{block}, step {step['step']}: {number_text(value)}"
                drawing.rect(x, y, _CELL - 2, cell - 2, f"heat s{heat_level(value, bounds)}", hint, radius=2)
            elif step["computed"]:
                hint = f"step {step['step']}: {'computed, nothing to compare with' if value is None else value}"
                drawing.rect(x, y, _CELL - 2, cell - 2, "empty", hint, radius=2)
    _steps_axis(drawing, len(blocks) * cell + 14, [step["step"] for step in steps])
    drawing.height = len(blocks) * cell + 22
    return drawing


def _heat_description(context: dict[str, Any], blocks: Sequence[str]) -> str:
    rows = [(step["step"], block, value) for step in context["steps"] for block, value in zip(blocks, step["change"] or (), strict=False)]
    measured = [row for row in rows if finite([row[2]])]
    if not measured:
        return "No change was measured."
    low, high = min(measured, key=lambda row: row[2]), max(measured, key=lambda row: row[2])
    return (
        f"The smallest change is {number_text(low[2])}, of {low[1]} at step {low[0]}; the largest is {number_text(high[2])},"
        f" of {high[1]} at step {high[0]}. The values are in the table below."
    )


def curve(run: dict[str, Any], threshold: float | None) -> Drawing | None:
    """Draw the mean change per step of each context, with the threshold where there is one; None if fewer than two were measured."""
    lines = {
        name: [(step["step"], step["indicator"]) for step in context["steps"] if finite([step["indicator"]])]
        for name, context in run["contexts"].items()
    }
    values = [value for points in lines.values() for _, value in points]
    if max((len(points) for points in lines.values()), default=0) < 2:
        return None
    last = max(step["step"] for context in run["contexts"].values() for step in context["steps"])
    top = max([*values, *([threshold] if threshold is not None and threshold <= 3 * max(values) else [])]) * 1.1
    drawing = Drawing("Mean change per step", "", 480, 200)
    place = _axes(drawing, (0, last), (0, top or 1.0), "step", "change")
    if threshold is not None and 0 < threshold <= top:
        drawing.line([place(0, threshold), place(last, threshold)], "threshold")
        x, y = place(last, threshold)
        drawing.text(x, y - 5, f"threshold {number_text(threshold)}", "small", "end")
    for i, (name, points) in enumerate(lines.items()):
        drawing.line([place(*point) for point in points], f"series c{i % 4}")
        for step, value in points:
            drawing.dot(*place(step, value), f"series c{i % 4}", f"{name}, step {step}: {number_text(value)}", 2.5)
    low = min((value, step, name) for name, points in lines.items() for step, value in points)
    drawing.description = f"Between {number_text(low[0])} (context {low[2]}, step {low[1]}) and {number_text(max(values))}."
    return drawing


def frontier(data: dict[str, Any]) -> Drawing:
    """Draw the PSNR of each entry of a calibration over its computed steps, and that of plain runs with as many steps."""
    entries = data["entries"]
    plain = [(entry["computed"], entry["fewer_steps_psnr"]) for entry in entries if entry["fewer_steps_psnr"] is not None]
    cached = [(entry["computed"], entry["psnr"]) for entry in entries if isinstance(entry["psnr"], float)]
    values = [psnr for _, psnr in (*cached, *plain) if isinstance(psnr, float)] or [0.0]
    margin = max(1.0, (max(values) - min(values)) * 0.1)
    drawing = Drawing("Frontier of the calibration", "PSNR over computed steps; the table below has the same values.", 480, 220)
    place = _axes(drawing, (0, data["steps"]), (max(0.0, min(values) - margin), max(values) + margin), "computed steps", "PSNR, dB")
    for name, points, style in (("calibrated", cached, "series c0"), ("fewer steps", plain, "series c1")):
        if points:
            drawing.line([place(*point) for point in points], style)
        for computed, psnr in points:
            drawing.dot(*place(computed, psnr), style, f"{name}: {computed} computed steps, {psnr:.1f} dB")
    return drawing


def ticks(low: float, high: float) -> list[float]:
    """Return between two and ten round numbers from one number to another."""
    rough = max((high - low) / 8, 1e-12)
    unit = 10 ** math.floor(math.log10(rough))
    stride = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [i * stride for i in range(math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9) + 1)]


def _axes(drawing: Drawing, across: tuple[float, float], up: tuple[float, float], x_name: str, y_name: str) -> Place:
    """Draw axes with numbers, and return the function from values to places."""
    left, right, top, bottom = 52, drawing.width - 12, 22, drawing.height - 34

    def place(x: float, y: float) -> tuple[float, float]:
        width, height = max(across[1] - across[0], 1e-9), max(up[1] - up[0], 1e-12)
        return left + (x - across[0]) / width * (right - left), bottom - (y - up[0]) / height * (bottom - top)

    for value in ticks(*up):
        _, y = place(across[0], value)
        drawing.line([(left, y), (right, y)], "grid")
        drawing.text(left - 6, y + 4, f"{value:.4g}", "tiny", "end")
    for step in ticks(*across):
        drawing.text(place(step, up[0])[0], bottom + 14, f"{step:g}", "tiny", "middle")
    drawing.text(right, drawing.height - 4, x_name, "small", "end")
    drawing.text(4, 12, y_name, "small")
    return place
