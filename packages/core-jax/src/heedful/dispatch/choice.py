"""Who computes a problem: what each backend says to it, the choice, and the run."""

import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax

from heedful.call.arrays import Array
from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch import ambient, registry
from heedful.dispatch.ambient import wanted
from heedful.dispatch.backend import Backend, Refusal
from heedful.results import checked_run

UNKNOWN = 2**63  # bytes: more than any machine has


@dataclass(frozen=True)
class Verdict:
    """What one backend says to a problem.

    Attributes:
        name: of the backend.
        reasons: all that keeps it from the problem; empty where it accepts.
        score_bytes: what it builds that grows with Sq · Sk; 0 where its memory is linear, `UNKNOWN`
            where a size is a symbol.
        kernel: what computes it, in the backend's words, where there is more to say than its name.
        forward_only: why it cannot be differentiated.
    """

    name: str
    reasons: tuple[str, ...]
    score_bytes: int = 0
    kernel: str = ""
    forward_only: str = ""

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if not self.accepted:
            return "; ".join(self.reasons)
        parts = ["accepts"]
        if self.kernel:
            parts.append(f"by {self.kernel}")
        if self.forward_only:
            parts.append(f"without gradients: {self.forward_only}")
        if self.score_bytes:
            parts.append(f"and {self.builds}")
        return ", ".join(parts)

    @property
    def builds(self) -> str:
        if self.score_bytes == UNKNOWN:
            return "builds scores or masks over (Sq, Sk)"
        size, unit = float(self.score_bytes), "bytes"
        for larger in ("KiB", "MiB", "GiB", "TiB"):
            if size < 1024:
                break
            size, unit = size / 1024, larger
        return f"builds {size:.3g} {unit} of scores or masks over (Sq, Sk)"


def automatic(problem: Problem) -> list[str]:
    """Names in the order in which the automatic choice tries them, loading as few as it can."""
    return [
        name
        for framework in registry.SEARCH[problem.framework]
        for name in registry.ranked(framework)
    ]


TILE_BYTES = 2 * 2**20  # of scores, which a backend of linear memory holds too


def first(problem: Problem, asked: Iterable[Verdict], by_memory: bool) -> Verdict | None:
    """The first verdict that accepts, asking no further; None where none does.

    By memory, one that builds more over (Sq, Sk) than a tile, and more than the caller himself holds of
    that shape, is taken only where nobody builds less: its memory is quadratic, and with a window so is
    its time. (To cross into another framework costs 0.2 ms.)
    """
    accepted = []
    for verdict in asked:
        if verdict.accepted:
            if not by_memory or _is_harmless(verdict.score_bytes, problem):
                return verdict
            accepted.append(verdict)
    return min(accepted, key=lambda verdict: verdict.score_bytes, default=None)


def _is_harmless(score_bytes: int, problem: Problem) -> bool:
    if score_bytes <= TILE_BYTES or score_bytes == UNKNOWN:
        return score_bytes != UNKNOWN
    held = [(problem.mask_shape, "bool"), (problem.bias_shape, problem.bias_dtype)]
    return score_bytes <= sum(
        math.prod(shape) * jax.numpy.dtype(dtype).itemsize
        for shape, dtype in held
        if shape is not None and 1 not in shape[2:]
    )


_jax_has_run = False
_is_forked = False  # from a process in which JAX had run


def _after_fork() -> None:
    global _is_forked
    _is_forked = _is_forked or _jax_has_run


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def reasons(backend: Backend, problem: Problem) -> tuple[str, ...]:
    """Everything that keeps the backend from the problem: the crossing's reasons, then its own."""
    framework = backend.name.partition(":")[0]
    crossing: list[str] = []
    if _is_forked and "jax" in (framework, problem.framework):
        crossing.append(
            "this process was forked from one in which JAX had run, whose threads do not come along: "
            'the call would hang. Start it by "spawn" or "forkserver" (multiprocessing.get_context, '
            "DataLoader's multiprocessing_context)"
        )
    if framework == "jax" and jax.dtypes.canonicalize_dtype(problem.dtype) != problem.dtype:
        crossing.append('float64 needs jax.config.update("jax_enable_x64", True)')
    try:
        if bridge := registry.bridge_between(problem.framework, framework):
            crossing += bridge.reasons(problem, framework)
    except LookupError as missing:
        crossing.append(str(missing))
    return (*crossing, *_own_reasons(backend, problem.compiled if framework == "jax" else problem))


def _own_reasons(backend: Backend, problem: Problem) -> tuple[str, ...]:
    """What it does not take and what else it says; where it fails to say, that is a reason."""
    part = "takes"
    try:
        refused = [] if isinstance(backend, registry.Unusable) else _not_taken(backend, problem)
        part = "reasons"
        own = backend.reasons(problem)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a broken backend raises, the others must go on
        return (f"its {part} fails: {registry.in_a_line(error)}",)
    if not isinstance(own, list | tuple) or not all(isinstance(reason, str) for reason in own):
        return (f"it must give its reasons as a list of strings. Got {type(own).__name__}.",)
    return (*refused, *own)


