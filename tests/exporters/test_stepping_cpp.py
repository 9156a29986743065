"""The step machine in Python and in C++ take the same decisions on the same scripts of calls."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from bwcache_compile.clock import TimeInput
from bwcache_compile.errors import StateError
from bwcache_compile.stepping import StepInfo, Tracker

ROOT = Path(__file__).parents[2]
Call = tuple[StepInfo, bool, str, dict[str, TimeInput]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("stepping") / "driver"
    source = Path(__file__).with_name("stepping_driver.cpp")
    subprocess.run(["g++", "-std=c++20", "-O1", f"-I{ROOT / 'examples' / 'aoti'}", str(source), "-o", str(program)], check=True)
    return program


def bfloat16(value: float) -> float:
    """Round as the upper half of a float32 does, near enough for times up to 1000."""
    digits = 2.0 ** max(0, len(bin(int(value))) - 2 - 8) if value >= 1 else 2.0**-8
    return round(value / digits) * digits


def script(seed: int) -> list[Call]:
    """Draw calls of up to three contexts, in runs that are broken off, repeated and shorter than told."""
    draw = random.Random(seed)
    names = draw.sample(["cond", "uncond", "default"], draw.randint(1, 3))
    group, named, half = draw.choice(["", "", "a"]), draw.random() < 0.7, draw.random() < 0.5
    indexed, num_steps = draw.random() < 0.3, draw.choice([None, 4, 6])
    pace = draw.choice([120.0, 1.5])
    calls: list[Call] = []
    for run in range(draw.randint(1, 4)):
        signature, late, rises = draw.choice(["A", "A", "A", "B"]), draw.randint(0, 3), draw.random() < 0.2
        for step in range(draw.randint(1, 8)):
            time = 10 + pace * step if rises else 1000 - pace * step
            recast = half and not (step == 0 and draw.random() < 0.5)
            value = bfloat16(time) if recast else time
            inputs = {"t": TimeInput(1, recast, lambda value=value: (value,))}
            if draw.random() < 0.5:
                inputs["guidance"] = TimeInput(1, False, lambda: (3.5,))
            if draw.random() < 0.5:
                inputs["pooled"] = TimeInput(2, half, lambda run=run: (run * 0.5, 1 - run * 0.25))
            for name in names if named else names[:1]:
                if name == "uncond" and step < late:
                    continue
                info = StepInfo(name, step if indexed else None, num_steps, named, group)
                calls.append((info, draw.random() < 0.9, signature, inputs))
    return calls


def line(call: Call) -> str:
    info, succeeds, signature, inputs = call
    said = [-1 if value is None else value for value in (info.step_index, info.num_steps)]
    words = [info.group or "-", info.context, *said, int(info.named), int(succeeds), signature]
    for name, value in inputs.items():
        numbers = value.read()
        words += [name, value.rank, int(value.half), len(numbers), *numbers]
    return " ".join(map(str, words))


def decisions(calls: list[Call]) -> list[str]:
    trackers: dict[str, Tracker] = {}
    newest: dict[str, Tracker] = {}
    found = []
    for info, succeeds, signature, inputs in calls:
        try:
            made = trackers.get(info.key, Tracker()).advance(info, signature, inputs, info.num_steps, newest.get(info.group))
        except StateError as error:
            found.append(f"refused: {error}")
            continue
        found.append(f"{made.step}|{made.began}|{made.cleared}|{made.event}")
        if succeeds:
            trackers[info.key] = made.tracker
            latest = newest.get(info.group)
            if latest is None or latest.run <= made.tracker.run:
                newest[info.group] = made.tracker
    return found


def test_both_decide_alike_on_drawn_scripts(driver: Path) -> None:
    scripts = [script(seed) for seed in range(400)]
    lines = [text for calls in scripts for text in ("reset", *map(line, calls))]
    ran = subprocess.run([driver], input="\n".join(lines), capture_output=True, text=True, check=True).stdout.splitlines()
    found = iter(ran)
    for seed, calls in enumerate(scripts):
        assert [next(found) for _ in calls] == decisions(calls), f"script {seed}"
    rules = ("went back", "inputs changed", "were complete", "new run", "repeats", "step index", "refused: two consecutive calls")
    assert [rule for rule in rules if rule not in "".join(ran)] == [], "every rule was drawn"
