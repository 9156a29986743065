"""One language of sizes: what is printed is what is evaluated, over ints and symbolic ints, and nothing else runs."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy import functions as sym

import bwcache_compile as bw
from bwcache_compile.ir.sizes import print_expression
from bwcache_compile.size_expressions import SizeError, evaluate, evaluated, largest, names_in

A, B = sympy.symbols("a b", integer=True, positive=True)


@pytest.mark.parametrize(("expression", "text"), [
    (sym.TruncToInt(sym.FloatPow(sym.ToFloat(A), 0.5)), "trunc(float(a) ** 0.5)"),
    (sym.TruncToInt(sym.OpaqueUnaryFn_sqrt(sym.ToFloat(A))), "trunc(sqrt(float(a)))"),
    (sym.FloorToInt(sym.IntTrueDiv(A, B)), "floor(a / b)"),
    (sym.CeilToInt(sym.FloatTrueDiv(sym.ToFloat(A), 2.0)), None),
    (sym.RoundToInt(sym.IntTrueDiv(A, B)), "round(a / b)"),
    (sym.Max(1, sym.FloorDiv(A * B, 32)), "max(1, (a*b) // 32)"),
    (sympy.Eq(sym.PythonMod(A - B, 3), 0), None),
    (sympy.And(A < B, sympy.Ne(A, 7)), None),
    (A**3 - 2 * B, None),
])  # fmt: skip
def test_what_is_printed_is_evaluated(expression: Any, text: str | None) -> None:
    printed = print_expression(expression)
    assert sorted(names_in(printed)) == ["a", "b"][: len(expression.free_symbols)]
    assert text in (printed, None)
    for a, b in ((16, 3), (255, 16), (256, 7), (10**6, 9)):
        assert evaluate(printed, {"a": a, "b": b}) == expression.subs({A: a, B: b})


def test_a_size_that_the_language_lacks_is_refused() -> None:
    for expression in (sym.OpaqueUnaryFn_cos(sym.ToFloat(A)), sym.Where(A > 2, A, B)):
        with pytest.raises(bw.CaptureError, match=r"^the size .* cannot be dynamic: "):
            print_expression(expression)


def test_symbolic_ints_record_the_arithmetic() -> None:
    sizes = ("trunc(float(s) ** 0.5)", "max(4, s // 2)", "floor(s / 3)", "trunc(sqrt(s))")

    def function(x: torch.Tensor) -> torch.Tensor:
        s = x.shape[0]
        return x.new_zeros(evaluated(sizes, {"s": s}))

    graph = make_fx(function, tracing_mode="symbolic")(torch.zeros(49))
    for s in (49, 64, 50, 9):
        assert graph(torch.zeros(s)).shape == evaluated(sizes, {"s": s}) == (math.isqrt(s), max(4, s // 2), s // 3, math.isqrt(s))


@given(st.lists(st.integers(-50, 50), min_size=1))
def test_largest_of_ints(values: list[int]) -> None:
    assert largest(*values) == max(values)


@pytest.mark.parametrize(
    "size",
    [
        "__import__('os')",
        "a.real",
        "[a]",
        "a if a else a",
        "max()",
        "b",
        "a // 0",
        "a ** a ** a",
        "(0 - a) ** 0.5",
        "trunc(1e400)",
        "'a'",
        "a +",
    ],
)
def test_nothing_else_is_evaluated(size: str) -> None:
    with pytest.raises(SizeError, match="cannot be evaluated: "):
        evaluate(size, {"a": 99})


def test_the_evaluator_needs_no_torch() -> None:
    code = (
        "import sys; from bwcache_compile.size_expressions import evaluate;"
        " assert evaluate('max(trunc(float(a) ** 0.5), 3)', {'a': 16}) == 4; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
