"""List the operators of a bundle that TensorRT's ONNX parser does not support. Needs onnx_ir, no TensorRT and no torch.

The list is a copy, because the parser that could be asked comes with TensorRT's builder, which needs a GPU machine.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from bwcache_compile.bundle.files import Bundle

if TYPE_CHECKING:
    import onnx_ir as ir

LIST_VERSION = "10.15"
"""The TensorRT whose list this is (docs/operators.md of onnx-tensorrt); later versions take at least as much."""
OPSETS = range(9, 25)

_FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16"}
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}
_LOW = {"FLOAT8E4M3FN", "FLOAT4E2M1", "INT4"}
_GROUPS: tuple[tuple[set[str], str], ...] = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum Dropout"
        " Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish"
        " Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization LpPool"
        " MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform"
        " RandomUniformLike Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax"
        " Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (
        _NUMBERS,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg Pad Pow Range"
        " ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu"
        " Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    (
        _ANY,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape ReverseSequence Shape Size Slice"
        " Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (_ANY | {"UINT8"}, "Cast CastLike"),
    (_ANY | _LOW, "Constant ConstantOfShape"),
    ({"BOOL"}, "And Not Or Xor"),
    ({"FLOAT", "FLOAT16"}, "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign"),
    ({"FLOAT"}, "STFT"),
    (_FLOATS | {"INT8", "FLOAT8E4M3FN"}, "Attention"),
    (_NUMBERS | {"INT8"}, "Gelu"),
    (_NUMBERS | {"FLOAT8E4M3FN"}, "Mean"),
    (_LOW | {"INT8"}, "DequantizeLinear"),
    (_FLOATS | {"INT32"}, "TensorScatter"),
)
LISTED = {name: types for types, names in _GROUPS for name in names.split()}
_BY_OUTPUT = {"Constant", "ConstantOfShape", "If", "Loop"}
_CONSTANT = {"CumSum": "axis", "OneHot": "depth", "Squeeze": "axes", "Unsqueeze": "axes"}
"""Operators whose second input must be known when the engine is built, as must be the axes of every Reduce operator."""


@dataclasses.dataclass(frozen=True)
class Unlisted:
    """An operator that TensorRT does not list as it is used.

    Attributes:
        graph: `compute`, `reuse` or `guarded`.
        node: Its name in the graph.
        operator: Its ONNX type.
        origin: The module of the user's model that it came from, as a path; empty for what belongs to no module.
        reason: What is not listed.
    """

    graph: str
    node: str
    operator: str
    origin: str
    reason: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.graph}: {self.operator} {self.node} of {self.origin or 'the model itself'}: {self.reason}"


def _is_constant(value: Any) -> bool:
    producer = value.producer()
    return value.is_initializer() or value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _reason(node: ir.Node) -> str:
    """Return what is not listed about a node; empty if it is listed as it is."""
    name = node.op_type
    if node.domain not in ("", "ai.onnx"):
        return f"the domain {node.domain} is a plugin's"
    if name not in LISTED:
        return "the operator is not listed"
    given = [value for value in node.inputs if value is not None]
    typed = node.outputs if name in _BY_OUTPUT or not given else node.inputs[1:] if name == "Where" else node.inputs[:1]
    if name in ("Cast", "CastLike"):
        typed = [*typed, *node.outputs]
    for value in typed:
        if value is not None and value.dtype is not None and value.dtype.name not in LISTED[name]:
            return f"it is not listed for {value.dtype.name}"
    second = node.inputs[1] if len(node.inputs) > 1 else None
    needed = "axes" if name.startswith("Reduce") else _CONSTANT.get(name)
    if needed and second is not None and not _is_constant(second):
        return f"{needed} must be a constant"
    if name == "Attention" and (len(given) > 4 or len(node.outputs) > 1 or any(len(v.shape) != 4 for v in given if v.shape is not None)):
        return "it is listed for 4 dimensions, without past keys and values"
    if name == "LayerNormalization" and any(value.uses() for value in node.outputs[1:]):
        return "it is listed with its first output alone"
    return ""


def unlisted_operators(bundle: Bundle) -> list[Unlisted]:
    """Compare every operator of a bundle's graphs, its dtype and the operator set with TensorRT's list.

    What is listed may still be refused when an engine is built; what is not listed will be.
    """
    import onnx_ir as ir

    found = []
    for kind in bundle.manifest.graphs:
        model = ir.load(bundle.graph_file(kind))
        opset = model.opset_imports.get("", 0)
        if opset not in OPSETS:
            found.append(Unlisted(kind, "", "", "", f"opset {opset} is not among {OPSETS.start} to {OPSETS.stop - 1}"))
        for node in model.graph.all_nodes():
            reason = _reason(node)
            if reason:
                found.append(Unlisted(kind, str(node.name), node.op_type, str(node.name).rpartition("/")[0], reason))
    return found
