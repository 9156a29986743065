"""canonicalize: what does nothing at run time is gone, and every bit stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional

from bwcache_compile.ir.graph_text import op_counts
from bwcache_compile.passes import canonicalize
from bwcache_compile.testing import assert_graph_diff
from tests.models import Casting, InPlace, OneStream, Tiny, captured
from tests.passes.helpers import applied, around, eager, models, run, same, text

aten = torch.ops.aten


class Narrowing(OneStream):
    """Casts that change the dtype, and one that asks for a copy."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        narrow = x.to(torch.bfloat16)
        copied = x.to(torch.float32, copy=True)
        return super().forward(narrow.to(torch.float32) + copied, t)


def test_diff() -> None:
    program = captured(Casting(depth=1))
    assert_graph_diff(
        *around(canonicalize, program),
        """\
@@ canonicalize
-_assert_tensor_metadata_default = _assert_tensor_metadata(linear, dtype=torch.float32, device=cpu, layout=torch.strided)
-to: f32[1, 6, 8] = to(linear, torch.float32)
-type_as: f32[1, 1, 8] = type_as(linear_1, to)
-mul: f32[1, 6, 8] = mul(to, type_as)
+mul: f32[1, 6, 8] = mul(linear, linear_1)
-add: f32[1, 6, 8] = add(to, linear_3)
-dropout: f32[1, 6, 8] = dropout(add, 0.1, False)
-linear_4: f32[1, 6, 4] = linear(dropout, head.weight, head.bias)
+add: f32[1, 6, 8] = add(linear, linear_3)
+linear_4: f32[1, 6, 4] = linear(add, head.weight, head.bias)""",
        name="canonicalize",
    )


def test_casts_that_matter_stay() -> None:
    program = captured(Narrowing(depth=1))
    assert_graph_diff(
        *around(canonicalize, program),
        """\
@@ canonicalize
-_assert_tensor_metadata_default = _assert_tensor_metadata(x, dtype=torch.float32, device=cpu, layout=torch.strided)
-_assert_tensor_metadata_default_1 = _assert_tensor_metadata(x, dtype=torch.float32, device=cpu, layout=torch.strided)
-_assert_tensor_metadata_default_2 = _assert_tensor_metadata(to, dtype=torch.bfloat16, device=cpu, layout=torch.strided)""",
        name="canonicalize",
    )
    assert op_counts(program.compute)["to"] == 3


def test_writes_stay() -> None:
    program = captured(InPlace(depth=1))
    before = text(program)
    result = canonicalize(program)
    assert not result.modified
    assert text(result.program) == before


@pytest.mark.parametrize(("rate", "train", "kept"), [(0.1, True, 1), (0.1, False, 0), (0.0, True, 0)])
def test_only_an_inactive_dropout_goes(rate: float, train: bool, kept: int) -> None:
    program = captured(OneStream(depth=1))
    graph = program.compute.graph
    add = next(node for node in graph.nodes if node.name == "add")
    with graph.inserting_after(add):
        dropout = graph.call_function(aten.dropout.default, (add, rate, train))
    dropout.meta["val"] = add.meta["val"]
    add.replace_all_uses_with(dropout, delete_user_cb=lambda user: user is not dropout)
    assert canonicalize(program).modified is not bool(kept)
    assert op_counts(program.compute)["dropout"] == kept


class Checked(OneStream):
    """Asserts about a value at run time, and computes what nobody reads."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        torch._assert_async(t.sum() > 0)
        functional.gelu(x)
        return super().forward(x, t)


def test_asserts_and_what_only_they_read_go() -> None:
    program = captured(Checked(depth=1))
    before = op_counts(program.compute)
    after = op_counts(applied(canonicalize, program).compute)
    assert dict(before - after) == {"sum": 1, "gt": 1, "_assert_async": 1, "gelu": 1}
    assert not after - before


class Halves(OneStream):
    """Writes to one half of a tensor, and reads the whole."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        doubled = x.clone()
        left, _ = doubled.chunk(2, dim=-1)
        left.mul_(2)
        return super().forward(doubled, t)


@pytest.mark.parametrize("model", [Casting(), Narrowing(), Checked(), InPlace(), Halves()], ids=lambda m: type(m).__name__)
def test_numbers(model: Tiny) -> None:
    program = captured(model)
    before, printed, args = program.copy(), text(program), model.example(step=1)
    after = applied(canonicalize, program)
    assert text(before) == printed
    assert same(run(after, *args), run(before, *args))


@settings(max_examples=10, deadline=None)
@given(models())
def test_a_second_run_changes_nothing(model: Tiny) -> None:
    once = canonicalize(captured(model)).program
    before = text(once)
    again = canonicalize(once)
    assert not again.modified
    assert text(again.program) == before
    assert same(run(once, *model.example(step=1)), eager(model, *model.example(step=1)))
