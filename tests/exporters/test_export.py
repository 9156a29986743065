"""A bundle of a tiny model: names, weights, the check of itself, and the session beside torch at several sizes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.exporters import check
from bwcache_compile.exporters.describe import declared_shapes
from bwcache_compile.exporters.graphs import plain_graph
from tests.exporters.helpers import CONFIG, Exported
from tests.models import OneStream, TwoStream, noise


def pattern(model: Any) -> str:
    return str(model.report()).splitlines()[0].split()[-1]


def test_names(deployed: Exported) -> None:
    graphs = deployed.manifest.graphs
    shown = "\n".join(f"{kind}\n  {' '.join(graph.inputs)}\n  {' '.join(graph.outputs)}" for kind, graph in graphs.items())
    shown = "\n".join(line for text in shown.splitlines() for line in textwrap.wrap(text, 130, subsequent_indent="    "))
    assert_expected_inline(
        shown,
        """\
compute
  x t cache_in.reference_0 cache_in.reference_1 cache_in.reference_2 cache_in.trigger policy.threshold policy.interval
    policy.tail_numerator policy.tail_denominator policy.warmup policy.num_steps step
  output cache_out.output_0 cache_out.reference_0 cache_out.reference_1 cache_out.reference_2 cache_out.trigger reuse_left
    indicator
reuse
  x t cache_in.output_0 step
  output
guarded
  x t cache_in.output_0 cache_in.reference_0 cache_in.reference_1 cache_in.reference_2 cache_in.trigger cache_in.reuse_until
    policy.threshold policy.interval policy.tail_numerator policy.tail_denominator policy.warmup policy.num_steps step
  output cache_out.output_0 cache_out.reference_0 cache_out.reference_1 cache_out.reference_2 cache_out.trigger
    cache_out.reuse_until indicator""",
    )
    for graph in graphs.values():
        model = onnx.load(deployed.folder / graph.file)
        assert [value.name for value in model.graph.input] == list(graph.inputs)
        assert [value.name for value in model.graph.output] == list(graph.outputs)


def test_slots_are_functions_of_the_inputs(deployed: Exported) -> None:
    shown = {slot.name: list(slot.shape) for slot in deployed.manifest.slots}
    shown |= {entry.name: list(entry.shape) for entry in deployed.manifest.inputs}
    assert_expected_inline(
        "\n".join(f"{name}: {shape}" for name, shape in shown.items()),
        """\
output_0: ['s13', 's27', 32]
reference_0: ['max(1, (s13*s27) // 32)', 32]
reference_1: ['max(1, (s13*s27) // 32)', 32]
reference_2: ['max(1, (s13*s27) // 32)', 32]
trigger: [1]
x: ['s13', 's27', 4]
t: ['s13']""",
    )


def test_weights_are_stored_once_and_nothing_tells_of_the_machine(deployed: Exported) -> None:
    places: dict[str, set[tuple[int, int]]] = {}
    for graph in deployed.manifest.graphs.values():
        model = onnx.load(deployed.folder / graph.file, load_external_data=False)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                assert entries["location"] == "weights.bin"
                places.setdefault(tensor.name, set()).add((int(entries["offset"]), int(entries["length"])))
        text = model.SerializeToString()
        assert str(Path.cwd()).encode() not in text
        assert b"stack_trace" not in text
        assert not [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in places]
    assert "blocks.0.up.weight.T" in places
    assert all(len(found) == 1 for found in places.values())
    unique = {place for found in places.values() for place in found}
    assert (deployed.folder / "weights.bin").stat().st_size == max(offset + length for offset, length in unique)


def test_guarded_has_one_if_and_no_weights_inside(deployed: Exported) -> None:
    graph = onnx.load(deployed.folder / "guarded.onnx", load_external_data=False).graph
    (guard,) = [node for node in graph.node if node.op_type == "If"]
    arms = {attribute.name: attribute.g for attribute in guard.attribute}
    assert all(not arm.initializer for arm in arms.values())
    assert len(arms["then_branch"].node) < len(arms["else_branch"].node) / 3


def test_the_report_of_the_check(deployed: Exported) -> None:
    report = dict(deployed.manifest.self_check)
    assert report.pop("largest_error") < 1e-5
    assert report.pop("region_operators") > 10
    del report["unmarked_operators"]
    assert_expected_inline(
        "\n".join(f"{key}: {value}" for key, value in report.items()),
        """\
