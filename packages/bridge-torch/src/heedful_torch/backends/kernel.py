"""The contract around one kernel that somebody else wrote for torch: what SDPA's and flash-attn's share.

A kernel is a forward and a backward operator of tensors, and says what it takes (`Kernel`). What its own
package does around it, and what the contract asks beyond that, is here:

- Position, masks, lengths, bias and empty rows: `score_mask`; `parts`, where a kernel is told lengths.
- Head sizes and layout. The operators believe what their callers have checked: given a last axis that
  is not contiguous, or fewer key heads than query heads, SDPA's CPU kernel reads foreign memory.
  Operands are padded with zero columns, which change no score, and laid out first.
- Grouped heads. Query head h reads key head h // G. The g-th query heads of all groups are a
  strided view with as many heads as K and V, so a kernel that needs equal heads is called G times,
  on K and V as they are: neither they nor their gradients are ever repeated. Nor does an axis get
  stride 0, with which the efficient kernel is reported to be wrong (pytorch#191937).
- A scale of zero or less. Kernels hide causal scores by -inf before they multiply by the scale, and
  the CPU kernel returns NaN. The sign is moved into q, exactly. So is what is no power of two, but in
  half precision: the CPU kernel multiplies by it in one place going forward and in another going back,
  and the roundings of the scores, large ones above all, would part company with their LSE.
- ALiBi's slopes, where a kernel counts them itself: in the mask's place, in float32. No kernel gives
  their gradient, so `_mask_gradient` does.
- The gradient of the LSE, which torch's own derivative of these operators drops silently:
  `_with_lse_cotangent`. And that of the mask, which some drop too: `_mask_gradient`.
- The probabilities that the backward operators make of a rounded LSE, and which sum to anything where
  scores or bias are large: `row_sums`.
- Autocast, forward and backward.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.rules.scores import adding
from heedful.rules.visibility import hiding
from heedful_torch.backends.parts import Band, part_of_row, parts_of, queries_within
from heedful_torch.backends.row_sums import row_sums
from heedful_torch.backends.score_mask import Span, additive_shape, score_mask, span_of
from heedful_torch.function import (
    FirstOrder,
    Function,
    has_no_data,
    no_forward_mode,
    outside_compilation,
    refuse_recording,
    without_gradient,
)
from heedful_torch.outside_autocast import no_autocast


class How(NamedTuple):
    """What a kernel is told beside tensors.

    Attributes:
        scale: of the scores, positive.
        softcap: c of c·tanh(s/c), or None.
        below, above: keys j < i + below and j > i + above are hidden, None: none on that side; and no
            more than `Kernel.says` lets through. Of parts they are counted from the lower right corner:
            where it is elsewhere than the arrays', the band is so, too.
        diagonal: where the mask holds slopes of ALiBi, slope · |i + diagonal − j| is taken off the
            scores, of parts likewise; None: it holds what is added.
        functions: the problem's, for a kernel whose backend takes them.
        first: the numbers of the first query and key, as these count them.
    """

    scale: float
    softcap: float | None = None
    below: int | None = None
    above: int | None = None
    diagonal: int | None = None
    functions: Mapping[str, Any] | None = None
    first: tuple[int, int] = (0, 0)

    @property
    def band(self) -> Band:
        """Where it lies."""
        return self.below, self.above, self.diagonal

    @property
    def causal(self) -> bool:
        """The flag `is_causal` of a kernel that has no windows."""
        return self.above is not None


class Arguments(NamedTuple):
    """What a kernel is given.

    Attributes:
        q, k, v: (B, H, S, ·), padded and laid out as the kernel reads them.
        mask: added to the scores, each axis full or 1 of (B, Hq, Sq, Sk); or ALiBi's slopes, which
            `How.diagonal` says, (B or 1, Hq, 1, 1); or None.
        parts: of each row the queries and keys that attend (`parts_of`), (B, 1, 4), int32: of what is
            outside, nothing is read, results are anything, and gradients 0; None: all attend.
        how: all else.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    parts: Tensor | None
    how: How


