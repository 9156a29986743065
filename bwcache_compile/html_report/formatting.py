"""Text for people: sizes, tensors, shares, and the lines of a graph's diff."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

FOLDED = 24
"""Lines of one run of a diff from which on it is folded."""


def count_text(count: int, word: str) -> str:
    """Print a number of things: `1 block`, `3,560 blocks`."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def shape_text(value: Mapping[str, Any]) -> str:
    """Print the shape and dtype of a value: `float32[1, 4]`; nothing where they are not known."""
    return "" if value["shape"] is None else f"{value['dtype']}[{', '.join(map(str, value['shape']))}]"


def number_text(value: Any) -> str:
    """Print a number to four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def decibels_text(value: Any) -> str:
    """Print a PSNR in dB; an infinite one is text already."""
    return f"{value:.1f} dB" if isinstance(value, (int, float)) else f"{value} dB"


def seconds_text(value: float) -> str:
    """Print a time with a unit."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"


def stack_runs(blocks: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cut blocks into those of one stack that follow one another; each gets its `place` among all."""
    placed = [{**block, "place": place} for place, block in enumerate(blocks)]
    return [list(members) for _, members in itertools.groupby(placed, key=lambda block: block["stack"])]


def diff_groups(text: str) -> list[dict[str, Any]]:
    """Cut a printed diff into what is laid out together: long runs of lines, which are folded, and what stands between them.

    Returns:
        For each group its `lines` in number, whether it is `folded` (and then its `ends`, the values that its first and its last line
        name), and its `runs`: the `sign` ("-" or "+") and the `text` of lines that follow one another. All runs together hold every
        line, in order.
    """
    groups: list[dict[str, Any]] = []
    for sign, found in itertools.groupby(text.splitlines()[1:], key=lambda line: line[:1]):
        lines = list(found)
        run = {"sign": sign, "text": "\n".join(lines) + "\n"}
        if len(lines) > FOLDED:
            ends = [lines[0][1:].partition(":")[0].strip(), lines[-1][1:].partition(":")[0].strip()]
            groups.append({"lines": len(lines), "folded": True, "ends": ends, "runs": [run]})
        elif groups and not groups[-1]["folded"]:
            groups[-1]["lines"] += len(lines)
            groups[-1]["runs"].append(run)
        else:
            groups.append({"lines": len(lines), "folded": False, "runs": [run]})
    return groups
