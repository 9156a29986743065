"""Check an export: the reuse graph contains no cached block, and the files compute what the program computes, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bwcache_compile.bundle.manifest import Manifest
from bwcache_compile.bundle.session import Session
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import BundleError, ExportError
from bwcache_compile.exporters.graphs import PlainGraph, under_autocast
from bwcache_compile.graph_io import INDICATOR, REUSE_LEFT, STEP, cache_in, cache_out, policy_input
from bwcache_compile.ir.compare import relative_error
from bwcache_compile.ir.examples import input_at, is_maskable
from bwcache_compile.ir.layout import in_order, slot_order
from bwcache_compile.ir.policy_tensors import policy_parameters
from bwcache_compile.ir.program import REGION_MARK, ModelProgram
from bwcache_compile.ir.sizes import hint_shape
from bwcache_compile.ir.torch_compat import pytree
from bwcache_compile.policies import POLICIES
from bwcache_compile.size_expressions import evaluate, evaluated
from bwcache_compile.stepping import Cursor

_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_TOLERANCE = 1e-4
_STEPS = 6
_CONTEXT = "check"
Explain = Callable[[str, Mapping[str, Any]], str]
"""From the kind of a graph and its inputs by name, to lines about where it first differs from torch."""


def tolerance_of(program: ModelProgram) -> float:
    """Return the largest error that other kernels may make, relative to the largest value of the tensor.

    Where a graph rounds to half precision, if only inside, what differed by a last bit of float32 may differ by one of half precision.
    """
    values = pytree.tree_leaves([node.meta.get("val") for node in program.compute.graph.nodes])
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    return max(_TOLERANCES.get(dtype, _TOLERANCE) for dtype in dtypes | {torch.float32})


class Written(Protocol):
    """A written graph: its operators of the cached region (name, and the node that each came from), and its weights."""

    @property
    def region(self) -> dict[str, str]: ...  # noqa: D102
    @property
    def unmarked(self) -> int: ...  # noqa: D102
    @property
    def weights(self) -> set[str]: ...  # noqa: D102


def check_structure(plain: Mapping[str, PlainGraph], written: Mapping[str, Written]) -> dict[str, Any]:
    """Prove that the reuse graph holds no operator and no weight of a cached block.

    Operators are told apart by the marks that the split put on the region's nodes, which every graph carried along.

    Raises:
        ExportError: It holds one; or the compute graph holds none, so that the marks were lost.
    """
    compute, reuse = written["compute"], written["reuse"]
    if not compute.region:
        raise ExportError("the exporter dropped the marks of the cached region: no operator of the compute graph carries one.")
    if reuse.region:
        node, origin = next(iter(reuse.region.items()))
        raise ExportError(f"the reuse graph contains {node}, which belongs to {origin} of a cached block.")
    graph = plain["compute"].exported
    names = {spec.arg.name: str(spec.target) for spec in graph.graph_signature.input_specs if spec.target is not None}
    only_region = {
        names[node.name]
        for node in graph.graph.find_nodes(op="placeholder")
        if node.name in names and node.users and all(user.meta.get("custom", {}).get(REGION_MARK) for user in node.users)
    }
    kept = sorted(only_region & reuse.weights)
    if kept:
        raise ExportError(f"the reuse graph contains the weight {kept[0]}, which only the cached blocks read.")
    return {
        "region_operators": len(compute.region),
        "region_operators_in_reuse": 0,
        "region_weights": len(only_region),
        "unmarked_operators": {"compute": compute.unmarked, "reuse": reuse.unmarked},
    }


@dataclasses.dataclass
class TorchRun:
    """A generation of the transformed program in torch, from the graphs themselves. `last` is what ran last, on which inputs by name."""

    program: ModelProgram
    config: CacheConfig
    num_steps: int
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        """Start with a fresh state."""
        plan = self.program.planned()
        self.slots = {slot.name: slot.fresh(self.sizes, plan.device) for slot in plan.slots}
        self.cursor = Cursor()
        self.parameters = [policy_input(parameter.name) for parameter in plan.settings.parameters]
        self.last: tuple[str, dict[str, Any]] = "", {}

    def step(self, step: int, flat: list[Any]) -> tuple[list[Any], bool, Tensor | None]:
        """Run one step; return the outputs, whether it computed, and the indicator."""
        program, device = self.program, self.program.planned().device
        cursor = self.cursor.at(step)
        computes = not cursor.reuses
        io = program.io("compute" if computes else "reuse")
        values = dict(zip(io.users, flat, strict=True)) | {cache_in(name): value for name, value in self.slots.items()}
        values |= dict(zip(self.parameters, policy_parameters(self.config, self.num_steps, device), strict=True))
        values[STEP] = torch.tensor([step], device=device)
        self.last = io.kind, values
        returned = io.unpack(getattr(program, io.kind)(*io.pack(values)))
        if computes:
            self.slots = {name: returned[cache_out(name)] for name in self.slots}
        self.cursor = cursor.computed(int(returned[REUSE_LEFT])) if computes else cursor.reused()
        return [returned[name] for name in io.results], computes, returned.get(INDICATOR)


def other_sizes(program: ModelProgram, conditions: Sequence[str]) -> dict[str, int] | None:
    """Return other values of the dynamic sizes that satisfy the conditions; None if none of those tried do."""
    for factor in (3, 2, 4) if program.signature.sizes else ():
        known = {name: factor * value for name, value in program.signature.captured_sizes.items()}
        if all(evaluate(condition, known) for condition in conditions):
            return known
    return None


def _inputs_at(program: ModelProgram, step: int, known: Mapping[str, int], padded: bool = False) -> list[Any]:
    """Return one step's flat inputs, like those of the capture; with `padded`, the last keys of masks are padding."""
    sizes, device = program.signature.sizes, program.planned().device
    generator = torch.Generator().manual_seed(0)
    flat: list[Any] = []
    for i, node in enumerate(program.compute.graph.find_nodes(op="placeholder")[: len(program.signature.inputs)]):
        value, example = node.meta.get("val"), program.signature.examples.get(program.signature.inputs[i])
        if not isinstance(value, Tensor):
            flat.append(value if not isinstance(value, torch.SymInt) else None)
            continue
        shape = evaluated(sizes.inputs[i], known) if sizes and isinstance(sizes.inputs[i], tuple) else hint_shape(value)  # type: ignore[arg-type]
        if i in program.signature.read:
            flat.append(program.signature.read[i].clone().to(device))
        else:
            made = input_at(example, shape, value.dtype, step, generator, padded)
            flat.append(in_order(made.to(device), slot_order(value)))
    return flat


