"""Graphs as one Python function: the same operators on the same operands, through PyTorch's own bindings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bwcache_compile as bw
from bwcache_compile.runtime.eager import BINDINGS, binding, eager_function
from tests.models import TwoStream
from tests.zoo import ZOO

aten = torch.ops.aten
X = torch.linspace(-2, 3, 48).reshape(2, 4, 6)
P = X.abs() + 0.5
IMAGE = torch.linspace(-1, 1, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)
CALLS: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, (X, P), {"alpha": 2}), (aten.add.Tensor, (X, 1.5), {}),
    (aten.addmm.default, (X[0, :, :4], X[0], X[1].T), {"beta": 2}),
    (aten.amax.default, (X, [-1], True), {}),
    (aten.amin.default, (X, [1]), {}),
    (aten.baddbmm.default, (X[:, :, :4], X, X.mT), {"alpha": 0.5}),
    (aten.bmm.default, (X, X.mT), {}),
    (aten.cat.default, ([X, P], -1), {}), (aten.cat.default, ([X, P.half()],), {}),
    (aten.chunk.default, (X, 3, -1), {}),
    (aten.clamp.default, (X, -1, 1), {}), (aten.clamp.default, (X, None, 1), {}),
    (aten.clone.default, (X.mT,), {"memory_format": torch.contiguous_format}),
    (aten.contiguous.default, (X.mT,), {}),
    (aten.conv2d.default, (IMAGE, IMAGE[:, :, :3, :3], X[0, 0, :2], [3, 3]), {}),
    (aten.conv3d.default, (IMAGE[:, None], IMAGE[:, None, :2, :2, :2], None, [2, 2, 2]), {}),
    (aten.cos.default, (X,), {}),
    (aten.div.Tensor, (X, P), {}), (aten.div.Tensor, (X, 3), {}), (aten.div.Tensor_mode, (X, 3), {"rounding_mode": "floor"}),
    (aten.exp.default, (X,), {}),
    (aten.expand.default, (X[:1], [5, -1, -1]), {}),
    (aten.flatten.using_ints, (X, 1), {}), (aten.flatten.using_ints, (X, 0, 1), {}),
    (aten.gelu.default, (X,), {"approximate": "tanh"}), (aten.gelu.default, (X,), {}),
    (aten.group_norm.default, (IMAGE, 2, None, None, 1e-6), {}),
    (aten.layer_norm.default, (X, [6], X[0, 0], None, 1e-6), {}), (aten.layer_norm.default, (X, [6]), {}),
    (aten.linear.default, (X, X[0], X[0, :, 0]), {}), (aten.linear.default, (X, X[0]), {}),
    (aten.matmul.default, (X, X[0].T), {}),
    (aten.mean.dim, (X, [-1], True), {"dtype": torch.float64}), (aten.mean.default, (X,), {}),
    (aten.mm.default, (X[0], X[1].T), {}),
    (aten.movedim.int, (X, 1, -1), {}),
    (aten.mul.Tensor, (X, P.half()), {}), (aten.mul.Tensor, (X.half(), 0.3), {}), (aten.mul.Tensor, (X[0, 0, 0], X.half()), {}),
    (aten.neg.default, (X,), {}),
    (aten.permute.default, (X, [2, 0, 1]), {}),
    (aten.pow.Tensor_Scalar, (P, 1.5), {}), (aten.pow.Tensor_Tensor, (P, X), {}), (aten.pow.Scalar, (10000, X), {}),
    (aten.relu.default, (X,), {}),
    (aten.reshape.default, (X.mT, [4, -1]), {}),
    (aten.rms_norm.default, (X, [6], X[0, 0], 1e-6), {}), (aten.rms_norm.default, (X, [6]), {}),
    (aten.rsqrt.default, (P,), {}),
    (aten.scaled_dot_product_attention.default, (IMAGE, IMAGE, IMAGE, None, 0.0, True), {"scale": 0.3}),
    (aten.scaled_dot_product_attention.default, (IMAGE, IMAGE[:, :2], IMAGE[:, :2]), {"enable_gqa": True}),
    (aten.select.int, (X, -1, 2), {}),
    (aten.sigmoid.default, (X,), {}),
    (aten.silu.default, (X,), {}),
    (aten.sin.default, (X,), {}),
    (aten.softmax.int, (X, -1), {}), (aten.softmax.int, (X.half(), 1, torch.float32), {}),
    (aten.split_with_sizes.default, (X, [1, 2, 3], -1), {}),
    (aten.sqrt.default, (P,), {}),
    (aten.squeeze.dim, (X[:, :1], 1), {}), (aten.squeeze.default, (X[:, :1],), {}), (aten.squeeze.dims, (X[:1, :1], [0, 1]), {}),
    (aten.stack.default, ([X, P], -1), {}),
    (aten.sub.Tensor, (X, P), {"alpha": 3}), (aten.sub.Tensor, (X, 1), {}),
    (aten.sum.dim_IntList, (X, [0, 2]), {"dtype": torch.float64}), (aten.sum.default, (X,), {}),
    (aten.tanh.default, (X,), {}),
    (aten.transpose.int, (X, 1, -1), {}),
    (aten.unbind.int, (X, 1), {}),
    (aten.unflatten.int, (X, -1, [2, -1]), {}),
    (aten.unsqueeze.default, (X, -1), {}),
    (aten.view.default, (X, [8, -1]), {}), (aten.view.dtype, (X, torch.int32), {}),
]  # fmt: skip


class Launched(TorchDispatchMode):
    """Takes down every operator that is launched, and on what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        described = [(a.shape, a.dtype, a.stride()) if isinstance(a, Tensor) else str(a) for a in args]
        self.calls.append((func, described, sorted(kwargs or {})))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(BINDINGS))
