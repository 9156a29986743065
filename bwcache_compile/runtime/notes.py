"""Notes for a plan about the call that its program was captured for, and warnings about the capture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from torch import Tensor

from bwcache_compile.config import CacheConfig
from bwcache_compile.ir.call_signature import Signature
from bwcache_compile.ir.graph_text import op_name
from bwcache_compile.ir.program import ModelProgram
from bwcache_compile.ir.sizes import CallSizes
from bwcache_compile.policies.reuse.linear import noise_gain
from bwcache_compile.runtime.signature import CallKey
from bwcache_compile.runtime.watch import Forward

_MOST_GAIN = 1.5
"""Noise of quantized activations is about 1 % of a step; multiplied by more than this it comes near to what a step changes."""

UNREAD_FIRST = "_bwcache_unread_first"
"""Attribute of a module of ours that says how many of its leading inputs are meant to be read by nothing."""


def built_in(signature: Signature) -> list[str]:
    """Describe the values that are constants of a program."""
    path, dot, line = signature.read_at.partition(".py:")
    at = PurePath(path).name + dot + line  # notes go into manifests, which name no folders of this machine
    read = f" (read at {at})" if at else ""
    return [f"the values of {name} are constants of the graph; other values are captured separately{read}" for name in signature.read_names]


def fixed_sizes(signature: Signature, key: CallKey, others: Sequence[CallSizes], reason: str) -> list[str]:
    """Describe the sizes that changed from call to call, but are constants of the new program.

    Args:
        signature: Of the new program.
        key: Of the call that it was captured for.
        others: Sizes of earlier calls of that kind.
        reason: Why calls of that kind have fixed sizes; empty if they need not.
    """
    if signature.sizes is None:
        return [f"each size is captured separately: {reason}"] if reason else []
    notes = []
    for i, (name, described) in enumerate(zip(signature.inputs, signature.sizes.inputs, strict=True)):
        here = key.sizes[i]
        there = [other[i] for other in others]
        if isinstance(described, tuple) and isinstance(here, tuple):
            for d, size in enumerate(described):
                if isinstance(size, int) and any(isinstance(other, tuple) and other[d] != size for other in there):
                    notes.append(f"dimension {d} of {name} is fixed at {size}: other values are captured separately")
        elif isinstance(described, int) and any(other != here for other in there):
            notes.append(f"{name} is fixed at {here}: other values are captured separately")
    return notes


def suspicious(program: ModelProgram, forward: Forward, unread_first: int = 0) -> list[str]:
    """Describe signs that a captured graph does less than the model: inputs that it does not read, and a cache of the model's own.

    Args:
        program: As it was captured.
        forward: What the model's forward changed of the model.
        unread_first: How many leading inputs are meant to be read by nothing.
    """
    texts, name = [], program.model_name
    names = program.signature.inputs[unread_first:]
    nodes = [node for node in program.captured.graph.find_nodes(op="placeholder") if node.name in names]
    values = [(node, node.meta.get("val")) for node in nodes if not node.users]
    unread = [node.name for node, value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if unread:
        texts.append(
            f"the graph of {name} does not read the inputs {', '.join(map(repr, unread))}: their effect was fixed when the model was"
            " captured. If the model stores a result of them in an attribute, clear that attribute for each new value."
        )
    if forward.kept and forward.counted:
        counted, kept = (", ".join(map(repr, names)) for names in (forward.counted, forward.kept))
        texts.append(
            f"{name} counts its calls ({counted}) and stores what it computed ({kept}), like a step cache of its own. The captured graph"
            " has that cache's decision at capture as a constant. Turn the model's own cache off."
        )
    return texts


def amplified_noise(program: ModelProgram, config: CacheConfig) -> list[str]:
    """Warn where reused steps multiply the noise of quantized activations: at each computed step it is another."""
    gain = noise_gain(config)
    if gain <= _MOST_GAIN:
        return []
    names = {op_name(node) for node in program.captured.graph.nodes if node.op == "call_function"}
    found = sorted(name for name in names if name in ("_int_mm", "_scaled_mm") or ("quantize" in name and "dequantize" not in name))
    if not found:
        return []
    return [
        f"{program.model_name} quantizes its activations ({', '.join(found)}), and the weights of reused steps multiply the noise of"
        f" that by up to {gain:.1f}: images may flicker. Calibrate the quantized model, which makes the weights smaller where noise"
        ' matters, or use reuse="output".'
    ]
