"""`torch:flash-attn-3`: flash-attn 3, for Hopper, by its public `flash_attn_interface.flash_attn_func`.

That function's derivative drops the cotangent of the LSE, so that no LSE is taken of it. Written against
its signature; it has not been run here yet.
"""

from typing import Any

from heedful_torch.backends.flash_attn import TAKES, flash_attn_kernel, window
from heedful_torch.backends.flash_attn.on_cuda import FlashAttnOnCuda
from heedful_torch.backends.kernel import Arguments, Results


def _forward(asked: Arguments) -> Results:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]  # none that is published

    q, k, v = (x.transpose(1, 2) for x in asked[:3])
    causal, left, right = window(asked.how, q, k)
    found: Any = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=asked.how.scale,
        causal=causal,
        window_size=(-1 if left is None else left, -1 if right is None else right),
        softcap=asked.how.softcap or 0.0,
    )
    out = found[0] if isinstance(found, tuple) else found  # (out, lse) in the first of them
    return Results(out.transpose(1, 2), None)


def _version() -> str:
    import flash_attn_interface

    return f"flash-attn 3 {getattr(flash_attn_interface, '__version__', '')}".strip()


backend = FlashAttnOnCuda(
    name="torch:flash-attn-3",
    module="flash_attn_interface",
    version=_version,
    cuda=flash_attn_kernel(
        forward=_forward,
        backward=None,
        once=True,
        windows="around",
        largest_head=256,
    ),
    capability=(9, 0),
    takes=TAKES - {"return_lse"},
    lacks={"return_lse": "flash-attn 3 drops the gradient of its LSE"},
)
