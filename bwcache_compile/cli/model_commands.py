"""The commands that take a model, and their options. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bwcache_compile.cli.options import (
    At,
    Blocks,
    ConfigFile,
    Diffusers,
    Example,
    Factory,
    InputsFile,
    Json,
    PlanFile,
    Sampler,
    Set,
    Steps,
    Traceback,
    Verify,
)
from bwcache_compile.cli.outcome import outcome


def inspect(
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    set_: Set = None,
    plan: PlanFile = None,
    at: At = None,
    blocks: Blocks = None,
    verify: Verify = "close",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Show blocks, rejected candidates, region and memory.

    Also live-ins and live-outs, the cache of one context, and the share of the model's work that a reused step skips.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.inspect import inspect_model
        from bwcache_compile.cli.named import Named
        from bwcache_compile.cli.settings import settings

        inspect_model(screen, Named(model, diffusers, config, inputs, example), settings(set_, plan, at), blocks, verify)


def diff(
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    set_: Set = None,
    plan: PlanFile = None,
    at: At = None,
    blocks: Blocks = None,
    verify: Verify = "close",
    passes: Annotated[
        list[str] | None, typer.Option("--pass", metavar="NAME", help="Show this pass; all shows each. Default: all passes together.")
    ] = None,
    guard: Annotated[Literal["host", "graph"], typer.Option(help="Who decides: the caller, or the graph.")] = "host",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Show what the passes changed in the graph."""
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.diff import diff_model
        from bwcache_compile.cli.named import Named
        from bwcache_compile.cli.settings import settings

        named = Named(model, diffusers, config, inputs, example)
        diff_model(screen, named, settings(set_, plan, at), blocks, verify, passes or (), guard)


def profile(
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    steps: Steps = 20,
    generate: Sampler = None,
    tokens: Annotated[int, typer.Option(min=1, help="Measure one token in this many.")] = 1,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves into this file too; needs matplotlib.")] = None,
    blocks: Blocks = None,
    verify: Verify = "close",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Show how much each block changes at each step.

    Every step of a generation is computed; the relative L1 change of each block's output is what the policies look at.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.profile import profile_model
        from bwcache_compile.cli.named import Named

        profile_model(screen, Named(model, diffusers, config, inputs, example), steps, generate, tokens, png, blocks, verify)


def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to save the plan.")],
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    steps: Steps = 20,
    generate: Sampler = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of computed steps; may be given several times. [default: 0.4 0.3 0.2]")
    ] = None,
    anchors: Annotated[int, typer.Option(min=1, help="Computed steps that a reused step combines.")] = 4,
    cut: Annotated[Literal["output", "blocks"], typer.Option(help="What is kept: the model's outputs, or those of its blocks.")] = "output",
    effort: Annotated[Literal["quick", "thorough"], typer.Option(help="At most 4 full generations, or 10.")] = "quick",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Find out which steps to compute, and save a plan.

    Makes one video several times; the plan says how to combine the last computed steps at the others, for each budget.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.calibrate import calibrate_model
        from bwcache_compile.cli.named import Named

        named = Named(model, diffusers, config, inputs, example)
        calibrate_model(screen, named, out, steps, generate, budget or (0.4, 0.3, 0.2), anchors, cut, effort)


def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="Where to write the bundle.")],
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    set_: Set = None,
    plan: PlanFile = None,
    at: At = None,
    blocks: Blocks = None,
    verify: Verify = "bitwise",
    format_: Annotated[Literal["onnx", "pt2", "aoti"], typer.Option("--format", help="What the graphs are written as.")] = "onnx",
    guarded: Annotated[bool, typer.Option(help="Add one ONNX graph that decides by itself.")] = False,
    blocks_once: Annotated[bool, typer.Option(help="Compile blocks that are alike once. Format aoti only.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    dynamic: Annotated[bool, typer.Option(help="Keep every size open that the model lets.")] = False,
    weights: Annotated[bool, typer.Option(help="Include the weights, or leave them to bwcache add-weights.")] = True,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write the cached model as a bundle.

    It is run beside torch while it is written; a failure leaves what was there.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.export import export_model
        from bwcache_compile.cli.named import Named
        from bwcache_compile.cli.settings import settings

        named = Named(model, diffusers, config, inputs, example)
        chosen = settings(set_, plan, at)
        export_model(screen, named, out, chosen, blocks, verify, format_, guarded, blocks_once, opset, dynamic, weights)


def report(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the page.")],
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    set_: Set = None,
    plan: PlanFile = None,
    at: At = None,
    blocks: Blocks = None,
    verify: Verify = "close",
    steps: Steps = 20,
    generate: Sampler = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture to show, such as a contact sheet; may be given several times.")
    ] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Write an HTML page of what was found and of a run.

    Makes one video with the cached model. The page shows blocks, the diff of each pass, the indicators, the schedule, memory, and the
    frontier of a plan; it is one file that needs no network.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.report import report_model
        from bwcache_compile.cli.named import Named
        from bwcache_compile.cli.settings import read_plan, settings

        named = Named(model, diffusers, config, inputs, example)
        report_model(screen, named, out, settings(set_, plan, at), read_plan(plan), image or (), steps, generate, blocks, verify)


def bench(
    model: Factory = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    set_: Set = None,
    plan: PlanFile = None,
    at: At = None,
    blocks: Blocks = None,
    verify: Verify = "close",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 15,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile both with torch.compile.")] = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Time computed and reused steps against the model.

    The plain model, a computed step and a reused step take turns; medians are compared.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.bench import bench_model
        from bwcache_compile.cli.named import Named
        from bwcache_compile.cli.settings import settings

        bench_model(screen, Named(model, diffusers, config, inputs, example), settings(set_, plan, at), blocks, verify, rounds, compile_)
