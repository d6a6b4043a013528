"""Backends that are broken on purpose, each in one way that a real kernel has been, or could be.

Each is registered as the documentation says: an object with `name`, `reasons` and `run`. Most compute
plain attention of something else than what was asked; `caught_in` is a case that shows it, and `wrong`
what the crosscheck must name there, no more and no less.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import hard
import jax
import jax.numpy as jnp
import torch
from torch.nn import functional as F

from heedful import oracle
from heedful.oracle import FEATURES
from heedful.plain import plain
from heedful.rules.place import Place
from heedful.rules.visibility import visible
from heedful_crosscheck import Case

EVERYTHING = {"out", "lse", "dq", "dk", "dv"}
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Broken:
    """A backend that does not compute what it is asked.

    Attributes:
        name: under which it is registered.
        run: (problem, operands) → (out, lse).
        caught_in: a case that shows it, by its name or itself.
        wrong: the tensors that are wrong there; None for an exception.
        says: part of what the crosscheck must say.
        dtypes: in which it must be caught, each; bfloat16 is where noise hides most.
        deterministic: what it claims.
        verdict: what it comes out as.
    """

    name: str
    run: Callable
    caught_in: str | Case
    wrong: set[str | None]
    says: str = ""
    dtypes: tuple[str, ...] = ("bfloat16",)
    deterministic: bool = False
    verdict: str = "disagree"

    takes = FEATURES

    def reasons(self, problem):
        return ()


BROKEN: list[Broken] = []


def broken(name, **facts):
    """Adds a function (problem, operands) → (out, lse) to the collection."""

    def add(run):
        BROKEN.append(Broken(name, run, **facts))
        return run

    return add


# It answers another question


@broken("jax:top-left-for-bottom-right", caught_in="causal", wrong=EVERYTHING)
def _(problem, operands):
    return plain(replace(problem, q_offset=0), operands)


@broken("jax:bottom-right-for-top-left", caught_in="top-left", wrong=EVERYTHING)
def _(problem, operands):
    return plain(replace(problem, q_offset=problem.kv_length - problem.q_length), operands)


@broken("jax:offset-of-row-0-for-all", caught_in="offset-each", wrong=EVERYTHING)
def _(problem, operands):
    return plain(problem, operands._replace(q_offset=operands.q_offset[:1]))


@broken("jax:window-off-by-one", caught_in="window", wrong=EVERYTHING)
def _(problem, operands):
    left, right = problem.window
    return plain(replace(problem, window=(left + 1, right)), operands)


@broken("jax:window-ignored", caught_in="window-causal", wrong=EVERYTHING)
def _(problem, operands):
    return plain(replace(problem, window=None), operands)


@broken("jax:mask-ignored", caught_in="mask", wrong=EVERYTHING)
def _(problem, operands):
    return plain(problem, operands._replace(mask=None))


@broken("jax:mask-of-head-0-for-all", caught_in="mask", wrong=EVERYTHING)
def _(problem, operands):
    return plain(problem, operands._replace(mask=operands.mask[:, :1]))


@broken("jax:mask-inverted", caught_in="mask", wrong=EVERYTHING)
def _(problem, operands):
    return plain(problem, operands._replace(mask=~operands.mask))


@broken("jax:kv-length-ignored", caught_in="kv-lengths", wrong=EVERYTHING)
def _(problem, operands):
    # What stands behind the length is NaN in the crosscheck; a kernel that reads it must not
    # escape by that being another fault.
    finite = {n: jnp.nan_to_num(getattr(operands, n), posinf=0) for n in ("k", "v")}
    return plain(problem, operands._replace(kv_lengths=None, **finite))


DROPOUT = hard.hard("dropout", hard.normal, dropout_rate=0.4, dropout_seed=5)
OF_WEIGHTS = EVERYTHING - {"lse"}


@broken("jax:dropout-ignored", caught_in=DROPOUT, wrong=OF_WEIGHTS)
def _(problem, operands):
    return plain(replace(problem, dropout_rate=0.0), operands._replace(dropout_seed=None))


@broken("jax:dropout-of-another-seed", caught_in=DROPOUT, wrong=OF_WEIGHTS)
def _(problem, operands):
    return plain(problem, operands._replace(dropout_seed=operands.dropout_seed + 1))


@broken("jax:dropout-not-made-up-for", caught_in=DROPOUT, wrong=OF_WEIGHTS)
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out * jnp.asarray(1 - problem.dropout_rate, out.dtype), lse


@broken("jax:dropout-forward-alone", caught_in=DROPOUT, wrong={"dq", "dk", "dv"})
def _(problem, operands):
    out, lse = plain(replace(problem, dropout_rate=0.0), operands._replace(dropout_seed=None))
    dropped, _ = jax.lax.stop_gradient(plain(problem, operands))
    return out + dropped - jax.lax.stop_gradient(out), lse


@broken("jax:scale-doubled", caught_in="scale", wrong=EVERYTHING)
def _(problem, operands):
    return plain(replace(problem, scale=2 * problem.scale), operands)


@broken("jax:scale-a-thousandth-off", caught_in="full", wrong=EVERYTHING)
def _(problem, operands):
    return plain(replace(problem, scale=1.001 * problem.scale), operands)


@broken("jax:bias-ignored", caught_in="bias", wrong={*EVERYTHING, "dbias"})
def _(problem, operands):
    return plain(problem, operands._replace(bias=None))


# Its arithmetic is wrong


def _scores(problem, operands):
    """The scores before softcap and bias, and which are seen, (B, Hq, Sq, Sk), float32."""
    q, k = (x.astype(jnp.float32) for x in operands[:2])
    k = jnp.repeat(k, problem.group, 1)
    seen = visible(problem, operands, Place.whole(problem, jnp.arange))
    scores = problem.scale * jnp.einsum("bhid,bhjd->bhij", q, k)
    return scores, jnp.broadcast_to(True if seen is None else seen, scores.shape)


def _attend(problem, operands, scores, seen):
    """out and lse of finished scores; for cases without empty rows."""
    scores = jnp.where(seen, scores, -jnp.inf)
    v = jnp.repeat(operands.v.astype(jnp.float32), problem.group, 1)
    out = jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(scores), v)
    return out.astype(problem.dtype), jax.nn.logsumexp(scores, axis=-1)


@broken("jax:softcap-after-bias", caught_in="softcap-bias", wrong={*EVERYTHING, "dbias"})
def _(problem, operands):
    scores, seen = _scores(problem, operands)
    scores = scores + operands.bias.astype(jnp.float32)
    return _attend(problem, operands, problem.softcap * jnp.tanh(scores / problem.softcap), seen)


@broken("jax:softcap-not-rescaled", caught_in="softcap", wrong=EVERYTHING)
def _(problem, operands):
    scores, seen = _scores(problem, operands)
    return _attend(problem, operands, jnp.tanh(scores / problem.softcap), seen)


@broken("jax:out-a-thousandth-off", caught_in="full", wrong={"out"}, says="projection")
def _(problem, operands):
    out, lse = plain(*_in_float32(problem, operands))
    return _with_gradient_of(out, 1.001 * out).astype(problem.dtype), lse


@broken("jax:dv-a-thousandth-off", caught_in="full", wrong={"dv"}, says="projection")
def _(problem, operands):
    wide_problem, wide = _in_float32(problem, operands)
    v = _with_gradient_of(1.001 * wide.v, wide.v)
    out, lse = plain(wide_problem, wide._replace(v=v))
    return out.astype(problem.dtype), lse


def _in_float32(problem, operands):
    wide = {n: getattr(operands, n).astype(jnp.float32) for n in "qkv"}
    return replace(problem, dtype="float32"), operands._replace(**wide)


def _with_gradient_of(right, value):
    """The value of one array with the gradient of another."""
    return right + jax.lax.stop_gradient(value - right)


@broken("jax:lse-in-base-2", caught_in="full", wrong={"lse", "dq", "dk"})
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out, lse / math.log(2)


def _derived_again_as(problem, operands, again):
    """Plain attention whose gradients are right, and take their own derivative as if of `again`(x)."""
    rest = operands._replace(q=None, k=None, v=None)

    def attend(*qkv):
        return plain(problem, rest._replace(**dict(zip("qkv", qkv, strict=True))))

    attend_once = jax.custom_vjp(attend)
    attend_once.defvjp(
        lambda *qkv: (attend(*qkv), qkv),
        lambda qkv, cotangents: jax.vjp(attend, *again(*qkv))[1](cotangents),
    )
    return attend_once(*operands[:3])


@broken("jax:second-derivative-lost", caught_in="full", wrong={"d2q"})
def _(problem, operands):
    return _derived_again_as(problem, operands, lambda q, k, v: (jax.lax.stop_gradient(q), k, v))


@broken(
    "jax:second-derivative-a-fiftieth-off",
    caught_in="window-causal",
    wrong={"d2k"},
    dtypes=("float32", *HALVES),
)
def _(problem, operands):
    def more(x):
        return x + 0.02 * (x - jax.lax.stop_gradient(x))

    return _derived_again_as(problem, operands, lambda q, k, v: (q, more(k), v))


@broken("jax:bfloat16-sums", caught_in="long", wrong={"out"}, dtypes=("float32", *HALVES))
def _(problem, operands):
    """Adds up 20 keys at a time in bfloat16."""
    scores, seen = _scores(problem, operands)
    out, lse = _attend(problem, operands, scores, seen)
    weights = jax.nn.softmax(scores).reshape(*out.shape[:3], -1, 20)
    v = jnp.repeat(operands.v.astype(jnp.float32), problem.group, 1)
    v = v.reshape(*out.shape[:2], -1, 20, problem.value_dim)
    parts = jnp.einsum("bhitj,bhtjd->tbhid", weights, v)

    def add(total, part):
        return (total.astype(jnp.float32) + part).astype(jnp.bfloat16), None

    total, _ = jax.lax.scan(add, jnp.zeros(out.shape, jnp.bfloat16), parts)
    return _with_gradient_of(out, total.astype(problem.dtype)), lse


# It keeps too little for the backward pass


def _as_flash(problem, operands, *, probabilities, out_for_delta):
    """Plain attention with a backward pass of its own, for hard cases: no mask, a bias (1, 1, Sq, Sk).

    Args:
        probabilities: scores, lse → P, float32.
        out_for_delta: out in float32 → what delta = rowsum(dO ∘ O) takes.
    """
    wide_problem, wide = _in_float32(problem, operands)

    @jax.custom_vjp
    def attend(q, k, v, bias):
        out, lse = plain(wide_problem, wide._replace(q=q, k=k, v=v, bias=bias))
        return out.astype(problem.dtype), lse

    def forward(q, k, v, bias):
        out, lse = plain(wide_problem, wide._replace(q=q, k=k, v=v, bias=bias))
        return (out.astype(problem.dtype), lse), (q, k, v, bias, out, lse)

    def backward(kept, cotangents):
        q, k, v, bias, out, lse = kept
        d_out, d_lse = (x.astype(jnp.float32) for x in cotangents)
        scores = problem.scale * (q @ k.mT) + (0 if bias is None else bias)
        p = probabilities(scores, lse)
        delta = (d_out * out_for_delta(out)).sum(-1) - d_lse
        ds = p * (d_out @ v.mT - delta[..., None])
        d_bias = None if bias is None else ds.sum((0, 1), keepdims=True)
        return problem.scale * ds @ k, problem.scale * ds.mT @ q, p.mT @ d_out, d_bias

    attend.defvjp(forward, backward)
    bias = None if operands.bias is None else operands.bias.astype(jnp.float32)
    return attend(wide.q, wide.k, wide.v, bias)


def _exp_of_rounded_lse(problem, operands):
    """P = exp(s − lse), where lse has lost log n beside −1e9: Σ P = n, gradients n times too large."""
    return _as_flash(
        problem,
        operands,
        probabilities=lambda s, lse: jnp.exp(s - lse[..., None]),
        out_for_delta=lambda out: out,
    )


for padded in (hard.PADDED, hard.PADDED_TO_THE_END):
    broken(
        f"jax:exp-of-rounded-lse-{padded.name}",
        caught_in=padded,
        wrong={"dq", "dk", "dv", "dbias"},
        dtypes=("float32", "bfloat16"),
    )(_exp_of_rounded_lse)


def _delta_of_rounded_out(problem, operands):
    """Takes delta of an O that was rounded to bfloat16, as FlashAttention's kernels do."""
    return _as_flash(
        problem,
        operands,
        probabilities=lambda s, lse: jax.nn.softmax(s),
        out_for_delta=lambda out: out.astype(problem.dtype).astype(jnp.float32),
    )


