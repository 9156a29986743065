"""Every way in which a command fails: one clear line, the right exit code, and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import bwcache_compile as bw
from bwcache_compile.cli import main
from bwcache_compile.cli.diffusers_models import diffusers_source
from bwcache_compile.exporters.onnx import export
from tests.cli.conftest import Run

ROOT = Path(bw.__file__).parents[1]


def started(*words: object, **options: object) -> subprocess.Popen[str]:
    """Start `bwcache` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bwcache_compile", *map(str, words)]
    return subprocess.Popen(command, env=environment, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "exactly one model is needed, got none: package.module:factory, path/to/file.py:factory, --diffusers CLASS --config FILE.json,"
             " or --example tiny_video_dit"),
        (("a:b", "--example", "tiny_video_dit"), "exactly one model is needed, got a factory and --example: "),
        (("no_colon",), "'no_colon' does not name a factory; write package.module:factory or path/to/file.py:factory"),
        (("nowhere.at_all:make",), "there is no module 'nowhere.at_all' on the Python path or in the current directory"),
        (("nowhere.py:make",), "there is no file nowhere.py"),
        (("denoisers.py:positionl",), "denoisers.py has no 'positionl'; it has positional"),
        (("denoisers:half",), "denoisers:half is not a function, but of type dtype"),
        (("denoisers:both", "--config", "x.json"), "--config requires --diffusers; a factory brings its own inputs and settings"),
        (("denoisers:both", "--at", "0.4"), "--at requires --plan"),
        (("denoisers:both", "--plan", "none.json"), "cannot read the plan none.json: No such file or directory"),
        (("denoisers:both", "--plan", "denoisers.py"), "denoisers.py is damaged (JSONDecodeError: "),
        (("denoisers:both", "--set", "threshold"), "--set threshold: expected NAME=VALUE, such as --set threshold=0.1"),
        (("denoisers:both", "--set", "treshold=1"), "unknown CacheConfig settings: treshold. There are: threshold, "),
        (("denoisers:both", "--set", "threshold=-1"), "threshold is -1; it must be a number >= 0 "),
        (("--example", "big_video_dit"), "there is no example 'big_video_dit'; choose from tiny_video_dit"),
        (("--diffusers", "WanTransformer3DModel"), "--diffusers needs --config FILE.json, the arguments of the class or"),
        (("--diffusers", "WanTransformer4DModel", "--config", "x.json"), "diffusers has no model class 'WanTransformer4DModel'; did"),
        (("--diffusers", "WanTransformer3DModel", "--config", "x.json"), "cannot read the configuration x.json: No such file or directory"),
        (("--diffusers", "WanTransformer3DModel", "--config", "."), "cannot read the configuration .: Is a directory"),
        (("--diffusers", "WanTransformer3DModel", "--config", "denoisers.py"), "the configuration denoisers.py is not JSON: "),
        (("--diffusers", "WanTransformer3DModel", "--config", "wrong.json"), "WanTransformer3DModel has no setting no_such_setting"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_wrong_command_line(bwcache: Run, factory: Path, words: tuple[str, ...], said: str) -> None:
    (factory.parent / "wrong.json").write_text('{"no_such_setting": 1}')
    done = bwcache("inspect", *words)
    assert done.code == 2
    assert done.error.startswith(said)
    assert done.out == ""
    assert len([line for line in done.err.splitlines() if not line.endswith(" ...")]) == 1  # what is left out is progress


@pytest.mark.parametrize(
    "words", [("inspect", "--nonsense"), ("frobnicate",), ("check",), ("profile", "a:b", "--steps", "1"), ("export", "a:b")]
)
def test_what_the_parser_refuses(bwcache: Run, words: tuple[str, ...]) -> None:
    done = bwcache(*words)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("Error: ")


FORMS = "(model, args), (model, args, kwargs) or (model, kwargs), with a tuple of positional and a dict of keyword arguments"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "denoisers.py:broken raised ValueError: no such checkpoint (/"),
        ("alone", f"denoisers.py:alone returned a Denoiser; return {FORMS}"),
        ("swapped", f"denoisers.py:swapped returned a tuple where a torch.nn.Module is expected; return {FORMS}"),
        ("numbers", f"denoisers.py:numbers returned the model and int; return {FORMS}"),
        ("unrepeated", "no repeated transformer blocks in Linear."),
    ],
)
def test_a_factory_that_makes_no_model(bwcache: Run, factory: Path, name: str, said: str) -> None:
    done = bwcache("inspect", f"{factory.name}:{name}")
    assert done.code == 1
    assert done.error.startswith(said)
    failure = bwcache("inspect", "--json", f"{factory.name}:{name}").document
    if name == "unrepeated":  # what was found is the answer, if nothing was
        assert failure["blocks"] == []
    else:
        assert failure["error"]["exit_code"] == 1
        assert failure["error"]["message"].startswith(said)


