"""Write a few operators of an ONNX model as a model of their own, with the inputs to run it on and what torch computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bwcache_compile.new_folder import new_folder

_SCRIPT = '''"""{title}: ONNX Runtime beside torch."""

from pathlib import Path

import numpy as np
import onnxruntime as ort

here = Path(__file__).parent
inputs, expected = dict(np.load(here / "inputs.npz")), np.load(here / "expected.npy")
session = ort.InferenceSession(here / "operator.onnx", providers=["CPUExecutionProvider"])
(actual,) = session.run(None, inputs)
apart = np.abs(actual.astype("float64") - expected.astype("float64"))
print(f"largest difference {{apart.max():.3g}}, of values up to {{np.abs(expected).max():.3g}}")
'''


def write_operator(folder: Path, model: Any, inputs: Mapping[str, Any], result: str, expected: Any, title: str) -> None:
    """Write `operator.onnx`, `inputs.npz`, `expected.npy` and `repro.py` to a new folder, all of them or none.

    Args:
        folder: Does not exist, or is empty.
        model: Holds the operators.
        inputs: What they read of others, without weights, by name.
        result: Name of what they make.
        expected: What torch computes for it.
        title: Heads the script.

    Raises:
        OSError: The folder cannot be written to.
    """
    import onnx_ir as ir

    graph = ir.convenience.extract(model.graph, list(inputs), [result])
    for weight in graph.initializers.values():
        assert weight.const_value is not None
        weight.const_value = ir.tensor(np.array(weight.const_value.numpy()), name=weight.name)  # no longer in the weight file
    for value, array in zip(graph.inputs, inputs.values(), strict=True):
        value.shape = ir.Shape(array.shape)
    graph.outputs[0].shape = ir.Shape(expected.shape)
    with new_folder(folder) as place:
        ir.save(ir.Model(graph, ir_version=model.ir_version), place / "operator.onnx")
        np.savez(place / "inputs.npz", **dict(inputs))
        np.save(place / "expected.npy", expected)
        (place / "repro.py").write_text(_SCRIPT.format(title=title))
