"""What Python may read of tensors while a model is traced: values that follow from shapes and numbers alone."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

_MOST = 4096
"""Elements of the largest tensor that is followed: grids, lengths and offsets are short."""

_MADE_OF_NUMBERS = {"tensor", "as_tensor", "arange", "zeros", "ones", "full", "eye", "linspace"}
_MADE_BESIDE = {"new_tensor", "new_zeros", "new_ones", "new_full"}
"""They take a tensor's dtype and device, and nothing else of it."""
_UNTOLD = ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty", "uniform", "poisson", "exponential", "geometric", "cauchy")
"""In the names of functions whose results do not follow from what they are given."""
_IN_PLACE = {
    "__setitem__",
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")),
}
_STATIC = {
    "__get__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_tensor", "type",
}  # fmt: skip
"""What they tell of a tensor is no value of its."""
_SYMBOLS = (SymInt, SymFloat, SymBool)

Source = int | str
"""Where a value comes from that the model does not make itself: a position among the leaves of the call, or a buffer's name."""


def source_line(frames: traceback.StackSummary) -> str:
    """Return the innermost line of the user's own code, or of the model's library; empty where there is none."""
    outside = [f for f in frames if "/torch/" not in f.filename.replace("\\", "/") and "bwcache_compile" not in f.filename]
    return f'{outside[-1].filename}:{outside[-1].lineno}, in {outside[-1].name}: "{outside[-1].line}"' if outside else ""


