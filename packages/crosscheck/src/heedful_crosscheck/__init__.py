"""Do the backends agree? Outputs, log-sum-exp and every gradient, against a float64 oracle.

A kernel's author says what his function calls things, and holds it to the contract in a test:

    from heedful_crosscheck import crosscheck

    def test_my_attention():
        report = crosscheck(attend, layout="bshd", causal="top_left", takes=["causal", "gqa"])
        assert report.agree, str(report)

`Function` has all that can be said. A backend that is registered is judged by its name:

    heedful.register(MyKernel())  # its name is "torch:mine"
    report = crosscheck(["torch:mine"])

A case that is refused is no failure; `report.refusals` lists them. On the command line the same is

    heedful crosscheck my_package.kernel:attend --layout bshd --causal top_left --takes causal,gqa
    heedful crosscheck --import my_package.kernel --backend torch:mine
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from heedful.dispatch.registry import names as installed
from heedful_crosscheck.cases import (
    Case,
    everything,
    load,
    quick,
    select,
    share_of_pairs,
)
from heedful_crosscheck.comparison import Comparison, Difference, compare
from heedful_crosscheck.files import InputError, save
from heedful_crosscheck.fitting import fitted
from heedful_crosscheck.function import Function
from heedful_crosscheck.function_backend import FunctionBackend, backend_of, registered
from heedful_crosscheck.in_process import here
from heedful_crosscheck.memory import Memory, most
from heedful_crosscheck.proceedings import Interrupted, proceed
from heedful_crosscheck.report import Report
from heedful_crosscheck.run import (
    DTYPES,
    WORKERS,
    Failure,
    Inquiry,
    Outcome,
    Progress,
)

__all__ = [
    "Case",
    "Comparison",
    "Difference",
    "Failure",
    "Function",
    "InputError",
    "Interrupted",
    "Memory",
    "Outcome",
    "Report",
    "compare",
    "crosscheck",
    "load",
    "memory_needed",
    "quick",
    "save",
    "share_of_pairs",
]


def crosscheck(
    backends: Sequence[str | Function] | Callable[..., Any] | None = None,
    cases: Sequence[Case | str] | None = None,
    dtypes: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    strict: bool = False,
    **conventions: Any,
) -> Report:
    """Runs backends over cases and judges what comes out, as `tolerance.py` describes.

    Args:
        backends: names, and functions that are described; None for all that are installed or registered,
            but for those that say why they are asked by name alone. Or one function, which
            `conventions` describe.
        cases: of `load`, or names and groups of the generated cases and the packaged activations,
            `*` and `?` allowed; None for all of those. A function gets them in its own layout, and the
            combinations fitted to what it takes.
        dtypes: of "float64", "float32", "float16" and "bfloat16"; None for each case's own.
        seed: of the generated inputs and of all cotangents.
        progress: called with (done, total, what comes next).
        strict: whether `lossy` counts as disagreement: a backend that loses no more digits than
            kernels of the flash family must in half precision, but more than honest arithmetic does.
        conventions: of the one function, as of `Function`.

    Returns:
        the report; `agree` is its verdict, and `str` of it the table.

    Raises:
        ValueError: an unknown backend, case or dtype; a description that cannot be.
        TypeError: one name where a list of names is due; a function whose framework is not to be found.
        Interrupted: a KeyboardInterrupt came; it has the report so far.
    """
    for what, given in (("backends", backends), ("cases", cases), ("dtypes", dtypes)):
        if isinstance(given, str):
            raise TypeError(f"{what} must be a list of names. Got {given!r}. Pass [{given!r}].")
    if dtypes is not None:
        check_dtypes(dtypes)
    names, functions = _told_apart(backends, conventions)
    asked = chosen_cases(cases)
    with ExitStack() as open_while_judged:
        known = here(chosen_backends(names), WORKERS, asked)
        by_name = backends is not None
        inquiries = [Inquiry(known, asked, dtypes, [seed], by_name=by_name)] if known else []
        for function in functions:
            name = open_while_judged.enter_context(registered(function))
            own = fitted(function, asked, dtypes)
            inquiries.append(Inquiry(here([name], WORKERS), own, dtypes, [seed], function.declines))
        declined = {function.name: tuple(function.of.declines) for function in functions}
        return proceed(inquiries, strict=strict, declined=declined, progress=progress)


def _told_apart(
    backends: Sequence[str | Function] | Callable[..., Any] | None, conventions: dict[str, Any]
) -> tuple[list[str] | None, list[FunctionBackend]]:
    """The names, and the functions."""
    if callable(backends):
        return [], [backend_of(Function(backends, **conventions))]
    if conventions:
        raise TypeError(
            f"{', '.join(conventions)} describe one function, and none came alone. Pass "
            "crosscheck(function, …), or Function(function, …) in the list."
        )
    if backends is None or isinstance(backends, Function):
        return (None, []) if backends is None else ([], [backend_of(backends)])
    found = [backend_of(x) for x in backends if isinstance(x, Function)]
    return [x for x in backends if not isinstance(x, Function)], found


def memory_needed(
    cases: Sequence[Case],
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
) -> list[Memory]:
    """What each case takes, in the dtype in which it takes most; computes nothing. `str` says it.

    Raises:
        ValueError: an unknown backend or dtype.
    """
    names = chosen_backends(backends)
    check_dtypes(dtypes)
    return most(cases, dtypes, names, WORKERS)


def chosen_backends(names: Sequence[str] | None, known: Sequence[str] | None = None) -> list[str]:
    """The backends of these names, or all.

    Args:
        names: None: all.
        known: which there are; None: those here.

    Raises:
        ValueError: there is none of a name.
    """
    known = installed() if known is None else known
    for name in names or ():
        if name not in known:
            raise ValueError(f"no backend is named {name!r}. There are {', '.join(known)}.")
    return list(dict.fromkeys(known if names is None else names))


def check_dtypes(dtypes: Sequence[str]) -> None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes must be of {', '.join(DTYPES)}. Got {dtype!r}.")


def chosen_cases(cases: Sequence[Case | str] | None) -> list[Case]:
    """Cases, and those of names and groups; or all.

    Raises:
        InputError: a name matches none.
    """
    if cases is None:
        return list(everything())
    patterns = [case for case in cases if isinstance(case, str)]
    given = [case for case in cases if not isinstance(case, str)]
    return [*(select(patterns, everything()) if patterns else ()), *given]
