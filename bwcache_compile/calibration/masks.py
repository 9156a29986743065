"""Families of masks: which steps of a generation are computed, for an exact number of them."""

from __future__ import annotations

from collections.abc import Sequence

from bwcache_compile.errors import ConfigError

Mask = tuple[bool, ...]
"""For each step, whether it is computed. The first and the last step are."""


def computed_count(budget: float, steps: int) -> int:
    """Return how many of `steps` a budget pays for.

    Raises:
        ConfigError: The budget is not in (0, 1].
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"budgets must be shares of computed steps in (0, 1], such as 0.4, got {budget}.")
    return min(steps, max(min(2, steps), round(budget * steps)))


def _mask(positions: Sequence[float], steps: int) -> Mask:
    """Return the mask whose computed steps are nearest to rising positions, all of them different."""
    chosen = [round(position) for position in positions]
    for i in range(1, len(chosen)):
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    limit = steps
    for i in range(len(chosen) - 1, -1, -1):
        chosen[i] = limit = min(chosen[i], limit - 1)
    return tuple(step in chosen for step in range(steps))


def dense_ends(count: int, steps: int, start: float = 1.5, end: float | None = None) -> Mask:
    """Compute more steps at both ends than in the middle.

    Args:
        count: Computed steps.
        steps: Steps.
        start: Exponent of the spacing in the first half; 1 is even, larger is denser at the start.
        end: The same for the second half; None for the same exponent.
    """
    end = start if end is None else end
    shares = [i / max(1, count - 1) for i in range(count)]
    places = [0.5 * (2 * u) ** start if u < 0.5 else 1 - 0.5 * (2 * (1 - u)) ** end for u in shares]
    return _mask([place * (steps - 1) for place in places], steps)


def even(count: int, steps: int) -> Mask:
    """Space the computed steps evenly."""
    return dense_ends(count, steps, 1.0)


def head_and_comb(count: int, steps: int, head: int, tail: int = 1) -> Mask:
    """Compute the first `head` steps, the last `tail`, and evenly spaced ones between, as the paper's schedule does."""
    head, tail = min(head, count - 1), max(1, min(tail, count - head))
    between = count - head - tail
    first, last = head - 1, steps - tail
    places = [first + (last - first) * (i + 1) / (between + 1) for i in range(between)]
    return _mask([*range(head), *places, *range(steps - tail, steps)], steps)


def probe_mask(steps: int, interval: int = 4) -> Mask:
    """Compute the first step and every `interval`-th after it, so that reuse begins at step 1."""
    return tuple(step % interval == 0 or step == steps - 1 for step in range(steps))


def moves(mask: Mask, reach: int = 1) -> list[Mask]:
    """Return the masks in which one computed step is another: moved by up to `reach` steps; the ends stay."""
    found = []
    for step in range(1, len(mask) - 1):
        for target in range(max(1, step - reach), min(len(mask) - 1, step + reach + 1)):
            if mask[step] and not mask[target]:
                changed = list(mask)
                changed[step], changed[target] = False, True
                found.append(tuple(changed))
    return found


def mask_text(mask: Sequence[bool]) -> str:
    """Draw a mask: `#` for computed, `.` for reused."""
    return "".join("#" if computed else "." for computed in mask)
