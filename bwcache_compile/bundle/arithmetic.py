"""Sizes and conditions of a manifest. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from bwcache_compile.errors import BundleError
from bwcache_compile.size_expressions import SizeError, evaluate


def arithmetic(size: int | str, symbols: Mapping[str, int]) -> int:
    """Return a size, or the truth of a condition, where the symbols have these values.

    Raises:
        BundleError: It is no arithmetic over these symbols, or no whole number.
    """
    try:
        value = evaluate(size, symbols)
    except SizeError as error:
        raise BundleError(f"manifest.json: {error}") from error
    if not isinstance(value, int):
        raise BundleError(f"manifest.json: the size {str(size)[:80]!r} evaluates to {value!r}, expected an integer.")
    return value
