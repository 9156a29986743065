"""Prepare, build and open TensorRT engines of a bundle's graphs. Only building and opening need TensorRT."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bwcache_compile.bundle.dynamic_shapes import Range, profile
from bwcache_compile.bundle.files import Bundle, file_hash, open_bundle
from bwcache_compile.bundle.manifest import Manifest, TensorRTEntry
from bwcache_compile.bundle.session import Session
from bwcache_compile.errors import BundleError, ExportError
from bwcache_compile.exporters.tensorrt.operators import LIST_VERSION, unlisted_operators
from bwcache_compile.exporters.write import add_files, replaced_together

RECORD, TIMING = "engines.json", "timing.cache"

_SCRIPT = '''\
"""Build this bundle's engines: `python build_engines.py ENGINES`. Needs TensorRT and bwcache-compile, no torch."""

import sys
from pathlib import Path

from bwcache_compile.exporters.tensorrt import build

build(Path(__file__).parent, sys.argv[1], progress=lambda *now: print(*now))
'''


def _import() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise ExportError(f'engines need NVIDIA TensorRT: pip install "bwcache-compile[tensorrt]" ({error}).') from error
    return tensorrt


def _opened(directory: str | Path) -> Bundle:
    """Open a bundle of ONNX graphs.

    Raises:
        BundleError: It is none, or it is damaged.
    """
    bundle = open_bundle(directory)
    graph_format = bundle.manifest.graph_format
    if graph_format != "onnx":
        raise BundleError(f'{directory} has format "{graph_format}"; engines are built from a bundle of format "onnx".')
    return bundle


# -- what a builder needs ----------------------------------------------------------------------------------------


def _trtexec(manifest: Manifest, sizes: Mapping[str, Range] | None) -> Iterator[str]:
    """Write the lines that build what `build_engines.py` builds, but for STRICT_NANS, which trtexec has no switch for."""
    yield "#!/bin/sh\n# sh trtexec.sh ENGINES: one engine per graph.\nset -e\n: ${1:?the folder for the engines}\n"
    yield 'mkdir -p "$1"\nout=$(cd "$1" && pwd)\ncd "$(dirname "$0")"\n'
    for kind, graph in manifest.graphs.items():
        shapes = profile(manifest, kind, sizes)
        parts = [f'trtexec --onnx={graph.file} --saveEngine="$out/{kind}.engine" --timingCacheFile="$out/timing.cache"']
        parts.append("--noTF32 --skipInference")
        for i, switch in enumerate(("--minShapes", "--optShapes", "--maxShapes") if shapes else ()):
            listed = ",".join(f"{name}:{'x'.join(map(str, ends[i]))}" for name, ends in shapes.items())
            parts.append(f"{switch}={shlex.quote(listed)}")
        yield " \\\n  ".join(parts) + "\n"


def prepare(bundle: str | Path, sizes: Mapping[str, Range] | None = None) -> list[str]:
    """Put `build_engines.py` and `trtexec.sh` into a bundle, and compare its operators with TensorRT's list. No TensorRT runs.

    The manifest then says under `tensorrt` for which sizes engines are to be built, and which operators are not listed.

    Args:
        bundle: What `export` wrote.
        sizes: See `profile`.

    Returns:
        A line for each operator that is not listed, with the module of the model that it came from.

    Raises:
        ConfigError: See `profile`.
    """
    opened = _opened(bundle)
    unlisted = [str(found) for found in unlisted_operators(opened)]
    texts = {"build_engines.py": _SCRIPT, "trtexec.sh": "".join(_trtexec(opened.manifest, sizes))}
    prepared = TensorRTEntry(list=LIST_VERSION, unlisted=tuple(unlisted), sizes=sizes or {})
    add_files(opened.folder, texts, dataclasses.replace(opened.manifest, tensorrt=prepared))
    return unlisted


# -- building ----------------------------------------------------------------------------------------------------


def _monitor(trt: Any, report: Callable[[str, int, int], Any]) -> Any:
    """Return a progress monitor that reports each phase's name, the step and how many there are; `False` breaks off."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return report(phase_name, step, self.steps.get(phase_name, 0)) is not False

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _parsed(trt: Any, builder: Any, logger: Any, path: Path) -> Any:
    # typed as exported: float16, bfloat16 and float8 are what the graph says (TensorRT 11 knows nothing else)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = "".join(f"\n  {error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
        raise ExportError(f"TensorRT cannot parse {path.name}:{lines}")
    return network, parser


def _configured(trt: Any, builder: Any, flags: Sequence[str], tf32: bool, workspace: int | None, timing: Path) -> Any:
    config = builder.create_builder_config()
    # the policy takes a change that is NaN or infinite for "changed": nothing may be simplified as if there were none
    for flag in ("STRICT_NANS", *flags):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if not config.set_timing_cache(config.create_timing_cache(timing.read_bytes() if timing.exists() else b""), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)  # the old one is another device's
    return config


def build(
    bundle: str | Path,
    directory: str | Path,
    *,
    kinds: Sequence[str] | None = None,
    profiles: Sequence[Mapping[str, Range]] | None = None,
    version_compatible: bool = False,
    stripped: bool = False,
    tf32: bool = False,
    workspace: int | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> dict[str, Any]:
    """Build an engine of each graph of a bundle with NVIDIA TensorRT, for the GPU at hand.

    Args:
        bundle: What `export` wrote.
        directory: Gets `<kind>.engine` and `engines.json`, all of them or none, and `timing.cache`, which later builds use.
        kinds: Graphs to build; all by default.
        profiles: Sizes to build for, one optimisation profile each; see `profile`. By default what `prepare` was told.
        version_compatible: Build for later TensorRT versions too. Such engines carry code that `load` must be allowed to run.
        stripped: Leave the weights out; `load` puts them back from the bundle.
        tf32: Let matrix products of float32 round to TensorFloat-32, which torch does not by default.
        workspace: Bytes that the engines may use while they run; TensorRT's own limit by default.
        progress: Called with a phase's name, the step and the number of steps; breaks off where it returns False.

    Returns:
        What `engines.json` says.

    Raises:
        ExportError: TensorRT is not installed, or does not take a graph, or `directory` cannot be written to. The message
            names the nodes. Engines that were there are as they were.
        ConfigError: See `profile`.
    """
    trt, opened = _import(), _opened(bundle)
    manifest = opened.manifest
    if profiles is None:
        profiles = [manifest.tensorrt.sizes if manifest.tensorrt else {}]
    shapes = {kind: [profile(manifest, kind, sizes) for sizes in profiles] for kind in kinds or manifest.graphs}
    flags = (*(("VERSION_COMPATIBLE",) if version_compatible else ()), *(("STRIP_PLAN", "REFIT_IDENTICAL") if stripped else ()))
    target = Path(directory)
    logger = trt.Logger(trt.Logger.WARNING)
    engines = {}
    with replaced_together(target) as place:
        for kind, choices in shapes.items():
            source, written = opened.graph_file(kind), place / f"{kind}.engine"
            builder = trt.Builder(logger)
            network, parser = _parsed(trt, builder, logger, source)
            config = _configured(trt, builder, flags, tf32, workspace, target / TIMING)
            if progress is not None:
                config.progress_monitor = _monitor(trt, progress)
            for choice in choices if any(choices) else ():
                ends = builder.create_optimization_profile()
                for name, (low, usual, high) in choice.items():
                    ends.set_shape(name, low, usual, high)
                if config.add_optimization_profile(ends) < 0:
                    raise ExportError(f"TensorRT rejected the optimization profile {choice} for {source.name}.")
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise ExportError(f"TensorRT failed to build an engine from {source.name}; see its log.")
            del parser  # it holds the weights that the network refers to, until here
            written.write_bytes(plan)
            with replaced_together(target) as at_once:  # good for the next build, whatever becomes of this one
                (at_once / TIMING).write_bytes(config.get_timing_cache().serialize())
            source_hash = manifest.files[source.name].sha256
            engines[kind] = {"sha256": file_hash(written), "graph_sha256": source_hash, "profiles": choices}
        record = {"tensorrt": trt.__version__, "version_compatible": version_compatible, "stripped": stripped, "engines": engines}
        (place / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


# -- opening -----------------------------------------------------------------------------------------------------


def _record(bundle: Bundle, folder: Path, kinds: Sequence[str]) -> dict[str, Any]:
    """Read what was built, and verify that these are the engines of this bundle.

    Raises:
        BundleError: They are not, or one is missing or altered.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        for kind in kinds:
            path, entry = folder / f"{kind}.engine", record["engines"][kind]
            if file_hash(path) != entry["sha256"]:
                raise BundleError(f"SHA-256 mismatch for {path}: the engine was changed after it was built.")
            if bundle.manifest.files[bundle.graph_file(kind).name].sha256 != entry["graph_sha256"]:
                raise BundleError(f"{path} was built from another {kind} graph than the one in {bundle.folder}. Build it again.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"cannot read the engines {', '.join(kinds)} in {folder}: {error!r}.") from error
    return record


def load(bundle: str | Path, engines: str | Path, *, guarded: bool = False, allow_code: bool = False, device: str = "cuda") -> Session:
    """Open a bundle's engines as a session that is called like the model, with torch tensors on the device.

    Engine files are programs for the GPU: open those that you built, or whose builder you trust.

    Args:
        bundle: What `export` wrote.
        engines: What `build` wrote.
        guarded: Run the one engine that decides by itself instead of the pair.
        allow_code: Let version-compatible engines run the host code that they carry.
        device: A CUDA device.

    Raises:
        BundleError: The engines are not this bundle's, or TensorRT does not open them.
        ExportError: TensorRT is not installed.
    """
    from bwcache_compile.bundle.runners.engine import TensorRTRunner

    opened, kinds = _opened(bundle), ("guarded",) if guarded else ("compute", "reuse")
    record = _record(opened, Path(engines), kinds)
    runner = TensorRTRunner(_import(), opened, Path(engines), record, kinds, allow_code=allow_code, device=device)
    return Session(opened, runner, guarded=guarded)
