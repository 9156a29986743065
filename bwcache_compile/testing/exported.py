"""Check that what was exported still has its cache, whoever exported it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from bwcache_compile.bundle.files import MANIFEST, open_bundle
from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.errors import ConfigError
from bwcache_compile.testing.graph_facts import GraphFacts, TensorFact, counterparts
from bwcache_compile.testing.onnx_graphs import onnx_facts
from bwcache_compile.testing.torch_graphs import torch_facts

_LOOKED_FOR = (
    "an input that holds what an earlier step computed, and an output with its next value: named alike (`cache_in.x` and"
    " `cache_out.x`, `past_x` and `present_x`, `x` and `next_x`), a buffer that is written, or named by state={input: output}"
)


_LISTED = 8
"""Inputs or outputs that a message lists."""


def _facts(exported: Any, name: str) -> GraphFacts:
    if isinstance(exported, ExportedProgram):
        return torch_facts(exported, name)
    if isinstance(exported, (str, Path)):
        path = Path(exported)
        if not path.exists():
            raise ConfigError(f"{path} does not exist.")
        if path.suffix != ".onnx":
            raise ConfigError(
                f"assert_cached reads folders of bundles and .onnx files, got {path}. Open a .pt2 file with torch.export.load, which may"
                " run code of it, and pass the result."
            )
        return onnx_facts(path, path.name)
    if type(exported).__name__ not in ("ModelProto", "Model", "ONNXProgram"):
        raise ConfigError(
            "assert_cached expects a bundle's folder, an .onnx file, an ONNX model, what torch.export.export or torch.onnx.export"
            f" returned, or a pair (compute, reuse) of them, got {type(exported).__name__}."
        )
    return onnx_facts(exported, name)


def _described(manifest: Manifest, kind: str) -> GraphFacts:
    """Return what a manifest says of a graph in one of torch's formats, which cannot be opened without running code of it."""
    entry = manifest.graphs[kind]
    known = {item.name: item for item in (*manifest.inputs, *manifest.outputs.items)}
    known |= {f"cache_{way}.{slot.name}": slot for slot in manifest.slots for way in ("in", "out")}

    def facts(names: tuple[str, ...]) -> tuple[TensorFact, ...]:
        return tuple(TensorFact(name, known[name].dtype, tuple(known[name].shape)) for name in names if name in known)

    inputs, outputs = facts(entry.inputs), facts(entry.outputs)
    read, written = (frozenset(item.name for item in items) for items in (inputs, outputs))
    return GraphFacts(entry.file or kind, inputs, outputs, read, written, len(entry.weights_read), "weights")


def _state(reader: GraphFacts, writer: GraphFacts, named: Mapping[str, str] | None) -> dict[str, str]:
    """Return the inputs of one graph that are read, and whose next values the other one writes.

    Raises:
        ConfigError: `named` names what is no input or no output.
    """
    if named is None:
        pairs = {**counterparts(reader, writer), **reader.pairs}
    else:
        pairs = dict(named)
        for name, facts, which in (
            *((n, reader.inputs, "inputs") for n in pairs),
            *((n, writer.outputs, "outputs") for n in pairs.values()),
        ):
            if name not in [fact.name for fact in facts]:
                raise ConfigError(f"state: {name!r} is not among the {which} {', '.join(fact.name for fact in facts)}.")
    return {taken: returned for taken, returned in pairs.items() if taken in reader.read and returned in writer.written}


def _lost(what: str, looked_for: str, *found: str, advice: str = "") -> AssertionError:
    lines = [f"{what} has lost the cache.", f"  Looked for: {looked_for}.", *(f"  Found: {line}." for line in found)]
    return AssertionError("\n".join([*lines, *([f"  {advice}"] if advice else [])]))


def _listed(items: Sequence[object]) -> str:
    rest = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return (", ".join(map(str, items[:_LISTED])) or "nothing") + rest


def _interface(facts: GraphFacts) -> str:
    return f"{facts.name} takes {_listed(facts.inputs)}, and returns {_listed(facts.outputs)}"


