"""What is left of a cache when the model goes through `torch.onnx.export`: rivals counted beside a bundle.

    python benchmarks/rivals_export.py --out benchmarks/results/rivals_export.json

Each rival patches a Wan model of 4 blocks (8 attentions), is told what a pipeline tells it (context, step, noise, time), and is
exported with `dynamo=True`: before any call ("cold"), and after five steps, when its cache is full and the next step reuses ("warm"): fewer
attentions run when that step is called eagerly. Counted in the file are attention operators, `If` operators, and inputs that the
model does not have, which is where state would come in. The error is that of the exported graph against the model without a cache, on
other inputs: 0 means that the cache is gone, more that parts of it are baked in as constants. Rivals that are not installed are
said to be so. cache-dit: `pip install cache-dit`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime as ort
import torch
from diffusers import hooks
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import bwcache_compile as bw
from benchmarks.record import write_record
from benchmarks.steps import inputs, wan

OPSET, LAYERS, STEPS, WARM_STEPS = 23, 4, 8, 5


def call_at(step: int) -> dict[str, Any]:
    """Return the arguments of one step: a sample that moves a little, and the falling time."""
    torch.manual_seed(0)
    call, drift = inputs(frames=1, height=16, width=16), torch.randn(1, 16, 1, 16, 16)
    time = torch.tensor([1000.0 - 100 * step])
    return {**call, "hidden_states": call["hidden_states"] + 0.02 * step * drift, "timestep": time}


Now = Callable[[], int]
"""The time of the step that runs, which a pipeline tells the caches that ask for it."""


class Called(nn.Module):
    """Calls a model as a pipeline does, from a forward whose signature can be read: cache-dit replaces the model's by a partial."""

    def __init__(self, model: nn.Module) -> None:
        """Hold the model."""
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> Any:
        """Call it."""
        return self.model(
            hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=encoder_hidden_states, return_dict=return_dict
        )


def _diffusers(name: str, *timed: str, **settings: Any) -> Callable[[nn.Module, Now], None]:
    """Return what turns on one of diffusers' caches; `timed` are its settings that take the callback for the time."""

    def enable(model: Any, now: Now) -> None:
        config = getattr(hooks, name, None)
        if config is None:
            raise ModuleNotFoundError(f"not in diffusers {diffusers.__version__}")
        model.enable_cache(config(**settings, **dict.fromkeys(timed, now)))

    return enable


def _cache_dit(model: nn.Module, now: Now) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=10.0, num_inference_steps=STEPS
    )
    cache_dit.enable_cache(model, cache_config=config)


RIVALS: dict[str, Callable[[nn.Module, Now], None]] = {
    "no cache": lambda model, now: None,
    "FirstBlockCache": _diffusers("FirstBlockCacheConfig", threshold=10.0),
    "MagCache": _diffusers("MagCacheConfig", threshold=10.0, num_inference_steps=STEPS, retention_ratio=0.1, mag_ratios=[1.0] * STEPS),
    "TaylorSeer": _diffusers(
        "TaylorSeerCacheConfig",
        cache_interval=4, disable_cache_before_step=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\..*attn[12]"],  # the default patterns match nothing in Wan
    ),
    "PyramidAttentionBroadcast": _diffusers(
        "PyramidAttentionBroadcastConfig", "current_timestep_callback",
        spatial_attention_block_skip_range=4, cross_attention_block_skip_range=4,
    ),
    "FasterCache": _diffusers("FasterCacheConfig", "current_timestep_callback", is_guidance_distilled=True),
    "SeaCache": _diffusers("SeaCacheConfig", threshold=10.0, max_consecutive_cached=0),
    "cache-dit DBCache": _cache_dit,
}  # fmt: skip


def counted(operators: Counter[str], names: list[str]) -> dict[str, int]:
    """Count what tells whether a graph has a cache."""
    own = {name for name, value in call_at(0).items() if isinstance(value, torch.Tensor)}
    return {"attention": operators["Attention"], "if": operators["If"], "state_inputs": len(set(names) - own)}


