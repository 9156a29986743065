"""Wrap a module, so that the wrapper can be used wherever the module was."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

from torch import nn

_CHANGING = ("add_", "delete_", "disable_", "enable_", "fuse_", "load_", "merge_", "reset_", "set_", "unfuse_", "unload_", "unmerge_")
"""How methods begin that may change a module's weights or what it computes; some write where no version counts."""


@functools.lru_cache(256)
def _calls_forward(function: Callable[..., Any]) -> bool:
    """Whether a method runs its own module, as `self.forward(...)` or `self(...)`: samplers call `forward_with_cfg` and the like."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # made at run time, without a source
        return "forward" in getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())
    (definition,) = tree.body
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return False
    module = definition.args.args[0].arg
    called = [node.func for node in ast.walk(definition) if isinstance(node, ast.Call)]
    owners = [f.value for f in called if isinstance(f, ast.Attribute) and f.attr in ("forward", "__call__")]
    return any(isinstance(owner, ast.Name) and owner.id == module for owner in [*called, *owners])


class ModelWrapper(nn.Module):
    """A module with another module's parameters, buffers, submodules and attributes, all under the same names.

    Nothing is copied: moving, loading or editing the weights through either is seen by both. Attributes that neither
    the wrapper nor `nn.Module` has (`config`, `dtype`, `save_pretrained` ...) are the original's, to read and to set.
    `isinstance` takes the wrapper for what the original is: pipelines ask before they load, fuse or save. Methods that call
    the module's forward (`forward_with_cfg`) call the wrapper's.
    """

    def __init__(self, original: nn.Module) -> None:
        """Share the registries of the original. What a subclass needs for itself it sets before it calls `_seal`."""
        super().__init__()
        values = self.__dict__
        values["_parameters"], values["_buffers"], values["_modules"] = original._parameters, original._buffers, original._modules
        values["_non_persistent_buffers_set"] = original._non_persistent_buffers_set
        values["training"] = original.training
        values["_original"] = original  # bypasses `__setattr__`: as a submodule it would prefix every name in the state dict
        values["__module__"] = type(original).__module__  # which pipelines write down beside the name of the class
        values["_is_torch_compile"] = False  # torch.compile marks what it is given; on the original it would pass for a change
        values["_sealed"] = False

    def _seal(self) -> None:
        """From here on, attributes that are new to the wrapper are set on the original."""
        self.__dict__["_sealed"] = True

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The original's class, so that `isinstance` and `issubclass` say of the wrapper what they say of it."""
        return type(self.__dict__.get("_original", self))

    def _mine(self, name: str) -> bool:
        return not self.__dict__.get("_sealed") or name in self.__dict__ or hasattr(type(self), name)

    def __getattr__(self, name: str) -> Any:
        """Look in the shared registries, then in the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or (name.startswith("__") and name.endswith("__")):
                raise
            value = getattr(original, name)
        if not isinstance(value, types.MethodType) or value.__self__ is not original:
            return value
        if name.startswith(_CHANGING):
            return self._announced(value)
        return types.MethodType(value.__func__, self) if _calls_forward(value.__func__) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the wrapper's own attributes here and all others on the original, whose forward reads them."""
        if self._mine(name):
            super().__setattr__(name, value)
        else:
            setattr(self._original, name, value)
            self._touched()

    def __delattr__(self, name: str) -> None:
        """Delete an attribute where it was set."""
        if self._mine(name):
            super().__delattr__(name)
        else:
            delattr(self._original, name)
            self._touched()

    def _announced(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method that may change the model: `_changed` is called after it, whether or not it fails."""

        @functools.wraps(method)
        def announced(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                self._changed()

        return announced

    def _changed(self) -> None:
        """Called after the original may have changed in a way that no version counter shows."""

    def _touched(self) -> None:
        """Called after the original may have changed in a way that `ModelWatch` detects."""

    def _apply(self, *args: Any, **kwargs: Any) -> ModelWrapper:
        """Move or cast the original, as `half()` and `cuda()` do."""
        self._original._apply(*args, **kwargs)
        self._touched()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the original's weights."""
        result = self._original.load_state_dict(*args, **kwargs)
        self._touched()
        return result

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile what the drop-in runs in the blocks' place; a subclass may compile the blocks alone.

        diffusers' method of that name compiles the original's modules, which no graph calls.
        """
        self.compile(**options)

    def get_submodule(self, target: str) -> nn.Module:
        """Look in the original, some of whose modules may be called like methods of the wrapper."""
        return self._original.get_submodule(target)

    def to(self, *args: Any, **kwargs: Any) -> ModelWrapper:
        """Move or cast as the original does, which may keep some of its modules as they are."""
        self._original.to(*args, **kwargs)
        self._touched()
        return self

    def train(self, mode: bool = True) -> ModelWrapper:
        """Set the mode of both."""
        self._original.train(mode)
        self.training = mode
        return self
