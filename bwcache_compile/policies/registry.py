"""The policies, indicators and ways of reusing that there are, by name: one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from bwcache_compile.errors import ConfigError
from bwcache_compile.policies.adaptive import ADAPTIVE
from bwcache_compile.policies.definitions import Policy, Reuse, check_indicator, check_policy, check_reuse
from bwcache_compile.policies.guarded import GUARDED
from bwcache_compile.policies.l1 import relative_change
from bwcache_compile.policies.reuse.linear import linear
from bwcache_compile.policies.schedule import SCHEDULE
from bwcache_compile.policies.static import STATIC

Kind = TypeVar("Kind")

POLICIES: dict[str, Policy] = {
    "schedule": SCHEDULE,
    "adaptive": ADAPTIVE,
    "static": STATIC,
    "guarded": GUARDED,
}
INDICATORS: dict[str, Callable[..., Any]] = {
    "l1": relative_change,
}
REUSES: dict[str, Reuse] = {
    "output": linear(1),
    "residual": linear(1, residual=True),
    "taylor": linear(2),
    "linear": linear(4),
}


def _register(kind: str, known: dict[str, Kind], name: str, value: Kind, check: Callable[[str, Kind], None]) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"{kind}: invalid name {name!r}; it must be a Python identifier.")
    if name in known and known[name] != value:
        raise ConfigError(f"{kind} {name!r} is already registered. Choose another name.")
    check(name, value)
    known[name] = value


def register_policy(name: str, policy: Policy) -> None:
    """Make a policy known as `CacheConfig(policy=name)`.

    A process that loads a bundle which was exported with it must register it as well; that needs no torch.

    Raises:
        ConfigError: The name is taken, or the policy's functions take what there is not.
    """
    _register("policy", POLICIES, name, policy, check_policy)


def register_indicator(name: str, change: Callable[..., Any]) -> None:
    """Make an indicator known as `CacheConfig(indicator=name)`.

    Args:
        name: How settings call it.
        change: A function of two lists of tensors, the features of the measured blocks and the same at the last computed
            step, to float32[blocks]: how far each has moved. The references of a fresh state are zeros, for which
            the result must be infinite or NaN.

    Raises:
        ConfigError: The name is taken, or the function takes something else.
    """
    _register("indicator", INDICATORS, name, change, check_indicator)


def register_reuse(name: str, way: Reuse) -> None:
    """Make a way of reusing known as `CacheConfig(reuse=name)`.

    Raises:
        ConfigError: The name is taken, or its functions take what there is not.
    """
    _register("way of reusing", REUSES, name, way, check_reuse)
