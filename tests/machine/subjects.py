"""What the stateful test drives: a cached model, and sessions of its bundles, behind one interface."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import bwcache_compile as bw
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.bundle.runners.ort import OrtRunner
from bwcache_compile.bundle.runners.torch_graphs import TorchRunner
from bwcache_compile.bundle.session import Session
from tests.models import Tiny

CONFIG = bw.CacheConfig(num_steps=6, threshold=float("inf"), reuse_interval=2, tail=0.0)
WHOLE = 1024
"""Integer time of what is 1.0 in floating point."""


class Timed(Tiny):
    """Two blocks that read a buffer and a tensor that is no buffer; the output depends on the current inputs too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch, self.time, self.head = torch.nn.Linear(4, width), torch.nn.Linear(1, width), torch.nn.Linear(width, 4)
        self.blocks = torch.nn.ModuleList(TimedBlock(width) for _ in range(2))
        self.register_buffer("scale", torch.ones(1))
        self.shift = torch.zeros(1)

    def embed(self, t: Tensor) -> Tensor:
        t = t.to(torch.float32).view(-1, 1, 1)
        return self.time(t)

    def hidden(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what the blocks return."""
        x, temb = self.patch(x) + self.shift, self.embed(t)
        for block in self.blocks:
            x = block(x, temb, self.scale)
        return x

    def finish(self, hidden: Tensor, t: Tensor) -> Tensor:
        """Return the output for what the blocks returned."""
        return self.head(hidden * self.scale + self.embed(t))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.finish(self.hidden(x, t), t)


class TimedBlock(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x: Tensor, temb: Tensor, scale: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x + temb) * scale))


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens inside a call: `act` at its n-th operation, before it or after it; in a session, at a method of its runner."""

    at: int
    act: Callable[[], None]
    after: bool = False
    method: str = ""


class _AtOperator(TorchDispatchMode):
    """Acts at one operator of torch that runs meanwhile."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault, self.seen = fault, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        due = self.seen == self.fault.at
        if due and not self.fault.after:
            self.fault.act()
        returned = func(*args, **(kwargs or {}))
        if due and self.fault.after:
            self.fault.act()
        return returned


class FaultyRunner:
    """A runner that acts at one of its calls."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.arm(None)

    def arm(self, fault: Fault | None) -> None:
        self.fault, self._seen = fault, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._runner, name)
        return functools.partial(self._call, name, found) if callable(found) else found

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fault = self.fault
        if fault is None or fault.method not in ("", name):
            return method(*args, **kwargs)
        self._seen += 1
        if self._seen != fault.at:
            return method(*args, **kwargs)
        self.fault = None
        if not fault.after:
            fault.act()
        returned = method(*args, **kwargs)
        if fault.after:
            fault.act()
        return returned


class Subject:
    """Something that is called step after step.

    Attributes:
        name: For messages.
        tolerance: How far an output may be from the model's.
        called: The cached model or the session.
        model: A model that computes the same without a cache, with the weights of now.
        version: Grows with each edit of the weights.
    """

    tolerance = 0.0

    def __init__(self, name: str, called: Any, model: Timed) -> None:
        self.name, self.called, self.model, self.version = name, called, model, 0

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        """Act at one operation of the calls made meanwhile."""
        raise NotImplementedError

    def call(self, x: Tensor, t: Tensor, context: str | None, step: int | None) -> Tensor:
        """Make one call, in a context if one is named."""
        naming = self.called.cache_context(context, step_index=step) if context else contextlib.nullcontext()
        with torch.no_grad(), naming:
            return torch.as_tensor(self._run(x, t))

    def _run(self, x: Tensor, t: Tensor) -> Any:
        return self.called(x, t=t)