def test_the_traceback_is_shown_when_asked_for(bwcache: Run, factory: Path) -> None:
    done = bwcache("inspect", f"{factory}:broken", "--traceback")
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert 'raise ValueError("no such checkpoint")' in done.err


def test_a_module_that_fails_to_import(bwcache: Run, tmp_path: Path) -> None:
    (tmp_path / "unfinished.py").write_text("import a_library_that_is_not_there\n")
    assert (
        bwcache("inspect", "unfinished:make").error == "unfinished needs the module 'a_library_that_is_not_there', which is not installed"
    )
    (tmp_path / "failing.py").write_text("1 / 0\n")
    done = bwcache("inspect", "failing.py:make")
    assert done.code == 1
    assert done.error.startswith("importing failing.py raised ZeroDivisionError: division by zero (")


def test_inputs_that_are_not_derived(bwcache: Run, diffusers_model: Callable[[str], list[str]], tmp_path: Path) -> None:
    words = diffusers_model("hunyuan_video_framepack")
    done = bwcache("inspect", *words)
    assert done.code == 2
    assert (
        "the inputs image_embeds, indices_latents of HunyuanVideoFramepackTransformer3DModel cannot be derived from its configuration; give"
        in done.error
    )
    (tmp_path / "inputs.json").write_text('{"image_embeds": {"shape": [1, "x"]}}')
    assert bwcache("inspect", *words, "--inputs", "inputs.json").error.startswith("--inputs: cannot make a tensor for image_embeds: ")


def test_inputs_from_a_file(bwcache: Run, diffusers_model: Callable[[str], list[str]], tmp_path: Path) -> None:
    _, name, _, config = diffusers_model("wan")
    inputs = tmp_path / "inputs.json"
    inputs.write_text('{"hidden_states": {"shape": [2, 4, 1, 4, 6]}, "timestep": {"shape": [2], "dtype": "int64", "value": 3},'
                      ' "encoder_hidden_states": {"shape": [2, 3, 16]}}')  # fmt: skip
    source = diffusers_source(name, Path(config), inputs)
    shapes = {key: list(value.shape) for key, value in source.kwargs.items() if isinstance(value, torch.Tensor)}
    assert shapes == {"hidden_states": [2, 4, 1, 4, 6], "timestep": [2], "encoder_hidden_states": [2, 3, 16]}
    assert source.kwargs["timestep"].tolist() == [3, 3]
    inputs.write_text('{"hidden_states": {"shape": [2, 5, 1, 4, 6]}}')
    refused = bwcache("inspect", "--diffusers", name, "--config", config, "--inputs", inputs)
    assert refused.code == 1
    assert refused.error.startswith("WanTransformer3DModel failed on the inputs (hidden_states [2, 5, 1, 4, 6], ")


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_is_not_a_bundle(bwcache: Run, factory: Path, command: str) -> None:
    assert bwcache(command, "nowhere").error == "nowhere/manifest.json does not exist: nowhere is not a bundle."
    assert bwcache(command, factory.name).error == "denoisers.py is a file. Pass the folder that export wrote."
    done = bwcache(command, "--json", ".")
    assert done.code == 1
    assert done.document["error"]["kind"] == "BundleError"


def test_a_pass_that_is_not_there(bwcache: Run, factory: Path) -> None:
    done = bwcache("diff", f"{factory}:both", "--pass", "insert_cash")
    assert done.code == 2
    assert done.error.startswith("there is no pass 'insert_cash'; choose from canonicalize, ")


def test_a_damaged_bundle(bwcache: Run, bundle: Path) -> None:
    graph = bundle / "reuse.onnx"
    content = bytearray(graph.read_bytes())
    content[100] ^= 1
    graph.write_bytes(content)
    for command in ("check", "run"):
        done = bwcache(command, "bundle")
        assert done.code == 1
        assert done.error == "SHA-256 mismatch for bundle/reuse.onnx: the file was changed after export. Copy it again, or export it again."


def test_a_bundle_of_another_model(bwcache: Run, factory: Path, bundle: Path) -> None:
    text = factory.read_text()
    factory.write_text(text.replace("manual_seed(0)", "manual_seed(1)"))
    done = bwcache("check", "bundle", "--model", "denoisers.py:keywords")
    assert done.code == 1
    assert "of the exported graphs differs from torch by" in done.error


def test_a_bundle_of_a_model_with_other_blocks(bwcache: Run, factory: Path, bundle: Path) -> None:
    factory.write_text(factory.read_text().replace("range(4)", "range(5)"))
    done = bwcache("check", "bundle", "--model", "denoisers.py:keywords")
    assert done.code == 1
    assert done.error.startswith(
        "the bundle was not exported from this Denoiser: its blocks are mixers.0, mixers.1, mixers.2, mixers.3, but the model's are "
    )


