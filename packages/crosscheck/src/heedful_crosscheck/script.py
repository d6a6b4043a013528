"""A failing case as a script of its own: attention in float64 NumPy, the inputs, and the call.

It needs nothing of heedful, so that it can be mailed to whom the function is from, and says attention
once more: dense, and only as much of it as is asked. Gradients are central differences of it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from heedful import Problem, oracle
from heedful.call.operands import Operands
from heedful_crosscheck.ask import framework
from heedful_crosscheck.callers import as_numpy, caller_of
from heedful_crosscheck.function import Function
from heedful_crosscheck.function_backend import FunctionBackend
from heedful_crosscheck.layouts import LAYOUTS
from heedful_crosscheck.question import Question
from heedful_crosscheck.report import Report
from heedful_crosscheck.respondent import Respondent
from heedful_crosscheck.run import Inquiry
from heedful_crosscheck.shrink import Failing, shrunk
from heedful_crosscheck.tolerance import Judgement

MOST = 20000  # numbers that a script may hold
STEP = 1e-6  # of central differences, which are good to 1e-8
DIFFERENCES = 1e-7  # the least error that they tell from their own
HIDING = ("mask", "q_lengths", "kv_lengths", "q_segment_ids", "kv_segment_ids")
ADDED = ("bias", "sinks", "alibi_slopes")  # operands beside q, k and v that have gradients

MEASURES = {
    "rms": "np.sqrt((error**2).mean() / (right**2).mean())",
    "worst_row": "(np.sqrt((error**2).mean(-1)) / "
    "np.sqrt(np.maximum((right**2).mean(-1), (right**2).mean()))).max()",
    "projection": "abs((error * right).sum() / (right**2).sum())",
}
OF_LSE = {
    "rms": "np.sqrt((error**2).mean())",
    "worst_row": "abs(error).max()",
    "projection": "abs((error * right / unit).sum()) / error.size",
}


def scripts(
    report: Report,
    inquiries: Sequence[Inquiry],
    respondent: Callable[[str], Respondent],
    function: FunctionBackend | None = None,
    imports: Sequence[str] = (),
) -> Iterator[str]:
    """Of each backend that disagrees the first failure, as small as it gets, as a script.

    Args:
        report: what came of the inquiries.
        inquiries: who was asked what.
        respondent: from a backend's name to one who answers for it.
        function: the one that was judged, if one was.
        imports: modules that register backends.
    """
    for inquiry in inquiries:
        cases = {case.name: case for case in inquiry.cases}
        for name in inquiry.respondents:
            failed = [o for o in report.by_backend.get(name, ()) if o.failures]
            if not failed:
                continue
            o = failed[0]
            question = Question.of(cases[o.case], o.seed, o.dtype, declines=inquiry.declines)
            with_lse = question.case.return_lse and "LSE" not in o.lacking
            found = shrunk(respondent(name), question, with_lse)
            own = function if function is not None and function.name == name else None
            yield _said(name, o.case, found, own, imports)


def _said(
    name: str,
    case: str,
    found: Failing | None,
    function: FunctionBackend | None,
    imports: Sequence[str],
) -> str:
    if found is None:
        return (
            f"# {name}: {case} does not fail when it is asked by itself, or only in its second "
            "derivatives\n"
        )
    try:
        return script(found, name, function, imports)
    except ValueError as error:
        return f"# {name}: {case}, as small as it gets, has no script: {error}\n"


def script(
    failing: Failing,
    backend: str,
    function: FunctionBackend | None = None,
    imports: Sequence[str] = (),
) -> str:
    """The text of a script that ends with an AssertionError, or whatever the backend raises.

    Args:
        failing: what is answered wrongly.
        backend: by whom; its name.
        function: the backend itself, where it is a described function.
        imports: modules that register backends.

    Raises:
        ValueError: the case is too large to be written down, or asks for a function that has no source.
    """
    return "\n".join(_Script(failing, backend, function, imports).lines()) + "\n"


class _Script:
    def __init__(
        self,
        failing: Failing,
        backend: str,
        function: FunctionBackend | None,
        imports: Sequence[str],
    ):
        self.failing, self.backend, self.function = failing, backend, function
        self.imports = imports
        self.question: Question = failing.question
        self.problem: Problem = self.question.problem
        self.operands: Operands = self._operands()
        self.framework = self.question.calls_from or framework(backend)
        self.tensor = failing.tensors[0]
        self.named = [n for n in ("q", "k", "v", *ADDED) if getattr(self.operands, n) is not None]
        size = sum(np.asarray(x).size for x in self.operands.given.values())
        if size > MOST:
            raise ValueError(f"a script would hold {size} numbers; {MOST} are the most.")

    def _operands(self) -> Operands:
        """Canonical, of the inputs that it is asked with, NaN among them."""
        x, inputs = self.question.operands, self.failing.inputs
        canonical = {
            n: self.question.canonical({"d" + n: getattr(inputs, n)})["d" + n] for n in "qkv"
        }
        return x._replace(**canonical)

    def lines(self) -> list[str]:
        return [
            *self._head(),
            *self._arrays(),
            *([] if self.tensor is None else self._attention()),
            *([] if not self._gradient else self._differences()),
            *self._call(),
            *self._verdict(),
        ]

    @property
    def _gradient(self) -> str:
        """Of what the wrong tensor is the gradient; "" where it is none."""
        return self.tensor[1:] if self.tensor not in (None, "out", "lse") else ""

    @property
    def _judgement(self) -> Judgement | None:
        return self.failing.judgements.get(self.tensor or "")

    # The parts

    def _head(self) -> list[str]:
        judgement, asked = self._judgement, sorted(self.problem.features - {"return_lse"})
        said = judgement.faults[0].partition(";")[0] if judgement else self.failing.raised
        lines = [
            f'"""{self.backend}, {self.question.dtype}: {said or f"{self.tensor} is malformed"}.',
            "",
            f"Asked for: {', '.join(asked) or 'plain attention'}. By heedful crosscheck --shrink.",
            '"""',
            "",
            "import numpy as np",
        ]
        if self.framework == "jax":
            lines += ["import jax", "import jax.numpy as jnp"]
        if self.framework == "torch":
            lines += ["import torch"]
        if self.framework == "numpy" and self.question.dtype == "bfloat16":
            lines += ["import ml_dtypes  # bfloat16, for NumPy"]
        if self.function is not None:
            lines += [_import_of(self.function.of)]
        else:
            lines += ["import heedful  # for one call, below: the backend has no other"]
            lines += [f"import {module}  # which registers backends" for module in self.imports]
        if self.framework == "jax" and self.question.dtype == "float64":
            lines += ['jax.config.update("jax_enable_x64", True)']
        return [*lines, ""]

    def _arrays(self) -> list[str]:
        named = {n: getattr(self.operands, n) for n in self.named}
        named |= {
            n: x for n, x in self.operands.given.items() if n in ("mask", "q_lengths", "kv_lengths")
        }
        named |= {n: x for n, x in self.operands.given.items() if n.endswith("segment_ids")}
        if self._gradient:
            named["d_out"] = self.question.out_cotangent
            if self.failing.with_lse:
                named["d_lse"] = self.question.lse_cotangent
        lines = [f"# (B, H, S, D), numbers that {self.question.dtype} has"]
        lines += [f"{name} = {_literal(x)}" for name, x in named.items()]
        for name, source in self._sources().items():
            lines += ["", source.rstrip(), *([f"{name} = {_name_in(source)}"])]
        return [*lines, ""]

    def _sources(self) -> dict[str, str]:
        found = {}
        for name in self.problem.functions:
            try:
                found[name] = inspect.getsource(self.question.inputs.options[name])
            except (OSError, TypeError) as error:
                raise ValueError(
                    f"{name} has no source that a script could show: {error}"
                ) from error
        return found

    def _attention(self) -> list[str]:
        p, x = self.problem, self.operands
        names = ", ".join(f"{n}={n}" for n in self.named)
        lines = [
            f"def attention({names}):",
            '    """Dense, in float64: out and the log-sum-exp."""',
        ]
        say = lines.append
        say(f"    b, h, i, j = np.ogrid[:{p.batch}, :{p.q_heads}, :{p.q_length}, :{p.kv_length}]")
        if self.failing.inputs is not self.question.inputs:
            say(
                "    q, k, v = (np.nan_to_num(x, posinf=0) for x in (q, k, v))  # where nobody looks"
            )
        if p.group > 1:
            say(f"    k, v = (np.repeat(x, {p.group}, axis=1) for x in (k, v))")
        say(f"    s = {p.scale!r} * q @ k.swapaxes(2, 3)")
        if p.softcap is not None:
            say(f"    s = {p.softcap!r} * np.tanh(s / {p.softcap!r})")
        if p.score_mod is not None:
            say("    s = score_mod(s, b, h, i, j)")
        if x.bias is not None:
            say("    s = s + bias")
        if p.positional:
            offset = np.broadcast_to(np.asarray(x.q_offset), p.batch)
            own = f" + np.array({offset.tolist()})[b]"
            if len(set(offset.tolist())) == 1:
                own = f" {'-' if offset[0] < 0 else '+'} {abs(offset[0])}" if offset[0] else ""
            say(f"    p = i{own}  # where query i stands")
        if x.alibi_slopes is not None:
            say("    s = s - alibi_slopes * abs(p - j)")
        lines += self._visibility()
        least = "sinks" if x.sinks is not None else "-1e300"
        say(f"    top = np.maximum(s.max(-1, keepdims=True), {least})")
        say("    w = np.exp(s - top)")
        sink = " + np.exp(sinks - top)" if x.sinks is not None else ""
        say(f"    total = w.sum(-1, keepdims=True){sink}")
        kept = f" * {_literal(self._kept())}" if p.dropout_rate else ""
        weights = f"(w{kept})" if kept else "w"
        say(f"    out = {weights} @ v / np.where(total == 0, 1, total)")
        say('    with np.errstate(divide="ignore"):')
        say("        return out, (top + np.log(total))[..., 0]")
        return [*lines, "", ""]

    def _visibility(self) -> list[str]:
        p, x = self.problem, self.operands
        left, right = p.window or (None, None)
        found = {
            "j <= p": p.causal,
            f"p - j <= {left}": left is not None,
            f"j - p <= {right}": right is not None,
            "i < q_lengths[b]": x.q_lengths is not None,
            "j < kv_lengths[b]": x.kv_lengths is not None,
            "q_segment_ids == kv_segment_ids": x.q_segment_ids is not None,
            "mask": x.mask is not None,
            "mask_mod(b, h, i, j)": p.mask_mod is not None,
        }
        seen = [said for said, asked in found.items() if asked]
        seen = [f"({said})" for said in seen] if len(seen) > 1 else seen
        return [f"    s = np.where({' & '.join(seen)}, s, -np.inf)"] if seen else []

    def _kept(self) -> np.ndarray:
        """What dropout multiplies the weights by."""
        p = self.problem
        rows = [(b, h, slice(0, p.q_length)) for b in range(p.batch) for h in range(p.q_heads)]
        kept = [oracle.keeps(p, self.operands, row, np.float64) for row in rows]
        return np.stack(kept).reshape(p.batch, p.q_heads, p.q_length, p.kv_length)

    def _differences(self) -> list[str]:
        through = " + (np.where(np.isfinite(lse), lse, 0) * d_lse).sum()"
        return [
            "def loss(**moved):",
            "    out, lse = attention(**moved)",
            f"    return (out * d_out).sum(){through if self.failing.with_lse else ''}",
            "",
            "",
            "def gradient(name, x):",
            '    """Central differences."""',
            "    found = np.zeros(x.shape)",
            "    for at in np.ndindex(x.shape):",
            f"        step = np.zeros(x.shape); step[at] = {STEP}",
            "        found[at] = (loss(**{name: x + step}) - loss(**{name: x - step})) / "
            f"{2 * STEP}",
            "    return found",
            "",
            "",
        ]

    def _call(self) -> list[str]:
        given = ", ".join(self.named)
        body = self._body()
        lines = [f"def call({given}):", *(f"    {line}" for line in body), "", ""]
        for name in self.named:
            lines.append(f"{name}_ = {self._made(name, getattr(self.operands, name).dtype.name)}")
        own = ", ".join(f"{n}_" for n in self.named)
        compiled = "jax.jit(call)" if self.framework == "jax" else "call"
        if not self._gradient or self.framework == "numpy":
            return [*lines, f"results = {compiled}({own})", ""]
        if self.framework == "jax":
            lines += [f"results, pull = jax.vjp({compiled}, {own})"]
            cotangents = [f"jnp.asarray({c}, {r}.dtype)" for c, r in self._cotangents()]
            lines += [f"gradients = pull(({', '.join(cotangents)},))"]
        else:
            lines += [f"inputs = [x.requires_grad_() for x in ({own},)]", "results = call(*inputs)"]
            cotangents = [f"torch.tensor({c}, dtype={r}.dtype)" for c, r in self._cotangents()]
            lines += [
                f"gradients = torch.autograd.grad(results, inputs, [{', '.join(cotangents)}], "
                "allow_unused=True)"
            ]
        return [*lines, ""]

    def _cotangents(self) -> list[tuple[str, str]]:
        both = [("d_out", "results[0]"), ("d_lse", "results[1]")]
        return both[: 1 + self.failing.with_lse]

    def _made(self, name: str, dtype: str) -> str:
        match self.framework:
            case "jax":
                return f"jnp.asarray({name}, {dtype!r})"
            case "torch":
                return f"torch.tensor({name}, dtype=torch.{dtype})"
        return f"{name}.astype({dtype!r})"

    def _body(self) -> list[str]:
        """Of a function of canonical arrays that returns a tuple of canonical results."""
        if self.function is None:
            return self._through_heedful()
        of = self.function.of
        turned = ".swapaxes(1, 2)" if of.layout == "bshd" else ""
        arguments = [f"{n}{turned}" for n in "qkv"]
        arguments += [f"{n}={x}" for n, x in self._told(self.function).items()]
        lines = [f"answer = {_called(of)}({', '.join(arguments)})"]
        several = of.lse is not None
        out = f"{'answer[0]' if several or 'lse' in of.declines else 'answer'}{turned}"
        if not self.failing.with_lse:
            return [*lines, f"return ({out},)"]
        lse = "answer[1]" + (".swapaxes(1, 2)" if of.lse_layout == "bsh" else "")
        lse += " * np.log(2)" if of.lse == "base2" else ""
        return [*lines, f"return {out}, {lse}"]

    def _told(self, function: FunctionBackend) -> dict[str, str]:
        """Its arguments beside q, k and v, as they are written; arrays that have a name by that."""
        caller = caller_of(self.framework, on_gpu=False)
        operands = Operands(
            **{
                n: caller.array(np.asarray(x), LAYOUTS["packed"])
                for n, x in self.operands.given.items()
                if n != "q_offset" or self.problem.q_offset is None
            }
        )
        written = {}
        for name, x in function.told(self.problem, operands).items():
            if isinstance(x, bool | int | float | tuple | str | type(None)):
                written[name] = repr(x)
                continue
            array = as_numpy(x)
            known = [n for n in self.named if _same(getattr(self.operands, n), array)]
            shape = f".reshape{array.shape}" if known else ""
            literal = f"({_literal(array)})"
            written[name] = f"{known[0]}{shape}" if known else self._made(literal, array.dtype.name)
        return written

    def _through_heedful(self) -> list[str]:
        x, options = self.operands, self.question.inputs.options
        said: dict[str, str] = {
            n: repr(value)
            for n, value in options.items()
            if not isinstance(value, np.ndarray) and n not in ("layout", *self.problem.functions)
        }
        said |= {name: name for name in self.problem.functions}
        for name in self.question.inputs.arrays:
            array = np.asarray(getattr(x, name))
            if name in ("sinks", "alibi_slopes"):
                said[name] = f"{name}.reshape({array.shape[0]}, -1)" + (
                    "[0]" if len(array) == 1 else ""
                )
            elif name in self.named:
                said[name] = name
            elif name.endswith("segment_ids"):
                said[name] = self._made(f"{name}.reshape(len({name}), -1)", "int32")
            else:
                literal = (
                    name if name in ("mask", "q_lengths", "kv_lengths") else f"({_literal(array)})"
                )
                said[name] = self._made(literal, array.dtype.name.replace("int64", "int32"))
        said |= {"return_lse": str(self.failing.with_lse), "backend": repr(self.backend)}
        arguments = ", ".join(f"{n}={value}" for n, value in said.items())
        lines = [f"answer = heedful.attention(q, k, v, {arguments})"]
        return [*lines, "return answer" if self.failing.with_lse else "return (answer,)"]

    def _verdict(self) -> list[str]:
        if self.tensor is None:
            return []
        number = {"out": "results[0]", "lse": "results[1]"}.get(self.tensor, "")
        right = {"out": "attention()[0]", "lse": "attention()[1]"}.get(self.tensor, "")
        if self._gradient:
            number = f"gradients[{self.named.index(self._gradient)}]"
            right = f"gradient({self._gradient!r}, {self._gradient})"
        if self._gradient and self.framework == "numpy":
            raise ValueError("a gradient of NumPy's is the backend's own, and no script shows it.")
        lines = [f"got, right = {number}, {right}"]
        judgement = self._judgement
        if judgement is None:
            facts = 'str(got.dtype).removeprefix("torch."), tuple(got.shape)'
            expected = {"lse": self.problem.accumulator}.get(self.tensor, self.question.dtype)
            return [*lines, f"print({facts})", f"assert ({facts}) == ({expected!r}, right.shape)"]
        if self.framework == "torch":
            lines += [
                "got = torch.zeros(right.shape) if got is None else got.detach().double().cpu()"
            ]
        lines += [
            f'got = np.asarray(got).astype("float64"){"[..., None]" if self.tensor == "lse" else ""}'
        ]
        if self.tensor == "lse":
            lines += ["right = right[..., None]"]
        lines += [
            f'print("{self.tensor} is", got.ravel()[:8])',
            'print("right is", right.ravel()[:8])',
        ]
        if not math.isfinite(judgement.errors.rms):
            return [
                *lines,
                "assert (np.isfinite(got) == np.isfinite(right)).all(), 'not finite where it should be'",
                "assert (got[right == 0] == 0).all(), 'not 0 where nothing is seen'",
            ]
        excess = [e / limit for e, limit in zip(judgement.errors, judgement.limits, strict=True)]
        measure = list(MEASURES)[int(np.argmax(excess))]
        limit = getattr(judgement.limits, measure)
        limit = max(limit, DIFFERENCES) if self._gradient else limit
        if self.tensor == "lse":
            lines += [
                "finite = np.isfinite(right)",
                "unit = np.maximum(1, abs(np.where(finite, right, 1)))",
                "assert (np.isfinite(got) == finite).all(), 'not finite where it should be'",
                "error = (np.where(finite, got, 0) - np.where(finite, right, 0)) / unit",
                "right = np.where(finite, right, 0)",
                "error = "
                + {"worst_row": "abs(error).max()"}.get(measure, "np.sqrt((error**2).mean())"),
            ]
        else:
            lines += ["error = got - right", f"error = {MEASURES[measure]}"]
        return [
            *lines,
            f'print(f"{measure.replace("_", " ")} of the error: {{error:.2g}}, rounding: {limit:.2g}")',
            f"assert error <= {limit:.3g}",
        ]


