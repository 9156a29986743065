"""Drawn architectures: each equals eager at threshold 0 and the oracle under a forced mask, or is refused by name.

The same examples are drawn at every run; `benchmarks/drawn.py` draws others.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.drawn import Spec
from tests.drawn_blocks import Stack
from tests.drawn_cases import Case, cases
from tests.drawn_check import Outcome, check, tally


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_drawn_architectures(examples: int) -> None:
    outcomes: list[Outcome] = []

    @settings(max_examples=examples, derandomize=True, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases())
    def each(case: Case) -> None:
        outcomes.append(check(case))

    each()
    counts = tally(outcomes)
    assert counts["right"] >= 0.85 * examples, counts
    assert counts["right, and reusing made a difference"] >= 0.8 * counts["right"], "the check shows little"
    assert counts["right, and equal to the oracle bit for bit"] >= 0.9 * counts["right"], counts


FOUND = {
    "streams edited in place, the embedding read after the blocks": Case(Spec((Stack(residual="iadd"),), epilogue="start")),
    "two names of one stream, edited in place behind the region": Case(
        Spec((Stack(residual="copy", depth=4),), epilogue="start"), "taylor", compute_last=1
    ),
    "rows of the stream edited in place": Case(Spec((Stack(residual="rows", depth=3),), epilogue="scale_"), "residual"),
    "memory shared by the blocks": Case(Spec((Stack(residual="scratch"),)), "taylor"),
    "the embedded time edited by each block": Case(Spec((Stack(modulation="decay"),), epilogue="adaln")),
    "an input for each block, and an odd last block": Case(Spec((Stack(), Stack(own=True, odd="last")), streams=2)),
    "a stream that is viewed where an equal one of other strides stands for it": Case(
        Spec(
            (
                Stack("spacetime", mixer="sdpa", norm="rms", modulation="none", constant="factor", own=True, skip="cat", feed=False),
                Stack(residual="scratch", norm="rms", modulation="none", odd="last", hints=1, feed=False),
            ),
            streams=2,
            code="attributes",
            refine_text=2,
        ),
        "residual",
        compute_first=1,
    ),
    "the caller's tensor edited": Case(Spec((Stack(),), prologue="input")),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    outcome = check(FOUND[name])
    assert (outcome.refused, outcome.fallback) == ("", "")
    assert outcome.exact
    assert outcome.matters
    assert outcome.whole


HINTS = {
    "a stream that the first block projects": Case(
        Spec((Stack(kind="double", depth=3, odd="first", hints=2, glue="linear"),), streams=3), "residual"
    ),
    "a stream that is scaled, then laid out anew": Case(
        Spec(
            (
                Stack(norm="autocast", modulation="adaln", constant="roll", hints=1, feed=False),
                Stack(depth=3, norm="rms", modulation="adaln", constant="factor", odd="last", glue="scale", feed=False),
                Stack("spacetime", norm="autocast", modulation="adaln", constant="row", odd="first", skip="add", hints=1),
            ),
            seed=6027,
            code="wrapped",
            batch=2,
            text_first=False,
            time="guidance",
            returns="tuple",
        ),
        "residual",
        trigger=2,
        compute_last=1,
    ),
}


@pytest.mark.parametrize("name", HINTS)
def test_residual_of_a_hint_is_refused(name: str) -> None:
    """What is added on the way is not what the stream continues."""
    outcome = check(HINTS[name])
    assert "no such input was found" in outcome.fallback
    assert outcome.exact
    assert outcome.whole
