"""The tools that `equal_schedule.py` compares, each told to compute and reuse the same steps of a small Wan model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, WanTransformer3DModel
from torch import Tensor, nn

import bwcache_compile as bw

STEPS = 14
MASK = (0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0)
"""1 reuses: two computed steps, then three reused ones between two computed ones, which every tool can be told to do."""
LONGEST = 3
"""Reused steps in a row."""
ANCHORS = 4
PATCH = 2
CHANNELS = 4

Mode = Literal["eager", "whole", "regional"]
MODES: tuple[Mode, ...] = ("eager", "whole", "regional")


@dataclasses.dataclass(frozen=True)
class Compilation:
    """How models are compiled: the mode, the backend of `torch.compile`, and whether it replays CUDA graphs."""

    mode: Mode
    backend: str = "inductor"
    cuda_graphs: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What `torch.compile` is called with."""
        graphs = self.cuda_graphs and self.backend == "inductor"
        return {"backend": self.backend, **({"mode": "reduce-overhead"} if graphs else {})}


class Shape(Protocol):
    """What a contestant takes of a model and its input.

    Attributes:
        blocks: Blocks of the model.
        latents: Shape of its input and output.
        text: Tokens and width of the prompt.
        contexts: Names of the calls of a step.
        device: Where it runs.
        dtype: Of the model, its input and the prompt.
        warm_up: Generations before anything is measured.
    """

    @property
    def blocks(self) -> int: ...  # noqa: D102
    @property
    def latents(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def text(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def contexts(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def device(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def warm_up(self) -> int: ...  # noqa: D102

    def model(self, blocks: int | None = None) -> Any:
        """Build the model with random weights, the same at each call; `blocks` keeps the first ones alone."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model in float32 on the CPU and its input: tokens, width and blocks, as in "1024x256x12"."""

    tokens: int
    width: int
    blocks: int
    text: tuple[int, int] = (16, 64)
    contexts: tuple[str, ...] = ("cond", "uncond")
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    warm_up: int = 3

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read a size.

        Raises:
            ValueError: It is not of that form, or no model has these numbers.
        """
        if not (match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)):
            raise ValueError(f"a size is TOKENSxWIDTHxBLOCKS, such as 1024x256x12; got {text!r}")
        size = cls(*map(int, match.groups()))
        if size.tokens % 16 or size.width % 64 or size.blocks < 4:
            raise ValueError(f"size {text}: tokens must be a multiple of 16, the width one of 64, and the blocks 4 or more")
        return size

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}x{self.blocks}"

    @property
    def latents(self) -> tuple[int, ...]:
        """Shape of the model's input and output."""
        side = 32 if self.tokens % 256 == 0 else 8
        return (1, CHANNELS, self.tokens // (side // PATCH) ** 2, side, side)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of one call, in float32."""
        return 4 * self.tokens * self.width

    def model(self, blocks: int | None = None) -> Any:
        """Build a Wan model with random weights, the same at each call."""
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            patch_size=(1, PATCH, PATCH), num_attention_heads=self.width // 64, attention_head_dim=64, in_channels=CHANNELS,
            out_channels=CHANNELS, text_dim=self.text[1], freq_dim=64, ffn_dim=4 * self.width, num_layers=self.blocks,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        )  # fmt: skip
        if blocks is not None:
            model.blocks = model.blocks[:blocks]
        return model.eval().requires_grad_(False)


def nothing(*_: Any) -> None:
    """Do nothing."""


@dataclasses.dataclass
class Contestant:
    """A model under one tool.

    Attributes:
        model: What is called, at each step once per context.
        scope: Opens the context of a call.
        begin: Prepares a generation; not timed.
        force: Prepares a step where the tool has no mask of steps; not timed.
        finish: Ends a generation; timed.
        state_bytes: Returns the bytes that the tool keeps between two steps, of all contexts.
        runs_aten: Whether its blocks run torch's own attention, whose calls the profiler sees.
        keeps: Lives as long as the contestant.
        notes: What a record says of it besides.
    """

    model: Callable[..., Any]
    scope: Callable[[str], AbstractContextManager[Any]] = lambda _: contextlib.nullcontext()
    begin: Callable[[], None] = nothing
    force: Callable[[int], None] = nothing
    finish: Callable[[], Any] = nothing
    state_bytes: Callable[[], int] = lambda: 0
    runs_aten: bool = True
    keeps: Any = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def held_bytes(*roots: Any) -> int:
    """Count the bytes of the tensors that objects hold, each storage once; modules are not entered."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes)) or callable(value):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        else:
            waiting += getattr(value, "__dict__", {}).values()
    return sum(storages.values())


def compiled(model: Any, how: Compilation) -> Any:
    """Compile a diffusers model as the mode says, and return what is to be called."""
    if how.mode == "regional" and len(model.blocks):
        model.compile_repeated_blocks(**how.options)
    if how.mode != "whole":
        return model
    whole = torch.compile(model, **how.options)
    if not how.cuda_graphs:
        return whole

    def copied(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # the call of another context overwrites what this one returned
        return tuple(output.clone() for output in whole(*args, **kwargs))

    return copied


def plain(size: Shape, how: Compilation) -> Contestant:
    """Compute every step."""
    return Contestant(compiled(size.model(), how))


def shell(size: Shape, how: Compilation) -> Contestant:
    """Run prologue and epilogue alone."""
    return Contestant(compiled(size.model(blocks=0), how))


def linear_weights() -> tuple[tuple[float, ...] | None, ...]:
    """Weigh every anchor that there is at each reused step, as calibrated weights do; none is 0."""
    rows: list[tuple[float, ...] | None] = []
    for step, reuses in enumerate(MASK):
        known = min(ANCHORS, MASK[:step].count(0))
        others = [0.1 * (-1) ** k for k in range(1, known)]
        rows.append((1 - sum(others), *others, *[0.0] * (ANCHORS - known)) if reuses else None)
    return tuple(rows)


def check_report(report: Any) -> None:
    """Refuse a generation of ours whose report tells of other steps than those of the mask.

    Raises:
        RuntimeError: It is such a generation.
    """
    for context in report.contexts.values():
        pattern = tuple(int(not record.computed) for record in context.steps)
        if pattern != MASK:
            raise RuntimeError(f"the report says {pattern}, the mask is {MASK}")


def report_bytes(report: Any) -> int:
    """Return the bytes that a report says are kept, of all contexts."""
    return sum(context.state_bytes for context in report.contexts.values())


def ours(indexed: bool = False, **settings: Any) -> Callable[[Shape, Compilation], Contestant]:
    """Return a maker of our drop-in, whose report is read at the end of a generation.

    Args:
        indexed: Tell it the index of each step, as `bw.enable` does in a pipeline; without, it finds the step by the time.
        settings: Of the cache.
    """

    def make(size: Shape, how: Compilation) -> Contestant:
        cached: Any = bw.transform(size.model(), bw.CacheConfig(policy="static", steps_mask=MASK, **settings))
        now: dict[str, int] = {}
        return Contestant(
            cached if how.mode == "eager" else torch.compile(cached, **how.options),
            scope=lambda context: cached.cache_context(context, **now),
            force=(lambda step: now.update(step_index=step)) if indexed else nothing,
            finish=lambda: check_report(cached.report()),
            state_bytes=lambda: report_bytes(cached.report()),
        )

    return make


def _states(model: nn.Module) -> list[Any]:
    """Return the states of the hooks of diffusers."""
    registries = [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]
    managers = [getattr(hook, "state_manager", None) for registry in registries for hook in registry.hooks.values()]
    return [manager._state_cache for manager in managers if manager is not None]


def of_diffusers(model: Any, how: Compilation, force: Callable[[int], None] = nothing) -> Contestant:
    """Return a model with one of diffusers' caches on."""
    return Contestant(
        compiled(model, how),
        scope=model.cache_context,
        begin=model._reset_stateful_cache,
        force=force,
        state_bytes=lambda: held_bytes(*_states(model)),
    )


def first_block_cache(size: Shape, how: Compilation) -> Contestant:
    """Force diffusers' FirstBlockCache by its threshold; it runs the first block at each step."""
    model = size.model()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    hook = model.blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")

    def force(step: int) -> None:
        hook.threshold = 1e9 if MASK[step] else -1.0

    return of_diffusers(model, how, force)


def mag_cache(size: Shape, how: Compilation) -> Contestant:
    """Force diffusers' MagCache: with ratios of 1 it skips as many steps as it may."""
    model = size.model()
    ratios, warm_up = [1.0] * STEPS, MASK.index(1) / STEPS
    model.enable_cache(
        MagCacheConfig(mag_ratios=ratios, num_inference_steps=STEPS, threshold=1e9, max_skip_steps=LONGEST, retention_ratio=warm_up)
    )
    return of_diffusers(model, how)


def taylor_seer(**choices: Any) -> Callable[[Shape, Compilation], Contestant]:
    """Return a maker of diffusers' TaylorSeer of order 1; its hooks are told at each step whether to compute."""

    def make(size: Shape, how: Compilation) -> Contestant:
        model = size.model()
        never = 10**9
        model.enable_cache(
            TaylorSeerCacheConfig(cache_interval=never, disable_cache_before_step=-1, taylor_factors_dtype=torch.float32, **choices)
        )
        registries = [module._diffusers_hook for module in model.modules() if hasattr(module, "_diffusers_hook")]
        hooks = [hook for hook in (registry.get_hook("taylorseer_cache") for registry in registries) if hook is not None]
        if not hooks:
            raise RuntimeError("TaylorSeer hooked no module")

        def force(step: int) -> None:
            for hook in hooks:
                hook.disable_cache_after_step = None if MASK[step] else 0

        return of_diffusers(model, how, force)

    return make


def cache_dit(size: Shape, how: Compilation) -> Contestant:
    """Give cache-dit the mask of steps; it runs the first block at each step, and takes contexts by turns."""
    import cache_dit as library

    model = size.model()
    if how.mode != "eager":
        library.set_compile_configs()
    config = library.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=MASK.index(1), residual_diff_threshold=1e9, num_inference_steps=STEPS,
        enable_separate_cfg=True, steps_computation_mask=[1 - reuses for reuses in MASK], steps_computation_policy="static",
    )  # fmt: skip
    library.enable_cache(model, cache_config=config)  # returns a list for a model that is in no pipeline
    return Contestant(
        compiled(model, how),
        begin=lambda: library.refresh_context(model, num_inference_steps=STEPS),
        state_bytes=lambda: held_bytes(model._context_manager.__dict__),
    )


PLAIN, SHELL = "plain", "prologue and epilogue"
OURS_OUTPUT, OURS_LINEAR, OURS_CUT = "ours, output", "ours, linear", "ours, linear, cut=output"
_MODULES = [r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"]

CONTESTANTS: dict[str, Callable[[Shape, Compilation], Contestant]] = {
    PLAIN: plain,
    SHELL: shell,
    OURS_OUTPUT: ours(reuse="output"),
    OURS_LINEAR: ours(reuse="linear", anchors=ANCHORS, weights=linear_weights()),
    OURS_CUT: ours(reuse="linear", anchors=ANCHORS, weights=linear_weights(), cut="output"),
    "FirstBlockCache": first_block_cache,
    "MagCache": mag_cache,
    "TaylorSeer": taylor_seer(cache_identifiers=_MODULES),
    "TaylorSeer, lite": taylor_seer(use_lite_mode=True),
    "cache-dit": cache_dit,
}


def left_out() -> dict[str, str]:
    """Say who does not take part, and why."""
    return {} if importlib.util.find_spec("cache_dit") else {"cache-dit": "not installed"}