for sharp in (hard.PEAKED, hard.FAR_APART):
    broken(
        f"jax:delta-of-rounded-out-{sharp.name}",
        caught_in=sharp,
        wrong={"dq", "dk"},
        says="times its limit",
        dtypes=HALVES,
        verdict="lossy",
    )(_delta_of_rounded_out)


@broken(
    "jax:peaked-gradients-lost",
    caught_in=hard.PEAKED,
    wrong={"dq", "dk"},
    dtypes=("float32", "bfloat16"),
)
def _(problem, operands):
    """A delta 5 % off: on peaked rows, where it cancels, that is more than rounding O would excuse."""
    return _as_flash(
        problem,
        operands,
        probabilities=lambda s, lse: jax.nn.softmax(s),
        out_for_delta=lambda out: out * 1.05,
    )


@broken("jax:lse-off-beside-padded-rows", caught_in=hard.PADDED_TO_THE_END, wrong={"lse"})
def _(problem, operands):
    """Beside an LSE of −3e38 that of all other rows was nothing."""
    out, lse = plain(problem, operands)
    return out, lse + jax.lax.stop_gradient(jnp.where(lse > -1e30, 0.01, 0.0))


# A part of it is wrong


@broken(
    "jax:one-row-wrong",
    caught_in="long",
    wrong={"out", "dq", "dk", "dv"},
    says="(b 0, h 2, row 300)",
)
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out.at[0, 2, 300].multiply(1.5), lse


