"""assert_cached: ours have a cache, a plain export has none, whoever wrote it.

That an export of diffusers' FirstBlockCache has none is in docs/testing.md, whose blocks are run by tests/test_docs.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import bwcache_compile as bw
from bwcache_compile.testing import assert_cached
from tests.exporters.helpers import Exported
from tests.models import OneStream

ONE = torch.zeros(1, dtype=torch.int64)


def lost(graph: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as error:
        assert_cached(graph, **options)
    return str(error.value)


def test_bundles_have_their_cache(exported: Exported, tmp_path: Path) -> None:
    assert_cached(exported.folder)
    assert_cached(str(exported.folder / "guarded.onnx"))
    assert_cached(onnx.load(exported.folder / "guarded.onnx"))
    assert_cached((exported.folder / "compute.onnx", exported.folder / "reuse.onnx"))
    bw.export(exported.cached, tmp_path / "pt2", format="pt2")
    assert_cached(tmp_path / "pt2")


def test_half_a_pair_is_no_cache(exported: Exported) -> None:
    assert_expected_inline(
        lost(exported.folder / "compute.onnx"),
        """\
compute.onnx has lost the cache.
  Looked for: an `If` or `cond` whose condition depends on the state.
  Found: the state cache_in.reference_0, cache_in.reference_1, cache_in.reference_2, cache_in.trigger, and no decisions.
  Found: 9 matrix products, convolutions and attentions, which run at every step.
  If this is one of a pair of graphs, pass both: assert_cached((compute, reuse)).""",
    )
    twice = (exported.folder / "compute.onnx", exported.folder / "compute.onnx")
    assert_expected_inline(
        lost(twice),
        """\
the pair has lost the cache.
  Looked for: a reuse graph with fewer matrix products, convolutions and attentions than the compute graph.
  Found: 9 in compute.onnx, 9 in compute.onnx.""",
    )
    assert "reuse.onnx takes x float32" in lost((exported.folder / "reuse.onnx", exported.folder / "reuse.onnx"))


def edited(exported: Exported, tmp_path: Path, change: Any) -> onnx.ModelProto:
    model = onnx.load(exported.folder / "guarded.onnx", load_external_data=False)
    change(model.graph)
    return model


def branches(graph: Any) -> dict[str, Any]:
    (guard,) = [node for node in graph.node if node.op_type == "If"]
    return {attribute.name: attribute.g for attribute in guard.attribute}


def test_a_guard_that_lost_something_is_seen(exported: Exported, tmp_path: Path) -> None:
    def always(graph: Any) -> None:
        within = next(node for node in graph.node if node.op_type == "LessOrEqual")
        within.input[1] = within.input[0]

    def same_arms(graph: Any) -> None:
        arms = branches(graph)
        arms["then_branch"].CopyFrom(arms["else_branch"])

    def drop_state(graph: Any) -> None:
        kept = [value for value in graph.output if not value.name.startswith("cache_out.")]
        del graph.output[:]
        graph.output.extend(kept)

    assert "none of which depends on it" in lost(edited(exported, tmp_path, always))
    message = lost(edited(exported, tmp_path, same_arms))
    assert "Looked for: a branch that reads the state and runs less" in message
    assert "guard: 9 and 9" in message
    assert "Looked for: an input that holds what an earlier step computed" in lost(edited(exported, tmp_path, drop_state))


def test_a_plain_export_has_none() -> None:
    model = OneStream().eval()
    assert_expected_inline(
        lost(torch.export.export(model, model.example())),
        """\
the exported graph has lost the cache.
  Looked for: an input that holds what an earlier step computed, and an output with its next value: named alike (`cache_in.x` and\
 `cache_out.x`, `past_x` and `present_x`, `x` and `next_x`), a buffer that is written, or named by state={input: output}.
  Found: the exported graph takes x float32[1, 6, 4], t float32[1], and returns output float32[1, 6, 4].
  Found: 9 matrix products, convolutions and attentions, which run at every step.""",
    )


class Own(nn.Module):
    """A cache that its author wrote into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def decide(self, reuses: Tensor, x: Tensor, cache: Tensor) -> Tensor:
        def compute(x: Tensor, cache: Tensor) -> Tensor:
            return self.blocks(x)

        def reuse(x: Tensor, cache: Tensor) -> Tensor:
            return cache.clone()

        return torch.cond(reuses, reuse, compute, (x, cache))

    def forward(self, x: Tensor, cache: Tensor, until: Tensor, step: Tensor) -> dict[str, Tensor]:
        hidden = self.decide((step <= until).reshape(()), x, cache)
        return {"out": hidden + x, "new_cache": hidden.clone(), "new_until": torch.where(step <= until, until, step + 1)}


class Unnamed(Own):
    def forward(self, x: Tensor, cache: Tensor, until: Tensor, step: Tensor) -> Any:
        return tuple(super().forward(x, cache, until, step).values())


class InBuffers(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 4))
        self.register_buffer("until", ONE.clone())

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        hidden = self.decide((step <= self.until).reshape(()), x, self.cache)
        self.cache.copy_(hidden)
        self.until.copy_(torch.where(step <= self.until, self.until, step + 1))
        return hidden + x


class NeverReads(Own):
    """Keeps a state and decides by it, but its branches both compute."""

    def decide(self, reuses: Tensor, x: Tensor, cache: Tensor) -> Tensor:
        return torch.cond(reuses, lambda x, cache: self.blocks(x) + 0 * cache, lambda x, cache: self.blocks(x), (x, cache))


@torch.no_grad()
def program(model: nn.Module, *args: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), args)


def test_caches_of_others_in_exported_programs() -> None:
    args = (torch.randn(2, 4), torch.zeros(2, 4), ONE, ONE + 1)
    assert_cached(program(Own(), *args))
    assert_cached(program(InBuffers(), args[0], ONE + 1))
    unnamed = program(Unnamed(), *args)
    assert "returns output_0 float32[2, 4], output_1 float32[2, 4], output_2 int64[1]" in lost(unnamed)
    assert_cached(unnamed, state={"cache": "output_1", "until": "output_2"})
    assert "cond: 3 and 3" in lost(program(NeverReads(), *args))
    with pytest.raises(bw.ConfigError, match="state: 'kept' is not among the inputs x, cache, until, step"):
        assert_cached(unnamed, state={"kept": "output_1"})


def test_what_is_no_export_is_refused(tmp_path: Path, exported: Exported) -> None:
    messages, program = [], tmp_path / "program.pt2"
    program.touch()
    for wrong in (3, tmp_path, tmp_path / "no.onnx", tmp_path / "no", program, (1, 2, 3)):
        with pytest.raises(bw.ConfigError) as error:
            assert_cached(wrong)
        messages.append(str(error.value).replace(str(tmp_path), "..."))
    assert_expected_inline(
        "\n".join(messages),
        """\
assert_cached expects a bundle's folder, an .onnx file, an ONNX model, what torch.export.export or torch.onnx.export returned, or a\
 pair (compute, reuse) of them, got int.
... is not a bundle: it has no manifest.json. Pass the .onnx file, or a pair (compute, reuse) of them.
.../no.onnx does not exist.
.../no does not exist.
assert_cached reads folders of bundles and .onnx files, got .../program.pt2. Open a .pt2 file with torch.export.load, which may\
 run code of it, and pass the result.
a pair (compute, reuse) must have two graphs, got 3.""",
    )
