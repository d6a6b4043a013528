"""flash-attn's own test file, asked of `heedful_torch.flash_attn`: a program that prints a table.

    python tests/conformance/flash_attns_own.py FLASH_ATTN_SDIST [TIMES]

Nothing of the file is kept here: the nox session `conformance` fetches the sdist that constraints/ pin.
The file is for a GPU and has half a million cases, of which a sample is asked, or TIMES as many: of
each option all values alike, and sizes that a CPU has time for. What else must change is in `EDITS`,
`modules` and `REASONS`. The judge is the file's own: at most two or three times the error of plain
attention in the same dtype.
"""

import math
import random
import sys
import tarfile
import tempfile
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import heedful
import heedful_torch.flash_attn as flash_attn

MEMBER = "tests/test_flash_attn.py"
LARGEST = {"d": 64, "seqlen": 200, "seqlen_q,seqlen_k": 256, "paged_kv_block_size": 256}
# What JAX computes, packed sequences and some options, compiles for seconds in each case.
FEW = 2
ASKED = {
    "test_flash_attn_output": 4,
    "test_flash_attn_causal": 4,
    "test_flash_attn_splitkv": 4,
    "test_flash_attn_kvcache": 10,
    "test_flash_attn_bwd_overflow": 4,
    "test_flash_attn_bwd_transpose": 4,
    "test_flash_attn_bwd_varlen_overflow": 1,
    "test_flash_attn_deterministic": 4,
    "test_flash_attn_varlen_deterministic": 1,
}
ROTATED = "test_flash_attn_kvcache"
REPEATING = (
    "test_flash_attn_race_condition",
    "test_flash_attn_deterministic",
    "test_flash_attn_varlen_deterministic",
)
EDITS = {  # in this order; each must be found
    'torch.cuda.get_device_capability("cuda")': "(9, 0)",  # whose gradients it asks for everywhere
    '"cuda"': '"cpu"',
    "range(250)": "range(2)",
    "range(50)": "range(2)",
    "batch_size = 60": "batch_size = 4",
}
REASONS = """
every case   flash_attn is heedful_torch.flash_attn, "cuda" is "cpu", and a GPU of capability 9.0 is said
             to be there, of which the file asks all gradients
too large    not applicable: a length beyond 256 or a head size beyond 64 takes a CPU too long
adapted      S_dmask, which the drop-in returns as None, is made of heedful.dropout_mask, signs alone, so
             that what the file says of its magnitudes says nothing
adapted      what is repeated 50 or 250 times, there of 60 batch rows, to show a race, is twice, of 4
adapted      apply_rotary_emb, for which the package needs a GPU, is a few lines of torch
"""


# What the file imports


def modules():
    """By name, what stands in sys.modules for the package."""
    package = ModuleType("flash_attn")
    for name in flash_attn.__all__:
        setattr(package, name, getattr(flash_attn, name))
    for name in flash_attn.__all__:
        if name.startswith("flash_attn_varlen"):
            setattr(package, name, partial(varlen_with_signs, getattr(flash_attn, name)))
        elif name.endswith("func"):
            setattr(package, name, partial(with_signs, getattr(flash_attn, name)))
    interface, rotary = ModuleType("interface"), ModuleType("rotary")
    interface._get_block_size_n = None  # what asks for it is replaced
    rotary.apply_rotary_emb = rotated
    return {
        "flash_attn": package,
        "flash_attn.bert_padding": flash_attn.bert_padding,
        "flash_attn.flash_attn_interface": interface,
        "flash_attn.layers": ModuleType("layers"),
        "flash_attn.layers.rotary": rotary,
    }


def rotated(x, cos, sin, seqlen_offsets=0, interleaved=False):
    """Rotary embeddings of (B, S, H, D), row b from place seqlen_offsets[b] on."""
    places = seqlen_offsets[:, None] + torch.arange(x.shape[1])
    turn = torch.complex(*(table[places].float() for table in (cos, sin)))[:, :, None]
    size = 2 * cos.shape[1]
    pairs = x[..., :size].float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(real, imaginary) * turn
    turned = torch.stack([turned.real, turned.imag], -1 if interleaved else -2).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., size:]], -1)


def with_signs(function, *arrays, **options):
    """A function of dense sequences; S_dmask is −1 where a weight was dropped, and 1 elsewhere."""
    tensors, rate = split(arrays, options)
    shapes = [x.shape for x in tensors]
    rows, heads, queries = shapes[0][0], shapes[0][-2], shapes[0][1]
    state = torch.get_rng_state()
    found = function(*arrays, **options)
    if not rate:
        return found
    b, h, i, j = map(torch.arange, (rows, heads, queries, shapes[-1][1]))
    kept = kept_of(state, rate, b[:, None, None, None], h[:, None, None], i[:, None], j)
    return *found[:2], torch.where(kept, 1.0, -1.0)