@broken(
    "jax:one-row-wrong-in-out-alone", caught_in="long", wrong={"out"}, says="(b 0, h 1, row 599)"
)
def _(problem, operands):
    out, lse = plain(problem, operands)
    return _with_gradient_of(out, out.at[0, 1, 599].multiply(1.5)), lse


@broken("jax:tile-of-dv-lost", caught_in="long", wrong={"dv"}, says="in the tile of rows 128-255")
def _(problem, operands):
    lost = jnp.arange(problem.kv_length)[None, None, :, None] // 128 == 1
    v = jnp.where(lost, jax.lax.stop_gradient(operands.v), operands.v)
    return plain(problem, operands._replace(v=v))


@broken("jax:dk-in-the-wrong-head", caught_in="gqa", wrong={"dk"})
def _(problem, operands):
    return plain(problem, operands._replace(k=_roll_gradient(operands.k)))


@jax.custom_vjp
def _roll_gradient(x):
    return x


_roll_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.roll(g, 1, axis=1),))


@broken("jax:dk-of-one-query-head", caught_in="gqa", wrong={"dk"})
def _(problem, operands):
    """The gradient of a key head from the first of its query heads alone."""
    k = jnp.repeat(operands.k, problem.group, 1)
    first = jnp.arange(problem.q_heads)[None, :, None, None] % problem.group == 0
    k = jnp.where(first, k, jax.lax.stop_gradient(k))
    v = jnp.repeat(operands.v, problem.group, 1)
    return plain(replace(problem, kv_heads=problem.q_heads), operands._replace(k=k, v=v))