class ModelSubject(Subject):
    """A cached model. Its weights may be edited."""

    def __init__(self, called: bw.CachedModel, model: Timed) -> None:
        super().__init__("CachedModel", called, model)

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        with _AtOperator(fault):
            yield

    @torch.no_grad()
    def edit(self, edit: str) -> None:
        """Change the weights in one of the ways that there are."""
        self.version += 1
        factor, weight = 1 + 0.1 * (self.version % 5), self.model.blocks[0].up.weight
        if edit == "weight":
            weight.mul_(factor + 0.1)
        elif edit == "address":
            weight.data = weight * (factor + 0.1)
        elif edit == "buffer":
            self.model.scale.fill_(factor)
        elif edit == "attribute":
            self.model.shift.fill_(factor)
        elif edit == "state_dict":
            self.model.load_state_dict({**self.model.state_dict(), "head.bias": self.model.head.bias + factor})
        else:
            self.called.invalidate()


class SessionSubject(Subject):
    """A session of a bundle."""

    def __init__(self, name: str, session: Session, runner: FaultyRunner, model: Timed, tolerance: float) -> None:
        super().__init__(name, session, model)
        self._runner, self.tolerance = runner, tolerance

    @contextlib.contextmanager
    def faulty(self, fault: Fault) -> Iterator[None]:
        self._runner.arm(fault)
        try:
            yield
        finally:
            self._runner.arm(None)


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return inputs to capture with."""
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), torch.full((2,), 1.0 if dtype.is_floating_point else WHOLE).to(
        dtype
    )


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def _runners(dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    """Export one bundle per format and open it; both are slow, so once per process."""
    cached = bw.transform(Timed().eval(), CONFIG, example_args=example(dtype), dynamic_shapes="auto")
    folder = Path(_folder().name) / str(dtype)
    bw.export(cached, folder / "pt2", "pt2")
    pt2 = open_bundle(folder / "pt2")
    runners: dict[str, tuple[Any, Any]] = {"pt2": (pt2, TorchRunner(pt2))}
    if dtype in (torch.float32, torch.int64):  # an export takes seconds, and numpy has no bfloat16
        bw.export(cached, folder / "onnx", guarded=True)
        onnx = open_bundle(folder / "onnx")
        for name, kinds in (("onnx", ("compute", "reuse")), ("onnx guarded", ("guarded",))):
            runners[name] = onnx, OrtRunner(onnx, kinds, outputs="numpy")
    return runners


@functools.cache
def _cached(calls: int) -> tuple[bw.CachedModel, Timed, dict[str, Tensor]]:
    """Return one cached model for all scripts: capturing is slow."""
    model = Timed().eval()
    cached = bw.transform(model, dataclasses.replace(CONFIG, calls_per_step=calls), dynamic_shapes="auto")
    return cached, model, {name: value.clone() for name, value in _tensors(model).items()}


def _tensors(model: Timed) -> dict[str, Tensor]:
    return {**model.state_dict(), "shift": model.shift}


def subjects(dtype: torch.dtype, calls: int) -> list[Subject]:
    """Return a cached model and sessions as they are before their first call; times have this dtype."""
    cached, model, weights = _cached(calls)
    with torch.no_grad():
        for name, value in _tensors(model).items():
            value.copy_(weights[name])
    cached.configure(**{name: getattr(CONFIG, name) for name in ("threshold", "reuse_interval", "num_steps")})
    cached.reset()
    cached.prepare(example(dtype))
    found: list[Subject] = [ModelSubject(cached, model)]
    pristine = Timed().eval()
    for name, (bundle, opened) in _runners(dtype).items():
        runner = FaultyRunner(opened)
        session = Session(bundle, runner, guarded=name == "onnx guarded")
        session.cache_config = dataclasses.replace(session.cache_config, calls_per_step=calls)
        found.append(SessionSubject(name, session, runner, pristine, 0.0 if name == "pt2" else 1e-4))
    return found


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start work on a thread of its own; calling what is returned waits for it, and returns or raises what it did."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(60)
        assert outcome, "a call waits for ever"
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result
