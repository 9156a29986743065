"""`transform(capture="auto")` takes the first way of capturing that works, and says which and why."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bwcache_compile as bw
from tests.models import OneStream
from tests.opaque.test_opaque import HostBlock, Resisting
from tests.region.test_region import Branching, Holding, Scale


def example() -> tuple[Tensor, ...]:
    return OneStream().example(2)


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (OneStream, "CachedModel", None),
        (
            Branching,
            "RegionModel",
            r"\n  whole: the values of `t`, which may change from step to step, are read .*, in forward: \"if t\.mean",
        ),
        (Resisting, "OpaqueModel", r"\n  whole: (.|\n)*\n  region: Resisting has no stack of blocks"),
    ],
)
def test_the_first_that_works(make: Callable[[], OneStream], kind: str, said: str | None) -> None:
    model = make().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached = bw.transform(model, num_steps=4, threshold=0, capture="auto", example_args=example())
    assert repr(cached).startswith(f"{kind}({make.__name__}, ")
    with torch.no_grad():
        assert torch.equal(cached(*example()), model(*example()))
    ours = [str(w.message) for w in caught if issubclass(w.category, bw.CacheWarning)]
    if said is None:
        assert ours == []
    else:
        (text,) = ours
        assert f"{make.__name__} is captured as {kind.removesuffix('Model').lower()!r}, since it cannot be captured otherwise:" in text
        assert re.search(said, text), text


def test_an_input_that_no_graph_takes() -> None:
    """It is built into no graph either: another one, and another value of the same one, count from the next run on."""
    model, x_t = Holding().eval(), example()
    said = r"Holding is captured as 'opaque', (.|\n)*\n  whole: scale: unsupported input type Scale(.|\n)*\n  region: (.|\n)*given a Scale"
    with pytest.warns(bw.CacheWarning, match=said):
        cached = bw.transform(
            model, num_steps=4, threshold=0, capture="auto", example_kwargs=dict(zip(("x", "t"), x_t, strict=True), scale=Scale(3.0))
        )
    scale = Scale(0.5)
    for value in (0.5, 4.0):
        scale.value.fill_(value)
        cached.reset()
        with torch.no_grad():
            assert torch.equal(cached(*x_t, scale=scale), model(*x_t, scale=scale))


class WritingOnTheHost(Resisting):
    """Its blocks cannot be captured, and write to what they are given."""

    def __init__(self) -> None:
        class WritingBlock(HostBlock):
            def forward(self, x: Tensor, temb: Tensor) -> Tensor:
                return super().forward(x.add_(1), temb)

        super().__init__(block=WritingBlock)


def test_what_no_way_captures() -> None:
    said = r"WritingOnTheHost cannot be captured:\n  whole: (.|\n)*\n  region: (.|\n)*\n  opaque: blocks\.0 writes in place"
    with pytest.raises(bw.CaptureError, match=said):
        bw.transform(WritingOnTheHost().eval(), num_steps=4, capture="auto", example_args=example())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r'capture="auto" tries the ways of capturing one after the other: pass example_args or example_kwargs'),
        ({"example_args": (torch.ones(1),), "dynamic_shapes": "auto"}, "leave out blocks, guard and dynamic_shapes"),
    ],
)
def test_wrong_arguments(options: dict[str, object], said: str) -> None:
    with pytest.raises(bw.ConfigError, match=said):
        bw.transform(nn.Linear(1, 1), capture="auto", **options)  # type: ignore[call-overload]
