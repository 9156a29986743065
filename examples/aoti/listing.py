"""Write what `session.cpp` must know of a bundle of format "aoti" as plain lines, so that it needs no JSON and no arithmetic.

    python examples/aoti/listing.py bundle --size 'x[1]=40' > bundle.txt

Verifies every file of the bundle. Dynamic sizes are fixed here: the captured ones, or those given. Needs no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bwcache_compile.bundle.arithmetic import arithmetic
from bwcache_compile.bundle.dynamic_shapes import symbols_at
from bwcache_compile.bundle.files import open_bundle
from bwcache_compile.bundle.manifest import CallEntry, Manifest, SequenceEntry, Size
from bwcache_compile.bundle.settings import policy_inputs


def lines(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[tuple[Any, ...]]:
    """Yield the lines: what each is, and its values.

    A graph is followed by its calls of packages (one, unless the bundle was exported with `blocks_once=True`), each by the weights, the
    values that it takes and those that it returns in their order, and then by its outputs, each with the value that it is.
    """
    if manifest.values:  # the session in C++ compares none
        raise SystemExit(f"the values of {', '.join(entry.input for entry in manifest.values)} are built into the bundle")
    known = symbols_at(manifest, sizes)

    def layout(dtype: str, shape: Sequence[Size], order: Sequence[int] | None) -> tuple[Any, ...]:
        return (dtype, len(shape), *(arithmetic(size, known) for size in shape), *(order or ()))

    weights, config = manifest.weights, manifest.config
    if weights is None:
        raise SystemExit(f'the bundle holds graphs of format "{manifest.graph_format}", and not "aoti"')
    yield "device", manifest.device
    yield "weights", weights.file
    for entry in manifest.inputs:
        yield "input", entry.name, *layout(entry.dtype, entry.shape, entry.order)
    for item in manifest.outputs.items:
        yield "output", item.name
    if config.steps:
        yield "steps", config.steps
    for slot in manifest.slots:
        yield "slot", slot.name, slot.fill, *layout(slot.dtype, slot.shape, slot.order)
    values = config.policy_values(config.steps or 50)
    for policy, value in zip(policy_inputs(config), values.values(), strict=True):
        rows = [row if isinstance(row, tuple) else (row,) for row in value]
        yield (
            "policy",
            policy.name,
            *layout(policy.dtype, policy.shape, range(len(policy.shape))),
            *(number for row in rows for number in row),
        )
    for kind, graph in manifest.graphs.items():
        yield "graph", kind
        alone = CallEntry(file=graph.file or "", weights=graph.weights or (), inputs=graph.inputs, outputs=graph.outputs)
        sequence = graph.sequence or SequenceEntry(calls=(alone,), returned=graph.outputs)
        for call in sequence.calls:
            yield "call", call.file
            for name in call.weights:
                weight = weights.tensors[name]
                yield "weight", weight.offset, *layout(weight.dtype, weight.shape, weight.order)
            yield from (("takes", name) for name in call.inputs)
            yield from (("returns", name) for name in call.outputs)
        yield from (("result", name, value) for name, value in zip(graph.outputs, sequence.returned, strict=True))


def main() -> None:
    """Print the listing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--size", action="append", default=[], metavar="INPUT[DIMENSION]=SIZE", help="of a dynamic size; may be repeated")
    args = parser.parse_args()
    sizes = {place: int(size) for place, _, size in (given.partition("=") for given in args.size)}
    for line in lines(open_bundle(args.bundle).manifest, sizes):
        print(*line)


if __name__ == "__main__":
    main()
