"""`torch:flash-attn-4`: flash-attn 4, for Hopper and Blackwell, by its public `flash_attn_func`.

Its LSE is differentiable where it is asked for. Written against 4.0.0b36; it has not been run here yet.
"""

from importlib.metadata import version

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


backend = FlashAttnOnCuda(
    name="torch:flash-attn-4",
    module="flash_attn.cute",
    version=lambda: f"flash-attn-4 {version('flash-attn-4')}",
    cuda=flash_attn_kernel(
        forward=_forward,
        backward=None,
        windows="around",
        largest_head=128,  # of Blackwell, where 256 has a kernel of its own
    ),
    capability=(9, 0),
)
