"""Bundles of exported programs: torch runs them bit for bit as the model."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import bwcache_compile as bw
from bwcache_compile.bundle.runners.weights import read_weights
from bwcache_compile.bundle.session import Session
from bwcache_compile.exporters import check
from bwcache_compile.exporters.graphs import plain_graph
from bwcache_compile.exporters.torch import export as exporting
from bwcache_compile.exporters.torch import package as pt2
from bwcache_compile.exporters.weights import WeightFile
from bwcache_compile.ir.layout import memory_order
from tests.exporters.helpers import CONFIG, Exported, check_beside_torch, export_one_stream, opened
from tests.models import OneStream, TwoStream, noise


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_one_stream(tmp_path_factory.mktemp("exported") / "bundle", format="pt2")


@pytest.mark.parametrize("sizes", [(2, 6), (3, 6), (2, 11), (4, 40)])
def test_a_program_is_torch_bit_for_bit(exported: Exported, sizes: tuple[int, int]) -> None:
    """Exported at one size, run at four."""
    check_beside_torch(exported.cached, opened(exported.folder), sizes, tolerance=0)


def test_the_report_of_the_check(exported: Exported) -> None:
    report = dict(exported.manifest.self_check)
    assert report.pop("region_operators") > 10
    assert_expected_inline(
        "\n".join(f"{key}: {value}" for key, value in report.items()),
        """\
region_operators_in_reuse: 0
region_weights: 12
unmarked_operators: {'compute': 0, 'reuse': 0}
runs: ['pair']
sizes: [{'s13': 2, 's27': 6}, {'s13': 6, 's27': 18}]
steps: ##..#.
tolerance: 0.0
largest_error: 0.0""",
    )


def test_the_files(exported: Exported) -> None:
    """Weights are inputs of the programs and lie in one file once; nothing tells of the machine."""
    assert exported.manifest.weights is not None
    graphs, table = exported.manifest.graphs, exported.manifest.weights.tensors
    for kind, graph in graphs.items():
        program = torch.export.load(exported.folder / graph.file)
        assert program.state_dict == {}
        assert len(program.graph_signature.user_inputs) == len(graph.weights or ()) + len(graph.inputs)
        marks = [node.meta["custom"]["bwcache_region"] for node in program.graph.nodes if node.op == "call_function"]
        assert any(marks) == (kind == "compute")
        assert all(str(Path.cwd()).encode() not in (exported.folder / file).read_bytes() for file in exported.manifest.files)
    assert graphs["reuse"].weights == ("head.weight", "head.bias")
    assert set(graphs["compute"].weights or ()) == set(table) == {name for name, _ in exported.cached.named_parameters()}
    places = sorted((entry.offset, math.prod(entry.shape) * 4) for entry in table.values())
    assert all(offset + size <= following for (offset, size), (following, _) in itertools.pairwise(places))
    assert (exported.folder / "weights.bin").stat().st_size == sum(places[-1])


class Across(OneStream):
    """torch multiplies what lies across by other kernels where weights may have gradients, even under `no_grad`."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2).contiguous().transpose(1, 2), t)


@pytest.mark.parametrize("trains", [False, True])
def test_weights_that_may_have_gradients(trains: bool, tmp_path: Path) -> None:
    model = Across().eval().requires_grad_(trains)
    args = model.example(batch=2)
    cached = bw.transform(model, CONFIG, example_args=args)
    assert bw.export(cached, tmp_path / "bundle", format="pt2").self_check["largest_error"] == 0
    with torch.no_grad():
        assert torch.equal(opened(tmp_path / "bundle")(*args), model(*args))


def test_both_graphs_read_one_copy(exported: Exported) -> None:
    graphs: Any = opened(exported.folder)._runner._graphs  # type: ignore[attr-defined]
    (_, compute), (_, reuse) = graphs["compute"], graphs["reuse"]
    assert {tensor.data_ptr() for tensor in reuse} < {tensor.data_ptr() for tensor in compute}


