"""Bundles that AOTInductor compiled, run from Python and from C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from torch.utils import cpp_extension

import bwcache_compile as bw
from tests.exporters.helpers import CONFIG, check_beside_torch, edit, opened, refusal
from tests.models import OneStream, TwoStream, noise

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++, which is not installed")
EXAMPLE = Path(bw.__file__).parents[1] / "examples" / "aoti"


MASK = (0, 0, 0, 1, 1, 0, 1, 1)
TABLE = bw.CacheConfig(
    policy="static",
    steps_mask=MASK,
    reuse="linear",
    anchors=3,
    cut="output",
    weights=[(1.5, -0.75, 0.25) if reuses else None for reuses in MASK],
)


@pytest.mark.slow
def test_a_package_is_torch(tmp_path: Path) -> None:
    """Compiled at one size, run at others; sizes that the compiler ruled out are refused instead of computed wrongly."""
    model = OneStream(depth=2).eval()
    cached = bw.transform(model, CONFIG, example_args=(noise("x", 0, 2, 40, 4), torch.ones(2)), dynamic_shapes="auto")
    manifest = bw.export(cached, tmp_path / "bundle", format="aoti")
    assert manifest.self_check["largest_error"] < 1e-5
    assert manifest.self_check["tolerance"] == 1e-4
    assert manifest.self_check["sizes"] == [{"s13": 2, "s27": 40}, {"s13": 6, "s27": 120}]
    session = opened(tmp_path / "bundle")
    for sizes in ((2, 40), (3, 50)):
        check_beside_torch(cached, session, sizes, tolerance=1e-5)
    turned = noise("x", 0, 2, 40, 4).transpose(1, 2).contiguous().transpose(1, 2)  # compiled code takes strides for granted
    session.reset()
    torch.testing.assert_close(session(turned, torch.ones(2)), cached(turned, torch.ones(2)), rtol=1e-5, atol=1e-5)
    with pytest.raises(bw.StateError) as refusal:
        session(torch.zeros(2, 6, 4), torch.ones(2))
    assert_expected_inline(
        "\n".join([*manifest.conditions, str(refusal.value)]),
        """\
