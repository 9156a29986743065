"""What `gpu.py` measures: two shapes, the contestants at each of them, and how one contestant is measured in its process."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

import bwcache_compile as bw
from benchmarks.equal_contestants import (
    CONTESTANTS,
    MASK,
    OURS_LINEAR,
    OURS_OUTPUT,
    PLAIN,
    SHELL,
    Compilation,
    Contestant,
    Mode,
    Shape,
    check_report,
    linear_weights,
    ours,
    report_bytes,
)
from benchmarks.equal_worker import STEP, Worker, peak
from benchmarks.half import halved

OURS_BY_TIME, ORT, AOTI = "ours, output, step found by the time", "ours, output, ONNX Runtime", "ours, output, AOTInductor"
SAME_NUMBERS = (OURS_OUTPUT, OURS_BY_TIME, ORT, AOTI)
"""They reuse alike, so their latents differ by rounding alone."""

EAGER, COMPILED, GRAPHS, BY_BLOCK = "eager", "compiled", "CUDA graphs", "compiled by block"


def compilation(mode: str, backend: str = "inductor") -> Compilation:
    """Return how a mode of this benchmark compiles."""
    kind: Mode = {EAGER: "eager", COMPILED: "whole", GRAPHS: "whole", BY_BLOCK: "regional"}[mode]
    return Compilation(kind, backend, cuda_graphs=mode == GRAPHS)


ROUNDS: tuple[tuple[tuple[str, str], ...], ...] = (
    tuple((name, mode) for mode in (EAGER, COMPILED, GRAPHS) for name in (SHELL, PLAIN, OURS_OUTPUT)),
    (("FirstBlockCache", EAGER), ("MagCache", EAGER), ("cache-dit", EAGER), (OURS_LINEAR, EAGER), (OURS_LINEAR, GRAPHS)),
    ((ORT, EAGER), (AOTI, COMPILED), (OURS_BY_TIME, EAGER), ("FirstBlockCache", BY_BLOCK), ("MagCache", BY_BLOCK)),
)
"""Contestants and modes, the most wanted first: every shape goes through one round before the next begins."""

READS = {"scalar reads": "aten::_local_scalar_dense", "stream waits": "cudaStreamSynchronize", "copies to the host": "Memcpy DtoH"}
"""What makes the host wait for the device, by the beginning of its name in a profile."""


@dataclasses.dataclass(frozen=True)
class WanShape:
    """A Wan model and its input.

    Attributes:
        heads: Attention heads.
        head_dim: Width of one.
        ffn: Width inside of the feed-forward layers.
        baseline_steps: Steps that the plain model and prologue and epilogue run, which are all alike.
        export_latents: Shape at which the model is exported to ONNX with dynamic sizes; None exports at the shape itself.
        repeats: Generations whose steps are timed.
        whole_runs: Generations that are timed as a whole, without waiting for the device at each step.
    """

    blocks: int
    heads: int
    head_dim: int
    ffn: int
    latents: tuple[int, ...]
    text: tuple[int, int]
    device: str
    dtype: torch.dtype = torch.bfloat16
    contexts: tuple[str, ...] = ("cond",)
    warm_up: int = 2
    baseline_steps: int = len(MASK)
    export_latents: tuple[int, ...] | None = None
    repeats: int = 3
    whole_runs: int = 3

    def model(self, blocks: int | None = None) -> Any:
        """Build the model on its device with random weights, the same at each call."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model: Any = WanTransformer3DModel(
                num_attention_heads=self.heads, attention_head_dim=self.head_dim, in_channels=self.latents[1], out_channels=self.latents[1],
                text_dim=self.text[1], ffn_dim=self.ffn, num_layers=self.blocks,
            )  # fmt: skip
        if blocks is not None:
            model.blocks = model.blocks[:blocks]
        return halved(model.eval().requires_grad_(False), self.dtype)


