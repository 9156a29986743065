"""Under torch.compile: two graphs per signature, none more for anything that a service changes, and errors no larger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bwcache_compile as bw
from bwcache_compile.runtime.maker import MAX_SIBLINGS
from tests.models import OddMiddle, OneStream, Tiny, TwoStream, noise
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def generation(module: Any, cached: bw.CachedModel, model: OneStream, steps: int, name: str) -> str:
    for step in range(steps):
        with cached.cache_context(name):
            module(*model.example(step=step))
    return "".join("#" if record.computed else "." for record in cached.report().contexts[name].steps)


def test_two_graphs_and_never_another() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, bw.CacheConfig(num_steps=6, threshold=float("inf"), reuse_interval=1, tail=0.0))
    compiled = torch.compile(cached)
    assert generation(compiled, cached, model, 6, "cond") == "##.#.#"
    assert graphs() == 2
    generation(compiled, cached, model, 6, "cond")
    assert graphs() == 2, "a second generation"
    generation(compiled, cached, model, 6, "uncond")
    assert graphs() == 2, "a second context of the same shape"
    cached.configure(threshold=1e-9)
    with pytest.warns(bw.CacheWarning, match="no step of context 'cond' was reused"):
        assert generation(compiled, cached, model, 6, "cond") == "######"
    assert graphs() == 2, "a changed threshold"
    cached.configure(threshold=float("inf"))
    cached.reset(num_steps=8)
    assert generation(compiled, cached, model, 8, "cond") == "##.#.#.#"
    assert graphs() == 2, "a changed number of steps"
    with torch.no_grad():
        for step in range(3):
            compiled(*model.example(batch=2, step=step))
    assert graphs() == 4, "a second signature has two of its own"


def test_another_plan_compiles_nothing() -> None:
    """A mask, a table of weights and a rule are inputs of the graphs."""
    model, mask = OneStream().eval(), (0, 0, 0, 1, 1, 0)
    cached = bw.transform(model, policy="static", steps_mask=mask, reuse="linear", anchors=3, cut="output")
    compiled = torch.compile(cached)
    assert generation(compiled, cached, model, 6, "cond") == "###..#"
    assert graphs() == 2
    row, other = (1.5, -0.75, 0.25), (0, 0, 1, 0, 0, 1)
    cached.configure(weights=[row if reuses else None for reuses in mask])
    generation(compiled, cached, model, 6, "cond")
    cached.configure(steps_mask=other, weights=[(0.5, 0.5, 0.0) if s == 2 else row if reuses else None for s, reuses in enumerate(other)])
    assert generation(compiled, cached, model, 6, "cond") == "##.##."
    cached.configure(weights=None, order=2, damping=0.4)
    generation(compiled, cached, model, 6, "cond")
    assert graphs() == 2


def test_settings_that_come_back_make_and_compile_nothing() -> None:
    """Those of another policy or way of reusing have other graphs; the last few of each capture are kept."""
    model = OneStream().eval()
    settings: list[dict[str, Any]] = [
        {"policy": "static", "steps_mask": (0, 0, 1, 0), "reuse": "output"},
        {"policy": "static", "steps_mask": (0, 0, 1, 0), "reuse": "taylor"},
    ]
    cached = bw.transform(model, settings[0])
    compiled, programs = torch.compile(cached), []
    for turn in range(6):
        cached.configure(settings[turn % 2])
        generation(compiled, cached, model, 4, "cond")
        programs.append(cached.program)
        assert graphs() == (2 if turn == 0 else 4)
    assert programs == [programs[0], programs[1]] * 3
    assert programs[0] is not programs[1]
    for length in range(5, 5 + MAX_SIBLINGS):
        cached.configure(steps_mask=(0,) * length)
    cached.configure(settings[0])
    assert cached.program is not programs[0], "after many others they are made anew"


@pytest.mark.parametrize("reuse", ["output", "residual", "taylor"])
def test_each_graph_compiles_whole(reuse: Any) -> None:
    model = TwoStream().eval()
    if reuse == "residual":
        model = OneStream().eval()
    config = bw.CacheConfig(policy="static", steps_mask=(0, 0, 1, 0, 1), reuse=reuse)
    eager, cached = bw.transform(model, config), bw.transform(model, config)
    cached.compile(fullgraph=True)
    cached.warm_up(model.example())
    assert graphs() == 2
    assert sum(counters["graph_break"].values()) == 0
    with torch.no_grad():
        for step in range(5):
            inputs = model.example(step=step)
            torch.testing.assert_close(cached(*inputs), eager(*inputs), rtol=1e-5, atol=1e-5)
    assert graphs() == 2, "warm-up compiled everything"


@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks", "torch.compile"])
def test_blocks_that_are_alike_are_compiled_once(how: str) -> None:
    generated = []
    for depth in (2, 5):
        model = OneStream(depth=depth).eval()
        cached = bw.transform(model, policy="static", steps_mask=(0, 0, 1), example_args=model.example())
        compiled: Any = torch.compile(cached) if how == "torch.compile" else cached
        if compiled is cached:
            getattr(cached, how)()
        metrics.reset()
        torch.compiler.reset()
        with fresh_cache(), torch.no_grad():
            compiled(*model.example())
        generated.append(metrics.generated_kernel_count)
    assert generated[0] == generated[1] > 0


def test_the_blocks_alone_are_compiled() -> None:
    """diffusers' method of that name, on a drop-in: at every size, and no graph for what is around the blocks or for a reused step."""
    model = OneStream(depth=4).eval()
    config = bw.CacheConfig(policy="static", steps_mask=(0, 0, 1))
    eager, cached = (bw.transform(model, config, dynamic_shapes="auto") for _ in range(2))
    cached.compile_repeated_blocks(fullgraph=True)
    for batch, tokens in ((2, 6), (3, 9)):
        for step in range(3):
            x, t = noise("x", step, batch, tokens, 4), torch.full((batch,), 1 - step / 8)
            with torch.no_grad():
                torch.testing.assert_close(cached(x, t), eager(x, t), rtol=1e-5, atol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize(("model", "kinds"), [(OneStream(), 1), (TwoStream(), 2), (OddMiddle(), 2)], ids=lambda value: type(value).__name__)
def test_each_kind_of_block_is_compiled(model: Tiny, kinds: int) -> None:
    """One that is like no other too."""
    config = bw.CacheConfig(policy="adaptive", num_steps=4, threshold=1e9)
    eager, cached = bw.transform(model.eval(), config), bw.transform(model, config)
    cached.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    for step in range(4):
        with torch.no_grad():
            torch.testing.assert_close(cached(*model.example(step=step)), eager(*model.example(step=step)), rtol=1e-5, atol=1e-5)
    assert cached.report().contexts["default"].reused > 0
    assert graphs() == kinds


class FlexBlock(nn.Module):
    """Attends with a function of the user's, as blocks with sparse attention do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x * temb).chunk(3, -1))
        near = create_block_mask(lambda b, h, i, j: (i - j).abs() < 3, None, None, x.shape[1], x.shape[1], device=x.device)
        return x + self.out(flex_attention(q, k, v, block_mask=near).squeeze(1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_traced() -> None:
    model = OneStream(width=16)
    model.blocks = nn.ModuleList(FlexBlock(16) for _ in range(3))
    config = bw.CacheConfig(policy="static", steps_mask=(0, 0, 1))
    eager, cached = bw.transform(model.eval(), config), bw.transform(model, config)
    cached.compile(backend="aot_eager", fullgraph=True)
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(cached(*model.example(step=step)), eager(*model.example(step=step)), rtol=1e-5, atol=1e-5)


def test_what_compile_repeated_blocks_refuses() -> None:
    cached = bw.transform(OneStream().eval(), guard="graph", num_steps=3)
    with pytest.raises(bw.ConfigError, match=r'compile_repeated_blocks needs guard="host"'):
        cached.compile_repeated_blocks()
    cached = bw.transform(OneStream().eval(), num_steps=3)
    with pytest.raises(bw.ConfigError, match="compile_repeated_blocks does not replay CUDA graphs"):
        cached.compile_repeated_blocks(mode="reduce-overhead")


def test_the_compiled_error_is_the_plainly_compiled_models_own() -> None:
    """Wan's rotary embedding writes in place, which the compiler makes functional: held against eager and plain."""
    entry = ZOO["wan"]
    model: nn.Module = entry.make()
    cached = bw.transform(model, bw.CacheConfig(num_steps=3, threshold=0))
    compiled, plain = torch.compile(cached), torch.compile(entry.make())
    with torch.no_grad():
        for step in range(3):
            inputs = entry.inputs(step)
            expected = model(**inputs).sample
            scale = expected.abs().max()
            own = (plain(**inputs).sample - expected).abs().max() / scale
            ours = (compiled(**inputs).sample - expected).abs().max() / scale
            # both reorder float32 sums; twice the plain error, and a floor of a few units in the last place
            assert ours <= 2 * own + 2e-6, f"step {step}: {ours:.2e} against {own:.2e}"


def test_a_program_of_open_sizes_has_two_graphs_for_every_size() -> None:
    model = OneStream().eval()
    config = bw.CacheConfig(policy="static", steps_mask=(0, 1, 0))
    cached, eager = (bw.transform(model, config, dynamic_shapes="auto") for _ in range(2))
    compiled = torch.compile(cached)
    for batch, tokens in ((2, 6), (2, 9), (3, 7), (5, 16), (2, 6)):
        for step in range(3):
            x, t = noise("x", step, batch, tokens, 4), torch.full((batch,), 1 - step / 8)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, t), eager(x, t), rtol=1e-5, atol=1e-5)
            assert not any("dynamic" in name for name in vars(x)), "the caller's tensor keeps no trace of it"
        assert graphs() == 2, (batch, tokens)
    assert cached.report().captures == 1
