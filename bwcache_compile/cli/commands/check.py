"""Check a bundle again: its manifest, every hash, and what its graphs compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import bwcache_compile as bw
from bwcache_compile.bundle.files import Bundle
from bwcache_compile.bundle.session import Session
from bwcache_compile.cli.bundles import BundleLoop, BundleStep, as_array, opened, summary
from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError
from bwcache_compile.cli.screen import Screen, table
from bwcache_compile.policies import POLICIES
from bwcache_compile.printing import bytes_text

_STEPS = 6
_TOLERANCE = 1e-4


def _difference(one: Any, other: Any) -> float:
    """Return the largest difference of two arrays, relative to the largest value of the second."""
    if one.shape != other.shape:
        return float("inf")
    if not np.array_equal(np.isnan(one), np.isnan(other)):
        return float("inf")
    gap = np.nan_to_num(np.abs(one.astype("complex128") - other.astype("complex128")))
    return float(gap.max(initial=0) / max(float(np.nan_to_num(np.abs(other)).max(initial=0)), 1e-30))


@dataclasses.dataclass
class _Checks:
    """What was checked, one line each."""

    tolerance: float
    rows: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def passed(self, name: str, detail: str) -> None:
        self.rows.append({"check": name, "detail": detail})

    def close(self, name: str, error: float) -> None:
        """Note an error within the tolerance.

        Raises:
            CommandError: It is larger.
        """
        if not error <= self.tolerance:
            raise CommandError(f"{name} by {error:.3g}, relative to the largest value; the tolerance is {self.tolerance:g}")


def _reaching_both(session: Session) -> None:
    """Choose settings under which a few steps compute and reuse, where the policy has a threshold."""
    config = dataclasses.replace(session.cache_config, timesteps=None)
    at_threshold = POLICIES[config.policy].at_threshold
    session.cache_config = config if at_threshold is None else at_threshold(config, float("inf"), _STEPS + 1)


def _steps(mask: tuple[int, ...] | None) -> int:
    """Return how many steps to run: enough for a mask to reuse."""
    if mask is None:
        return _STEPS
    return min(len(mask), max(_STEPS, mask.index(1) + 2 if 1 in mask else 0))


def _run(session: Session, loop: BundleLoop, form: str) -> list[BundleStep]:
    """Run a session from the start of a generation.

    Raises:
        CommandError: A reused step changed the cache.
    """
    session.reset()
    _reaching_both(session)
    done: list[BundleStep] = []
    before: dict[str, Any] = {}
    last = len(loop.moves.times) - 1
    for index, result in enumerate(loop.run(session)):
        step = result["default"]
        slots = {name: as_array(value) for name, value in session.state("default").items()} if index < last else {}
        if not step.computed:
            changed = [name for name, value in slots.items() if name in before and not np.array_equal(value, before[name], equal_nan=True)]
            if changed:
                raise CommandError(f"{form}, step {index}: a reused step changed the slot {changed[0]}")
        before = slots
        done.append(step)
    return done


def _pattern(steps: list[BundleStep]) -> str:
    return "".join("#" if step.computed else "." for step in steps)


def _not_finite(steps: list[BundleStep]) -> list[str]:
    """Return the outputs that hold a value that is not finite."""
    return sorted({name for step in steps for name, value in step.outputs.items() if not np.isfinite(value).all()})


def _same(one: list[BundleStep], other: list[BundleStep], checks: _Checks, what: str) -> float:
    """Compare two runs step by step; return the largest error.

    Raises:
        CommandError: A decision or an output differs.
    """
    if _pattern(one) != _pattern(other):
        raise CommandError(f"{what} decide differently: {_pattern(one)} and {_pattern(other)} (# computed, . reused)")
    worst = 0.0
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        for name, value in a.outputs.items():
            error = _difference(value, b.outputs[name])
            checks.close(f"{what} differ at step {index} in the output {name}", error)
            worst = max(worst, error)
    return worst


def _forms(bundle: Bundle, folder: Path, device: str | None, allow_code: bool) -> Mapping[str, Session]:
    opened = {"pair": bw.load(folder, device=device, allow_code=allow_code, verify_hashes=False)}
    if "guarded" in bundle.manifest.graphs:
        opened["guarded"] = bw.load(folder, device=device, guarded=True, verify_hashes=False)
    return opened


def check_bundle(screen: Screen, folder: Path, against: Named | None, device: str | None, allow_code: bool) -> None:
    """Check a bundle and show what was checked.

    Raises:
        BundleError: A file is missing, altered or does not open.
        CommandError: The graphs compute something else than they should.
    """
    with screen.progress("hashing"):
        bundle = opened(folder, allow_code)
    manifest = bundle.manifest
    recorded = manifest.self_check
    checks = _Checks(float(recorded.get("tolerance") or _TOLERANCE))
    total = sum(entry.bytes for entry in manifest.files.values())
    checks.passed("manifest", f"{manifest.model}, {manifest.graph_format}, {len(manifest.blocks)} blocks, {len(manifest.graphs)} graphs")
    checks.passed("hashes", f"{len(manifest.files)} files, {bytes_text(total)}")
    with screen.progress("opening the graphs"):
        sessions = _forms(bundle, folder, device, allow_code)
    loop = BundleLoop(
        dataclasses.replace(manifest, config=dataclasses.replace(manifest.config, timesteps=None)), _steps(manifest.config.steps_mask)
    )
    runs: dict[str, list[BundleStep]] = {}
    with screen.progress("running the graphs"):
        for form, session in sessions.items():
            runs[form] = _run(session, loop, form)
            checks.passed(f"{form} runs", f"steps {_pattern(runs[form])}, a reused step leaves the cache as it is")
        again = _same(_run(sessions["pair"], loop, "pair"), runs["pair"], checks, "two runs of the pair")
        checks.passed("repeatable", f"two runs of the pair, largest error {again:.2g}")
        if "guarded" in runs:
            error = _same(runs["guarded"], runs["pair"], checks, "the guarded graph and the pair")
            checks.passed("guarded = pair", f"same decisions, largest error {error:.2g}")
    if against is not None:
        from bwcache_compile.cli.commands.check_model import check_against_model

        found = check_against_model(screen, manifest, sessions, against)
        checks.passed("as the model", f"steps {found['steps']} beside torch, largest error {found['largest_error']:.2g}")
    if "." not in _pattern(runs["pair"]):
        screen.warn("no step reused, so the reuse graph was opened and not run")
    for name in _not_finite(runs["pair"]):
        screen.warn(f"the output {name} is not finite on drawn inputs")
    document = {
        "bundle": str(folder),
        "ok": True,
        **summary(manifest),
        "files": {name: entry.to_json() for name, entry in manifest.files.items()},
        "checks": checks.rows,
        "steps": {form: _pattern(steps) for form, steps in runs.items()},
        "tolerance": checks.tolerance,
    }
    rows = [(row["check"], row["detail"]) for row in checks.rows]
    export_said = f"at export, beside torch: steps {recorded.get('steps')}, largest error {recorded.get('largest_error', 0):.2g}"
    screen.show(document, f"{folder}: ok", table(("checked", "found"), rows), export_said)