region_operators_in_reuse: 0
region_weights: 12
runs: ['pair', 'guarded']
sizes: [{'s13': 2, 's27': 6}, {'s13': 6, 's27': 18}]
steps: ##..#.
tolerance: 0.0001""",
    )


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("sizes", [(2, 6), (3, 6), (2, 11), (4, 40)])
def test_the_session_is_torch(deployed: Exported, guarded: bool, sizes: tuple[int, int]) -> None:
    """Exported at one size, run at four; two contexts in turn."""
    batch, tokens = sizes
    session = bw.load(deployed.folder, guarded=guarded)
    deployed.cached.reset()
    for step in range(8):
        for name in ("cond", "uncond"):
            x, t = noise(f"x{name}", step, batch, tokens, 4), torch.full((batch,), 1 - step / 8)
            with torch.no_grad(), deployed.cached.cache_context(name), session.cache_context(name):
                expected, actual = deployed.cached(x, t), session(x.numpy(), t=t)
            np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert str(session.report()) == str(deployed.cached.report())
    for name, context in session.report().contexts.items():
        for ours, theirs in zip(context.steps, deployed.cached.report().contexts[name].steps, strict=True):
            assert (ours.step, ours.computed, ours.gap) == (theirs.step, theirs.computed, theirs.gap)
            if theirs.indicator is None:
                assert ours.indicator is None
            else:
                assert ours.indicator == pytest.approx(theirs.indicator, rel=1e-3)


def test_settings_generations_and_sizes(deployed: Exported) -> None:
    session = bw.load(deployed.folder)

    def run(steps: int, tokens: int = 6) -> str:
        for step in range(steps):
            session(noise("x", step, 2, tokens, 4).numpy(), np.full(2, 1 - step / 8, dtype=np.float32))
        return pattern(session)

    assert run(8) == "##..#..#"
    assert run(3) == "##."
    assert run(2, tokens=9) == "##"
    assert session.report().warnings == ("default: the inputs changed before step 3: a new generation began",)
    session.reset(num_steps=4)
    session.configure(threshold=0.0)
    assert run(4) == "####"


def test_what_does_not_fit_is_refused(deployed: Exported) -> None:
    session = bw.load(deployed.folder)
    x, t = np.zeros((2, 6, 4), dtype=np.float32), np.zeros(2, dtype=np.float32)
    messages = []
    for args in ((x[0], t), (x.astype(np.float64), t), (x, np.zeros(3, dtype=np.float32)), (x, "now"), (x,), (x, t, t)):
        with pytest.raises(bw.StateError) as refusal:
            session(*args)
        messages.append(str(refusal.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
x must have shape [any, any, 4], got [6, 4].
x must have dtype float32, got float64.
t must have shape [x.shape[0]], here [2], got [3].
t has unsupported type str; pass a numpy array, an OrtValue or an object with DLPack.
missing inputs: t. The bundle takes x, t.
got 3 positional arguments, but the model takes 2: x, t.""",
    )
    with pytest.raises(bw.ConfigError) as config:
        session.configure(reuse="residual")
    assert_expected_inline(
        str(config.value),
        """\
the graphs depend on reuse, which cannot be changed now. Transform the model again, or export it again.
  Can be changed: calibrated_for, calls_per_step, damping, decide, indicator_bounds, num_steps, order, reuse_fraction, reuse_interval,\
 steps_mask, tail, threshold, timesteps, warmup_steps, weights.""",
    )


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "diffusers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

