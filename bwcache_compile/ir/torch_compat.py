"""Every private or experimental name of torch that the package uses, so that a new version of torch is looked at here alone.

`tests/test_torch_compat.py` tries each of them on the installed version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.decorators import skip
from torch._export.verifier import load_verifier
from torch._guards import detect_fake_mode
from torch._logging._internal import trace_structured_artifact
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, is_concrete_int, statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import TreeSpec
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "PythonPrinter",
    "ShapeEnv",
    "TorchDispatchMode",
    "TreeSpec",
    "compile_package",
    "detect_fake_mode",
    "disable_current_modes",
    "force_stride_order",
    "function_homes",
    "gather_over_ranks",
    "get_eval_frame_callback",
    "inductor_compiles",
    "is_any_autocast_enabled",
    "is_concrete_int",
    "is_traceable_wrapper_subclass",
    "load_package",
    "load_verifier",
    "make_fx",
    "maybe_mark_dynamic",
    "pytree",
    "ranks_of",
    "skip",
    "statically_known_true",
    "sum_over_ranks",
    "trace_artifact",
    "wrapper_tensor",
]


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Write a text to the structured trace that `TORCH_TRACE` asks for and `tlparse` reads; `text` is called only if it does."""
    trace_structured_artifact(name, "string", text)


def wrapper_tensor(kind: type[Tensor], like: Tensor) -> Any:
    """Return an instance of a subclass of `Tensor` that has the shape, strides, dtype and device of a tensor, and no values."""
    return Tensor._make_wrapper_subclass(kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device)


def inductor_compiles() -> bool:
    """Whether the code that runs now is being compiled by an outer `torch.compile` with Inductor; False where torch does not say."""
    backend: Any = get_eval_frame_callback()
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return isinstance(backend, torch._TorchCompileInductorWrapper)


skip(inductor_compiles)  # its frame would be compiled too


def function_homes() -> tuple[Any, ...]:
    """Return where PyTorch's own Python bindings of ATen operators are, in the order to look."""
    return torch._C._VariableFunctions, torch._C._nn, Tensor


def sum_over_ranks(tensor: Tensor, group: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a process group, by its name: functional collectives, which graphs can hold."""
    collectives = torch.ops._c10d_functional
    summed: Tensor = collectives.wait_tensor(collectives.all_reduce(tensor, "sum", group))
    return summed


def _process_group(name: str) -> Any:
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)


def ranks_of(group: Any) -> frozenset[int]:
    """Return the global ranks of a process group, or of that with a name."""
    return frozenset(torch.distributed.get_process_group_ranks(_process_group(group) if isinstance(group, str) else group))


def gather_over_ranks(value: Any, group: str) -> dict[int, Any]:
    """Return what each rank of a process group, by its name, gives: a value that can be pickled, by global rank."""
    members = _process_group(group)
    ranks = torch.distributed.get_process_group_ranks(members)
    given: list[Any] = [None] * len(ranks)
    torch.distributed.all_gather_object(given, value, group=members)
    return dict(zip(ranks, given, strict=True))


def force_stride_order() -> OpOverload:
    """Return Inductor's operator that returns its operand and holds it to given strides."""
    import torch._inductor.inductor_prims

    return torch.ops.prims.inductor_force_stride_order.default


def compile_package(module: Any, values: Sequence[Any], path: Path) -> None:
    """Compile a graph with AOTInductor for inputs like `values`, and write it as a package."""
    from torch._inductor import aot_compile, config
    from torch._inductor.package import package_aoti

    options: dict[str, Any] = {"aot_inductor.package": True}
    if hasattr(config.aot_inductor, "enable_line_tables"):
        options["aot_inductor.enable_line_tables"] = False  # three times the size
    files: Any = aot_compile(module, tuple(values), options=options)
    package_aoti(path, [file for file in files if os.path.splitext(file)[1] != ".cpp"])


def load_package(path: Path) -> tuple[Callable[..., Sequence[Tensor]], int]:
    """Open what `compile_package` wrote; return it and how many inputs it takes."""
    import torch._inductor

    loader: Any = torch._inductor.aoti_load_package(str(path)).loader

    def run(*inputs: Tensor) -> Sequence[Tensor]:  # calling the package itself parses descriptions of inputs and outputs each time
        returned: Sequence[Tensor] = loader.boxed_run(list(inputs))
        return returned

    return run, pytree.treespec_loads(loader.get_call_spec()[0]).num_leaves
