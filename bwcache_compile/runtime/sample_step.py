"""One step of a batch whose samples decide by themselves: each is a stream of calls of its own, and what they compute is batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.clock import check_time
from bwcache_compile.config import CacheConfig
from bwcache_compile.contexts import ContextTable
from bwcache_compile.errors import ConfigError
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT
from bwcache_compile.ir.layout import in_order
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.report import RawStep
from bwcache_compile.runtime.context import ModelContext, warn_without_reuse, what_changed
from bwcache_compile.runtime.frames import hidden
from bwcache_compile.runtime.programs import ProgramCache
from bwcache_compile.runtime.runnable import RunnableProgram
from bwcache_compile.runtime.sample_batch import BatchCall, BatchInputs, BatchSizes, parts_of
from bwcache_compile.runtime.sample_rows import BatchStep, Part, Row, row_layout
from bwcache_compile.runtime.samples_apart import check_apart
from bwcache_compile.runtime.signature import Parameters, call_key, changed_numbers, leaves_of
from bwcache_compile.runtime.state import CacheState
from bwcache_compile.step_events import StepEvent
from bwcache_compile.stepping import Advance, Cursor


class SampleStepper:
    """Begins and finishes the calls of a cached model with `batch_reduce="per_sample"`, which runs the graphs in between."""

    def __init__(self, model: nn.Module, parameters: Parameters, programs: ProgramCache, contexts: ContextTable[ModelContext]) -> None:
        """Take what the cached model has; `parameters` are those of the model's forward."""
        self._model, self._parameters, self._programs, self._contexts = model, parameters, programs, contexts
        self._inputs, self.sizes = BatchInputs(), BatchSizes()

    @hidden
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], config: CacheConfig) -> BatchStep:
        """Find what each sample does and the graphs that do it. Their contexts are locked, and captures wait, until `end`.

        Raises:
            CaptureError, NoBlocksFoundError, UnsupportedGraphError, ConfigError, StateError: See `CachedModel.forward`.
        """
        call = self.batch_call(args, kwargs)
        infos = self._contexts.row_infos(call.count, config.calls_per_step)
        entered: list[ModelContext] = []
        try:
            for info in infos:
                entered.append(self._contexts.enter(info))
            step = BatchStep(call, config, [], [])
            reusing = all(context.state is not None and context.state.reuses_next for context in entered)
            times, version = call.times(), self._programs.version(glance=reusing)
            for info, context, inputs in zip(infos, entered, times, strict=True):
                num_steps = config.steps_of(info.num_steps)
                renumbered = self._renumbered(context, call)
                read = inputs if info.step_index is None else {}
                latest = self._contexts.latest(info.group)
                advance = context.tracker.advance(info, call.row_signature, read, num_steps, latest)
                step.rows.append(self._row(context, advance, num_steps, version, renumbered))
            for row, inputs in zip(step.rows, times, strict=True):
                if config.timesteps is not None and not row.reuses:
                    check_time(row.advance.step, config.timesteps, inputs.values())
            self._plan(step)
        except BaseException:
            for context in entered:
                context.lock.release()
            raise
        self._programs.gate.enter()
        return step

    def batch_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int | None = None) -> BatchCall:
        """Return a call with what is known of its batch.

        Raises:
            ConfigError: No input holds a batch, or another number of samples than the caller named rows.
            StateError: An input requires gradients.
        """
        args, kwargs = self._parameters.bind(args, kwargs)
        _, structure = leaves_of(args, kwargs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        rows = self._contexts.named_rows() if rows is None else rows
        count, batched = self._inputs.find((structure, len(flat)), flat, rows)
        return BatchCall(flat, spec, count, batched, call_key(flat, structure))

    def _renumbered(self, context: ModelContext, call: BatchCall) -> bool:
        """Whether a Python number changed since the last call; one change may have been another run's.

        Raises:
            ConfigError: It changed between the two calls before too: a graph would be captured for each value.
        """
        changed = changed_numbers(context.key, call.key) if context.key is not None else {}
        if changed and context.renumbered:
            at, (was, now) = next(iter(changed.items()))
            raise ConfigError(
                f"the Python number at position {at} of the call changes from call to call ({was}, then {now}). With"
                f" batch_reduce='per_sample', pass a tensor, such as torch.full((batch,), {now}). If each call belongs to another run, call"
                " cached.reset() between them."
            )
        return bool(changed)

    def _row(
        self, context: ModelContext, advance: Advance, num_steps: int | None, version: tuple[tuple[int, int], str], renumbered: bool
    ) -> Row:
        """Return a sample with the state that it runs on, if the same model made it in the same generation."""
        row = Row(context, advance, num_steps, None, [advance.event] if advance.event else [], renumbered)
        if advance.began:
            return row
        if context.version != version[0]:
            row.drop(what_changed(context.version, *version))
        elif context.state is None:
            row.drop("the generation had ended")
        elif not advance.cleared:
            row.state = context.state.at(advance.step)
        return row

    # -- which samples run in which graph ------------------------------------------------------------------------

    def _plan(self, step: BatchStep) -> None:
        """Put the samples that reuse in one graph and those that compute in another."""
        kinds = {True: "reuse", False: "compute"}
        for reuses in (True, False):
            while members := [at for at, row in enumerate(step.rows) if row.reuses is reuses]:
                part = self._part(step, kinds[reuses], members)
                odd = [step.rows[at] for at in members if step.rows[at].state is not None and step.rows[at].context.layout != part.layout]
                for row in odd:
                    row.drop("the program changed")
                if not odd or not reuses:
                    step.parts.append(part)
                    break
        for part in step.parts:
            part.operands = self._operands(step, part)
            fresh = all(step.rows[at].state is None and step.rows[at].advance.step == 0 for at in part.rows)
            part.first = part.match.first if fresh and len({step.rows[at].num_steps for at in part.rows}) == 1 else None

    def _part(self, step: BatchStep, kind: str, members: list[int]) -> Part:
        size = self.sizes.size_for(len(members), step.call.count)
        return self.part_of(step.call, step.config, kind, members, size, step.rows[members[0]].num_steps)

    def part_of(self, call: BatchCall, config: CacheConfig, kind: str, members: list[int], size: int, num_steps: int | None) -> Part:
        """Return samples with the program that runs them at a batch size."""
        flat = call.gathered(_padded(members, size))
        args, kwargs = pytree.tree_unflatten(flat, call.spec)
        _, structure = leaves_of(args, kwargs)
        match = self._programs.match(args, kwargs, config, call_key(flat, structure), None, num_steps, kind == "reuse")
        check_apart(match, flat, call.batched, size, self._programs.gate)
        return Part(kind, members, size, match, row_layout(match, size))

    def _operands(self, step: BatchStep, part: Part) -> list[Any]:
        runnable, order = part.match.runnable, _padded(part.rows, part.size)
        rows = [step.rows[at] for at in order]
        needed = set(runnable.io[part.kind].slots)
        fresh = runnable.fresh(part.match.sizes) if any(row.state is None for row in rows) else None
        empty = [parts_of(slot, part.size)[0] for slot in fresh.slots] if fresh is not None else []
        slots: list[Tensor | None] = []
        for place, slot in enumerate(runnable.slots):
            if slot.name not in needed:
                slots.append(None)
                continue
            held = [empty[place] if row.state is None else row.state.slots[place] for row in rows]
            slots.append(in_order(torch.cat(held), slot.order) if part.size > 1 else held[0])
        steps = torch.tensor([row.advance.step for row in rows], device=runnable.plan.device)
        parameters = _parameters(runnable, step.config, [row.num_steps for row in rows], part.kind)
        return runnable.packed(part.kind, step.call.gathered(order), slots, steps, parameters)

    # -- what they leave -----------------------------------------------------------------------------------------

    @hidden
    def finish(self, step: BatchStep, returned: Sequence[Sequence[Any]]) -> Any:
        """Store what the graphs returned, one for each part, and return the model's output."""
        results = [self._take(step, part, values) for part, values in zip(step.parts, returned, strict=True)]
        outputs = [self._scattered(step, [leaves[i] for leaves in results]) for i in range(len(results[0]))]
        versions = {at: part for part in step.parts for at in part.rows}
        for at, row in enumerate(step.rows):
            self._commit(step, row, versions[at], last=at == len(step.rows) - 1)
        for row in step.rows:  # after all are kept: a warning may be an error
            if row.context.state is None:
                warn_without_reuse(row.context, step.config)
        return pytree.tree_unflatten(outputs, step.parts[0].match.runnable.program.signature.out_spec)

    def _take(self, step: BatchStep, part: Part, returned: Sequence[Any]) -> list[Any]:
        """Give each sample of a part its next state, and return the leaves of the model's output for them and the padding."""
        runnable = part.match.runnable
        named = runnable.io[part.kind].unpack(returned)
        if part.kind == "reuse":
            for at in part.rows:
                state = step.rows[at].state
                assert state is not None
                step.rows[at].following = state.reused()
        else:
            rows = [step.rows[at] for at in part.rows]
            known = [runnable.decided(step.config, row.num_steps, row.advance.step) for row in rows]
            decided = [left for left in known if left is not None]
            if len(decided) < len(rows):
                decided = named[REUSE_LEFT].tolist()
            written = [parts_of(slot, part.size) for slot in runnable.written(named)]
            changes = parts_of(named[INDICATOR], part.size) if INDICATOR in named else None
            for place, row in enumerate(rows):
                # copies: a sample must not keep the memory of the whole batch
                slots = tuple(slot[place].clone() for slot in written)
                before = row.state or CacheState(slots, Cursor(row.advance.step))
                row.following = before.computed(slots, decided[place])
                row.change = None if changes is None else changes[place].clone()
        return [named[name] for name in runnable.io[part.kind].results]

    def _scattered(self, step: BatchStep, leaves: list[Any]) -> Any:
        """Put one leaf of the parts' outputs together in the order of the samples."""
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        order = [at for part in step.parts for at in part.rows]
        whole = len(leaves) == 1 and step.parts[0].size == len(order)
        if whole and order == sorted(order):
            return leaves[0]
        pieces = [parts_of(leaf, part.size)[: len(part.rows)] for leaf, part in zip(leaves, step.parts, strict=True)]
        placed = dict(zip(order, (piece for held in pieces for piece in held), strict=True))
        return torch.cat([placed[at] for at in range(len(order))])

    def _commit(self, step: BatchStep, row: Row, part: Part, last: bool) -> None:
        context, following = row.context, row.following
        assert following is not None
        computed, fresh = part.kind == "compute", row.state is None or row.state.cursor.computed_at < 0
        before = Cursor(row.advance.step) if row.state is None else row.state.cursor
        context.state, context.layout, context.version = following, part.layout, part.match.version
        context.key, context.renumbered = step.call.key, row.renumbered
        context.state_bytes = following.bytes
        record = RawStep(row.advance.step, computed, fresh, row.change)
        event = self._contexts.succeed(context, row.advance, before, record, row.events, row.num_steps, ends_call=last)
        if event is not None:
            step.told.append(event)
        if row.num_steps is not None and row.advance.step == row.num_steps - 1:
            context.release()

    @hidden
    def end(self, step: BatchStep) -> None:
        """Let other calls in, whether or not this one succeeded."""
        self._programs.gate.leave()
        for row in step.rows:
            row.context.lock.release()

    @hidden
    def tell(self, event: StepEvent) -> None:
        """Call the callbacks that are told of each step."""
        self._contexts.listeners.tell(event)


def _padded(rows: list[int], size: int) -> list[int]:
    """Return positions of samples, the first one repeated until there are `size`."""
    return [*rows, *[rows[0]] * (size - len(rows))]


def _parameters(runnable: RunnableProgram, config: CacheConfig, num_steps: list[int | None], kind: str) -> tuple[Tensor, ...]:
    """Return what a graph takes of the settings, for each sample."""
    each = [runnable.parameters(config, steps, kind) for steps in num_steps]
    return tuple(torch.cat(values) for values in zip(*each, strict=True))
