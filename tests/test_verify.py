"""verify: each rule fires on a program that breaks it, and names the node."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import InvariantError
from bwcache_compile.ir.program import REGION_MARK, ModelProgram
from bwcache_compile.ir.verify import verify
from bwcache_compile.passes import build
from tests.models import Exposed, InPlace, OneStream, Tiny, TwoStream, captured
from tests.passes.helpers import folded

aten = torch.ops.aten
STATIC = CacheConfig(policy="static", steps_mask=(0, 1))


def built(config: CacheConfig = STATIC) -> ModelProgram:
    return build(captured(OneStream(depth=2)), config)


def complaint(program: ModelProgram) -> str:
    with pytest.raises(InvariantError) as caught:
        verify(program, "some_pass")
    return folded(str(caught.value))


@pytest.mark.parametrize(
    "config", [STATIC, CacheConfig(num_steps=4), CacheConfig(num_steps=4, reuse="taylor")], ids=["static", "schedule", "taylor"]
)
@pytest.mark.parametrize("model", [OneStream(), TwoStream(), InPlace(), Exposed()], ids=lambda m: type(m).__name__)
def test_a_sound_program_passes(model: Tiny, config: CacheConfig) -> None:
    verify(captured(model))
    verify(build(captured(model), config), "specialize")


def test_nodes_out_of_order() -> None:
    program = built()
    graph = program.compute.graph
    nodes = {node.name: node for node in graph.nodes}
    nodes["region_0"].append(nodes["linear"])
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: the graph is malformed: Argument 'linear' of Node 'region' was used before it has been defined! Please
check that Nodes in the graph are topologically ordered. This is a bug in bwcache-compile, please report it.""",
    )


def test_nodes_out_of_order_in_a_called_graph() -> None:
    program = built()
    nodes = {node.name: node for node in program.compute.get_submodule("bwcache_region").graph.nodes}
    nodes["add_1"].append(nodes["add"])
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: the graph is malformed: Argument 'add' of Node 'mul_1' was used before it has been defined! Please
check that Nodes in the graph are topologically ordered. This is a bug in bwcache-compile, please report it.""",
    )


def test_a_dropped_output() -> None:
    program = built()
    output = program.compute.graph.output_node()
    output.args = (output.args[0][:-1],)
    assert_expected_inline(
        complaint(program),
        """after some_pass: the compute graph returns 2 values, not 3. This is a bug in bwcache-compile, please report it.""",
    )


def test_a_state_output_too_many() -> None:
    program = built(CacheConfig(num_steps=4))
    output = program.compute.graph.output_node()
    output.args = ((*output.args[0], output.args[0][0]),)
    assert_expected_inline(
        complaint(program),
        """after some_pass: the compute graph returns 8 values, not 7. This is a bug in bwcache-compile, please report it.""",
    )


def test_a_single_value_is_returned() -> None:
    program = built()
    output = program.compute.graph.output_node()
    output.args = (output.args[0][0],)
    assert_expected_inline(
        complaint(program),
        """after some_pass: the compute graph returns 1 values, not 3. This is a bug in bwcache-compile, please report it.""",
    )


@pytest.mark.parametrize("which", ["compute", "reuse"])
def test_a_cache_buffer_left(which: str) -> None:
    program = built()
    module: torch.fx.GraphModule = getattr(program, which)
    module.add_module("bwcache_cache", nn.Module())
    module.get_submodule("bwcache_cache").register_buffer("output_0", torch.zeros(1))
    with module.graph.inserting_before(module.graph.output_node()):
        module.graph.get_attr("bwcache_cache.output_0")
    message = "after some_pass: the state cache.output_0 is still a buffer. This is a bug in bwcache-compile, please report it."
    assert complaint(program).splitlines()[0] == message


def test_a_region_node_on_a_reused_step() -> None:
    program = built()
    next(node for node in program.reuse.graph.nodes if node.name == "linear_6").meta[REGION_MARK] = True
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: linear_6 of a cached block runs on a reused step. This is a bug in bwcache-compile, please report it.
  x: f32[1, 6, 4] = input
  t: f32[1] = input
  cache_in_output_0: f32[1, 6, 8] = input
  step: i64[1] = input
> linear_6: f32[1, 6, 4] = linear(cache_in_output_0, head.weight, head.bias)
  return linear_6""",
    )