# Words


def _literal(x: np.ndarray) -> str:
    """An array as NumPy's expression; floating ones float64."""
    x = np.asarray(x)
    wide = x if x.dtype.kind in "biu" else x.astype(np.float64)
    if wide.size > 1 and len(np.unique(wide)) == 1:
        return f"np.full({wide.shape}, {_number(wide.flat[0])})"
    text = repr(wide.tolist()).replace("nan", "np.nan").replace("inf", "np.inf")
    return f"np.array({text})" if wide.size else f"np.zeros({wide.shape})"


def _number(x: Any) -> str:
    return repr(x.item()).replace("nan", "np.nan").replace("inf", "np.inf")


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    return x.size == y.size and x.dtype == y.dtype and np.array_equal(x.ravel(), y.ravel())


def _import_of(of: Function) -> str:
    """How the function is had."""
    function = of.function
    module, name = (
        getattr(function, "__module__", None),
        getattr(function, "__qualname__", "<none>"),
    )
    if module in (None, "__main__") or not name.replace(".", "").isidentifier():
        return f"# `{_called(of)}` is the function that is judged; import it here."
    return f"from {module} import {name.partition('.')[0]}"


def _called(of: Function) -> str:
    name = getattr(of.function, "__qualname__", of.title)
    return name if name.replace(".", "").isidentifier() else "function"


def _name_in(source: str) -> str:
    return source.split("def ", 1)[1].split("(", 1)[0].strip()
