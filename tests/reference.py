"""The oracle: BWCache in eager Python over a dict, by putting stand-ins for the blocks' forwards. Slow and plain."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


def decide(indicators: dict[int, float], step: int, trigger: int | None, config: Any) -> tuple[bool, int | None]:
    """Whether `step` reuses, and the trigger, from the definition; `indicators` holds what computed steps measured."""
    s, k = config.num_steps, trigger
    fraction = Fraction(str(0.1 if config.reuse_fraction is None else config.reuse_fraction))
    interval = config.reuse_interval or max(1, math.floor(fraction * s + Fraction(1, 2)))
    last = max(indicators, default=None)
    if last is None or not math.isfinite(indicators[last]):
        return False, k
    if k is None and last >= max(1, config.warmup_steps) and indicators[last] < config.threshold:
        k = last
    if k is None:
        return False, None
    return not ((step - k) % (interval + 1) == 0 or step >= s - math.floor(Fraction(str(config.tail)) * k)), k


class Oracle:
    """Runs a model step by step; `streams` names the block inputs that the outputs continue, in output order or as they are joined.

    `rows` are the rows that the model returns, of a stream that holds text or frames of the past beside them.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        streams: tuple[str, ...],
        config: Any,
        rows: slice = slice(None),
        continued: Any = None,
    ) -> None:
        self.arranged = continued
        self.model, self.blocks, self.streams, self.config, self.rows = model, blocks, streams, config, rows
        self.kept: dict[Any, Any] = {}
        self.step, self.trigger, self.indicators, self.times = 0, None, {}, []
        self.computed: list[int] = []

    def _feature(self, outs: tuple[Tensor, ...]) -> Tensor:
        joined = len(outs) < len(self.streams) or "hidden_states" not in self.streams
        feature = outs[0 if joined else self.streams.index("hidden_states")]
        return (feature if feature.shape[1] < (self.rows.stop or 0) else feature[:, self.rows]).float()

    def _continued(self, entered: tuple[Tensor, ...], outs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Return what outputs continue: the streams, joined in their order if the last block has them joined, or as `continued` says."""
        if self.arranged is not None:
            return self.arranged(entered)
        return entered if len(outs) == len(entered) else (torch.cat(entered, dim=1),)

    def _reused(self, name: int, now: float) -> tuple[Tensor, ...]:
        last, previous = self.kept[name], self.kept.get(("previous", name))
        if self.config.reuse == "taylor" and previous is not None:
            moves = self.times[-1] != self.times[-2]  # where the time stands still, steps are counted
            (before, at), here = (self.times[-2:], now) if moves else (self.computed[-2:], self.step)
            weight = torch.tensor((here - at) / (at - before), dtype=torch.float32)
            return tuple(
                (a.float() + weight * (a.float() - b.float())).to(a.dtype) if a is not None else a
                for a, b in zip(last, previous, strict=True)
            )
        return last

    def __call__(self, now: float | None = None, **inputs: Any) -> Any:
        now = float(self.step) if now is None else now
        mask = self.config.steps_mask
        reuse, self.trigger = (bool(mask[self.step]), None) if mask else decide(self.indicators, self.step, self.trigger, self.config)
        first, final, changes, entered = 0, len(self.blocks) - 1, [], {}

        def stand_in(i: int, original: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                bound = inspect.signature(original).bind(*args, **kwargs).arguments
                if i == first:
                    entered["in"] = tuple(bound[name] for name in self.streams)
                if reuse and self.config.reuse == "residual" and i == final:
                    kept = self.kept["residual"]
                    outs = tuple(r if r is None else x + r for x, r in zip(self._continued(entered["in"], kept), kept, strict=True))
                elif reuse:
                    outs = self._reused(i, now)
                else:
                    result = original(*args, **kwargs)
                    outs = result if isinstance(result, tuple) else (result,)
                    if i in self.kept:
                        old, new = self._feature(self.kept[i]), self._feature(outs)
                        changes.append(((new - old).abs().sum() / old.abs().sum()).item())
                        self.kept["previous", i] = self.kept[i]
                    self.kept[i] = tuple(None if out is None else out.clone() for out in outs)  # a last block may end its text stream
                    if i == final and self.config.reuse == "residual":
                        self.kept["residual"] = tuple(
                            y if y is None else y - x for y, x in zip(outs, self._continued(entered["in"], outs), strict=True)
                        )
                return outs if len(outs) > 1 else outs[0]

            return forward

        originals = [block.forward for block in self.blocks]
        for i, block in enumerate(self.blocks):
            block.forward = stand_in(i, originals[i])  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                result = self.model(**inputs)
        finally:
            for block in self.blocks:
                del block.forward
        if not reuse:
            self.indicators[self.step] = sum(changes) / len(changes) if changes else math.inf
            self.times.append(now)
            self.computed.append(self.step)
        self.step += 1
        self.reused = reuse
        return result


class BlockOracle:
    """Runs a model of one-stream blocks with a guard per block: each decides by its own change, and reuses its own residual."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], config: Any) -> None:
        self.model, self.blocks, self.config = model, blocks, config
        self.step = 0
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.triggers: list[int | None] = [None] * len(blocks)
        self.indicators: list[dict[int, float]] = [{} for _ in blocks]

    def __call__(self, *inputs: Tensor) -> tuple[Any, list[bool]]:
        reused = []
        for i in range(len(self.blocks)):
            reuse, self.triggers[i] = decide(self.indicators[i], self.step, self.triggers[i], self.config)
            reused.append(reuse)

        def stand_in(i: int, original: Any) -> Any:
            def forward(x: Tensor, *args: Any) -> Tensor:
                if reused[i]:
                    return x + self.kept[i][1]
                y = original(x, *args)
                change = math.inf
                if i in self.kept:
                    old = self.kept[i][0].float()
                    change = ((y.float() - old).abs().sum() / old.abs().sum()).item()
                self.indicators[i][self.step] = change
                self.kept[i] = (y.clone(), y - x)
                return y

            return forward

        for i, block in enumerate(self.blocks):
            block.forward = stand_in(i, block.forward)  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                result = self.model(*inputs)
        finally:
            for block in self.blocks:
                del block.forward
        self.step += 1
        return result, reused
