"""Record the text of every graph of the zoo: `python -m benchmarks.graph_texts --out before.json`.

Run it before and after a change that must not change graphs, the second time with `--against before.json`: it exits with 1 and prints
what differs. A configuration's graphs are its captured program through both pipelines: `compute` and `reuse`, and `guarded`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import warnings
from multiprocessing import get_context
from pathlib import Path

import torch

import bwcache_compile as bw
from benchmarks.record import write_record
from bwcache_compile.ir.graph_text import format_graph
from tests.zoo import ZOO


def texts(name: str) -> dict[str, str]:
    """Return the graphs of one configuration as text, by kind."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entry = ZOO[name]
    found: dict[str, str] = {}
    try:
        for guard in ("host", "graph"):
            cached = bw.transform(entry.make(), guard=guard, example_kwargs=entry.call(0), verify=False)
            program = cached.program
            for kind in ("compute", "reuse", "guarded"):
                graph = getattr(program, kind)
                if graph is not None:
                    found[f"{guard} {kind}"] = format_graph(graph)
    except ModuleNotFoundError as error:
        found["skipped"] = f"needs {error.name}"
    except (bw.CaptureError, bw.NoBlocksFoundError, bw.UnsupportedGraphError) as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    return found


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """Return the lines that differ between two records."""
    lines: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        for kind in sorted(old.keys() | new.keys()):
            title = f"{name} {kind}"
            lines += difflib.unified_diff(old.get(kind, "").splitlines(), new.get(kind, "").splitlines(), title, title, lineterm="", n=0)
    return lines


def main() -> None:
    """Record the graphs, or compare them with a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ZOO), help="configurations of the zoo; all by default")
    parser.add_argument("--out", type=Path, help="where the texts go")
    parser.add_argument("--against", type=Path, help="a record made before, to compare with")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    with get_context("spawn").Pool(asked.workers) as pool:
        record = dict(zip(asked.names, pool.imap(texts, asked.names), strict=True))
    if asked.out:
        write_record(asked.out, record)
    print(f"{len(record)} configurations, {sum(len(kinds) for kinds in record.values())} graphs")
    if asked.against:
        before = json.loads(asked.against.read_text())
        lines = differences({name: before.get(name, {}) for name in asked.names}, record)
        print("\n".join(lines[:200]) if lines else "no graph differs")
        raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
