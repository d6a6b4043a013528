"""What torch.utils.checkpoint has to recompute, for `use_backend` to go along.

A function is recomputed in the backward pass, when the block around its first pass may be closed, and
on a thread of autograd's, where none was opened. torch keeps random numbers and autocast for it, and has
no place for anybody else's state: `context_fn` is the caller's to give, and with use_reentrant=False
alone. So a checkpoint is looked for on the stack of its first pass, and what it has noted to call again
is wrapped there: nothing of torch's modules is replaced, and what is kept is freed with the checkpoint.
The names on its stack are those of torch 2.13; what is not found there is not wrapped.

Nothing here imports torch.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

Context = Callable[[], AbstractContextManager[None]]


@dataclass
class _Within:
    """What a checkpoint recomputes, in a context of ours."""

    function: Callable[..., Any]
    context: Context

    def __call__(self, *args: Any) -> Any:
        with self.context():
            return self.function(*args)


def recompute_within(context: Context) -> None:
    """Lets the checkpoints whose first pass is running here recompute in the first context given."""
    for frame in _frames_of_checkpoints():
        match frame.f_code.co_qualname:
            case "CheckpointFunction.forward":
                noted, name = frame.f_locals["ctx"], "run_function"
            case "checkpoint" if "gen" in frame.f_locals:  # use_reentrant=False
                # none yet where it asks for the contexts of context_fn
                noted = frame.f_locals["gen"].gi_frame.f_locals.get("new_frame")
                name = "recompute_fn"
            case _:
                continue
        function = getattr(noted, name, None)
        if function is not None and not isinstance(function, _Within):
            setattr(noted, name, _Within(function, context))


def recomputes_what_was_not_seen() -> bool:
    """Whether this is a recomputation of which no first pass had come to `recompute_within`."""
    backward = (
        "CheckpointFunction.backward",
        "_checkpoint_hook.__init__.<locals>.unpack_hook",  # use_reentrant=False
    )
    return any(frame.f_code.co_qualname in backward for frame in _frames_of_checkpoints())


def _frames_of_checkpoints() -> Iterator[FrameType]:
    """torch.utils.checkpoint's frames on the stack, innermost first, up to a recomputation of ours."""
    if (checkpoints := sys.modules.get("torch.utils.checkpoint")) is None:
        return
    theirs, ours = vars(checkpoints), _Within.__call__.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not ours:
        if frame.f_globals is theirs:
            yield frame
        frame = frame.f_back
