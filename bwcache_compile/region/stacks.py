"""The stacks of a model, each with a cached model, and a run of the model's own Python over them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, warn
from bwcache_compile.ir.compare import Verify, difference, flat_outputs
from bwcache_compile.ir.ranks import Agreement, Ranks
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.ir.work_share import WARN_ABOVE
from bwcache_compile.region.calls import record
from bwcache_compile.region.chains import Chain, chains
from bwcache_compile.region.copies import with_modules, write_back
from bwcache_compile.region.stack import Stack
from bwcache_compile.region.stand_ins import ChainBroken, StackRun, StandIn
from bwcache_compile.region.uncaptured import UncapturedModel
from bwcache_compile.runtime import CachedModel
from bwcache_compile.runtime.context import time_inputs
from bwcache_compile.stepping import StepInfo


class Maker(Protocol):
    """Makes the cached models of a model's parts."""

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that decide together by the parts; None for one process."""

    def stack(self, stack: nn.Module, config: CacheConfig) -> CachedModel:
        """Return the cached model of a stack of blocks."""

    def whole(self, model: nn.Module, config: CacheConfig) -> UncapturedModel:
        """Return the cached model of a whole model, whose outputs are kept."""


@dataclasses.dataclass(frozen=True)
class HeldStack:
    """A stack of the model and its cached model."""

    chain: Chain
    cached: CachedModel


@dataclasses.dataclass(frozen=True)
class Stacks:
    """The stacks of a model, as they were found on one run.

    Attributes:
        held: By the path of their first block, in the order in which they run.
        share: Their part of the multiplications and additions of a step.
    """

    held: Mapping[str, HeldStack]
    share: float

    @property
    def parts(self) -> dict[str, CachedModel | UncapturedModel]:
        """The cached models, by the path of the first block."""
        return {name: stack.cached for name, stack in self.held.items()}

    def are_of(self, model: nn.Module) -> bool:
        """Whether the blocks are still the modules that the model has."""
        return all(
            stack.cached.get_submodule(path) is model.get_submodule(path) for stack in self.held.values() for path in stack.chain.paths
        )

    def run(self, model: nn.Module, info: StepInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's Python over the cached stacks. A call that fails leaves every stack at the step at which it was.

        Args:
            model: The model.
            info: What the caller said about the call. Where it names no context, each stack numbers its own calls.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Raises:
            ChainBroken: It does not call the blocks as it did when the stacks were found.
        """
        times = _times(pytree.tree_leaves((args, kwargs)))
        replaced: dict[str, nn.Module] = {}
        with ExitStack() as scopes, ExitStack() as failure:
            for stack in self.held.values():
                failure.callback(stack.cached.restore_point())
                enter_context(scopes, stack.cached, info)
                run = StackRun(stack.chain, functools.partial(_called, stack.cached, times))
                for place, path in enumerate(stack.chain.paths):
                    replaced[path] = StandIn(model.get_submodule(path), run, place)
            copies = with_modules(model, replaced)
            returned = copies[""](*args, **kwargs)
            write_back(model, copies)
            failure.pop_all()  # there was none
        return returned


def enter_context(scopes: ExitStack, part: CachedModel | UncapturedModel, info: StepInfo) -> None:
    """Tell a part of a model what the caller said about the model's call."""
    if info.named or info.step_index is not None:
        told: dict[str, Any] = {"step_index": info.step_index, "num_inference_steps": info.num_steps, "group": info.group}
        scopes.enter_context(part.cache_context(info.context, **told))


def found_stacks(
    model: nn.Module,
    make: Callable[[nn.Module], CachedModel],
    first_run: Callable[[Stacks], Any],
    verify: Verify,
    agreement: Agreement,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Stacks, Any]:
    """Find the stacks of a model on a run of it, and run it once over them; both must return the same.

    Args:
        model: The model.
        make: Makes the cached model of a stack.
        first_run: Runs the model over its stacks.
        verify: How the two results are compared.
        agreement: With the ranks that look for their stacks at the same call.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The stacks, and what the model over them returned.

    Raises:
        CaptureError: There is no stack, or the model over its stacks returns something else.
    """
    name = type(model).__name__
    recording = record(model, args, kwargs)
    found, reasons = chains(recording.calls)
    listed = "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons))
    without = None if found else f"{name} has no stack of blocks that hand their outputs to one another and to nothing else:{listed}"
    without = agreement.joint(without)
    if without is not None:
        raise CaptureError(without)
    unread = len(_times(pytree.tree_leaves((args, kwargs))))
    held = {chain.paths[0]: HeldStack(chain, make(Stack(model, chain, unread))) for chain in found}
    stacks = Stacks(held, sum(chain.work for chain in found) / max(recording.work, 1))
    for one, other in itertools.combinations(held.values(), 2):
        one.cached.decide_with(other.cached)
    try:
        returned = first_run(stacks)
    except ChainBroken as broken:
        raise CaptureError(f"{name} {broken}, so its blocks cannot be cached as a stack.") from None
    wrong = agreement.joint(difference(recording.outputs, flat_outputs(returned), verify == "close") if verify else None)
    if wrong is not None:
        raise CaptureError(f"{name} over its cached stacks returns something else than by itself: {wrong}.")
    if 1 - stacks.share > WARN_ABOVE:
        warn(f"a reused step of {name} still runs {1 - stacks.share:.0%} of the work outside the cached stacks:{listed}")
    return stacks, returned


def _times(leaves: list[Any]) -> list[Tensor]:
    """Return the inputs of a call that may be the time."""
    return [leaves[at] for at in time_inputs(leaves) if isinstance(at, int)]


def _called(stack: CachedModel, times: Sequence[Tensor], given: Sequence[Tensor]) -> Sequence[Any]:
    """Run one step of a cached stack."""
    outputs: Sequence[Any] = stack(*times, *given)
    return outputs
