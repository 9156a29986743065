"""A bundle as a model: called step after step, whatever runtime holds its graphs. Needs no torch, no numpy and no onnxruntime."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from bwcache_compile.config import CacheConfig, policy_dtype
from bwcache_compile.errors import BundleError, ConfigError, StateError
from bwcache_compile.exporters.bundle import Bundle
from bwcache_compile.exporters.call import UNTIL, Call, Runner, bound, flat_call, put_together
from bwcache_compile.report import ContextReport, RawStep, Report, step_records


@dataclasses.dataclass(frozen=True)
class _Moment:
    name: str
    step_index: int | None = None
    num_steps: int | None = None


class _Context:
    """One stream of calls: its state, where the runtime takes buffers in two sets that take turns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.state: dict[str, Any] = {}
        self.spare: dict[str, Any] = {}
        self.state_bytes = 0
        self.step = 0
        self.computed_at = -1
        self.reuse_until = -1
        self.records: list[RawStep] = []
        self.events: list[str] = []

    def report(self) -> ContextReport:
        return ContextReport(self.name, step_records(self.records), tuple(self.events), self.state_bytes)


def _config(bundle: Bundle) -> CacheConfig:
    values: dict[str, Any] = {key: float(value) if value in ("inf", "nan") else value for key, value in bundle.manifest["config"].items()}
    try:
        return CacheConfig(**values)
    except (TypeError, ValueError, OverflowError) as error:  # a ConfigError is a ValueError
        raise BundleError(f"{bundle.folder / 'manifest.json'}: the config does not fit this version: {error}.") from error