def shapes(device: str, tiny: bool) -> dict[str, WanShape]:
    """Return the shapes by name: one bound by launching, and Wan 2.1's 1.3 B transformer at 81 frames of 832 x 480."""
    if tiny:
        launch = WanShape(2, 2, 16, 64, (1, 4, 1, 8, 8), (8, 32), device, contexts=("cond", "uncond"), warm_up=1, repeats=1, whole_runs=1)
        return {"launch-bound": launch, "wan": dataclasses.replace(launch, latents=(1, 4, 2, 8, 8), contexts=("cond",), baseline_steps=3)}
    launch = WanShape(12, 4, 64, 1024, (1, 16, 1, 16, 16), (32, 256), device, contexts=("cond", "uncond"))
    wan = WanShape(
        30, 12, 128, 8960, (1, 16, 21, 60, 104), (512, 4096), device, warm_up=1, baseline_steps=4, export_latents=(1, 16, 2, 8, 8),
        repeats=1, whole_runs=1,
    )  # fmt: skip
    return {"launch-bound": launch, "wan": wan}


def _session(size: Shape, session: Any, taken: torch.dtype, folder: Any) -> Contestant:
    """Return a session of a bundle as a contestant; it is told each step's index, and takes inputs of a dtype."""
    now: dict[str, int] = {}

    def call(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        found = session(x.to(taken), t, text.to(taken), return_dict=return_dict)[0]
        tensor = found if isinstance(found, torch.Tensor) else torch.from_dlpack(found)
        return (tensor.to(size.dtype),)

    return Contestant(
        call,
        scope=lambda context: session.cache_context(context, **now),
        force=lambda step: now.update(step_index=step),
        finish=lambda: check_report(session.report()),
        state_bytes=lambda: report_bytes(session.report()),
        runs_aten=False,
        keeps=folder,
    )


def _exported(size: WanShape, folder: Path, latents: Sequence[int] | None, dtype: torch.dtype, device: str, **settings: Any) -> None:
    """Write the cached model as a bundle; at other latents than the shape's its sizes are dynamic."""
    model = dataclasses.replace(size, dtype=dtype).model().to(device)
    placed: Any = {"device": device, "dtype": dtype}
    inputs = {
        "hidden_states": torch.randn(*(latents or size.latents), **placed),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, *size.text, **placed),
        "return_dict": False,
    }
    cached = bw.transform(
        model, bw.CacheConfig(policy="static", steps_mask=MASK), example_kwargs=inputs, dynamic_shapes="auto" if latents else None
    )
    bw.export(cached, folder, **settings)


ONNX_ATTEMPTS = ((torch.bfloat16, 23), (torch.float16, 23), (torch.float16, 20))
"""Dtype and operator set; the first that can be written and opened is measured."""


def onnx_runtime(size: WanShape, how: Compilation) -> Contestant:
    """Run the exported graphs in ONNX Runtime, with inputs, outputs and state on the device.

    Raises:
        RuntimeError: Nothing could be written and opened; the message says why of each attempt.
    """
    why = []
    for dtype, opset in ONNX_ATTEMPTS:
        folder = tempfile.TemporaryDirectory()
        bundle = Path(folder.name) / "bundle"
        try:
            _exported(size, bundle, size.export_latents, dtype, "cpu", opset=opset)
            session = bw.load(bundle, device=size.device, outputs="ortvalue")
            found = _session(size, session, dtype, folder)
            found.notes["form"] = f"{str(dtype).removeprefix('torch.')}, operator set {opset}"
            if why:
                found.notes["attempts"] = "; ".join(why)
            return found
        except (bw.BundleError, bw.ConfigError, bw.ExportError) as error:
            why.append(f"{dtype}, operator set {opset}: {str(error).strip().partition(chr(10))[0]}")
            folder.cleanup()
    raise RuntimeError("; ".join(why))


def aot_inductor(size: WanShape, how: Compilation) -> Contestant:
    """Run the graphs as AOTInductor compiled them for the device."""
    folder = tempfile.TemporaryDirectory()
    bundle = Path(folder.name) / "bundle"
    _exported(size, bundle, None, size.dtype, size.device, format="aoti")
    return _session(size, bw.load(bundle, allow_code=True), size.dtype, folder)