@broken(
    "jax:gradient-of-lse-dropped",
    caught_in="causal",
    wrong={"dq", "dk"},
    says="what flows back through LSE is wrong or lost",
)
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out, jax.lax.stop_gradient(lse)


@broken("jax:gradient-of-bias-dropped", caught_in="bias", wrong={"dbias"})
def _(problem, operands):
    return plain(problem, operands._replace(bias=jax.lax.stop_gradient(operands.bias)))


# Empty rows, hidden keys


@broken("jax:nan-on-empty-rows", caught_in="causal-tall", wrong={"out"}, says="has nan")
def _(problem, operands):
    out, lse = plain(problem, operands)
    return _with_gradient_of(out, jnp.where(jnp.isinf(lse)[..., None], jnp.nan, out)), lse


@broken("jax:mean-on-empty-rows", caught_in="causal-tall", wrong={"out"}, says="not 0")
def _(problem, operands):
    out, lse = plain(problem, operands)
    mean = operands.v.mean(2, keepdims=True)
    return _with_gradient_of(out, jnp.where(jnp.isinf(lse)[..., None], mean, out)), lse


@broken("jax:lse-0-on-empty-rows", caught_in="mask-empty", wrong={"lse"}, says="not -inf")
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out, jnp.where(jnp.isinf(lse), 0, lse)


@broken("jax:lse-inf-on-empty-rows", caught_in="mask-empty", wrong={"lse"}, says="has inf")
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out, jnp.where(jnp.isinf(lse), jnp.inf, lse)


@broken(
    "jax:nan-leaks-from-hidden-v",
    caught_in="key-padding",
    wrong={"out", "dq", "dk"},
    says="right while K and V that nobody sees hold no NaN",
)
def _(problem, operands):
    scores, seen = _scores(problem, operands)
    return _attend(problem, operands, scores, seen)


# What it returns or claims is wrong


@broken("jax:out-in-float32", caught_in="full", wrong={"out"}, says="expected", dtypes=HALVES)
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out.astype(jnp.float32), lse