class Session:
    """A bundle as a model: `session(**inputs)` computes or reuses, and keeps one state per context on the device.

    Made by `bwcache_compile.load`. A step that fails leaves its context as it was: the next call takes its place.
    """

    def __init__(self, bundle: Bundle, runner: Runner, *, guarded: bool = False) -> None:
        """Run a bundle's graphs, the pair or the one that decides by itself."""
        self.manifest = bundle.manifest
        self.cache_config = _config(bundle)
        self.guarded, self._runner = guarded, runner
        self._contexts: dict[str, _Context] = {}
        self._lock = threading.Lock()
        self._moment: contextvars.ContextVar[_Moment | None] = contextvars.ContextVar("bwcache_moment", default=None)
        self._calls = 0

    # -- calling -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step. Takes what the model takes, as arrays or tensors; see `load` for the kinds.

        Returns:
            What the model returns: numpy arrays (OrtValues with `outputs="ortvalue"`), or with `backend="torch"` tensors.

        Raises:
            StateError: The inputs do not fit the bundle, or the context is in use.
            ConfigError: The policy needs the number of steps and it is not known, or is not the length of its mask.
            BundleError: The runtime failed.
        """
        values = self._step(bound(self.manifest, self._runner, args, kwargs))
        return put_together(self.manifest["outputs"]["form"], values)

    def run_flat(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run one step on inputs by the names that the graphs have for them; returns outputs by name."""
        return self._step(flat_call(self.manifest, self._runner, inputs))

    def state(self, context: str) -> dict[str, Any]:
        """Copy a context's cache to the host, by slot.

        Raises:
            StateError: No call was in that context, or a slot is bfloat16 and the runtime hands out numpy arrays.
        """
        held = self._contexts.get(context)
        if held is None:
            raise StateError(f"no call was in a context {context!r}; there are: {', '.join(self._contexts) or 'none'}.")
        return {name: self._runner.host(value) for name, value in held.state.items()}

    def _step(self, call: Call) -> dict[str, Any]:
        moment = self._moment.get() or self._unnamed()
        with self._lock:
            context = self._contexts.setdefault(moment.name, _Context(moment.name))
        if not context.lock.acquire(blocking=False):
            raise StateError(f"the context {moment.name!r} is in use by another thread. Give each stream of calls its own.")
        try:
            num_steps = self.cache_config.steps_of(moment.num_steps)
            self._arrive(context, moment, call, num_steps)
            return self._run(context, call, num_steps)
        finally:
            context.lock.release()

    def _unnamed(self) -> _Moment:
        calls = self.cache_config.calls_per_step
        if calls == 1:
            return _Moment("default")
        with self._lock:
            self._calls += 1
            return _Moment(f"call_{(self._calls - 1) % calls}")

    def _arrive(self, context: _Context, moment: _Moment, call: Call, num_steps: int | None) -> None:
        """Bring a context to the step of this call: a new generation, or the next step."""
        given = moment.step_index
        step = context.step if given is None else given
        over = num_steps is not None and step >= num_steps
        if given is not None and (over or given < 0):
            last = "" if num_steps is None else f" (0 .. {num_steps - 1})"
            raise StateError(f"step_index {given} is outside the {num_steps or 'unknown number of'} steps of a generation{last}.")
        changed = context.shapes is not None and context.shapes != call.shapes
        if context.shapes is None or over or step < context.step or changed:
            context.events = [f"the inputs changed before step {context.step}: a new generation began"] if changed and not over else []
            context.records = []
            self._start(context, call)
            step = given or 0
        context.step = step

    def _start(self, context: _Context, call: Call) -> None:
        runner = self._runner
        slots = [(slot["name"], slot["dtype"], call.sizes_of(slot["shape"]), float(slot["fill"])) for slot in self.manifest["slots"]]
        if self.guarded:
            slots.append((UNTIL, "int64", (1,), -1.0))
        context.state = {name: runner.full(name, shape, dtype, fill) for name, dtype, shape, fill in slots}
        context.state_bytes = sum(runner.bytes(value) for value in context.state.values())
        same = {name: runner.kind(value)[1] for name, value in context.spare.items()} == {name: shape for name, _, shape, _ in slots}
        if runner.takes_buffers and not same:
            context.spare = {name: runner.full(name, shape, dtype, 0) for name, dtype, shape, _ in slots}
        context.shapes, context.computed_at, context.reuse_until = call.shapes, -1, -1

    def _parameters(self, num_steps: int | None) -> dict[str, Any]:
        values = self.cache_config.policy_values(num_steps)
        return {f"policy.{name}": self._runner.vector(value, policy_dtype(name)) for name, value in values.items()}

    def _run(self, context: _Context, call: Call, num_steps: int | None) -> dict[str, Any]:
        step, runner = context.step, self._runner
        reuses = not self.guarded and 0 <= context.computed_at < step <= context.reuse_until
        kind = "guarded" if self.guarded else "reuse" if reuses else "compute"
        inputs = {**call.values, **{f"cache_in.{name}": value for name, value in context.state.items()}}
        inputs["step"] = runner.vector([step], "int64")
        if kind != "reuse":
            inputs |= self._parameters(num_steps)
        returned = runner.run(kind, inputs, {f"cache_out.{name}": value for name, value in context.spare.items()})
        self._note(context, kind, returned)
        return {item["name"]: runner.given_back(returned[item["name"]]) for item in self.manifest["outputs"]["items"]}

    def _note(self, context: _Context, kind: str, returned: dict[str, Any]) -> None:
        """Move a context to the next step, and take down what this one did."""
        step, fresh, runner = context.step, context.computed_at < 0, self._runner
        change = runner.host(returned["indicator"]) if "indicator" in returned else None
        computed = kind == "compute"
        if kind != "reuse":
            before, context.state = context.state, {name: returned[f"cache_out.{name}"] for name in context.state}
            context.spare = before if runner.takes_buffers else {}
        if kind == "compute":
            context.reuse_until = step + int(runner.host(returned["reuse_left"])[0])
        if kind == "guarded":
            computed = step > context.reuse_until
            if computed:  # eight bytes; the caches stay where they are
                context.reuse_until = int(runner.host(context.state[UNTIL])[0])
        if computed:
            context.computed_at = step
        context.records.append(RawStep(step, computed, fresh, change))
        context.step = step + 1

    # -- life ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def cache_context(
        self, name: str, *, step_index: int | None = None, num_inference_steps: int | None = None, **_: Any
    ) -> Iterator[None]:
        """Name the stream of calls that the block belongs to, and the step where the caller knows it."""
        token = self._moment.set(_Moment(name, step_index, num_inference_steps))
        try:
            yield
        finally:
            self._moment.reset(token)

    def reset(self, num_steps: int | None = None) -> None:
        """Begin a new generation in every context; `num_steps` replaces the configured number from here on."""
        if num_steps is not None:
            self.configure(num_steps=num_steps)
        with self._lock:
            self._contexts = {}
            self._calls = 0

    def configure(self, **changes: Any) -> None:
        """Change policy settings; they take effect at the next computed step.

        Raises:
            ConfigError: A value is bad, or the setting is built into the graphs.
        """
        config = self.cache_config.changed(**changes)
        if config.decide == "joint":
            raise ConfigError("decide='joint' is for a model in torch: the contexts of a bundle's session decide separately.")
        self.cache_config = config

    def report(self) -> Report:
        """Return what each context did in its current generation."""
        with self._lock:
            held = list(self._contexts.items())
        contexts = {name: context.report() for name, context in held}
        return Report(contexts, tuple(self.manifest["measured"]))
