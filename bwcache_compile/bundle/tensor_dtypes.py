"""The dtypes of stored tensors: their names in safetensors files, and how values of one become values of another. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STORED = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""Of each dtype of a safetensors file: its name in torch, and the bytes of a value."""
DTYPES = dict(STORED.values())
"""The bytes of a value of each dtype that such a file can hold."""
FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Those that a model may be loaded in, whichever of them its file holds."""
_WORDS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
_AT_ONCE = 2**22
"""Values that are converted at once: of a large tensor no second copy is held."""


def words(dtype: str) -> str:
    """Return the dtype of numpy in which values are held as they are stored, whether or not numpy can compute with them."""
    return _WORDS[DTYPES[dtype]]


def _float32(values: Any, dtype: str) -> Any:
    import numpy as np

    if dtype == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.view(np.dtype(f"<f{DTYPES[dtype]}")).astype("<f4")


def _bfloat16(values: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even, as torch does: every NaN becomes one."""
    import numpy as np

    bits = values.view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")


_FROM_FLOAT32: dict[str, Callable[[Any], Any]] = {
    "bfloat16": _bfloat16,
    "float16": lambda values: values.astype("<f2").view("<u2"),
    "float32": lambda values: values.view("<u4"),
    "float64": lambda values: values.astype("<f8").view("<u8"),
}


def converted(values: Any, dtype: str, wanted: str) -> Any:
    """Return the words of one dtype as those of another, rounded as `torch.Tensor.to` does.

    Args:
        values: uint8 to uint64[n], see `words`.
        dtype: What they are.
        wanted: What is returned, another one. Both are among `FLOATS`.
    """
    import numpy as np

    made = np.empty(values.shape, words(wanted))
    for start in range(0, len(values), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        with np.errstate(over="ignore", invalid="ignore"):  # too large for float16 is infinite there, as in torch
            made[part] = _FROM_FLOAT32[wanted](_float32(values[part], dtype))
    return made
