"""What each backend can do, found by asking it: `heedful backends`, and docs/backends.md.

Nothing here knows a backend. Each is asked about calls as plain as can be, in every dtype and many head
sizes, and about each feature by itself. What it says to the easiest of them is why it cannot run at all;
what it says beyond that to another is why it does not take that one.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import jax
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

import heedful
from heedful import Backend, Problem, dispatch
from heedful.call import Call
from heedful.dispatch.packages import why_not_imported
from heedful_crosscheck.ask import float64_where_asked, framework
from heedful_crosscheck.asking import ASKABLE, call
from heedful_crosscheck.function import OF_SHAPES
from heedful_crosscheck.recipes import Sizes
from heedful_crosscheck.run import DTYPES

HEAD_DIMS = (64, 128, 1, 8, 20, 32, 80, 96, 192, 256, 512)  # what most kernels have first
PLAIN = Sizes(1, 8, 8, 128, 128, 64, 64)
LONG = 4096  # where what grows with Sq · Sk shows
PLATFORMS = {"numpy": ("cpu",), "jax": ("cpu", "gpu", "tpu"), "torch": ("cpu", "gpu")}
NOWHERE = "nowhere"

Said = dict[str, tuple[str, ...]]  # by what is asked; nothing where it is taken


@dataclass(frozen=True)
class Abilities:
    """What one backend can do with arrays on one platform.

    Attributes:
        backend: its name.
        platform: "cpu", "gpu" or "tpu".
        unable: why it takes not even the easiest call.
        misplaced: whether one of these is that the arrays lie on this platform.
        dtypes, head_dims, features: of each, what the backend says beyond `unable`.
        no_gradients: why there are none of the easiest call; "" where there are.
        linear: whether its memory grows with Sq + Sk, in a plain call.
        kernel: what computes, in its words; "" where it cannot run or says nothing.
    """

    backend: str
    platform: str
    unable: tuple[str, ...]
    misplaced: bool
    dtypes: Said
    head_dims: Said
    features: Said
    no_gradients: str
    linear: bool
    kernel: str

    @property
    def head_sizes(self) -> str:
        """Those that it takes, of `HEAD_DIMS`, in words."""
        tried = sorted(HEAD_DIMS)
        taken = [d for d in tried if not self.head_dims[str(d)]]
        if taken == tried:
            return "any"
        for words, every in (("", 1), ("multiples of 8 ", 8)):
            if taken and taken == [d for d in tried if d % every == 0 and d <= taken[-1]]:
                upto = "" if taken[-1] == tried[-1] else f"up to {taken[-1]}"
                return f"{words}{upto}".strip()
        return ", ".join(map(str, taken))

    @property
    def taken(self) -> str:
        """The dtypes that it takes."""
        return ", ".join(dtype for dtype, said in self.dtypes.items() if not said)

    @property
    def not_taken(self) -> list[str]:
        """The features that it does not take, but for LSE."""
        return [name for name, said in self.features.items() if said and name != "return_lse"]

    @property
    def row(self) -> tuple[str, ...]:
        """Dtypes, head sizes, LSE, gradients, memory, and what it does not take."""
        return (
            self.taken,
            self.head_sizes,
            "no" if self.features["return_lse"] else "yes",
            "no" if self.no_gradients else "yes",
            "Sq + Sk" if self.linear else "Sq · Sk",
            ", ".join(self.not_taken) or "nothing",
        )


ROW = ("dtypes", "head sizes", "LSE", "gradients", "memory", "does not take")


def abilities(name: str, platform: str) -> Abilities:
    """What a backend says it can do with arrays on a platform.

    Raises:
        KeyError: no backend has this name.
    """
    backend = heedful.backends()[name]

    def said(dtype: str, head_dim: int, feature: str | None = None) -> tuple[str, ...]:
        return _reasons(backend, _problem(name, platform, dtype, head_dim, feature))

    found = {asked: said(*asked) for asked in product(DTYPES, HEAD_DIMS)}
    dtype, head_dim = min(found, key=lambda asked: len(found[asked]))  # of equals the first
    unable = found[dtype, head_dim]
    easiest = _problem(name, platform, dtype, head_dim)
    long = replace(easiest, q_length=LONG, kv_length=LONG)
    of_features = {f: said(dtype, head_dim, f) for f in (*OF_SHAPES, *ASKABLE)}

    def beyond(reasons: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(reason for reason in reasons if reason not in unable)

    return Abilities(
        backend=name,
        platform=platform,
        unable=unable,
        misplaced=_is_misplaced(backend, easiest),
        dtypes={x: beyond(found[x, head_dim]) for x in DTYPES},
        head_dims={str(d): beyond(found[dtype, d]) for d in HEAD_DIMS},
        features={f: beyond(reasons) for f, reasons in of_features.items()},
        no_gradients=dispatch.why_forward_only(backend, easiest) or "",
        linear=not hasattr(backend, "score_bytes") or backend.score_bytes(long) == 0,
        kernel=backend.kernel(easiest) if hasattr(backend, "kernel") and not unable else "",
    )


def _problem(
    name: str, platform: str, dtype: str, head_dim: int, feature: str | None = None
) -> Problem:
    found = _of_numpy(dtype, head_dim, feature)
    return replace(found, framework=framework(name), platform=platform)


@cache  # every backend is asked the same
def _of_numpy(dtype: str, head_dim: int, feature: str | None) -> Problem:
    sizes = PLAIN._replace(head_dim=head_dim, value_dim=head_dim)
    if feature == "grouped_heads":
        sizes = sizes._replace(kv_heads=2)
    if feature == "value_dim":
        sizes = sizes._replace(value_dim=head_dim // 2 or 2)
    asked = {} if feature is None or feature in OF_SHAPES else {feature: None}
    problem: Problem = Call.of(**call("numpy", sizes, dtype, asked)).problem
    return problem


def _reasons(backend: Backend, problem: Problem) -> tuple[str, ...]:
    with jax.enable_x64(True):  # what a user can switch on is no lack of the backend's
        return dispatch.reasons(backend, problem)


def _is_misplaced(backend: Backend, problem: Problem) -> bool:
    """Whether it refuses for the platform: it says of this one what it says of none that there is."""
    nowhere = _reasons(backend, replace(problem, platform=NOWHERE))
    of_place = [reason for reason in nowhere if NOWHERE in reason]
    here = _reasons(backend, problem)
    return any(reason.replace(NOWHERE, problem.platform) in here for reason in of_place)


def about(name: str) -> str:
    """What a backend is, in its class's own words; "" where it says nothing."""
    document = inspect.getdoc(type(heedful.backends()[name])) or ""
    return " ".join(document.split("\n\n")[0].split())


