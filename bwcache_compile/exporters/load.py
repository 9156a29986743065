"""Opening a bundle. Needs the runtime that is to run it and no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bwcache_compile.errors import ConfigError
from bwcache_compile.exporters.bundle import Bundle, open_bundle
from bwcache_compile.exporters.session import Session


def ort_session(bundle: Bundle, *, guarded: bool = False, outputs: str = "numpy", **settings: Any) -> Session:
    """Open a bundle's graphs in ONNX Runtime; see `load`."""
    from bwcache_compile.exporters.ort_runner import OrtRunner

    kinds = ("guarded",) if guarded else ("compute", "reuse")
    return Session(bundle, OrtRunner(bundle, kinds, outputs=outputs, **settings), guarded=guarded)


def load(
    directory: str | Path,
    backend: str = "onnxruntime",
    *,
    guarded: bool = False,
    providers: Sequence[Any] | None = None,
    options: Any = None,
    outputs: str = "numpy",
) -> Session:
    """Open an exported bundle as a session that is called like the model.

    Every file is verified against the manifest first, and no code of the bundle runs.

    Args:
        directory: What `export` wrote.
        backend: "onnxruntime".
        guarded: Run the one graph that decides by itself instead of the pair.
        providers: onnxruntime's execution providers; the first decides where the state lives. The default is the CPU.
        options: onnxruntime's `SessionOptions`.
        outputs: "numpy", or "ortvalue" to leave the model's outputs on the device.

    Raises:
        BundleError: The bundle is damaged, altered, incomplete or too new, or the runtime does not take its graphs.
        ConfigError: An argument is not among the choices, or the provider is not there.
    """
    if backend != "onnxruntime":
        raise ConfigError(f'backend is {backend!r}; this version runs bundles with "onnxruntime".')
    return ort_session(open_bundle(directory), guarded=guarded, providers=providers, options=options, outputs=outputs)