def test_the_example_is_not_in_a_wheel(bwcache: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bwcache_compile.cli import source

    monkeypatch.setattr(source, "__file__", str(tmp_path / "site-packages" / "bwcache_compile" / "cli" / "source.py"))
    done = bwcache("inspect", "--example", "tiny_video_dit")
    assert done.code == 2
    assert done.error.startswith("the example tiny_video_dit is part of the repository, not of the installed package: ")


# -- writing -----------------------------------------------------------------------------------------------------


def test_no_permission_to_write(bwcache: Run, factory: Path) -> None:
    """A path below a file, which not even root may write to."""
    plan = bwcache("calibrate", f"{factory}:both", "--out", f"{factory.name}/plan.json")
    assert plan.code == 1
    assert plan.error == f"cannot write {factory.name}/plan.json: {factory.resolve()} is not a directory"
    bundle = bwcache("export", f"{factory}:both", "--out", f"{factory.name}/bundle")
    assert bundle.code == 1
    assert bundle.error.startswith(f"cannot write {factory.name}/bundle: ")
    assert "Not a directory" in bundle.error or "File exists" in bundle.error


def test_a_folder_that_is_no_bundle_is_kept(bwcache: Run, factory: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    done = bwcache("export", f"{factory}:both", "--out", "mine")
    assert done.code == 1
    assert "exists and is not a bundle; it is not overwritten" in done.error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_blocks_once_is_for_packages(bwcache: Run, factory: Path, tmp_path: Path) -> None:
    done = bwcache("export", f"{factory}:both", "--blocks-once", "--out", "bundle")
    assert done.code == 1
    assert done.error == "blocks_once=True requires format=\"aoti\", got 'onnx'."
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system; skip where this process may not."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this process may not mount a tmpfs: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(bwcache: Run, factory: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("size=16k")
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    for words in (("export",), ("calibrate", "--steps", "6", "--budget", "0.5"), ("report", "--steps", "6")):
        done = bwcache(words[0], f"{factory}:both", *words[1:], "--out", place / "out")
        assert done.code == 1
        assert done.error.startswith(f"cannot write {place / 'out'}: ")
        assert "No space left on device" in done.error
        assert [path.name for path in place.iterdir()] == ["filler"]


def test_a_file_system_that_is_read_only(bwcache: Run, factory: Path, mounted: Callable[[str], Path]) -> None:
    place = mounted("ro")
    for command in ("export", "calibrate", "report"):
        done = bwcache(command, f"{factory}:both", "--out", place / "out")
        assert done.code == 1
        assert done.error.startswith(f"cannot write {place / 'out'}: ")
        assert "Read-only file system" in done.error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_to_a_full_disk(bundle: Path) -> None:
    with Path("/dev/full").open("w") as full, started("run", "--json", bundle, stdout=full) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "error: No space left on device"
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_a_closed_pipe_ends_quietly(bundle: Path) -> None:
    with started("run", "--json", bundle) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(timeout=120) == 0
    assert [line for line in err.splitlines() if not line.endswith(" ...")] == []


@pytest.mark.slow
def test_interrupted_by_a_signal(factory: Path, tmp_path: Path) -> None:
    """While the factory runs, as it is the one place that a test can be sure of."""
    waiting = tmp_path / "waiting.py"
    waiting.write_text("import pathlib, time\ndef make():\n    pathlib.Path('begun').touch()\n    time.sleep(60)\n")
    with started("export", "waiting.py:make", "-o", "bundle", cwd=tmp_path) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "bundle").exists()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["begin", pytest.param("check", marks=pytest.mark.slow)])
def test_interrupted_while_a_bundle_is_written(
    bwcache: Run, factory: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(export, {"begin": "plain_graph", "check": "_check_onnx"}[moment], interrupt)
    done = bwcache("export", f"{factory}:both", "-o", "bundle")
    assert done.code == 130
    assert done.err.splitlines()[-1] == "interrupted"
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_interrupted_while_a_plan_is_written(bwcache: Run, factory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (factory.parent / "plan.json").write_text("the plan that was there")
    monkeypatch.setattr(os, "replace", interrupt)
    done = bwcache("calibrate", f"{factory}:both", "--steps", "6", "--budget", "0.5", "--out", "plan.json")
    assert done.code == 130
    assert (factory.parent / "plan.json").read_text() == "the plan that was there"
    assert sorted(path.name for path in factory.parent.iterdir() if path.suffix != "") == ["denoisers.py", "plan.json"]


def test_without_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from bwcache_compile.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == 'error: the command line needs typer: pip install "bwcache-compile[cli]".\n'


def test_the_console_script_and_the_module_are_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"bwcache": f"{main.__module__}:{main.__name__}"}
    with started("--version") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{bw.__version__}\n", "")
