"""graph_text: one printer, which hides what does not matter and depends on no machine."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.graph_text import diff_graphs, format_graph, format_value, graph_diff, op_counts, snapshot
from bwcache_compile.passes import build, canonicalize, explain
from tests.models import Casting, InPlace, OneStream, captured

STATIC = CacheConfig(policy="static", steps_mask=(0, 1))


def test_format_graph() -> None:
    assert_expected_inline(
        format_graph(captured(OneStream(depth=1)).compute),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
view: f32[1, 1, 1] = view(t, [-1, 1, 1])
linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
mul: f32[1, 6, 8] = mul(linear, linear_1)
linear_2: f32[1, 6, 8] = linear(mul, blocks.0.up.weight, blocks.0.up.bias)
gelu: f32[1, 6, 8] = gelu(linear_2)
linear_3: f32[1, 6, 8] = linear(gelu, blocks.0.down.weight, blocks.0.down.bias)
add: f32[1, 6, 8] = add(linear, linear_3)
linear_4: f32[1, 6, 4] = linear(add, head.weight, head.bias)
return linear_4""",
    )


def test_called_graphs_are_indented_down_to_a_depth() -> None:
    program = build(captured(OneStream(depth=2)), STATIC)
    assert_expected_inline(
        format_graph(program.compute, depth=0),
        """\
x: f32[1, 6, 4] = input
t: f32[1] = input
policy_mask: i64[2] = input
step: i64[1] = input
linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
view: f32[1, 1, 1] = view(t, [-1, 1, 1])
linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
region: (f32[1, 6, 8]) = call(region, linear, linear_1)
region_0: f32[1, 6, 8] = getitem(region, 0)
linear_6: f32[1, 6, 4] = linear(region_0, head.weight, head.bias)
reuse_left: i64[1] = call(policy, policy_mask, step)
return linear_6, region_0, reuse_left""",
    )
    deep = format_graph(program.compute)
    assert "\n  linear: f32[1, 6, 8] = input\n" in deep
    assert len(deep.splitlines()) > len(format_graph(program.compute, depth=0).splitlines())


def test_format_value() -> None:
    values = [
        torch.empty(2, 3),
        torch.empty((), dtype=torch.int64),
        torch.empty(1, dtype=torch.bool),
        torch.empty(0, dtype=torch.complex64),
    ]
    assert_expected_inline(format_value([*values, 3]), """(f32[2, 3], i64[], b8[1], complex64[0], int)""")


def test_diff_of_equal_graphs_is_empty() -> None:
    printed = format_graph(captured(InPlace()).compute)
    assert diff_graphs(printed, format_graph(captured(InPlace()).compute), "nothing") == ""


def test_diff_shows_only_what_differs() -> None:
    assert_expected_inline(
        diff_graphs("a\nb\nc\n", "a\nB\nc\nd\n", "some_pass"),
        """\
@@ some_pass
-b
+B
+d""",
    )


def test_op_counts_reach_into_called_graphs() -> None:
    flat = op_counts(captured(OneStream(depth=3)).compute)
    assert flat == {"linear": 9, "mul": 3, "gelu": 3, "add": 3, "view": 1}
    built = build(captured(OneStream(depth=3)), STATIC)
    assert flat["gelu"] == op_counts(built.compute)["gelu"]
    assert op_counts(built.reuse) == {"linear": 1}


def test_graph_diff_of_a_pass() -> None:
    program = captured(Casting(depth=1))
    before = snapshot(program.compute)
    assert_expected_inline(
        str(graph_diff(before, canonicalize(program).program.compute, "canonicalize")),
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
+linear_4: f32[1, 6, 4] = linear(add, head.weight, head.bias)
-1 _assert_tensor_metadata, -1 to, -1 type_as, -1 dropout; 10 parameters shared, 0 copied; 0 blocks guarded""",
    )


def test_graph_diff_of_the_whole() -> None:
    whole = explain(captured(OneStream(depth=2)), STATIC)["whole"]
    assert_expected_inline(
        str(whole),
        """\
@@ whole
-linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
-view: f32[1, 1, 1] = view(t, [-1, 1, 1])
-linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
-mul: f32[1, 6, 8] = mul(linear, linear_1)
-linear_2: f32[1, 6, 8] = linear(mul, blocks.0.up.weight, blocks.0.up.bias)
-gelu: f32[1, 6, 8] = gelu(linear_2)
-linear_3: f32[1, 6, 8] = linear(gelu, blocks.0.down.weight, blocks.0.down.bias)
-add: f32[1, 6, 8] = add(linear, linear_3)
-mul_1: f32[1, 6, 8] = mul(add, linear_1)
-linear_4: f32[1, 6, 8] = linear(mul_1, blocks.1.up.weight, blocks.1.up.bias)
-gelu_1: f32[1, 6, 8] = gelu(linear_4)
-linear_5: f32[1, 6, 8] = linear(gelu_1, blocks.1.down.weight, blocks.1.down.bias)
-add_1: f32[1, 6, 8] = add(add, linear_5)
-linear_6: f32[1, 6, 4] = linear(add_1, head.weight, head.bias)
+cache_in_output_0: f32[1, 6, 8] = input
+step: i64[1] = input
+linear_6: f32[1, 6, 4] = linear(cache_in_output_0, head.weight, head.bias)
-6 linear, -1 view, -2 mul, -2 gelu, -2 add; 2 parameters shared, 0 copied; 2 blocks guarded""",
    )
    assert (whole.added, whole.removed) == ({}, {"linear": 6, "view": 1, "mul": 2, "gelu": 2, "add": 2})


class Copied(OneStream):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + 1


def test_copied_parameters_are_counted() -> None:
    one, other = captured(OneStream(depth=1)), captured(Copied(depth=1))
    diff = graph_diff(one.compute, other.compute)
    assert (diff.shared_parameters, diff.copied_parameters) == (0, 10)
    assert diff.added == {"add": 1}
    same = graph_diff(one.compute, one.copy().compute)
    assert (same.shared_parameters, same.copied_parameters, same.text) == (10, 0, "")
