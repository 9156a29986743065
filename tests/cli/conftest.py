"""Running `bwcache` in this process, and the models that it is run on."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bwcache_compile.cli.app import app
from tests.zoo import ZOO

FACTORY = '''
    import torch
    from torch import nn


    class Mixer(nn.Module):
        """A block that mixes tokens, then channels: no attention, and no name that is known."""

        def __init__(self, tokens, width):
            super().__init__()
            self.across, self.along, self.gain = nn.Linear(tokens, tokens), nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x, when):
            x = x + self.across(x.transpose(1, 2)).transpose(1, 2)
            return x + torch.tanh(self.along(x) * (1 + self.gain(when)))


    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inlet, self.clock, self.outlet = nn.Linear(5, 12), nn.Linear(1, 12), nn.Linear(12, 5)
            self.mixers = nn.ModuleList(Mixer(7, 12) for _ in range(4))

        def forward(self, noisy, t, *, scale=None):
            h, when = self.inlet(noisy), self.clock(t.view(-1, 1, 1))
            for mixer in self.mixers:
                h = mixer(h, when)
            return self.outlet(h)


    def inputs():
        return torch.randn(2, 7, 5), torch.ones(2)

    def positional():
        return Denoiser(), inputs()

    def both():
        return Denoiser(), inputs(), {}

    def keywords():
        noisy, t = inputs()
        return Denoiser(), {"noisy": noisy, "t": t}

    def broken():
        raise ValueError("no such checkpoint")

    def alone():
        return Denoiser()

    def swapped():
        return inputs(), Denoiser()

    def numbers():
        return Denoiser(), 3

    class Attentive(nn.Module):
        """nn.MultiheadAttention runs a fused kernel in the model and its parts in a captured graph."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    def attentive():
        return Attentive(), torch.randn(1, 64, 16)

    def unrepeated():
        return nn.Linear(4, 4), (torch.randn(1, 4),)

    def noisy_factory():
        print("a line that the factory prints")
        return positional()

    def sampler(model):
        latents = torch.linspace(-1, 1, 70).view(2, 7, 5)
        for i in range(6):
            with torch.no_grad():
                latents = latents - model(latents, torch.full((2,), 1 - i / 6)) / 6
        return latents

    half = torch.float16
'''


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Its one JSON document, strictly read."""

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        (line,) = (line for line in self.err.splitlines() if line.startswith("error: "))
        assert "Traceback" not in self.err
        return line.removeprefix("error: ")


Run = Callable[..., Done]


@pytest.fixture
def bwcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in an empty directory; what it makes importable is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def run(*words: str | Path) -> Done:
        result = CliRunner().invoke(app, [str(word) for word in words], prog_name="bwcache")
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
                del sys.modules[name]
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    """A file with factories of a model that nothing in this repository looks like."""
    path = tmp_path / "denoisers.py"
    path.write_text(textwrap.dedent(FACTORY))
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that model with a guarded graph. Not to be written to."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "denoisers.py").write_text(textwrap.dedent(FACTORY))
    words = ("--guarded", "--set", "policy=schedule", "--set", "num_steps=12")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        result = CliRunner().invoke(app, ["export", f"{folder}/denoisers.py:keywords", *words, "-o", f"{folder}/bundle"])
        sys.modules.pop("denoisers", None)
    assert result.exit_code == 0, result.stderr
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of that bundle beside the factories."""
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.fixture
def diffusers_model(tmp_path: Path) -> Callable[[str], list[str]]:
    """What names a configuration of the zoo on the command line."""

    def words(name: str) -> list[str]:
        entry = ZOO[name]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(entry.config))
        return ["--diffusers", entry.model, "--config", str(path)]

    return words
