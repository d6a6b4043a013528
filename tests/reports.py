"""A report of everything that a report can hold, made by hand: nothing is computed.

Its names and messages are what a stranger would write who wants a page to run his script.
"""

from dataclasses import replace

from heedful_crosscheck import Report
from heedful_crosscheck.location import HeatMap
from heedful_crosscheck.run import Failure, Outcome
from heedful_crosscheck.tolerance import Errors, Judgement

SCRIPT = "<script>document.title='owned'</script>"
IMAGE = "<img src=https://example.invalid/x.png onerror=\"document.title='owned'\">"
STRANGE = f"torch:{SCRIPT}'\"&|`@everyone`\x1b[31m]]>"
HEAT = HeatMap("heads", (0, 1, 2), "rows", (0, 2, 4, 5), 2, ((0.0, 1e-5, 1e-3), (None, 0.2, 1e-2)))

AGREES = Judgement(Errors(1e-7, 2e-7, 1e-9), Errors(1e-7, 2e-7, 1e-9), Errors(2e-6, 8e-6, 2e-6))
LOSSY = Judgement(
    Errors(3e-2, 3e-2, 1e-9),
    Errors(1e-3, 2e-3, 1e-9),
    Errors(1e-2, 4e-2, 2e-4),
    losses=("dq is lossy, 3 times its limit",),
)
WRONG = Judgement(
    Errors(0.5, 0.7, 0.1),
    Errors(1e-3, 2e-3, 1e-9),
    Errors(1e-2, 4e-2, 2e-4),
    faults=(f"out is wrong {IMAGE}",),
    ceiling=True,
    heat=HEAT,
)
UNMEASURED = Judgement(
    Errors(*(float("inf"),) * 3), Errors(0, 0, 0), Errors(0, 0, 0), ("dv has NaN",), heat=HEAT
)


CAUSES = (f"once {SCRIPT} is read", "with the mask inverted")


def ran(backend, case, dtype="float32", group="masks", **judgements):
    """An outcome with these judgements, and what follows from them."""
    said = {
        what: tuple(
            Failure(backend, case, dtype, tensor, message, "seed 3", judgement.heat, CAUSES)
            for tensor, judgement in judgements.items()
            for message in getattr(judgement, found)
        )
        for what, found in (("failures", "faults"), ("losses", "losses"))
    }
    facts = {"seconds": 0.25, "lengths": (70, 133), "inputs": "ab12", "judgements": judgements}
    return Outcome(backend, case, group, dtype, seed=3, **facts, **said)


def refused(backend, case, *reasons, dtype="float32", group="masks"):
    return Outcome(backend, case, group, dtype, reasons, seed=3)


def everything():
    """A report with each verdict, each part that may be lacking, and strange names."""
    lacks = {"LSE": ("returns none",), "second derivatives": (f"cannot {SCRIPT}",)}
    failed = ("jax:dies", "full", "float32", None, "crashed with signal 11")
    outcomes = (
        ran("jax:good", "full", out=AGREES, lse=AGREES, dq=AGREES),
        ran("jax:good", "causal", "bfloat16", "positions", out=AGREES, dq=AGREES),
        refused("jax:good", "window", "takes no window of 9", "nor of 7"),
        ran("torch:lossy", "full", "bfloat16", out=AGREES, dq=LOSSY),
        ran(STRANGE, f"case {IMAGE}", group=f"group {SCRIPT}", out=WRONG, dv=UNMEASURED),
        replace(ran(STRANGE, "lacks", out=AGREES), lacking=lacks, kernel=f"kernel {SCRIPT}"),
        replace(
            ran("jax:dies", "full"),
            failures=(Failure(*failed),),
            crashed=True,
            output=f"last words {SCRIPT}",
        ),
        refused("jax:absent", "full", f"not installed {IMAGE}"),
    )
    environment = {
        "date": "2026-01-01",
        "heedful": "0.1.0",
        "jax": "0.10.2",
        "torch": None,
        "numpy": "2.4.0",
        "jax_devices": [f"cpu {SCRIPT}"],
        "torch_cuda_device": None,
        "XLA_FLAGS": SCRIPT,
    }
    return Report(
        outcomes,
        seed=3,
        seconds=12.5,
        declined={STRANGE: ("hidden_nan",)},
        environment=environment,
        command=f"heedful crosscheck {IMAGE}",
    )
