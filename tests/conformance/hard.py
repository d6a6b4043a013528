"""Hard cases by name, and one that is hard for the judge alone."""

from heedful_crosscheck import Case, cases
from heedful_crosscheck.hard import SMALL
from heedful_crosscheck.recipes import Normal, Sizes

normal = Normal(SMALL)


def hard(name, make, **options):
    return Case(name=name, group="hard", make=make, options=options)


def one_far_query(random):
    """Four numbers of LSE, all near 100: a yardstick is a sample of four, and may be lucky."""
    made = Normal(Sizes(1, 4, 4, 1, SMALL.kv_length, 256, 256))(random)
    for n in "qk":
        made[n][..., 0] = 40 * (1 + 0.01 * random.standard_normal(made[n].shape[:-1]))
    return made


_named = {case.name: case for case in cases.hard()}
PADDED, PADDED_TO_THE_END = _named["padded"], _named["padded-to-the-end"]
PEAKED, FAR_APART = _named["peaked"], _named["two-keys-far-apart"]
FAR_AND_PADDED = _named["far-and-padded"]
MINUS_INFINITE = _named["minus-infinite-bias"]

# Those of which a backend compiles few programs.
OF_NUMBERS = (
    *(case for case in _named.values() if case.group == "hard numbers"),
    *(case for case in _named.values() if case.group == "hard masks" and case.dtype is None),
    hard("one-far-query", one_far_query),
)
