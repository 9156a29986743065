"""Convert and check the values of a `CacheConfig`, a function for each group of settings. Needs no torch."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, Literal, get_args

from bwcache_compile.errors import ConfigError
from bwcache_compile.graph_settings import BatchReduce, Cut, Granularity
from bwcache_compile.policies import INDICATORS, POLICIES, REUSES, Reuse
from bwcache_compile.policies.reuse.linear import MOST_ANCHORS

if TYPE_CHECKING:
    from bwcache_compile.config import CacheConfig

Decide = Literal["separate", "joint"]
"""Whether contexts decide alone or together."""
Weights = tuple[tuple[float, ...] | None, ...]
"""A row for each step, or None."""

_MOST_STEPS = 2**31 - 1
_SUM_TOLERANCE = 1e-3
"""How far the weights of a step may be from a sum of 1: the first is replaced by what the others leave."""
_FINEST = 2**63 - 1
"""Largest denominator of `tail`: graphs count in 64 bits."""


def python_number(value: Any) -> Any:
    """Return a number of another library, such as numpy's, as Python's; anything else as it is."""
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_in_unit_interval(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def as_weights(given: Any) -> Weights:
    """Return a table of weights as rows of floats, arrays of other libraries too; a step without a row has None."""
    try:
        return tuple(None if row is None else tuple(float(weight) for weight in row) for row in given)
    except (TypeError, ValueError):
        raise ConfigError(f"weights must hold a row of numbers or None for each step, got {repr(given)[:80]}.") from None


def as_numbers(name: str, given: Any) -> tuple[float | None, ...]:
    """Return an entry for each step, a number or None, as floats; arrays of other libraries too."""
    try:
        return tuple(None if entry is None else float(entry) for entry in given)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must hold a number or None for each step, got {repr(given)[:80]}.") from None


def as_mask(given: Any) -> tuple[int, ...]:
    """Return a mask's entries as ints, numpy's and flags too; nothing is rounded."""
    try:
        entries = tuple(given)
        mask = tuple(int(entry) for entry in entries)
        same = mask == entries
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError(f"steps_mask must hold a 0 or a 1 for each step, got {given!r}.")
    return mask


def check_steps(config: CacheConfig, name: str, steps: int | None) -> None:
    """Check that a number of steps is that of the mask, if there is one.

    Args:
        config: The settings.
        name: Who says the number.
        steps: The number; None where it is not known.

    Raises:
        ConfigError: It is another one.
    """
    if not steps or config.steps_mask is None or steps == len(config.steps_mask):
        return
    known = len(config.steps_mask)
    advice = ""
    if config.calibrated_for is not None:
        advice = (
            f"\n  The mask was calibrated for {known} steps. Generate with {known}, or calibrate again with a generate that makes {steps}."
        )
    raise ConfigError(f"steps_mask has {known} entries but {name} is {steps}; they must be equal.{advice}")


def check(config: CacheConfig) -> None:
    """Check every value of a configuration, whose numbers, mask and weights were converted before.

    Raises:
        ConfigError: A value is out of its range, or the policy lacks what it needs.
    """
    _check_choices(config)
    _check_combinations(config)
    _check_anchors(config)
    _check_numbers(config)
    _check_mask(config)
    _check_bounds(config)
    _check_weights(config)
    _check_calibrated(config)


def _check_choices(config: CacheConfig) -> None:
    """Check the settings that name one of several things."""
    for name, choices in (
        ("policy", POLICIES),
        ("reuse", REUSES),
        ("indicator", INDICATORS),
        ("granularity", get_args(Granularity)),
        ("cut", get_args(Cut)),
        ("decide", get_args(Decide)),
        ("batch_reduce", get_args(BatchReduce)),
    ):
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _check_combinations(config: CacheConfig) -> None:
    """Check choices that exclude one another."""
    policy, way = POLICIES[config.policy], REUSES[config.reuse]
    if config.granularity == "block" and not way.adds_to_input:
        adding = " or ".join(repr(name) for name, other in REUSES.items() if other.adds_to_input)
        raise ConfigError(
            f"granularity='block' requires reuse={adding}, got {config.reuse!r}: a reused output would discard what earlier blocks changed."
        )
    if config.granularity == "block" and config.decide == "joint":
        raise ConfigError("granularity='block' decides for each block and decide='joint' once for all contexts; they cannot be combined.")
    if config.batch_reduce == "per_sample" and config.decide == "joint":
        raise ConfigError(
            "batch_reduce='per_sample' decides for each sample and decide='joint' once for all contexts; they cannot be combined."
        )
    for what in ("slots", "parameters"):
        own = {slot.name for slot in policy.slots} if what == "slots" else {p.name for p in policy.parameters}
        others = way.slot_names if what == "slots" else [p.name for p in way.parameters]
        if clash := own.intersection(others):
            raise ConfigError(f"policy={config.policy!r} and reuse={config.reuse!r} both have {what} named {min(clash)!r}; rename one.")
    if config.cut == "output":
        _check_cut(config, way)
    if config.granularity == "block" and config.indicator_blocks != "all":
        raise ConfigError(f"granularity='block' requires indicator_blocks=\"all\", got {config.indicator_blocks!r}.")


def _check_cut(config: CacheConfig, way: Reuse) -> None:
    """Check what does not go together with anchors at the model's output."""
    if way.needs_source:
        raise ConfigError(f"reuse={config.reuse!r} adds to an input of the blocks, so it requires cut='blocks', got cut='output'.")
    if config.granularity == "block":
        raise ConfigError("granularity='block' guards each block and cut='output' the whole model; they cannot be combined.")
    for name in ("compute_first", "compute_last"):
        if getattr(config, name) != 0:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}; it must be 0 with cut='output', where a reused step computes no block."
            )


