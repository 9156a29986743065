"""Compare how a graph changed with what a test says, written inline."""

from __future__ import annotations

import difflib
import os

from torch.export import ExportedProgram
from torch.fx import GraphModule

from bwcache_compile.capture.flatten import flat_program
from bwcache_compile.errors import ConfigError
from bwcache_compile.ir.graph_text import GraphSnapshot, diff_graphs, format_graph
from bwcache_compile.runtime import CachedModel

ACCEPT = "EXPECTTEST_ACCEPT"
"""The environment variable that has expected text replaced in the test; expecttest's own."""

Graph = GraphModule | ExportedProgram | GraphSnapshot | str


def _text(graph: Graph, depth: int) -> str:
    if isinstance(graph, str):
        return graph
    if isinstance(graph, GraphSnapshot):
        return graph.text
    if isinstance(graph, ExportedProgram):
        graph = flat_program(graph, "the exported program").compute
    if not isinstance(graph, GraphModule):
        raise ConfigError(
            f"assert_graph_diff expects an ExportedProgram, a GraphModule, a snapshot or a printed graph, got {type(graph).__name__}."
        )
    return format_graph(graph, depth)


def _diff(before: Graph | CachedModel, after: Graph, name: str, depth: int) -> str:
    if isinstance(before, CachedModel):
        diffs = before.graph_diff()
        if not isinstance(after, str) or after not in diffs:
            raise ConfigError(f"with a cached model, `after` must be one of {', '.join(map(repr, diffs))}, got {after!r}.")
        return diffs[after].text
    text = diff_graphs(_text(before, depth), _text(after, depth), name)
    return text if name else text.partition("\n")[2]


def assert_graph_diff(before: Graph | CachedModel, after: Graph, expected: str, *, name: str = "", depth: int = 8) -> None:
    """Check that the lines in which two graphs differ are the expected ones.

    With the environment variable `EXPECTTEST_ACCEPT=1`, text that differs is replaced in the test's source instead; `expected` must
    be a triple-quoted literal of the call then.

    Args:
        before: A program that `torch.export` made, a `GraphModule`, a snapshot of one that was edited in place
            (`ir.graph_text.snapshot`), or a printed graph (`format_graph`). Or a cached model.
        after: The same. Of a cached model: the name of a pass, or "whole", as in `cached.graph_diff()`.
        expected: One line for each that differs, `-` before and `+` after; empty if none does.
        name: Heads the diff as `@@ name`, if given.
        depth: How deep graphs are printed that a graph calls; 0 prints the calls alone.

    Raises:
        AssertionError: The diff is another one; the message shows how it differs from the expected one.
        ConfigError: There is no such pass, or `before` or `after` is no graph.
    """
    __tracebackhide__ = True
    actual = _diff(before, after, name, depth)
    if actual == expected:
        return
    if os.environ.get(ACCEPT):
        try:
            from expecttest import assert_expected_inline
        except ModuleNotFoundError as error:
            raise ImportError(f'{ACCEPT} needs expecttest: pip install "bwcache-compile[testing]".') from error
        assert_expected_inline(actual, expected, skip=1)
        return
    lines = list(difflib.unified_diff(expected.splitlines(), actual.splitlines(), n=3, lineterm=""))[2:]
    shown = "\n".join("  ..." if line.startswith("@@ -") else f"  {line}" for line in lines) or "  (line breaks at the end alone)"
    raise AssertionError(
        f"the graph diff is not the expected one (first column: - expected, + found):\n{shown}\n"
        f"  If it is right, run the test with {ACCEPT}=1, which writes it into the source, and read it there."
    )
