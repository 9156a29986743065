"""Run a model once and write down which modules of its containers it calls, with what, in which order."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from bwcache_compile.ir.compare import flat_outputs
from bwcache_compile.ir.torch_compat import TreeSpec, pytree
from bwcache_compile.region.copies import with_modules, write_back
from bwcache_compile.region.work import WorkCounter
from bwcache_compile.runtime.wrapper import ModelWrapper

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        path: Of the module in the model.
        leaves: Of its arguments.
        spec: How the leaves make `(args, kwargs)`.
        outputs: Leaves of what it returned.
        out_spec: How they make it.
        versions: Of each tensor among the leaves and the outputs, when it was passed or returned: an edit in place shows.
        work: Multiplications and additions of its matrix products, convolutions and attention.
    """

    path: str
    leaves: tuple[Any, ...]
    spec: TreeSpec
    outputs: tuple[Any, ...]
    out_spec: TreeSpec
    versions: dict[int, int]
    work: int


def write_count(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


class _Recorder(ModelWrapper):
    """Calls a module and writes the call down."""

    def __init__(self, original: nn.Module, path: str, calls: list[ModuleCall], counter: WorkCounter) -> None:
        super().__init__(original)
        self.__dict__["_note"] = (path, calls, counter)
        self._seal()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        path, calls, counter = self.__dict__["_note"]
        before = counter.total
        leaves, spec = pytree.tree_flatten((args, kwargs))
        versions = {id(leaf): write_count(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        returned = self._original(*args, **kwargs)
        outputs, out_spec = pytree.tree_flatten(returned)
        versions |= {id(leaf): write_count(leaf) for leaf in outputs if isinstance(leaf, Tensor)}
        calls.append(ModuleCall(path, tuple(leaves), spec, tuple(outputs), out_spec, versions, counter.total - before))
        return returned


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that containers hold, the outermost ones, by path: lists, dictionaries and sequences of modules."""
    found: dict[str, nn.Module] = {}
    for path, container in model.named_modules():
        if isinstance(container, (*_CONTAINERS, nn.Sequential)) and not any(
            path.startswith(f"{other}.") or path == other for other in found
        ):
            prefix = f"{path}." if path else ""
            for name, module in container.named_children():
                if not isinstance(module, _CONTAINERS):
                    found[prefix + name] = module
    return found


@dataclasses.dataclass(frozen=True)
class Recording:
    """One run of a model.

    Attributes:
        calls: The calls of its outermost container modules, in order.
        outputs: Leaves of what it returned.
        work: That of all of it.
    """

    calls: list[ModuleCall]
    outputs: list[Any]
    work: int


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Run a model once and write the calls down."""
    calls: list[ModuleCall] = []
    counter = WorkCounter()  # type: ignore[no-untyped-call]
    copies = with_modules(model, {path: _Recorder(module, path, calls, counter) for path, module in candidates(model).items()})
    with counter:
        returned = copies[""](*args, **kwargs)
    write_back(model, copies)
    return Recording(calls, flat_outputs(returned), counter.total)
