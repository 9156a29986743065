"""The commands that take a bundle, and their options. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bwcache_compile.cli.options import AllowCode, ConfigFile, Device, Diffusers, Example, InputsFile, Json, Traceback
from bwcache_compile.cli.outcome import outcome

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="A folder that bwcache export or bw.export wrote.")]


def check(
    bundle: Bundle,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Compare with this model: package.module:factory or file.py:factory.")
    ] = None,
    diffusers: Diffusers = None,
    config: ConfigFile = None,
    inputs: InputsFile = None,
    example: Example = None,
    device: Device = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Check a bundle: files, graphs, and its model.

    Every hash is compared and every graph is run over several steps, computed and reused. With a model, the check of the export is done
    again: the bundle runs beside it in torch.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.check import check_bundle
        from bwcache_compile.cli.named import Named

        named = Named(model, diffusers, config, inputs, example)
        check_bundle(screen, bundle, named if named != Named() else None, device, allow_code)


def add_weights(
    bundle: Bundle,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", show_default=False, help="The model's safetensors file, its index of shards, or the folder that holds one."
        ),
    ],
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Add the weights to a bundle that was exported without them.

    The weight file is written from the model's own files and is the one that a full export writes; nothing else is changed.
    """
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.add_weights import complete_bundle

        complete_bundle(screen, bundle, source)


def run(
    bundle: Bundle,
    steps: Annotated[int | None, typer.Option(min=1, show_default=False, help="Denoising steps. [default: the bundle's, or 10]")] = None,
    context: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A stream of calls; may be given several times.")] = None,
    guarded: Annotated[bool, typer.Option(help="Run the graph that decides by itself.")] = False,
    device: Device = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Run a bundle on drawn inputs, and print its report."""
    with outcome(as_json, traceback) as screen:
        from bwcache_compile.cli.commands.run import run_bundle

        run_bundle(screen, bundle, steps, context or ("default",), guarded, device, allow_code)
