"""A program ready to run: graphs, compiled where asked for, and the scalars they take."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, GraphIO, cache_in, cache_out
from bwcache_compile.graph_settings import GraphSettings
from bwcache_compile.ir.compare import same
from bwcache_compile.ir.policy_tensors import host_decision, policy_parameters
from bwcache_compile.ir.program import OURS, ModelProgram
from bwcache_compile.ir.sizes import CallSizes, Shape, Size
from bwcache_compile.ir.torch_compat import maybe_mark_dynamic, pytree
from bwcache_compile.policies import POLICIES
from bwcache_compile.policies.definitions import takes
from bwcache_compile.runtime.compilation import owned
from bwcache_compile.runtime.runnable_graphs import Outline, RunnableGraphs
from bwcache_compile.runtime.signature import CallKey
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.runtime.watch import address_of
from bwcache_compile.size_expressions import evaluate
from bwcache_compile.stepping import Cursor

_MOST_STEPS, _MOST_SETTINGS = 256, 8


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


def _kind(value: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape), value.dtype


def make_room(table: dict[Any, Any], most: int) -> None:
    """Drop the oldest entry of a full table."""
    while len(table) >= most:
        table.pop(next(iter(table)), None)


def repeated(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor `count` times along dimension 0."""
    return tensor.repeat(count, *([1] * (tensor.dim() - 1)))


