"""Opening a bundle. Needs the runtime that is to run it and no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from bwcache_compile.bundle.files import Bundle, open_bundle
from bwcache_compile.bundle.session import Session
from bwcache_compile.errors import BundleError, ConfigError


def ort_session(bundle: Bundle, *, guarded: bool = False, outputs: str = "numpy", **settings: Any) -> Session:
    """Open a bundle's graphs in ONNX Runtime; see `load`."""
    from bwcache_compile.bundle.runners.ort import OrtRunner

    kinds = ("guarded",) if guarded else ("compute", "reuse")
    return Session(bundle, OrtRunner(bundle, kinds, outputs=outputs, **settings), guarded=guarded)


def openvino_session(bundle: Bundle, *, guarded: bool = False, **settings: Any) -> Session:
    """Open a bundle's graphs in OpenVINO; see `load`."""
    from bwcache_compile.bundle.runners.openvino import OpenVINORunner

    kinds = ("guarded",) if guarded else ("compute", "reuse")
    return Session(bundle, OpenVINORunner(bundle, kinds, **settings), guarded=guarded)


def torch_session(bundle: Bundle, device: str | None = None) -> Session:
    """Open a bundle's graphs in torch, which runs what is in them; see `load`."""
    from bwcache_compile.bundle.runners.torch_graphs import TorchRunner

    return Session(bundle, TorchRunner(bundle, device))


def _need(module: str, extra: str) -> None:
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f'backend="{module}" needs {module}: pip install "bwcache-compile[{extra}]".') from error


_BACKENDS = {"onnx": ("onnxruntime", "openvino"), "pt2": ("torch",), "aoti": ("torch",)}
"""What runs each format; the first is the default."""
_WHY = {
    "pt2": "torch.export.load unpickles parts of the files, which can run any code",
    "aoti": "a package holds machine code, which runs when it is opened",
}


def _providers(device: str) -> list[Any]:
    """Return onnxruntime's execution provider for a device.

    Raises:
        ConfigError: It is none that a provider is known for.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return ["CPUExecutionProvider"]
    if kind == "cuda" and (index.isdecimal() or not index):
        return [("CUDAExecutionProvider", {"device_id": int(index or 0)})]
    raise ConfigError(f'device must be "cpu", "cuda" or "cuda:<index>", got {device!r}. Pass providers=[...] for other devices.')


def load(
    directory: str | Path,
    backend: Literal["onnxruntime", "openvino", "torch"] | None = None,
    *,
    device: str | None = None,
    allow_code: bool = False,
    guarded: bool = False,
    verify_hashes: bool = True,
    providers: Sequence[Any] | None = None,
    options: Any = None,
    outputs: str | None = None,
) -> Session:
    """Open an exported bundle as a session that is called like the model.

    Every file is verified against the manifest first, and no code of the bundle runs, unless `allow_code` says so. The
    hashes find damage, not intent: who can write the files can write the manifest.

    Args:
        directory: What `export` wrote.
        backend: What runs the graphs, by default what the bundle's format needs. "onnxruntime" runs ONNX graphs, and takes numpy
            arrays, OrtValues and what has DLPack. "openvino" runs ONNX graphs too, and takes numpy arrays and what has DLPack. "torch"
            runs the formats "pt2" and "aoti", takes tensors, numpy arrays and what has DLPack, and returns tensors.
        device: Where the graphs run and the cache lies: "cpu", "cuda" or "cuda:1". By default the CPU for ONNX graphs, and for
            torch's formats the device that they were exported on, from which "aoti" cannot be moved. For OpenVINO one of its
            devices, "CPU" by default; the cache lies on the host.
        allow_code: Open bundles of format "pt2" and "aoti", which can run any code. Only for those that you trust.
        guarded: Run the one graph that decides by itself instead of the pair. ONNX graphs only.
        verify_hashes: Read every file whole to compare its SHA-256. Without it a bundle of many GB opens at once, its sizes and its
            manifest are still checked, and damage inside a file goes unnoticed.
        providers: onnxruntime's execution providers; the first decides where the state lives. Instead of `device`.
        options: onnxruntime's `SessionOptions`, or a dictionary of OpenVINO's properties. OpenVINO computes in float32 here, where its
            own default may be bfloat16: `options={"INFERENCE_PRECISION_HINT": "bf16"}` allows that.
        outputs: "numpy" (the default), or "ortvalue" to leave the model's outputs on onnxruntime's device.

    Raises:
        BundleError: The bundle is damaged, altered, incomplete, too new or without its weights (see `add_weights`), the runtime does not
            take its graphs, or it holds code and `allow_code` is not given.
        ConfigError: An argument is not among the choices, does not fit the bundle, or the provider is not there.
    """
    bundle = open_bundle(directory, verify_hashes=verify_hashes)
    graph_format = bundle.manifest.graph_format
    fitting = _BACKENDS[graph_format]
    runtime = backend or fitting[0]
    if runtime not in fitting:
        choices = " or ".join(f'"{name}"' for name in fitting)
        raise ConfigError(f'backend must be {choices} for graphs of format "{graph_format}", or left out, got {backend!r}.')
    if runtime == "openvino":
        _need("openvino", "openvino")
        if providers is not None or outputs is not None:
            raise ConfigError('providers and outputs require backend="onnxruntime".')
        return openvino_session(bundle, guarded=guarded, device=device, options=options)
    if runtime == "onnxruntime":
        _need("onnxruntime", "ort")
        if device is not None and providers is not None:
            raise ConfigError("device and providers both say where the graphs run; pass one of them.")
        chosen = providers if device is None else _providers(device)
        return ort_session(bundle, guarded=guarded, providers=chosen, options=options, outputs=outputs or "numpy")
    if guarded or providers is not None or options is not None or outputs is not None:
        raise ConfigError('guarded, providers, options and outputs require a bundle of format "onnx".')
    if not allow_code:
        raise BundleError(
            f'{directory} has format "{graph_format}": {_WHY[graph_format]}. Pass allow_code=True if you trust its author;'
            ' bundles of format "onnx" contain no code.'
        )
    _need("torch", "torch")
    return torch_session(bundle, device)
