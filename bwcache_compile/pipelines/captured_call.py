"""Record the arguments of a module's call, as example arguments for a capture or an export."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.errors import ConfigError, StateError
from bwcache_compile.ir.torch_compat import pytree


def _copied(value: Any) -> Any:
    """Return a tensor that the caller does not write to. One that is expanded stays as it is, since a copy would have another layout."""
    if not isinstance(value, Tensor):
        return value
    return value.detach() if 0 in value.stride() and not value.is_inference() else value.detach().clone()


class _Stop(BaseException):
    """Ends a run after the call was recorded; no `except Exception` on the way catches it."""


class CapturedCall:
    """The arguments of the first call of a module within a `with` block. Made by `capture_call`."""

    def __init__(self, module: nn.Module, stop: bool) -> None:
        """Record nothing before the block is entered."""
        self._module, self._stop = module, stop
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the call.

        Raises:
            StateError: The module was not called yet.
        """
        return self._recorded()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the call.

        Raises:
            StateError: The module was not called yet.
        """
        return self._recorded()[1]

    def _recorded(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._call is None:
            name = type(getattr(self._module, "_orig_mod", self._module)).__name__
            raise StateError(
                f"{name} was not called inside the `with capture_call(...)` block. Run the pipeline inside the block, and pass the module"
                " that the pipeline holds now: capture_call(pipe.transformer). Calls of `module.forward(...)` are not recorded."
            )
        return self._call

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:
            with torch.inference_mode(False), torch.no_grad():
                self._call = pytree.tree_map(_copied, (args, dict(kwargs)))
            if self._stop:
                raise _Stop

    def __enter__(self) -> CapturedCall:
        """Begin to listen."""
        record = torch.compiler.disable(self._record)  # type: ignore[no-untyped-call]
        self._hook = self._module.register_forward_pre_hook(record, with_kwargs=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Remove the hook.

        Raises:
            StateError: The block ended without a call.
        """
        self._hook.remove()
        if kind is None:
            self._recorded()
        return isinstance(error, _Stop)


def capture_call(module: nn.Module, *, stop: bool = False) -> CapturedCall:
    """Record the arguments of the first call of a module within the block, for `transform` and `export`.

    `with capture_call(pipe.transformer) as call: pipe(prompt)`; then `transform(model, example_args=call.args,
    example_kwargs=call.kwargs)`, or `export(cached, "bundle", signature=(call.args, call.kwargs))`. Tensors are copied as they were at
    the call. The module may be a cached model, or be compiled.

    Args:
        module: What the block calls.
        stop: Whether to end the block after that call, to save the rest of the run: nothing after the call in the block runs.

    Returns:
        A context manager that gives the call, with `args` and `kwargs`.

    Raises:
        ConfigError: `module` is no module.
        StateError: When the block ends: the module was not called in it.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"capture_call expects a torch.nn.Module, such as pipe.transformer, got {type(module).__name__}.")
    return CapturedCall(module, stop)
