"""What the benchmarks over the zoo share: the loop over its configurations, and a session beside the model that it came from."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bwcache_compile as bw
from benchmarks.record import write_record
from bwcache_compile.ir.compare import flat_outputs
from tests.zoo import ZOO, Entry

STEPS = 8


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what both benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("names", nargs="*", default=list(ZOO), help="configurations of the zoo; all by default")
    made.add_argument("--out", type=Path, help="where the record goes; it is written after every configuration, and keeps the others")
    return made


def transformed(entry: Entry) -> tuple[bw.CachedModel, dict[str, Any]]:
    """Return a cached model that takes both branches within 8 steps, and the begin of its row."""
    config = bw.CacheConfig(num_steps=STEPS, threshold=math.inf, reuse_interval=2)
    cached = bw.transform(entry.make(), config, example_kwargs=entry.call(0))
    return cached, {"class": entry.model, "blocks": len(cached.plan.blocks)}


def refused(error: Exception) -> dict[str, str]:
    """Return what a row says of a bundle that was not written or does not do as torch does."""
    return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _earlier(out: Path | None, head: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of a record that was made with the same versions and settings."""
    if out is None or not out.exists():
        return {}
    record = json.loads(out.read_text())
    rows: dict[str, Any] = record.pop("rows")
    return rows if record == head else {}


def run_each(names: list[str], run: Callable[[str], dict[str, Any]], out: Path | None, about: dict[str, Any]) -> None:
    """Run configurations one after another; print and record what came of each."""
    warnings.simplefilter("ignore")
    head = {"torch": torch.__version__.partition("+")[0], **about}
    rows = _earlier(out, head)
    for name in names:
        try:
            rows[name] = run(name)
        except ModuleNotFoundError as error:
            rows[name] = {"class": ZOO[name].model, "skipped": f"needs {error.name}"}
        print(name, json.dumps(rows[name]), flush=True)
        if out:
            write_record(out, {**head, "rows": {name: rows[name] for name in ZOO if name in rows}})


def _tensors(returned: Any) -> Iterator[torch.Tensor]:
    """Yield what a session returned, whatever form it has."""
    if isinstance(returned, (dict, list, tuple)):
        for value in returned.values() if isinstance(returned, dict) else returned:
            yield from _tensors(value)
    elif returned is not None:
        yield torch.as_tensor(returned)


def compare(entry: Entry, cached: bw.CachedModel, session: Any, handed: Callable[[Any], Any]) -> tuple[str, float]:
    """Run a model and a session of its bundle over all steps, on the inputs that the zoo draws for each.

    Args:
        entry: The configuration.
        cached: The model.
        session: The session.
        handed: Turns a step's inputs into what the session takes.

    Returns:
        The decisions (`#` computed, `.` reused), and the largest error relative to the largest value of an output.

    Raises:
        ValueError: The decisions differ.
    """
    cached.reset()
    worst = 0.0
    for step in range(STEPS):
        with torch.no_grad():
            expected = [value for value in flat_outputs(cached(**entry.inputs(step))) if isinstance(value, torch.Tensor)]
        actual = list(_tensors(session(**handed(entry.inputs(step)))))
        for want, got in zip(expected, actual, strict=True):
            if not torch.equal(want, got):
                worst = max(worst, float((got.double() - want.double()).abs().max() / want.double().abs().max()))
    ours, theirs = ("".join("#" if r.computed else "." for r in run.report().contexts["default"].steps) for run in (session, cached))
    if ours != theirs:
        raise ValueError(f"decisions differ: {ours} instead of {theirs}")
    return ours, worst
