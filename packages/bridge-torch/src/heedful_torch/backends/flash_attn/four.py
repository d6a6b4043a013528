"""`torch:flash-attn-4`: flash-attn 4, for Hopper and Blackwell, by its public `flash_attn_func`.

Its LSE is differentiable where it is asked for. Written against 4.0.0b36, whose kernels the nox session
compile-flash-attn-4 compiles for every kind of call that is made here; they have not been run here yet.
"""

from importlib.metadata import version

from heedful.call.problem import Problem
from heedful_torch.backends.flash_attn import flash_attn_kernel, window
from heedful_torch.backends.flash_attn.on_cuda import FlashAttnOnCuda
from heedful_torch.backends.kernel import Arguments, Results


def _forward(asked: Arguments) -> Results:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]  # for GPUs

    q, k, v = (x.transpose(1, 2) for x in asked[:3])
    causal, left, right = window(asked.how, q, k)
    out, lse = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=asked.how.scale,
        causal=causal,
        window_size=(left, right),
        softcap=asked.how.softcap or 0.0,
        return_lse=True,
    )
    return Results(out.transpose(1, 2), lse)


def _by_capability(problem: Problem, capability: tuple[int, int]) -> list[str]:
    size = max(problem.head_dim, problem.value_dim)
    if capability < (10, 0) or size <= 128:
        return []
    # Blackwell has another kernel for 256, which has no gradients of the LSE or with a softcap.
    here = ".".join(map(str, capability))
    return [
        f"this kernel takes head sizes up to 128 on a GPU of compute capability {here}, not {size}"
    ]


backend = FlashAttnOnCuda(
    name="torch:flash-attn-4",
    module="flash_attn.cute",
    version=lambda: f"flash-attn-4 {version('flash-attn-4')}",
    cuda=flash_attn_kernel(
        forward=_forward,
        backward=None,
        once=True,
        windows="around",
        # Hopper's backward pass sums dq, and dk and dv of grouped heads, in rows of a multiple of 16,
        # which are read as rows of a multiple of 32: wrong where these differ (flash-attention#2896),
        # and 104 and 112 do not compile.
        alignment=32,
        largest_head=256,
    ),
    capability=(9, 0),
    by_capability=_by_capability,
)
