"""Compare a graph's outputs with the model's: bit for bit, or within the rounding of the dtype."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bwcache_compile.errors import CaptureError, warn
from bwcache_compile.ir.ranks import ALONE, Agreement
from bwcache_compile.ir.torch_compat import pytree

Verify = Literal["bitwise", "close", False]
"""How a captured graph is compared with the model."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""For "close": the largest difference allowed, relative to the largest value of the output."""


def flat_outputs(outputs: Any) -> list[Any]:
    """Return the leaves of a model's output, in the order in which the graph returns them."""
    return pytree.tree_leaves(outputs)


def clone_tensors(tree: Any) -> Any:
    """Copy every tensor of a call, so that running the model twice on it cannot differ through in-place edits."""
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same values; NaN equals NaN."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _close(want: Tensor, got: Tensor) -> bool:
    tolerance = TOLERANCES.get(want.dtype)
    if tolerance is None:
        return False
    return torch.allclose(got.double(), want.double(), rtol=0, atol=tolerance * float(want.abs().max()), equal_nan=True)


def as_tensor(value: Any) -> Tensor:
    """Return a tensor, a numpy array or a number as a tensor on the host."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return torch.from_numpy(value.copy()) if hasattr(value, "__array__") else torch.tensor(value)


def relative_error(actual: Any, expected: Any, least: float = 1e-30) -> float:
    """Return the largest difference, relative to the largest value expected, which counts as no smaller than `least`.

    It is 0 for the same values, where NaN equals NaN, and infinite for another shape, another dtype or another place of NaN.
    """
    got, want = as_tensor(actual), as_tensor(expected)
    if (got.shape, got.dtype) != (want.shape, want.dtype) or not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = torch.nan_to_num(got.to(wide)), torch.nan_to_num(want.to(wide))
    if torch.equal(got, want):
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp(min=least))


def difference(expected: list[Any], actual: list[Any], close: bool = False) -> str | None:
    """Say how two flat outputs differ, bit for bit unless `close` allows for rounding; NaN equals NaN."""
    if len(expected) != len(actual):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for i, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(want, Tensor):
            if want != got:
                return f"output {i} is {got!r} instead of {want!r}"
            continue
        if not isinstance(got, Tensor) or (want.shape, want.dtype) != (got.shape, got.dtype):
            return f"output {i} is {type(got).__name__} of another shape or dtype"
        if not same(want, got) and not (close and _close(want, got)):
            wide = torch.complex128 if want.is_complex() else torch.float64
            worst = (want.to(wide) - got.to(wide)).abs().max().item()
            return f"output {i} differs by up to {worst:.3g}"
    return None


class Reference:
    """The outputs of a model for one call. The model runs when they are first needed, and only once unless a graph differs.

    Attributes:
        agreement: With the ranks that compare their graphs at the same call: the model runs again on all of them or on none.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], verify: Verify = "bitwise") -> None:
        """Run nothing yet."""
        self.model, self.args, self.kwargs, self.verify = model, args, kwargs, verify
        self.agreement: Agreement = ALONE
        self._expected: list[Any] | None = None

    def inputs(self) -> list[Any]:
        """Return the leaves of the call, copied."""
        return pytree.tree_leaves(clone_tensors((self.args, self.kwargs)))

    def _run(self) -> list[Any]:
        with torch.no_grad():
            return flat_outputs(self.model(*clone_tensors(self.args), **clone_tensors(self.kwargs)))

    def outputs(self) -> list[Any]:
        """Return the leaves of the model's output.

        Raises:
            CaptureError: The model returns something that a graph cannot return.
        """
        if self._expected is None:
            expected = self._run()
            check_outputs(type(self.model).__name__, expected)
            self._expected = expected
        return self._expected

    def difference(self, actual: list[Any]) -> str | None:
        """Say how a graph's outputs differ from the model's, or from those of the model run with torch.compile disabled."""
        if not self.verify:
            return None
        close = self.verify == "close"
        wrong = self.agreement.joint(difference(self.outputs(), actual, close))
        if wrong is None:
            return None
        with torch.compiler.set_stance("force_eager"):
            plain = self._run()
        if self.agreement.joint(difference(plain, actual, close)) is not None:
            return wrong
        # a model that counts its calls returns something else each time, compiled functions or none
        if self.agreement.joint(difference(self.outputs(), self._run())) is not None:
            return wrong
        warn(
            f"{type(self.model).__name__} calls torch.compile on functions of its own, and compiled kernels round differently. The captured"
            " graph equals the model with torch.compile disabled, bit for bit. Call torch.compile on the cached model to compile it."
        )
        return None

    def check_repeatable(self) -> None:
        """Run the model again after a capture differed, to tell a wrong capture from a model that is not deterministic.

        Raises:
            CaptureError: The model is not deterministic.
        """
        noise = difference(self.outputs(), self._run())
        if noise is not None:
            raise CaptureError(
                f"{type(self.model).__name__} is not deterministic: two calls with the same inputs differ ({noise}).\n"
                "  A captured graph cannot be verified against it. If its forward draws random numbers or uses nondeterministic kernels,"
                " remove the randomness and call torch.use_deterministic_algorithms(True). If it keeps state between calls (a step"
                " counter, a cache of its own, an attribute that it writes), turn that off or pass the state as an input."
            )


def check_outputs(name: str, outputs: list[Any], returns: str = "a graph") -> None:
    """Refuse outputs that a graph, or what else `returns` them, cannot make.

    Raises:
        CaptureError: One is neither a tensor nor a plain constant.
    """
    for leaf in outputs:
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise CaptureError(
                f"{name} returns an object of type {type(leaf).__name__}, but {returns} can return only tensors, numbers, strings and None."
                " Return the tensors that"
                " it holds, or register its class: torch.export.register_dataclass for a dataclass, else"
                " torch.utils._pytree.register_pytree_node."
            )
