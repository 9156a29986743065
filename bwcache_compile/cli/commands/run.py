"""Run a bundle for a few steps and show its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bwcache_compile as bw
from bwcache_compile.cli.bundles import BundleLoop, opened, steps_of
from bwcache_compile.cli.screen import Screen
from bwcache_compile.printing import bytes_text


def run_bundle(
    screen: Screen, bundle: Path, steps: int | None, contexts: Sequence[str], guarded: bool, device: str | None, allow_code: bool
) -> None:
    """Run a bundle and show which steps it computed.

    Raises:
        BundleError: See `load`.
    """
    with screen.progress("opening the bundle"):
        opened(bundle, allow_code)
        session = bw.load(bundle, guarded=guarded, device=device, allow_code=allow_code, verify_hashes=False)
    loop = BundleLoop(session.manifest, steps_of(session.manifest, steps))
    largest: dict[str, int] = {}
    with screen.progress("running", len(loop.moves.times)) as step:
        for _ in loop.run(session, contexts, step):
            for name, context in session.report().contexts.items():
                largest[name] = max(largest.get(name, 0), context.state_bytes)
    report = session.report()
    manifest, config = session.manifest, session.cache_config
    document = {
        "bundle": str(bundle),
        "model": manifest.model,
        "format": manifest.graph_format,
        "guarded": guarded,
        "generation": f"{len(loop.moves.times)} steps on drawn inputs: {loop.moves}",
        "policy": config.policy,
        "reuse": config.reuse,
        **report.to_dict(),
    }
    screen.show(
        document,
        f"{session!r}",
        str(document["generation"]),
        str(report),
        f"cache: {', '.join(f'{name} {bytes_text(size)}' for name, size in largest.items())}",
    )
