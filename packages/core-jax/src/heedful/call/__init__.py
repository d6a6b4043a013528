"""From what a caller passes to what a backend sees, checked once.

    arrays + options ──► Form       the caller's rank, layout and leading axes (form.py)
                         Problem    what is asked, no array data; the contract (problem.py)
                         Operands   the arrays, (B, H, S, D) (operands.py)

`checks.py` checks q, k and v, `options.py` all else, an entry for each option; `functions.py` makes
programs of those that are functions. Nothing behind this folder looks at what the caller passed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax

from heedful.call import checks, options
from heedful.call.arrays import Array, platform_of
from heedful.call.form import Form
from heedful.call.operands import Operands
from heedful.call.problem import Problem


class Call(NamedTuple):
    """One call, read.

    Attributes:
        form: of the caller's arrays.
        problem: what is asked.
        arrays: q, k, v and the options that are arrays, by name, as they came; of options that are
            functions a tuple of what they close over.
    """

    form: Form
    problem: Problem
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, **given: Any) -> Self:
        """Checks a call and says what it asks for. Reads shapes and dtypes, never values.

        Args:
            q, k, v: as for `heedful.attention`, or `jax.ShapeDtypeStruct` in their place.
            given: its options.

        Raises:
            TypeError: a wrong kind of thing: no array, mixed frameworks, a dtype, an unknown option.
            ValueError: a wrong size or value.
        """
        options.check_names(given)
        arrays = {"q": q, "k": k, "v": v, **options.arrays_among(given)}
        framework = checks.framework_of_all(arrays)
        dtype = checks.dtype_of_all(q, k, v)
        form, sizes = checks.form_and_sizes(q, k, v, given.get("layout", "bhsd"))
        known = options.Known(form, framework, dtype, given, sizes, {})
        fields = options.read(known)
        problem = Problem(framework=framework, platform=platform_of(q), dtype=dtype, **fields)
        return cls(form, problem, {**arrays, **known.closed_over})

    @property
    def operands(self) -> Operands:
        """The arrays in canonical form: views, if strides allow.

        Lengths and offsets alone are converted, to int32. Where a mask or bias has some of several
        leading axes and not the others, those are materialised; its gradient comes back in its shape.

        Raises:
            ValueError: a length that is negative or longer than its sequence, or an offset out of
                range, where the values can be read without waiting for a device: CPU arrays outside
                of a trace.
        """
        if isinstance(self.arrays["q"], jax.ShapeDtypeStruct):
            raise TypeError(
                "attention computes, and needs arrays. Got jax.ShapeDtypeStruct. "
                "To ask what would happen call heedful.explain; for shapes, jax.eval_shape."
            )
        return Operands(
            **{name: self.form.heads(self.arrays[name]) for name in "qkv"},
            **options.canonical(self.arrays, self.form, self.problem),
        )

    def restore(self, out: Array, lse: Array | None) -> Array | tuple[Array, Array]:
        """Canonical out (and lse, where it was asked for) → what the caller gets."""
        if not self.problem.return_lse:
            return self.form.out(out)
        assert lse is not None  # a backend without an LSE refuses the problem
        return self.form.out(out), self.form.lse(lse)