def _has_masks(program: ModelProgram) -> bool:
    """Whether some input is a mask that the graphs read anew at each call."""
    signature = program.signature
    return any(is_maskable(signature.examples.get(name)) and i not in signature.read for i, name in enumerate(signature.inputs))


def _takes_padding(program: ModelProgram, config: CacheConfig) -> bool:
    """Whether the graphs take masks with padding: where sizes follow from a mask, they may hold for one number of ones alone."""
    if not _has_masks(program):
        return False
    run = TorchRun(program, config, config.steps or _STEPS, program.signature.captured_sizes)
    try:
        with torch.no_grad(), under_autocast(program):
            run.step(0, _inputs_at(program, 0, program.signature.captured_sizes, padded=True))
    except (RuntimeError, IndexError, ValueError):  # what torch's operators raise
        return False
    return True


def _forced(config: CacheConfig, threshold: float) -> CacheConfig:
    """Return settings under which both branches are taken, where the policy reads a threshold; else these."""
    at_threshold = POLICIES[config.policy].at_threshold
    config = config.changed(timesteps=None)  # the check makes up times of its own
    return config if at_threshold is None else at_threshold(config, threshold, _STEPS + 1)


def _checked_steps(mask: Sequence[int]) -> int:
    """Return how many steps of a mask to run: two of those that reuse are among them, if there are as many."""
    reused = [step for step, reuses in enumerate(mask) if reuses][:2]
    return min(len(mask), max(8, *(step + 2 for step in reused)))


