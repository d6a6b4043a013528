"""What goes between a worker and the one who asks it, over a socket.

A request is pickled: the worker may trust who asks. An answer is not, since nobody trusts a worker: it
is words, as JSON, and arrays as their bytes, and sizes are checked before memory is taken.

    request   <Q length> pickle
    answer    "hdfl" <I length of words> <Q length of arrays> words arrays
"""

import json
import math
import pickle
import struct
from typing import Any

import numpy as np

from heedful_crosscheck.yardstick import Tensors

REQUEST = struct.Struct("<Q")
ANSWER = struct.Struct("<4sIQ")
MARK = b"hdfl"
MOST_WORDS = 2**22
DTYPES = ("float64", "float32", "float16", "bfloat16", "bool", "int64", "int32", "uint32", "int8")


class Garbled(Exception):
    """What came is no answer."""


def request(*asked: Any) -> bytes:
    """A request, as it is sent."""
    pickled = pickle.dumps(asked, pickle.HIGHEST_PROTOCOL)
    return REQUEST.pack(len(pickled)) + pickled


def answer(words: dict[str, Any], tensors: Tensors) -> bytes:
    """An answer, as it is sent."""
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    described = [[name, x.dtype.name, x.shape] for name, x in arrays.items()]
    said = json.dumps(words | {"tensors": described}).encode()
    parts = [x.tobytes() for x in arrays.values()]
    return b"".join([ANSWER.pack(MARK, len(said), sum(map(len, parts))), said, *parts])


def sizes(header: bytes, most: int) -> tuple[int, int]:
    """How long the words and the arrays of an answer are.

    Raises:
        Garbled: longer than they may be, or this begins no answer.
    """
    mark, words, arrays = ANSWER.unpack(header)
    if mark != MARK:
        raise Garbled(f"begins with {header[:8]!r}")
    if words > MOST_WORDS or arrays > most:
        raise Garbled(f"would be {words} and {arrays} bytes, of {MOST_WORDS} and {most} at most")
    return words, arrays


def read(words: bytes, arrays: bytes) -> tuple[dict[str, Any], Tensors]:
    """The words and the arrays of an answer.

    Raises:
        Garbled: they are none.
    """
    try:
        said = json.loads(words)
        found, start = {}, 0
        for name, dtype, shape in said.pop("tensors"):
            if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
                raise Garbled(f"has an array of {dtype!r}, {shape!r}")
            count = math.prod(shape)
            found[str(name)] = np.frombuffer(arrays, dtype, count, start).reshape(shape)
            start += found[str(name)].nbytes
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Garbled(f"cannot be read: {type(error).__name__}: {error}") from error
    if start != len(arrays):
        raise Garbled(f"has {len(arrays)} bytes of arrays and says {start}")
    return said, found
