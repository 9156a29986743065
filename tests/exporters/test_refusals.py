"""What an export cannot carry: it is refused by name before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import bwcache_compile as bw
from tests.exporters.helpers import CONFIG
from tests.models import OneStream


@pytest.fixture(scope="module")
def cached() -> bw.CachedModel:
    model = OneStream(depth=2).eval()
    return bw.transform(model, CONFIG, example_args=model.example())


def refused(folder: Path, *exports: Callable[[Path], Any]) -> str:
    """Return why each export is refused; nothing may be written."""
    before, messages = sorted(folder.rglob("*")), []
    for export in exports:
        with pytest.raises((bw.ConfigError, bw.ExportError)) as refusal:
            export(folder / "bundle")
        messages.append(f"{type(refusal.value).__name__}: {str(refusal.value).replace(str(folder), '...')}")
        assert sorted(folder.rglob("*")) == before
    return "\n".join(messages)


def test_settings(cached: bw.CachedModel, tmp_path: Path) -> None:
    model = OneStream(depth=2).eval()
    example = model.example()
    block = bw.CacheConfig(num_steps=8, granularity="block", reuse="residual")
    several = bw.transform(model, CONFIG, dynamic_shapes={"x": None, "t": None})
    for batch in (1, 2):
        several.prepare(model.example(batch))
    changed = bw.transform(OneStream(depth=2).eval(), CONFIG, example_args=example)
    changed.head = torch.nn.Linear(8, 4)
    unread: Any = example
    messages = refused(
        tmp_path,
        lambda at: bw.export(bw.transform(model, block, guard="graph", example_args=example), at),
        lambda at: bw.export(bw.transform(model, bw.CacheConfig(num_steps=8, decide="joint"), example_args=example), at),
        lambda at: bw.export(bw.transform(model), at),
        lambda at: bw.export(changed, at),
        lambda at: bw.export(several, at),
        lambda at: bw.export(cached, at, signature=unread),
        lambda at: bw.export(model, at),
        lambda at: bw.export(torch.compile(model), at),
        lambda at: bw.export(cached, at, format="tf"),
        lambda at: bw.export(cached, at, opset=9),
        lambda at: bw.export(cached, at, opset=20.0),  # type: ignore[arg-type]
        lambda at: bw.export(cached, at, format="pt2", guarded=True),
    )
    assert_expected_inline(
        messages,
        """\
ExportError: granularity='block' cannot be exported: a bundle has one guard for all blocks.
  Transform with granularity='stack', which decides once per step for all blocks.
ExportError: decide='joint' cannot be exported: the contexts of a bundle decide separately.
  Use decide='separate', or call the model once with the contexts batched.
ExportError: there is no program to export: the model has not been captured yet, or it was changed or closed since.
  Call the model once, or pass signature=(args, kwargs) with the arguments of a typical call.
ExportError: there is no program to export: the model has not been captured yet, or it was changed or closed since.
  Call the model once, or pass signature=(args, kwargs) with the arguments of a typical call.
ExportError: the model has 2 captured programs, but a bundle holds one:
  x f32[1, 6, 4]; t f32[1]
  x f32[2, 6, 4]; t f32[2]
  Pass signature=(args, kwargs) to choose one, or transform with dynamic_shapes so that one program serves all sizes.
ConfigError: signature must be a pair (args, kwargs) of a tuple and a dict, such as ((latents, timestep), {}), got (Tensor, Tensor).
ConfigError: export expects the result of transform, got OneStream.
ConfigError: export expects the result of transform, got OptimizedModule.
ConfigError: format must be one of 'onnx', 'pt2', 'aoti', got 'tf'.
ConfigError: opset must be from 18 to 24, got 9.
ConfigError: opset must be from 18 to 24, got 20.0.
ConfigError: guarded=True requires format="onnx", got 'pt2'.""",
    )
    with pytest.raises(bw.ConfigError, match=r"parameter patch\.weight of OneStream is on the meta device"):
        bw.export(changed.to("meta"), tmp_path / "bundle")  # type: ignore[arg-type]


class Numbered(OneStream):
    """Takes a number, which stays open where sizes are, and need not use it."""

    def __init__(self, used: bool = True) -> None:
        super().__init__(depth=2)
        self.used = used

    def forward(self, x: Tensor, t: Tensor, rows: float) -> Tensor:
        return super().forward(x * rows if self.used else x, t)


class Counting(OneStream):
    """Writes to a buffer of its own before the blocks, or to its input."""

    def __init__(self, buffer: bool = True) -> None:
        super().__init__(depth=2)
        self.buffer = buffer
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (self.calls if self.buffer else x).fill_(1.0)
        return super().forward(x, t) + self.calls


class Returning(OneStream):
    """Returns what a function makes of the output."""

    def __init__(self, made: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(depth=2)
        self.made = made

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.made(super().forward(x, t), x)


def exporting(model: OneStream, *more: Any, shapes: Any = None) -> Callable[[Path], Any]:
    args = (*OneStream().example(2), *more)
    return lambda at: bw.export(bw.transform(model.eval(), CONFIG, example_args=args, dynamic_shapes=shapes), at)


def test_what_a_graph_neither_takes_nor_returns(tmp_path: Path) -> None:
    messages = refused(
        tmp_path,
        exporting(Numbered(), 6, shapes="auto"),
        exporting(Numbered(used=False), 6, shapes="auto"),
        exporting(Numbered(used=False), float("inf")),
        exporting(Numbered(used=False), torch.ones(1, dtype=torch.uint16)),
        exporting(Counting()),
        exporting(Counting(buffer=False)),
        exporting(Returning(lambda out, x: torch.complex(out, out))),
        exporting(Returning(lambda out, x: (out, (out > 0).to(torch.uint16)))),
        exporting(Returning(lambda out, x: (out, x.shape[1])), shapes="auto"),
        exporting(Returning(lambda out, x: {1: out})),
    )
    assert_expected_inline(
        messages,
        """\
ExportError: the input rows of Numbered is a Python number that dynamic_shapes makes dynamic; inputs of a graph file are tensors.
  Leave it out of dynamic_shapes, so that its value is a constant.
ExportError: the input rows of Numbered is a Python number that dynamic_shapes makes dynamic; inputs of a graph file are tensors.
  Leave it out of dynamic_shapes, so that its value is a constant.
ExportError: Numbered takes inf as rows; a bundle supports tensors, None, strings and finite numbers.
ExportError: the input rows of Numbered has dtype uint16, which bundles do not support.
  Convert it before the call, to one of float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8, bool, complex64.
ExportError: Counting writes to its buffer calls in its forward (`copy__default`), which exported graphs cannot do.
  Return the value as an output, or keep it outside the model.
ExportError: Counting writes to its input x in its forward (`copy__default`), which exported graphs cannot do.
  Return the value as an output, or keep it outside the model.
ExportError: the output output has dtype complex64, which bundles do not support. Return real and imaginary parts.
ExportError: the output output_1 has dtype uint16, which bundles do not support.
  Convert it in the model, to one of float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8, bool.
ExportError: Returning returns the dynamic size s27; a bundle supports tensors, None, strings and finite numbers.
ExportError: Returning returns a dict with keys that are not strings; a bundle supports tuples, lists and dicts with string keys.
  Wrap the model in a module that returns one of these.""",
    )