def _check_single(facts: GraphFacts, named: Mapping[str, str] | None) -> None:
    state = _state(facts, facts, named)
    every_step = f"{facts.work} {facts.unit}, which run at every step"
    if not state:
        raise _lost(facts.name, _LOOKED_FOR, _interface(facts), f"{len(facts.guards)} decisions" if facts.guards else every_step)
    shown = f"the state {_listed(list(state))}"
    deciding = [guard for guard in facts.guards if guard.predicate & state.keys()]
    if not deciding:
        raise _lost(
            facts.name,
            "an `If` or `cond` whose condition depends on the state",
            f"{shown}, and {len(facts.guards) or 'no'} decisions{', none of which depends on it' if facts.guards else ''}",
            *([] if facts.guards else [every_step]),
            advice="If this is one of a pair of graphs, pass both: assert_cached((compute, reuse)).",
        )
    for guard in deciding:
        light, heavy = sorted(guard.arms, key=lambda arm: arm.work)
        if light.work < heavy.work and light.reads & state.keys():
            return
    arms = "; ".join(f"{guard.name}: {' and '.join(str(arm.work) for arm in guard.arms)}" for guard in deciding)
    raise _lost(
        facts.name,
        "a branch that reads the state and runs less than the other one",
        f"{shown}, and branches with these numbers of {facts.unit}: {arms}",
    )


def _check_pair(compute: GraphFacts, reuse: GraphFacts, named: Mapping[str, str] | None, what: str) -> None:
    state = _state(reuse, compute, named)
    if not state:
        looked_for = f"{_LOOKED_FOR}; the reuse graph reads the one, and the compute graph returns the other"
        raise _lost(what, looked_for, _interface(compute), _interface(reuse))
    if reuse.work >= compute.work:
        raise _lost(
            what,
            f"a reuse graph with fewer {compute.unit} than the compute graph",
            f"{compute.work} in {compute.name}, {reuse.work} in {reuse.name}",
        )


def assert_cached(exported: Any, *, state: Mapping[str, str] | None = None) -> None:
    """Check that something that was exported can still reuse what an earlier step computed.

    A cache that was patched into a model's Python code is lost when the model is traced: the graph computes everything at every step,
    or holds what was cached at the time as constants. It takes a graph with state among its inputs and outputs.

    Args:
        exported: One of
            a folder with a bundle, of any format;
            an `.onnx` file, an ONNX model (`onnx.ModelProto`, `onnx_ir.Model`), or what `torch.onnx.export` or `torch.export.export`
            returned: one graph that decides by itself;
            a pair of these, `(compute, reuse)`: graphs between which the caller decides.
        state: Which outputs are the next values of which inputs, where their names do not say so.

    Raises:
        AssertionError: It has lost the cache. The message says what was looked for, and what was found.
        ConfigError: It is something else, or `state` names what is not there.
        BundleError: A bundle is damaged.
    """
    __tracebackhide__ = True
    if isinstance(exported, tuple):
        if len(exported) != 2:
            raise ConfigError(f"a pair (compute, reuse) must have two graphs, got {len(exported)}.")
        compute, reuse = (_facts(graph, name) for graph, name in zip(exported, ("the compute graph", "the reuse graph"), strict=True))
        _check_pair(compute, reuse, state, "the pair")
        return
    if not isinstance(exported, (str, Path)) or not Path(exported).is_dir():
        _check_single(_facts(exported, "the exported graph"), state)
        return
    if not (Path(exported) / MANIFEST).exists():
        raise ConfigError(f"{exported} is not a bundle: it has no {MANIFEST}. Pass the .onnx file, or a pair (compute, reuse) of them.")
    bundle = open_bundle(exported, verify_hashes=False, weights=False)
    onnx = bundle.manifest.graph_format == "onnx"
    facts = {kind: _facts(bundle.graph_file(kind), kind) if onnx else _described(bundle.manifest, kind) for kind in bundle.manifest.graphs}
    _check_pair(facts["compute"], facts["reuse"], state, str(exported))
    if "guarded" in facts:
        _check_single(facts["guarded"], state)
