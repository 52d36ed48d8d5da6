"""Exact chances that one-round rules end on an honest initial value (§7.1).

Initial values are independent and uniform on `low ... high`. Counts are integers (convolutions,
order statistics), results are fractions.
"""

from __future__ import annotations

import math
from fractions import Fraction

from tenfold.errors import ConfigError


def all_distinct(n: int, low: int = 0, high: int = 50) -> Fraction:
    """That n uniform values are all different."""
    k = high - low + 1
    return Fraction(math.perm(k, n), k**n)


def constant(n: int, low: int = 0, high: int = 50) -> Fraction:
    """That a fixed value of the range is among n uniform ones."""
    k = high - low + 1
    return 1 - Fraction(k - 1, k) ** n


def mean(n: int, low: int = 0, high: int = 50, rounding: str = "half-up") -> Fraction:
    """That the rounded mean of n uniform values is one of them.

    For every result c, the tuples without c whose sum rounds to c are counted by convolution:
    powers of a polynomial whose coefficients are digits of one long integer.
    """
    k = high - low + 1
    bits = (k**n).bit_length()  # no coefficient is larger
    digit = (1 << bits) - 1
    full = sum(1 << bits * v for v in range(k))
    misses = 0
    for c in range(k):
        sums = (full - (1 << bits * c)) ** n
        if rounding == "floor":
            first, last = n * c, n * (c + 1)
        else:  # n c - n/2 <= sum < n c + n/2
            first, last = -((n - 2 * n * c) // 2), -((-n - 2 * n * c) // 2)
        misses += sum(sums >> bits * total & digit for total in range(max(first, 0), last))
    return 1 - Fraction(misses, k**n)


def middle_pair(n: int, low: int = 0, high: int = 50) -> Fraction:
    """That the floor of the middle pair's mean is one of n (even) uniform values.

    It is one exactly where the pair differs by at most 1: nothing lies between its two values.
    """
    if n % 2:
        raise ConfigError(f"the middle pair needs an even number of values, not {n}")
    k, half = high - low + 1, n // 2
    misses = 0
    for a in range(k):  # lower half: at most a, and reaching it; upper half: above, at b or more
        lower = (a + 1) ** half - a**half
        for b in range(a + 2, k):
            misses += lower * ((k - b) ** half - (k - b - 1) ** half)
    return 1 - Fraction(math.comb(n, half) * misses, k**n)


def midrange(n: int, low: int = 0, high: int = 50) -> Fraction:
    """That the floor of the centre between smallest and largest is one of n uniform values."""
    k = high - low + 1
    misses = 0
    for a in range(k):
        for b in range(a + 2, k):
            inner = b - a  # values a ... b without the centre
            misses += inner**n - 2 * (inner - 1) ** n + (inner - 2) ** n
    return 1 - Fraction(misses, k**n)


def leader(honest: int, byzantine: int, low: int = 0, high: int = 50) -> Fraction:
    """That the lowest number's value is honest, against uniform liars in random seats."""
    n = honest + byzantine
    return (honest + byzantine * constant(honest, low, high)) / n


def mode_minid(honest: int, low: int = 0, high: int = 50) -> Fraction:
    """That plurality with ties to the lowest number is honest, against one liar.

    The liar wins only alone: all values differ, and its number is the lowest. It may say anything
    that does not depend on the others' values.
    """
    n = honest + 1
    return 1 - all_distinct(n, low, high) / n