def varlen_with_signs(function, *arrays, **options):
    """One of packed sequences; S_dmask is (sequences, H, longest, longest)."""
    tensors, rate = split(arrays, options)
    state = torch.get_rng_state()
    found = function(*arrays, **options)
    if not rate:
        return found
    q, *_, last = tensors
    of_q, of_k = next(x for x in tensors if x.dtype == torch.int32), last
    b, h = torch.zeros(1, dtype=torch.int32), torch.arange(q.shape[-2])
    i, j = (cu[:-1, None] + torch.arange(int(cu.diff().max())) for cu in (of_q, of_k))
    kept = kept_of(state, rate, b, h[:, None, None], i[:, None, :, None], j[:, None, None])
    return *found[:2], torch.where(kept, 1.0, -1.0)


def split(arrays, options):
    """The tensors, and dropout_p, which follows them and any lengths."""
    tensors = [x for x in arrays if isinstance(x, torch.Tensor)]
    rates = [x for x in arrays if isinstance(x, float)]
    return tensors, options.get("dropout_p", rates[0] if rates else 0.0)


def kept_of(state, rate, *places):
    """What a call in that state of torch's generator keeps."""
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        seed = int(torch.randint(2**31 - 1, ()))
    return heedful.dropout_mask(rate, seed, *places)


def probabilities(module):
    """In place of `normalize_flash_attn_S`: what its reference says, whatever S_dmask holds."""

    def of(_S, q, k, v, of_q=None, of_k=None, bias=None, _dropout=False, **options):
        return module.attention_ref(q, k, v, of_q, of_k, bias, **options)[1]

    return of


# Which cases are asked, and what they come to


class Adapted:
    """A plugin of pytest's, and the counts of the table."""

    def __init__(self, times):
        self.times = times
        self.counts = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        name, marks = metafunc.function.__name__, metafunc.definition.own_markers
        grids = [mark for mark in marks if mark.name == "parametrize"]
        names = [mark.args[0] for mark in grids]
        small = [[x for x in mark.args[1] if is_small(mark.args[0], x)] for mark in grids]
        counts = self.counts[name] = Counter()
        counts["file"] = math.prod(len(mark.args[1]) for mark in grids)
        counts["small"] = math.prod(map(len, small))
        cases = list(sample(small, self.times * ASKED.get(name, FEW), random.Random(name)))
        marks[:] = [mark for mark in marks if mark not in grids]
        flat = [sum((x if isinstance(x, tuple) else (x,) for x in case), ()) for case in cases]
        marks.append(pytest.mark.parametrize(",".join(names), flat).mark)

    def pytest_collection_modifyitems(self, items):
        for module in {item.module for item in items}:
            module.normalize_flash_attn_S = probabilities(module)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name, given = item.function.__name__, item.callspec.params
        counts = self.counts[name]
        if report.skipped:
            counts["skipped"] += 1
        elif report.failed:
            counts["failed"] += 1
        elif report.when == "call":
            rotates = name == ROTATED and given["rotary_fraction"] > 0
            adapted = given.get("dropout_p") or rotates or name in REPEATING
            counts["adapted" if adapted else "run"] += 1
        return report

    def table(self):
        titles = {
            "file": "in the file",
            "large": "too large",
            "left": "not sampled",
            "skipped": "skips itself",
            "run": "run",
            "adapted": "adapted",
            "failed": "failed",
        }
        rows = {}
        for name, counts in self.counts.items():
            asked = sum(counts[n] for n in ("skipped", "run", "adapted", "failed"))
            left = {"large": counts["file"] - counts["small"], "left": counts["small"] - asked}
            rows[name] = counts | Counter(left)
        rows["all"] = sum(rows.values(), Counter())
        yield f"{'':40}" + "".join(f"{title:>13}" for title in titles.values())
        for name, counts in rows.items():
            yield f"{name:40}" + "".join(f"{counts[n]:13,}" for n in titles)


def is_small(name, x):
    return x is None or name not in LARGEST or np.max(x) <= LARGEST[name]


def sample(grid, size, generator):
    """So many cases, each value of an option in as many of them as any other; the same one once."""
    if math.prod(map(len, grid)) <= size:
        return product(*grid)
    columns = []
    for values in grid:
        column = [values[n % len(values)] for n in range(size)]
        generator.shuffle(column)
        columns.append(column)
    return dict.fromkeys(zip(*columns, strict=True))


def main(sdist, times=1):
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].split("/")[0]
        text = archive.extractfile(f"{root}/{MEMBER}").read().decode()
    for old, new in EDITS.items():
        if old not in text:
            sys.exit(f"{MEMBER} of {sdist} has no {old!r}: see what it has instead, and EDITS")
        text = text.replace(old, new)
    sys.modules |= modules()
    adapted = Adapted(int(times))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "test_flash_attn.py")
        file.write_text(text)
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        # What it warns of, slices that are copied, is no part of the answer.
        options = [
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "--show-capture=no",
        ]
        code = pytest.main([*options, str(file)], plugins=[adapted])
    print(f"\n{MEMBER} of {Path(sdist).name}\n{REASONS}", *adapted.table(), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