def _not_taken(backend: Backend, problem: Problem) -> list[str]:
    """A refusal for each feature that the backend does not take."""
    lacks: Mapping[str, str] = getattr(backend, "lacks", {})
    refused = []
    for feature in sorted(problem.features.difference(getattr(backend, "takes", ()))):
        words = lacks.get(feature, f"does not take {feature}")
        sizes = problem.of_shapes.get(feature)
        refused.append(f"{words}: {sizes}" if sizes else words)
    return refused


def verdict_of(backend: Backend, problem: Problem) -> Verdict:
    """All that a backend says to a problem."""
    if refused := reasons(backend, problem):
        return Verdict(backend.name, refused)
    part = "score_bytes"
    try:
        score_bytes = _score_bytes(backend, problem)
        part = "kernel"
        kernel = str(backend.kernel(problem)) if hasattr(backend, "kernel") else ""
        part = "forward_only"
        forward_only = why_forward_only(backend, problem) or ""
    except Exception as error:  # whatever a broken backend raises, the others must go on
        return Verdict(backend.name, (f"its {part} fails: {error}",))
    return Verdict(backend.name, (), score_bytes, kernel, forward_only)


def why_forward_only(backend: Backend, problem: Problem) -> str | None:
    """Why a backend cannot differentiate a problem that it accepts; None where it can."""
    said = getattr(backend, "forward_only", None)
    return None if said is None else said(problem)


def _score_bytes(backend: Backend, problem: Problem) -> int:
    if not hasattr(backend, "score_bytes"):
        return 0
    sizes = (problem.batch, problem.q_heads, problem.q_length, problem.kv_length)
    if not all(isinstance(size, int) for size in sizes):  # a dimension of jax.export
        return UNKNOWN
    return operator.index(backend.score_bytes(problem))


def choose(problem: Problem, backend: str | Sequence[str] | None = None) -> Backend:
    """The backend for a problem. Reads no array data, so it works under any JAX trace.

    Raises:
        Refusal: nobody that was asked can; carries every reason of each.
    """
    asked = wanted(backend)
    chosen, tried = _first_able(problem, *asked)
    if (record := ambient.record.get()) is not None:
        record.note(problem, chosen.name, why(asked[1], tried, chosen), asked)
    return registry.backend_named(chosen.name)


def would_choose(problem: Problem, backend: str | Sequence[str] | None = None) -> Backend:
    """The backend that `choose` gives, or its refusal, before there is a call that could be recorded."""
    return registry.backend_named(_first_able(problem, *wanted(backend))[0].name)


def _first_able(
    problem: Problem, names: tuple[str, ...] | None, source: str
) -> tuple[Verdict, list[Verdict]]:
    """The verdict that is taken, and all that were asked for."""
    verdicts: list[Verdict] = []

    def asked() -> Iterator[Verdict]:
        for name in automatic(problem) if names is None else names:
            verdicts.append(verdict_of(registry.backend_named(name), problem))
            yield verdicts[-1]

    if chosen := first(problem, asked(), by_memory=names is None):
        return chosen, verdicts
    reasons = {verdict.name: verdict.reasons for verdict in verdicts}
    if not verdicts:
        raise Refusal(f"no backend for {problem.framework} arrays is installed", reasons)
    lines = [f"{verdict.name}: {verdict}" for verdict in verdicts]
    nobody = "cannot compute this call" if len(lines) == 1 else "none of them can compute this call"
    raise Refusal(f"{', '.join(reasons)} ({source}) {nobody}.\n  " + "\n  ".join(lines), reasons)


def why(source: str, asked: Sequence[Verdict], chosen: Verdict | None) -> str:
    """A line: who asks, and who was passed over."""
    if chosen is None:
        return f"{source}; none of {', '.join(v.name for v in asked)} accepts"
    passed_over = asked[: asked.index(chosen)]
    refused = [v.name for v in passed_over if not v.accepted]
    words = [f"{', '.join(refused)} refused"] if refused else []
    words += [f"{v.name} {v.builds}" for v in passed_over if v.accepted]
    return "; ".join([source, *words])


def run(backend: Backend, problem: Problem, operands: Operands) -> tuple[Array, Array | None]:
    """Computes the problem on the caller's arrays, across a bridge where the frameworks differ."""
    framework = backend.name.partition(":")[0]
    global _jax_has_run
    _jax_has_run = _jax_has_run or "jax" in (framework, problem.framework)
    if framework == "jax":
        problem, operands = problem.compiled, problem.as_operand(operands)
    bridge = registry.bridge_between(problem.framework, framework)
    if bridge is None:
        return checked_run(backend, problem, operands)
    return bridge.run(backend, problem, operands)
