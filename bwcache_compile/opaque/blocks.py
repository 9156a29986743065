"""Which modules of a model are its blocks: those of the containers that do most of the work."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from bwcache_compile.region.calls import ModuleCall, Recording
from bwcache_compile.region.work import is_worth_caching


@dataclasses.dataclass(frozen=True)
class FoundBlocks:
    """The blocks of a model.

    Attributes:
        paths: Of their modules, in the order in which they were first called.
        share: Their part of the multiplications and additions of a step.
        left_out: Why other modules that repeat are not cached.
    """

    paths: tuple[str, ...]
    share: float
    left_out: tuple[str, ...]


def find_blocks(recording: Recording) -> FoundBlocks:
    """Return the modules of each container of which several are called, and that has at least a fifth of the largest one's work.

    Args:
        recording: One run of the model.
    """
    containers: dict[str, list[ModuleCall]] = defaultdict(list)
    for call in recording.calls:
        containers[call.path.rpartition(".")[0]].append(call)
    work = {path: sum(call.work for call in calls) for path, calls in containers.items()}
    repeated = [path for path, calls in containers.items() if len(calls) > 1 and work[path] > 0]
    largest = max((work[path] for path in repeated), default=0)
    large = {path for path in repeated if is_worth_caching(work[path], largest)}
    left_out = [
        f"the modules of {path} have less than a fifth of the work of the largest container" for path in repeated if path not in large
    ]
    paths = dict.fromkeys(call.path for call in recording.calls if call.path.rpartition(".")[0] in large)
    return FoundBlocks(tuple(paths), sum(work[path] for path in large) / max(recording.work, 1), tuple(left_out))
