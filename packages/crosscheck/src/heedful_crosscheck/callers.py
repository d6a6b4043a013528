"""Whose arrays call: the frameworks, and how each differentiates what users get.

What is judged is `heedful.attention` on arrays of the framework, and how that itself differentiates.
Arrays get there and back through NumPy, not over the bridges, so that a fault of a bridge cannot hide
one of a backend. NumPy and JAX are here; torch is in `torch_caller`, which alone imports it.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import heedful
from heedful.call.arrays import framework_of
from heedful.dispatch.registry import backend_named, in_a_line
from heedful_crosscheck.layouts import Layout

Named = dict[str, Any]  # arrays of one framework
Results = tuple[Any, ...]
Attending = Callable[[Named, Named], Results]  # of primals and constants; hashable


class Identity:
    """A backend as part of a key: another one registered under the same name is another one."""

    def __init__(self, backend: Any):
        self.backend = backend

    def __hash__(self) -> int:
        return id(self.backend)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.backend is other.backend


@dataclass(frozen=True)
class Attend:
    """`heedful.attention` by one backend with some options, as a function of arrays.

    Attributes:
        backend: its name.
        instance: the backend itself.
        options: those that are no arrays.
    """

    backend: str
    instance: Identity
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def by(cls, backend: str, options: Mapping[str, Any]) -> "Attend":
        """The function of a backend's name."""
        return cls(backend, Identity(backend_named(backend)), tuple(options.items()))

    def __call__(self, primals: Named, constants: Named) -> Results:
        options = dict(self.options)
        result = heedful.attention(**primals, **constants, **options, backend=self.backend)
        return result if isinstance(result, tuple) else (result,)


class Caller(Protocol):
    """A framework from which heedful is called; equal ones call alike.

    Attributes:
        framework: its name.
    """

    framework: str

    def __hash__(self) -> int: ...

    def array(self, x: np.ndarray, layout: Layout) -> Any:
        """A copy of its own, laid out so where the framework knows strides."""
        ...

    def to_numpy(self, x: Any) -> np.ndarray:
        """Its numbers.

        Raises:
            TypeError: it is no array of this framework.
        """
        ...

    def pull_back(
        self, attend: Attending, primals: Named, constants: Named, cotangents: Sequence[Any]
    ) -> tuple[Results, Named | None]:
        """The results, and the gradients of the primals; None where nothing differentiates."""
        ...

    def pull_back_twice(
        self,
        attend: Attending,
        primals: Named,
        constants: Named,
        cotangents: Sequence[Any],
        along: Named,
    ) -> Named | None:
        """The gradients of Σ gradients · along; None where nothing differentiates."""
        ...


Kind = TypeVar("Kind")


def of_kind(kind: type[Kind], x: Any) -> Kind:
    """x, where it is of the kind that called."""
    if not isinstance(x, kind):
        raise TypeError(f"the call was made with {kind.__name__}, and answered with {type(x)}")
    return x


def caller_of(framework: str, on_gpu: bool = True) -> Caller:
    """The caller of a framework's name; torch's imports torch, and is on the GPU where there is one.

    Raises:
        LookupError: torch is not installed.
    """
    match framework:
        case "numpy":
            return NumpyCaller()
        case "jax":
            return JaxCaller()
    if find_spec("torch") is None:
        raise LookupError("the case calls from torch, which is not installed here")
    from heedful_crosscheck.torch_caller import TorchCaller

    return TorchCaller(on_gpu)


def as_numpy(x: Any) -> np.ndarray:
    """The numbers of an array of any framework, wherever it lies.

    Raises:
        TypeError: it is no array.
    """
    match framework_of(x):
        case "torch":
            from heedful_crosscheck.torch_caller import numbers_of

            return numbers_of(x)
        case "jax" | "numpy":
            return np.asarray(x)
    raise TypeError(f"an array of JAX, NumPy or torch is due. Got {type(x).__name__}.")


@dataclass(frozen=True)
class NumpyCaller:
    """NumPy, which differentiates nothing."""

    framework = "numpy"

    def array(self, x: np.ndarray, layout: Layout) -> np.ndarray:
        return layout.of(x, np.copy)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return of_kind(np.ndarray, x)

    def pull_back(
        self, attend: Attending, primals: Named, constants: Named, cotangents: Sequence[Any]
    ) -> tuple[Results, None]:
        return attend(primals, constants), None

    def pull_back_twice(self, *_: Any) -> None:
        return None


