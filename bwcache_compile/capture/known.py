"""What Python may read of tensors while a model is traced: values that follow from shapes and numbers alone."""

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
from bwcache_compile.capture.sources import Origin, Source, inputs_of, is_short, sources
from bwcache_compile.ir.call_signature import OPERAND, Reading
from bwcache_compile.ir.source_lines import class_files, source_line
from bwcache_compile.ir.torch_compat import OpOverload, OpOverloadPacket, disable_current_modes, pytree


def _constant(real: Tensor) -> Tensor:
    """Write a known tensor into the graph."""
    return torch.tensor(real.tolist(), dtype=real.dtype, device=real.device).reshape(tuple(real.shape))


def _of_elements(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.export's replacement of max or min for tracing, made to accept a single tensor, as Python's does."""

    def reduced(*args: Any, **kwargs: Any) -> Any:
        return function(*(map(list, args) if len(args) == 1 and isinstance(args[0], Tensor) else args), **kwargs)

    return reduced


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
        """Know these values too while the model is traced; `read` says afterwards on which the graph depends, `read_at` since where.

        Args:
            model: The model.
            values: Of short inputs and buffers.
            large: Of the other inputs: what is reduced to a short tensor, such as `torch.all(x == 0)`, is known.
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
        """Run a function, and take down on which inputs its result depends."""
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
        """Run a function; where it follows from what is known, run it on the known values too."""
        name = getattr(func, "__name__", "")
        if name == "__deepcopy__" and not isinstance(args[0], nn.Parameter):
            return self.__torch_function__(torch.clone, types, args[:1])
        if name == "__iter__" and (args[0] in self._real or self._sizes.knows(args[0])):
            return iter(self.__torch_function__(torch.unbind, types, args))
        if name in TAKES_SIZES or name in ("__getitem__", "__setitem__"):
            args, kwargs = self._with_sizes(name, args, kwargs)
        name, leaves = getattr(func, "__name__", ""), leaves_of((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if isinstance(func, (OpOverload, OpOverloadPacket)):  # called by itself, it may write to anything
            self._forget(given)
            return func(*args, **kwargs)
        held = self._sizes.run(name, args, kwargs, leaves, self._real)
        if held is not UNKNOWN:
            if name in READS_OF_SIZES:
                return held
            if name == "new_tensor":  # it would fix the sizes
                result = self._sizes.tensor(held, {"dtype": args[0].dtype, "device": args[0].device, **kwargs})
            else:
                result = func(*args, **kwargs)
            self._sizes.keep(result, held)
            return result
        told = not is_random(name)
        told = told and not any(isinstance(leaf, SYMBOLS) for leaf in leaves)
        if told and given and all(tensor in self._real for tensor in given):
            real, origins = self._run(func, args, kwargs), self._origins_of(given)
            written = written_by(name, args, kwargs)
            if not tensors_in(real) and not written:
                self._reads(origins if name not in METADATA_UNLESS_TENSOR else frozenset())
                return real
            for tensor in (other for one in written for other in self._sharing(one)):
                self._origins[tensor] = origins | self._origins_of([tensor])
            return self._beside(func(*args, **kwargs), real, origins)
        self._forget(written_by(name, args, kwargs))
        if len(args) == 2 and not kwargs and name == "__getitem__":
            args = (args[0], self._without_masks(args[0], args[1]))
        elif len(args) == 2 and not kwargs and name == "masked_select" and args[1] in self._real:
            spread = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
            if all(isinstance(size, int) for size in spread):
                func, args = torch.Tensor.__getitem__, (args[0].expand(spread), self._places(args[1], spread))
        result = func(*args, **kwargs)
        if told and len(given) == 1 and given[0] in self._large and not written_by(name, args, kwargs):
            return self._reduced(result, func, args, kwargs)
        if told and name in MADE_OF_NUMBERS and not given and all(map(is_short, tensors_in(result))):
            return self._beside(result, self._run(func, args, kwargs))
        if told and name in MADE_LIKE and not tensors_in((args[1:], kwargs)) and is_short(result):
            with disable_current_modes():
                like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
                return self._beside(result, func(like, *args[1:], **kwargs))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        def lookup(leaf: Any) -> Any:
            return self._real[leaf] if isinstance(leaf, Tensor) else leaf

        real_args, real_kwargs = mapped(lookup, (args, kwargs))
        with disable_current_modes():
            return func(*real_args, **real_kwargs)

    def _reads(self, origins: frozenset[Origin]) -> None:
        """Take down that the graph depends on the values of these, and the first line that makes it so."""
        if origins and not self.read:
            self.read_at = source_line(traceback.extract_stack(), self._files)
        self.read |= origins

    def _origins_of(self, given: list[Tensor]) -> frozenset[Origin]:
        return frozenset().union(*(self._origins.get(tensor, ()) for tensor in given))

    def _with_sizes(self, name: str, args: Any, kwargs: Any) -> Any:
        """Put numbers for known 0-dim tensors where a function takes sizes or bounds."""
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
        """Return where a known mask is true, once spread over a shape: an index of known size for each dimension."""
        with disable_current_modes():
            found = self._real[mask].expand(shape).nonzero(as_tuple=True)
        self._reads(self._origins_of([mask]))
        return tuple(map(_constant, found))

    def _without_masks(self, tensor: Tensor, index: Any) -> Any:
        """Put indices for known masks, which leave as many rows as they leave; a tracer knows no such size."""
        parts = index if isinstance(index, tuple) else (index,)
        masks = [isinstance(part, Tensor) and part.dtype is torch.bool and part.dim() > 0 and part in self._real for part in parts]
        if not any(masks):
            return index
        taken = [part.dim() if isinstance(part, Tensor) and part.dtype is torch.bool else int(part is not None) for part in parts]
        found: list[Any] = []
        dimension = 0
        for part, is_mask, count in zip(parts, masks, taken, strict=True):
            if part is Ellipsis:
                count = tensor.dim() - sum(taken) + 1
            if is_mask:
                for size, expected in zip(tensor.shape[dimension : dimension + count], part.shape, strict=True):
                    if size != expected:  # which fixes a dynamic size
                        raise IndexError(f"the shape of the mask {tuple(part.shape)} does not match the tensor's, {tuple(tensor.shape)}")
            found += self._places(part, tuple(part.shape)) if is_mask else [part]
            dimension += count
        return tuple(found)

    def _reduced(self, result: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Follow what is computed of a large input as long as it is short or a truth value for each element; know one truth value."""
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
        """Know what a function returned; where it returned sizes that a tracer does not know, put a constant instead."""
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
        """Forget tensors that something unknown is written to, and all that share memory with them."""
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
