"""assert_graph_diff: what it compares, what it says, and that it writes what it is told to accept."""

from __future__ import annotations

import runpy
import textwrap
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import bwcache_compile as bw
from bwcache_compile.ir.graph_text import snapshot
from bwcache_compile.passes import canonicalize
from bwcache_compile.testing import assert_graph_diff
from tests.models import Casting, OneStream, captured


def exported(depth: int) -> torch.export.ExportedProgram:
    model = OneStream(depth).eval().requires_grad_(False)
    return torch.export.export(model, model.example())


def test_exported_programs_are_printed_without_their_parameters() -> None:
    assert_graph_diff(
        exported(1),
        exported(2),
        """\
-linear_4: f32[1, 6, 4] = linear(add, head.weight, head.bias)
-return linear_4
+mul_1: f32[1, 6, 8] = mul(add, linear_1)
+linear_4: f32[1, 6, 8] = linear(mul_1, blocks.1.up.weight, blocks.1.up.bias)
+gelu_1: f32[1, 6, 8] = gelu(linear_4)
+linear_5: f32[1, 6, 8] = linear(gelu_1, blocks.1.down.weight, blocks.1.down.bias)
+add_1: f32[1, 6, 8] = add(add, linear_5)
+linear_6: f32[1, 6, 4] = linear(add_1, head.weight, head.bias)
+return linear_6""",
    )


def test_a_snapshot_of_a_graph_that_is_edited_in_place() -> None:
    program = captured(Casting(depth=1))
    before = snapshot(program.compute)
    assert_graph_diff(before, snapshot(program.compute), "")
    after = canonicalize(program).program.compute
    with pytest.raises(AssertionError) as error:
        assert_graph_diff(before, after, "", name="canonicalize")
    assert "+dropout" not in str(error.value)
    assert "  +-dropout: f32[1, 6, 8] = dropout(add, 0.1, False)\n" in str(error.value)


def test_the_pass_of_a_cached_model() -> None:
    cached = bw.transform(OneStream(depth=2).eval(), num_steps=4, example_args=OneStream().example())
    assert_graph_diff(
        cached,
        "insert_cache",
        """\
@@ insert_cache
+copy__default: f32[1, 6, 8] = copy_(cache.output_0, region_0)""",
    )
    with pytest.raises(bw.ConfigError) as error:
        assert_graph_diff(cached, "insert_cash", "")
    assert_expected_inline(
        str(error.value),
        """\
with a cached model, `after` must be one of 'canonicalize', 'hoist_sizes', 'arrange_sources', 'split_region', 'insert_cache',\
 'insert_indicator', 'insert_policy', 'lift_cache_state', 'specialize', 'whole', got 'insert_cash'.""",
    )


def test_the_message_shows_how_the_diffs_differ() -> None:
    with pytest.raises(AssertionError) as error:
        assert_graph_diff("a\nb\nc\nd\ne", "A\nb\nC\nd", "-a\n+A\n-c\n+D\n-e", name="")
    assert_expected_inline(
        str(error.value),
        """\
the graph diff is not the expected one (first column: - expected, + found):
  ...
   -a
   +A
   -c
  -+D
  ++C
   -e
  If it is right, run the test with EXPECTTEST_ACCEPT=1, which writes it into the source, and read it there.""",
    )


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(bw.ConfigError, match="a snapshot or a printed graph, got int"):
        assert_graph_diff(3, "a", "")  # type: ignore[arg-type]


def test_what_is_accepted_is_written_into_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        textwrap.dedent('''\
            from bwcache_compile.testing import assert_graph_diff

            assert_graph_diff("a\\nb", "a\\nc", """old""")
            assert_graph_diff("a", "b", """-a\\n+b""")
            ''')
    )
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    runpy.run_path(str(source))
    assert source.read_text().endswith(
        'assert_graph_diff("a\\nb", "a\\nc", """\\\n-b\n+c""")\nassert_graph_diff("a", "b", """-a\\n+b""")\n'
    )
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    runpy.run_path(str(source))
