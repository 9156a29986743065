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
        lambda at: bw.export(model, at),  # type: ignore[arg-type]
        lambda at: bw.export(torch.compile(cached), at),  # type: ignore[arg-type]
        lambda at: bw.export(cached, at, format="tf"),
        lambda at: bw.export(cached, at, opset=9),
        lambda at: bw.export(cached, at, opset=20.0),  # type: ignore[arg-type]
        lambda at: bw.export(cached, at, format="pt2", guarded=True),
    )
    assert_expected_inline(
        messages,
        """\
ExportError: granularity='block' guards each block inside the graph, and a bundle has one guard, at the step.
  Transform with granularity='stack', which decides once a step for all blocks.
ExportError: decide='joint' is decided by the host between contexts, and a bundle's graphs see one context.
  Use decide='separate', or call the model once with the contexts batched.
ExportError: there is no program to export: nothing is captured yet, or the model was changed or closed since.
  Call the model once, or pass signature=(args, kwargs), a call like those to come.
ExportError: there is no program to export: nothing is captured yet, or the model was changed or closed since.
  Call the model once, or pass signature=(args, kwargs), a call like those to come.
ExportError: this model holds 2 programs, and a bundle holds one:
  x f32[1, 6, 4]; t f32[1]
  x f32[2, 6, 4]; t f32[2]
  Pass signature=(args, kwargs), a call like those to come; or transform with dynamic_shapes.
ConfigError: signature is no pair of a tuple and a dict; pass (args, kwargs), as in a call.
ConfigError: export takes what transform returned, not a OneStream. Transform the model; compile it later.
ConfigError: export takes what transform returned, not a OptimizedModule. Transform the model; compile it later.
ConfigError: format is 'tf'; choose one of onnx, pt2, aoti.
ConfigError: opset is 9; choose one from 18 to 24.
ConfigError: opset is 20.0; choose one from 18 to 24.
ConfigError: guarded=True writes one more ONNX graph; format is 'pt2'. Leave it out, or choose format="onnx".""",
    )
    with pytest.raises(bw.ConfigError, match=r"the parameter patch\.weight of OneStream has no data here \(device meta\)"):
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
ExportError: the input rows of Numbered is a Python number whose value is open; a file's inputs are tensors.
  Transform with dynamic_shapes that leaves it out, so that its value is built in.
ExportError: the input rows of Numbered is a Python number whose value is open; a file's inputs are tensors.
  Transform with dynamic_shapes that leaves it out, so that its value is built in.
ExportError: Numbered takes inf as rows; beside tensors a bundle holds None, text and finite numbers. Use one of these.
ExportError: the input rows of Numbered is uint16, which bundles have not.
  Convert it before the call, to one of float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8, bool, complex64.
ExportError: Counting writes to its buffer calls while it runs (`copy__default`), and a bundle's graphs write to nothing.
  Return the value as an output, or keep it outside the model.
ExportError: Counting writes to its input x while it runs (`copy__default`), and a bundle's graphs write to nothing.
  Return the value as an output, or keep it outside the model.
ExportError: the graphs return output, which is complex64; bundles return real numbers. Return real and imaginary parts.
ExportError: the graphs return output_1, which is uint16.
  Convert it in the model, to one of float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8, bool.
ExportError: Returning returns the open size s27; beside tensors a bundle holds None, text and finite numbers. Use one of these.
ExportError: Returning returns a dict whose keys are no text; a bundle returns tuples, lists, and tables with names.
  Wrap the model in a module that returns one of these.""",
    )
