"""A diffusers class at a configuration, with drawn weights and inputs that follow from its forward's signature."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bwcache_compile.cli.outcome import CommandError, UsageError
from bwcache_compile.cli.source import Source
from bwcache_compile.errors import first_line

_TOKENS = (2, 4, 4)
"""Frames, rows and columns of patches."""
_TEXT = 6
"""Text tokens, where the configuration does not say."""
_FRAMES_FIRST = ("CogVideoX", "ConsisID")
_CHANNELS_LAST = ("Kandinsky5",)
_FRACTIONS = ("Flux", "Chroma", "Bria", "Qwen", "AuraFlow", "Lumina", "PRX")
"""Classes whose time runs from 0 to 1."""
_TEXT_WIDTHS = ("text_dim", "text_embed_dim", "caption_channels", "cap_feat_dim", "joint_attention_dim", "context_in_dim", "in_text_dim",
                "cross_attention_input_dim", "cross_attention_dim")  # fmt: skip
_POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2")

Config = Mapping[str, Any]


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: The file cannot be read or holds something else.
    """
    try:
        read = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the {what} {path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise UsageError(f"the {what} {path} must be a JSON object, got {type(read).__name__}")
    return read


def diffusers_source(name: str, config_file: Path | None, inputs_file: Path | None) -> Source:
    """Build a diffusers model and its inputs.

    Raises:
        UsageError: diffusers has no such class, or a file cannot be used.
        CommandError: The class does not take the configuration, or the inputs could not be derived.
    """
    cls = _class(name)
    if config_file is None:
        raise UsageError("--diffusers needs --config FILE.json, the arguments of the class or the config.json of a checkpoint")
    model = _build(cls, read_json(config_file, "configuration"))
    given = read_json(inputs_file, "inputs") if inputs_file is not None else {}
    kwargs = derived_inputs(model) | {key: _tensor(key, value) for key, value in given.items()}
    parameters = inspect.signature(model.forward).parameters
    if "return_dict" in parameters:
        kwargs.setdefault("return_dict", False)
    missing = [key for key, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and key not in kwargs]
    if missing:
        raise UsageError(f"the inputs {', '.join(missing)} of {name} cannot be derived from its configuration; {_advice(missing[0])}")
    try:
        with torch.no_grad():
            model(**kwargs)
    except Exception as error:
        shown = ", ".join(f"{key} {list(value.shape)}" for key, value in kwargs.items() if isinstance(value, Tensor))
        raise CommandError(f"{name} failed on the inputs ({shown}): {first_line(error)}; {_advice('hidden_states')}") from error
    return Source(f"diffusers {name}", model, (), kwargs)


def _advice(name: str) -> str:
    return f'give them as --inputs FILE.json, such as {{"{name}": {{"shape": [1, 16, 4], "dtype": "float32"}}}}'


def _class(name: str) -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise CommandError('--diffusers needs diffusers: pip install "bwcache-compile[examples]"') from error
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        near = difflib.get_close_matches(name, [key for key in dir(diffusers) if "Transformer" in key or "DiT" in key], 3)
        raise UsageError(f"diffusers has no model class {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return found


def _build(cls: Any, config: dict[str, Any]) -> nn.Module:
    """Build the model in evaluation mode, every weight drawn: gates that start at zero would leave its blocks without effect."""
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    known = set(inspect.signature(cls.__init__).parameters)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known)
    if unknown:
        raise UsageError(f"{cls.__name__} has no setting {', '.join(unknown)}")
    torch.manual_seed(0)
    try:
        model: nn.Module = cls.from_config(config)
    except Exception as error:
        raise CommandError(f"cannot build {cls.__name__} from the configuration: {type(error).__name__}: {first_line(error)}") from error
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any() or not parameter.isfinite().all():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def _tensor(name: str, value: Any) -> Any:
    """Return what an entry of an inputs file stands for: a tensor for a table with a shape, a tuple for a list, else the value."""
    if isinstance(value, list):
        return tuple(_tensor(name, item) for item in value)
    if not isinstance(value, dict) or "shape" not in value:
        return value
    try:
        dtype, shape = getattr(torch, str(value.get("dtype", "float32"))), [int(size) for size in value["shape"]]
        if "value" in value:
            return torch.as_tensor(value["value"], dtype=dtype).expand(shape).clone()
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--inputs: cannot make a tensor for {name}: {first_line(error)}") from error


def _first(config: Config, names: tuple[str, ...], default: int = 1) -> int:
    values = [config[name] for name in names if isinstance(config.get(name), int)]
    return int(values[0]) if values else default


def _patch(config: Config) -> tuple[int, int, int]:
    size = config.get("patch_size") or 1
    if isinstance(size, (tuple, list)):
        time, height, width = (1, 1, *size)[-3:]
        return time, height, width
    return int(config.get("patch_size_t") or 1), int(size), int(size)


def _latents(kind: str, config: Config, rank_of_tokens: bool) -> Tensor:
    """Draw latents in the layout of a class."""
    channels = _first(config, ("in_channels", "in_visual_dim"))
    (frames, rows, columns), patch = _TOKENS, _patch(config)
    sample = config.get("sample_size")
    if isinstance(sample, int) and "3D" not in kind:
        height = width = sample
    else:
        height, width = rows * patch[1], columns * patch[2]
    length = frames * patch[0]
    if rank_of_tokens:
        return torch.randn(1, (frames if "Video" in kind else 1) * rows * columns, channels)
    if kind.startswith(_CHANNELS_LAST):
        return torch.randn(1, length, height, width, channels)
    if kind.startswith(_FRAMES_FIRST):
        return torch.randn(1, length, channels, config.get("sample_height") or height, config.get("sample_width") or width)
    return torch.randn(1, channels, length, height, width) if "3D" in kind else torch.randn(1, channels, height, width)


def derived_inputs(model: nn.Module) -> dict[str, Any]:
    """Return inputs of a small size by name, for the parameters of a model's forward that a rule is known for."""
    config: Config = dict(model.config)  # type: ignore[arg-type]
    kind, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    needed = {name for name, p in parameters.items() if p.default is p.empty}
    frames, rows, columns = _TOKENS
    tokens = bool({"img_ids", "img_shapes"} & set(parameters)) or kind.startswith("LTX")
    text = int(config.get("max_text_seq_length") or config.get("text_len") or _TEXT)
    torch.manual_seed(0)
    fraction = kind.startswith(_FRACTIONS)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    size = torch.tensor([[16, 16]])
    rules: dict[str, tuple[bool, Callable[[], Any]]] = {
        "hidden_states": (True, lambda: _latents(kind, config, tokens)),
        "timestep": (True, lambda: torch.tensor([0.5 if fraction else 500.0])),
        "encoder_hidden_states": (True, lambda: torch.randn(1, text, _first(config, _TEXT_WIDTHS))),
        "pooled_projections": (any(name in config for name in _POOLED_WIDTHS), lambda: torch.randn(1, _first(config, _POOLED_WIDTHS))),
        "guidance": (bool(config.get("guidance_embeds")), lambda: torch.tensor([3.5 if fraction else 3500.0])),
        "encoder_attention_mask": (
            "encoder_attention_mask" in needed,
            lambda: torch.ones(1, text, dtype=torch.bool if kind.startswith(("Mochi", "Lumina2")) else torch.int64),
        ),
        "encoder_hidden_states_mask": (True, lambda: torch.ones(1, text, dtype=torch.int64)),
        "img_ids": (True, lambda: places),
        "txt_ids": (True, lambda: torch.zeros(text, 3)),
        "img_shapes": (True, lambda: [(1, rows, columns)]),
        "num_frames": (tokens, lambda: frames),
        "height": (tokens, lambda: rows),
        "width": (tokens, lambda: columns),
        "class_labels": (True, lambda: torch.tensor([1])),
        "added_cond_kwargs": (True, lambda: {"resolution": None, "aspect_ratio": None}),
        "original_size": (True, lambda: size),
        "target_size": (True, lambda: size),
        "crop_coords": (True, lambda: size),
        "control_hidden_states": (True, lambda: _latents(kind, {**config, "in_channels": config.get("vace_in_channels")}, tokens)),
        "audio_hidden_states": (True, lambda: torch.randn(1, text, _first(config, ("audio_in_channels",)))),
        "audio_encoder_hidden_states": (True, lambda: torch.randn(1, text, _first(config, _TEXT_WIDTHS))),
        "audio_num_frames": (True, lambda: text),
        "visual_rope_pos": (True, lambda: [torch.arange(frames), torch.arange(rows), torch.arange(columns)]),
        "text_rope_pos": (True, lambda: torch.arange(text)),
        "x": (True, lambda: [torch.randn(_first(config, ("in_channels",)), 1, 2 * rows, 2 * columns)]),
        "t": (True, lambda: torch.tensor([0.5])),
        "cap_feats": (True, lambda: [torch.randn(text, _first(config, _TEXT_WIDTHS))]),
    }
    return {name: make() for name, (wanted, make) in rules.items() if name in parameters and wanted}
