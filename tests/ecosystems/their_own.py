"""Flax's and Keras's own tests of attention, with heedful's inside: a program that prints a table.

    python tests/ecosystems/their_own.py FLAX_SDIST

Nothing of the files is kept here: the nox session `ecosystems` fetches the sdist that constraints/ pin;
Keras's come with it. What must change is in `EDITS`; a test that ends in a refusal of heedful's is
counted as refused, with the reason, and any other that does not pass as failed.
"""

import os
import re
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import heedful

HEAD = """
import functools
import heedful.flax
linen_with_ours = lambda kind: functools.partial(kind, attention_fn=heedful.flax.linen_attention)
nnx_with_ours = lambda kind: functools.partial(kind, attention_fn=heedful.flax.nnx_attention)
"""
EDITS = {  # each must be found
    "tests/linen/linen_attention_test.py": {
        "nn.MultiHeadDotProductAttention(": "linen_with_ours(nn.MultiHeadDotProductAttention)(",
        "nn.MultiHeadAttention(": "linen_with_ours(nn.MultiHeadAttention)(",
    },
    "tests/nnx/nn/attention_test.py": {
        "nnx.MultiHeadAttention(": "nnx_with_ours(nnx.MultiHeadAttention)(",
        "nnx.dot_product_attention(": "heedful.flax.nnx_attention(",
    },
}
# How a refusal of heedful's begins, and why it is one.
REFUSALS = {
    "sow_weights=True asks": "weights, which are quadratic in memory, are not made",
    "broadcast_dropout must be False": "other weights are dropped in each row and head",
    "q, k and v must be one of": "complex numbers are no dtype of attention here",
}


class Counted:
    """A plugin of pytest's, and the counts of the table."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.record: list[Any] = []  # of the test that runs

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        said = "" if call.excinfo is None else str(call.excinfo.value)
        why = next((why for begins, why in REFUSALS.items() if begins in said), None)
        if report.failed and why:  # counted beneath by its reason, and shown as expected
            report.outcome, report.wasxfail = "skipped", why
            self.counts[f"refused: {why}"] += 1
        elif report.skipped or report.failed:
            self.counts["skips itself" if report.skipped else "failed"] += 1
        elif report.when == "call":
            by_ours = "passed, attention by heedful" if self.record else "passed, without attention"
            self.counts[by_ours] += 1
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        with heedful.recording() as self.record:
            return (yield)


def edited(sdist: str) -> Iterator[tuple[str, str]]:
    """Names and texts of Flax's files."""
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].split("/")[0]
        for member, edits in EDITS.items():
            text = archive.extractfile(f"{root}/{member}").read().decode()
            for old, new in edits.items():
                if old not in text:
                    sys.exit(f"{member} of {sdist} has no {old!r}: see what it has, and EDITS")
                text = re.sub(rf"(?<![\w.]){re.escape(old)}", new, text)
            yield f"{Path(member).parts[1]}_{Path(member).name}", HEAD + text


def run(*files: str) -> Counter[str]:
    counted = Counted()
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no"]
    pytest.main([*options, "-o", "python_files=*_test.py", *files], plugins=[counted])
    return counted.counts


def of_keras() -> Counter[str]:
    """Its layer's tests, where the function that the layers call is heedful's."""
    import keras.src.layers.attention.multi_head_attention_test as tests
    from keras.src import ops

    def attend(
        query: Any, key: Any, value: Any, bias: Any = None, mask: Any = None, scale: Any = None,
        is_causal: bool = False, flash_attention: Any = None, attn_logits_soft_cap: Any = None,
    ) -> Any:  # fmt: skip
        query, key, value = map(ops.convert_to_tensor, (query, key, value))
        return heedful.attention(
            query, key, value, bias=bias, mask=mask, scale=scale, softcap=attn_logits_soft_cap,
            causal="top_left" if is_causal else False, layout="bshd",
        )  # fmt: skip

    ops.dot_product_attention = attend
    return run(str(tests.__file__))


def main(sdist: str) -> int:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        for name, text in edited(sdist):
            Path(folder, name).write_text(text)
            tables[name] = run(str(Path(folder, name)))
    tables[f"Keras on {os.environ['KERAS_BACKEND']}"] = of_keras()
    for name, counts in tables.items():
        print(f"\n{name}", *(f"{n:6}  {what}" for what, n in counts.most_common()), sep="\n")
    by_ours = "passed, attention by heedful"
    return int(any(counts["failed"] or not counts[by_ours] for counts in tables.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