class RunnableProgram(RunnableGraphs):
    """A program ready to run: its graphs, compiled where asked for, and its scalars on the device.

    Attributes:
        slots: What one context's state holds.
        addresses: Where the tensors lie in memory that the graphs hold.
        per_sample: Whether each sample of a batch decides for itself.
        samples_apart: Whether it was checked that samples do not depend on one another.
        notes: What the capture adds to the notes of the plan.
        siblings: The programs that are made from the same capture, this one among them, by the settings that shape their graphs; the last
            used is the last.
        input_kinds: Shape and dtype of each of the user's inputs; None where it is no tensor or a size is open.
    """

    def __init__(self, program: ModelProgram, key: CallKey, notes: tuple[str, ...] = (), outline: Outline | None = None) -> None:
        """Wrap a program that was captured for a call like this one; nothing is compiled yet.

        `outline` makes of it what a compiler gets that compiles blocks that are alike once.
        """
        super().__init__(program, outline)
        self.key, self.notes = key, notes
        self.checked = {key.sizes}
        self.refused: set[CallSizes] = set()
        self.siblings: dict[GraphSettings, RunnableProgram] = {}
        self.per_sample = self.plan.settings.batch_reduce == "per_sample"
        self.samples_apart = False
        self.slots = self.plan.guard_slots if self.guarded else self.plan.slots
        inputs = program.compute.graph.find_nodes(op="placeholder")[: len(program.signature.inputs)]
        self.input_kinds = [_kind(node.meta.get("val")) for node in inputs]
        held = (tensor for tensor in program.captured.attributes.values() if isinstance(tensor, Tensor))
        self.addresses = frozenset(address for address in map(address_of, held) if address)
        self._steps: dict[int, Tensor] = {}
        self._settings: dict[Hashable, tuple[Tensor, ...]] = {}
        self._decided: tuple[CacheConfig | None, int | None, dict[int, int | None]] = None, None, {}
        self._last_settings: dict[str, tuple[CacheConfig, int | None, tuple[Tensor, ...]]] = {}
        self.io = {kind: program.io(kind) for kind in self.modules}
        self._parameters = [parameter.name for parameter in self.plan.settings.parameters]
        self._cache_in = [cache_in(slot.name) for slot in self.slots]
        self._cache_out = [cache_out(slot.name) for slot in self.slots]
        self._orders = {kind: self._order(io) for kind, io in self.io.items()}

    def reads(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether tensors whose values are built in hold the same values now."""
        read, readings = self.program.signature.read, self.program.signature.readings
        if not read and not readings:  # as for most models, and at each call
            return True
        flat = pytree.tree_leaves((args, kwargs))
        if not all(same(value, model.get_buffer(name) if isinstance(name, str) else flat[name]) for name, value in read.items()):
            return False
        with torch.no_grad():
            return all(reading.value is not None and same(reading.value, reading.apply(flat[reading.source])) for reading in readings)

    def symbols(self, key: CallKey) -> Mapping[str, int] | None:
        """Return the values of the program's dynamic sizes at a call, or None if it does not serve such calls."""
        if key.kind != self.key.kind or key.sizes in self.refused:
            return None
        sizes = self.program.signature.sizes
        if sizes is None:
            return {} if key.sizes == self.key.sizes else None
        return sizes.bind(key.sizes)

    def fresh(self, sizes: Mapping[str, int], step: int = 0) -> CacheState:
        """Return the state of a context that has computed nothing, at these sizes; its next step is `step`."""
        return CacheState(tuple(slot.fresh(sizes, self.plan.device) for slot in self.slots), Cursor(step))

    def step_tensor(self, step: int) -> Tensor:
        """Return int64[1] on the device; those of the last steps are kept."""
        tensor = self._steps.get(step)
        if tensor is None:
            make_room(self._steps, _MOST_STEPS)
            # copied from the host, which waits once for each index: filled on one stream, another could read it too early
            tensor = self._steps[step] = torch.tensor([step], dtype=torch.int64, device=self.plan.device)
        return tensor

    def parameters(self, config: CacheConfig, num_steps: int | None, kind: str = "") -> tuple[Tensor, ...]:
        """Return what a graph takes of the settings, or with no kind what all graphs take; those of the last settings are kept.

        Raises:
            ConfigError: The policy decides in that graph, needs the number of steps, and it is not known.
        """
        names = self.io[kind].parameters if kind else None
        if names == ():
            return ()
        last = self._last_settings.get(kind)
        if (
            last is not None and config is last[0] and num_steps == last[1]
        ):  # comparing a table of weights takes longer than a step's wrapper
            return last[2]
        key = (config, num_steps, kind)
        found = self._settings.get(key)
        if found is None:
            make_room(self._settings, _MOST_SETTINGS)
            found = self._settings[key] = policy_parameters(config, num_steps, self.plan.device, names)
        self._last_settings[kind] = config, num_steps, found
        return found

    def decided(self, config: CacheConfig, num_steps: int | None, step: int) -> int | None:
        """Return how many steps reuse after a computed one, if the host knows; see `host_decision`. Those of the last settings are kept."""
        last, count, known = self._decided
        if config is not last or count != num_steps:
            known = {}
            self._decided = config, num_steps, known
        if step not in known:
            known[step] = host_decision(config, num_steps, step)
        return known[step]

    def taken(self, kind: str, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return those that a graph takes of what all graphs take."""
        return tuple(parameters[self._parameters.index(name)] for name in self.io[kind].parameters)

    def decide(self, change: Tensor, kept: Sequence[Tensor], step: Tensor, *parameters: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run the graph's own policy apart from the graph: what it keeps afterwards, and how many steps reuse.

        `parameters` are those of the graph of a computed step.
        """
        policy = POLICIES[self.plan.settings.policy]
        named = {"change": change, "step": step, **dict(zip((slot.name for slot in policy.slots), kept, strict=True))}
        named |= {name: value for name, value in zip(self.io["compute"].parameters, parameters, strict=True)}
        operands = [named[name] for name in takes(policy.decide)]
        returned = self.program.compute.get_submodule(f"{OURS}policy")(*operands)
        *after, left = returned if policy.slots else (returned,)
        return tuple(after), left

    def kind(self, state: CacheState) -> str:
        """Name the graph that runs next."""
        return "guarded" if self.guarded else "reuse" if state.reuses_next else "compute"

    def operands(self, flat: Sequence[Any], state: CacheState, parameters: tuple[Tensor, ...]) -> list[Any]:
        """Return the inputs of the graph that runs next; `parameters` are those that it takes. All samples are at one step."""
        step = self.step_tensor(state.step)
        if self.per_sample:
            count = self.samples_of(flat)
            step, parameters = step.repeat(count), tuple(repeated(parameter, count) for parameter in parameters)
        return self.packed(self.kind(state), flat, state.slots, step, parameters)

    def packed(
        self, kind: str, flat: Sequence[Any], slots: Sequence[Tensor | None], step: Tensor, parameters: Sequence[Tensor]
    ) -> list[Any]:
        """Return the inputs of a graph in order; slots that it does not read may be None."""
        sizes = self.program.signature.sizes
        if sizes is not None:
            flat = [_open(leaf, described) for leaf, described in zip(flat, sizes.inputs, strict=True)]
            slots = [_open(tensor, slot.shape) for tensor, slot in zip(slots, self.slots, strict=True)]
        values = [*flat, *slots, step, *parameters]
        return [values[i] for i in self._orders[kind]]

    def samples_of(self, flat: Sequence[Any]) -> int:
        """Return how many samples a call holds, where the graphs tell them apart."""
        assert self.plan.samples is not None
        sizes, read = self.program.signature.sizes, {}
        for symbol in sizes.symbols if sizes is not None else ():
            leaf = flat[symbol.position]
            read[symbol.name] = symbol.solve(leaf if symbol.dimension is None else leaf.shape[symbol.dimension])
        return int(evaluate(self.plan.samples, read))

    def _order(self, io: GraphIO) -> list[int]:
        """Return, for each input of a graph, its position among the user's inputs, all slots, the step and its parameters."""
        names = [*io.users, *self._cache_in, STEP, *io.policy_inputs]
        return [names.index(name) for name in io.inputs]

    def named(
        self, io: GraphIO, flat: Sequence[Any], slots: Sequence[Tensor], parameters: Sequence[Tensor], step: Tensor
    ) -> dict[str, Any]:
        """Return what a graph takes, and every slot, by name; `parameters` are those that it takes."""
        values = dict(zip(io.users, flat, strict=True)) | dict(zip(self._cache_in, slots, strict=True))
        return {**values, **dict(zip(io.policy_inputs, parameters, strict=True)), STEP: step}

    def results(self, io: GraphIO, returned: Mapping[str, Any]) -> Any:
        """Put the model's own outputs together."""
        return pytree.tree_unflatten([returned[name] for name in io.results], self.program.signature.out_spec)

    def written(self, returned: Mapping[str, Any]) -> list[Tensor]:
        """Return the next value of every slot."""
        return [returned[name] for name in self._cache_out]

    def computes(self, state: CacheState) -> bool | Tensor:
        """Whether the next step computes; bool[regions] where only the graph knows."""
        if not self.guarded:
            return not state.reuses_next
        return torch.cat(state.slots[len(self.plan.slots) :]) < state.step

    def split(self, returned: Any, state: CacheState, replayed: bool, decided: int | None = None) -> tuple[Any, CacheState, Tensor | None]:
        """Part a graph's results into the model's output, the next state and the measured change.

        Reads `reuse_left` on the host after a computed step, if its decision is not known there: the only synchronization, and none
        with the guard in the graph.

        Args:
            returned: What the graph returned.
            state: The state that it ran on.
            replayed: Whether its next run may overwrite that (see `replays`): what is kept or handed out is copied then.
            decided: What the host knows; see `decided`.
        """
        if state.reuses_next and not replayed:
            return pytree.tree_unflatten(returned, self.program.signature.out_spec), state.reused(), None
        kind = self.kind(state)
        named = self.io[kind].unpack(owned(returned, state.slots) if replayed else returned)
        outputs = self.results(self.io[kind], named)
        if state.reuses_next:
            return outputs, state.reused(), None
        left = 0
        if not self.guarded:
            left = int(named[REUSE_LEFT]) if decided is None else decided
        return outputs, state.computed(tuple(self.written(named)), left), named.get(INDICATOR)
