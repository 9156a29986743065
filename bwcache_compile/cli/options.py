"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Factory = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="package.module:factory or path/to/file.py:factory; the factory returns (model, args), (model, args, kwargs) or"
        " (model, kwargs).",
    ),
]
Diffusers = Annotated[str | None, typer.Option(metavar="CLASS", help="A diffusers model class with drawn weights; needs --config.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Its configuration as JSON.")]
InputsFile = Annotated[
    Path | None,
    typer.Option("--inputs", metavar="FILE", help="Shapes and dtypes of its inputs as JSON, over those derived."),
]
Example = Annotated[str | None, typer.Option(metavar="NAME", help="A bundled model: tiny_video_dit.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of CacheConfig; may be given several times."),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="A calibration plan, as bwcache calibrate saves it.")]
At = Annotated[float | None, typer.Option(metavar="BUDGET", help="Which entry of the plan: its share of computed steps.")]
Blocks = Annotated[
    list[str] | None,
    typer.Option("--blocks", metavar="PATH", help="Cache these modules or stacks instead of those found."),
]
Verify = Annotated[
    Literal["bitwise", "close"],
    typer.Option(help="How the captured graph must equal the model: every bit, or up to rounding (for models that choose kernels)."),
]
Steps = Annotated[int, typer.Option(min=2, help="Denoising steps of a generation.")]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--generate",
        metavar="FUNCTION",
        help="module:function that makes one video with the model that it is given and returns it. By default the model's example inputs"
        " are denoised with Euler steps.",
    ),
]
AllowCode = Annotated[bool, typer.Option(help="Open bundles of format pt2 and aoti, which can run any code.")]
Device = Annotated[str | None, typer.Option(help="Where the graphs run: cpu, cuda or cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]
