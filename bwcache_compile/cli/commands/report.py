"""Make a video with the cached model and write what was found and done as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bwcache_compile as bw
from bwcache_compile.calibration import CalibrationPlan
from bwcache_compile.cli.generation import generation
from bwcache_compile.cli.models import head, loaded, transformed
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError, UsageError
from bwcache_compile.cli.screen import Screen
from bwcache_compile.cli.written import check_writable
from bwcache_compile.ir.compare import Verify
from bwcache_compile.printing import bytes_text


def report_model(
    screen: Screen,
    named: Named,
    out: Path,
    config: bw.CacheConfig | None,
    plan: CalibrationPlan | None,
    images: Sequence[Path],
    steps: int,
    sampler: str | None,
    blocks: Sequence[str] | None,
    verify: Verify,
) -> None:
    """Run one generation of the cached model and write its report, whole or not at all.

    Raises:
        UsageError: A picture is not there.
        CommandError: The page cannot be written.
        ConfigError: A picture is no PNG, JPEG or WebP.
        ImportError: jinja2 is not installed.
    """
    check_writable(out)
    if missing := [image for image in images if not image.is_file()]:
        raise UsageError(f"there is no file {missing[0]}")
    source = loaded(screen, named)
    cached = transformed(screen, source, config, blocks, verify=verify)
    with screen.progress("making a video", None if sampler else steps) as step:
        made = generation(source, sampler, steps, step)
        made.make(cached)
    with screen.progress("writing the report"):
        try:
            bw.write_report(out, cached, plan=plan, images={image.stem: image for image in images})
        except OSError as error:
            raise CommandError(f"cannot write {out}: {error.strerror}") from error
    run, size = cached.report(), out.stat().st_size
    document = {**head(source), "generation": made.how, "report": str(out), "bytes": size, **run.to_dict()}
    screen.show(document, f"{source.title}: {made.how}", str(run), f"wrote {out}, {bytes_text(size)}")
