"""guard="graph": the same outputs and the same report as with the host deciding, and one whole graph under torch.compile."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import bwcache_compile as bw
from tests.models import Interleaved, OneStream, Tiny, TwoStream, noise
from tests.passes.helpers import folded
from tests.reference import BlockOracle, Oracle
from tests.runtime.helpers import pattern
from tests.zoo import ZOO, Entry

SCHEDULE = {"num_steps": 8, "threshold": math.inf, "reuse_interval": 2}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("reuse", ["taylor", pytest.param("output", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", [OneStream(), TwoStream(), Interleaved()], ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_contexts_and_generations_as_with_the_host(model: Tiny, reuse: Any) -> None:
    model.eval()
    config = bw.CacheConfig(**SCHEDULE, reuse=reuse)
    host, graph = bw.transform(model, config), bw.transform(model, config, guard="graph")
    for generation in range(2):
        for step in range(8):
            for name in ("cond", "uncond") if step != 3 else ("cond",):
                inputs = model.example(step=step + generation)
                with host.cache_context(name, step_index=step), graph.cache_context(name, step_index=step):
                    assert torch.equal(host(*inputs), graph(*inputs))
    assert pattern(graph, "cond") == "##..#..#"
    for name, context in host.report().contexts.items():
        for ours, theirs in zip(graph.report().contexts[name].steps, context.steps, strict=True):
            assert (ours.step, ours.computed, ours.gap, ours.indicator) == (theirs.step, theirs.computed, theirs.gap, theirs.indicator)


@torch.no_grad()
def test_open_sizes() -> None:
    """The second size opens the program; both guards go on alike, and each size begins a generation."""
    model = OneStream().eval()
    config = bw.CacheConfig(**SCHEDULE)
    host, graph = bw.transform(model, config), bw.transform(model, config, guard="graph")
    for tokens in (6, 9, 4):
        for step in range(4):
            x, t = noise("x", step, 1, tokens, 4), model.example(step=step)[1]
            assert torch.equal(host(x, t), graph(x, t))
        assert pattern(graph, "default") == "##.."
    assert graph.report().captures == 2


@torch.no_grad()
def test_a_run_without_reuse_says_so() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=3, threshold=1e-6), guard="graph")
    for step in range(2):
        cached(*model.example(step=step))
    with pytest.warns(bw.CacheWarning, match="a threshold above it would have triggered there"):
        cached(*model.example(step=2))


@torch.no_grad()
def test_each_block_decides_for_itself() -> None:
    model = OneStream().eval()
    config = bw.CacheConfig(num_steps=8, threshold=0.05, reuse_interval=2, reuse="residual", granularity="block", indicator_tokens="all")
    cached = bw.transform(model, config, guard="graph")
    oracle = BlockOracle(model, list(model.blocks), config)
    for step in range(8):
        inputs = model.example(step=step)
        actual = cached(*inputs)
        expected, reused = oracle(*inputs)
        assert torch.equal(actual, expected)
        assert cached.report().contexts["default"].steps[-1].blocks_computed == tuple(not r for r in reused)
    assert str(cached.report()) == "default: 8 computed, 0 reused (8 of 24 block runs)  ##++#++#"
    record = cached.report().contexts["default"].steps[2]
    assert record.blocks_computed == (True, False, False)
    assert record.indicator == pytest.approx(float(record.change[0]))


@pytest.mark.parametrize("granularity", ["block", pytest.param("stack", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_step_is_one_graph(granularity: Any) -> None:
    model = OneStream(depth=2).eval()
    config = bw.CacheConfig(num_steps=6, threshold=math.inf, reuse_interval=1, reuse="residual", granularity=granularity)
    cached = bw.transform(model, config, guard="graph", example_args=model.example())
    compiled, parameters = torch.compile(cached.functional_step, fullgraph=True), cached.policy_parameters()
    state = reference = cached.init_state(model.example())
    for step in range(6):
        inputs = model.example(step=step)
        output, state = compiled(inputs, {}, state, parameters)
        expected, reference = cached.functional_step(inputs, {}, reference)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    compiled(model.example(), {}, cached.init_state(model.example()), cached.policy_parameters(threshold=0.0, num_steps=9))
    assert counters["stats"]["unique_graphs"] == 1
    assert sum(counters["graph_break"].values()) == 0


WAN, LATTE = ZOO["wan"], ZOO["latte"]
HUNYUAN = dataclasses.replace(
    ZOO["hunyuan_video"],
    config={**ZOO["hunyuan_video"].config, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    stacks={"transformer_blocks": 1, "single_transformer_blocks": 1},
)


@pytest.mark.zoo
@pytest.mark.parametrize("entry", [WAN, HUNYUAN, LATTE], ids=lambda entry: entry.model)
@torch.no_grad()
def test_whole_runs_eager_and_compiled(entry: Entry) -> None:
    """Wan lays its patch embedding out in another order than the arms were traced for; size asserts would notice."""
    assert inductor.size_asserts
    model = entry.make()
    config = bw.CacheConfig(num_steps=5, threshold=math.inf, reuse_interval=1, tail=0.0)
    host, graph = bw.transform(model, config), bw.transform(model, config, guard="graph", example_kwargs=entry.inputs(0))
    oracle = Oracle(model, [model.get_submodule(name) for name in entry.block_names()], entry.streams, config, entry.rows)
    compiled, parameters = torch.compile(graph.functional_step, fullgraph=True), graph.policy_parameters()
    eager_state = compiled_state = graph.init_state((), entry.inputs(0))
    for step in range(5):
        inputs = entry.inputs(step)
        expected = oracle(**inputs).sample
        scale = expected.abs().max().item()
        by_graph, eager_state = graph.functional_step((), inputs, eager_state)
        by_compiled, compiled_state = compiled((), inputs, compiled_state, parameters)
        assert torch.equal(by_graph.sample, host(**inputs).sample)
        torch.testing.assert_close(by_graph.sample, expected, rtol=0, atol=1e-6 * scale)
        # float32 sums in another order, over two to four blocks
        torch.testing.assert_close(by_compiled.sample, expected, rtol=0, atol=2e-5 * scale)
    assert str(host.report()).endswith("##.#.")
    assert counters["stats"]["unique_graphs"] == 1


def test_refusals() -> None:
    model = OneStream().eval()

    def complaint(kind: type[Exception], call: Any) -> str:
        with pytest.raises(kind) as error:
            call()
        return folded(str(error.value))

    def raised_inside(call: Any) -> str:
        """Return the error as Dynamo quotes it: under fullgraph every error that traced code raises becomes its own kind."""
        return folded(complaint(Unsupported, call).replace("\n", " ").split("raised exception ")[1].split("  For more")[0].strip())

    def compiled(cached: bw.CachedModel, inputs: tuple[Tensor, ...], parameters: Any) -> Any:
        state = cached.init_state(model.example())
        return lambda: torch.compile(cached.functional_step, fullgraph=True, backend="eager")(inputs, {}, state, parameters)

    config = bw.CacheConfig(num_steps=4)
    cached = bw.transform(model, config, guard="graph", example_args=model.example())
    texts = [
        complaint(bw.ConfigError, lambda: bw.transform(model, guard="device")),
        complaint(bw.ConfigError, lambda: bw.transform(model, bw.CacheConfig(granularity="block", reuse="residual"))),
        complaint(bw.ConfigError, lambda: bw.CacheConfig(granularity="block")),
        complaint(bw.ConfigError, lambda: bw.transform(model, bw.CacheConfig(decide="joint"), guard="graph")),
        complaint(bw.ConfigError, lambda: cached.configure(decide="joint")),
        complaint(bw.ConfigError, lambda: bw.CacheConfig(granularity="block", reuse="residual", indicator_blocks=2)),
        raised_inside(compiled(cached, model.example(), None)),
        raised_inside(compiled(cached, model.example(batch=2), cached.policy_parameters())),
    ]
    cached.prepare(model.example(batch=2))
    texts.append(raised_inside(compiled(cached, model.example(), cached.policy_parameters())))
    assert_expected_inline(
        "\n".join(texts),
        """\
guard must be one of 'host', 'graph', got 'device'.
granularity='block' requires guard='graph': each block is guarded inside the graph.
granularity='block' requires reuse='residual', got 'output': a reused output would discard what earlier blocks changed.
decide='joint' requires guard='host': a guard inside the graph sees one context only.
decide='joint' requires guard='host': a guard inside the graph sees one context only.
granularity='block' requires indicator_blocks="all", got 2.
ConfigError('inside torch.compile, pass parameters=cached.policy_parameters() to cached.functional_step: settings are
inputs of the graph.')
StateError('x is torch.float32[s33, 6, 4], but the program was captured for torch.float32[1, 6, 4].')
StateError("cached.functional_step inside torch.compile requires exactly one captured signature, and the model has 2:
transform the model with guard='graph' and example_args / example_kwargs, and call it with inputs of those shapes.")""",
    )