def _check_anchors(config: CacheConfig) -> None:
    """Check how many computed steps are kept and how they are continued."""
    way = REUSES[config.reuse]
    if config.anchors is not None and not (_is_int(config.anchors) and 1 <= config.anchors <= MOST_ANCHORS):
        raise ConfigError(f"anchors is {config.anchors!r}; it must be an int from 1 to {MOST_ANCHORS}.")
    if config.anchors not in (None, way.anchors) and way.with_anchors is None:
        raise ConfigError(
            f"anchors is {config.anchors!r}, but reuse={config.reuse!r} always keeps {way.anchors} computed steps; leave anchors out."
        )
    if not (_is_int(config.order) and 0 <= config.order < MOST_ANCHORS):
        raise ConfigError(f"order is {config.order!r}; it must be an int from 0 to {MOST_ANCHORS - 1}.")
    if not (isinstance(config.damping, (int, float)) and math.isfinite(config.damping)):
        raise ConfigError(f"damping is {config.damping!r}; it must be a finite number.")


def _check_numbers(config: CacheConfig) -> None:
    """Check the range of every number, and of those that may be "all"."""
    if not (isinstance(config.threshold, (int, float)) and config.threshold >= 0):
        raise ConfigError(f"threshold is {config.threshold!r}; it must be a number >= 0 (0 never reuses).")
    interval, fraction = config.reuse_interval, config.reuse_fraction
    if interval is not None and fraction is not None:
        raise ConfigError(f"reuse_interval is {interval!r} and reuse_fraction is {fraction!r}; set one of them.")
    if interval is not None and not (_is_int(interval) and interval >= 1):
        raise ConfigError(f"reuse_interval is {interval!r}; it must be an int >= 1. For a fraction of the steps set reuse_fraction.")
    if fraction is not None and not (_is_in_unit_interval(fraction) and fraction > 0):
        raise ConfigError(f"reuse_fraction is {fraction!r}; it must be in (0, 1]. For a number of steps set reuse_interval.")
    if not _is_in_unit_interval(config.tail):
        raise ConfigError(f"tail is {config.tail!r}; it must be in [0, 1].")
    if config.tail_ratio()[1] > _FINEST:
        raise ConfigError(f"tail is {config.tail!r}; its exact fraction does not fit in 64 bits. Use fewer digits.")
    for name, least in (("warmup_steps", 0), ("compute_first", 0), ("compute_last", 0), ("calls_per_step", 1)):
        value = getattr(config, name)
        if not (_is_int(value) and value >= least):
            raise ConfigError(f"{name} is {value!r}; it must be an int >= {least}.")
    for name in ("indicator_blocks", "indicator_tokens"):
        value = getattr(config, name)
        if value != "all" and not (_is_int(value) and value >= 1):
            raise ConfigError(f'{name} is {value!r}; it must be an int >= 1 or "all".')
    for name in ("reuse_interval", "warmup_steps", "num_steps"):
        value = getattr(config, name)
        if _is_int(value) and value > _MOST_STEPS:
            raise ConfigError(f"{name} is {value}; it must be at most {_MOST_STEPS}.")
    if config.num_steps is not None and not (_is_int(config.num_steps) and config.num_steps >= 1):
        raise ConfigError(f"num_steps is {config.num_steps!r}; it must be an int >= 1.")


