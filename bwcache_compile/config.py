"""What to cache and when to reuse it: one frozen value, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from bwcache_compile.atomic_write import write_atomically
from bwcache_compile.config_checks import Decide, Weights, as_mask, as_numbers, as_weights, check, check_steps, python_number
from bwcache_compile.errors import ConfigError
from bwcache_compile.graph_settings import BatchReduce, Cut, Granularity, GraphSettings
from bwcache_compile.policies import POLICIES, REUSES
from bwcache_compile.policies.definitions import Values

PAPER_FRACTION = 0.1
"""Steps reused between two computed ones, as a fraction of all steps, where the settings do not say."""


def _may_change() -> str:
    """List the settings that graphs do not depend on."""
    shaping = {field.name for field in dataclasses.fields(GraphSettings)}
    return ", ".join(sorted(field.name for field in dataclasses.fields(CacheConfig) if field.name not in shaping))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of the block cache.

    Attributes:
        threshold: Indicator value below which reuse begins (`delta`). Higher starts reuse earlier: faster, less exact.
            0 never reuses; infinity reuses from the first step that may.
        reuse_interval: Steps reused between two computed ones (`R`) after the trigger. Higher is faster and less exact.
        reuse_fraction: The same as a fraction of `num_steps`, in (0, 1]. Set at most one of the two; with neither it is 0.1, as in
            the paper.
        tail: The last `floor(tail * k)` steps are computed, where `k` is the step that triggered. Higher protects
            more of the end of the run.
        policy: "schedule" measures the indicator and follows the paper; "adaptive" reuses for as long as the change that is to be
            expected stays below the threshold, at most `reuse_interval` steps in a row; "static" follows `steps_mask`; "guarded" does
            too, within `indicator_bounds`; or one that was registered.
        reuse: What a reused step returns: "output" holds the cached outputs; "residual" adds what the blocks last
            added to their input; "linear" sums the outputs of the last `anchors` computed steps; "taylor" is that for two, which
            extrapolates; or one that was registered.
        anchors: How many computed steps are kept and summed: 4 for "linear", 2 for "taylor", 1 for "output" and "residual" unless
            it is set. Each takes as much memory as the first.
        order: Of the polynomial through the anchors that is continued where `weights` has no row: 0 holds the last anchor, 1
            continues the line through two, and so on.
        damping: How far to go from the polynomial of order `order - 1` to the one of order `order`, usually in [0, 1].
        weights: One row for each step of `steps_mask`: how much of each anchor a reused step takes, the last computed step first.
            A row sums to 1; those of computed steps are not used. None, for a step or for all, leaves it to `order` and
            `damping`. `calibrate` finds them.
        timesteps: The time at each step that `weights` were made for; a run at other times is refused. None checks nothing. At the
            steps of a generation at which another model runs, the entry is None.
        calibrated_for: The model that `weights` were made for, as `calibrate` names it; another one is refused. None checks nothing.
        cut: What is kept and summed: what the "blocks" return, or the model's "output". With "output" a reused step runs nothing
            of the model, and an anchor is as small as the model's output.
        indicator: How the change of a block's features is measured: "l1" is the paper's relative L1 change; or one that was
            registered. A policy that measures nothing ignores it.
        granularity: "stack" guards all blocks together; "block" guards each on its own: a block whose own features hardly
            change adds what it last added to its current input, so changes of the blocks before it still flow through.
            Needs `guard="graph"` and `reuse="residual"`, and keeps one residual per block.
        warmup_steps: Steps at the start that are always computed, whatever the indicator says.
        num_steps: Denoising steps of one generation (`S`), per context.
        steps_mask: For "static" and "guarded": one entry per step, 1 reuses and 0 computes. Its length is the number of steps.
        indicator_bounds: For "guarded": the largest indicator that a computed step may have, one for each step of `steps_mask`. Where
            it is larger, the next step is computed too. None, for a step or for all, is no bound.
        compute_first: Blocks at the start of the stack that are computed at every step.
        compute_last: Blocks at the end of the stack that are computed at every step.
        indicator_blocks: How many blocks are measured, spread evenly and ending with the last; "all" measures each.
            Fewer take less memory.
        indicator_tokens: One token in this many is measured; "all" measures every token, as the paper does, and
            keeps a full copy of every block's features.
        calls_per_step: How often the model is called at each step when the caller names no contexts; each call of a
            step then has a context of its own.
        decide: Whether the contexts of one step (with and without guidance) each follow their own indicator, or all
            follow the mean over all of them and so compute and reuse the same steps.
        batch_reduce: How the samples of one batch decide. "joint" measures them together; "max" follows the sample that changes most:
            one decision for the batch either way. With "per_sample" each sample follows its own schedule, and a step computes only
            the samples that need it; requires `guard="host"`.

    Raises:
        ConfigError: A value is out of its range, or the policy lacks what it needs.
    """

    threshold: float = 0.15
    reuse_interval: int | None = None
    reuse_fraction: float | None = None
    tail: float = 0.5
    policy: str = "schedule"
    reuse: str = "output"
    anchors: int | None = None
    order: int = 1
    damping: float = 1.0
    weights: Weights | None = None
    timesteps: tuple[float | None, ...] | None = None
    calibrated_for: str | None = None
    cut: Cut = "blocks"
    indicator: str = "l1"
    granularity: Granularity = "stack"
    warmup_steps: int = 0
    num_steps: int | None = None
    steps_mask: tuple[int, ...] | None = None
    indicator_bounds: tuple[float | None, ...] | None = None
    compute_first: int = 0
    compute_last: int = 0
    indicator_blocks: int | Literal["all"] = "all"
    indicator_tokens: int | Literal["all"] = 32
    calls_per_step: int = 1
    decide: Decide = "separate"
    batch_reduce: BatchReduce = "joint"

    def __post_init__(self) -> None:
        """Check every value; numbers of other libraries, such as numpy's, become Python's."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, python_number(getattr(self, field.name)))
        if self.steps_mask is not None:
            object.__setattr__(self, "steps_mask", as_mask(self.steps_mask))
        if self.weights is not None:
            object.__setattr__(self, "weights", as_weights(self.weights))
        for name in ("timesteps", "indicator_bounds"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_numbers(name, getattr(self, name)))
        check(self)

    @classmethod
    def recommended(cls, **changes: Any) -> CacheConfig:
        """Return what `transform(model)` uses with no settings: `policy="adaptive"` at threshold 0.06, with `reuse="taylor"`.

        It needs no number of steps. On the bundled model it is nearer to the full run than fewer steps are, under Euler and UniPC
        (`benchmarks/defaults.py`). A calibration is nearer still.
        """
        return cls(**{"policy": "adaptive", "threshold": 0.06, "reuse": "taylor", **changes})

    @classmethod
    def paper(cls, **changes: Any) -> CacheConfig:
        """Return the paper's settings: every block and every token is measured, `threshold` 0.15, `R` 10 %, `tail` 0.5."""
        return cls(**{"indicator_blocks": "all", "indicator_tokens": "all", **changes})

    @classmethod
    def of(cls, config: CacheConfig | Mapping[str, Any] | None, **settings: Any) -> CacheConfig:
        """Return settings from what a user passed: a configuration or a dictionary of settings, with some of them changed.

        Raises:
            ConfigError: A value is bad, or there is no setting of that name.
        """
        if config is not None and not isinstance(config, (CacheConfig, Mapping)):
            raise ConfigError(
                "config must be a CacheConfig (a calibration plan makes one: plan.at(0.4)) or a dictionary of settings, got"
                f" {type(config).__name__}."
            )
        given = {**(config if isinstance(config, Mapping) else {}), **settings}
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise ConfigError(f"unknown CacheConfig settings: {', '.join(unknown)}.\n  There are: {', '.join(names)}.")
        return config._with(given) if isinstance(config, CacheConfig) else cls(**given)

    def _with(self, changes: Mapping[str, Any]) -> CacheConfig:
        """Return the settings with some of them changed; of two that say one thing, the one that is set replaces the other."""
        changes = dict(changes)
        for one, other in (("reuse_interval", "reuse_fraction"), ("reuse_fraction", "reuse_interval")):
            if changes.get(one) is not None:
                changes.setdefault(other, None)
        return dataclasses.replace(self, **changes)

    def updated(self, config: CacheConfig | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> CacheConfig:
        """Return what `configure` is given as settings: all of them, or changes of these.

        Raises:
            ConfigError: A value is bad, or there is no setting of that name.
        """
        if isinstance(config, Mapping):
            return CacheConfig.of(self, **{**config, **changes})
        return CacheConfig.of(self if config is None else config, **changes)

    @property
    def graph_settings(self) -> GraphSettings:
        """The settings that shape the graphs."""
        values: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(GraphSettings)}
        anchors = REUSES[self.reuse].anchors if self.anchors is None else self.anchors
        return GraphSettings(**{**values, "anchors": anchors, "mask_steps": len(self.steps_mask or ())})

    def changed(self, **changes: Any) -> CacheConfig:
        """Return the settings with some of them changed, for the graphs that these settings were used for.

        Raises:
            ConfigError: A value is bad, there is no setting of that name, or the setting shapes the graphs.
        """
        names = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(changes) - names):
            raise ConfigError(f"unknown CacheConfig settings: {', '.join(unknown)}.\n  Can be changed: {_may_change()}.")
        new = self._with(changes)
        old_graphs, new_graphs = self.graph_settings, new.graph_settings
        shaping = [name for name, value in vars(old_graphs).items() if value != getattr(new_graphs, name)]
        if shaping == ["mask_steps"]:
            raise ConfigError(
                f"steps_mask has {new_graphs.mask_steps} entries, but the graphs were built for {old_graphs.mask_steps}."
                " Transform the model again with the new mask, or export it again."
            )
        if shaping:
            raise ConfigError(
                f"the graphs depend on {', '.join(name for name in shaping if name != 'mask_steps')}, which cannot be changed"
                f" now. Transform the model again, or export it again.\n  Can be changed: {_may_change()}."
            )
        return new

    def check_guard(self, guard: str) -> None:
        """Check that the settings fit the kind of guard: "host", where the caller picks the graph, or "graph".

        Raises:
            ConfigError: They do not.
        """
        if self.granularity == "block" and guard == "host":
            raise ConfigError("granularity='block' requires guard='graph': each block is guarded inside the graph.")
        if self.decide == "joint" and guard == "graph":
            raise ConfigError("decide='joint' requires guard='host': a guard inside the graph sees one context only.")
        if self.batch_reduce == "per_sample" and guard == "graph":
            raise ConfigError("batch_reduce='per_sample' requires guard='host': a guard inside the graph decides for the whole batch.")

    @property
    def steps(self) -> int | None:
        """Steps of one generation, where they are known."""
        return len(self.steps_mask) if self.steps_mask is not None else self.num_steps

    def steps_of(self, said: int | None) -> int | None:
        """Return the steps of a generation: what the caller of a step said, else what the settings say.

        Raises:
            ConfigError: Both say it, and differ for a mask.
        """
        check_steps(self, "num_inference_steps", said)
        return said or self.steps

    def resolved_interval(self, num_steps: int) -> int:
        """Return `R` in steps: `max(1, round half up of the exact product)` for a fraction."""
        if self.reuse_interval is not None:
            return self.reuse_interval
        exact = Fraction(str(PAPER_FRACTION if self.reuse_fraction is None else self.reuse_fraction)) * num_steps
        return max(1, math.floor(exact + Fraction(1, 2)))

    def tail_ratio(self) -> tuple[int, int]:
        """Return `tail` as the exact ratio of two integers: a float product would floor some values wrongly."""
        exact = Fraction(str(self.tail))
        return exact.numerator, exact.denominator

    def policy_values(self, num_steps: int | None, names: Iterable[str] | None = None) -> dict[str, Values]:
        """Return the values of `graph_settings.parameters` by name.

        Args:
            num_steps: Steps of a generation, if they are known.
            names: Which ones, in this order, such as `GraphIO.parameters`; all in their order if not given. What decides is made
                only where one of its values is asked for, and so is what is summed.

        Raises:
            ConfigError: The policy needs the number of steps and it is not known.
        """
        settings, policy = self.graph_settings, POLICIES[self.policy]
        wanted = [parameter.name for parameter in settings.parameters] if names is None else list(names)
        made: dict[str, Values] = {}
        if any(parameter.name in wanted for parameter in policy.parameters):
            made |= policy.values(self, num_steps)
        if settings.way.values is not None and any(parameter.name in wanted for parameter in settings.way.parameters):
            made |= settings.way.values(self)
        return {name: made[name] for name in wanted}

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON, whole or not at all."""
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CacheConfig:
        """Read settings written by `save`.

        Raises:
            ConfigError: The file is no JSON object, names an unknown setting, or holds a bad value.
        """
        try:
            values = json.loads(Path(path).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            extra = ", ".join(sorted(set(values) - known)) if isinstance(values, dict) else f"a {type(values).__name__}, not a dictionary"
            raise ConfigError(f"{path} contains unknown CacheConfig settings: {extra}. Pass a file that CacheConfig.save wrote.")
        return cls(**values)
