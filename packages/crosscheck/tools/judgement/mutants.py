"""Attentions that are wrong on purpose, made systematically: each option, pair, gradient, edge and size.

A mutant asks the float64 oracle something else than it was asked, or changes what the oracle answers.
So it is right in everything but its one fault, and nothing but that is seen or not seen by the judge.
(Faults of a kernel's arithmetic, which no change of question makes, are in tests/conformance/broken.py.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from heedful import Operands, Problem, oracle
from heedful.backends.numpy_oracle import backend as right
from heedful.call.arrays import dtype_of

Asked = tuple[Problem, Operands]
Tensors = dict[str, np.ndarray]  # "out" and "lse", or a gradient each, float64


@dataclass(frozen=True, eq=False)
class Mutant:
    """A NumPy backend with one fault.

    Attributes:
        kind: which table it is of.
        fault: what is wrong.
        asks: (problem, operands) → what it asks instead.
        answers: (problem, tensors) → what it answers instead.
        cotangents: (problem, operands, dout, dlse) → what it differentiates instead.
        back: (problem, gradients of what it asked) → those of what it was asked, where shapes differ.
        meets: whether a call is one that it gets wrong.
    """

    kind: str
    fault: str
    asks: Callable[[Problem, Operands], Asked] = lambda problem, operands: (problem, operands)
    answers: Callable[[Problem, Tensors], Tensors] = lambda problem, tensors: tensors
    cotangents: Callable[..., tuple[np.ndarray, np.ndarray]] = lambda p, o, dout, dlse: (dout, dlse)
    back: Callable[[Problem, Tensors], Tensors] = lambda problem, gradients: gradients
    meets: Callable[[Problem], bool] = lambda problem: True

    takes = oracle.FEATURES

    @property
    def name(self) -> str:
        return f"numpy:{self.fault}"

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def run(self, problem: Problem, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
        if not self.meets(problem):
            return right.run(problem, operands)
        found = dict(
            zip(("out", "lse"), oracle.forward(*self.asks(problem, operands)), strict=True)
        )
        found = self.answers(problem, found)
        return found["out"].astype(problem.dtype), found["lse"].astype(problem.accumulator)

    def gradients(
        self, problem: Problem, operands: Operands, dout: np.ndarray, dlse: np.ndarray
    ) -> Operands:
        if not self.meets(problem):
            return right.gradients(problem, operands, dout, dlse)
        dout, dlse = self.cotangents(problem, operands, dout, dlse)
        found = oracle.gradients(*self.asks(problem, operands), dout, dlse).given
        found = self.back(problem, found)
        of = operands.differentiable
        # What it never read it has no gradient of.
        found = {n: found.get(n, np.zeros(x.shape)) for n, x in of.items()}
        found = self.answers(problem, {f"d{n}": x for n, x in found.items()})
        return Operands(**{n: found[f"d{n}"].astype(dtype_of(x)) for n, x in of.items()})


def mutants() -> tuple[Mutant, ...]:
    """All of them; each has a fault of its own."""
    found = (*options(), *pairs(), *gradients(), *edges(), *dtypes(), *sizes())
    assert len({m.fault for m in found}) == len(found)
    return found


# What is asked in place of what was


def without(problem: Problem, operands: Operands, option: str) -> Asked:
    """The call as if the option had not been passed."""
    match option:
        case "segments":
            operands = operands._replace(q_segment_ids=None, kv_segment_ids=None)
            return replace(problem, q_segment_ids=False, kv_segment_ids=False), operands
        case "causal":
            return replace(problem, causal=False), operands
        case "q_offset":
            return moved(problem, operands, aligned(problem, operands))
        case "softcap" | "window" | "score_mod" | "mask_mod":
            return replace(problem, **{option: None}), operands
        case "scale":
            return replace(problem, scale=problem.head_dim**-0.5), operands
        case "dropout_rate":
            return replace(problem, dropout_rate=0.0), operands
    shape = {"mask": "mask_shape", "bias": "bias_shape", "alibi_slopes": "alibi_shape"}
    asked = {shape[option]: None} if option in shape else {option: False}
    # The lengths place the queries too: what ignores them there as well is another fault.
    problem, operands = moved(problem, operands, offsets(problem, operands))
    return replace(problem, **asked), operands._replace(**{option: None})


def offsets(problem: Problem, operands: Operands) -> np.ndarray:
    """Of each batch row, (B,)."""
    if operands.q_offset is not None:
        return np.broadcast_to(operands.q_offset, problem.batch)
    if problem.q_offset is not None:
        return np.full(problem.batch, problem.q_offset)
    return aligned(problem, operands)


def aligned(problem: Problem, operands: Operands) -> np.ndarray:
    """The last query at the last key."""
    queries = problem.q_length if operands.q_lengths is None else operands.q_lengths
    keys = problem.kv_length if operands.kv_lengths is None else operands.kv_lengths
    return np.broadcast_to(np.subtract(keys, queries), problem.batch)


def moved(problem: Problem, operands: Operands, to: np.ndarray | int) -> Asked:
    to = np.broadcast_to(np.asarray(to, np.int32), problem.batch)
    return replace(problem, q_offset=None), operands._replace(q_offset=to)


def by(rows: int) -> Callable[[Problem, Operands], Asked]:
    return lambda p, o: moved(p, o, offsets(p, o) + rows)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Asked]:
    """An operand that is read as another one, of its own shape and dtype."""

    def asks(problem: Problem, operands: Operands) -> Asked:
        x = getattr(operands, name)
        other = np.broadcast_to(change(x), x.shape).astype(x.dtype)
        if name.endswith("_lengths"):  # as `without`
            problem, operands = moved(problem, operands, offsets(problem, operands))
        return problem, operands._replace(**{name: other})

    return asks


def scaled(name: str) -> Callable[..., Asked]:
    """What is added to the scores, multiplied by the scale as they are."""
    return lambda p, o: changed(name, lambda x: p.scale * x.astype(np.float64))(p, o)


def of_all(lengths: str) -> Callable[..., Asked]:
    """Queries that stand as if all that there are of some were real."""
    return lambda p, o: moved(p, o, aligned(p, o._replace(**{lengths: None})))


def asked_with(**numbers: Callable[[Problem], object]) -> Callable[..., Asked]:
    return lambda p, o: (replace(p, **{name: number(p) for name, number in numbers.items()}), o)


def window(
    change: Callable[[int | None, int | None], tuple[int | None, int | None]],
) -> Callable[..., Asked]:
    return asked_with(window=lambda p: change(*p.window))


def more(side: int | None, by: int) -> int | None:
    return None if side is None else max(side + by, 0)


def seeing(rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., Asked]:
    """Causal calls as if j ≤ p_i were another rule of places and keys."""

    def asks(problem: Problem, operands: Operands) -> Asked:
        place = (
            offsets(problem, operands)[:, None, None, None] + np.arange(problem.q_length)[:, None]
        )
        seen = rule(place, np.arange(problem.kv_length))
        mask = seen if operands.mask is None else seen & operands.mask
        problem, operands = moved(problem, operands, offsets(problem, operands))
        return replace(problem, causal=False, mask_shape=mask.shape), operands._replace(mask=mask)

    return asks


def hiding(keys: Callable[[int], np.ndarray]) -> Callable[..., Asked]:
    """As if some keys were not there; of Sk, boolean (Sk,)."""

    def asks(problem: Problem, operands: Operands) -> Asked:
        seen = ~keys(problem.kv_length)[None, None, None]
        mask = seen if operands.mask is None else seen & operands.mask
        return replace(problem, mask_shape=mask.shape), operands._replace(mask=mask)

    return asks


def of_key_heads(order: Callable[[Problem], np.ndarray]) -> dict[str, Callable]:
    """K and V of other key heads: of a problem the key head of each query head, (Hq,)."""

    def asks(problem: Problem, operands: Operands) -> Asked:
        heads = order(problem)
        wide = operands._replace(k=operands.k[:, heads], v=operands.v[:, heads])
        return replace(problem, kv_heads=problem.q_heads), wide

    def back(problem: Problem, found: Tensors) -> Tensors:
        summed = {}
        for n in ("k", "v"):
            b, _, *rest = found[n].shape
            summed[n] = np.zeros((b, problem.kv_heads, *rest))
            np.add.at(summed[n], (slice(None), order(problem)), found[n])
        return found | summed

    return {"asks": asks, "back": back}


# Each option, in each way that it may be mishandled

# What of a problem says that an option is asked for.
ASKED: dict[str, Callable[[Problem], bool]] = {
    "causal": lambda p: p.causal,
    "window": lambda p: p.window is not None,
    "q_offset": lambda p: p.q_offset_given,
    "mask": lambda p: p.mask_shape is not None,
    "bias": lambda p: p.bias_shape is not None,
    "q_lengths": lambda p: p.q_lengths,
    "kv_lengths": lambda p: p.kv_lengths,
    "segments": lambda p: p.q_segment_ids,
    "sinks": lambda p: p.sinks,
    "alibi_slopes": lambda p: p.alibi_shape is not None,
    "dropout_rate": lambda p: p.dropout_rate > 0,
    "softcap": lambda p: p.softcap is not None,
    "scale": lambda p: p.scale != p.head_dim**-0.5,
    "score_mod": lambda p: p.score_mod is not None,
    "mask_mod": lambda p: p.mask_mod is not None,
}
# What a call asks for beside them.
SHAPES: dict[str, Callable[[Problem], bool]] = {
    "grouped heads": lambda p: p.group > 1,
    "a head size of V's own": lambda p: p.value_dim != p.head_dim,
    "Sq > Sk": lambda p: p.q_length > p.kv_length,
}

MISHANDLED: dict[str, dict[str, Callable[..., Asked]]] = {
    "causal": {
        "causal aligned top-left": lambda p, o: moved(p, o, 0),
        "causal aligned bottom-right": lambda p, o: moved(p, o, p.kv_length - p.q_length),
        "causal hides a query's own place": seeing(lambda place, key: key < place),
        "causal shows the next key": seeing(lambda place, key: key <= place + 1),
        "causal the other way round": seeing(lambda place, key: key >= place),
    },
    "window": {
        "window one more to the left": window(lambda left, right: (more(left, 1), right)),
        "window one less to the left": window(lambda left, right: (more(left, -1), right)),
        "window one more to the right": window(lambda left, right: (left, more(right, 1))),
        "window one less to the right": window(lambda left, right: (left, more(right, -1))),
        "window with its sides swapped": window(lambda left, right: (right, left)),
        "window closed where it is open": window(lambda left, right: (left or 0, right or 0)),
        "window without its left side": window(lambda left, right: (None, right)),
        "window without its right side": window(lambda left, right: (left, None)),
    },
    "q_offset": {
        "q_offset one more": by(1),
        "q_offset one less": by(-1),
        "q_offset with the other sign": lambda p, o: moved(p, o, -offsets(p, o)),
        "q_offset of batch row 0 for all": lambda p, o: moved(p, o, offsets(p, o)[0]),
        "q_offset added to the default": lambda p, o: moved(p, o, offsets(p, o) + aligned(p, o)),
    },
    "mask": {
        "mask inverted": changed("mask", np.logical_not),
        "mask of head 0 for all": changed("mask", lambda x: x[:, :1]),
        "mask of batch row 0 for all": changed("mask", lambda x: x[:1]),
        "mask of query 0 for all": changed("mask", lambda x: x[:, :, :1]),
        "mask of the heads in reverse": changed("mask", lambda x: x[:, ::-1]),
        "mask one key further": changed("mask", lambda x: np.roll(x, 1, -1)),
    },
    "bias": {
        "bias subtracted": changed("bias", np.negative),
        "bias of head 0 for all": changed("bias", lambda x: x[:, :1]),
        "bias of batch row 0 for all": changed("bias", lambda x: x[:1]),
        "bias of query 0 for all": changed("bias", lambda x: x[:, :, :1]),
        "bias added before the scale": scaled("bias"),
        "bias of the heads in reverse": changed("bias", lambda x: x[:, ::-1]),
        "bias a twentieth too large": changed("bias", lambda x: 1.05 * x.astype(np.float64)),
        "bias one key further": changed("bias", lambda x: np.roll(x, 1, -1)),
    },
    "q_lengths": {
        "q_lengths one more": changed("q_lengths", lambda x: x + 1),
        "q_lengths one less": changed("q_lengths", lambda x: np.maximum(x - 1, 0)),
        "q_lengths of batch row 0 for all": changed("q_lengths", lambda x: x[:1]),
        "q_lengths without their place": of_all("q_lengths"),
    },
    "kv_lengths": {
        "kv_lengths one more": changed("kv_lengths", lambda x: x + 1),
        "kv_lengths one less": changed("kv_lengths", lambda x: np.maximum(x - 1, 0)),
        "kv_lengths of batch row 0 for all": changed("kv_lengths", lambda x: x[:1]),
        "kv_lengths without their place": of_all("kv_lengths"),
    },
    "segments": {
        "segments one key further": changed("kv_segment_ids", lambda x: np.roll(x, 1, -1)),
        "segments of batch row 0 for all": changed("kv_segment_ids", lambda x: x[:1]),
        "segments of query 0 for all": changed("q_segment_ids", lambda x: x[:, :, :1]),
    },
    "sinks": {
        "sinks with the other sign": changed("sinks", np.negative),
        "sinks of the heads in reverse": changed("sinks", lambda x: x[:, ::-1]),
        "sinks of head 0 for all": changed("sinks", lambda x: x[:, :1]),
        "sinks scaled": scaled("sinks"),
    },
    "alibi_slopes": {
        "ALiBi with the other sign": changed("alibi_slopes", np.negative),
        "ALiBi of the heads in reverse": changed("alibi_slopes", lambda x: x[:, ::-1]),
        "ALiBi of batch row 0 for all": changed("alibi_slopes", lambda x: x[:1]),
        "ALiBi a twentieth too steep": changed("alibi_slopes", lambda x: 1.05 * x.astype(np.float64)),
        "ALiBi scaled": scaled("alibi_slopes"),
    },
    "dropout_rate": {
        "dropout of the next seed": lambda p, o: (
            (p, o._replace(dropout_seed=o.dropout_seed + 1)) if o.dropout_seed is not None
            else (replace(p, dropout_seed=p.dropout_seed + 1), o)
        ),
        "dropout a tenth more often": asked_with(dropout_rate=lambda p: 1.1 * p.dropout_rate),
        "dropout of what is kept": asked_with(dropout_rate=lambda p: 1 - p.dropout_rate),
    },
    "softcap": {
        "softcap not made up for": asked_with(
            softcap=lambda p: 1.0, scale=lambda p: p.scale / p.softcap
        ),
        "softcap before the scale": asked_with(softcap=lambda p: abs(p.scale or 1) * p.softcap),
        "softcap a tenth too large": asked_with(softcap=lambda p: 1.1 * p.softcap),
    },
    "scale": {
        "scale twice": asked_with(scale=lambda p: p.scale**2),
        "scale without its sign": asked_with(scale=lambda p: abs(p.scale)),
        "scale a hundredth off": asked_with(scale=lambda p: 1.01 * p.scale),
        "scale beside D^-½": asked_with(scale=lambda p: p.scale * p.head_dim**-0.5),
    },
}  # fmt: skip


def options() -> Iterator[Mutant]:
    for option, asked in ASKED.items():
        for fault, asks in MISHANDLED.get(option, {}).items():
            yield Mutant("an option mishandled", fault, asks, meets=asked)
        ignores = f"{option} ignored"
        yield Mutant(
            "an option mishandled", ignores, lambda p, o, x=option: without(p, o, x), meets=asked
        )
    every = "a scale of its own"
    yield Mutant(every, "no scale at all", asked_with(scale=lambda p: 1.0))
    yield Mutant(every, "1 / D for the scale", asked_with(scale=lambda p: 1 / p.head_dim))
    yield Mutant(every, "Dv^-½ for the scale", asked_with(scale=lambda p: p.value_dim**-0.5))
    yield Mutant(every, "the scale a thousandth off", asked_with(scale=lambda p: 1.001 * p.scale))
    grouped = SHAPES["grouped heads"]
    for fault, order in {
        "key heads by h % Hkv": lambda p: np.arange(p.q_heads) % p.kv_heads,
        "key heads in reverse": lambda p: (np.arange(p.q_heads) // p.group)[::-1],
        "key head 0 for all": lambda p: np.zeros(p.q_heads, int),
    }.items():
        yield Mutant("grouped heads", fault, meets=grouped, **of_key_heads(order))


# Each pair of options


def pairs() -> Iterator[Mutant]:
    for option, asked in ASKED.items():
        for beside, also in (ASKED | SHAPES).items():
            if beside != option:
                yield Mutant(
                    "an option ignored beside another",
                    f"{option} ignored beside {beside}",
                    lambda p, o, x=option: without(p, o, x),
                    meets=lambda p, asked=asked, also=also: asked(p) and also(p),
                )


# Each tensor, and each gradient


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Tensors]:
    return lambda p, found: found | {n: change(x) for n, x in found.items() if n == name}


OF_TENSORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "is 0": np.zeros_like,
    "has the other sign": np.negative,
    "is a hundredth off": lambda x: 1.01 * x,
    "is of the heads in reverse": lambda x: x[:, ::-1],
    "is of the batch rows in reverse": lambda x: x[::-1],
}
GRADIENTS = ("dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")


def gradients() -> Iterator[Mutant]:
    kind = "a tensor or gradient"
    for name in ("out", "lse", *GRADIENTS):
        for fault, change in OF_TENSORS.items():
            if name != "dsinks" or "batch" not in fault:  # which it has none of
                yield Mutant(kind, f"{name} {fault}", answers=tensor(name, change))
    yield Mutant(kind, "lse in base 2", answers=tensor("lse", lambda x: x / np.log(2)))
    yield Mutant(kind, "lse of a mean", answers=lambda p, found: found | (
        {"lse": found["lse"] - np.log(p.kv_length)} if "lse" in found else {}
    ))  # fmt: skip
    for fault, change in {
        "lse's gradient dropped": lambda p, o, dout, dlse: (dout, 0 * dlse),
        "lse's gradient with the other sign": lambda p, o, dout, dlse: (dout, -dlse),
        "lse's gradient twice": lambda p, o, dout, dlse: (dout, 2 * dlse),
        "delta left out": lambda p, o, dout, dlse: (dout, dlse + delta(p, o, dout)),
        "delta twice": lambda p, o, dout, dlse: (dout, dlse - delta(p, o, dout)),
        "delta of batch row 0": lambda p, o, dout, dlse: (
            dout, dlse + delta(p, o, dout) - delta(p, o, dout)[:1]
        ),
    }.items():  # fmt: skip
        yield Mutant(kind, fault, cotangents=change)
    for name in ("dq", "dk"):
        yield Mutant(
            kind,
            f"{name} without the scale",
            answers=lambda p, found, name=name: tensor(name, lambda x: x / (p.scale or 1))(
                p, found
            ),
        )
    for name in ("dk", "dv"):
        yield Mutant(
            kind,
            f"{name} a mean over its query heads",
            answers=lambda p, found, name=name: tensor(name, lambda x: x / p.group)(p, found),
            meets=SHAPES["grouped heads"],
        )


def delta(problem: Problem, operands: Operands, dout: np.ndarray) -> np.ndarray:
    """rowsum(dO ∘ O), (B, Hq, Sq)."""
    out, _ = oracle.forward(problem, operands)
    return (out * np.asarray(dout, np.float64)).sum(-1)


# Each edge

TILES = (16, 32, 64, 128)


def edges() -> Iterator[Mutant]:
    kind = "an edge"
    for tile in TILES:
        for name in ("out", "dq", "dk", "dv"):
            yield Mutant(
                kind,
                f"{name} without its last, partial tile of {tile}",
                answers=tensor(name, lambda x, tile=tile: rows_kept(x, x.shape[2] // tile * tile)),
                meets=lambda p, tile=tile, name=name: partial(length(p, name), tile),
            )
        yield Mutant(
            kind,
            f"the last, partial tile of {tile} keys hidden",
            hiding(lambda n, tile=tile: np.arange(n) >= n // tile * tile),
            meets=lambda p, tile=tile: partial(p.kv_length, tile),
        )
        yield Mutant(
            kind,
            f"causal by tiles of {tile}",
            seeing(lambda place, key, tile=tile: key // tile <= place // tile),
            meets=ASKED["causal"],
        )
        yield Mutant(
            kind,
            f"causal without the diagonal's tile of {tile}",
            seeing(lambda place, key, tile=tile: key // tile < place // tile),
            meets=ASKED["causal"],
        )
    for name in ("out", "lse", "dq", "dk", "dv"):
        for which, row in (("first", 0), ("last", -1)):
            yield Mutant(kind, f"{name} wrong in its {which} row", answers=tensor(
                name, lambda x, row=row: row_changed(x, row)
            ))  # fmt: skip
        yield Mutant(
            kind,
            f"{name} wrong in its last row of one head",
            answers=tensor(name, lambda x: row_changed(x, -1, head=-1)),
        )
    yield Mutant(kind, "the first key hidden", hiding(lambda n: np.arange(n) == 0))
    yield Mutant(kind, "the last key hidden", hiding(lambda n: np.arange(n) == n - 1))


def length(problem: Problem, name: str) -> int:
    return problem.q_length if name in ("out", "dq") else problem.kv_length


def partial(length: int, tile: int) -> bool:
    return length > tile and length % tile > 0


def rows_kept(x: np.ndarray, rows: int) -> np.ndarray:
    return np.where((np.arange(x.shape[2]) < rows)[:, None], x, 0)


def row_changed(x: np.ndarray, row: int, head: int | slice = slice(None)) -> np.ndarray:
    x = x.copy()
    x[:, head, row] *= 1.3
    return x


# Each dtype, and each size that a kernel may branch on

DTYPES = ("float64", "float32", "bfloat16", "float16")


def dtypes() -> Iterator[Mutant]:
    for dtype in DTYPES:
        for fault, mutation in {
            "the scale a fiftieth off": {"asks": asked_with(scale=lambda p: 1.02 * p.scale)},
            "dk a fiftieth off": {"answers": tensor("dk", lambda x: 1.02 * x)},
            "out with 6 digits of binary": {"answers": tensor("out", shortened)},
        }.items():
            yield Mutant(
                "a dtype",
                f"{fault} in {dtype}",
                meets=lambda p, dtype=dtype: p.dtype == dtype,
                **mutation,
            )


def shortened(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**6) / 2**6, exponent)


BRANCHES: dict[str, Callable[[Problem], bool]] = {
    "B > 1": lambda p: p.batch > 1,
    "Sq = 1": lambda p: p.q_length == 1,
    "Sk = 1": lambda p: p.kv_length == 1,
    "Sq = Sk": lambda p: p.q_length == p.kv_length,
    "Sq < Sk": lambda p: p.q_length < p.kv_length,
    "Sq > Sk": lambda p: p.q_length > p.kv_length,
    "Sq > 128": lambda p: p.q_length > 128,
    "Sk > 128": lambda p: p.kv_length > 128,
    "Sk > 1024": lambda p: p.kv_length > 1024,
    "Sk no multiple of 16": lambda p: p.kv_length % 16 > 0,
    "D > 64": lambda p: p.head_dim > 64,
    "D > 128": lambda p: p.head_dim > 128,
    "D no multiple of 8": lambda p: p.head_dim % 8 > 0,
    "Dv > D": lambda p: p.value_dim > p.head_dim,
    "Dv < D": lambda p: p.value_dim < p.head_dim,
    "Hq = Hkv": lambda p: p.q_heads == p.kv_heads > 1,
    "Hq > Hkv > 1": lambda p: p.q_heads > p.kv_heads > 1,
    "Hkv = 1": lambda p: p.q_heads > p.kv_heads == 1,
    "no LSE is asked for": lambda p: not p.return_lse,
}


def sizes() -> Iterator[Mutant]:
    for where, meets in BRANCHES.items():
        for fault, mutation in {
            "v a twentieth too large": {
                "asks": changed("v", lambda x: 1.05 * x.astype(np.float64))
            },
            "dk a twentieth off": {"answers": tensor("dk", lambda x: 1.05 * x)},
        }.items():
            yield Mutant("a size", f"{fault} where {where}", meets=meets, **mutation)
