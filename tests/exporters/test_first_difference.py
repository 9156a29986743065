"""Where a refused export first differs from torch: a table in the message, and the operator as a file."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import pytest
import torch
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.exporters.check import TorchRun
from bwcache_compile.exporters.onnx import first_difference
from bwcache_compile.exporters.onnx.first_difference import Comparison, explain_difference
from tests.exporters.helpers import CONFIG, Exported
from tests.models import OneStream

op: Any = onnxscript.opset20
Translate = Callable[[Any, Callable[..., Any]], None]


@pytest.fixture
def translate(monkeypatch: pytest.MonkeyPatch) -> Translate:
    """Translate an operator to ONNX in another way."""
    export = torch.onnx.export

    def change(target: Any, translation: Callable[..., Any]) -> None:
        def changed(*args: Any, custom_translation_table: Any, **options: Any) -> Any:
            return export(*args, custom_translation_table={**custom_translation_table, target: translation}, **options)

        monkeypatch.setattr(torch.onnx, "export", changed)

    return change


def steep(x: Any, approximate: str = "none") -> Any:
    return op.Gelu(op.Mul(x, op.Constant(value_float=1.5)))


def made() -> bw.CachedModel:
    return bw.transform(OneStream().eval(), CONFIG, example_args=OneStream().example())


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(bw.ExportError) as error:
        bw.export(made(), folder / "bundle", **options)
    return re.sub(r"(?<=  )0\.\d+(?=  )", lambda match: "#" * len(match.group()), str(error.value)).replace(str(folder), "...")


def test_a_wrong_translation_is_named(translate: Translate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    translate(torch.ops.aten.gelu.default, steep)
    message = refusal(tmp_path, repro=tmp_path / "repro")
    assert message.startswith("step 0: the output output of the exported graphs differs from torch by ")
    assert_expected_inline(
        re.sub("#+ +", "# ", "\n".join(line for line in message.splitlines()[1:])),
        """\
  Operators of the compute graph that differ first, on torch's inputs and cache of this step:
    module         operator                 in the file                  result        error
    blocks.0       gelu (gelu)              blocks.0/node_gelu           f32[1, 6, 8]  # its inputs agree
    blocks.0.down  linear (linear_3)        blocks.0.down/node_linear_3  f32[1, 6, 8]  # its inputs differ
    blocks.0       add (add)                blocks.0/node_add            f32[1, 6, 8]  # its inputs differ
    -              reshape (rows_0)         node_view_1                  f32[6, 8]     # its inputs differ
    -              index_select (sample_0)  node_index_select            f32[1, 8]     # its inputs differ
    blocks.1       mul (mul_1)              blocks.1/node_mul_1          f32[1, 6, 8]  # its inputs differ
    blocks.1.up    linear (linear_4)        blocks.1.up/node_linear_4    f32[1, 6, 8]  # its inputs differ
    blocks.1       gelu (gelu_1)            blocks.1/node_gelu_1         f32[1, 6, 8]  # its inputs differ
  .../repro holds the first of them, with its inputs: python .../repro/repro.py""",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["repro"], "no bundle is left"
    model = onnx.load(tmp_path / "repro" / "operator.onnx")
    assert [node.op_type for node in model.graph.node] == ["Mul", "Gelu"]
    script = runpy.run_path(str(tmp_path / "repro" / "repro.py"))
    (given,) = script["inputs"].values()
    torch.testing.assert_close(torch.from_numpy(script["expected"]), torch.nn.functional.gelu(torch.from_numpy(given)))
    assert re.fullmatch(r"largest difference 0\.\d+, of values up to \d\.\d+\n", capsys.readouterr().out)


def test_a_large_graph_is_bisected(translate: Translate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To an operator with weights, which its file holds."""

    def without_bias(x: Any, weight: Any, bias: Any = None) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    translate(torch.ops.aten.linear.default, without_bias)
    monkeypatch.setattr(first_difference, "_BYTES", 4 * 6 * 8 * 4)  # four hidden states
    message = refusal(tmp_path, repro=tmp_path / "repro")
    first, *others = message.splitlines()[3:-1]
    assert re.match(r"    patch +linear \(linear\) .* its inputs agree$", first)
    assert len(others) < 4
    script = runpy.run_path(str(tmp_path / "repro" / "repro.py"))
    bias = script["expected"] - script["actual"]
    torch.testing.assert_close(torch.from_numpy(bias), OneStream().patch.bias.detach().expand(1, 6, 8))


def compared(exported: Exported) -> Comparison:
    program = exported.cached.program
    run = TorchRun(program, CONFIG, 8, program.signature.captured_sizes)
    run.step(0, [value.clone() for value in OneStream().example(2)])
    kind, values = run.last
    names = {"blocks.0/node_gelu": "gelu"}
    return Comparison(program, kind, open_bundle(exported.folder), names, values, lambda tensor: tensor.numpy(), None, 1e-4)


def test_where_nothing_differs_it_says_so(deployed: Exported) -> None:
    before = sorted(path.name for path in deployed.folder.iterdir())
    right = compared(deployed)
    assert right.first() == []
    assert "no operator of the compute graph differs" in explain_difference(right)
    assert sorted(path.name for path in deployed.folder.iterdir()) == before, "what is written to probe is removed"


def test_a_failure_to_explain_does_not_hide_the_refusal(deployed: Exported) -> None:
    broken = compared(deployed)
    broken.values = {}
    assert explain_difference(broken).startswith("\n  Its operators could not be compared: ")


def test_where_a_repro_may_go(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    messages = []
    for options in ({"format": "pt2", "repro": tmp_path / "new"}, {"repro": tmp_path}, {"repro": tmp_path / "notes"}):
        with pytest.raises(bw.ConfigError) as error:
            bw.export(made(), tmp_path / "bundle", **options)  # type: ignore[arg-type]
        messages.append(str(error.value).replace(str(tmp_path), "..."))
    assert_expected_inline(
        "\n".join(messages),
        """\
repro requires format="onnx", got 'pt2'.
repro must be a new or empty folder, but ... is a file or holds files.
repro must be a new or empty folder, but .../notes is a file or holds files.""",
    )
