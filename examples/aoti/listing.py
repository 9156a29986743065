"""Write what `session.cpp` must know of a bundle of format "aoti" as plain lines, so that it needs no JSON and no arithmetic.

    python examples/aoti/listing.py bundle --size 'x[1]=40' > bundle.txt

Verifies every file of the bundle. Open sizes are fixed here: the captured ones, or those given. Needs no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from bwcache_compile.exporters.arithmetic import arithmetic
from bwcache_compile.exporters.bundle import open_bundle
from bwcache_compile.exporters.open_sizes import symbols_at
from bwcache_compile.exporters.settings import config_in, policy_inputs


def lines(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[Any, ...]]:
    """Yield the lines: what each is, and its values. A graph's weights, inputs and outputs follow it in their order."""
    if manifest["values"]:  # the session in C++ compares none
        raise SystemExit(f"the values of {', '.join(entry['input'] for entry in manifest['values'])} are built into the bundle")
    known = symbols_at(manifest, sizes)

    def layout(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        shape = [arithmetic(size, known) for size in entry["shape"]]
        return (entry["dtype"], len(shape), *shape, *entry["order"])

    weights = manifest["weights"]
    yield "device", manifest["device"]
    yield "weights", weights["file"]
    for entry in manifest["inputs"]:
        yield "input", entry["name"], *layout(entry)
    for entry in manifest["outputs"]["items"]:
        yield "output", entry["name"]
    steps = len(manifest["config"]["steps_mask"] or ()) or manifest["config"]["num_steps"]
    if steps:
        yield "steps", steps
    for slot in manifest["slots"]:
        yield "slot", slot["name"], slot["fill"], *layout(slot)
    config = config_in(manifest)
    values = config.policy_values(config.steps or 50)
    for policy, value in zip(policy_inputs(config), values.values(), strict=True):
        yield "policy", policy.name, policy.dtype, 1, policy.length, 0, *value
    for kind, graph in manifest["graphs"].items():
        yield "graph", kind, graph["file"]
        for name in graph["weights"]:
            yield "weight", weights["tensors"][name]["offset"], *layout(weights["tensors"][name])
        yield from (("takes", name) for name in graph["inputs"])
        yield from (("returns", name) for name in graph["outputs"])


def main() -> None:
    """Print the listing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--size", action="append", default=[], metavar="INPUT[DIMENSION]=SIZE", help="of an open size; may be repeated")
    args = parser.parse_args()
    sizes = {place: int(size) for place, _, size in (given.partition("=") for given in args.size)}
    for line in lines(open_bundle(args.bundle).manifest, sizes):
        print(*line)


if __name__ == "__main__":
    main()
