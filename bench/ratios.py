"""Ratios of engines, taken round by round, and means of them."""

import math
import statistics
from collections.abc import Iterable

from .turns import Found, Row


def ratio(row: Row, to: Row) -> float:
    """The median of the ratios of rounds with one number: what both met in a round divides out."""
    return statistics.median(a / b for a, b in zip(row.values, to.values, strict=False))


def by_case(found: Found, table: str, measure: str = "step") -> dict[str, dict[str, Row]]:
    """{case: {engine: row}} of a table, in the order measured."""
    result: dict[str, dict[str, Row]] = {}
    for row in found.of(table, measure):
        result.setdefault(row.case, {})[row.engine] = row
    return result


def ratios(
    found: Found, tables: Iterable[str], engine: str, to: str, measure: str = "step", **fields: object
) -> dict[str, float]:
    """{case: ratio} of two engines over the cases that have both, and whose fields are as given."""
    result = {}
    for table in tables:
        for case, rows in by_case(found, table, measure).items():
            if engine in rows and to in rows:
                have = rows[engine].fields
                if all(
                    want(have[name]) if callable(want) else have[name] == want for name, want in fields.items()
                ):
                    result[case] = ratio(rows[engine], rows[to])
    return result


def mean(values: Iterable[float]) -> float:
    """Geometric."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
