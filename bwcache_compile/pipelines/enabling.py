"""Put cached models in the place of a pipeline's transformers, and the originals back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from bwcache_compile.api import Cached, transform
from bwcache_compile.api_arguments import Capture
from bwcache_compile.calibration import CalibrationPlan
from bwcache_compile.config import CacheConfig
from bwcache_compile.errors import CaptureError, ConfigError, NoBlocksFoundError, StateError, UnsupportedGraphError
from bwcache_compile.ir.compare import Verify
from bwcache_compile.passes import Guard
from bwcache_compile.pipelines.scheduler_run import SchedulerRun
from bwcache_compile.runtime import CachedModel
from bwcache_compile.runtime.hooks import hook_kinds
from bwcache_compile.step_events import StepEvent

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOGGER = logging.getLogger("bwcache_compile")

Given = CalibrationPlan | CacheConfig | Mapping[str, Any] | None
"""How the settings of one transformer may be given."""


def _components(pipe: Any) -> dict[str, nn.Module]:
    """Return the modules of a pipeline by name.

    Raises:
        ConfigError: It is no pipeline.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise ConfigError(
            f"expected a diffusers pipeline (with `components`), got {type(pipe).__name__}. To cache a model by itself, call transform."
        )
    return {name: value for name, value in components.items() if isinstance(value, nn.Module)}


def _cached(module: nn.Module) -> Cached | None:
    """Return the cached model that a component is, compiled or not; None if it is none."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, Cached) else None


def _transformers(pipe: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of a pipeline's transformers: those with `transformer` as a word, as diffusers names them.

    Raises:
        ConfigError: There is none.
    """
    names = [name for name in modules if "transformer" in name.split("_")]
    if names:
        return names
    unets = [f"its denoiser `{name}` is a U-Net, which is not supported; " for name in modules if "unet" in name.split("_")]
    raise ConfigError(
        f"{type(pipe).__name__} has no transformer to cache: {''.join(unets)}its models are {', '.join(modules) or 'none'}. If one of them"
        " is a diffusion transformer under another name, name it: enable(pipe, {name: settings})."
    )


def _asked(pipe: Any, given: Given) -> dict[str, Given]:
    """Return the settings of each transformer by the name of its component.

    Raises:
        ConfigError: There is no transformer, or a name is no model of the pipeline.
    """
    modules = _components(pipe)
    components = getattr(pipe, "components", {})
    kinds = (CacheConfig, CalibrationPlan, Mapping)  # no setting is one of these
    if not isinstance(given, Mapping) or not any(name in components or isinstance(value, kinds) for name, value in given.items()):
        return dict.fromkeys(_transformers(pipe, modules), given)
    if unknown := [name for name in given if name not in modules]:
        raise ConfigError(
            f"{type(pipe).__name__} has no model {unknown[0]!r}; its models are {', '.join(modules)}. A dictionary holds"
            " either CacheConfig settings, or settings for each model by its name: {name: settings}."
        )
    return dict(given)


def _settings(given: Given, changes: Mapping[str, Any], guard: Guard) -> CacheConfig:
    """Return the settings of one transformer. The contexts decide together unless it is said otherwise, or is not possible."""
    if isinstance(given, CalibrationPlan):
        if len(given.entries) != 1:
            budgets = ", ".join(f"{entry.budget:.2g}" for entry in given.entries)
            raise ConfigError(
                f"the plan has {len(given.entries)} entries; choose one, as in enable(pipe, plan.at(0.4)). Budgets: {budgets}."
            )
        given = given.at(given.entries[0].budget)
    if given is not None and not isinstance(given, Mapping):
        return CacheConfig.of(given, **changes)
    values = {**(given or {}), **changes}
    possible = guard == "host" and values.get("granularity") != "block"
    joint = {"decide": "joint"} if possible else {}
    return CacheConfig.of({**joint, **values}) if values else CacheConfig.recommended(**joint)


class _FirstStep:
    """Logs once, after the first step of a component, what is cached of it."""

    def __init__(self, name: str, cached: Cached) -> None:
        """Listen to a cached model."""
        self._name, self._cached = name, cached
        self._handle = cached.on_step(self)

    def __call__(self, event: StepEvent) -> None:
        """Log, and listen no more."""
        self._handle.remove()
        steps = "an unknown number of" if event.num_steps is None else event.num_steps
        LOGGER.info("%s: %s cached, %s steps, %s", self._name, self._what(), steps, _described(self._cached))

    def _what(self) -> str:
        if isinstance(self._cached, CachedModel):
            return f"{len(self._cached.plan.blocks)} blocks are"
        return "the output is" if self._cached.cache_config.cut == "output" else f"{len(self._cached.cached_blocks)} blocks are"


