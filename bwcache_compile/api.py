"""The two calls most users need: `transform` and `find_blocks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn
from torch.export import ExportedProgram

from bwcache_compile import passes
from bwcache_compile.api_arguments import CAPTURES, Capture, block_names, check_arguments, check_model
from bwcache_compile.capture.capture import capture as capture_graph
from bwcache_compile.capture.flatten import flat_program
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, ConfigError, NoBlocksFoundError, StateError, UnsupportedGraphError, warn
from bwcache_compile.ir.compare import Verify
from bwcache_compile.ir.plan import BlockSearch
from bwcache_compile.ir.ranks import Ranks
from bwcache_compile.opaque import OpaqueModel
from bwcache_compile.passes import Guard
from bwcache_compile.region import RegionModel
from bwcache_compile.runtime import CachedModel
from bwcache_compile.runtime.signature import leaves_of
from bwcache_compile.toolchains import PartMaker, toolchain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Cached = CachedModel | RegionModel | OpaqueModel
"""What `transform` returns, by what is captured."""


@overload
def transform(
    model: nn.Module,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    capture: Literal["region"],
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    verify: Verify = "bitwise",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> RegionModel: ...


@overload
def transform(
    model: nn.Module,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    capture: Literal["opaque"],
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    verify: Verify = "bitwise",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> OpaqueModel: ...


@overload
def transform(
    model: nn.Module,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    capture: Literal["auto"],
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    verify: Verify = "bitwise",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> Cached: ...


@overload
def transform(
    model: nn.Module,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | None = None,
    guard: Guard = "host",
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    verify: Verify = "bitwise",
    capture: Literal["whole"] = "whole",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> CachedModel: ...


def transform(
    model: nn.Module,
    config: CacheConfig | Mapping[str, Any] | None = None,
    *,
    blocks: Sequence[str] | None = None,
    guard: Guard = "host",
    example_args: tuple[Any, ...] | None = None,
    example_kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    verify: Verify = "bitwise",
    capture: Capture | Literal["auto"] = "whole",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> Cached:
    """Return a drop-in for a diffusion transformer that reuses its blocks' outputs where they hardly change.

    The model is captured at the first call of each input signature, or at once for the examples given here. Its
    repeated blocks are found in the graph; no list of known models is consulted. Call `torch.compile` on the result,
    not on the model.

    A second call that differs from an earlier one in sizes alone (batch, frames, height, width, text length) is captured
    with dynamic sizes, and that program serves every size that its graph is proved for. It is compared with the model at each
    new size. Sizes that it is not proved for get programs of their own. A call at which a graph is compared costs two
    forwards, the model's and the graph's, whose result is the step's.

    Args:
        model: In evaluation mode by the time it is called. It is not changed, and its weights are not copied.
        config: What to cache and when to reuse it, as a `CacheConfig` or a dictionary of its settings. With no settings at all it is
            `CacheConfig.recommended()`, which needs no number of steps; single settings are on top of `CacheConfig()`, the paper's
            schedule with a compact indicator.
        blocks: Cache these instead of the blocks that are found: module paths (`"blocks.3"`), or the path of a stack
            (`"blocks"`). They must follow one another on one stream.
        guard: "host" picks one of two plain graphs at each step, and reads one number from the device per computed
            step. "graph" puts the choice into one graph with `torch.cond`: for one-file deployment, for
            `torch.compile(cached.functional_step, fullgraph=True)`, and for a guard per block.
        example_args: Positional arguments to capture now.
        example_kwargs: Keyword arguments to capture now.
        dynamic_shapes: Which sizes are open from the first capture on: "auto" for all that the model lets, else in the
            form of `torch.export.export`, where arguments that are left out have fixed sizes. None opens them when a
            second signature shows that they change.
        verify: How a captured graph is compared with the model before it is used, at its first call and at each new size.
            "bitwise" wants equal bits; "close" allows the rounding of the outputs' dtype (for models whose kernels change from
            run to run). False compares nothing, and a wrong capture goes unnoticed; the model still runs once before its first
            capture, because exporting a model that never ran can damage it.
        capture: "whole" makes one graph of the model. "region" is for models whose Python cannot be captured (it branches on values,
            or counts its calls): stacks of blocks that hand their outputs to one another are captured alone, and the model's own
            Python calls them at every step. What is before and after them is then not skipped, compiled or exported. "opaque" is for
            models whose blocks cannot be captured either, or have work of the model's own Python between them: the calls of the
            blocks' modules are guarded as they are, and nothing can be exported. "auto" takes the first of these that works on the
            examples, and warns where it is not "whole".
        process_group: Ranks that run the model together (tensor, sequence or context parallelism, FSDP, guidance branches on ranks of their
            own) and must compute and reuse the same steps. A policy that measures takes one `all_reduce` of two numbers a block for each
            computed step (of each stack, with "region"), in the graph of a computed step where there is one. Masks need none.
        sequence_group: The ranks that hold equal parts of the sequence, in its order (dimension 1 of what the blocks return), each of
            them one. The tokens that are measured are then chosen in the whole sequence, as one process would.
        **settings: Single settings of `CacheConfig`, on top of `config`: `transform(model, threshold=0.1, num_steps=50)`.

    Returns:
        A module that is called like `model`, and returns what `model` returns.

    Raises:
        ConfigError: `model` is no module, is compiled already, has offload hooks, or holds sharded weights, which only "opaque" takes.
        StateError: `model` is a cached model already.
        CaptureError, NoBlocksFoundError, UnsupportedGraphError: With examples, what the first call would raise.
    """
    if isinstance(model, Cached):
        raise StateError("this model is already transformed. Use it as it is, or transform the original model again with other settings.")
    check_model(model, capture)
    config = CacheConfig.of(config, **settings) if config is not None or settings else CacheConfig.recommended()
    ranks = Ranks.of(process_group, sequence_group)
    check_arguments(config, capture, guard, verify, dynamic_shapes, example_args, blocks, ranks is not None)
    if capture == "auto":
        if example_args is None and example_kwargs is None:
            raise ConfigError('capture="auto" tries the ways of capturing one after the other: pass example_args or example_kwargs.')
        groups = {"process_group": process_group, "sequence_group": sequence_group}
        return _first_that_works(model, config, verify, tuple(example_args or ()), example_kwargs or {}, groups)
    cached: Cached
    if capture == "region":
        cached = RegionModel(model, config, PartMaker(verify, ranks), verify)
    elif capture == "opaque":
        cached = OpaqueModel(model, config, verify, ranks)
    else:
        cached = CachedModel(model, config, toolchain(blocks, guard, ranks), dynamic_shapes, verify)
    if example_args is not None or example_kwargs is not None:
        cached.prepare(tuple(example_args or ()), example_kwargs or {})
    return cached


def _beginning(error: Exception) -> str:
    """Return the first lines of an error: what failed, and the first evidence."""
    return "\n    ".join(line.strip() for line in str(error).splitlines()[:3])


def _check_read_values(cached: CachedModel) -> None:
    """Refuse a graph that is right for one value of the time alone.

    Raises:
        CaptureError: The model reads a number in Python that may be the time.
    """
    signature = cached.program.signature
    for at, value in signature.read.items():
        if isinstance(at, int) and (value.is_floating_point() or value.numel() == 1):
            raise CaptureError(f"the values of `{signature.inputs[at]}`, which may change from step to step, are read {signature.read_at}")


def _first_that_works(
    model: nn.Module,
    config: CacheConfig,
    verify: Verify,
    example_args: tuple[Any, ...],
    example_kwargs: dict[str, Any],
    groups: dict[str, Any],
) -> Cached:
    """Transform a model by the first way of capturing that works on the examples, and warn where it is not "whole".

    Raises:
        CaptureError: None works.
    """
    name, reasons = type(model).__name__, ""
    # with the anchors at the output no stack is captured
    captures: tuple[Capture, ...] = CAPTURES if config.cut == "blocks" else ("whole", "opaque")
    try:
        leaves_of(example_args, example_kwargs)
    except ConfigError as error:  # an input that no graph of the model takes, such as a cache object
        reasons, captures = f"\n  whole: {_beginning(error)}", captures[1:]
    for capture in captures:
        try:
            examples: dict[str, Any] = {"example_args": example_args, "example_kwargs": example_kwargs}
            cached = transform(model, config, verify=verify, capture=capture, **examples, **groups)
            if isinstance(cached, CachedModel):
                _check_read_values(cached)
        except (CaptureError, NoBlocksFoundError, UnsupportedGraphError, ConfigError) as error:
            if capture == "whole" and isinstance(error, ConfigError):  # it is wrong in any case; later ones are of what needs a graph
                raise
            reasons += f"\n  {capture}: {_beginning(error)}"
        else:
            if reasons:
                warn(f"{name} is captured as {capture!r}, since it cannot be captured otherwise:{reasons}")
            return cached
    raise CaptureError(f"{name} cannot be captured:{reasons}")


def find_blocks(
    model: nn.Module | ExportedProgram,
    *,
    blocks: Sequence[str] | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
) -> BlockSearch:
    """Return the repeated blocks of a model and every candidate that was turned down, with the reason.

    Args:
        model: In evaluation mode; or a program that `torch.export.export` made, or what `transform` returned and has captured, which
            need no examples.
        blocks: Look at these instead of searching; see `transform`.
        example_args: Positional arguments to capture with.
        example_kwargs: Keyword arguments to capture with.

    Raises:
        CaptureError: The model could not be captured.
        ConfigError: `blocks` names nothing in the model, or what cannot be a chain of blocks.
    """
    names = block_names(blocks)
    if isinstance(model, ExportedProgram):
        program = flat_program(model, "the exported program")
    elif isinstance(model, CachedModel) and model.cached_programs and not (example_args or example_kwargs):
        program = model.program.fresh()
    else:
        program = capture_graph(model, example_args, example_kwargs or {})
    return passes.find_blocks(passes.run_pipeline(program, passes.TIDY_PIPELINE), names)
