"""Which cases a described function is asked: those that are here, as far as it takes them.

A function that takes causal and grouped heads would refuse nearly every row of the table, since in
each much is asked at once. So each value that it refuses is replaced by one that it takes, in turn; and
of the whole table every two of the values that are left stand together, wherever both are taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations as pairs_of_names
from itertools import product

import numpy as np

from heedful import Problem
from heedful.call import Call
from heedful_crosscheck import combinations
from heedful_crosscheck.cases import Case, of_row
from heedful_crosscheck.factors import FACTORS, Row
from heedful_crosscheck.function_backend import FunctionBackend
from heedful_crosscheck.recipes import FarLogits, Normal

Allowed = Mapping[str, Sequence[str]]
TRIED = 16  # rows, before two values are said not to go together


def fitted(
    backend: FunctionBackend, cases: Sequence[Case], dtypes: Sequence[str] | None
) -> list[Case]:
    """The cases as a function is asked them: each once, in its own layout.

    Args:
        backend: the function.
        cases: of any kind; those between two frameworks are not the function's, and left out.
        dtypes: in which it is asked; None: in each case's own.
    """
    rows = [case for case in cases if case.row is not None]
    others = [case for case in cases if case.row is None and case.caller is None]
    return [
        in_layout(backend.of.layout, case) for case in (*others, *_fitted(backend, rows, dtypes))
    ]


def _fitted(
    backend: FunctionBackend, cases: Sequence[Case], dtypes: Sequence[str] | None
) -> Iterator[Case]:
    """Of each row a case in which nothing is asked that the function refuses, where there is one."""
    allowed = _allowed(backend, dtypes) if cases else None
    if allowed is None:
        return
    found: dict[str, Row] = {}
    for number, case in enumerate(cases):
        for row in _replaced(case.row or {}, allowed, number):
            if _takes(backend, row):
                if (written := combinations.written(row)) not in found:
                    found[written] = row
                    name = case.name if row == case.row else f"{case.name}-fitted"
                    yield Case(name=name, group=case.group, **of_row(row))
                break
    if len(cases) == len(combinations.table()):
        lacking = _lacking(backend, list(found.values()), allowed)
        for number, more in enumerate(lacking, 1):
            yield Case(name=f"fitted-{number:03}", group="combinations", **of_row(more))


def _lacking(backend: FunctionBackend, rows: list[Row], allowed: Allowed) -> Iterator[Row]:
    """Rows for the pairs of values that fitting tore apart: another row with both put into it."""
    there = {pair for row in rows for pair in combinations.pairs_of(row)}
    for one, other in pairs_of_names(FACTORS, 2):
        for x, y in product(allowed[one], allowed[other]):
            if frozenset(((one, x), (other, y))) in there:
                continue
            like = sorted(rows, key=lambda row: (row[one] != x) + (row[other] != y))
            for row in ({**row, one: x, other: y} for row in like[:TRIED]):
                if _takes(backend, row):
                    there.update(combinations.pairs_of(row))
                    rows.append(row)
                    yield row
                    break


def takes(backend: FunctionBackend, case: Case, dtype: str) -> bool:
    """Whether the function refuses nothing of a case but its LSE."""
    inputs = case.inputs(0, dtype)
    return _accepts(backend, Call.of(inputs.q, inputs.k, inputs.v, **inputs.options).problem)


def _accepts(backend: FunctionBackend, problem: Problem) -> bool:
    return problem.features <= backend.takes and not backend.reasons(problem)


def in_layout(layout: str, case: Case) -> Case:
    """Packed arrays are packed as the function's users have them."""
    options = {name: x for name, x in case.options.items() if name != "layout"}
    if layout != "bhsd":
        options["layout"] = layout
    return replace(case, options=options)


def _allowed(backend: FunctionBackend, dtypes: Sequence[str] | None) -> Allowed | None:
    """Of each factor the values that the function takes beside the plainest; None: it takes nothing."""
    pinned: dict[str, Sequence[str]] = {
        "caller": ("own",), "rank": ("4",), "layout": (backend.of.layout,),
        "memory": tuple(FACTORS["memory"]), "return_lse": ("yes", "no"),
        "dtype": tuple(dtypes or FACTORS["dtype"]),
    }  # fmt: skip
    if backend.framework == "jax" or "strides" in backend.declines:  # JAX's arrays have none
        pinned["memory"] = ("packed",)
    if "return_lse" not in backend.takes:
        pinned["return_lse"] = ("no",)
    plainest = {name: pinned.get(name, tuple(values))[0] for name, values in FACTORS.items()}
    varied = ("causal", "lengths", "head_dim")
    bases = [
        base
        for values in product(*(FACTORS[name] for name in varied))
        if _takes(backend, base := plainest | dict(zip(varied, values, strict=True)))
    ]
    if not bases:
        return None
    # A window may stand only where causal says so: with each of its values one may be tried.
    beside = list({base["causal"]: base for base in reversed(bases)}.values())[::-1]
    return pinned | {
        name: [value for value in values if _is_allowed(backend, beside, name, value)]
        for name, values in FACTORS.items()
        if name not in pinned
    }


def _is_allowed(backend: FunctionBackend, bases: Sequence[Row], name: str, value: str) -> bool:
    """Whether a value is taken where all else is plain, or all but one that it cannot do without."""
    alone = [{**base, name: value} for base in bases]
    if any(map(combinations.is_possible, alone)):
        return any(_takes(backend, row) for row in alone)
    return any(
        _takes(backend, {**row, other: x})
        for row in alone
        for other, values in FACTORS.items()
        if other != name
        for x in values
    )


def _replaced(row: Row, allowed: Allowed, number: int) -> Iterator[dict[str, str]]:
    """A row with what is not allowed replaced; then with causal and lengths others as well."""
    refused = [name for name, value in row.items() if value not in allowed[name]]
    for turn in range(max((len(allowed[name]) for name in refused), default=1)):
        others = {name: _in_turn(allowed[name], number + turn) for name in refused}
        yield {**row, **others}
    for causal, lengths in product(allowed["causal"], allowed["lengths"]):
        yield {**row, **others, "causal": causal}
        yield {**row, **others, "causal": causal, "lengths": lengths}


def _in_turn(values: Sequence[str], number: int) -> str:
    return values[number % len(values)]


def _takes(backend: FunctionBackend, row: Row) -> bool:
    """Whether a row is possible, and the function refuses nothing of it. q, k and v are shapes alone."""
    if not combinations.is_possible(row):
        return False
    parts, dtype = of_row(row), row["dtype"]
    made = parts["make"]
    normal: Normal = made.usual if isinstance(made, FarLogits) else made
    b, hq, hkv, sq, sk, d, dv = sizes = normal.sizes
    q, k, v = (
        np.broadcast_to(np.zeros((), dtype), shape)
        for shape in ((b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    )
    random = np.random.default_rng(0)
    arrays = {name: make(random, sizes) for name, make in normal.options.items()}
    case = Case(name="", group="", **parts | {"rank": 4})
    options = case.given(arrays, sizes.scores, dtype) | {"layout": "bhsd"}
    return _accepts(backend, Call.of(q, k, v, **options).problem)
