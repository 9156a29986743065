"""Each command on a model of a temporary file, on tiny diffusers models and on the bundled one; what `--json` says is read."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bwcache_compile as bw
from bwcache_compile.cli.app import app
from bwcache_compile.cli.diffusers_models import diffusers_source
from tests.cli.conftest import Run
from tests.zoo import ZOO

ROOT = Path(bw.__file__).parents[1]
Words = list[str]


@pytest.fixture(
    params=["factory", pytest.param("wan", marks=pytest.mark.zoo), pytest.param("hunyuan_video", marks=pytest.mark.zoo),
            pytest.param("tiny_video_dit", marks=pytest.mark.slow)]
)  # fmt: skip
def model(request: pytest.FixtureRequest, factory: Path, diffusers_model: Callable[[str], Words]) -> Words:
    """The words that name a model."""
    if request.param == "factory":
        return [f"{factory}:positional"]
    if request.param == "tiny_video_dit":
        return ["--example", "tiny_video_dit"]
    return diffusers_model(request.param)


def blocks_of(model: Words) -> int:
    if model[0] == "--example":
        return 12
    return sum(ZOO[Path(model[3]).stem].stacks.values()) if model[0] == "--diffusers" else 4


@pytest.mark.parametrize("form", ["positional", "both", "keywords"])
def test_inspect_a_model_by_factory(bwcache: Run, factory: Path, form: str) -> None:
    done = bwcache("inspect", "--json", f"{factory}:{form}")
    assert done.code == 0, done.err
    found = done.document
    assert [block["name"] for block in found["blocks"]] == [f"mixers.{i}" for i in range(4)]
    assert {block["module_type"] for block in found["blocks"]} == {"Mixer"}
    assert all(block["cached"] for block in found["blocks"])
    assert found["stacks"] == [{"name": "mixers", "count": 4, "module_type": "Mixer", "first": "mixers.0", "last": "mixers.3"}]
    assert found["inputs"] == [{"name": "noisy", "shape": [2, 7, 5], "dtype": "float32"}, {"name": "t", "shape": [2], "dtype": "float32"}]
    (region,) = found["plan"]["regions"]
    assert [value["shape"] for value in region["live_outs"]] == [[2, 7, 12]]
    assert {"shape": [2, 7, 12], "dtype": "float32"}.items() <= region["live_ins"][0].items()
    assert found["plan"]["state_bytes"] == sum(slot["bytes"] for slot in region["slots"])
    assert 0.5 < found["plan"]["work"]["cached"] < 1


@pytest.mark.parametrize("name", ["wan", pytest.param("hunyuan_video", marks=pytest.mark.zoo)])
def test_inspect_diffusers_models(bwcache: Run, diffusers_model: Callable[[str], Words], name: str) -> None:
    done = bwcache("inspect", "--json", *diffusers_model(name))
    assert done.code == 0, done.err
    assert [block["name"] for block in done.document["blocks"]] == ZOO[name].block_names()
    reasons = {r["stack"]: r["reason"] for r in done.document["rejections"]}
    assert all(reasons.values())
    assert ("context_embedder.token_refiner.refiner_blocks" in reasons) == (name == "hunyuan_video")


def test_inspect_for_people(bwcache: Run, model: Words) -> None:
    done = bwcache("inspect", *model)
    assert done.code == 0, done.err
    assert f"{blocks_of(model)} blocks" in done.out.splitlines()[0]
    for word in ("live-ins:", "live-outs:", "cache of one context:", "of the work is skipped on a reused step"):
        assert word in done.out


def test_inspect_with_settings(bwcache: Run, factory: Path) -> None:
    words = ("--set", "policy=static", "--set", "steps_mask=[0, 1]", "--set", "compute_first=1")
    found = bwcache("inspect", "--json", f"{factory}:both", *words).document
    assert [block["cached"] for block in found["blocks"]] == [False, True, True, True]
    assert found["plan"]["settings"]["policy"] == "static"
    chosen = bwcache("inspect", "--json", f"{factory}:both", "--blocks", "mixers.1", "--blocks", "mixers.2").document
    assert [block["name"] for block in chosen["blocks"]] == ["mixers.1", "mixers.2"]


def test_a_model_that_runs_kernels_of_its_own(bwcache: Run, factory: Path) -> None:
    """Whoever looks at it needs no equal bits; whoever exports it says that rounding will do."""
    looked = bwcache("inspect", "--json", f"{factory}:attentive")
    assert looked.code == 0, looked.err
    assert [block["name"] for block in looked.document["blocks"]] == ["layers.0", "layers.1", "layers.2"]
    refused = bwcache("export", f"{factory}:attentive", "-o", "bundle")
    assert refused.code == 1
    assert "With --verify close, a graph that differs from the model by rounding alone is taken." in refused.err


def test_diff(bwcache: Run, model: Words) -> None:
    whole = bwcache("diff", "--json", *model)
    assert whole.code == 0, whole.err
    found = whole.document
    assert set(found["diffs"]) == {"whole"}
    assert found["diffs"]["whole"]["blocks_guarded"] == blocks_of(model)
    assert found["diffs"]["whole"]["copied_parameters"] == 0
    assert {"insert_cache", "specialize"} <= set(found["passes"])


def test_diff_of_passes(bwcache: Run, factory: Path) -> None:
    each = bwcache("diff", "--json", f"{factory}:both", "--pass", "all").document
    assert list(each["diffs"]) == each["passes"]
    guarded = bwcache("diff", f"{factory}:both", "--pass", "insert_cache", "--pass", "insert_cond", "--guard", "graph")
    assert [line for line in guarded.out.splitlines() if line.startswith("@@")] == ["@@ insert_cache", "@@ insert_cond"]


def test_profile(bwcache: Run, model: Words) -> None:
    done = bwcache("profile", "--json", "--steps", "5", *model)
    assert done.code == 0, done.err
    found = done.document
    assert len(found["blocks"]) == blocks_of(model)
    contexts = found["contexts"]
    assert list(contexts) == (["cond", "uncond"] if model[0] == "--example" else ["default"])
    for context in contexts.values():
        assert [step["computed"] for step in context["steps"]] == [True] * 5
        first, *others = context["steps"]
        assert first["indicator"] is None
        for step in others:
            assert len(step["change"]) == blocks_of(model)
            assert step["indicator"] == pytest.approx(sum(step["change"]) / len(step["change"]), rel=1e-5)
            assert 0 < step["indicator"] < math.inf


def test_profile_with_a_sampler_of_ones_own(bwcache: Run, factory: Path) -> None:
    done = bwcache("profile", "--json", f"{factory}:both", "--generate", f"{factory}:sampler")
    assert done.code == 0, done.err
    assert len(done.document["contexts"]["default"]["steps"]) == 6
    shown = bwcache("profile", f"{factory}:both", "--generate", f"{factory}:sampler", "--png", "curve.png")
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "context default: 6 steps" in shown.out
    assert "mixers.3" in shown.out


def test_profile_a_model_without_a_time(bwcache: Run, factory: Path) -> None:
    done = bwcache("profile", "--json", "--steps", "4", f"{factory}:attentive")
    assert done.code == 0, done.err
    assert done.document["generation"] == "4 steps over the example inputs: the input x moves by Euler steps, no input is the time"
    assert len(done.document["contexts"]["default"]["steps"]) == 4


def test_calibrate(bwcache: Run, factory: Path, tmp_path: Path) -> None:
    words = (f"{factory}:both", "--steps", "8", "--budget", "0.5", "--budget", "0.25", "--anchors", "2", "--out", "plan.json")
    done = bwcache("calibrate", "--json", *words)
    assert done.code == 0, done.err
    assert [entry["computed"] for entry in done.document["entries"]] == [4, 2]
    assert (
        done.document["generation"]
        == "8 steps over the example inputs: the input noisy moves by Euler steps, the time t runs from 1 to 0.125"
    )
    plan = bw.CalibrationPlan.load("plan.json")
    assert [entry.psnr for entry in plan.entries] == [entry["psnr"] for entry in done.document["entries"]]


@pytest.mark.slow
def test_calibrate_then_export_check_and_run(bwcache: Run, model: Words, tmp_path: Path) -> None:
    plan, bundle = tmp_path / "plan.json", tmp_path / "bundle"
    done = bwcache("calibrate", "--json", *model, "--steps", "8", "--budget", "0.5", "--out", plan)
    assert done.code == 0, done.err
    (entry,) = done.document["entries"]
    assert entry["computed"] == 4
    assert bw.CalibrationPlan.load(plan).steps == 8

    written = bwcache("export", "--json", *model, "--plan", plan, "--out", bundle)
    assert written.code == 0, written.err
    assert set(written.document["files"]) == {"compute.onnx", "reuse.onnx", "weights.bin"}
    assert len(written.document["blocks"]) == blocks_of(model)

    checked = bwcache("check", "--json", bundle, *(["--model", model[0]] if len(model) == 1 else model))
    assert checked.code == 0, checked.err
    found = checked.document
    assert found["ok"] is True
    assert [row["check"] for row in found["checks"]] == ["manifest", "hashes", "pair runs", "repeatable", "as the model"]
    assert "." in found["steps"]["pair"]

    ran = bwcache("run", "--json", bundle, "--context", "cond", "--context", "uncond")
    assert ran.code == 0, ran.err
    for context in ran.document["contexts"].values():
        assert "".join("#" if step["computed"] else "." for step in context["steps"]) == "".join("#" if c else "." for c in entry["mask"])


def test_check_and_run_a_guarded_bundle(bwcache: Run, factory: Path, bundle: Path) -> None:
    checked = bwcache("check", "--json", "bundle", "--model", f"{factory}:keywords")
    assert checked.code == 0, checked.err
    names = [row["check"] for row in checked.document["checks"]]
    assert names == ["manifest", "hashes", "pair runs", "guarded runs", "repeatable", "guarded = pair", "as the model"]
    assert checked.document["steps"]["pair"] == checked.document["steps"]["guarded"]
    pair, guarded = (bwcache("run", "--json", "bundle", *form).document for form in ((), ("--guarded",)))
    assert [s["computed"] for s in pair["contexts"]["default"]["steps"]] == [s["computed"] for s in guarded["contexts"]["default"]["steps"]]
    assert len(pair["contexts"]["default"]["steps"]) == 12
    shown = bwcache("run", "bundle", "--steps", "3")
    assert "default: 3 computed, 0 reused  ###" in shown.out


def test_bundles_run_without_torch(bundle: Path) -> None:
    """As on a machine that is only deployed to."""
    code = (
        "import sys; sys.modules['torch'] = None; from bwcache_compile.cli.app import app\n"
        f"for words in (['run', {str(bundle)!r}], ['check', {str(bundle)!r}]):\n"
        "  try: app(words)\n"
        "  except SystemExit as end: assert not end.code"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "12 steps on drawn inputs" in done.stdout
    assert f"{bundle}: ok" in done.stdout


@pytest.mark.slow
def test_a_bundle_of_open_sizes(bwcache: Run, factory: Path) -> None:
    assert bwcache("export", f"{factory}:keywords", "--dynamic", "-o", "bundle").code == 0
    assert len(bw.load("bundle").manifest.symbols) == 1  # the batch; the mixing layers fix the number of tokens
    checked = bwcache("check", "--json", "bundle", "--model", f"{factory}:keywords")
    assert checked.code == 0, checked.err


@pytest.mark.slow
def test_bundles_with_code_are_opened_when_that_is_allowed(bwcache: Run, factory: Path) -> None:
    assert bwcache("export", f"{factory}:both", "--format", "pt2", "-o", "bundle").code == 0
    refused = bwcache("run", "bundle")
    assert refused.code == 1
    assert "--allow-code" in refused.error
    assert bwcache("run", "bundle", "--allow-code").code == 0
    assert bwcache("check", "bundle", "--allow-code", "--model", f"{factory}:both").code == 0


def test_bench(bwcache: Run, model: Words) -> None:
    done = bwcache("bench", "--json", "--rounds", "3", *model)
    assert done.code == 0, done.err
    found: dict[str, Any] = done.document
    assert set(found["seconds"]) == {"plain", "computed", "reused"}
    assert all(0 < times["min"] <= times["median"] <= times["max"] for times in found["seconds"].values())
    assert found["reused_over_plain"] == pytest.approx(found["seconds"]["reused"]["median"] / found["seconds"]["plain"]["median"])


def test_bench_where_no_step_reuses(bwcache: Run, factory: Path) -> None:
    done = bwcache("bench", f"{factory}:both", "--set", "policy=static", "--set", "steps_mask=[0, 0, 0]")
    assert done.code == 1
    assert done.error == "with these settings no step reuses, so there is no reused step to time"


def test_report(bwcache: Run, model: Words) -> None:
    words = ("--set", "policy=static", "--set", "steps_mask=[0, 0, 1, 0, 1]", "--steps", "5", "--out", "page.html")
    done = bwcache("report", "--json", *model, *words)
    assert done.code == 0, done.err
    contexts = done.document["contexts"]
    assert [[step["computed"] for step in context["steps"]] for context in contexts.values()] == [[True, True, False, True, False]] * len(
        contexts
    )
    page = Path("page.html").read_text()
    assert done.document["bytes"] == Path("page.html").stat().st_size
    assert page.startswith("<!DOCTYPE html>")
    assert all(block in page for block in done.document["blocks"])


def test_report_with_a_plan_and_a_picture(bwcache: Run, factory: Path) -> None:
    Path("sheet.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert bwcache("calibrate", f"{factory}:both", "--steps", "8", "--budget", "0.5", "--anchors", "2", "--out", "plan.json").code == 0
    words = ("report", f"{factory}:both", "--plan", "plan.json", "--steps", "8", "--image", "sheet.png", "--out", "page.html")
    done = bwcache(*words)
    assert done.code == 0, done.err
    assert "default: 4 computed, 4 reused  #.#.#..#" in done.out
    page = Path("page.html").read_text()
    assert 'alt="sheet"' in page
    assert "frontier" in page
    Path("sheet.png").unlink()
    missing = bwcache(*words)
    assert (missing.code, missing.error) == (2, "there is no file sheet.png")
    assert Path("page.html").read_text() == page


def test_json_stands_alone_whatever_a_factory_prints(bwcache: Run, factory: Path) -> None:
    done = bwcache("inspect", "--json", f"{factory}:noisy_factory")
    assert len(done.document["blocks"]) == 4
    assert "a line that the factory prints" in done.err


NOT_DERIVED = {"lumina_next", "hunyuan_dit", "stable_audio", "hunyuan_video_framepack"}
"""Configurations of the zoo that need an inputs file; docs/cli.md counts the others."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(set(ZOO) - NOT_DERIVED))
def test_inputs_are_derived(diffusers_model: Callable[[str], Words], name: str) -> None:
    _, model, _, config = diffusers_model(name)
    assert diffusers_source(model, Path(config), None).kwargs


def test_the_page_names_every_command_and_counts_the_classes() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    names = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    assert [name for name in names if f"| `bwcache {name}` |" not in page] == []
    assert f"{len(ZOO)} configurations that works for {len(ZOO) - len(NOT_DERIVED)}." in page


def test_a_configuration_as_a_checkpoint_has_it(tmp_path: Path) -> None:
    ZOO["wan"].make().save_config(tmp_path)
    source = diffusers_source("WanTransformer3DModel", tmp_path / "config.json", None)
    assert source.model.config.num_layers == 3
