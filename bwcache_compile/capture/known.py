"""Let Python read tensors while a model is traced, where their values follow from shapes and numbers alone."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from bwcache_compile.capture.functions import (
    MADE_LIKE,
    MADE_OF_NUMBERS,
    MAKES,
    METADATA_UNLESS_TENSOR,
    READS,
    SYMBOLS,
    TAKES_SIZES,
    is_metadata,
    is_random,
    leaves_of,
    mapped,
    tensors_in,
    written_by,
)
from bwcache_compile.capture.known_sizes import READS_OF_SIZES, UNKNOWN, KnownSizes
from bwcache_compile.capture.masks import without_masks
from bwcache_compile.capture.sources import Origin, Source, inputs_of, is_short, sources
from bwcache_compile.ir.call_signature import OPERAND, Reading
from bwcache_compile.ir.source_lines import class_files, source_line
from bwcache_compile.ir.torch_compat import OpOverload, OpOverloadPacket, disable_current_modes, pytree


def _constant(real: Tensor) -> Tensor:
    """Return a known tensor as a constant of the graph."""
    return torch.tensor(real.tolist(), dtype=real.dtype, device=real.device).reshape(tuple(real.shape))


def _of_elements(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.export's replacement of max or min for tracing, made to accept a single tensor, as Python's does."""

    def reduced(*args: Any, **kwargs: Any) -> Any:
        return function(*(map(list, args) if len(args) == 1 and isinstance(args[0], Tensor) else args), **kwargs)

    return reduced


