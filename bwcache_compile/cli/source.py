"""The model that a command line names: a factory, a diffusers class with its configuration, or the bundled example."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from bwcache_compile.cli.named import Named
from bwcache_compile.cli.outcome import CommandError, UsageError
from bwcache_compile.errors import first_line

FORMS = "(model, args), (model, args, kwargs) or (model, kwargs), with a tuple of positional and a dict of keyword arguments"
EXAMPLES = ("tiny_video_dit",)

Generate = Callable[[Any, int, Callable[[], None]], Any]
"""Makes one video with a model in a number of steps, calling its last argument after each step; returns the video."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model with the arguments of a typical call.

    Attributes:
        named: How the user named it.
        model: In evaluation mode.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of a call.
        generate: Makes a video with it, where the source has a sampler of its own.
    """

    named: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    generate: Generate | None = None

    @property
    def title(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__


def load_source(named: Named) -> Source:
    """Make the model and its example inputs.

    Raises:
        UsageError: Not exactly one model is named, or it is not there.
        CommandError: The factory failed, or returned something else.
    """
    ways = {"a factory": named.factory, "--diffusers": named.diffusers, "--example": named.example}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"exactly one model is needed, got {' and '.join(given) or 'none'}: package.module:factory, path/to/file.py:factory,"
            " --diffusers CLASS --config FILE.json, or --example tiny_video_dit"
        )
    for option, value in (("--config", named.config), ("--inputs", named.inputs)):
        if value is not None and named.diffusers is None:
            raise UsageError(f"{option} requires --diffusers; {given[0]} brings its own inputs and settings")
    if named.example is not None:
        return _bundled(named.example)
    if named.diffusers is not None:
        from bwcache_compile.cli.diffusers_models import diffusers_source

        return diffusers_source(named.diffusers, named.config, named.inputs)
    return _made(str(named.factory), find_callable(str(named.factory)))


def _ready(model: Any, who: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise CommandError(f"{who} returned a {type(model).__name__} where a torch.nn.Module is expected; return {FORMS}")
    return model.eval()


def _made(named: str, factory: Callable[[], Any]) -> Source:
    """Call a factory and read what it returns."""
    returned = called(named, factory)
    if not isinstance(returned, (tuple, list)) or not 2 <= len(returned) <= 3:
        shown = f"{len(returned)} values" if isinstance(returned, (tuple, list)) else f"a {type(returned).__name__}"
        raise CommandError(f"{named} returned {shown}; return {FORMS}")
    model, inputs = _ready(returned[0], named), returned[1]
    if len(returned) == 2 and isinstance(inputs, dict):
        return Source(named, model, (), inputs)
    kwargs = returned[2] if len(returned) == 3 else {}
    args = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        kinds = ", ".join(type(part).__name__ for part in returned[1:])
        raise CommandError(f"{named} returned the model and {kinds}; return {FORMS}")
    return Source(named, model, tuple(args), kwargs)


def called(named: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call what the user named.

    Raises:
        CommandError: It failed; the message has the line.
    """
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise CommandError(f"{named} raised {_shown(error)}; --traceback shows all") from error


def _shown(error: BaseException) -> str:
    """Say what was raised, and at which line of the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[1:] if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    where = (own or frames)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({where.filename}:{where.lineno})"


def find_callable(named: str) -> Callable[..., Any]:
    """Return what `package.module:name` or `path/to/file.py:name` names. The current directory is importable.

    Raises:
        UsageError: The module or the name is not there.
        CommandError: The module failed while it was imported.
    """
    place, colon, name = named.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{named!r} does not name a factory; write package.module:factory or path/to/file.py:factory")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            near = difflib.get_close_matches(name, there, 3) or there[:5]
            raise UsageError(f"{place} has no {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{named} is not a function, but of type {type(found).__name__}")
    return found


def _module(place: str) -> ModuleType:
    is_path = place.endswith(".py") or "/" in place
    if is_path and not Path(place).is_file():
        raise UsageError(f"there is no file {place}")
    try:
        return _module_of_file(Path(place).resolve()) if is_path else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not is_path and error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise UsageError(f"there is no module {place!r} on the Python path or in the current directory") from error
        raise CommandError(f"{place} needs the module {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise CommandError(f"importing {place} raised {_shown(error)}") from error


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under its own name; files beside it can be imported from it, as when Python runs it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def example_folder(name: str) -> Path:
    """Return the folder of a bundled example.

    Raises:
        UsageError: There is none of that name, or the package was installed without the repository.
    """
    if name not in EXAMPLES:
        raise UsageError(f"there is no example {name!r}; choose from {', '.join(EXAMPLES)}")
    root = Path(__file__).parents[2]
    for folder in (root / "examples" / name, Path.cwd() / "examples" / name):
        if (folder / "model.py").is_file():
            return folder
    raise UsageError(
        f"the example {name} is part of the repository, not of the installed package: run this command in a clone of it, or name a model"
        " of your own as package.module:factory"
    )


def _bundled(name: str) -> Source:
    """Return the tiny video model: one clip of one prompt, generated with guidance as the quickstart does."""
    folder = example_folder(name)
    sys.path.insert(0, str(folder))
    try:
        data, tiny = importlib.import_module("data"), importlib.import_module("model")
    except ModuleNotFoundError as error:
        raise CommandError(f'the example {name} needs {error.name}: pip install "bwcache-compile[examples]"') from error
    import torch

    tokens = data.encode(data.draw_attributes(1, torch.Generator().manual_seed(0)))
    noise = tiny.draw_noise(1, 0)

    def generate(model: Any, steps: int, on_step: Callable[[], None]) -> Any:
        return tiny.sample(model, tokens, noise, steps, on_step=on_step)

    args = (tiny.with_coordinates(noise), torch.full((1,), 1000.0), tokens)
    return Source(f"the example {name}", _ready(tiny.load(), name), args, {"return_dict": False}, generate)