def _described(cached: Cached) -> str:
    config = cached.cache_config
    how = f"guard={cached.guard!r}" if isinstance(cached, CachedModel) else type(cached).__name__
    return f"policy={config.policy!r}, reuse={config.reuse!r}, decide={config.decide!r}, {how}"


@overload
def enable(
    pipe: Any,
    plan_or_config: Given = None,
    *,
    capture: Literal["region", "opaque"],
    verify: Verify = "bitwise",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> dict[str, Cached]: ...


@overload
def enable(
    pipe: Any,
    plan_or_config: Given = None,
    *,
    guard: Guard = "host",
    dynamic_shapes: Any = None,
    verify: Verify = "bitwise",
    capture: Literal["whole"] = "whole",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> dict[str, CachedModel]: ...


def enable(
    pipe: Any,
    plan_or_config: Given = None,
    *,
    guard: Guard = "host",
    dynamic_shapes: Any = None,
    verify: Verify = "bitwise",
    capture: Capture = "whole",
    process_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    **settings: Any,
) -> dict[str, CachedModel] | dict[str, Cached]:
    """Cache every transformer of a diffusers pipeline; the pipeline is called as before.

    The components named `transformer`, `transformer_2` and the like are replaced by cached models, all or, on an error, none. Each
    takes its steps from the pipeline's scheduler: a new run begins a new generation, also after one that was broken off; the number
    of steps is that of the run; and calls that the pipeline makes without a cache context are told apart by their order in the step.
    Each model is captured at its first call.

    Args:
        pipe: A diffusers pipeline.
        plan_or_config: A `CacheConfig`, a dictionary of its settings, or a calibration plan with a single entry, for every transformer;
            or a dictionary of these by the name of the component, and only the components in it are cached. Without any settings
            they are `CacheConfig.recommended()`. Unless a `CacheConfig` or a setting says otherwise, the guidance branches decide
            together (`decide="joint"`) where the guard allows it.
        guard: See `transform`.
        dynamic_shapes: See `transform`.
        verify: See `transform`.
        capture: See `transform`.
        process_group: See `transform`.
        sequence_group: See `transform`.
        **settings: Single settings of `CacheConfig`, on top of `plan_or_config`: `enable(pipe, threshold=0.1)`.

    Returns:
        The cached models by the name of their component; they are in the pipeline now.

    Raises:
        ConfigError: `pipe` is no pipeline or has no transformer, a setting is wrong, or a transformer is compiled or has offload hooks.
        StateError: A transformer is cached already, or was calibrated for other weights.
    """
    made: dict[str, Cached] = {}
    modules = _components(pipe)
    for name, given in _asked(pipe, plan_or_config).items():
        if _cached(modules[name]) is not None:
            raise StateError(
                f"pipe.{name} is cached already. Change its settings with pipe.{name}.configure(...), or call disable(pipe) before enable."
            )
        try:
            config = _settings(given, settings, guard)
            options: dict[str, Any] = {"guard": guard, "dynamic_shapes": dynamic_shapes, "verify": verify, "capture": capture}
            options |= {"process_group": process_group, "sequence_group": sequence_group}
            made[name] = transform(modules[name], config, **options)
        except (ConfigError, StateError, CaptureError, NoBlocksFoundError, UnsupportedGraphError) as error:
            raise type(error)(f"pipe.{name}: {error}") from error
    for name, cached in made.items():
        cached.follow(SchedulerRun(pipe))
        setattr(pipe, name, cached)
        _FirstStep(name, cached)
    models = "; ".join(f"{name} ({type(cached.original).__name__}, {_described(cached)})" for name, cached in made.items())
    LOGGER.info("caching is enabled in %s: %s. Blocks and steps are found at the first call.", type(pipe).__name__, models)
    return made


def disable(pipe: Any) -> None:
    """Put the original transformers of a pipeline back: the very objects, which nothing has changed. The caches are freed.

    Raises:
        ConfigError: `pipe` is no pipeline.
        StateError: No component of it is a cached model, or hooks were put on one since.
    """
    found = {name: cached for name, module in _components(pipe).items() if (cached := _cached(module)) is not None}
    if not found:
        raise StateError(f"caching is not enabled in {type(pipe).__name__}: none of its components is a cached model.")
    for name, cached in found.items():
        if kinds := hook_kinds(cached.original):
            raise StateError(
                f"a hook was put on pipe.{name} since caching was enabled ({', '.join(kinds)}). Remove it first (pipe.remove_all_hooks()),"
                " then call disable(pipe)."
            )
    for name, cached in found.items():
        setattr(pipe, name, cached.original)
        cached.close()
    LOGGER.info("caching is disabled in %s: %s", type(pipe).__name__, ", ".join(found))