@dataclasses.dataclass
class _Compared:
    """Compares a session with torch step by step, and keeps the largest error."""

    program: ModelProgram
    manifest: Manifest
    tolerance: float
    to_session: Callable[[Tensor], Any]
    worst: float = 0.0
    explain: Explain | None = None

    def _compare(self, torch_run: TorchRun, what: str, actual: Any, expected: Tensor, least: float = 1e-30) -> None:
        error = relative_error(actual, self.to_session(expected), least)
        self.worst = max(self.worst, error)
        if not error <= self.tolerance:
            raise ExportError(
                f"{what} of the exported graphs differs from torch by {error:.3g}, relative to its largest value; the tolerance"
                f" is {self.tolerance:g}.{self.explain(*torch_run.last) if self.explain else ''}"
            )

    def run(
        self, session: Session, config: CacheConfig, steps: int, sizes: Mapping[str, int] | None = None, *, padded: bool = False
    ) -> tuple[list[bool], list[float]]:
        """Run both side by side; return torch's decisions and indicators.

        Raises:
            ExportError: An output, a slot, the indicator or a decision differs.
        """
        session.cache_config = config
        session.reset()
        known = self.program.signature.captured_sizes if sizes is None else sizes
        torch_run = TorchRun(self.program, config, config.steps or steps, known)
        decisions, indicators = [], []
        for step in range(steps):
            flat = _inputs_at(self.program, step, known, padded)
            named = zip(self.program.io("compute").users, flat, strict=True)
            wanted = {entry.name for entry in self.manifest.inputs}
            given = {name: self.to_session(value) for name, value in named if name in wanted}
            with torch.no_grad(), under_autocast(self.program):
                expected, computed, change = torch_run.step(step, flat)
            try:
                with session.cache_context(_CONTEXT, step_index=step):
                    returned = session.run_flat(given)
            except BundleError as error:
                raise ExportError(f"step {step}: {error}") from error
            tensors = [value for value in expected if isinstance(value, Tensor)]
            for item, tensor in zip(self.manifest.outputs.items, tensors, strict=True):
                self._compare(torch_run, f"step {step}: the output {item.name}", returned[item.name], tensor)
            record = session.report().contexts[_CONTEXT].steps[-1]
            if record.computed != computed:
                verb = {True: "computes", False: "reuses"}
                raise ExportError(f"step {step}: torch {verb[computed]} and the exported graphs {verb[record.computed]}.")
            if computed and change is not None:
                assert record.change is not None
                # a small difference of large features, as a part of them: what is rounded off them is large beside it
                self._compare(torch_run, f"step {step}: the indicator", record.change, change, least=1.0)
                indicators += [float(change.mean())] if step else []
            ended = config.steps is not None and step == config.steps - 1  # the cache is freed then
            for name, value in ({} if ended else session.state(_CONTEXT)).items():
                if name in torch_run.slots:
                    self._compare(torch_run, f"step {step}: the slot {name}", value, torch_run.slots[name])
            decisions.append(computed)
        return decisions, indicators


def check_runs(
    program: ModelProgram,
    config: CacheConfig,
    manifest: Manifest,
    sessions: Mapping[str, Callable[[], Session]],
    tolerance: float,
    to_session: Callable[[Tensor], Any],
    explain: Explain | None = None,
) -> dict[str, Any]:
    """Run the written files beside torch over several steps, both branches taken: equal decisions, outputs and slots.

    Args:
        program: What was exported.
        config: The settings in force.
        manifest: What is said of it.
        sessions: Opens the files; by the name that the report gives them.
        tolerance: Largest error, relative to the largest value of a tensor; 0 asks for the same bits.
        to_session: Turns one of torch's tensors into what the sessions take.
        explain: Says where the graph of a kind first differs on these inputs, for the message; for the first of the sessions.

    Raises:
        ExportError: A file does not open, or they differ; the message names the step and the output or slot.
    """
    compared = _Compared(program, manifest, tolerance, to_session, explain=explain)
    steps = _STEPS if config.steps_mask is None else _checked_steps(config.steps_mask)
    pattern, elsewhere, padding = "", other_sizes(program, manifest.conditions), _takes_padding(program, config)
    for opened in sessions.values():
        try:
            session = opened()
        except BundleError as error:
            raise ExportError(f"the exported bundle does not open: {error}") from error
        decisions, indicators = compared.run(session, _forced(config, float("inf")), steps)
        finite = [value for value in indicators if value > 0 and value < float("inf")]
        if POLICIES[config.policy].at_threshold is not None and finite:
            # a threshold well away from what was measured, on either side
            decisions, _ = compared.run(session, _forced(config, 2 * max(finite)), steps)
            never, _ = compared.run(session, _forced(config, min(finite) / 2), 2)
            assert all(never)
        if elsewhere is not None:
            compared.run(session, _forced(config, float("inf")), min(steps, 4), elsewhere)
        if padding:
            compared.run(session, _forced(config, float("inf")), min(steps, 4), padded=True)
        pattern = "".join("#" if computed else "." for computed in decisions)
        compared.explain = None  # the others hold the same operators
        del session  # before the next is opened: each holds all the weights
    sizes = [program.signature.captured_sizes, *([elsewhere] if elsewhere else [])]
    report = {"runs": list(sessions), "sizes": sizes, "steps": pattern, "tolerance": tolerance, "largest_error": compared.worst}
    return {**report, **({"padded_masks": padding} if _has_masks(program) else {})}
