"""Fit the weights of reused steps so that each brings the next latents nearest to those of the full generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bwcache_compile.calibration.generation import Generation
from bwcache_compile.calibration.recording import RecordedStep
from bwcache_compile.calibration.rules import rule_weights
from bwcache_compile.calibration.sampler_map import SamplerMap

RIDGE = 1e-3
_LEAST = 0.3
"""A clip that is off by less than this share of the median counts as one that is off by so much."""


def solve_weights(candidates: Tensor, target: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Return the weights with sum 1 whose combination of candidates is nearest to a target, drawn towards a prior.

    Args:
        candidates: float64[K, M].
        target: float64[M].
        prior: float64[K], with sum 1.
        ridge: Strength of the pull towards the prior, relative to the candidates' mean squared difference.
    """
    if len(candidates) == 1:
        return prior.clone()
    apart = candidates[:-1] - candidates[-1:]
    gram = apart @ apart.T
    strength = ridge * float(torch.diagonal(gram).mean())
    if strength == 0:
        return prior.clone()
    missing = target - prior @ candidates
    change = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), apart @ missing)
    return prior + torch.cat([change, -change.sum().reshape(1)])


def balanced(target: Tensor, candidates: Tensor, prior: Tensor, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Scale a system so that each clip counts alike, whatever it is off by under the prior.

    One clip that went another way would decide for all, as its squares are the largest.

    Args:
        target: float64[M].
        candidates: float64[K, M].
        prior: float64[K].
        clips: int64[M], the clip that each element belongs to.
    """
    missing = target - prior @ candidates
    off = torch.zeros(int(clips.max()) + 1, dtype=missing.dtype).index_add(0, clips, missing.square()).sqrt()
    scale = 1 / off.clamp(min=max(_LEAST * float(off.median()), 1e-30))
    return target * scale[clips], candidates * scale[clips]


class DriftCorrection:
    """Solves for the weights of each reused step while a generation runs."""

    def __init__(self, full: Sequence[RecordedStep], sampler: SamplerMap | None, ridge: float = RIDGE) -> None:
        """Bring generations back to a full one.

        Args:
            full: The generation in which every step was computed.
            sampler: Its sampler's steps; without them each step's outputs are fitted, which corrects no drift.
            ridge: See `solve_weights`.
        """
        self._full, self._sampler, self._ridge = full, sampler, ridge

    def __call__(self, run: Generation, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the weights of the step that `run` is at."""
        step, count = run.recorder.step, run.cut.anchors
        anchors = run.anchors[key]
        prior = rule_weights("linear", anchors, step, count)
        if step + 1 >= len(self._full):
            return prior
        target, candidates = self._system(run, key, args, kwargs, len(anchors))
        if self._sampler is not None and run.recorder.moving_input is not None:
            target, candidates = balanced(target, candidates, prior[: len(anchors)], run.recorder.moving_input.clip_of_elements())
        weights = torch.zeros(count, dtype=torch.float64)
        weights[: len(anchors)] = solve_weights(candidates, target, prior[: len(anchors)], self._ridge)
        return weights

    def _system(self, run: Generation, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
        """Return what the weighted sum of the candidates is to equal, float64[M], and the candidates, float64[K, M].

        With a sampler's map, these are parts of the next latents; without, the outputs of this step one after another.
        """
        step = run.recorder.step
        factors = {} if self._sampler is None else self._sampler.output_coefficients(step)
        targets, sums = [], []
        for name, recorded in self._full[step].outputs.items():
            if run.anchors.get(name) != run.anchors[key]:  # it will be computed, or was guided at other steps
                continue
            outputs = self._candidates(run, name, key, args, kwargs, count)
            for piece, output in enumerate(recorded):
                factor = 1.0 if self._sampler is None else factors.get((name, piece), 0.0)
                targets.append(factor * output.double())
                sums.append(factor * torch.stack([pieces[piece] for pieces in outputs]).double())
        if self._sampler is None:
            return torch.cat(targets), torch.cat(sums, 1)
        known = self._sampler.known(run.recorder.steps, self._full, step)
        return torch.stack(targets).sum(0) - known, torch.stack(sums).sum(0)

    def _candidates(
        self, run: Generation, name: str, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], count: int
    ) -> list[tuple[Tensor, ...]]:
        """Return a context's output for each anchor alone, as recorded elements."""
        moving_input = run.recorder.moving_input
        assert moving_input is not None, "a sampler map needs the latents"
        if name != key and run.cut.reads_inputs:
            current = moving_input.tensor(args, kwargs)
            assert current is not None, "the recorder found it"
            args, kwargs = moving_input.replaced(*self._full[run.recorder.step].calls[name], current)
        hot = torch.eye(run.cut.anchors, dtype=torch.float64)[:count]
        return [moving_input.read_output(run.cut.reuse(args, kwargs, run.states[name], weights)) for weights in hot]