# A test compiles a program to run it once: what XLA and LLVM spend on making it fast never comes back.
QUICKLY: tuple[tuple[str, Any], ...] = (
    ("xla_backend_optimization_level", 0),
    ("xla_llvm_disable_expensive_passes", True),
)
if jax.__version_info__ < (0, 11):  # later ones have no such option
    QUICKLY = (*QUICKLY, ("xla_cpu_use_fusion_emitters", False))


@dataclass(frozen=True)
class JaxCaller:
    """JAX, under `jit`.

    Attributes:
        compiler_options: of XLA; by default none, as users have it.
    """

    compiler_options: tuple[tuple[str, Any], ...] = ()

    framework = "jax"

    def array(self, x: np.ndarray, layout: Layout) -> jax.Array:
        return jnp.asarray(x)  # without strides

    def to_numpy(self, x: jax.Array) -> np.ndarray:
        return np.asarray(of_kind(jax.Array, x))

    def pull_back(
        self, attend: Attending, primals: Named, constants: Named, cotangents: Sequence[Any]
    ) -> tuple[Results, Named]:
        return _pull_back(attend, self.compiler_options)(primals, constants, list(cotangents))

    def pull_back_twice(
        self,
        attend: Attending,
        primals: Named,
        constants: Named,
        cotangents: Sequence[Any],
        along: Named,
    ) -> Named:
        def projected(primals: Named, constants: Named, cotangents: list[Any]) -> jax.Array:
            _, gradients = _pulled_back(attend, primals, constants, cotangents)
            wide = jnp.float64 if primals["q"].dtype == jnp.float64 else jnp.float32
            return sum((gradients[n].astype(wide) * along[n].astype(wide)).sum() for n in along)

        options = dict(self.compiler_options) or None
        run = jax.jit(jax.grad(projected), compiler_options=options)
        return run(primals, constants, list(cotangents))


@lru_cache(maxsize=24)  # for cases that share a shape, and other seeds; each holds megabytes
def _pull_back(
    attend: Attending, options: tuple[tuple[str, Any], ...]
) -> Callable[..., tuple[Results, Named]]:
    """Results and gradients in one: compiled together they take half as long as apart."""

    def run(primals: Named, constants: Named, cotangents: list[Any]) -> tuple[Results, Named]:
        return _pulled_back(attend, primals, constants, cotangents)

    return jax.jit(run, compiler_options=dict(options) or None)


def _pulled_back(
    attend: Attending, primals: Named, constants: Named, cotangents: list[Any]
) -> tuple[Results, Named]:
    results, pull = jax.vjp(lambda primals: attend(primals, constants), primals)
    pairs = zip(cotangents, results, strict=True)
    (gradients,) = pull(tuple(c.astype(x.dtype) for c, x in pairs))
    return results, gradients


def found_framework(
    title: str,
    asked: Callable[[Caller], tuple[Callable[..., Any], Sequence[Any]]],
    on_gpu: bool = True,
) -> str:
    """Which framework's arrays a function answers with its own kind; torch's where it is imported.

    Args:
        title: of the function, for the error.
        asked: of a caller, a function of some arrays, which returns one, and these arrays.
        on_gpu: whether torch's caller is, where there is one.

    Raises:
        TypeError: those of none, or of several.
    """
    said = {}
    for framework in ("jax", "numpy", *(["torch"] if "torch" in sys.modules else [])):
        try:
            function, arrays = asked(caller_of(framework, on_gpu))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = _tried(framework, function, arrays)
        except Exception as error:  # whatever a function does with what is not for it
            said[framework] = in_a_line(error)
        else:
            kind = framework_of(found)
            said[framework] = "" if kind == framework else f"answered with {type(found).__name__}"
    answered = [framework for framework, why in said.items() if not why]
    if len(answered) == 1:
        return answered[0]
    if answered:
        raise TypeError(
            f"{title} answers arrays of {' and '.join(answered)} alike. Pass framework= to say whose "
            "it is."
        )
    reasons = "; ".join(f"{framework}: {why}" for framework, why in said.items())
    missing = "" if "torch" in said else "; torch is not imported"
    raise TypeError(
        f"whose arrays {title} takes cannot be found out: {reasons}{missing}. Pass framework= to say it."
    )


def _tried(framework: str, function: Callable[..., Any], arrays: Sequence[Any]) -> Any:
    """What it answers, or would: JAX computes nothing for that."""
    match framework:
        case "jax":
            return jax.eval_shape(function, *arrays)
        case "torch":  # to a NumPy function a tensor that is differentiated is no array
            arrays = [x.requires_grad_() if x.is_floating_point() else x for x in arrays]
    return function(*arrays)