s13 >= 2
s27 >= 2
max(1, (s13*s27) // 32) != 1
max(1, (s13*s27) // 32) >= 2
max(1, (s13*s27) // 32) == max(1, (s13*s27) // 32)
8*max(1, (s13*s27) // 32) <= 4096
shape constraint violated: the graphs require max(1, (x.shape[0]*x.shape[1]) // 32) != 1, got x.shape[0] = 2, x.shape[1] = 6.""",
    )


@pytest.mark.slow
def test_blocks_once(tmp_path: Path) -> None:
    """With dynamic sizes: within rounding of the one package, and of torch at other sizes."""
    cached = bw.transform(OneStream().eval(), CONFIG, example_args=(noise("x", 0, 2, 40, 4), torch.ones(2)), dynamic_shapes="auto")
    whole = bw.export(cached, tmp_path / "whole", format="aoti")
    manifest = bw.export(cached, tmp_path / "blocks", format="aoti", blocks_once=True)
    assert manifest.self_check["largest_error"] < 1e-5
    names = [f"{name}/package.pt2" for name in ("Block", "after_blocks", "before_blocks")]
    assert sorted(manifest.files) == [*names, "reuse.pt2", "weights.bin"]
    assert set(manifest.conditions) == {condition for condition in whole.conditions if "==" not in condition}  # which holds always
    sessions = [opened(tmp_path / name) for name in ("whole", "blocks")]
    for sizes in ((2, 40), (3, 50)):
        check_beside_torch(cached, sessions[1], sizes, tolerance=1e-5)
        x, t = noise("x", 1, *sizes, 4), torch.ones(sizes[0])
        for session in sessions:
            session.reset()
        one, other = (session(x, t) for session in sessions)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    package = tmp_path / "blocks" / "Block" / "package.pt2"
    package.write_bytes(b"no archive")
    edit(tmp_path / "blocks", lambda manifest: None, "Block/package.pt2")
    assert refusal(tmp_path / "blocks", allow_code=True).startswith("torch cannot open .../blocks/Block/package.pt2 (written with torch")


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    bw.CacheConfig(policy="static", steps_mask=(0, 1, 0, 1, 1)),
    bw.CacheConfig(num_steps=8, reuse="taylor"),
    bw.CacheConfig(num_steps=8, reuse="residual", indicator_tokens="all"),
    TABLE,
], ids=["static", "taylor", "residual", "table"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_reuse_compiled(config: bw.CacheConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = (OneStream if config.reuse == "residual" else TwoStream)().eval().to(dtype)
    cached = bw.transform(model, config, example_args=tuple(value.to(dtype) for value in model.example()))
    report = bw.export(cached, tmp_path / "bundle", format="aoti").self_check
    assert report["steps"] == ("###..#.." if config is TABLE else {"static": "#.#..", "schedule": "##..#."}[config.policy])
    assert report["largest_error"] < report["tolerance"] == {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, compiled as its first lines say."""
    made = tmp_path_factory.mktemp("program") / "session"
    where = [f"-I{path}" for path in cpp_extension.include_paths()]
    where += [word for path in cpp_extension.library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = ["g++", "-std=c++20", str(EXAMPLE / "session.cpp"), "-o", str(made), *where, "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return made


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dynamic sizes", "bfloat16 in another layout", "a table of weights", "blocks once"])
def test_a_process_without_python(program: Path, case: str, tmp_path: Path) -> None:
    """C++ computes and reuses where the session in Python does, and returns the same bits; the one opens no Python library.

    The first run is broken off after five steps.
    """
    steps, opened_at, settings, config, packages = [*range(5), *range(8)], (), {}, CONFIG, 2
    if case == "dynamic sizes":
        model, example = OneStream(depth=2).eval(), (noise("x", 0, 2, 40, 4), torch.ones(2))
        settings, opened_at = {"dynamic_shapes": "auto"}, ("--size", "x[1]=50")
        inputs = [{"x": noise("x", i, 2, 50, 4), "t": torch.full((2,), 1 - i / 8)} for i in steps]
    elif case == "blocks once":
        model, packages = TwoStream(double=2, single=2).eval(), 6
        inputs = [dict(zip(("x", "text", "t"), model.example(2, i), strict=True)) for i in steps]
        example = tuple(inputs[0].values())
    elif case == "a table of weights":
        model, config = OneStream(depth=2).eval(), TABLE
        inputs = [dict(zip(("x", "t"), model.example(step=i), strict=True)) for i in steps]
        example = tuple(inputs[0].values())
    else:
        model = TwoStream().eval().bfloat16()
        inputs = [dict(zip(("x", "text", "t"), (v.bfloat16() for v in model.example(2, i)), strict=True)) for i in steps]
        inputs = [{**given, "x": given["x"].transpose(1, 2).contiguous().transpose(1, 2)} for given in inputs]
        example = tuple(inputs[0].values())
    cached = bw.transform(model, config, example_args=example, **settings)
    manifest = bw.export(cached, tmp_path / "bundle", format="aoti", blocks_once=case == "blocks once")
    if case == "blocks once":
        folders = ["before_blocks", "DoubleBlock", "DoubleBlock", "between_blocks", "Block", "Block", "after_blocks"]
        sequence = manifest.graphs["compute"].sequence
        assert sequence is not None
        assert [call.file for call in sequence.calls] == [f"{folder}/package.pt2" for folder in folders]
    script = [sys.executable, str(EXAMPLE / "listing.py"), str(tmp_path / "bundle"), *opened_at]
    (tmp_path / "listing").write_text(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    for i, given in enumerate(inputs):
        for name, value in given.items():
            (tmp_path / f"{name}.{i}").write_bytes(raw(value))
    words = [str(program), str(tmp_path / "bundle"), str(tmp_path / "listing"), str(tmp_path), str(len(steps))]
    done = subprocess.run(words, capture_output=True, text=True, env={"LD_DEBUG": "files"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ("###..###..#..\n" if config is TABLE else "##..###..#..#\n")
    libraries = {os.path.basename(word.rstrip(";")) for line in done.stderr.splitlines() for word in line.split() if ".so" in word}
    assert "libtorch_cpu.so" in libraries
    assert sum(library.endswith(".wrapper.so") for library in libraries) == packages, libraries
    assert not [library for library in libraries if "python" in library]
    session = opened(tmp_path / "bundle")
    for i, given in enumerate(inputs):
        assert (tmp_path / f"output.{i}").read_bytes() == raw(session(**given))
    generation = "###..#.." if config is TABLE else "##..#..#"
    assert f"{generation}\nwarning: default: the timestep went back before step 5" in str(session.report())
