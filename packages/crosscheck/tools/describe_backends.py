"""Makes `docs/backends.md`: what each backend of heedful's says it can do, on each platform.

    python packages/crosscheck/tools/describe_backends.py

Why a backend cannot run where this is made is left out, so that it is the same everywhere; but some
kernels' limits depend on the GPU that they see, so it is made where none is.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import jax

import heedful
from heedful_crosscheck.abilities import PLATFORMS, ROW, Abilities, abilities, about, platform_here
from heedful_crosscheck.ask import framework

DOCUMENT = Path(__file__).parents[3] / "docs" / "backends.md"

TEXT = """\
# Backends

What each backend says it can do, asked call by call. `heedful backends` prints the same for your
machine, with why the others cannot run there; `heedful backends --shape 2,16,4096,128 --dtype bfloat16
--causal` says who takes one call, and who is chosen. Made by
`packages/crosscheck/tools/describe_backends.py`.

Dtypes, head sizes and features are each asked about by themselves, in the easiest call; together a
backend may take less. "does not take" names options of `heedful.attention`: `segments` are both segment
ids, a `mask` is one over (B, Hq, Sq, Sk), `q_offset` an array. Memory is of a plain call, forward. LSE
is one that can be differentiated.
"""


def own() -> list[str]:
    """The backends of heedful's own packages."""
    ours = ("heedful.", "heedful_torch.")
    every = heedful.backends().items()
    return sorted(name for name, backend in every if type(backend).__module__.startswith(ours))


def document() -> str:
    """All of the page.

    Raises:
        RuntimeError: a GPU is seen.
    """
    for name in own():
        if platform_here(name) != "cpu":
            raise RuntimeError(
                "make this where no GPU is seen: CUDA_VISIBLE_DEVICES= JAX_PLATFORMS=cpu"
            )
    with jax.numpy_dtype_promotion("standard"):  # as users have it, whatever this process has
        asked = [abilities(name, p) for name in own() for p in PLATFORMS[framework(name)]]
    found = [it for it in asked if not it.misplaced]
    return "\n".join([TEXT, *table(found), "", *words(found)]).rstrip("\n") + "\n"


def table(found: list[Abilities]) -> Iterator[str]:
    heading = ("backend", "runs on", *ROW)
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    for (name, row), alike in groupby(found, key=lambda it: (it.backend, it.row)):
        platforms = ", ".join(it.platform for it in alike)
        yield f"| {' | '.join((f'`{name}`', platforms, *row))} |"


def words(found: list[Abilities]) -> Iterator[str]:
    """What each backend is, and what it says in its own words to what it does not take."""
    for name, on_platforms in groupby(found, key=lambda it: it.backend):
        yield f"## `{name}`\n"
        if of_it := about(name):
            yield f"{of_it}\n"
        said: dict[str, list[str]] = {}
        for it in on_platforms:
            for reason in own_words(it):
                said.setdefault(reason, []).append(it.platform)
        for reason, where in said.items():
            yield f"- {', '.join(where)}: {reason}"
        if said:
            yield ""


def own_words(it: Abilities) -> list[str]:
    """Without the dispatcher's "does not take", which the table says; of head sizes the largest."""
    sizes = [reasons for reasons in it.head_dims.values() if reasons][-1:]
    reasons = [x for said in (*it.dtypes.values(), *sizes, *it.features.values()) for x in said]
    own = [x for x in (*reasons, it.no_gradients) if x and not x.startswith("does not take ")]
    return list(dict.fromkeys(own))


if __name__ == "__main__":
    DOCUMENT.write_text(document())
