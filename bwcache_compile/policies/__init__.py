"""When steps reuse, what is measured for it, and what is reused: a file each, registered by name. Needs no torch."""

from __future__ import annotations

from bwcache_compile.policies.definitions import Parameter, Policy, Reuse, SmallSlot
from bwcache_compile.policies.registry import INDICATORS, POLICIES, REUSES, register_indicator, register_policy, register_reuse

__all__ = [
    "INDICATORS",
    "POLICIES",
    "REUSES",
    "Parameter",
    "Policy",
    "Reuse",
    "SmallSlot",
    "register_indicator",
    "register_policy",
    "register_reuse",
]