class Pipeline:
    """A model with a rival's cache turned on, called step by step as a pipeline does."""

    def __init__(self, enable: Callable[[nn.Module, Now], None]) -> None:
        """Patch a model."""
        self.model: Any = wan(LAYERS, width=64)
        self.caller, self.time = Called(self.model), 0
        enable(self.model, lambda: self.time)

    @contextlib.contextmanager
    def at(self, step: int) -> Iterator[dict[str, Any]]:
        """Tell the cache which step runs, and give its arguments."""
        call = call_at(step)
        self.time = int(call["timestep"])
        with self.model.cache_context("cond", step_index=step, sigma=self.time / 1000, num_inference_steps=STEPS):
            yield call

    def run(self, steps: int) -> None:
        """Run the first steps."""
        for step in range(steps):
            with self.at(step) as call:
                self.caller(**call)


class Attentions(TorchFunctionMode):
    """Counts attentions that run eagerly."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and run."""
        self.count += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def attentions_at(enable: Callable[[nn.Module, Now], None], step: int) -> int:
    """Count the attentions that a step runs eagerly: fewer than all of them where the cache is used."""
    pipeline, attentions = Pipeline(enable), Attentions()
    with _quiet():
        pipeline.run(step)
        with pipeline.at(step) as call, attentions:
            pipeline.caller(**call)
    return attentions.count


def run_rival(enable: Callable[[nn.Module, Now], None], steps: int) -> dict[str, Any]:
    """Export a patched model after some steps; count, and compare with the model without a cache on a later step's inputs."""
    later = call_at(steps + 2)
    with _quiet():
        (expected,) = wan(LAYERS, width=64)(**later)
        pipeline = Pipeline(enable)
        pipeline.run(steps)
        with pipeline.at(steps) as call:
            program = torch.onnx.export(pipeline.caller, (), kwargs=call, dynamo=True, opset_version=OPSET, verbose=False)
    assert program is not None
    graph = program.model.graph
    result: dict[str, Any] = counted(Counter(node.op_type for node in graph.all_nodes()), [str(value.name) for value in graph.inputs])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (actual,) = session.run(None, {value.name: later[value.name].numpy() for value in session.get_inputs()})
    result["error"] = float(np.abs(actual - expected.numpy()).max() / expected.abs().max())
    return result


def rival(name: str, steps: int) -> dict[str, Any]:
    """Return a rival's row, or why there is none."""
    try:
        eager = {"eager_attention": attentions_at(RIVALS[name], steps)}
    except ModuleNotFoundError as error:
        return {"absent": "not installed" if error.name == "cache_dit" else str(error)}
    try:
        return {**eager, **run_rival(RIVALS[name], steps)}
    except Exception as error:  # whatever exporters raise is the result
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return {**eager, "failed": f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"}


def ours() -> dict[str, dict[str, Any]]:
    """Export a bundle and count each of its graphs; the error is that of several steps, reused ones among them, beside torch."""
    import onnx

    config = bw.CacheConfig(num_steps=STEPS, threshold=math.inf)
    cached = bw.transform(wan(LAYERS, width=64), config, example_kwargs=call_at(0))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = bw.export(cached, Path(folder) / "bundle", guarded=True, opset=OPSET)
        for kind, entry in manifest.graphs.items():
            graph = onnx.load(Path(folder) / "bundle" / entry.file, load_external_data=False).graph
            arms = [attribute.g for node in graph.node for attribute in node.attribute if node.op_type == "If"]
            operators = Counter(node.op_type for inner in (graph, *arms) for node in inner.node)
            states = [name for name in entry.inputs if not name.startswith("policy.") and name != "step"]
            rows[f"bwcache-compile, {kind}"] = {**counted(operators, states), "error": manifest.self_check["largest_error"]}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = ["| exported from | attention in eager | attention | If | state inputs | error |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        note = row.get("absent") or row.get("failed")
        counts = [row.get("eager_attention", ""), row.get("attention", ""), row.get("if", ""), row.get("state_inputs", "")]
        cells = [*counts, note or f"{row['error']:.1e}"]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Export everything, print a table, write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RIVALS), help="rivals (default: all)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows = ours()
    for name in args.names:
        for state, steps in (("cold", 0), ("warm", WARM_STEPS)):
            rows[f"{name}, {state}"] = rival(name, steps)
            print(f"{name}, {state}: {rows[f'{name}, {state}']}", file=sys.stderr, flush=True)
    print(table(rows))
    if args.out:
        versions = {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__, "onnxruntime": ort.__version__}
        with contextlib.suppress(ModuleNotFoundError):
            versions["cache-dit"] = __import__("cache_dit").__version__
        write_record(args.out, {"versions": versions, "opset": OPSET, "rows": rows})


if __name__ == "__main__":
    main()
