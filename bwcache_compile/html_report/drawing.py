"""Drawings as data: rectangles, lines and text at places, which the template writes as SVG."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class Drawing:
    """A drawing, grown shape by shape. Lengths are in CSS pixels; y grows downwards.

    Attributes:
        title: Its name for those who do not see it.
        description: What it shows, in words.
        width: Of the canvas.
        height: Of the canvas.
        shapes: What is drawn, each with a `kind` and a `style`, the name of a class of the style sheet.
    """

    title: str
    description: str
    width: float
    height: float
    shapes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, style: str, hint: str = "", radius: float = 0) -> None:
        """Draw a rectangle; `hint` is shown while the pointer rests on it."""
        self._add("rect", style, x=x, y=y, width=width, height=height, radius=radius, hint=hint)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draw a line through points."""
        self._add("line", style, points=" ".join(f"{round(x, 1):g},{round(y, 1):g}" for x, y in points))

    def dot(self, x: float, y: float, style: str, hint: str = "", radius: float = 4) -> None:
        """Draw a filled circle."""
        self._add("dot", style, x=x, y=y, radius=radius, hint=hint)

    def text(self, x: float, y: float, text: object, style: str = "label", anchor: str = "start") -> None:
        """Write text from a point on its base line."""
        self._add("text", style, x=x, y=y, text=str(text), anchor=anchor)

    def arrow(self, x: float, top: float, bottom: float, style: str = "flow") -> None:
        """Draw an arrow downwards."""
        self.line([(x, top), (x, bottom)], style)
        self.line([(x - 4, bottom - 5), (x, bottom), (x + 4, bottom - 5)], style)

    def _add(self, kind: str, style: str, **values: Any) -> None:
        rounded = {name: round(value, 1) if isinstance(value, float) else value for name, value in values.items()}
        self.shapes.append({"kind": kind, "style": style, **rounded})


def shortened(text: str, length: int) -> str:
    """Cut the middle out of a text that is longer than this."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