def test_what_a_session_takes(exported: Exported) -> None:
    session = opened(exported.folder)
    x, t = noise("x", 0, 2, 6, 4), torch.ones(2)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    outputs = []
    for value in (x, x.numpy(), turned, x.tolist(), x.clone().requires_grad_()):
        session.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(session(value, t))
    assert all(torch.equal(output, outputs[0]) and not output.requires_grad for output in outputs)
    messages = []
    for args in ((x[0], t), (x.double(), t), (x, "now"), (x, [[1.0], [2.0, 3.0]]), (x,)):
        with pytest.raises(bw.StateError) as refusal:
            session(*args)
        messages.append(str(refusal.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
x must have shape [any, any, 4], got [6, 4].
x must have dtype float32, got float64.
t has unsupported type str; pass a tensor, a numpy array or an object with DLPack.
cannot convert t to float32: expected sequence of length 1 at dim 1 (got 2)
missing inputs: t. The bundle takes x, t.""",
    )


def test_no_other_runtime_is_needed(exported: Exported) -> None:
    """Nothing but torch is needed to open and run such a bundle."""
    code = (
        "import sys, torch, bwcache_compile as bw\n"
        f"session = bw.load({str(exported.folder)!r}, backend='torch', allow_code=True)\n"
        "for step in range(4):\n    session(torch.full((2, 6, 4), 0.5 + 0.01 * step), torch.full((2,), 1 - step / 8))\n"
        "print(session.report(), [name for name in ('onnx', 'onnxruntime', 'onnxscript') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(bw.__file__).parents[1])
    assert done.stdout.strip() == "default: 2 computed, 2 reused  ##.. []"
    assert done.stderr == ""


@pytest.mark.parametrize("config", [
    bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1)),
    bw.CacheConfig(num_steps=8, reuse="taylor"),
    bw.CacheConfig(num_steps=8, reuse="residual", indicator_tokens="all"),
], ids=["static", "taylor", "residual"])  # fmt: skip
def test_every_way_of_reuse(config: bw.CacheConfig, tmp_path: Path) -> None:
    model = (OneStream if config.reuse == "residual" else TwoStream)().eval()
    cached = bw.transform(model, config, example_args=model.example())
    report = bw.export(cached, tmp_path / "bundle", format="pt2").self_check
    assert report["steps"] == {"static": "#.#..", "schedule": "##..#."}[config.policy]
    assert report["largest_error"] == 0


def test_bfloat16_in_another_layout(tmp_path: Path) -> None:
    """The state and the weights come back lying as they did, and no runtime is short of a kernel."""
    model = OneStream().eval().to(torch.bfloat16)
    model.patch.weight.data = model.patch.weight.data.t().contiguous().t()
    x, t = (value.to(torch.bfloat16) for value in model.example(batch=2))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    cached = bw.transform(model, CONFIG, example_args=(turned, t))
    manifest = bw.export(cached, tmp_path / "bundle", format="pt2")
    assert manifest.self_check["largest_error"] == 0
    assert manifest.inputs[0].order == (0, 2, 1)
    assert manifest.weights is not None
    assert manifest.weights.tensors["patch.weight"].order == (1, 0)
    session = opened(tmp_path / "bundle")
    assert torch.equal(session(x, t), cached(turned, t))


class Turned(OneStream):
    """Turns pairs of channels by complex numbers that the caller passes."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous()) * turns
        return super().forward(torch.view_as_real(turned).flatten(-2), t)


def test_complex_inputs(tmp_path: Path) -> None:
    """As they are, or as pairs, which is how sessions of ONNX graphs take them too."""
    model = Turned(depth=2).eval()
    x, t, turns = *model.example(), torch.complex(noise("r", 0, 6, 2), noise("i", 0, 6, 2))
    cached = bw.transform(model, CONFIG, example_args=(x, t, turns))
    bw.export(cached, tmp_path / "bundle", format="pt2")
    session = opened(tmp_path / "bundle")
    outputs = []
    for given in (turns, turns.numpy(), torch.view_as_real(turns)):
        session.reset()
        outputs.append(session(x, t, given))
    with torch.no_grad():
        assert all(torch.equal(output, model(x, t, turns)) for output in outputs)


class Chosen(OneStream):
    """Looks at those tokens that a mask names, as many as there are."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        chosen = x[:, torch.nonzero(mask).flatten()]
        return super().forward(x + chosen.mean(1, keepdim=True), t)


def test_sizes_that_come_of_values(tmp_path: Path) -> None:
    model = Chosen(depth=2).eval()
    x, t = model.example()
    masks = [torch.arange(6) < count for count in (4, 1, 6)]
    cached = bw.transform(model, CONFIG, example_args=(x, t, masks[0]))
    bw.export(cached, tmp_path / "bundle", format="pt2")
    session = opened(tmp_path / "bundle")
    for mask in masks:
        session.reset()
        with torch.no_grad():
            assert torch.equal(session(x, t, mask), model(x, t, mask))


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(24).float()
    tensors = {
        "plain": base.view(4, 6),
        "turned": base.view(4, 6).t(),
        "gaps": base.view(4, 6)[:, ::2],
        "one": torch.tensor(3),
        "none": torch.empty(0, 3),
        "flags": base > 3,
        "complex": torch.complex(base, base),
        "half": base.bfloat16(),
        "last": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    with WeightFile(tmp_path / "weights.bin") as weights:
        assert [weights.add(name, tensor) for name, tensor in tensors.items()] == list(tensors)
        assert weights.add("plain", tensors["plain"]) == "plain"
        assert weights.add("plain", base) == "plain_"
        weights.add("same", base.clone())
    back = read_weights(tmp_path / "weights.bin", weights.described)
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0)
        assert memory_order(tensor) in (memory_order(back[name]), None)
    assert weights.described["same"].offset == weights.described["plain"].offset
    assert back["same"].data_ptr() == back["plain"].data_ptr()


def test_a_reuse_graph_with_a_block_is_refused(exported: Exported) -> None:
    """The check's own check: the compute graph in the place of the reuse graph."""
    plain = plain_graph(exported.cached.program, "compute")
    graph = pt2.torch_graph(plain)
    with pytest.raises(bw.ExportError, match=r"the reuse graph contains \S+, which belongs to \S+ of a cached block"):
        check.check_structure({"compute": plain, "reuse": plain}, {"compute": graph, "reuse": graph})


def test_files_that_compute_something_else_are_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One weight is off by its last bit."""

    def spoilt(bundle: Any) -> Session:
        session = real(bundle)
        (weight,) = [tensor for tensor in session._runner._graphs["reuse"][1] if tensor.shape == (4,)]  # type: ignore[attr-defined]
        weight.data[0] = torch.nextafter(weight[0], torch.tensor(9.0))
        return session

    real = exporting.torch_session
    monkeypatch.setattr(exporting, "torch_session", spoilt)
    with pytest.raises(
        bw.ExportError, match=r"step 0: the output output of the exported graphs differs from torch by \S+, relative to its"
    ):
        bw.export(exported.cached, tmp_path / "bundle", format="pt2")
    assert list(tmp_path.iterdir()) == []