def _leaves(tree: Any) -> list[Any]:
    """Return what a call was given, the bounds of slices too."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        found += [leaf.start, leaf.stop, leaf.step] if isinstance(leaf, slice) else [leaf]
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _small(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.numel() <= _MOST for tensor in tensors)


def sources(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Source, Tensor]:
    """Return what a model may read in Python beside shapes: short masks, lengths and sizes of a call, and short buffers."""
    leaves = pytree.tree_leaves((args, {name: kwargs[name] for name in sorted(kwargs)}))
    found: dict[Source, Tensor] = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    found |= {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    static = {name: t for name, t in found.items() if all(isinstance(size, int) for size in t.shape)}
    return {name: t for name, t in static.items() if _small([t]) and (t.dim() <= 1 or isinstance(name, str) or not t.is_floating_point())}


def _written(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that a function writes to, going by its name."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return _tensors((args[:1] if in_place else (), kwargs.get("out")))


class KnownValues(TorchFunctionMode):
    """While active, a tensor that was made of shapes and numbers is read in Python as what it holds.

    Original video models carry sizes around as tensors (`torch.tensor(x.shape[2:])`, and `.tolist()` in every block). A
    tracer knows no tensor's values, and would give each number that is read a symbol. Here a real tensor stands beside
    each one that is made of numbers, every function of such tensors is run on the real ones too, and what Python reads is
    read off those. The graph is traced as ever. Nothing that depends on an input, a weight or chance is known.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        super().__init__()
        self._real: Any = WeakIdKeyDictionary()
        self._origins: Any = WeakIdKeyDictionary()
        self.read: set[Source] = set()
        self.read_at = ""

    def value(self, traced: Tensor) -> Tensor | None:
        """Return what a tensor holds, where that is known."""
        known: Tensor | None = self._real.get(traced)
        return known

    @contextlib.contextmanager
    def knowing(self, model: nn.Module, values: dict[Source, Tensor]) -> Iterator[None]:
        """Know these values too while the model is traced; `read` says afterwards on which the graph depends, `read_at` since where."""
        real = {name: value.clone() for name, value in values.items()}  # what the model writes in place is written to these too

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            traced = sources(model, args, kwargs)
            for name in real.keys() & traced.keys():
                self._real[traced[name]] = real[name]
                self._origins[traced[name]] = self._origins_of([traced[name]]) | {name}  # one tensor may be passed twice

        handle = model.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; where it follows from what is known, run it on the known values too."""
        kwargs = kwargs or {}
        name, given = getattr(func, "__name__", ""), _tensors((args, kwargs))
        if isinstance(func, (OpOverload, OpOverloadPacket)):  # called by itself, it may write to anything
            self._forget(given)
            return func(*args, **kwargs)
        told = not any(part in name for part in _UNTOLD)
        told = told and not any(isinstance(leaf, _SYMBOLS) for leaf in _leaves((args, kwargs)))
        if told and given and all(tensor in self._real for tensor in given):
            real, origins = self._run(func, args, kwargs), self._origins_of(given)
            written = _written(name, args, kwargs)
            if not _tensors(real) and not written:
                self._reads(origins if name not in _STATIC else frozenset())
                return real
            for tensor in (other for one in written for other in self._sharing(one)):
                self._origins[tensor] = origins | self._origins_of([tensor])
            return self._beside(func(*args, **kwargs), real, origins)
        self._forget(_written(name, args, kwargs))
        result = func(*args, **kwargs)
        if name in ("masked_select", "__getitem__") and len(args) == 2:
            self._measure(result, args[1], args[0].shape if name == "masked_select" else ())
        if told and name in _MADE_OF_NUMBERS and not given and _small(_tensors(result)):
            return self._beside(result, self._run(func, args, kwargs))
        if told and name in _MADE_BESIDE and not _tensors((args[1:], kwargs)) and _small([result]):
            with _disable_current_modes():
                like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
                return self._beside(result, func(like, *args[1:], **kwargs))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        def lookup(leaf: Any) -> Any:
            if isinstance(leaf, slice):
                return slice(lookup(leaf.start), lookup(leaf.stop), lookup(leaf.step))
            return self._real[leaf] if isinstance(leaf, Tensor) else leaf

        real_args, real_kwargs = pytree.tree_map(lookup, (args, kwargs))
        with _disable_current_modes():
            return func(*real_args, **real_kwargs)

    def _reads(self, origins: frozenset[Source]) -> None:
        """Take down that the graph depends on the values of these, and the first line that makes it so."""
        if origins and not self.read:
            self.read_at = source_line(traceback.extract_stack())
        self.read |= origins

    def _origins_of(self, given: list[Tensor]) -> frozenset[Source]:
        return frozenset().union(*(self._origins.get(tensor, ()) for tensor in given))

    def _measure(self, result: Tensor, index: Any, shape: tuple[int, ...]) -> None:
        """Say how many rows or elements a known mask takes, once spread over a shape; it may be one of several indices."""
        masks = [mask for mask in _tensors(index) if mask.dtype is torch.bool]
        sizes = [size for size in result.shape if isinstance(size, SymInt) and size.node.hint is None]
        if len(masks) == len(sizes) == 1 and masks[0] in self._real:
            real = self._real[masks[0]]
            with _disable_current_modes():
                spread = torch.broadcast_shapes(real.shape, shape)  # type: ignore[no-untyped-call]
                count = int(real.expand(spread).sum())
            torch._check(sizes[0] == count)  # type: ignore[no-untyped-call]
            self._reads(self._origins_of(masks))

    def _beside(self, result: Any, real: Any, origins: frozenset[Source] = frozenset()) -> Any:
        for traced, known in zip(_tensors(result), _tensors(real), strict=True):
            for size, count in zip(traced.shape, known.shape, strict=True):
                if isinstance(size, SymInt):
                    torch._check(size == count)
                    self._reads(origins)
            if _small([known]):
                self._real[traced] = known
                self._origins[traced] = origins | self._origins_of([traced])
        return result

    def _forget(self, written: list[Tensor]) -> None:
        """Forget tensors that something unknown is written to, and all that share memory with them."""
        for other in [other for tensor in written for other in self._sharing(tensor)]:
            self._real.pop(other, None)

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """Return all known tensors that share memory with a tensor, itself included."""
        if tensor not in self._real:
            return []
        memory = self._real[tensor].untyped_storage().data_ptr()
        return [other for other, real in self._real.items() if real.untyped_storage().data_ptr() == memory]