def test_a_region_node_in_a_graph_that_a_reused_step_calls() -> None:
    program = built(CacheConfig(policy="static", steps_mask=(0, 1), reuse="residual"))
    inner = program.reuse.get_submodule("bwcache_reuse_0")
    next(node for node in inner.graph.nodes if node.name == "add").meta[REGION_MARK] = True
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: add of a cached block runs on a reused step. This is a bug in bwcache-compile, please report it.
  arg0_1: f32[1, 6, 8] = input
  arg1_1: f32[1, 6, 8] = input
> add: f32[1, 6, 8] = add(arg0_1, arg1_1)
  return add""",
    )


def test_a_called_module_that_is_no_graph() -> None:
    program = built()
    program.compute.bwcache_region = nn.Identity()
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: region is a Identity, not a graph. This is a bug in bwcache-compile, please report it.
  policy_mask: i64[2] = input
  step: i64[1] = input
  linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
  view: f32[1, 1, 1] = view(t, [-1, 1, 1])
  linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
> region: (f32[1, 6, 8]) = call(region, linear, linear_1)
  region_0: f32[1, 6, 8] = getitem(region, 0)
  linear_6: f32[1, 6, 4] = linear(region_0, head.weight, head.bias)
  reuse_left: i64[1] = call(policy, policy_mask, step)
  return linear_6, region_0, reuse_left""",
    )


def test_a_call_with_an_operand_less() -> None:
    program = built()
    call = next(node for node in program.compute.graph.nodes if node.target == "bwcache_region")
    call.args = call.args[:-1]
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: region is called with 1 operands. This is a bug in bwcache-compile, please report it.
  policy_mask: i64[2] = input
  step: i64[1] = input
  linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
  view: f32[1, 1, 1] = view(t, [-1, 1, 1])
  linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
> region: (f32[1, 6, 8]) = call(region, linear)
  region_0: f32[1, 6, 8] = getitem(region, 0)
  linear_6: f32[1, 6, 4] = linear(region_0, head.weight, head.bias)
  reuse_left: i64[1] = call(policy, policy_mask, step)
  return linear_6, region_0, reuse_left""",
    )


def test_a_method_call() -> None:
    program = built()
    graph = program.reuse.graph
    with graph.inserting_before(graph.output_node()):
        graph.call_method("neg", (graph.output_node().args[0][0],))
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: a method is called where an operator is expected. This is a bug in bwcache-compile, please report it.
  x: f32[1, 6, 4] = input
  t: f32[1] = input
  cache_in_output_0: f32[1, 6, 8] = input
  step: i64[1] = input
  linear_6: f32[1, 6, 4] = linear(cache_in_output_0, head.weight, head.bias)
> neg = neg(linear_6)
  return linear_6""",
    )


def test_a_value_that_is_not_recorded() -> None:
    program = captured(OneStream(depth=1))
    del next(node for node in program.compute.graph.nodes if node.name == "gelu").meta["val"]
    assert_expected_inline(
        complaint(program),
        """\
after some_pass: gelu has no recorded value. This is a bug in bwcache-compile, please report it.
  linear: f32[1, 6, 8] = linear(x, patch.weight, patch.bias)
  view: f32[1, 1, 1] = view(t, [-1, 1, 1])
  linear_1: f32[1, 1, 8] = linear(view, time.weight, time.bias)
  mul: f32[1, 6, 8] = mul(linear, linear_1)
  linear_2: f32[1, 6, 8] = linear(mul, blocks.0.up.weight, blocks.0.up.bias)
> gelu = gelu(linear_2)
  linear_3: f32[1, 6, 8] = linear(gelu, blocks.0.down.weight, blocks.0.down.bias)
  add: f32[1, 6, 8] = add(linear, linear_3)
  linear_4: f32[1, 6, 4] = linear(add, head.weight, head.bias)
  return linear_4""",
    )


def test_a_buffer_without_data() -> None:
    program = captured(OneStream(depth=1))
    program.compute.register_buffer("table", torch.empty(3, device="meta"))
    assert_expected_inline(
        complaint(program), """after some_pass: the buffer table has no data. This is a bug in bwcache-compile, please report it."""
    )


def test_a_program_is_left_alone() -> None:
    program = built()
    before = program.compute.code, program.reuse.code
    verify(program, "specialize")
    assert (program.compute.code, program.reuse.code) == before