def _check_mask(config: CacheConfig) -> None:
    """Check the mask where the policy reads one; there is none elsewhere."""
    mask = config.steps_mask
    if not POLICIES[config.policy].reads_mask:
        if mask is not None:
            readers = " or ".join(repr(name) for name, policy in POLICIES.items() if policy.reads_mask)
            raise ConfigError(f"steps_mask is set, but policy={config.policy!r} does not read it; remove it, or set policy={readers}.")
        return
    if not mask:
        raise ConfigError(f"policy={config.policy!r} needs steps_mask: one entry per step, 0 computes and 1 reuses, such as (0, 0, 1, 0).")
    if set(mask) - {0, 1} or mask[0] != 0:
        raise ConfigError(
            f"steps_mask is {mask}; its entries must be 0 (compute) or 1 (reuse), and the first must be 0: nothing is cached yet."
        )
    check_steps(config, "num_steps", config.num_steps)


def _check_bounds(config: CacheConfig) -> None:
    """Check the bounds where the policy reads some; there are none elsewhere."""
    bounds = config.indicator_bounds
    if bounds is None:
        return
    if config.policy != "guarded":
        raise ConfigError(f"indicator_bounds is set, but policy={config.policy!r} does not read it; remove it, or set policy='guarded'.")
    if len(bounds) != len(config.steps_mask or ()):
        raise ConfigError(
            f"indicator_bounds has {len(bounds)} entries, but steps_mask has {len(config.steps_mask or ())}; it must hold a number or None"
            " for each step."
        )
    if bad := [bound for bound in bounds if bound is not None and not bound >= 0]:
        raise ConfigError(f"indicator_bounds holds {bad[0]!r}; a bound must be >= 0.")


def _check_weights(config: CacheConfig) -> None:
    """Check the weights of the reused steps."""
    if config.weights is None:
        return
    weights, mask, anchors = config.weights, config.steps_mask, config.graph_settings.anchors
    if mask is None or len(weights) != len(mask):
        have = "steps_mask is not set" if mask is None else f"steps_mask has {len(mask)} entries"
        raise ConfigError(f"weights has {len(weights)} rows, but {have}; it must hold a row or None for each step of steps_mask.")
    if anchors == 1:
        raise ConfigError(f"weights requires at least two anchors, but reuse={config.reuse!r} keeps one. Set anchors.")
    for step, row in enumerate(weights):
        if row is None or not mask[step]:
            continue
        if len(row) != anchors or not all(map(math.isfinite, row)) or abs(sum(row) - 1) > _SUM_TOLERANCE:
            raise ConfigError(f"weights[{step}] is {row}; it must hold {anchors} finite numbers, one for each anchor, that sum to 1.")
        known = sum(not entry for entry in mask[:step])
        if any(row[known:]):
            raise ConfigError(f"weights[{step}] is {row}, but only {known} steps were computed before it; set the other weights to 0.")


def _check_calibrated(config: CacheConfig) -> None:
    """Check what says for which run and model weights were made."""
    if config.timesteps is not None and len(config.timesteps) != len(config.steps_mask or ()):
        raise ConfigError(
            f"timesteps has {len(config.timesteps)} entries, but steps_mask has {len(config.steps_mask or ())}; it must hold a timestep for"
            " each step."
        )
    if config.calibrated_for is not None and not isinstance(config.calibrated_for, str):
        raise ConfigError(f"calibrated_for is {config.calibrated_for!r}; it must be the string that calibrate made.")
