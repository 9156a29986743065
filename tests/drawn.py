"""Architectures from a description: one frozen `Spec` says all, so a failure is reproduced from its printed spec alone.

A model is a prologue, a list of items over named values (blocks, and glue between them), and an epilogue. The oracle in
`tests/drawn_check.py` runs the same items with some of them replaced; nothing here knows the package under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.drawn_blocks import WIDTH, Block, Short, Stack, Weights, added, block_weights, run_block

State = dict[str, Tensor]
"""Named values; what is called `x:skip1` continues the stream `x`."""

CHANNELS, FRAMES = 4, 2


@dataclasses.dataclass(frozen=True, repr=False)
class Spec(Short):
    """A whole model and the sizes of its inputs."""

    stacks: tuple[Stack, ...]
    seed: int = 0
    code: str = "modules"  # modules, attributes, wrapped, functional
    streams: int = 1
    batch: int = 1
    places: int = 2
    dtype: torch.dtype = torch.float32
    text_first: bool = True
    refine_text: int = 0
    refine_x: int = 0
    alternate: bool = False  # blocks of the first two stacks in turn
    time: str = "float32"  # float32, bfloat16, int64, guidance (two inputs that could be the time)
    prologue: str = "plain"  # plain, fill (writes rows of x), input (writes to the caller's tensor)
    epilogue: str = "plain"  # plain, adaln, scale_ (in place), start (adds the embedding), tap (adds the first block's output)
    returns: str = "tensor"  # tensor, tuple, dict, view


@dataclasses.dataclass(frozen=True)
class Item:
    """A step of the model between prologue and epilogue; a block's name is its module's path."""

    run: Callable[[State], None]
    block: str | None = None


class Drawn(nn.Module):
    """The model of a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.draw = spec, Weights(spec.seed, spec.dtype)
        draw, names = self.draw, ("x", "text", "audio")[: spec.streams]
        self.streams = names
        self.embed = nn.ParameterDict({name: draw(WIDTH, CHANNELS) for name in names})
        self.time, self.head, self.tail = draw(WIDTH, 2), draw(CHANNELS, WIDTH), draw(2 * WIDTH, WIDTH)
        self.flat = nn.ParameterList()
        self.items: list[Item] = []
        self.own = nn.ParameterList(draw(WIDTH, WIDTH) for _ in range(max(s.depth * s.own for s in spec.stacks)))
        self.glue = nn.ParameterList(draw(WIDTH, WIDTH) for _ in spec.stacks)
        self.items = [*self._side("text", "text", spec.refine_text if "text" in names else 0), Item(self._own)]
        self.items += [*self._side("refine", "x", spec.refine_x), Item(self._start)]
        self.items += self._side("control", "hint", 2 if any(stack.hints for stack in spec.stacks) else 0)
        parts = [self._stack(number, stack) for number, stack in enumerate(spec.stacks)]
        if spec.alternate:
            first, second, *rest = parts
            turns = max(len(first), len(second))
            parts = [[i for k in range(turns) for part in (first, second) for i in part[k : k + 1]], *rest]
        groups = [group for part in parts for group in part]
        if spec.epilogue == "tap" and len(groups) > 1 and spec.stacks[0].kind != "joint":
            groups[0].append(Item(lambda s: s.update({"x:tap": s["x"].clone()})))
        self.items += [item for group in groups for item in group]

    def _block(self, list_name: str, stack: Stack, index: int) -> tuple[str, Callable[..., list[Tensor]]]:
        weights = block_weights(stack, index, len(self.streams), self.draw)
        if self.spec.code == "functional":
            self.flat.extend(weights.values())
            return f"{list_name}.{index}", lambda *args: run_block(stack, index, weights, *args)
        block = Block(stack, index, weights)
        if self.spec.code == "attributes":
            self.add_module(f"{list_name}_{index}", block)
            return f"{list_name}_{index}", block
        if not hasattr(self, list_name):
            self.add_module(list_name, nn.ModuleList())
        self.get_submodule(list_name).append(block)  # type: ignore[operator]
        return f"{list_name}.{index}", block

    def _side(self, name: str, key: str, depth: int) -> list[Item]:
        """Return the items of a stack beside the main ones: a refiner, or the control stack that makes the hints."""
        items = []
        for i in range(depth):
            path, block = self._block(f"side_{name}", Stack(depth=depth, feed=False), i)

            def run(s: State, block: Any = block, i: int = i) -> None:
                (s[key],) = block([s[key]], s["temb"], None, None, None)
                if key == "hint":
                    s[f"hint{i}"] = s[key]

            items.append(Item(run, path))
        return items

    def _stack(self, number: int, stack: Stack) -> list[list[Item]]:
        """Return the items of each block of a stack."""
        spec, key = self.spec, "joined" if stack.kind == "joint" else "x"
        streams = self.streams if stack.kind == "double" else (key,)
        groups: list[list[Item]] = []
        for i in range(stack.depth):
            group = [Item(self._join)] if stack.kind == "joint" and (i == 0 or spec.alternate) else []
            for layout in ("space", "time") if stack.kind == "spacetime" else ("",):
                name, block = self._block(f"stack{number}{layout}", stack, i)
                source = (
                    f"{key}:skip{number}.{stack.depth - 1 - i}"
                    if not layout and stack.skip != "none" and i >= (stack.depth + 1) // 2
                    else ""
                )

                def run(s: State, block: Any = block, i: int = i, source: str = source, layout: str = layout) -> None:
                    own = s.get(f"own{i}") if stack.own and not layout else None
                    temb = s["temb"] if not layout else s["temb"].repeat_interleave(FRAMES if layout == "space" else spec.places, 0)
                    done = block([s[name] for name in streams], temb, own, s.get(source), s.get("scratch"))
                    s.update(zip(streams, done, strict=True))

                if layout:
                    group.append(Item(self._spatial if layout == "space" else self._temporal))
                group.append(Item(run, name))
            if stack.kind == "spacetime":
                group.append(Item(self._together))
            group += self._after(number, stack, i, key)
            if stack.kind == "joint" and (i == stack.depth - 1 or spec.alternate):
                group.append(Item(self._part))
            groups.append(group)
        return groups

    def _after(self, number: int, stack: Stack, i: int, key: str) -> list[Item]:
        """Return what stands between a block and the next: kept for a long skip, hint, glue."""
        items = []
        if stack.skip != "none" and i < stack.depth // 2:
            items.append(Item(lambda s: s.update({f"{key}:skip{number}.{i}": s[key].clone()})))
        if i == stack.depth - 1:
            return items
        if stack.hints and (i + 1) % stack.hints == 0 and key == "x":
            hint = f"hint{(i // stack.hints) % 2}"
            items.append(Item(lambda s: s.update({"x": added(s["x"], s[hint], "iadd" if stack.residual == "iadd" else "sum", None)})))
        if stack.glue == "scale":
            items.append(Item(lambda s: s.update({key: s[key] * 0.9})))
        elif stack.glue == "norm":
            items.append(Item(lambda s: s.update({key: functional.layer_norm(s[key], (WIDTH,))})))
        elif stack.glue == "linear":
            items.append(Item(lambda s: s.update({key: s[key] + functional.linear(s[key], self.glue[number])})))
        return items

    def _join(self, s: State) -> None:
        parts = [s[name] for name in self.streams]
        s["joined"] = torch.cat([*parts[1:], parts[0]] if self.spec.text_first else parts, dim=1)

    def _part(self, s: State) -> None:
        names = [*self.streams[1:], "x"] if self.spec.text_first else list(self.streams)
        s.update(zip(names, s["joined"].split([s[name].shape[1] for name in names], dim=1), strict=True))

    def _spatial(self, s: State) -> None:
        s["x"] = s["x"].reshape(self.spec.batch * FRAMES, self.spec.places, WIDTH)

    def _temporal(self, s: State) -> None:
        x = s["x"].reshape(self.spec.batch, FRAMES, self.spec.places, WIDTH).transpose(1, 2)
        s["x"] = x.reshape(self.spec.batch * self.spec.places, FRAMES, WIDTH)

    def _together(self, s: State) -> None:
        x = s["x"].reshape(self.spec.batch, self.spec.places, FRAMES, WIDTH).transpose(1, 2)
        s["x"] = x.reshape(self.spec.batch, FRAMES * self.spec.places, WIDTH)

    def start(self, inputs: dict[str, Tensor]) -> State:
        """Run the prologue."""
        spec = self.spec
        if spec.prologue == "input":
            inputs["x"].mul_(0.5)
        s = {name: functional.linear(inputs[name], weight) for name, weight in self.embed.items()}
        t = sum(inputs[name].to(spec.dtype) for name in ("t", "guidance") if name in inputs)
        assert isinstance(t, Tensor)
        s["temb"] = functional.linear(torch.stack([t, torch.cos(3 * t)], dim=-1), self.time)
        if spec.prologue == "fill":
            s["x"][:, :1] = s["temb"].unsqueeze(1)
        return s

    def _own(self, s: State) -> None:
        """Make an input for each block."""
        if self.own:
            other = s["text"] if "text" in s else s["x"]
            rows = torch.stack([functional.linear(other.mean(1, keepdim=True), weight) for weight in self.own])
            s |= {f"own{i}": rows[i] for i in range(len(rows))}

    def _start(self, s: State) -> None:
        """Keep the embedding, and make the memory that blocks share."""
        s["start"] = s["hint"] = s["x"]
        if any(stack.residual == "scratch" for stack in self.spec.stacks):
            s["scratch"] = torch.zeros_like(s["x"])

    def finish(self, s: State) -> Any:
        """Run the epilogue."""
        spec, x = self.spec, s["x"]
        if spec.epilogue == "adaln":
            scale, shift = functional.linear(s["temb"], self.tail).unsqueeze(1).chunk(2, dim=-1)
            x = functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        elif spec.epilogue == "scale_":
            x = x.mul_(2)
        elif spec.epilogue == "start":
            x = x + s["start"]
        elif spec.epilogue == "tap":
            x = x + s.get("x:tap", s["start"])
        out = functional.linear(x, self.head)
        if spec.returns == "view":
            return out, x[:, :1]
        others = {name: s[name].mean(1) for name in self.streams[1:]}
        return {"tensor": out, "tuple": (out, *others.values()), "dict": {"sample": out, **others}}[spec.returns]

    def run_items(self, s: State, items: Iterable[int]) -> None:
        """Run some items."""
        for number in items:
            self.items[number].run(s)

    def forward(self, **inputs: Tensor) -> Any:
        s = self.start(inputs)
        self.run_items(s, range(len(self.items)))
        return self.finish(s)


class Wrapped(nn.Module):
    """A model inside another, as pipelines' denoisers sometimes are."""

    def __init__(self, model: Drawn) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def example(spec: Spec, step: int) -> dict[str, Tensor]:
    """Return the inputs of one step; they move a little from step to step, the text does not."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    rows = {"x": FRAMES * spec.places, "text": 3, "audio": 2}
    made = {}
    for name, count in list(rows.items())[: spec.streams]:
        base, drift = torch.randn((2, spec.batch, count, CHANNELS), generator=generator)
        made[name] = (base + (0.2 * step * drift if name == "x" else 0)).to(spec.dtype)
    time = torch.full((spec.batch,), 8 - step) if spec.time == "int64" else torch.full((spec.batch,), 1 - step / 8)
    made["t"] = time.to(torch.bfloat16) if spec.time == "bfloat16" else time
    if spec.time == "guidance":
        made["guidance"] = torch.full((spec.batch,), 0.5)
    return made
