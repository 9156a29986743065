"""Running a bundle with ONNX Runtime: called like the model, step after step. Needs numpy and onnxruntime, no torch."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import BundleError, ConfigError, StateError
from bwcache_compile.exporters.bundle import Bundle
from bwcache_compile.exporters.call import Call, Output, bound, flat_call
from bwcache_compile.report import ContextReport, RawStep, Report, step_records

_MAY_CHANGE = {"threshold", "reuse_interval", "tail", "warmup_steps", "num_steps"}
_UNTIL = "reuse_until"


@dataclasses.dataclass(frozen=True)
class _Moment:
    name: str
    step_index: int | None = None
    num_steps: int | None = None


class _Context:
    """One stream of calls: its state on the device, in two sets of buffers that take turns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.shapes: dict[str, tuple[int, ...]] | None = None
        self.state: dict[str, Any] = {}
        self.spare: dict[str, Any] = {}
        self.step = 0
        self.computed_at = -1
        self.reuse_until = -1
        self.records: list[RawStep] = []
        self.events: list[str] = []

    def report(self) -> ContextReport:
        held = sum(value.tensor_size_in_bytes() for value in self.state.values())
        return ContextReport(self.name, step_records(self.records), tuple(self.events), held)


def _config(bundle: Bundle) -> CacheConfig:
    values: dict[str, Any] = {key: float(value) if value in ("inf", "nan") else value for key, value in bundle.manifest["config"].items()}
    try:
        return CacheConfig(**values)
    except (TypeError, ConfigError) as error:
        raise BundleError(f"{bundle.folder / 'manifest.json'}: the config does not fit this version: {error}.") from error


