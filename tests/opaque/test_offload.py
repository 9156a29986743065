"""Weights that are moved in for each module's forward: a reused step moves none of the blocks'."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.opaque.test_opaque import Resisting, computed, held
from tests.uncaptured import MASK, STATIC, inputs, outputs, same

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")


class Counting(MutableMapping[str, Tensor]):
    """The weights that accelerate keeps, and the bytes of those that were fetched, by the module that they belong to."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.fetched = weights, dict[str, int]()

    def __getitem__(self, name: str) -> Tensor:
        tensor, owner = self.weights[name], name.partition(".")[0]
        self.fetched[owner] = self.fetched.get(owner, 0) + tensor.numel() * tensor.element_size()
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.weights[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def size(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def test_a_reused_step_fetches_no_weight_of_a_block() -> None:
    plain = Resisting().eval()
    want, blocks, around = held(plain), size(plain.blocks), size(plain) - size(plain.blocks)
    model = Resisting().eval()
    weights = Counting({name: tensor.clone() for name, tensor in model.state_dict().items()})
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    forward = model.forward
    cached = bw.transform(model, STATIC, capture="opaque", example_args=inputs(0))
    fetched = []
    for step in range(len(MASK)):
        weights.fetched.clear()
        with torch.no_grad():
            assert torch.equal(cached(*inputs(step)), want[step]), step
        fetched.append((weights.fetched.get("blocks", 0), sum(weights.fetched.values()) - weights.fetched.get("blocks", 0)))
    assert fetched == [(0 if reused else blocks, around) for reused in MASK]
    assert computed(cached) == [not reused for reused in MASK]
    assert model.forward is forward, "accelerate's hooks are as they were"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_reused_step_fetches_no_weight_where_the_outputs_are_kept() -> None:
    want = outputs(Resisting().eval())
    model = Resisting().eval()
    everything = size(model)
    weights = Counting({name: tensor.clone() for name, tensor in model.state_dict().items()})
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    cached = bw.transform(model, STATIC, cut="output", capture="opaque")
    fetched, made = [], []
    for step in range(len(MASK)):
        weights.fetched.clear()
        with torch.no_grad():
            made.append(cached(*inputs(step)))
        fetched.append(sum(weights.fetched.values()))
    assert fetched == [0 if reused else everything for reused in MASK]
    assert same(made, [want[step] for step in (0, 1, 1, 3, 3, 3)])


@pytest.mark.parametrize("capture", ["whole", "region"])
def test_graphs_of_an_offloaded_model_are_refused(capture: Any) -> None:
    model = accelerate.cpu_offload(Resisting().eval(), execution_device=torch.device("cpu"))
    with pytest.raises(bw.ConfigError, match="an offload hook moves its data in and out"):
        bw.transform(model, STATIC, capture=capture)


@pytest.mark.parametrize("level", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}])
def test_weights_that_diffusers_offloads_in_groups(level: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    group_offloading = pytest.importorskip("diffusers.hooks.group_offloading", reason="needs diffusers")
    model, moved = Resisting().eval(), list[str]()
    names = {id(module): name for name, module in model.named_modules()}
    onload = group_offloading.ModuleGroup.onload_

    def counted(group: Any) -> None:
        moved.extend(names[id(module)] for module in group.modules)
        onload(group)

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", counted)
    cpu = torch.device("cpu")
    group_offloading.apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **level)
    cached = bw.transform(model, STATIC, capture="opaque")
    assert same(outputs(cached), held(Resisting().eval()))
    for step, reused in enumerate(MASK):
        moved.clear()
        with torch.no_grad():
            cached(*inputs(step))
        blocks = [name for name in moved if name.startswith("blocks.")]
        assert len(blocks) == (0 if reused else 3 if "num_blocks_per_group" in level else 6), (step, moved)


def test_a_hook_of_diffusers_that_is_another_cache_is_refused() -> None:
    hooks = pytest.importorskip("diffusers.hooks", reason="needs diffusers")

    class Cache(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    model = Resisting().eval()
    hooks.HookRegistry.check_if_exists_or_initialize(model).register_hook(Cache(), "cache")
    with pytest.raises(bw.ConfigError, match=r"Resisting has a hook of diffusers that replaces its forward \(Cache\)"):
        bw.transform(model, STATIC, capture="opaque", example_args=inputs(0))
