"""Every transformer class of diffusers 0.42 can be cached by `transform(capture="auto")`."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.api import Cached
from bwcache_compile.ir.compare import flat_outputs
from tests.zoo.catalog import CATALOG, LEFT_OUT
from tests.zoo.catalog_entry import CatalogEntry, found_blocks
from tests.zoo.selection import selected

KINDS = {"whole": "CachedModel", "region": "RegionModel", "opaque": "OpaqueModel"}
QUICK = ("prior",)
"""For every run of the tests. The other ways of capturing have tests of their own in `tests/region` and `tests/opaque`."""


def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def transform(model: nn.Module, entry: CatalogEntry, **settings: Any) -> Cached:
    """Transform a model as users do who do not know how it can be captured."""
    said = f"^{entry.model} is captured as {entry.capture!r}, since it cannot be captured otherwise"
    with contextlib.nullcontext() if entry.capture == "whole" else pytest.warns(bw.CacheWarning, match=said):
        return bw.transform(model, capture="auto", example_kwargs=entry.call(0), **settings)


def cached_steps(cached: Cached, entry: CatalogEntry) -> list[Any]:
    """Run the four steps of a generation."""
    outputs = []
    for step in range(4):
        with cached.cache_context("default", step_index=step) if entry.tells_step else contextlib.nullcontext():
            outputs.append(run(cached, entry.inputs(step)))
    return outputs


def same(actual: list[Any], expected: list[Any]) -> bool:
    pairs = zip(actual, expected, strict=True)
    return all(torch.equal(got, want) if isinstance(want, Tensor) else got == want for got, want in pairs)


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:Dynamo does not know how to trace:UserWarning",  # flex_attention while work is counted
    "ignore:Initializing zero-element tensors:UserWarning",
)
@pytest.mark.parametrize("name", selected(CATALOG, QUICK))
def test_auto_caches(name: str) -> None:
    entry = CATALOG[name]
    model = entry.make()
    full = [run(model, entry.inputs(step)) for step in range(4)]  # first of all: OmniGen changes a buffer when it runs

    cached = transform(model, entry, policy="schedule", num_steps=4, threshold=0)
    assert type(cached).__name__ == KINDS[entry.capture]
    assert repr(cached).startswith(f"{KINDS[entry.capture]}({entry.model}, ")
    assert set(found_blocks(cached)) == {*entry.block_names(), *entry.besides}
    for expected, actual in zip(full, cached_steps(cached, entry), strict=True):
        assert type(actual) is type(expected)
        assert same(flat_outputs(actual), flat_outputs(expected))
    assert {context.computed for context in cached.report().contexts.values()} == {4}

    cached = transform(model, entry, policy="static", steps_mask=(0, 0, 1, 0))
    pairs = [(flat_outputs(got), flat_outputs(want)) for got, want in zip(cached_steps(cached, entry), full, strict=True)]
    assert [same(got, want) for got, want in pairs] == [True, True, False, True]
    assert all(leaf.isfinite().all() for leaf in pairs[2][0] if isinstance(leaf, Tensor))
    assert {context.reused for context in cached.report().contexts.values()} == {1}


def test_no_class_is_missing() -> None:
    transformers = pytest.importorskip("diffusers.models.transformers")
    classes = {name for name in dir(transformers) if inspect.isclass(getattr(transformers, name))}
    assert classes == {entry.model for entry in CATALOG.values()} | set(LEFT_OUT)