class OrtSession:
    """A bundle as a model: `session(**inputs)` computes or reuses, and keeps one state per context on the device.

    Made by `bwcache_compile.load`. The two buffers of every slot take turns, so that no cache is copied, and none comes
    to the host unless the session runs there.
    """

    def __init__(
        self, bundle: Bundle, *, guarded: bool = False, providers: Sequence[Any] | None = None, options: Any = None, outputs: str = "numpy"
    ) -> None:
        """Open the graphs; see `load` for the arguments."""
        import onnxruntime as ort

        if outputs not in ("numpy", "ortvalue"):
            raise ConfigError(f'outputs is {outputs!r}; choose "numpy" or "ortvalue".')
        self.manifest = bundle.manifest
        self.cache_config = _config(bundle)
        self.guarded, self._outputs = guarded, outputs
        providers = list(providers or ["CPUExecutionProvider"])
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        missing = [first] if first not in ort.get_available_providers() else []
        if missing:
            raise ConfigError(f"{first} is not in this onnxruntime; it has {', '.join(ort.get_available_providers())}.")
        self._device = "cuda" if first == "CUDAExecutionProvider" else "cpu"
        self._sessions = {}
        for kind in ("guarded",) if guarded else ("compute", "reuse"):
            path = bundle.graph_file(kind)
            try:
                self._sessions[kind] = ort.InferenceSession(str(path), options, providers=providers)
            except Exception as error:  # onnxruntime's errors have no common class of their own
                raise BundleError(f"{path} does not run on {first}: {str(error).splitlines()[0]}") from error
            self._check(kind)
        self._contexts: dict[str, _Context] = {}
        self._lock = threading.Lock()
        self._moment: contextvars.ContextVar[_Moment | None] = contextvars.ContextVar("bwcache_moment", default=None)
        self._calls = 0

    def _check(self, kind: str) -> None:
        """Compare a graph with what the manifest says of it."""
        entry, session = self.manifest["graphs"][kind], self._sessions[kind]
        for what, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            if [value.name for value in found] != entry[what]:
                raise BundleError(f"{entry['file']} has the {what} {[v.name for v in found]}, and the manifest says {entry[what]}.")
        known = {entry["name"]: entry["dtype"] for entry in self.manifest["inputs"]}
        known |= {f"cache_in.{slot['name']}": slot["dtype"] for slot in self.manifest["slots"]}
        for value in session.get_inputs():
            dtype = value.type.removeprefix("tensor(").removesuffix(")")
            expected = {"float32": "float", "float64": "double"}.get(known.get(value.name, ""), known.get(value.name))
            if expected is not None and dtype != expected:
                raise BundleError(f"{entry['file']} takes {value.name} as {dtype}, and the manifest says {expected}.")

    # -- calling -------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one denoising step. Takes what the model takes, as numpy arrays, OrtValues or anything with DLPack.

        Returns:
            What the model returns, as numpy arrays (or OrtValues on the device, with `outputs="ortvalue"`).

        Raises:
            StateError: The inputs do not fit the bundle, or the context is in use.
            ConfigError: The policy needs the number of steps and it is not known.
        """
        values = self._step(bound(self.manifest, args, kwargs))
        return Output.put_together(self.manifest["outputs"], values)

    def run_flat(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run one step on inputs by the names that the graphs have for them; returns outputs by name."""
        return self._step(flat_call(self.manifest, inputs))

    def state(self, context: str) -> dict[str, Any]:
        """Copy a context's cache to the host, by slot."""
        return {name: value.numpy() for name, value in self._contexts[context].state.items()}

    def _step(self, call: Call) -> dict[str, Any]:
        moment = self._moment.get() or self._unnamed()
        with self._lock:
            context = self._contexts.setdefault(moment.name, _Context(moment.name))
        if not context.lock.acquire(blocking=False):
            raise StateError(f"the context {moment.name!r} is in use by another thread. Give each stream of calls its own.")
        try:
            num_steps = moment.num_steps or self.cache_config.steps
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
        step = context.step if moment.step_index is None else moment.step_index
        over = num_steps is not None and step >= num_steps
        if over and moment.step_index is not None:
            raise StateError(f"step_index {step} is outside the {num_steps} steps of a generation (0 .. {int(num_steps or 0) - 1}).")
        changed = context.shapes is not None and context.shapes != call.shapes
        if context.shapes is None or over or step < context.step or changed:
            context.events = [f"the inputs changed before step {context.step}: a new generation began"] if changed and not over else []
            context.records = []
            context.step = context.step if context.shapes is None else 0
            self._start(context, call)
            step = moment.step_index or 0
        context.step = step

    def _start(self, context: _Context, call: Call) -> None:
        slots = [(slot["name"], slot["dtype"], call.sizes_of(slot["shape"]), float(slot["fill"])) for slot in self.manifest["slots"]]
        if self.guarded:
            slots.append((_UNTIL, "int64", (1,), -1.0))
        same = {name: tuple(value.shape()) for name, value in context.spare.items()} == {name: shape for name, _, shape, _ in slots}
        context.state = {name: self._full(shape, dtype, fill) for name, dtype, shape, fill in slots}
        if not same:
            context.spare = {name: self._full(shape, dtype, 0) for name, dtype, shape, _ in slots}
        context.shapes, context.computed_at, context.reuse_until = call.shapes, -1, -1

    def _full(self, shape: tuple[int, ...], dtype: str, fill: float) -> Any:
        import onnxruntime as ort

        if dtype == "bfloat16":  # numpy has none; what is kept in it starts as zeros
            zeros = np.zeros(shape, dtype=np.uint16)
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, 16)
        return ort.OrtValue.ortvalue_from_numpy(np.full(shape, fill, dtype=dtype), self._device, 0)

    def _parameters(self, num_steps: int | None) -> dict[str, Any]:
        values = self.cache_config.policy_values(num_steps)
        dtypes = {name: np.float32 if name == "threshold" else np.int64 for name in values}
        return {f"policy.{name}": np.array(value, dtype=dtypes[name]) for name, value in values.items()}

    def _run(self, context: _Context, call: Call, num_steps: int | None) -> dict[str, Any]:
        step = context.step
        reuses = not self.guarded and 0 <= context.computed_at < step <= context.reuse_until
        kind = "guarded" if self.guarded else "reuse" if reuses else "compute"
        names = self.manifest["graphs"][kind]
        session, scalars = self._sessions[kind], {"step": np.array([step], dtype=np.int64)}
        if kind != "reuse":
            scalars |= self._parameters(num_steps)
        binding = session.io_binding()
        for name in names["inputs"]:
            if name in scalars:
                binding.bind_cpu_input(name, scalars[name])
            elif name.startswith("cache_in."):
                binding.bind_ortvalue_input(name, context.state[name.removeprefix("cache_in.")])
            else:
                binding.bind_ortvalue_input(name, call.values[name])
        for name in names["outputs"]:
            if name.startswith("cache_out."):
                binding.bind_ortvalue_output(name, context.spare[name.removeprefix("cache_out.")])
            else:
                on_device = self._outputs == "ortvalue" and name not in ("reuse_left", "indicator")
                binding.bind_output(name, self._device if on_device else "cpu")
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise BundleError(f"{names['file']} fails in ONNX Runtime: {str(error).splitlines()[0]}") from error
        returned = dict(zip(names["outputs"], binding.get_outputs(), strict=True))
        self._note(context, kind, returned)
        users = [item["name"] for item in self.manifest["outputs"]["items"]]
        return {name: returned[name] if self._outputs == "ortvalue" else returned[name].numpy() for name in users}

    def _note(self, context: _Context, kind: str, returned: dict[str, Any]) -> None:
        """Move a context to the next step, and take down what this one did."""
        step, fresh = context.step, context.computed_at < 0
        change = returned["indicator"].numpy() if "indicator" in returned else None
        computed = kind == "compute"
        if kind != "reuse":
            context.state, context.spare = context.spare, context.state
        if kind == "compute":
            context.reuse_until = step + int(returned["reuse_left"].numpy()[0])
        if kind == "guarded":
            computed = step > context.reuse_until
            if computed:  # eight bytes; the caches stay where they are
                context.reuse_until = int(context.state[_UNTIL].numpy()[0])
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
        if set(changes) - _MAY_CHANGE:
            raise ConfigError(
                f"{', '.join(sorted(set(changes) - _MAY_CHANGE))} is built into the graphs; export again."
                f" What may change is {', '.join(sorted(_MAY_CHANGE))}."
            )
        self.cache_config = dataclasses.replace(self.cache_config, **changes)

    def report(self) -> Report:
        """Return what each context did in its current generation."""
        contexts = {name: context.report() for name, context in self._contexts.items()}
        return Report(contexts, tuple(self.manifest["measured"]))
