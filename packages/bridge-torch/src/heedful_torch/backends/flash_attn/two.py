"""`torch:flash-attn-2`: the published package flash-attn, its CUDA kernels, or its Triton ones on a CPU.

On a CPU the Triton kernels run interpreted, in a process of their own, slowly: they are there to be
compared with. The CUDA kernels have not been run here yet.

Where lengths are given, what attends of each batch row becomes a sequence of the package's varlen
functions. That costs copies of q, k and v, and going back of dout and out too (`packed`); to the kernels
padding is nothing.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from heedful.call.operands import Operands
from heedful.call.problem import Problem
from heedful.dispatch.packages import why_not_imported
from heedful_torch.backends.flash_attn import TAKES, calls_2, flash_attn_kernel
from heedful_torch.backends.kernel import (
    Arguments,
    Results,
    attend,
    cuda_limits,
    limits,
)
from heedful_torch.worker import Worker, WorkerError

PACKAGE = "flash-attn"
_worker = Worker("heedful_torch.backends.flash_attn.interpreted_2")


def _interpreted_forward(asked: Arguments) -> Results:
    found: Results = _worker.call("forward", asked)
    return found


def _interpreted_backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    found: tuple[Tensor, Tensor, Tensor, None] = _worker.call(
        "backward", dout, asked, results, mask_wanted
    )
    return found


def _cuda_forward(asked: Arguments) -> Results:
    return calls_2.forward(_as_a_window(asked))


def _cuda_backward(
    dout: Tensor, asked: Arguments, results: Results, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, None]:
    return calls_2.backward(dout, _as_a_window(asked), results, mask_wanted)


def _as_a_window(asked: Arguments) -> Arguments:
    """The same call, which says what a causal one hides as a window that is open to the first key.

    By their source (csrc/flash_attn/src/alibi.h) the CUDA kernels add slope · j in a causal call with
    slopes, so that their LSE has slope · p_i too much, which would swallow its last digits. In a window
    they take off slope · |p_i − j|, and their LSE is right.
    """
    how, lowest = asked.how, 1 - asked.q.shape[2]
    if how.diagonal is None or how.below is not None or how.above != how.diagonal:
        return asked
    return asked._replace(how=how._replace(below=lowest))


CUDA = flash_attn_kernel(
    forward=_cuda_forward,
    backward=_cuda_backward,
    masks="slopes",
    windows="around",
    lengths=True,
    largest_head=256,
)
INTERPRETED = flash_attn_kernel(
    forward=_interpreted_forward,
    backward=_interpreted_backward,
    masks="slopes",
    lengths=True,
    largest_head=256,
    opaque="torch:flash-attn-2",
)


@cache
def _why_not_interpreted() -> str | None:
    """Why its Triton kernels cannot be interpreted here; the process that does it starts."""
    if find_spec("triton") is None:
        return "on a CPU it needs triton, whose interpreter runs its Triton kernels"
    try:
        _worker.start()
    except WorkerError as error:
        return f"its Triton kernels cannot be interpreted: {error}"
    return None


def _why_not_installed() -> list[str]:
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        return [f"{PACKAGE} is not installed"]
    return []


def _said(why: str | None) -> list[str]:
    return [] if why is None else [why]


class FlashAttn2:
    """flash-attn 2. Memory grows with Sq + Sk."""

    name = "torch:flash-attn-2"
    automatic = None
    largest = 2**20
    takes = TAKES | {"alibi_slopes", "q_lengths", "kv_lengths"}

    @property
    def deterministic(self) -> bool:
        # On a GPU the backward pass sums dq by atomic additions, in any order.
        return not torch.cuda.is_available()

    def reasons(self, problem: Problem) -> list[str]:
        if problem.platform == "gpu":
            reasons = cuda_limits(problem, ("float16", "bfloat16"), (8, 0))
            reasons += limits(CUDA, problem, self.takes)
            return reasons or _why_not_installed() or _said(why_not_imported("flash_attn"))
        reasons = limits(INTERPRETED, problem, self.takes)
        if problem.dtype == "float64":
            reasons.append("these kernels take float32, float16 and bfloat16, not float64")
        if problem.softcap is not None:
            reasons.append("its Triton kernels, which run on a CPU, ignore a softcap")
        if reasons or (missing := _why_not_installed()):
            return reasons or missing
        return [] if problem.platform == "meta" else _said(_why_not_interpreted())

    def kernel(self, problem: Problem) -> str:
        which = "CUDA kernels" if problem.platform == "gpu" else "Triton kernels, interpreted"
        return f"{PACKAGE} {version(PACKAGE)}, {which}"

    def run(self, problem: Problem, operands: Operands) -> tuple[Tensor, Tensor | None]:
        return attend(CUDA if problem.platform == "gpu" else INTERPRETED, problem, operands)


backend = FlashAttn2()
