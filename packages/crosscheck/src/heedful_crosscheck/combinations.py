"""Which values are put together: a table that pairs all values of all factors, and what it means.

Most of what goes wrong in a kernel needs two things at once: a window and lengths, a head size of 128
and half precision, a causal mask and as many queries as keys; some of it three. So `combinations.txt` is
a covering array over the factors: every two values of two factors that are possible together stand
together in at least one row in which everything is judged, and so do every three of the factors in
`TRIPLES`. Rows in which less is judged (no LSE is asked for; the caller is NumPy, which differentiates
nothing) come on top, each such view beside every value.

`packages/crosscheck/tools/combine.py` makes the table, a digit for each factor's value; a test proves
that every pair is there.
"""

from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import combinations

from heedful_crosscheck.factors import FACTORS, RULES, TRIPLED, VIEWS, Row

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def is_possible(row: Row) -> bool:
    """Whether a row, or a part of one, breaks no rule; what it does not name breaks none."""
    return all(
        not any(row.get(name) in values for name, values in rule.where.items())
        or any(name not in row or row[name] in values for name, values in rule.must.items())
        for rule in RULES
    )


def judges_everything(row: Row) -> bool:
    """Whether out, LSE and every gradient are looked at in a row."""
    return not any(row[name] in values for name, values in VIEWS.items())


def pairs_of(row: Row) -> Iterable[frozenset[tuple[str, str]]]:
    """Every two values that stand together in a row."""
    return _together(row, combinations(FACTORS, 2))


def triples_of(row: Row) -> Iterable[frozenset[tuple[str, str]]]:
    """Every three values of `TRIPLES` that stand together in a row."""
    return _together(row, TRIPLED)


def _together(
    row: Row, of_names: Iterable[tuple[str, ...]]
) -> Iterable[frozenset[tuple[str, str]]]:
    for names in of_names:
        yield frozenset((name, row[name]) for name in names)


@cache
def table() -> tuple[dict[str, str], ...]:
    """The rows, those first that add most to the ones before them."""
    lines = (resources.files(__package__) / "combinations.txt").read_text().split()
    return tuple(map(read, lines))


def read(line: str) -> dict[str, str]:
    """A row of the table.

    Raises:
        ValueError, IndexError: it is none.
    """
    return {
        name: list(values)[DIGITS.index(x)]
        for (name, values), x in zip(FACTORS.items(), line, strict=True)
    }


def written(row: Row) -> str:
    """A row as it stands in the table."""
    return "".join(DIGITS[list(FACTORS[name]).index(row[name])] for name in FACTORS)


def pairs(rows: Iterable[Row]) -> int:
    """How many pairs of values stand together in these rows."""
    return len({pair for row in rows for pair in pairs_of(row)})


def description(row: Row) -> str:
    """What is not plain in a row: "70x70, float16, causal yes"."""
    size = f"{row['lengths']}, {row['dtype']}"
    rest = (
        n for n in FACTORS if n not in ("lengths", "dtype") and row[n] != next(iter(FACTORS[n]))
    )
    return ", ".join((size, *(f"{name} {row[name]}" for name in rest)))
