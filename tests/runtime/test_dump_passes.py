"""dump_passes: what each pass found and left, as files; all of them or none."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

import bwcache_compile as bw
from bwcache_compile.ir.graph_text import format_graph
from bwcache_compile.passes import Guard
from tests.models import OneStream


def made(guard: Guard = "host") -> bw.CachedModel:
    return bw.transform(OneStream(depth=2).eval(), num_steps=4, guard=guard, example_args=OneStream().example())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_pass_starts_where_the_one_before_ended(tmp_path: Path) -> None:
    cached = made()
    files = cached.dump_passes(tmp_path / "new" / "dump")
    assert names(tmp_path / "new" / "dump") == sorted(path.name for path in files)
    assert names(tmp_path / "new") == ["dump"]
    text = {path.name.removesuffix(".txt"): path.read_text() for path in files}
    stems = list(dict.fromkeys(name.rpartition(".")[0] for name in text))
    assert stems[:2] == ["01_canonicalize", "02_hoist_sizes"]
    assert stems[-2:] == ["09_specialize", "whole"]
    for one, other in itertools.pairwise(stems[:-1]):
        assert text[f"{one}.after"] == text[f"{other}.before"]
    assert text["whole.before"] == text["01_canonicalize.before"] == format_graph(cached.program.fresh().compute) + "\n"
    assert text["whole.after"] == format_graph(cached.program.reuse) + "\n"
    for stem, diff in zip(stems, cached.graph_diff().values(), strict=True):
        assert text[f"{stem}.diff"] == (diff.text + "\n" if diff.text else "")


def test_a_dump_takes_the_place_of_an_earlier_one_alone(tmp_path: Path) -> None:
    host, graph = made(), made("graph")
    host.dump_passes(tmp_path)
    graph.dump_passes(tmp_path)
    assert "09_insert_cond.diff.txt" in names(tmp_path)
    assert "09_specialize.diff.txt" not in names(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(bw.ExportError, match=r"contains notes\.md, which is not a dump of passes\. Choose another directory\."):
        host.dump_passes(tmp_path)
    assert names(tmp_path) == before


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = made()
    cached.dump_passes(tmp_path / "dump")
    before = names(tmp_path / "dump")
    rename = os.rename

    def full(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(bw.ExportError, match="No space left on device"):
        made("graph").dump_passes(tmp_path / "dump")
    assert names(tmp_path) == ["dump"]
    assert names(tmp_path / "dump") == before


def test_nothing_captured_is_nothing_to_dump(tmp_path: Path) -> None:
    with pytest.raises(bw.StateError, match="nothing is captured yet"):
        bw.transform(OneStream().eval()).dump_passes(tmp_path / "dump")
    assert not list(tmp_path.iterdir())
