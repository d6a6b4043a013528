"""Packages that a backend needs and that may be absent, or broken: a reason, nothing more."""

import warnings
from functools import cache
from importlib import import_module

from heedful.dispatch.registry import in_a_line


@cache
def why_not_imported(*modules: str) -> str | None:
    """Why modules cannot be imported; None where they are, by now. Asked once in a process."""
    for module in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of what they use, not of ours
                import_module(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a package may even exit when it is imported
            return f"{module} cannot be imported: {in_a_line(error)}"
    return None