class Results(NamedTuple):
    """What it returns: out, lse where it has one, and what else its backward pass needs."""

    out: Tensor
    lse: Tensor | None
    kept: tuple[Tensor, ...] = ()


Forward = Callable[[Arguments], Results]
# (dout, arguments, results, is dmask wanted) → dq, dk, dv, dmask or None
Backward = Callable[
    [Tensor, Arguments, Results, bool], tuple[Tensor, Tensor, Tensor, Tensor | None]
]


@dataclass(frozen=True)
class Kernel:
    """One kernel: its operators, and what they take.

    Attributes:
        forward: the operator.
        backward: its backward operator; None where torch's own derivative is right.
        once: whether that derivative is its package's, which fills tensors: differentiated again, it
            would count as a constant, silently.
        flag: where the diagonal of `is_causal` lies: it starts in the upper left corner of the
            scores, or ends in the lower right one; None where the flag is not used.
        windows: what band it takes beside the flag: one "around" that diagonal, or "any".
        lengths: whether it is told `Arguments.parts`, and its flag and windows lie about the corner of
            each; only with the flag "lower right".
        masks: the dtype of the additive mask, the accumulator's or q's own; "slopes": it takes no mask
            but ALiBi's slopes, and counts distances from the diagonal of the flag; None: neither.
        mask_gradient: whether `backward` gives the gradient of the mask.
        alignment: head sizes, strides and offsets are multiples of so many elements.
        equal_head_sizes: whether V must have the head size of Q and K.
        grouped: whether K and V may have fewer heads than Q.
        largest_head: the largest head size, padding included.
        opaque: the backend's name, where torch knows nothing of the operators: what has no data is not
            handed to them, and no graph can hold them; None where they are torch's own.
        widened: head sizes above the first of these two, up to the second, are padded to the second.
    """

    forward: Forward
    backward: Backward | None
    flag: Literal["upper left", "lower right"] | None
    masks: Literal["accumulator", "q", "slopes"] | None
    windows: Literal["around", "any"] | None = None
    lengths: bool = False
    once: bool = False
    mask_gradient: bool = False
    alignment: int = 1
    equal_head_sizes: bool = False
    grouped: bool = False
    largest_head: int | None = None
    widened: tuple[int, int] = (0, 0)
    opaque: str | None = None

    def padded(self, size: int) -> int:
        """The head size that the kernel is given for a head size of the problem."""
        above, wide = self.widened
        if above < size <= wide:
            return wide
        return -(-size // self.alignment) * self.alignment

    def corner(self, q_length: int, kv_length: int) -> int:
        """By the flag alone query i sees the keys up to i + corner."""
        return kv_length - q_length if self.flag == "lower right" else 0

    def says(self, place: Span) -> bool:
        """Whether its own arguments say exactly what position hides."""
        if place.hides == "by rows" or (place.hides == "by lengths" and not self.lengths):
            return False
        if place.below is place.above is None or self.windows == "any":
            return True
        if self.flag is None:
            return False
        corner = self.corner(len(place.rows), len(place.columns))
        if not self.windows:
            return place.below is None and place.above == corner
        above = corner if place.above is None else place.above
        below = corner if place.below is None else place.below
        return below <= corner <= above

    def hiding(self, problem: Problem) -> dict[str, tuple[int, ...]]:
        """What hides keys beside position and what it is told."""
        told = {"q_lengths", "kv_lengths"} if self.lengths else set()
        return {name: shape for name, shape in hiding(problem).items() if name not in told}

    def aligns(self, problem: Problem, place: Span) -> bool:
        """Whether what lengths leave of each row ends in the corner that position counts from.

        It does where position is that of the lengths, and where it plays no part. Elsewhere the queries'
        lengths may say where the keys end, which a row's last query sees last.
        """
        if place.hides == "by lengths" or (place.hides != "band" and not self.counts(problem)):
            return True
        corner = self.corner(len(place.rows), len(place.columns))
        return place.above == corner and not problem.kv_lengths

    def counts(self, problem: Problem) -> bool:
        """Whether it is told the slopes of ALiBi, which are then in no mask."""
        return self.masks == "slopes" and problem.alibi_shape is not None

    def needs_mask(self, problem: Problem, place: Span) -> bool:
        """Whether its own arguments leave something of the problem to an additive mask."""
        added = set(adding(problem)) - ({"alibi_slopes"} if self.counts(problem) else set())
        return bool(self.hiding(problem) or added or not self.says(place))


# What keeps a kernel from a problem


def limits(kernel: Kernel, problem: Problem, takes: Collection[str]) -> list[str]:
    """What keeps a kernel from a problem on any machine, beside features: masks, head sizes.

    Args:
        kernel: of which several may belong to one backend.
        problem: what is asked.
        takes: the backend's features; all others it refuses without asking.
    """
    reasons = []
    if kernel.masks in (None, "slopes"):
        place = span_of(problem)
        offset = "of its own a row" if problem.q_offset is None else str(problem.q_offset)
        counted = "alibi_slopes" in takes and kernel.counts(problem)
        needs = [feature for feature in kernel.hiding(problem) if feature in takes]
        if not kernel.says(place) and problem.band != (None, None):
            needs.append("window" if problem.window else f"causal with a q_offset {offset}")
        if needs:
            reasons.append(f"this kernel takes no mask, which {' and '.join(needs)} would need")
        told = [name for name in hiding(problem) if name not in kernel.hiding(problem)]
        if told and kernel.says(place) and not kernel.aligns(problem, place):
            reasons.append(
                f"beside {' and '.join(told)} this kernel aligns each row's last query with its last "
                f"key, not with a q_offset {offset}"
            )
        added = (set(adding(problem)) & set(takes)) - ({"alibi_slopes"} if counted else set())
        reasons += [f"this kernel takes no {name}" for name in sorted(added)]
        if counted and place.corner(problem) != kernel.corner(len(place.rows), len(place.columns)):
            reasons.append(
                "this kernel counts ALiBi's distances from a diagonal that ends in the lower right "
                f"corner, not with a q_offset {offset}"
            )
    rounded = [name for name in adding(problem) if name != "bias" and name in takes]
    if kernel.masks == "q" and problem.dtype != problem.accumulator and rounded:
        reasons.append(
            f"this kernel takes a mask of {problem.dtype}, which would round {' and '.join(rounded)}"
        )
    if kernel.masks == "q" and problem.bias_dtype not in (None, problem.dtype):
        reasons.append(
            f"this kernel takes a bias of q's dtype, {problem.dtype}, not of {problem.bias_dtype}"
        )
    if kernel.largest_head is not None:
        size, largest = max(problem.head_dim, problem.value_dim), kernel.largest_head
        if kernel.padded(size) > largest:
            reasons.append(f"this kernel takes head sizes up to {largest}, not {size}")
        elif not problem.return_lse or kernel.backward is None:
            pass
        elif kernel.padded(size + LSE_COLUMNS) > largest:
            reasons.append(
                f"with return_lse this kernel takes head sizes up to {largest - LSE_COLUMNS}, "
                f"not {size}: the gradient of the LSE needs columns of its own"
            )
    return reasons


def score_bytes(kernel: Kernel, problem: Problem, scores: bool | None = None) -> int:
    """What a kernel is given, or materialises itself, that grows with Sq · Sk, in bytes.

    Args:
        kernel: whose.
        problem: what is asked.
        scores: whether it materialises the scores; None: where it has no backward operator, it does.
    """
    place = span_of(problem)
    itemsize = getattr(torch, problem.accumulator).itemsize
    found = 0
    if kernel.backward is None if scores is None else scores:  # and probabilities
        found += (
            2 * itemsize * problem.batch * problem.q_heads * len(place.rows) * len(place.columns)
        )
    if kernel.needs_mask(problem, place):
        shape = additive_shape(problem, place)
        if 1 not in shape[2:]:
            dtype = problem.accumulator if kernel.masks == "accumulator" else problem.dtype
            found += math.prod(shape) * getattr(torch, dtype).itemsize
    return found


def cuda_limits(
    problem: Problem, dtypes: tuple[str, ...], capability: tuple[int, int]
) -> list[str]:
    """What keeps a kernel that exists for CUDA alone from a problem on this machine."""
    reasons = []
    if problem.platform != "gpu":
        reasons.append(f"this kernel needs a CUDA GPU; the arrays lie on {problem.platform}")
    if problem.dtype not in dtypes:
        reasons.append(f"this kernel takes {' and '.join(dtypes)}, not {problem.dtype}")
    if torch.version.hip is not None:
        reasons.append("this kernel is the one for CUDA; this torch is built for ROCm")
    elif not torch.cuda.is_available():
        reasons.append("this torch sees no CUDA GPU")
    elif (here := torch.cuda.get_device_capability()) < capability:
        reasons.append(
            f"this kernel needs a GPU of compute capability {capability[0]}.{capability[1]}, "
            f"not {here[0]}.{here[1]}"
        )
    return reasons


# The call, from the contract inwards


def attend(kernel: Kernel, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """out and lse of a problem that is within the kernel's limits."""
    with no_autocast(operands.q):
        return _attend(kernel, problem, operands)


def attend_forward(
    kernel: Kernel, problem: Problem, operands: Operands, why: str
) -> tuple[Tensor, Tensor | None]:
    """The same of a kernel that has no gradients; to differentiate them raises, and says why."""
    detached = Operands(**{name: x.detach() for name, x in operands.given.items()})
    out, lse = attend(kernel, problem, detached)
    results = (out,) if lse is None else (out, lse)
    out, *rest = without_gradient(why, results, operands.differentiable.values())
    return out, rest[0] if rest else None


def _attend(kernel: Kernel, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
    place = span_of(problem)
    rows, columns = place.rows, place.columns
    q = operands.q[:, :, rows.start : rows.stop]
    k = operands.k[:, :, columns.start : columns.stop]
    v = operands.v[:, :, columns.start : columns.stop]

    factor, scale = _factors(problem)
    additive, parts, sees, how = None, None, None, How(scale, problem.softcap)
    if kernel.needs_mask(problem, place):
        dtype = problem.accumulator if kernel.masks == "accumulator" else problem.dtype
        mask = score_mask(problem, operands, place, getattr(torch, dtype))
        additive, sees = mask.additive, mask.sees
        q = torch.where(mask.sees, q, 0)
        k, v = torch.where(mask.seen, k, 0), torch.where(mask.seen, v, 0)
    else:
        how = how._replace(below=place.below, above=place.above)
        if kernel.counts(problem):
            assert operands.alibi_slopes is not None
            additive = operands.alibi_slopes.to(getattr(torch, problem.accumulator))
            how = how._replace(diagonal=kernel.corner(len(rows), len(columns)))
        if problem.q_lengths or problem.kv_lengths:
            parts = parts_of(problem, operands, place)
            sees = queries_within(parts, len(rows)).unsqueeze(-1)

    if problem.functions:
        how = how._replace(functions=problem.functions, first=(rows.start, columns.start))
    if factor != 1:
        q = factor * q
    arguments = Arguments(q, k, v, additive, parts, how)
    out, lse, _ = _over_groups(kernel, problem.group, arguments)

    if sees is not None:
        out = torch.where(sees, out, 0)
        lse = None if lse is None else torch.where(sees.squeeze(-1), lse, -torch.inf)
    if len(rows) < problem.q_length:  # the queries that were cut off see nothing
        around = (rows.start, problem.q_length - rows.stop)
        out = F.pad(out, (0, 0, *around))
        lse = None if lse is None else F.pad(lse, around, value=-torch.inf)
    return out, lse


def _factors(problem: Problem) -> tuple[float, float]:
    """The scale as a factor for q and what is left of it, positive, for the kernel."""
    if problem.dtype != problem.accumulator and problem.scale:
        return math.copysign(1.0, problem.scale), abs(problem.scale)
    factor, exponent = math.frexp(problem.scale)
    if abs(factor) == 0.5:
        factor, exponent = 2 * factor, exponent - 1
    return factor, math.ldexp(1.0, exponent)


def _over_groups(kernel: Kernel, group: int, asked: Arguments) -> Results:
    if group == 1 or kernel.grouped:
        return _on_padded_heads(kernel, asked)
    mask, members = asked.mask, []
    for g in range(group):
        member_mask = mask if mask is None or mask.shape[1] == 1 else mask[:, g::group]
        member = asked._replace(q=asked.q[:, g::group], mask=member_mask)
        members.append(_on_padded_heads(kernel, member))
    outs, lses, _ = zip(*members, strict=True)
    out = torch.stack(outs, 2).flatten(1, 2)
    return Results(out, None if lses[0] is None else torch.stack(lses, 2).flatten(1, 2))


def _on_padded_heads(kernel: Kernel, asked: Arguments) -> Results:
    value_dim = asked.v.shape[-1]
    head, value_head = kernel.padded(asked.q.shape[-1]), kernel.padded(value_dim)
    if kernel.equal_head_sizes:
        head = value_head = max(head, value_head)
    q, k, v = (
        _laid_out(_pad_head(x, size), kernel.alignment)
        for x, size in ((asked.q, head), (asked.k, head), (asked.v, value_head))
    )
    asked = asked._replace(q=q, k=k, v=v)
    lse: Tensor | None
    if kernel.backward is not None:
        out, lse, *_ = _Fused.apply(kernel, *asked)
    elif kernel.once and any(x is not None and x.requires_grad for x in asked[:-1]):
        out, *rest = _ByItsPackage.apply(kernel, _Graph(), *asked)
        lse = rest[0] if rest else None
    else:
        out, lse, _ = _forward(kernel, asked) if kernel.opaque else kernel.forward(asked)
    return Results(out[..., :value_dim], lse)


def _pad_head(x: Tensor, size: int) -> Tensor:
    """(..., d) → (..., size), with zero columns on the right."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _laid_out(x: Tensor, alignment: int) -> Tensor:
    """The tensor, or a copy where a kernel needs one: whole rows one after the other, aligned."""
    size, stride = x.shape, x.stride()
    readable = (
        (size[-1] == 1 or stride[-1] == 1)
        and (size[-2] == 1 or stride[-2] >= size[-1])
        and x.storage_offset() % alignment == 0
        and all(s % alignment == 0 for n, s in zip(size[:-1], stride[:-1], strict=True) if n > 1)
    )
    return x if readable else x.clone(memory_format=torch.contiguous_format)


# Autograd functions take tensors one by one: the fields of `Arguments`, then those of `Results`.


class _Fused(Function):
    """A kernel, differentiable once and in reverse, through out and LSE alike."""

    @staticmethod
    def forward(kernel: Kernel, *arguments: Any) -> tuple[Tensor, ...]:
        """out, lse, and one by one what else the backward pass needs."""
        out, lse, kept = _forward(kernel, Arguments(*arguments))
        assert lse is not None  # only a kernel without a backward operator of its own has none
        return out, lse, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kernel, *tensors, ctx.how = inputs
        _, _, *kept = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @outside_compilation
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse, *_ = cotangents
        n = len(Arguments._fields) - 1
        arguments = Arguments._make((*ctx.saved_tensors[:n], ctx.how))
        results = ctx.saved_tensors[n:]
        mask_wanted = ctx.needs_input_grad[1 + Arguments._fields.index("mask")]
        gradients = _FusedPullBack.apply(ctx.kernel, mask_wanted, dout, dlse, *arguments, *results)
        return None, *gradients, None, None

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        kernel, q, k, v, mask, parts, how = args
        _, *dims, of_mask, of_parts, _ = in_dims
        size = info.batch_size
        if of_mask is not None or (mask is not None and len(mask) > 1):  # else all share it
            mask = _folded(size, of_mask, _over_batch(mask, of_mask, _rows(q, dims[0])))
        q, k, v = (_folded(size, dim, x) for x, dim in zip((q, k, v), dims, strict=True))
        parts = _folded(size, of_parts, parts)
        return _unfolded(size, _Fused.apply(kernel, q, k, v, mask, parts, how))


class _FusedPullBack(FirstOrder):
    """A kernel's backward operator, with the gradients of the LSE and the mask."""

    @staticmethod
    def forward(
        kernel: Kernel, mask_wanted: bool, dout: Tensor | None, dlse: Tensor | None, *known: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv, and dmask where it is wanted."""
        n = len(Arguments._fields)
        arguments, (out, lse, *kept) = Arguments(*known[:n]), known[n:]
        results = Results(out, lse, tuple(kept))
        return _fused_backward(kernel, arguments, results, dout, dlse, mask_wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        kernel, mask_wanted, dout, dlse, q, k, v, mask, parts, how, *results = args
        n = 4 + len(Arguments._fields)
        _, _, *before, of_mask, of_parts, _ = in_dims[:n]
        size, of_q = info.batch_size, in_dims[4]
        shared = mask is not None and _rows(mask, of_mask) == 1
        # Not shared as going forward: each member of the axis has a gradient of its own.
        if mask is not None and (mask_wanted or of_mask is not None or not shared):
            mask = _folded(size, of_mask, _over_batch(mask, of_mask, _rows(q, of_q)))
        first = (_folded(size, d, x) for x, d in zip((dout, dlse, q, k, v), before, strict=True))
        parts = _folded(size, of_parts, parts)
        last = (_folded(size, d, x) for x, d in zip(results, in_dims[n:], strict=True))
        gradients = _FusedPullBack.apply(kernel, mask_wanted, *first, mask, parts, how, *last)
        (*of_qkv, dmask), dims = _unfolded(size, gradients)
        if dmask is not None and shared:
            dmask = dmask.sum(1, keepdim=True)
        return (*of_qkv, dmask), dims


@dataclass(eq=False)
class _Graph:
    """What a package has recorded of one call, to differentiate it."""

    operands: list[Any] = field(default_factory=list)  # tensors, and None
    results: list[Tensor] = field(default_factory=list)


class _ByItsPackage(Function):
    """A kernel that its package differentiates, `once`."""

    @staticmethod
    def forward(kernel: Kernel, graph: _Graph, *arguments: Any) -> tuple[Tensor, ...]:
        """out, and lse where there is one."""
        *tensors, how = arguments
        with torch.enable_grad():
            graph.operands = [x if x is None else x.detach().requires_grad_() for x in tensors]
            found = _forward(kernel, Arguments._make((*graph.operands, how)))
            graph.results = [x for x in (found.out, found.lse) if x is not None]
        return tuple(x.detach() for x in graph.results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.graph, *tensors, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @outside_compilation
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _PullBackOfPackage.apply(ctx.graph, *cotangents, *ctx.saved_tensors)
        return None, None, *gradients, None

    jvp = staticmethod(no_forward_mode)


class _PullBackOfPackage(FirstOrder):
    """The gradients of `_ByItsPackage`."""

    @staticmethod
    def forward(graph: _Graph, *known: Any) -> tuple[Tensor | None, ...]:
        """Of each operand that there is, its gradient."""
        pairs = [(x, d) for x, d in zip(graph.results, known, strict=False) if d is not None]
        results, cotangents = zip(*pairs, strict=True)
        given = [x for x in graph.operands if x is not None]
        if results[0].requires_grad:
            options = {"retain_graph": True, "materialize_grads": True}
            found = iter(torch.autograd.grad(results, given, cotangents, **options))
        else:  # nothing was computed: there is no row, or no key
            found = map(torch.zeros_like, given)
        return tuple(x if x is None else next(found) for x in graph.operands)


def _forward(kernel: Kernel, asked: Arguments) -> Results:
    """out, lse, and what the backward pass needs besides."""
    q, k, v, *_ = asked
    if q.numel() and k.numel() and not (kernel.opaque and has_no_data(q)):
        if kernel.opaque:
            refuse_recording(kernel.opaque)
        return kernel.forward(asked)
    # No row sees a key, or there is no row, or only the shapes are asked for.
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    return Results(out, q.new_full(q.shape[:-1], -torch.inf, dtype=accumulator))


def _fused_backward(
    kernel: Kernel,
    asked: Arguments,
    results: Results,
    dout: Tensor | None,
    dlse: Tensor | None,
    mask_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and, where it is wanted, dmask; of what `_forward` took and gave."""
    (q, k, v, mask, parts, how), (out, lse, kept) = asked, results
    if not (q.numel() and k.numel()) or (kernel.opaque and has_no_data(q)):
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        return dq, dk, dv, None if mask is None else torch.zeros_like(mask)
    assert kernel.backward is not None and lse is not None
    head, value_head = q.shape[-1], v.shape[-1]
    dmask = None
    with no_autocast(q):
        if dout is None:
            dout = torch.zeros_like(out)
        if mask_wanted and not kernel.mask_gradient:
            dmask, mask_wanted = _mask_gradient(dout, dlse, asked), False
        if dlse is not None:
            q, k, v = _with_lse_columns(kernel, q, k, v)
        scores = how.scale, how.softcap, *how.band
        sums = row_sums(q, k, mask, parts, *scores, lse, widened=dlse is not None)
        dout = (dout / sums.unsqueeze(-1)).to(out.dtype)
        if dlse is not None:
            dout, out = _with_lse_cotangent(dlse / sums, dout, out, v.shape[-1])
        dout, out = _laid_out(dout, kernel.alignment), _laid_out(out, kernel.alignment)
        asked, results = asked._replace(q=q, k=k, v=v), Results(out, lse, kept)
        dq, dk, dv, of_kernel = kernel.backward(dout, asked, results, mask_wanted)
    return (
        dq[..., :head],
        dk[..., :head],
        dv[..., :value_head],
        of_kernel if mask_wanted else dmask,
    )


# A mapped axis becomes part of the batch, the first axis of every tensor of rank 3 and 4; what is left,
# the seed and offset of a dropout that is off, has none.


def _rows(x: Tensor, dim: int | None) -> int:
    """The batch of a tensor in which another axis is mapped, or none."""
    return x.shape[0] if dim is None else x.movedim(dim, 0).shape[1]


def _over_batch(mask: Tensor, dim: int | None, batch: int) -> Tensor:
    """The mask with its own row for each of the batch, the mapped axis in its place."""
    if dim is None:
        return mask.expand(batch, -1, -1, -1)
    return mask.movedim(dim, 0).expand(-1, batch, -1, -1, -1).movedim(0, dim)


def _folded(size: int, dim: int | None, x: Tensor | None) -> Tensor | None:
    if x is None or x.dim() < 3:
        return x
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.flatten(0, 1).contiguous()


def _unfolded(
    size: int, folded: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    found = [
        x if x is None or x.dim() < 3 else x.reshape(size, len(x) // size, *x.shape[1:])
        for x in folded
    ]
    return tuple(found), tuple(None if x is None or x.dim() < 4 else 0 for x in found)


LSE_COLUMNS = 3  # of 8 bits each in bfloat16: together they hold a float32


def _with_lse_columns(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for a backward kernel, with room for `_with_lse_cotangent` in v, and so in dO and O."""
    count = 1 if q.dtype in (torch.float32, torch.float64) else LSE_COLUMNS
    value_head = kernel.padded(v.shape[-1] + count)
    head = value_head if kernel.equal_head_sizes else q.shape[-1]
    return _pad_head(q, head), _pad_head(k, head), _pad_head(v, value_head)


def _with_lse_cotangent(
    dlse: Tensor, dout: Tensor, out: Tensor, value_head: int
) -> tuple[Tensor, Tensor]:
    """dout, out for a backward kernel, such that it honours the cotangent of the LSE.

    With P the probabilities, the gradient of the scores is dS = P ∘ (dO Vᵀ − δ + dlse), where
    δ = rowsum(dO ∘ O), the D of Dao et al. 2022, Algorithm 4. The kernels know no dlse, but they
    make δ of the dO and O that they are given. So V gets new columns of zeros, dO a factor f there
    and O −dlse / f: then dO Vᵀ stays what it is, and δ becomes δ − dlse. What the kernel makes of
    these columns, in dV and in the padding of dQ and dK, is cut off.

    In half precision one column would round dlse, so it is split over three, each holding what
    those before it left over. f = 1 would do but for float16, whose exponents are too few: so f is
    the power of two next to dlse.
    """
    count, factor = 1, torch.ones_like(dlse)
    if out.dtype in (torch.float16, torch.bfloat16):
        count, factor = LSE_COLUMNS, torch.ldexp(factor, torch.frexp(dlse).exponent.clamp(-24, 15))
    rest, columns = -dlse / factor, []
    for _ in range(count):
        columns.append(rest.to(out.dtype))
        rest = rest - columns[-1]
    factors = factor.to(out.dtype).unsqueeze(-1).expand(*factor.shape, count)

    return (
        _pad_head(torch.cat([dout, factors], -1), value_head),
        _pad_head(torch.cat([out, torch.stack(columns, -1)], -1), value_head),
    )


MASK_GRADIENT_TILE = 2**19  # scores: 2 MiB in float32


def _mask_gradient(dout: Tensor, dlse: Tensor | None, asked: Arguments) -> Tensor:
    """The gradient of the additive mask, or of ALiBi's slopes, for kernels that give none.

    It is dS itself, times what a slope is multiplied by, summed over the axes that the mask does not
    have: dS = P ∘ (dP − rowsum(P ∘ dP) + dlse), dP = dO Vᵀ. The scores of some rows of one head are
    materialised at a time, in the mask's dtype.
    """
    q, k, v, mask, parts, how = asked
    assert mask is not None  # it is wanted of
    gradient, group = torch.zeros_like(mask), q.shape[1] // k.shape[1]
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        part, (below, above, diagonal) = part_of_row(parts, b, q.shape[2], k.shape[2], how.band)
        keys = slice(part.k_begin, part.k_end)
        key, value = (x[b, h // group, keys].to(mask.dtype) for x in (k, v))
        j = torch.arange(len(key), device=q.device)
        at = (min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1))
        rows = max(1, MASK_GRADIENT_TILE // max(1, len(key)))
        for start in range(part.q_begin, part.q_end, rows):
            tile = slice(start, min(start + rows, part.q_end))
            of_mask = (*at, tile if mask.shape[2] > 1 else slice(None))
            query, do = q[b, h, tile].to(mask.dtype), dout[b, h, tile].to(mask.dtype)
            i = torch.arange(start, start + len(query), device=q.device)[:, None]
            times = 1 if diagonal is None else -(i + diagonal - j).abs()
            scores = how.scale * (query @ key.mT)
            if how.softcap is not None:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            scores += mask[of_mask] * times
            if below is not None:
                scores.masked_fill_(j < i + below, -torch.inf)
            if above is not None:
                scores.masked_fill_(j > i + above, -torch.inf)
            p = torch.softmax(scores, -1)
            dp = do @ value.mT
            dp -= (p * dp).sum(-1, keepdim=True)
            if dlse is not None:
                dp += dlse[b, h, tile, None]
            gradient[of_mask] += (p * dp * times).sum_to_size(gradient[of_mask].shape)
    return gradient