def test_a_binding_launches_the_operators_that_torch_ops_launches(name: str) -> None:
    calls = [call for call in CALLS if call[0].__name__ == name]
    assert calls, "each entry of BINDINGS is tried"
    for target, args, kwargs in calls:
        bound = binding(target)
        assert bound is not target
        with Launched() as by_operator:
            expected = target(*args, **kwargs)
        with Launched() as by_binding:
            returned = bound(*args, **kwargs)
        assert by_binding.calls == by_operator.calls
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(returned), tree_leaves(expected), strict=True))


def test_operators_without_a_binding_stay() -> None:
    assert binding(aten.slice.Tensor) is aten.slice.Tensor
    assert binding(aten.add.Scalar) is aten.add.Scalar
    assert binding(torch.ops.prims.convert_element_type.default) is torch.ops.prims.convert_element_type.default


@torch.no_grad()
@pytest.mark.parametrize("name", ["wan", *(pytest.param(name, marks=pytest.mark.zoo) for name in ("hunyuan_video", "latte"))])
def test_a_graph_and_its_function_launch_alike(name: str) -> None:
    model, call = ZOO[name].make(), ZOO[name].inputs(0)
    cached = bw.transform(model, bw.CacheConfig(num_steps=8), example_kwargs=call)
    runnable = cached._programs.latest
    inputs = tree_leaves(cached._call_parameters.bind((), call))
    for kind, module in runnable.modules.items():
        state = runnable.fresh({}) if kind == "compute" else runnable.fresh({}).computed(runnable.fresh({}).slots, 1)
        operands = runnable.operands(inputs, state, runnable.parameters(cached.cache_config, 8, kind))
        with Launched() as by_module:
            expected = module(*operands)
        with Launched() as by_function:
            returned = eager_function(module)(*operands)
        assert by_function.calls == by_module.calls
        assert all(torch.equal(a, b) for a, b in zip(returned, expected, strict=True) if isinstance(a, Tensor))


@torch.no_grad()
def test_weights_edited_in_place_are_read() -> None:
    model = TwoStream().eval()
    cached = bw.transform(model, bw.CacheConfig(threshold=0, num_steps=4))
    cached(*model.example())
    for parameter in model.parameters():
        parameter.mul_(1.5)
    assert all(torch.equal(a, b) for a, b in zip(cached(*model.example(step=1)), model(*model.example(step=1)), strict=True))
