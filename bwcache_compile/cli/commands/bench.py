"""Time a computed and a reused step against the plain model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import bwcache_compile as bw
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.cli.screen import Screen, table
from bwcache_compile.ir.compare import Verify, clone_tensors
from bwcache_compile.policies import POLICIES

_MOST_STEPS = 1000
"""Steps of a generation, where the settings do not say."""
_SOON = 16
"""Steps after which a policy with a threshold has to reuse."""


def bench_model(
    screen: Screen, named: Named, config: bw.CacheConfig | None, blocks: Sequence[str] | None, verify: Verify, rounds: int, compiled: bool
) -> None:
    """Time a computed and a reused step against the plain model, in turn."""
    source = loaded(screen, named)
    cached = transformed(screen, source, config, blocks, verify=verify)
    _release(cached)
    args, kwargs = source.args, source.kwargs
    plain_call: Callable[..., Any] = source.model
    if compiled:
        with screen.progress("compiling"):
            cached.compile()
            cached.warm_up(args, kwargs)
            plain_call = torch.compile(source.model)
            with torch.no_grad():
                plain_call(*clone_tensors(args), **clone_tensors(kwargs))
    with torch.no_grad():
        fresh, reusing = _states(cached, args, kwargs)
        calls: dict[str, Callable[[], Any]] = {
            "plain": lambda: plain_call(*args, **kwargs),
            "computed": lambda: cached.functional_step(args, kwargs, fresh),
            "reused": lambda: cached.functional_step(args, kwargs, reusing),
        }
        with screen.progress("timing", rounds) as step:
            seconds = _timed(calls, rounds, step, cached.plan.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    settings = cached.cache_config
    document = {
        **head(source),
        "rounds": rounds,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "device": str(cached.plan.device),
        "policy": settings.policy,
        "reuse": settings.reuse,
        "seconds": {name: {"median": medians[name], "min": min(values), "max": max(values)} for name, values in seconds.items()},
        "computed_over_plain": medians["computed"] / medians["plain"],
        "reused_over_plain": medians["reused"] / medians["plain"],
        "state_bytes": cached.plan.state_bytes,
    }
    rows = [
        (name, *(f"{1e3 * value:.2f}" for value in (medians[name], min(values), max(values))), f"{medians[name] / medians['plain']:.4f}")
        for name, values in seconds.items()
    ]
    columns = ("step", "median ms", "min ms", "max ms", "of plain")
    said = (
        f"{source.title}, {'compiled' if compiled else 'eager'}, policy {settings.policy}, reuse {settings.reuse}: {rounds} rounds in turn"
    )
    screen.show(document, said, table(columns, rows, columns[1:]))


def _release(cached: bw.CachedModel) -> None:
    """Set the threshold so high that steps reuse as soon as they may; a mask says itself where."""
    config = cached.cache_config
    at_threshold = POLICIES[config.policy].at_threshold
    config = config if at_threshold is None else at_threshold(config, float("inf"), _MOST_STEPS)
    cached.configure(bw.CacheConfig.of(config, timesteps=None))  # the example inputs have a time of their own


def _states(cached: bw.CachedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return a fresh state and one whose next step reuses.

    Raises:
        CommandError: No step reuses.
    """
    fresh = state = cached.init_state(args, kwargs)
    for _ in range(cached.cache_config.steps or _MOST_STEPS):
        if state.reuses_next:  # type: ignore[union-attr]
            return fresh, state
        _, state = cached.functional_step(args, kwargs, state)
        if state.step > _SOON and cached.cache_config.steps_mask is None:
            break
    raise CommandError("with these settings no step reuses, so there is no reused step to time")


def _timed(calls: dict[str, Callable[[], Any]], rounds: int, on_round: Callable[[], None], device: torch.device) -> dict[str, list[float]]:
    """Time each call once a round, in turn, after one round that warms up; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
        on_round()
    return seconds
