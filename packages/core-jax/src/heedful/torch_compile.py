"""What torch.compile sees of heedful: one operation, and nothing of its inside.

The registry, the metadata of packages and JAX are not for torch.compile to trace. It is told so as soon
as it is there, and not before: nothing here imports torch. A graph then holds the call as it is; what
traces further (AOTAutograd, inductor) runs it on tensors without data, and keeps the operations of the
backend that was chosen: torch's own, or one that stands for a program of JAX. A backend of NumPy makes
none and raises NotImplementedError there, on which torch.compile ends one graph and begins the next.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def is_there() -> bool:
    """Whether anything in this process may be compiled."""
    return "torch._dynamo" in sys.modules


def one_operation(function: Function) -> Function:
    """The function as one operation of a graph; the numbers among its arguments are constants there."""

    def on_numbers(*args: Any) -> Any:
        return function(*map(_number, args))

    compiler = sys.modules["torch"].compiler
    return compiler.allow_in_graph(compiler.disable(on_numbers))


def left_out(function: Function, why: str) -> Function:
    """The function, which runs between two graphs."""
    return sys.modules["torch"].compiler.disable(function, reason=why)


def run_while_tracing(function: Function) -> Function:
    """The function, which torch.compile calls while it traces, and of which it traces nothing."""
    # What torch.compiler.assume_constant_result does, without importing it.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a name for torch alone
    return function


def _number(x: Any) -> Any:
    """A symbol of torch.compile, which it makes of a number that it has seen change, as that number."""
    if isinstance(x, dict):
        return {name: _number(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(map(_number, x))
    kinds: dict[str, type] = {"SymInt": int, "SymFloat": float, "SymBool": bool}
    kind = kinds.get(type(x).__name__) if type(x).__module__ == "torch" else None
    return x if kind is None else kind(x)
