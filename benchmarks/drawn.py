"""Check many drawn architectures and record what came of them: `python -m benchmarks.drawn --examples 10000`.

Runs in rounds, one seed each; the record is written after every round. A second call checks again what was wrong, and goes
on where the record ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.record import write_record
from tests.drawn import Spec
from tests.drawn_blocks import Stack
from tests.drawn_cases import Case, cases
from tests.drawn_check import Outcome, check, tally

ROUND = 100


def each_case(number: int, use: Callable[[Case], None]) -> None:
    """Draw one round of cases; a round is the same whenever it is drawn."""

    @seed(number)
    @settings(max_examples=ROUND, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases())
    def each(case: Case) -> None:
        use(case)

    each()


def architecture(case: Case) -> str:
    """Return what counts as one architecture: everything but the numbers in its weights and how it is cached."""
    return repr(dataclasses.replace(case.spec, seed=0))


def check_all(drawn: list[Case]) -> dict[str, Any]:
    """Check cases; what is wrong is kept with its case, from which alone it can be run again."""
    outcomes: list[Outcome] = []
    wrong: list[dict[str, str]] = []

    start = time.perf_counter()
    for case in drawn:
        try:
            outcomes.append(check(case))
        except Exception as error:  # recorded, whatever it is: a long run should find more than one fault
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append({"case": repr(case), "error": f"{type(error).__name__}: {error}", "at": f"{place.name}:{place.lineno}"})
    return {**tally(outcomes), "wrong": wrong, "seconds": round(time.perf_counter() - start, 1)}


def run_round(number: int) -> tuple[dict[str, Any], set[str]]:
    """Check one round of cases; return its counts and its architectures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.freeze()  # torch's modules alone are a million objects, which every full collection would visit
    gc.set_threshold(20_000, 20, 20)
    drawn: list[Case] = []
    each_case(number, drawn.append)
    return check_all(drawn), {architecture(case) for case in drawn}


def check_again(total: dict[str, Any]) -> dict[str, Any]:
    """Check what was wrong once more, after something was mended."""
    names = {"Case": Case, "Spec": Spec, "Stack": Stack, "torch": torch}
    drawn = [eval(wrong["case"], names) for wrong in total.get("wrong", [])]  # our own record, printed by our own classes
    return added({**total, "wrong": []}, check_all(drawn))


def added(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Add the counts of a round to those before it."""
    result = dict(total)
    for key, value in part.items():
        if isinstance(value, dict):
            result[key] = added(result.get(key, {}), value)
        else:
            result[key] = value if key not in result else result[key] + value
    return result


def main() -> None:
    """Run the rounds that the record lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1, help="processes, one round each at a time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/drawn.json"))
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {"rounds": 0, "architectures": 0, "total": {}}
    record |= {"command": "python -m benchmarks.drawn", "torch": torch.__version__}
    seen: set[str] = set()
    for number in range(record["rounds"]):
        each_case(number, lambda case: seen.add(architecture(case)))
    record["total"] = check_again(record["total"])
    write_record(options.out, record)
    missing = range(record["rounds"], math.ceil(options.examples / ROUND))
    # a fresh process now and then: what the compiler keeps of thousands of models is of no use to the next
    with get_context("spawn").Pool(options.workers, maxtasksperchild=10) as pool:
        for part, drawn in pool.imap(run_round, missing):
            seen |= drawn
            record["total"] = added(record["total"], part)
            record["architectures"] = len(seen)
            record["rounds"] += 1
            write_record(options.out, record)
            total = record["total"]
            print(
                f"{total['examples']} examples: {total['right']} right, {len(total['wrong'])} wrong, {total['seconds']:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