def load_torch() -> str | None:
    """Imports torch, which is not done unasked; why that fails, where it does."""
    return why_not_imported("torch")


def platform_here(name: str) -> str:
    """Where the arrays of a backend's framework lie here."""
    return _PLATFORM_OF[framework(name)]()


def _of_torch() -> str:
    if load_torch() is not None:
        return "cpu"
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


_PLATFORM_OF = {"numpy": lambda: "cpu", "jax": jax.default_backend, "torch": _of_torch}


@dataclass(frozen=True)
class Here:
    """Every backend on this machine; print it, or read it.

    Attributes:
        backends: each, with the arrays of its framework.
        chosen: by framework, who computes a plain call in float32 that names nobody, and why.
    """

    backends: tuple[Abilities, ...]
    chosen: Mapping[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        able = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("runs here", *ROW):
            able.add_column(heading, overflow="fold")
        unable = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("\ncannot run here", "\nwhy"):
            unable.add_column(heading, overflow="fold")
        for it in self.backends:
            if it.unable:
                unable.add_row(Text(it.backend, style="yellow"), "\n".join(it.unable))
            else:
                able.add_row(Text(it.backend, style="green"), *it.row)
        yield able
        for it in self.backends:
            if it.kernel:
                yield Text(f"{it.backend}: computed by {it.kernel}")
            if it.no_gradients and not it.unable:
                yield Text(f"{it.backend}: no gradients: {it.no_gradients}")
        if unable.row_count:
            yield unable
        yield Text("")
        for caller, words in self.chosen.items():
            yield Text(f"{caller} arrays, without backend=, a plain call in float32: {words}")

    def as_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {"backends": [asdict(it) for it in self.backends], "chosen": dict(self.chosen)}


def here() -> Here:
    """What every backend can do on this machine."""
    no_torch = load_torch()
    callers = [caller for caller in PLATFORMS if caller != "torch" or no_torch is None]
    return Here(
        tuple(abilities(name, platform_here(name)) for name in heedful.backends()),
        {caller: _chosen(caller) for caller in callers},
    )


def _chosen(caller: str) -> str:
    try:
        explanation = explained(caller, PLAIN, "float32", {})
    except ValueError as error:  # HEEDFUL_BACKEND names nobody
        return str(error)
    return f"{explanation.chosen or 'nobody'} ({explanation.why})"


def explained(
    caller: str, sizes: Sizes, dtype: str, asked: Mapping[str, str | None]
) -> dispatch.Explanation:
    """What `heedful.explain` says to a call of these sizes, torch's backends asked too.

    Args:
        caller, sizes, dtype, asked: as of `asking.call`.

    Raises:
        ValueError, TypeError: it is no call.
    """
    load_torch()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}. Got {dtype!r}.")
    with float64_where_asked(dtype):
        return heedful.explain(**call(caller, sizes, dtype, asked))


def explanation_as_json(explanation: dispatch.Explanation) -> dict[str, Any]:
    """JSON types only."""
    verdicts = {v.name: asdict(v) | {"accepted": v.accepted} for v in explanation.verdicts}
    return {"chosen": explanation.chosen, "why": explanation.why, "backends": verdicts}
