"""Write a graph as one Python function that launches its operators with as little Python as the model itself does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from bwcache_compile.ir.inline import inline_calls
from bwcache_compile.ir.torch_compat import OpOverload, function_homes

BINDINGS = frozenset({
    "add.Tensor", "addmm.default", "amax.default", "amin.default", "baddbmm.default", "bmm.default", "cat.default", "chunk.default",
    "clamp.default", "clone.default", "contiguous.default", "conv2d.default", "conv3d.default", "cos.default", "div.Tensor",
    "div.Tensor_mode", "exp.default", "expand.default", "flatten.using_ints", "gelu.default", "group_norm.default", "layer_norm.default",
    "linear.default", "matmul.default", "mean.default", "mean.dim", "mm.default", "movedim.int", "mul.Tensor", "neg.default",
    "permute.default", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "relu.default", "reshape.default", "rms_norm.default",
    "rsqrt.default", "scaled_dot_product_attention.default", "select.int", "sigmoid.default", "silu.default", "sin.default",
    "softmax.int", "split_with_sizes.default", "sqrt.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "stack.default",
    "sub.Tensor", "sum.default", "sum.dim_IntList", "tanh.default", "transpose.int", "unbind.int", "unflatten.int", "unsqueeze.default",
    "view.default", "view.dtype",
})  # fmt: skip
"""ATen operators that are called through PyTorch's Python bindings, whose parser of arguments is faster than `torch.ops`.

The bindings reach the same overload for the arguments that a captured graph holds; the tests hold each one against `torch.ops`.
"""


def binding(target: OpOverload) -> Callable[..., Any]:
    """Return the Python binding of an operator, or the operator itself where it is not one of `BINDINGS`."""
    if target.namespace != "aten" or target.__name__ not in BINDINGS:
        return target
    name = target.__name__.partition(".")[0]
    return next(getattr(home, name) for home in function_homes() if hasattr(home, name))


def eager_function(module: GraphModule, blocks: Mapping[GraphModule, nn.Module] | None = None) -> Callable[..., Any]:
    """Return a function that runs the same operators on the same operands as a graph, in the same order.

    Where it calls one of the graphs `blocks`, what that is mapped to is called.

    A module's own code looks every weight up by its path, calls every operator through `torch.ops`, and every graph
    that it calls as a module; together that costs about a fifth of a step whose operators are short. Weights are bound
    here instead, so the function is right as long as the module's attributes are the same objects.
    """
    instead = blocks or {}
    flat = inline_calls(module, instead.__contains__)
    reads = flat.graph.find_nodes(op="get_attr")
    with flat.graph.inserting_after(flat.graph.find_nodes(op="placeholder")[-1]):
        for node in reversed(reads):  # each goes before those inserted already
            node.replace_all_uses_with(flat.graph.placeholder(node.name))
            flat.graph.erase_node(node)
    for node in flat.graph.nodes:
        if isinstance(node.target, OpOverload):
            node.target = binding(node.target)
    weights = [flat.attributes[str(node.target)] for node in reads]
    calls = {str(node.target): instead[flat.attributes[str(node.target)]] for node in flat.graph.find_nodes(op="call_module")}
    run = GraphModule(calls, flat.graph).forward

    def call(*operands: Any) -> Any:
        return run(*operands, *weights)

    return call
