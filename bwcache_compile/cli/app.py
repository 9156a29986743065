"""The command line `bwcache`."""

from __future__ import annotations

from typing import Annotated

import typer

from bwcache_compile.cli import bundle_commands, model_commands

app = typer.Typer(
    name="bwcache",
    help="Find the repeated blocks of a diffusion transformer, cache them, and see what that does.",
    epilog="Exit codes: 0 success, 1 failure, 2 wrong command line, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import bwcache_compile

        typer.echo(bwcache_compile.__version__)
        raise typer.Exit


@app.callback()
def bwcache(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Find the repeated blocks of a diffusion transformer, cache them, and see what that does."""


for _command in (
    model_commands.inspect,
    model_commands.diff,
    model_commands.profile,
    model_commands.calibrate,
    model_commands.export,
    bundle_commands.add_weights,
    bundle_commands.check,
    bundle_commands.run,
    model_commands.bench,
    model_commands.report,
):
    app.command()(_command)
