"""What ran, call by call, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

from heedful.call.problem import Problem
from heedful.dispatch import ambient
from heedful.dispatch.explain import Explanation, explain_names


@dataclass(frozen=True)
class Choice:
    """A call that was made, and the backend that it took.

    Attributes:
        part: of the model, that made it; empty where nobody named it.
        problem: what was asked.
        backend: the name of the one that ran.
        why: one line: who asked for it, and who was passed over.
    """

    part: str
    problem: Problem
    backend: str
    why: str
    _asked: tuple[tuple[str, ...] | None, str] = field(repr=False)

    @property
    def explanation(self) -> Explanation:
        """What every backend says to this call, asked now; what `heedful.explain` would have said."""
        return explain_names(self.problem, *self._asked)

    @property
    def call(self) -> str:
        """The problem in a few words: framework, dtype, shapes, and the names of what else is asked."""
        p = self.problem
        q, k = (p.batch, p.q_heads, p.q_length, p.head_dim), (p.kv_heads, p.kv_length)
        keys = "" if k == q[1:3] else f" on {p.kv_heads} × {p.kv_length}"
        asked = sorted(p.features - p.of_shapes.keys())
        return ", ".join([f"{p.framework} {p.dtype} {q}{keys}", *asked])


class Record(list[Choice]):
    """The choices in their order; printed, equal ones in a row are one line that counts them."""

    def note(
        self,
        problem: Problem,
        backend: str,
        why: str,
        asked: tuple[tuple[str, ...] | None, str],
    ) -> None:
        self.append(Choice(ambient.part_of_the_model(), problem, backend, why, asked))

    def __str__(self) -> str:
        if not self:
            return "no call of heedful was recorded: none was made, or all were compiled before"
        rows = []
        for choice, equal in groupby(self):
            count = sum(1 for _ in equal)
            times = "" if count == 1 else f"{count} × "
            rows.append((choice.part or "-", times + choice.backend, choice.call, choice.why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


@contextmanager
def recording() -> Iterator[Record]:
    """Within the block, each call is noted as it chooses its backend: what ran, layer by layer, and why.

        with heedful.recording() as record:
            model(x)
        print(record)

    An entry has `part`, `backend`, `why`, `problem`, and `explanation`: what all backends say to it. The
    parts of a model are named by `heedful.part`, by `heedful_torch.per_module`, and by
    `heedful.flax.linen_per_module` and `nnx_per_module`.

    What is compiled chooses when it is traced, and is recorded then: a function that jax.jit or
    torch.compile has compiled before is not recorded again, and one that they trace twice is recorded
    twice. So is what torch.utils.checkpoint recomputes. A call that is refused raises and is not
    recorded. The block is that of its thread and of its asyncio task. Of two, one in the other, the
    outer one is given what the inner one recorded when that ends.
    """
    outer = ambient.record.get()
    token = ambient.record.set(record := Record())
    try:
        yield record
    finally:
        ambient.record.reset(token)
        if outer is not None:
            outer.extend(record)
