"""Which values a bundle's dynamic sizes may have, and the shapes that follow from them. Needs no torch and no runtime."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.call import constraint_violated, graph_shape
from bwcache_compile.bundle.manifest import Manifest, Size
from bwcache_compile.errors import ConfigError
from bwcache_compile.graph_io import cache_in

Range = tuple[int, int, int]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Of each input with a dynamic size: its smallest, usual and largest shape."""


def _holding(manifest: Manifest, values: Mapping[str, int]) -> str:
    """Return the first condition of the graphs that these sizes break; empty if none."""
    return next((condition for condition in manifest.conditions if not arithmetic(condition, values)), "")


def _default(manifest: Manifest, name: str, known: Mapping[str, int]) -> Range:
    """Return from half to twice the captured size, as far as the graphs hold there."""
    example = known[name]

    def fitting(sizes: range) -> int:
        return next((size for size in sizes if not _holding(manifest, {**known, name: size})), example)

    return fitting(range(max(1, example // 2), example)), example, fitting(range(2 * example, example, -1))


def symbol_ranges(manifest: Manifest, sizes: Mapping[str, Range]) -> dict[str, Range]:
    """Return the range of every symbol that sizes are written in; see `profile`.

    Raises:
        ConfigError: A size is unknown or out of order, or the graphs do not hold there.
    """
    known = {symbol.name: symbol.example for symbol in manifest.symbols}
    places = {symbol.place: symbol for symbol in manifest.symbols}
    unknown = sorted(set(sizes) - set(places))
    if unknown:
        raise ConfigError(f"unknown dynamic sizes: {', '.join(unknown)}. This bundle has {', '.join(places) or 'none'}.")
    ranges: dict[str, Range] = {}
    for place, symbol in places.items():
        low, usual, high = sizes.get(place, (0, 0, 0))
        if place in sizes and not 0 < low <= usual <= high:
            raise ConfigError(f"{place} must be (smallest, usual, largest), got {sizes[place]}.")
        name, offset, factor = symbol.name, symbol.offset, symbol.factor
        given = ((low - offset) // factor, (usual - offset) // factor, (high - offset) // factor)
        ranges[name] = given if place in sizes else _default(manifest, name, known)
    for i, word in enumerate(("smallest", "usual", "largest")):
        at = {name: sizes_of[i] for name, sizes_of in ranges.items()}
        broken = _holding(manifest, at)
        if broken:
            raise ConfigError(f"{word} sizes: {constraint_violated(manifest, broken, at)}")
    return ranges


def symbols_at(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the value of every symbol where dynamic sizes have these values, or the captured ones.

    Args:
        manifest: Of a bundle.
        sizes: Of a dynamic size, by the input and dimension that it is read from (`"x[1]"`).

    Raises:
        ConfigError: A size is unknown, or the graphs do not hold there.
    """
    captured = {symbol.place: symbol.factor * symbol.example + symbol.offset for symbol in manifest.symbols}
    ranges = symbol_ranges(manifest, {place: (size, size, size) for place, size in {**captured, **sizes}.items()})
    return {symbol: ends[0] for symbol, ends in ranges.items()}


def profile(manifest: Manifest, kind: str, sizes: Mapping[str, Range] | None = None) -> Shapes:
    """Return the shapes between which a graph's inputs may vary, the cache's included; empty where all sizes are fixed.

    Args:
        manifest: Of a bundle.
        kind: `compute`, `reuse` or `guarded`.
        sizes: Of a dynamic size, by the input and dimension that it is read from (`"x[1]"`): smallest, usual, largest. One
            that is not named goes from half to twice what was captured.

    Raises:
        ConfigError: A size is unknown or out of order, or the graphs do not hold there.
    """
    ranges = symbol_ranges(manifest, sizes or {})
    declared: dict[str, Sequence[Size]] = {entry.name: graph_shape(entry) for entry in manifest.inputs}
    declared |= {cache_in(slot.name): slot.shape for slot in manifest.slots}
    corners = [dict(zip(ranges, corner, strict=True)) for corner in itertools.product(*((r[0], r[2]) for r in ranges.values()))]
    usual = {name: r[1] for name, r in ranges.items()}
    shapes: Shapes = {}
    for name in manifest.graphs[kind].inputs:
        shape = declared.get(name, [])
        if any(isinstance(size, str) for size in shape):
            found = [[arithmetic(size, corner) for corner in corners] for size in shape]
            shapes[name] = (tuple(map(min, found)), tuple(arithmetic(size, usual) for size in shape), tuple(map(max, found)))
    return shapes
