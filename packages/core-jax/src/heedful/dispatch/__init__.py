"""From a problem to whoever computes it.

backend.py    what a backend, a bridge and a refusal are
registry.py   which of them there are
packages.py   what some of them need
ambient.py    which are asked for around a call
by_module.py  which are asked for by the names of a model's modules
choice.py     what each says, who is chosen, and the run
explain.py    the same in words
recording.py  who ran, call by call
"""

from heedful.dispatch.ambient import part, use_backend
from heedful.dispatch.backend import Backend, Bridge, Gradients, Refusal
from heedful.dispatch.choice import Verdict, choose, reasons, run, why_forward_only, would_choose
from heedful.dispatch.explain import Explanation, explain_choice
from heedful.dispatch.recording import recording
from heedful.dispatch.registry import backends, register, unregister

__all__ = [
    "Backend",
    "Bridge",
    "Explanation",
    "Gradients",
    "Refusal",
    "Verdict",
    "backends",
    "choose",
    "explain_choice",
    "part",
    "reasons",
    "recording",
    "register",
    "run",
    "unregister",
    "use_backend",
    "why_forward_only",
    "would_choose",
]
