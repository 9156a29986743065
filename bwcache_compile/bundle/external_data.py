"""Find the files that an ONNX model reads its weights from, in its bytes. Needs neither onnx nor torch.

ONNX Runtime refuses paths outside the model's folder; this check also refuses files inside it that the manifest does not list, whose
hashes nobody compared.
"""

from __future__ import annotations

from collections.abc import Iterator

# which fields of each message hold which messages (onnx.proto)
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_FIXED = {1: 8, 5: 4}
_DEEPEST = 100


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("number is too long")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and the bytes of each field that has a length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("truncated field")
            yield key >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {kind}")
    if at > len(data):
        raise ValueError("truncated field")


def external_locations(data: bytes) -> set[str]:
    """Return every external data location that a model names, in its graph, the graphs inside it and its functions.

    Raises:
        ValueError: These bytes are no protocol buffer.
    """
    found: set[str] = set()

    def walk(message: str, part: memoryview, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("graphs are nested too deeply")
        for number, content in _fields(part):
            inner = _FIELDS[message].get(number)
            if inner == "entry":
                entry = {n: bytes(value) for n, value in _fields(content)}
                if entry.get(1) == b"location":
                    found.add(entry.get(2, b"").decode(errors="replace"))
            elif inner is not None:
                walk(inner, content, depth + 1)

    try:
        walk("model", memoryview(data), 0)
    except IndexError as error:
        raise ValueError("truncated number") from error
    return found
