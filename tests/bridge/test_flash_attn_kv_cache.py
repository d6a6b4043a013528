"""flash_attn_with_kvcache against the reference, asked for each row by itself with all its tokens."""

import numpy as np
import pytest
import torch

import heedful
import reference
from heedful_torch.flash_attn import flash_attn_with_kvcache

B, ROOM, PAGE, BLOCKS = 3, 24, 4, 6
LENGTHS = [0, 3, 17]
ANGLES = np.random.default_rng(1).uniform(0, 6, (ROOM, 3))
SLOPES = torch.tensor([0.5, -0.1, 0.03, 0.0])
ROTARY = {"rotary_cos": np.cos(ANGLES), "rotary_sin": np.sin(ANGLES)}


def rotated(x, places, interleaved):
    """Tokens (S, H, D) rotated in complex numbers."""
    turn = np.exp(1j * ANGLES[places])[:, None]
    x = x.copy()
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    turned = (x[..., first] + 1j * x[..., second]) * turn
    x[..., first], x[..., second] = turned.real, turned.imag
    return x


def rows_of(cache, table, batch_idx):
    """(B, room, H, D) in float64, out of a cache of any kind."""
    numbers = cache.double().numpy()
    if table is not None:
        return np.stack([np.concatenate(numbers[row]) for row in table])
    return numbers if batch_idx is None else numbers[batch_idx]


def ask(queries, new, dtype=torch.float32, table=None, batch_idx=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    shape = (B * BLOCKS, PAGE) if table is not None else (B if batch_idx is None else 5, ROOM)
    return (
        normal(B, queries, 4, 8),
        *(normal(*shape, 2, 8) for _ in range(2)),
        *(normal(B, new, 2, 8) for _ in range(2 if new else 0)),
    )


def check(arrays, meant, tolerance, rotary=None, table=None, batch_idx=None, leftpad=None, **told):
    """The answer, and what the caches hold afterwards."""
    q, k_cache, v_cache, *fresh = arrays
    before = [rows_of(x, table, batch_idx) for x in (k_cache, v_cache)]
    if rotary is not None:
        told |= {name: torch.tensor(x, dtype=q.dtype) for name, x in ROTARY.items()}
        told["rotary_interleaved"] = rotary
    if table is not None:
        told["block_table"] = torch.tensor(table, dtype=torch.int32)
    if batch_idx is not None:
        told["cache_batch_idx"] = torch.tensor(batch_idx, dtype=torch.int32)
    if leftpad is not None:
        told["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        *fresh,
        cache_seqlens=torch.tensor(LENGTHS, dtype=torch.int32),
        return_softmax_lse=True,
        **told,
    )
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    after = [rows_of(x, table, batch_idx) for x in (k_cache, v_cache)]
    k, v = (x.double().numpy() for x in fresh) if fresh else np.zeros((2, B, 0, 2, 8))
    new, queries = k.shape[1], q.double().numpy()
    moving = bool({"causal", "window"} & set(meant))
    for b, length in enumerate(LENGTHS):
        of_row, of_k = queries[b], k[b]
        if rotary is not None:
            of_row = rotated(of_row, length + np.arange(len(of_row)) * moving, rotary)
            of_k = rotated(of_k, length + np.arange(new), rotary)
        for kind, fresh_tokens in enumerate((of_k, v[b])):
            wanted = before[kind][b].copy()
            wanted[length : length + new] = fresh_tokens
            np.testing.assert_allclose(after[kind][b], wanted, rtol=0, atol=tolerance)
            before[kind][b] = wanted
        padding = leftpad[b] if leftpad is not None else 0
        keys, values = (x[b, padding : length + new][None] for x in before)
        right, right_lse, *_ = reference.attention(
            of_row[None],
            keys,
            values,
            layout="bshd",
            **{n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in meant.items()},
        )
        np.testing.assert_allclose(out[b].double(), right[0], rtol=0, atol=tolerance)
        np.testing.assert_allclose(lse[b], right_lse[0], rtol=0, atol=tolerance)


TABLE = np.random.default_rng(5).permutation(B * BLOCKS).reshape(B, BLOCKS)
OPTIONS = [
    ({}, {}, {}),
    ({"rotary": True}, {"causal": True}, {"causal": True}),
    ({"rotary": False}, {}, {}),
    ({"rotary": True, "table": TABLE}, {"window_size": (4, 0)}, {"window": (4, 0)}),
    ({"table": TABLE}, {"softcap": 1.5, "softmax_scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
    ({"batch_idx": [4, 0, 2]}, {"alibi_slopes": SLOPES, "num_splits": 3}, {"alibi_slopes": SLOPES}),
    ({"leftpad": [0, 2, 11], "rotary": True}, {"causal": True}, {"causal": True}),
    (
        {"leftpad": [0, 1, 5], "table": TABLE},
        {"window_size": (4, 1), "alibi_slopes": SLOPES},
        {"window": (4, 1), "alibi_slopes": SLOPES},
    ),
]


@pytest.mark.parametrize(("kind", "told", "meant"), OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 4)], ids=str)
def test_values_are_those_of_the_reference_and_caches_are_written_to(kind, told, meant, sizes):
    places = {name: x for name, x in kind.items() if name in ("table", "batch_idx")}
    check(ask(*sizes, **places), meant, 1e-5, **kind, **told)


def test_queries_are_rotated_from_the_first_new_place_on_however_many_are_new():
    check(ask(4, 2), {"causal": True}, 1e-5, rotary=True, causal=True)
    q, *arrays = ask(4, 2)
    tables = {name: torch.tensor(x, dtype=q.dtype) for name, x in ROTARY.items()}
    with pytest.raises(ValueError, match=r"a position for each query, .*: 25\. Got 24"):
        flash_attn_with_kvcache(q, *arrays, cache_seqlens=21, **tables, causal=True)


def test_half_precision():
    check(ask(2, 2, dtype=torch.bfloat16), {"causal": True}, 0.03, rotary=True, causal=True)


def test_a_row_that_is_all_padding_holds_nothing():
    q, k_cache, v_cache = ask(2, 0)
    padding = torch.tensor([5, 0, 1])
    told = {"cache_seqlens": 5, "return_softmax_lse": True, "causal": True}
    k_cache[0, :5] = v_cache[2, 0] = torch.nan
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, cache_leftpad=padding, **told)
    assert not out[0].any() and (lse[0] == -torch.inf).all()
    assert out.isfinite().all() and lse[1:].isfinite().all()


