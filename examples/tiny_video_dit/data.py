"""Procedural videos: textured shapes in colour that move, bounce off the walls and occlude one another.

Every clip has `OBJECTS` shapes. The condition says, one token per shape, what it looks like, in which ninth of the frame
it starts, which way it heads and what it is in front of. Where exactly it starts, how fast it moves along each axis, and
the backdrop are left to chance, so the model has to invent them and to keep the motion lawful.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

FRAMES, SIZE, OBJECTS = 8, 32, 3
KINDS = ("disc", "square", "triangle", "ring")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
TEXTURES = ("plain", "striped")
SIZES = ("small", "large")
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
HEADINGS = ("up left", "up right", "down left", "down right")
ATTRIBUTES = (KINDS, COLOURS, TEXTURES, SIZES, PLACES, HEADINGS)
SPEEDS = (1.0, 2.5)
STEEPEST = 0.3
TOKEN_WIDTH = sum(len(names) for names in ATTRIBUTES) + OBJECTS + 1
"""Width of one condition token: one-hot vectors of each attribute and of the depth, and a flag that the shape is there."""

_RGB = torch.tensor([[0.95, 0.2, 0.2], [0.2, 0.85, 0.3], [0.25, 0.4, 1.0], [0.95, 0.85, 0.2], [0.9, 0.3, 0.9], [0.2, 0.9, 0.9]])
_RADIUS = torch.tensor([5.0, 7.5])


def encode(attributes: Tensor) -> Tensor:
    """Turn attribute indices int64[B, OBJECTS, 6] into condition tokens float32[B, OBJECTS, TOKEN_WIDTH].

    The unconditional token, used for classifier-free guidance, is all zeros.
    """
    hot = [torch.nn.functional.one_hot(attributes[..., i], len(names)) for i, names in enumerate(ATTRIBUTES)]
    depth = torch.eye(OBJECTS, dtype=attributes.dtype).expand(len(attributes), -1, -1)
    return torch.cat([*hot, depth, torch.ones_like(attributes[..., :1])], dim=-1).float()


def describe(attributes: Tensor) -> str:
    """Describe one clip's attributes int64[OBJECTS, 6] in words, from back to front."""

    def words(row: Tensor) -> str:
        kind, colour, texture, size, place, heading = (names[int(i)] for names, i in zip(ATTRIBUTES, row, strict=True))
        return f"{size} {texture} {colour} {kind} from the {place} {heading}"

    return ", ".join(words(row) for row in attributes)


def draw_attributes(batch: int, generator: torch.Generator) -> Tensor:
    """Draw attribute indices int64[batch, OBJECTS, 6], uniformly, in the order of `ATTRIBUTES`."""
    columns = [torch.randint(len(names), (batch, OBJECTS), generator=generator) for names in ATTRIBUTES]
    return torch.stack(columns, dim=-1)


def _bounce(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Reflect free-flight positions into [low, high], as elastic walls would."""
    span = high - low
    folded = (position - low) % (2 * span)
    return low + torch.where(folded > span, 2 * span - folded, folded)


def _distance(kind: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to each shape's edge, negative inside."""
    disc = (dx**2 + dy**2).sqrt() - radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius
    triangle = torch.maximum(dx.abs() * 0.87 + dy * 0.5, -dy) - 0.55 * radius
    ring = (disc + 0.25 * radius).abs() - 0.25 * radius
    return torch.stack([disc, square, triangle, ring]).gather(0, kind.expand_as(dx)[None])[0]


def paint(attributes: Tensor, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Paint each shape on pixels at given offsets from its center.

    Args:
        attributes: int64[B, OBJECTS, 6].
        dx: Horizontal offsets in pixels, float32[B, OBJECTS, F, H, W], or broadcastable to that.
        dy: Vertical offsets.

    Returns:
        How much of each pixel the shape covers, float32[B, OBJECTS, F, H, W], and its color there, float32[B, OBJECTS, F, 3, H, W].
    """
    kind, colour, texture, size = (attributes[..., i, None, None, None] for i in range(4))
    dx, dy = torch.broadcast_tensors(dx, dy)
    coverage = (0.5 - _distance(kind, dx, dy, _RADIUS[size])).clamp(0, 1)
    dark = (texture == 1) & (((dx + dy) / 2.2).sin() > 0)
    shade = torch.where(dark, 0.35, 1.0)
    return coverage, _RGB[colour[..., 0, 0, 0]][:, :, None, :, None, None] * shade[:, :, :, None]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the attributes leave open.

    Attributes:
        start: Where in its ninth of the frame each shape starts, float32[B, OBJECTS, 2] in [0, 1]: horizontal, vertical.
        speed: Pixels per frame along each axis, float32[B, OBJECTS, 2] in `SPEEDS`.
        slope: How fast each color of the backdrop grows from top to bottom, float32[B, 3] in [0, `STEEPEST`].
    """

    start: Tensor
    speed: Tensor
    slope: Tensor


def draw_scene(batch: int, generator: torch.Generator) -> Scene:
    """Draw what the attributes leave open, uniformly."""
    x_start, x_speed, y_start, y_speed = (torch.rand(batch, OBJECTS, generator=generator) for _ in range(4))
    speed = torch.stack([x_speed, y_speed], -1)
    slope = torch.rand(batch, 3, generator=generator)
    return Scene(torch.stack([x_start, y_start], -1), SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * speed, slope * STEEPEST)


def centers(attributes: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the horizontal and the vertical position of each shape's center, float32[B, OBJECTS, FRAMES] each."""
    radius = _RADIUS[attributes[..., 3, None]]
    low, high = radius, SIZE - radius
    place, heading = attributes[..., 4, None], attributes[..., 5, None]
    time = torch.arange(FRAMES).float()

    def flight(cell: Tensor, forward: Tensor, axis: int) -> Tensor:
        start = low + (high - low) * (cell + scene.start[..., axis, None]) / 3
        return _bounce(start + scene.speed[..., axis, None] * (2 * forward - 1) * time, low, high)

    return flight(place % 3, heading % 2, 0), flight(place // 3, heading // 2, 1)


def draw(attributes: Tensor, scene: Scene) -> Tensor:
    """Draw one clip per row of `attributes`, int64[B, OBJECTS, 6], as float32[B, 3, FRAMES, SIZE, SIZE] in [-1, 1]."""
    batch = attributes.shape[0]
    pixel = torch.arange(SIZE) + 0.5
    x, y = (axis[..., None, None] for axis in centers(attributes, scene))
    coverage, paints = paint(attributes, pixel - x, pixel[:, None] - y)
    ramp = (pixel / SIZE).view(1, 1, 1, SIZE, 1).expand(-1, -1, -1, -1, SIZE)
    clip = (scene.slope[:, None, :, None, None] * ramp).expand(batch, FRAMES, 3, SIZE, SIZE)
    for i in range(OBJECTS):  # later shapes are in front
        clip = torch.lerp(clip, paints[:, i], coverage[:, i, :, None].expand_as(clip))
    return clip.transpose(1, 2) * 2 - 1


def render(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one clip per row of `attributes`.

    Args:
        attributes: int64[B, OBJECTS, 6].
        generator: Draws exact positions, speeds and backdrops.

    Returns:
        float32[B, 3, FRAMES, SIZE, SIZE] in [-1, 1].
    """
    return draw(attributes, draw_scene(len(attributes), generator))
