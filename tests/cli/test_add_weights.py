"""A bundle that is exported without its weights, and completed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import bwcache_compile as bw
from tests.cli.conftest import Run

ROOT = Path(bw.__file__).parents[1]


def test_export_add_check_and_run(bwcache: Run, factory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--format", "pt2", "--set", "policy=schedule", "--set", "num_steps=12", "--no-weights")
    done = bwcache("export", "--json", f"{factory}:both", *words, "-o", "bundle")
    assert done.code == 0, done.err
    assert done.document["left_out"] == "weights.bin"
    assert done.document["files"]["weights.bin"] > 0
    assert not Path("bundle", "weights.bin").exists()
    said = "bundle was exported without its weights, and weights.bin was not added since. Write it from the model's safetensors files: "
    for command in ("check", "run"):
        assert bwcache(command, "bundle", "--allow-code").error.startswith(said + "bwcache add-weights bundle SOURCE, or ")
    monkeypatch.syspath_prepend(str(factory.parent))
    model = __import__("denoisers").Denoiser()
    save_file(model.state_dict(), "other.safetensors", {"format": "pt"})
    state = {**model.state_dict(), "outlet.bias": model.outlet.bias + 1}
    save_file(state, "tuned.safetensors")
    failed = bwcache("add-weights", "bundle", "tuned.safetensors")
    assert (failed.code, failed.error) == (1, "tuned.safetensors has other weights than the Denoiser that was exported:")
    assert "  outlet.bias\n" in failed.err
    assert bwcache("add-weights", "bundle", "nowhere").error == "cannot read nowhere: [Errno 2] No such file or directory: 'nowhere'."
    added = bwcache("add-weights", "--json", "bundle", "other.safetensors")
    assert added.code == 0, added.err
    assert added.document["bytes"] == Path("bundle", "weights.bin").stat().st_size
    assert bwcache("check", "bundle", "--allow-code", "--model", f"{factory}:both").code == 0
    again = bwcache("add-weights", "bundle", "other.safetensors")
    assert again.out.startswith("bundle: weights.bin is there as it was exported, ")
    sys.modules.pop("denoisers", None)


@pytest.mark.slow
def test_the_bundled_model(bwcache: Run) -> None:
    """Its file is in float16, and the model in float32; the bundle runs where torch cannot be imported."""
    done = bwcache("export", "--example", "tiny_video_dit", "--no-weights", "-o", "bundle")
    assert done.code == 0, done.err
    assert "7.40 MiB left out" in done.out
    assert sum(path.stat().st_size for path in Path("bundle").iterdir()) < 1.5 * 2**20
    done = bwcache("add-weights", "bundle", ROOT / "examples" / "tiny_video_dit" / "weights.safetensors")
    assert done.code == 0, done.err
    done = bwcache("check", "bundle", "--example", "tiny_video_dit")
    assert done.code == 0, done.err
