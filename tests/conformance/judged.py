"""One tensor, judged by a standard of its own."""

from heedful_crosscheck.tolerance import Standard


def judge(tensor, got, *standard, **more):
    return Standard.of(tensor, *standard, **more).judge(got)
