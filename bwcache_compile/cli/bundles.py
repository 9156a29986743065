"""Run a bundle on inputs that follow from its manifest. Needs numpy and the bundle's runtime; torch for torch's formats alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.files import Bundle, open_bundle
from bwcache_compile.bundle.manifest import InputEntry, Manifest
from bwcache_compile.bundle.session import Session
from bwcache_compile.cli.motion import Input, Motion, motion
from bwcache_compile.cli.outcome import CommandError, UsageError

_STEPS = 10
_TIME = 999.0


def opened(folder: Path, allow_code: bool) -> Bundle:
    """Open a bundle and compare every hash.

    Raises:
        BundleError: See `open_bundle`.
        CommandError: It holds code, and that was not allowed.
    """
    bundle = open_bundle(folder)
    if bundle.manifest.graph_format != "onnx" and not allow_code:
        raise CommandError(
            f"{folder} has format {bundle.manifest.graph_format}, whose files can run any code when they are opened; pass --allow-code if"
            " you trust their author"
        )
    return bundle


def steps_of(manifest: Manifest, asked: int | None) -> int:
    """Return how many steps to run: as many as were asked for, else those of the bundle's settings.

    Raises:
        UsageError: The bundle's mask has fewer.
    """
    mask = manifest.config.steps_mask
    if asked is not None and mask is not None and asked > len(mask):
        raise UsageError(f"the bundle's steps_mask has {len(mask)} steps, fewer than --steps {asked}")
    return asked or manifest.config.steps or _STEPS


def as_array(value: Any) -> Any:
    """Return an output as a numpy array on the host, whichever runtime made it."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value)


def _of_dtype(array: Any, dtype: str) -> Any:
    if dtype != "bfloat16":
        return array.astype(dtype)
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CommandError("the bundle takes bfloat16 inputs, which numpy does not support; install torch to make them") from error
    return torch.from_numpy(array.astype("float32")).bfloat16()


def _drawn(entry: InputEntry, manifest: Manifest, generator: np.random.Generator) -> Any:
    """Draw an input at the captured sizes: floats from a normal distribution, masks and whole numbers 1."""
    shape = tuple(entry.example)
    for built in manifest.values:
        if built.input == entry.name:
            return _of_dtype(np.array(built.value).reshape(shape), entry.dtype)
    if entry.dtype.startswith(("float", "bfloat", "complex")):
        return _of_dtype(generator.standard_normal(shape), entry.dtype)
    return np.ones(shape, dtype=entry.dtype)


@dataclasses.dataclass(frozen=True)
class BundleStep:
    """One step of a bundle.

    Attributes:
        computed: Whether it computed.
        outputs: By name, as arrays.
    """

    computed: bool
    outputs: dict[str, Any]


class BundleLoop:
    """Generations of a bundle on drawn inputs: the latents move by Euler steps, the time runs down."""

    def __init__(self, manifest: Manifest, steps: int, seed: int = 0) -> None:
        """Draw the inputs of the first step."""
        generator = np.random.default_rng(seed)
        self._manifest = manifest
        self._first = {entry.name: _drawn(entry, manifest, generator) for entry in manifest.inputs}
        shapes = {entry.name: Input(tuple(entry.example), entry.dtype, _TIME) for entry in manifest.inputs}
        item = manifest.outputs.items[0]
        known = {symbol.name: symbol.example for symbol in manifest.symbols}
        self.moves: Motion = motion(shapes, [arithmetic(size, known) for size in item.shape], steps)
        calibrated = manifest.config.timesteps
        if calibrated is not None:
            times = zip(calibrated[:steps], self.moves.times, strict=True)  # another model runs at steps without a time
            self.moves = dataclasses.replace(self.moves, times=tuple(drawn if time is None else time for time, drawn in times))
        self._mask_is_given = manifest.config.steps_mask is not None

    def run(
        self, session: Session, contexts: Sequence[str] = ("default",), on_step: Callable[[], None] = lambda: None
    ) -> Iterator[dict[str, BundleStep]]:
        """Yield what each step did, by context. The output of the first context moves the latents."""
        inputs, output = dict(self._first), self._manifest.outputs.items[0].name
        said = None if self._mask_is_given else len(self.moves.times)
        for step, now in enumerate(self.moves.times):
            if self.moves.time is not None:
                entry = next(entry for entry in self._manifest.inputs if entry.name == self.moves.time)
                whole = not entry.dtype.startswith(("float", "bfloat"))
                inputs[entry.name] = _of_dtype(np.full(entry.example, round(now) if whole else now), entry.dtype)
            done = {}
            for name in contexts:
                with session.cache_context(name, step_index=step, num_inference_steps=said):
                    returned = session.run_flat(inputs)
                outputs = {key: as_array(value) for key, value in returned.items()}
                done[name] = BundleStep(session.report().contexts[name].steps[-1].computed, outputs)
            if self.moves.latents is not None:
                entry = next(entry for entry in self._manifest.inputs if entry.name == self.moves.latents)
                moved = self.moves.advanced(as_array(inputs[entry.name]), done[contexts[0]].outputs[output])
                inputs[entry.name] = _of_dtype(moved, entry.dtype)
            on_step()
            yield done


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what people ask of a manifest first; the file has the rest."""
    return {
        "bundle_model": manifest.model,
        "format": manifest.graph_format,
        "opset": manifest.opset,
        "graphs": {kind: entry.file or list(entry.files) for kind, entry in manifest.graphs.items()},
        "blocks": [block.to_json() for block in manifest.blocks],
        "inputs": [{"name": e.name, "shape": list(e.shape), "dtype": e.dtype} for e in manifest.inputs],
        "slots": [{"name": e.name, "role": e.role, "shape": list(e.shape), "dtype": e.dtype} for e in manifest.slots],
        "policy": manifest.config.policy,
        "reuse": manifest.config.reuse,
        "self_check": dict(manifest.self_check),
    }