class KnownValues(TorchFunctionMode):
    """Let Python read the values of tensors that were made of shapes and numbers, while this mode is active.

    Original video models carry sizes around as tensors (`torch.tensor(x.shape[2:])`, and `.tolist()` in every block). A
    tracer does not know the values of tensors: it would make a symbol of each number that Python reads. This mode keeps a
    real tensor for each traced one that was made of numbers, runs every function of such tensors on the real ones too, and
    returns to Python what the real ones hold. The graph itself is traced as usual. A value that depends on an input, a
    weight or a random number is not known.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        super().__init__()
        self._real: Any = WeakIdKeyDictionary()
        self._large: Any = WeakIdKeyDictionary()
        self._origins: Any = WeakIdKeyDictionary()
        self._sizes = KnownSizes()
        self.read: set[Origin] = set()
        self.read_at = ""
        self.asked: frozenset[int] = frozenset()
        self._inputs: Any = WeakIdKeyDictionary()
        self._files: frozenset[str] = frozenset()

    def value(self, traced: Tensor) -> Tensor | None:
        """Return what a tensor holds, where that is known."""
        known: Tensor | None = self._real.get(traced)
        return known

    @contextlib.contextmanager
    def knowing(self, model: nn.Module, values: dict[Source, Tensor], large: dict[int, Tensor]) -> Iterator[None]:
        """Let Python read these values too while the model is traced.

        Afterwards `read` holds those that Python has read, on which the graph depends, and `read_at` the first line that did so.

        Args:
            model: The model.
            values: Short inputs and buffers.
            large: The other inputs: what the model reduces one to, such as `torch.all(x == 0)`, is known where it is short.
        """
        self._files = class_files(model.modules())
        real = {name: value.clone() for name, value in values.items()}  # what the model writes in place is written to these too

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._inputs.update({tensor: frozenset([i]) for i, tensor in inputs_of(args, kwargs).items()})
            builtins.max, builtins.min = map(_of_elements, (builtins.max, builtins.min))
            traced = sources(model, args, kwargs)
            for name in real.keys() & traced.keys():
                self._real[traced[name]] = real[name]
                self._origins[traced[name]] = self._origins_of([traced[name]]) | {name}  # one tensor may be passed twice
            self._large.update(
                {tensor: (large[name], Reading(name, ())) for name, tensor in inputs_of(args, kwargs).items() if name in large}
            )

        handle, own = model.register_forward_pre_hook(enter, with_kwargs=True), (builtins.max, builtins.min)
        try:
            yield
        finally:
            builtins.max, builtins.min = own
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, and record on which inputs its result depends."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if is_metadata(func, name):
            return func(*args, **kwargs)
        depends = frozenset().union(*(self._inputs.get(tensor, ()) for tensor in tensors_in((args, kwargs))))
        if name in READS:
            self.asked = depends
        result = self._run_with_values(func, types, args, kwargs)
        if depends:
            for tensor in (*tensors_in(result), *written_by(name, args, kwargs)):
                self._inputs[tensor] = self._inputs.get(tensor, frozenset()) | depends
        return result

    def _run_with_values(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run a function; if all its arguments are known, run it on their values too."""
        name = getattr(func, "__name__", "")
        if name == "__deepcopy__" and not isinstance(args[0], nn.Parameter):
            return self.__torch_function__(torch.clone, types, args[:1])
        if name == "__iter__" and (args[0] in self._real or self._sizes.knows(args[0])):
            return iter(self.__torch_function__(torch.unbind, types, args))
        if name in TAKES_SIZES or name in ("__getitem__", "__setitem__"):
            args, kwargs = self._with_sizes(name, args, kwargs)
        leaves = leaves_of((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if isinstance(func, (OpOverload, OpOverloadPacket)):  # called by itself, it may write to anything
            self._forget(given)
            return func(*args, **kwargs)
        sizes = self._sizes.run(name, args, kwargs, leaves, self._real)
        if sizes is not UNKNOWN:
            return sizes if name in READS_OF_SIZES else self._run_on_sizes(func, args, kwargs, sizes)
        determined = not is_random(name) and not any(isinstance(leaf, SYMBOLS) for leaf in leaves)
        if determined and given and all(tensor in self._real for tensor in given):
            return self._run_on_known(func, args, kwargs, given)
        written = written_by(name, args, kwargs)
        self._forget(written)
        if len(args) == 2 and not kwargs:
            func, args = self._with_places(func, args)
        result = func(*args, **kwargs)
        if not determined:
            return result
        if len(given) == 1 and given[0] in self._large and not written:
            return self._reduced(result, func, args, kwargs)
        if name in MADE_OF_NUMBERS and not given and all(map(is_short, tensors_in(result))):
            return self._beside(result, self._run(func, args, kwargs))
        if name in MADE_LIKE and not tensors_in((args[1:], kwargs)) and is_short(result):
            with disable_current_modes():
                like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
                return self._beside(result, func(like, *args[1:], **kwargs))
        return result

    def _run_on_sizes(self, func: Any, args: Any, kwargs: Any, sizes: Any) -> Any:
        """Run a function that returns a tensor of these sizes, and know them."""
        if getattr(func, "__name__", "") == "new_tensor":  # it would fix the sizes
            result = self._sizes.tensor(sizes, {"dtype": args[0].dtype, "device": args[0].device, **kwargs})
        else:
            result = func(*args, **kwargs)
        self._sizes.keep(result, sizes)
        return result

    def _run_on_known(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run a function on known values too; what it returns to Python is read off these."""
        name = getattr(func, "__name__", "")
        real, origins = self._run(func, args, kwargs), self._origins_of(given)
        written = written_by(name, args, kwargs)
        if not tensors_in(real) and not written:
            self._reads(origins if name not in METADATA_UNLESS_TENSOR else frozenset())
            return real
        for tensor in (other for one in written for other in self._sharing(one)):
            self._origins[tensor] = origins | self._origins_of([tensor])
        return self._beside(func(*args, **kwargs), real, origins)

    def _with_places(self, func: Any, args: Any) -> tuple[Any, Any]:
        """Return a selection by known masks as one by indices; any other function as it is."""
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            return func, (args[0], without_masks(args[0], args[1], self._real, self._places))
        if name == "masked_select" and args[1] in self._real:
            spread = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
            if all(isinstance(size, int) for size in spread):
                return torch.Tensor.__getitem__, (args[0].expand(spread), self._places(args[1], spread))
        return func, args

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        def lookup(leaf: Any) -> Any:
            return self._real[leaf] if isinstance(leaf, Tensor) else leaf

        real_args, real_kwargs = mapped(lookup, (args, kwargs))
        with disable_current_modes():
            return func(*real_args, **real_kwargs)

    def _reads(self, origins: frozenset[Origin]) -> None:
        """Record that the graph depends on these values, and the first line of the model that reads one."""
        if origins and not self.read:
            self.read_at = source_line(traceback.extract_stack(), self._files)
        self.read |= origins

    def _origins_of(self, given: list[Tensor]) -> frozenset[Origin]:
        return frozenset().union(*(self._origins.get(tensor, ()) for tensor in given))

    def _with_sizes(self, name: str, args: Any, kwargs: Any) -> Any:
        """Replace known 0-dim tensors by numbers where a function takes sizes or bounds."""
        origins: frozenset[Origin] = frozenset()

        def number(leaf: Any) -> Any:
            nonlocal origins
            if isinstance(leaf, Tensor) and self._sizes.number(leaf) is not None:
                return self._sizes.number(leaf)
            if not (isinstance(leaf, Tensor) and leaf in self._real and leaf.dim() == 0) or leaf.is_floating_point():
                return leaf
            origins |= self._origins_of([leaf])
            return self._real[leaf].item()

        def bounds(leaf: Any) -> Any:
            return mapped(number, leaf) if isinstance(leaf, slice) else leaf

        if name in ("__getitem__", "__setitem__"):
            args = (args[0], pytree.tree_map(bounds, args[1]), *args[2:])
        else:
            first = args[:1] if args and isinstance(args[0], Tensor) and name not in MAKES else ()
            args, kwargs = (*first, *pytree.tree_map(number, tuple(args[len(first) :]))), pytree.tree_map(number, kwargs)
        self._reads(origins)
        return args, kwargs

    def _places(self, mask: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return where a known mask, expanded to a shape, is true: one index tensor for each dimension, of known size."""
        with disable_current_modes():
            found = self._real[mask].expand(shape).nonzero(as_tuple=True)
        self._reads(self._origins_of([mask]))
        return tuple(map(_constant, found))

    def _reduced(self, result: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Follow what is computed from a large input while it is short or boolean; a single boolean becomes known."""
        (operand,) = tensors_in((args, kwargs))
        real, reading = self._large[operand]
        if not isinstance(result, Tensor):
            return result
        short = all(isinstance(size, int) for size in result.shape) and is_short(result)
        truth = result.dtype is torch.bool
        if not short and not truth:
            return result
        step = (func, *mapped(lambda leaf: OPERAND if isinstance(leaf, Tensor) else leaf, (args, kwargs)))
        reading = Reading(reading.source, (*reading.steps, step))
        with disable_current_modes():
            value = reading.apply(real).clone()
        if not truth or result.dim():  # a number or a mask made of the latents is another one at each step
            self._large[result] = (real, reading)
            return result
        return self._beside(result, value, frozenset([dataclasses.replace(reading, value=value)]))

    def _beside(self, result: Any, real: Any, origins: frozenset[Origin] = frozenset()) -> Any:
        """Record what a function returned; a result whose sizes the tracer does not know is replaced by a constant."""
        known = {id(traced): value for traced, value in zip(tensors_in(result), tensors_in(real), strict=True)}
        if any(isinstance(size, SymInt) for traced in tensors_in(result) for size in traced.shape):
            self._reads(origins)
            result = pytree.tree_map_only(Tensor, lambda traced: self._told(_constant(known[id(traced)]), known[id(traced)]), result)
            return result
        for traced in tensors_in(result):
            if is_short(known[id(traced)]):
                self._real[traced] = known[id(traced)]
                self._origins[traced] = origins | self._origins_of([traced])
        return result

    def _told(self, constant: Tensor, real: Tensor) -> Tensor:
        if is_short(real):
            self._real[constant] = real
        return constant

    def _forget(self, written: list[Tensor]) -> None:
        """Forget tensors that an unknown value is written to, and all tensors that share memory with them."""
        self._sizes.forget(written)
        for tensor in written:
            for other in [other for other in self._large if other.untyped_storage()._cdata == tensor.untyped_storage()._cdata]:
                self._large.pop(other, None)
        for other in [other for tensor in written for other in self._sharing(tensor)]:
            self._real.pop(other, None)

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """Return all known tensors that share memory with a tensor, itself included."""
        if tensor not in self._real:
            return []
        memory = self._real[tensor].untyped_storage().data_ptr()
        return [other for other, real in self._real.items() if real.untyped_storage().data_ptr() == memory]
