"""Refuse programs that a bundle cannot hold, before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from bwcache_compile.bundle.call import PAIRS
from bwcache_compile.bundle.files import DTYPES
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import ExportError
from bwcache_compile.exporters.describe import describe_outputs, dtype_name
from bwcache_compile.ir.dataflow import DataFlow
from bwcache_compile.ir.program import ModelProgram


def _refuse_settings(config: CacheConfig) -> None:
    if config.granularity == "block":
        raise ExportError(
            "granularity='block' cannot be exported: a bundle has one guard for all blocks.\n"
            "  Transform with granularity='stack', which decides once per step for all blocks."
        )
    if config.decide == "joint":
        raise ExportError(
            "decide='joint' cannot be exported: the contexts of a bundle decide separately.\n"
            "  Use decide='separate', or call the model once with the contexts batched."
        )
    if config.batch_reduce == "per_sample":
        raise ExportError(
            "batch_reduce='per_sample' cannot be exported: a bundle makes one decision for a batch.\n"
            "  Use batch_reduce='max' or 'joint', or run a session for each sample."
        )


def _refuse_collectives(program: ModelProgram) -> None:
    for module in program.compute.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if getattr(node.target, "namespace", "") in ("c10d", "_c10d_functional"):
                raise ExportError(
                    f"{program.model_name} communicates with other ranks in its forward (`{node.name}`), and a bundle runs in one"
                    " process.\n  Export the model without parallelism, with all of its weights and inputs on one rank."
                )


def _refuse_writes(program: ModelProgram) -> None:
    flow = DataFlow(program.compute.graph)
    for writer in flow.outside_writers():
        if writer.target is torch.ops.aten.detach_.default:  # stands behind each tensor made of numbers, and changes none
            continue
        roots = sorted((r for r in flow.touched(writer) if r in flow.writers and writer in flow.writers[r]), key=str)
        kept = next(root for root in roots if root.op in ("placeholder", "get_attr"))
        what = f"its input {kept.name}" if kept.op == "placeholder" else f"its buffer {kept.target}"
        raise ExportError(
            f"{program.model_name} writes to {what} in its forward (`{writer.name}`), which exported graphs cannot do.\n"
            "  Return the value as an output, or keep it outside the model."
        )


def _refuse_inputs(program: ModelProgram) -> None:
    for node in program.compute.graph.find_nodes(op="placeholder")[: len(program.signature.inputs)]:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise ExportError(
                f"the input {node.name} of {program.model_name} is a Python number that dynamic_shapes makes dynamic; inputs of"
                " a graph file"
                " are tensors.\n  Leave it out of dynamic_shapes, so that its value is a constant."
            )
        if isinstance(value, Tensor) and dtype_name(value.dtype) not in DTYPES:
            raise ExportError(
                f"the input {node.name} of {program.model_name} has dtype {dtype_name(value.dtype)}, which bundles do not support.\n"
                f"  Convert it before the call, to one of {', '.join(DTYPES)}."
            )


def _refuse_results(program: ModelProgram) -> None:
    real = [name for name in DTYPES if name not in PAIRS]
    returned = {item.name: item.dtype for item in describe_outputs(program).items}
    for name, dtype in (returned | {slot.name: dtype_name(slot.dtype) for slot in program.planned().slots}).items():
        if dtype.startswith("complex"):
            raise ExportError(f"the output {name} has dtype {dtype}, which bundles do not support. Return real and imaginary parts.")
        if dtype not in real:
            raise ExportError(
                f"the output {name} has dtype {dtype}, which bundles do not support.\n  Convert it in the model, to one of"
                f" {', '.join(real)}."
            )


def refuse(program: ModelProgram, config: CacheConfig) -> None:
    """Refuse what cannot be exported.

    Raises:
        ExportError: A guard per block, contexts that decide together, a model that communicates with other ranks or writes to its
            buffers or inputs, an open Python number, or a dtype that bundles do not have.
    """
    _refuse_settings(config)
    _refuse_collectives(program)
    _refuse_writes(program)
    _refuse_inputs(program)
    _refuse_results(program)