def test_nothing_new():
    check(ask(2, 0), {"causal": True}, 1e-5, causal=True)
    q, k_cache, v_cache = ask(1, 0)
    full = flash_attn_with_kvcache(q, k_cache, v_cache)
    torch.testing.assert_close(full, heedful.attention(q, k_cache, v_cache, layout="bshd"))
    short = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5)
    of_five = heedful.attention(q, k_cache[:, :5], v_cache[:, :5], layout="bshd")
    torch.testing.assert_close(short, of_five)


@pytest.mark.parametrize(
    ("told", "kind", "said"),
    [
        ({"cache_seqlens": None}, ValueError, "takes cache_seqlens.*Got None"),
        (
            {"cache_seqlens": 24},
            ValueError,
            "between 0 and 23: there is room for 24 tokens, and 1 are",
        ),
        (
            {"cache_seqlens": torch.tensor([1, 2])},
            ValueError,
            r"shape \(B,\) = \(3,\)\. Got torch.int64",
        ),
        ({"v": None}, ValueError, "k and v are appended together"),
        ({"k": torch.zeros(3, 1, 2, 4)}, ValueError, r"k must fit its cache, \(3, 1, 2, 8\)"),
        ({"q": torch.zeros(4, 8)}, ValueError, r"q must be \(B, S, H, D\)"),
        ({"cache_leftpad": torch.zeros(3)}, ValueError, "must be int32 .*Got torch.float32"),
        (
            {"cache_leftpad": torch.tensor([0, 4, 1])},
            ValueError,
            "Got 4 for row 1, which holds 3",
        ),
        ({"num_splits": -1}, ValueError, "num_splits must be .* at least 0. Got -1"),
        (
            {"k": torch.zeros(3, 1, 2, 8, requires_grad=True)},
            NotImplementedError,
            "no gradients. Got k",
        ),
        ({"rotary_cos": torch.zeros(24, 3)}, ValueError, "rotary_cos and rotary_sin go together"),
        (
            dict.fromkeys(ROTARY, torch.zeros(20, 3)),
            ValueError,
            r"there is room, 24.*Got \(20, 3\)",
        ),
        (dict.fromkeys(ROTARY, torch.zeros(24, 3).half()), TypeError, "must have q's dtype"),
        (
            {**dict.fromkeys(ROTARY, torch.zeros(24, 3)), "k": None, "v": None},
            ValueError,
            "rotate what is appended.* Got no k and v",
        ),
        (
            {"block_table": torch.zeros(3, 2), "cache_batch_idx": torch.zeros(3)},
            ValueError,
            "Got both",
        ),
        ({"v": torch.zeros(3, 1, 2, 4)}, ValueError, r"v must fit its cache, \(3, 1, 2, 8\)"),
        ({"window_size": (-3, 0)}, ValueError, "integers of at least -1"),
        ({"softcap": 1e39}, ValueError, "softcap must"),
        (
            {"cache_batch_idx": torch.tensor([0, -1, 2])},
            ValueError,
            "cache_batch_idx must hold numbers from 0 to . for what is attended to. Got -1",
        ),
        (
            {"block_table": torch.tensor([[0, 9], [1, 9], [-1, 9]])},
            ValueError,
            "block_table must hold numbers from 0 to . for what is attended to. Got -1",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_honour_is_one_error(told, kind, said):
    q, k_cache, v_cache, k, v = ask(1, 1)
    arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(kind, match=said):
        flash_attn_with_kvcache(**{**arguments, "cache_seqlens": 2, **told})
    torch.testing.assert_close((k_cache, v_cache), before, rtol=0, atol=0)  # nothing is half-done


def test_a_backend_that_refuses_leaves_the_caches_alone():
    q, k_cache, v_cache, k, v = ask(1, 1)
    before = k_cache.clone()
    with heedful.use_backend("torch:sdpa-flash"), pytest.raises(heedful.Refusal, match="softcap"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=2, softcap=1.0)
    torch.testing.assert_close(k_cache, before, rtol=0, atol=0)
