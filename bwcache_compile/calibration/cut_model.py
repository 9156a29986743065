"""What calibration needs of a model: run a step, or replace it by a weighted sum of the last computed ones."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor, nn

from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.policies.reuse.linear import weighted_sum


class CutModel(Protocol):
    """A model whose steps can be computed, or reused as a linear combination of the last computed steps.

    Attributes:
        module: The model; pipelines read its attributes (`config`, `dtype`, ...).
        anchors: How many computed steps a state keeps.
        reads_inputs: Whether a reused step depends on its inputs. False where the anchors are the model's outputs.
    """

    @property
    def module(self) -> nn.Module:
        """The model that pipelines see."""
        ...

    @property
    def anchors(self) -> int:
        """Number of computed steps that a state keeps."""
        ...

    @property
    def reads_inputs(self) -> bool:
        """Whether a reused step depends on its inputs."""
        ...

    def fresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the state of a context before its first step."""
        ...

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> tuple[Any, Any]:
        """Run the model; return its output and the state with this step as the newest anchor."""
        ...

    def reuse(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any, weights: Tensor) -> Any:
        """Return the output of a reused step.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            state: Holds at least one anchor.
            weights: Floating-point [anchors], newest anchor first, zero where there is no anchor yet.
        """
        ...


@dataclasses.dataclass(frozen=True)
class OutputState:
    """The last computed outputs of one context.

    Attributes:
        anchors: Floating-point leaves of each kept output, newest first.
        floating: Which leaves of the output are floating-point tensors.
        rest: The other leaves of the newest output, in order.
        spec: Structure of the output.
    """

    anchors: tuple[tuple[Tensor, ...], ...] = ()
    floating: tuple[bool, ...] = ()
    rest: tuple[Any, ...] = ()
    spec: pytree.TreeSpec | None = None


class OutputCut:
    """A model cut at its output: a reused step is a weighted sum of its last outputs, and runs nothing of the model."""

    reads_inputs = False

    def __init__(self, module: nn.Module, anchors: int = 4) -> None:
        """Keep `anchors` outputs per context."""
        if anchors < 1:
            raise ConfigError(f"anchors must be at least 1, got {anchors}.")
        self._callable = module
        self.module: nn.Module = getattr(module, "_orig_mod", module)  # what torch.compile wraps has the attributes
        self.anchors = anchors

    def fresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OutputState:
        """Return a state without anchors."""
        return OutputState()

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: OutputState) -> tuple[Any, OutputState]:
        """Run the model and keep its output.

        Raises:
            ConfigError: The output holds no floating-point tensor, or its form changed within a generation.
        """
        output = self._callable(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(output)
        floating = tuple(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        newest = tuple(leaf.detach() for leaf, kept in zip(leaves, floating, strict=True) if kept)
        if not newest:
            raise ConfigError(
                f"{type(self.module).__name__} returned {type(output).__name__} without a floating-point tensor, so there is nothing to"
                " reuse. Register its class with torch.utils._pytree.register_pytree_node if it holds tensors."
            )
        if state.anchors and [t.shape for t in newest] != [t.shape for t in state.anchors[0]]:
            shapes = [list(t.shape) for t in state.anchors[0]], [list(t.shape) for t in newest]
            raise ConfigError(f"output shapes changed within a generation: {shapes[0]}, then {shapes[1]}. Generate one size per call.")
        rest = tuple(leaf for leaf, kept in zip(leaves, floating, strict=True) if not kept)
        return output, OutputState((newest, *state.anchors)[: self.anchors], floating, rest, spec)

    def reuse(self, args: tuple[Any, ...], kwargs: dict[str, Any], state: OutputState, weights: Tensor) -> Any:
        """Return the weighted sum of the kept outputs, computed in float32 and cast to their dtype; other leaves are held."""
        assert state.spec is not None, "nothing was computed yet"
        sums = iter([weighted_sum(tensors, weights.float().to(tensors[0].device)) for tensors in zip(*state.anchors, strict=True)])
        rest = iter(state.rest)
        return pytree.tree_unflatten([next(sums if kept else rest) for kept in state.floating], state.spec)