sys.meta_path.insert(0, Refuse())
import numpy as np
import bwcache_compile as bw

session = bw.load(sys.argv[1], guarded=sys.argv[2] == "guarded")
for step in range(8):
    out = session(np.full((2, 6, 4), 0.5 + 0.01 * step, dtype=np.float32), np.full(2, 1 - step / 8, dtype=np.float32))
print(session.report(), float(out.sum()))
try:
    bw.transform
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["pair", "guarded"])
def test_a_process_without_torch(deployed: Exported, kind: str) -> None:
    deployed.cached.reset()
    for step in range(8):
        with torch.no_grad():
            out = deployed.cached(torch.full((2, 6, 4), 0.5 + 0.01 * step), torch.full((2,), 1 - step / 8))
    command = [sys.executable, "-c", WITHOUT_TORCH, str(deployed.folder), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(bw.__file__).parents[1])
    report, refusal = done.stdout.splitlines()
    assert report.startswith("default: 4 computed, 4 reused  ##..#..# ")
    assert float(report.split()[-1]) == pytest.approx(out.sum().item(), rel=1e-4)
    assert refusal == 'bwcache_compile.transform needs torch: pip install "bwcache-compile[torch]".'


@pytest.mark.parametrize("config", [
    bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1)),
    pytest.param(bw.CacheConfig(num_steps=8, reuse="taylor"), marks=pytest.mark.slow),
    bw.CacheConfig(num_steps=8, reuse="residual", indicator_tokens="all"),
], ids=["static", "taylor", "residual"])  # fmt: skip
def test_every_way_of_reuse(config: bw.CacheConfig, tmp_path: Path) -> None:
    model = (OneStream if config.reuse == "residual" else TwoStream)().eval()
    cached = bw.transform(model, config, example_args=model.example())
    report = bw.export(cached, tmp_path / "bundle", guarded=True).self_check
    assert report["steps"] == {"static": "#.#..", "schedule": "##..#."}[config.policy]
    assert report["largest_error"] < 1e-4


def test_a_reuse_graph_with_a_block_is_refused(deployed: Exported) -> None:
    """The check's own check: the compute graph in the place of the reuse graph."""
    from bwcache_compile.exporters.onnx import lower as writer

    program = deployed.cached.program
    plain = plain_graph(program, "compute")
    written = writer.onnx_graph(plain, 20, declared_shapes(deployed.manifest))
    with pytest.raises(bw.ExportError, match=r"the reuse graph contains \S+, which belongs to \S+ of a cached block"):
        check.check_structure({"compute": plain, "reuse": plain}, {"compute": written, "reuse": written})
    unmarked = dataclasses.replace(written, region={})
    with pytest.raises(bw.ExportError, match="the exporter dropped the marks"):
        check.check_structure({"compute": plain, "reuse": plain}, {"compute": unmarked, "reuse": unmarked})
    with pytest.raises(bw.ExportError, match="which only the cached blocks read"):
        check.check_structure({"compute": plain, "reuse": plain}, {"compute": written, "reuse": unmarked})


class Awkward(OneStream):
    """What exporters and runtimes get wrong: a tiny addend, a choice between flags, a squeeze of a dimension that is not 1."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = super().forward(x, t)
        nothing = torch.relu(out - 1000).sum(-1, keepdim=True)
        positive = (out > 0).masked_fill(out > 1, False)
        return out.squeeze(1) * positive + nothing / (nothing + 1e-15)


def test_what_exporters_get_wrong(tmp_path: Path) -> None:
    model = Awkward().eval()
    cached = bw.transform(model, CONFIG, example_args=model.example())
    assert bw.export(cached, tmp_path / "bundle", guarded=True).self_check["largest_error"] < 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "bundle" / "compute.onnx").graph.node}
    assert "Squeeze" not in {node.op_type for node in onnx.load(tmp_path / "bundle" / "reuse.onnx").graph.node}
    assert {"Div", "Or"} <= operators
