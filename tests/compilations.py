"""Counts what JAX traces and compiles, by the events that JAX itself records."""

from collections import Counter
from contextlib import contextmanager

import jax

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
}


@contextmanager
def counted():
    """A Counter of "traced" and "compiled", filled while the block runs."""
    counts, listening = Counter(), [True]

    def count(event, duration, **_):
        if listening and event in EVENTS:
            counts[EVENTS[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield counts
    finally:
        listening.clear()  # a listener cannot be taken back
