"""A program ready to run: graphs, compiled where asked for, and the scalars they take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.utils import _pytree as pytree

from bwcache_compile.config import CacheConfig
from bwcache_compile.program import OURS, CachedProgram
from bwcache_compile.runtime.signature import CallKey
from bwcache_compile.runtime.state import CacheState, policy_parameters
from bwcache_compile.sizes import CallSizes, Shape, Size


def _open(value: Any, described: Shape | Size | None) -> Any:
    """Tell a compiler which sizes of a tensor change from call to call, so that it need not find out by compiling again.

    The mark is put on an alias: the caller's tensor keeps no trace of it.
    """
    if not isinstance(value, Tensor) or not isinstance(described, tuple):
        return value
    alias = value.detach()
    for dimension, size in enumerate(described):
        if isinstance(size, str):
            maybe_mark_dynamic(alias, dimension)
    return alias


class LoadedProgram:
    """A program ready to run: its two graphs, compiled where asked for, and its scalars on the device."""

    def __init__(self, program: CachedProgram, key: CallKey) -> None:
        """Wrap a program that was captured for a call like this one; nothing is compiled yet."""
        assert program.reuse is not None
        self.program, self.key = program, key
        self.checked = {key.sizes}
        self.refused: set[CallSizes] = set()
        self.compute: Callable[..., Any] = program.compute
        self.reuse: Callable[..., Any] = program.reuse
        self.plan = program.planned()
        self._scalars: dict[Hashable, Any] = {}
        names = [slot.name for slot in self.plan.slots]
        self.compute_reads = [names.index(name) for name in program.compute_slots]
        self.reuse_reads = [names.index(name) for name in program.reuse_slots]

    def symbols(self, key: CallKey) -> Mapping[str, int] | None:
        """Return the values of the program's open sizes at a call, or None if it does not serve such calls."""
        if key.kind != self.key.kind or key.sizes in self.refused:
            return None
        sizes = self.program.signature.sizes
        if sizes is None:
            return {} if key.sizes == self.key.sizes else None
        return sizes.bind(key.sizes)

    def compile(self, options: dict[str, Any]) -> None:
        """Compile both graphs with these options of `torch.compile`; each is compiled whole at its first run."""
        assert self.program.reuse is not None
        if self.program.signature.sizes is not None:
            options = {"dynamic": True, **options}
        self.compute = torch.compile(self.program.compute, **options)
        self.reuse = torch.compile(self.program.reuse, **options)

    def step_tensor(self, step: int) -> Tensor:
        """Return int64[1] on the device, made once per step."""
        if step not in self._scalars:
            self._scalars[step] = torch.tensor([step], dtype=torch.int64, device=self.plan.device)
        tensor: Tensor = self._scalars[step]
        return tensor

    def parameters(self, config: CacheConfig, num_steps: int | None) -> tuple[Tensor, ...]:
        """Return the policy's inputs, made once per setting."""
        key = ("policy", config, num_steps)
        if key not in self._scalars:
            self._scalars[key] = policy_parameters(config, num_steps, self.plan.device)
        tensors: tuple[Tensor, ...] = self._scalars[key]
        return tensors

    def decide(self, change: Tensor, trigger: Tensor, step: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Run the graph's own policy apart from the graph: the trigger afterwards, and how many steps reuse."""
        returned: tuple[Tensor, Tensor] = self.program.compute.get_submodule(f"{OURS}policy")(change, trigger, step, *parameters)
        return returned

    def operands(self, flat: list[Any], state: CacheState, config: CacheConfig, num_steps: int | None) -> list[Any]:
        """Return the inputs of the graph that runs next."""
        step, sizes = self.step_tensor(state.step), self.program.signature.sizes
        reads = self.reuse_reads if state.reuses_next else self.compute_reads
        slots = [state.slots[i] for i in reads]
        if sizes is not None:
            flat = [_open(leaf, described) for leaf, described in zip(flat, sizes.inputs, strict=True)]
            slots = [_open(slot, self.plan.slots[i].shape) for slot, i in zip(slots, reads, strict=True)]
        return [*flat, *slots, *(() if state.reuses_next else self.parameters(config, num_steps)), step]

    def split(self, returned: Any, state: CacheState) -> tuple[Any, CacheState, Tensor | None]:
        """Part a graph's results into the model's output, the next state and the measured change.

        Reads `reuse_left` on the host after a computed step: the only synchronisation.
        """
        spec = self.program.signature.out_spec
        outputs = pytree.tree_unflatten(list(returned[: spec.num_leaves]), spec)
        if state.reuses_next:
            return outputs, state.reused(), None
        end = spec.num_leaves + len(self.plan.slots)
        slots = tuple(returned[spec.num_leaves : end])
        if self.plan.device.type == "cuda":  # a replayed CUDA graph overwrites what it returned before
            slots = tuple(slot.clone() for slot in slots)
        change = returned[end + 1] if len(returned) > end + 1 else None
        return outputs, state.computed(slots, int(returned[end])), change


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
def run_both(loaded: LoadedProgram, flat: list[Any], fresh: CacheState, config: CacheConfig, num_steps: int) -> None:
    """Run both graphs on a fresh state and drop what they return; an outer torch.compile compiles them here."""
    with torch.no_grad():
        loaded.compute(*loaded.operands(flat, fresh, config, num_steps))
        reusing = dataclasses.replace(fresh, step=1, computed_at=0, reuse_until=1)
        loaded.reuse(*loaded.operands(flat, reusing, config, num_steps))