@broken("jax:lse-in-q-dtype", caught_in="full", wrong={"lse"}, says="expected", dtypes=HALVES)
def _(problem, operands):
    out, lse = plain(problem, operands)
    return out, lse.astype(problem.dtype)


@broken("jax:raises", caught_in="full", wrong={None}, says="raised RuntimeError: out of registers")
def _(problem, operands):
    raise RuntimeError("out of registers")


_calls = itertools.count()


@broken(
    "numpy:not-deterministic",
    caught_in="full",
    wrong={"out"},
    says="differs between two runs",
    dtypes=("float32",),
    deterministic=True,
)
def _(problem, operands):
    out, lse = oracle.forward(problem, operands)
    out[0, 0, 0, 0] *= 1 + 1e-6 * next(_calls)
    return out.astype(problem.dtype), lse.astype(problem.accumulator)


# torch


@broken("torch:is-causal", caught_in="causal", wrong=EVERYTHING - {"lse"})
def _(problem, operands):
    """SDPA's own alignment, which is top-left."""
    q, k, v = operands[:3]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out, _lse_in_torch(problem, q, k, torch.ones_like(q[0, 0] @ k[0, 0].mT).tril(63).bool())


@broken("torch:gradient-of-lse-dropped", caught_in="full", wrong={"dq", "dk"}, says="through LSE")
def _(problem, operands):
    q, k, v = operands[:3]
    out = F.scaled_dot_product_attention(q, k, v)
    return out, _lse_in_torch(problem, q, k).detach()


@broken("torch:writes-into-q", caught_in="full", wrong={None}, says="wrote into q")
def _(problem, operands):
    q, k, v = operands[:3]
    with torch.no_grad():
        q.mul_(problem.scale)
    return F.scaled_dot_product_attention(q, k, v, scale=1.0), _lse_in_torch(
        replace(problem, scale=1.0), q, k
    )


@broken("torch:out-cut-off", caught_in="full", wrong={"dq", "dk", "dv"})
def _(problem, operands):
    """Keeps no graph at all, as a kernel called without its autograd.Function."""
    q, k, v = (x.detach() for x in operands[:3])
    return F.scaled_dot_product_attention(q, k, v), _lse_in_torch(problem, q, k)


def _lse_in_torch(problem, q, k, seen=None):
    scores = problem.scale * (q.float() @ k.float().mT)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.logsumexp(-1)


# What explains an answer that is wrong by a convention; of all others nothing does.
CAUSES = {
    "jax:top-left-for-bottom-right": "once causal is aligned top-left",
    "jax:bottom-right-for-top-left": "once causal is aligned bottom-right",
    "jax:offset-of-row-0-for-all": "with the q_offset of batch row 0 for all",
    "jax:window-off-by-one": "with a window one wider on its left",
    "jax:window-ignored": "if the window is ignored",
    "jax:mask-ignored": "if the mask is ignored",
    "jax:mask-of-head-0-for-all": "with the mask of head 0 for all",
    "jax:mask-inverted": "with the mask inverted",
    "jax:kv-length-ignored": "if kv_lengths are ignored",
    "jax:dropout-ignored": "if dropout is ignored",
    "jax:dropout-forward-alone": "if dropout is ignored, in the backward pass alone",
    "jax:scale-doubled": "with twice the scale",
    "jax:bias-ignored": "if the bias is ignored",
    "jax:softcap-after-bias": "with softcap after bias",
    "jax:softcap-not-rescaled": "with tanh(s / softcap), not multiplied by softcap again",
    "jax:lse-in-base-2": "once LSE is read in base 2",
    "jax:delta-of-rounded-out-peaked": "within what a delta of an O rounded",
    "jax:delta-of-rounded-out-two-keys-far-apart": "within what a delta of an O rounded",
    "jax:dk-of-one-query-head": "with dk of a group's first query head, not summed",
    "jax:gradient-of-lse-dropped": "if the gradient of LSE is dropped",
    "jax:gradient-of-bias-dropped": "if no gradient comes back to bias",
    "jax:mean-on-empty-rows": "if a query that sees nothing averages all of V",
    "jax:lse-0-on-empty-rows": "if LSE is 0 where nothing is seen",
    "torch:is-causal": "once causal is aligned top-left, in out alone",
    "torch:gradient-of-lse-dropped": "if the gradient of LSE is dropped",
    "torch:out-cut-off": "if no gradient comes back to q, k and v",
}