MAKERS: Mapping[str, Callable[[Any, Compilation], Contestant]] = {
    **CONTESTANTS,
    OURS_OUTPUT: ours(indexed=True, reuse="output"),
    OURS_LINEAR: ours(indexed=True, reuse="linear", anchors=4, weights=linear_weights()),
    OURS_BY_TIME: ours(reuse="output"),
    ORT: onnx_runtime,
    AOTI: aot_inductor,
}


def host_reads(events: Sequence[tuple[str, int, int]], mask: Sequence[int]) -> dict[str, dict[str, float]]:
    """Count what made the host wait at each kind of step: the median of computed steps, and of reused ones.

    Args:
        events: Name, beginning and end of each event of a profile; steps are those named `STEP`.
        mask: 1 where a step reuses.
    """
    steps = sorted((begin, end) for name, begin, end in events if name == STEP)
    counts = [dict.fromkeys(READS, 0) for _ in steps]
    for name, begin, _ in events:
        for kind, beginning in READS.items():
            for count, (first, last) in zip(counts, steps, strict=True):
                if name.startswith(beginning) and first <= begin <= last:
                    count[kind] += 1
    found = {}
    for title, reuses in (("computed step", 0), ("reused step", 1)):
        alike = [count for count, m in zip(counts, mask, strict=True) if m == reuses]
        if alike:
            found[title] = {kind: statistics.median(count[kind] for count in alike) for kind in READS}
    return found


class GpuWorker(Worker):
    """One contestant at one shape. The methods are asked for one after another."""

    size: WanShape

    def __init__(self, name: str, size: WanShape, how: Compilation) -> None:
        """Build the model; nothing is compiled yet."""
        self._began = time.perf_counter()
        super().__init__(name, size, how, MAKERS)
        if name in (PLAIN, SHELL):
            self.mask = self.mask[: size.baseline_steps]

    def ready(self) -> dict[str, Any]:
        """Capture and compile by running generations, and return what that took."""
        for _ in range(self.size.warm_up):
            self.run()
        return {**self.contestant.notes, "ready_seconds": time.perf_counter() - self._began, **self.compilations()}

    def watched(self) -> dict[str, Any]:
        """Watch one generation: host reads, state and, on the CPU, the peak of memory.

        Raises:
            RuntimeError: The steps that were computed are not those of the mask.
        """
        events, state_bytes = self.profiled()
        self.blocks_run(events)
        timed = [(event.name(), event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]
        found: dict[str, Any] = {"state_bytes": state_bytes, "host_reads": host_reads(timed, self.mask)}
        if not self.times.is_cuda:
            found["peak_bytes"] = peak([event.nbytes() for event in events if event.name() == "[memory]"])
        return found

    def timed(self) -> dict[str, Any]:
        """Time steps, waiting for the device after each, and whole generations without; and note what memory they took."""
        if self.times.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        rows = [self.run() for _ in range(self.size.repeats)]
        steps = [statistics.median(step) for step in zip(*rows, strict=True)]
        whole = [self.whole() for _ in range(self.size.whole_runs)]
        found: dict[str, Any] = {"step_ms": [1e3 * step for step in steps], "run_seconds": statistics.median(whole), "steps": len(steps)}
        for title, reuses in (("computed_step_ms", 0), ("reused_step_ms", 1)):
            alike = [1e3 * step for step, m in zip(steps, self.mask, strict=True) if m == reuses]
            found[title] = statistics.median(alike) if alike else None
        if self.times.is_cuda:
            free, total = torch.cuda.mem_get_info()
            found |= {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": torch.cuda.max_memory_reserved()}
            found["device_used_bytes"] = total - free
        last = self.last.float().reshape(-1)
        found["sample"] = last[:: max(1, len(last) // 256)].tolist()
        found["compiled_while_timed"] = self.compiled_while_timed()
        return found

    def whole(self) -> float:
        """Run one generation and return its seconds; the device is waited for at the end alone."""
        x = self.latents
        with torch.no_grad():
            self.contestant.begin()
            self.wait()
            began = time.perf_counter()
            for step in range(len(self.mask)):
                self.contestant.force(step)
                x = self.step(x, step)
            self.wait()
            seconds = time.perf_counter() - began
            self.contestant.finish()
        return seconds
