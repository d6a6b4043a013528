"""Who computes a call: names, preference, the automatic choice, refusals, and the registry."""

import asyncio
import contextlib
import contextvars
import sys
import threading
from textwrap import dedent

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import heedful
from heedful import Refusal, attention, dispatch, explain, use_backend
from heedful.call.options import OPTIONS
from heedful.oracle import FEATURES

Q = jnp.ones((1, 2, 3, 8))


class Fake:
    """Gives its own number as every output, so that an answer says who computed it."""

    takes = FEATURES

    def __init__(self, name, number, *reasons, automatic=None, builds=0):
        self.name, self.number, self.given_reasons = name, number, reasons
        self.builds = builds
        if automatic is not None:
            self.automatic = automatic

    def reasons(self, problem):
        return self.given_reasons

    def score_bytes(self, problem):
        return self.builds

    def run(self, problem, operands):
        shape = (problem.batch, problem.q_heads, problem.q_length)
        out = jnp.full((*shape, problem.value_dim), self.number, problem.dtype)
        return out, jnp.full(shape, self.number, problem.accumulator)


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("HEEDFUL_BACKEND", raising=False)
    monkeypatch.setattr(dispatch.ambient, "_environment", None)


@pytest.fixture
def environment(monkeypatch):
    """Sets HEEDFUL_BACKEND as if before the import."""

    def environment(text):
        monkeypatch.setenv("HEEDFUL_BACKEND", text)
        monkeypatch.setattr(dispatch.ambient, "_environment", text)

    return environment


@pytest.fixture
def fakes():
    fakes = [
        Fake("jax:one", 1),
        Fake("jax:two", 2),
        Fake("jax:unable", 3, "the moon is full", "it is Tuesday"),
    ]
    for fake in fakes:
        heedful.register(fake)
    yield
    for fake in fakes:
        heedful.unregister(fake.name)


def who(*args, **options):
    return float(attention(*(args or (Q, Q, Q)), **options)[0, 0, 0, 0])


# Names


@pytest.mark.usefixtures("fakes")
def test_a_named_backend_runs():
    assert who(backend="jax:one") == 1
    assert who(backend="jax:two") == 2


def test_a_backend_that_cannot_be_a_key_is_refused_when_it_is_registered():
    class Plain(Fake):
        __hash__ = None  # as a dataclass has it unless it is told otherwise

    with pytest.raises(TypeError, match="unhashable"):
        heedful.register(Plain("jax:plainest", 1))
    assert "jax:plainest" not in heedful.backends()


@pytest.mark.usefixtures("fakes")
def test_a_named_backend_that_cannot_is_never_replaced():
    with pytest.raises(Refusal) as refusal:
        attention(Q, Q, Q, backend="jax:unable")
    assert str(refusal.value) == (
        "jax:unable (asked for by backend=) cannot compute this call.\n"
        "  jax:unable: the moon is full; it is Tuesday"
    )
    assert refusal.value.reasons == {"jax:unable": ("the moon is full", "it is Tuesday")}


@pytest.mark.usefixtures("fakes")
def test_of_a_list_the_first_able_one_runs():
    assert who(backend=["jax:unable", "jax:two", "jax:one"]) == 2
    with pytest.raises(Refusal) as refusal:
        attention(Q, Q, Q, softcap=1.0, backend=("jax:unable", "jax:nn-xla"))
    assert str(refusal.value) == (
        "jax:unable, jax:nn-xla (asked for by backend=) none of them can compute this call.\n"
        "  jax:unable: the moon is full; it is Tuesday\n"
        "  jax:nn-xla: jax.nn.dot_product_attention has no softcap"
    )


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("jax:flesh", ValueError, "no backend is named 'jax:flesh'. There are "),
        (["jax:flash", "flash"], ValueError, "no backend is named 'flash'. There are "),
        ([], TypeError, 'backend must be a name such as "jax:flash", or a list of names. Got []'),
        (7, TypeError, 'backend must be a name such as "jax:flash", or a list of names. Got 7'),
        ([None], TypeError, 'backend must be a name such as "jax:flash", or a list of names.'),
    ],
)
def test_wrong_names(backend, error, message):
    for ask in (
        lambda: attention(Q, Q, Q, backend=backend),
        lambda: use_backend(backend).__enter__(),
    ):
        with pytest.raises(error) as raised:
            ask()
        assert str(raised.value).startswith(message)


# Who asks


@pytest.mark.usefixtures("fakes")
def test_the_argument_goes_before_the_block_before_the_environment(environment):
    environment("jax:one")
    assert who() == 1
    with use_backend("jax:two"):
        assert who() == 2
        assert who(backend="jax:one") == 1
        with use_backend(["jax:unable", "jax:one"]):
            assert who() == 1
        assert who() == 2
    assert who() == 1


@pytest.mark.usefixtures("fakes")
def test_the_environment_takes_a_list_and_its_mistakes_are_told(environment):
    environment("jax:unable, jax:two")
    assert who() == 2
    environment("jax:unable")
    with pytest.raises(
        Refusal, match=r"jax:unable \(asked for by HEEDFUL_BACKEND\) cannot compute"
    ):
        who()
    environment("jax:too")
    with pytest.raises(ValueError, match="no backend is named 'jax:too'"):
        who()
    environment(" , ")
    with pytest.raises(ValueError, match=r"HEEDFUL_BACKEND must hold names .* Got ' , '"):
        who()
    environment("")
    assert explain(Q, Q, Q).why == "the automatic choice"


def test_the_environment_is_read_once_and_a_change_of_it_is_told(monkeypatch):
    monkeypatch.setenv("HEEDFUL_BACKEND", "jax:plain")
    with pytest.raises(
        RuntimeError, match="was None when heedful was imported, and is 'jax:plain'"
    ):
        who()
    assert who(backend="jax:plain") == 1
    with use_backend("jax:plain"):
        assert who() == 1


@pytest.mark.usefixtures("fakes")
def test_a_block_ends_with_an_exception():
    with pytest.raises(Refusal, match=r"asked for by use_backend"), use_backend("jax:unable"):
        who()
    assert explain(Q, Q, Q).why == "the automatic choice"


@pytest.mark.usefixtures("fakes")
def test_threads_and_tasks_have_their_own_choice():
    def in_thread(target):
        found = []
        thread = threading.Thread(target=lambda: found.append(target()))
        thread.start()
        thread.join()
        return found[0]

    async def task(name, number):
        with use_backend(name):
            for _ in range(3):
                assert who() == number
                await asyncio.sleep(0)

    async def tasks():
        await asyncio.gather(task("jax:one", 1), task("jax:two", 2))
        assert who() == 2  # of the block around

    with use_backend("jax:two"):
        asyncio.run(tasks())
        here = contextvars.copy_context()
        assert in_thread(lambda: here.run(who)) == 2

        def own():
            with use_backend("jax:one"):
                return who()

        assert in_thread(own) == 1
        assert who() == 2


# What JAX has compiled is kept apart by the choice


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("around", ["nothing", "grad", "vmap", "scan", "checkpoint"])
def test_a_jitted_function_is_traced_anew_under_another_choice(around):
    traced = 0

    def call(q):
        nonlocal traced
        traced += 1
        return attention(q, q, q)

    wrapped = {
        "nothing": call,
        "grad": jax.grad(lambda q: (call(q) * q).sum()),  # the fakes' gradient is that of q alone
        "vmap": lambda q: jax.vmap(call)(q[None])[0],
        "scan": lambda q: jax.lax.scan(lambda c, q: (c, call(q)), 0, q[None])[1][0],
        "checkpoint": jax.checkpoint(call),
    }[around]
    f = jax.jit(wrapped)

    def number():
        return float(f(Q)[0, 0, 0, 0])

    with use_backend("jax:one"):
        assert number() == 1
    with use_backend("jax:two"):
        assert number() == 2
        with use_backend(["jax:unable", "jax:one"]):
            assert number() == 1
        with use_backend("jax:unable"), pytest.raises(Refusal, match="asked for by use_backend"):
            number()
        assert number() == 2
    before = traced
    for name, result in (("jax:one", 1), ("jax:two", 2)):
        with use_backend(name):
            assert number() == result
    assert traced == before  # each choice once


def test_a_jitted_function_that_ran_by_another_backend_refuses():
    f = jax.jit(lambda q: attention(q, q, q, softcap=5.0))
    f(Q)
    with use_backend("jax:nn-xla"), pytest.raises(Refusal, match="no softcap"):
        f(Q)
    f(Q)


@pytest.mark.usefixtures("fakes")
def test_a_thread_opens_the_block_of_its_own():
    f = jax.jit(lambda q: attention(q, q, q))
    found = []

    def work():
        found.append(float(f(Q)[0, 0, 0, 0]))

    with use_backend("jax:one"):
        for target in (use_backend("jax:two")(work), use_backend("jax:one")(work), work):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        work()
    assert found == [2, 1, 1, 1]  # without a block: of the automatic choice, where all is 1


@pytest.mark.usefixtures("fakes")
def test_a_block_of_another_thread_or_task_is_not_traced():
    def trace():
        with pytest.raises(RuntimeError, match="in another thread or task"):
            jax.jit(lambda q: attention(q, q, q))(Q)
        assert who() == 2  # outside of a trace the context is enough
        jax.jit(lambda q: attention(q, q, q, backend="jax:one"))(Q)

    with use_backend("jax:two"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(trace,))
        thread.start()
        thread.join()

    async def task(name, other):
        with use_backend(name):
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="in another thread or task"):
                jax.jit(lambda q: attention(q, q, q))(Q)
            other.set()
            await asyncio.sleep(0)

    async def tasks():
        first, second = asyncio.Event(), asyncio.Event()

        async def both(name, mine, others):
            await task(name, mine)
            await others.wait()

        await asyncio.gather(both("jax:one", first, second), both("jax:two", second, first))
        with use_backend("jax:two"):  # all are closed: nothing of them is left
            assert float(jax.jit(lambda q: attention(q, q, q))(Q)[0, 0, 0, 0]) == 2

    asyncio.run(tasks())


# The automatic choice


def test_the_flash_core_is_the_automatic_choice_for_jax_and_numpy():
    for q in (Q, np.ones((3, 8), np.float32)):
        explanation = explain(q, q, q)
        assert explanation.chosen == "jax:flash"
        assert explanation.why == "the automatic choice"


def test_the_automatic_choice_goes_by_rank_and_leaves_out_those_without_one():
    fakes = [Fake("jax:first", 5, automatic=-1), Fake("jax:never", 6)]
    try:
        for fake in fakes:
            heedful.register(fake)
        assert who() == 5
        fakes[0].given_reasons = ("not today",)
        assert explain(Q, Q, Q).chosen == "jax:flash"
        assert explain(Q, Q, Q).why == "the automatic choice; jax:first refused"
    finally:
        for fake in fakes:
            heedful.unregister(fake.name)


@contextlib.contextmanager
def registered(*fakes):
    for fake in fakes:
        heedful.register(fake)
    try:
        yield
    finally:
        for fake in fakes:
            heedful.unregister(fake.name)


def test_the_automatic_choice_takes_no_quadratic_memory_where_a_linear_backend_accepts():
    first = Fake("jax:first", 5, automatic=-2)
    second = Fake("jax:second", 6, automatic=-1)
    with registered(first, second):
        assert who() == 5
        first.builds = 2 * 2**20  # no more than a tile of the linear ones
        assert who() == 5
        first.builds += 1
        assert who() == 6
        assert who(backend="jax:first") == who(backend=["jax:first", "jax:second"]) == 5
        explanation = explain(Q, Q, Q)
        assert explanation.chosen == "jax:second"
        assert explanation.why == (
            "the automatic choice; jax:first builds 2 MiB of scores or masks over (Sq, Sk)"
        )
        assert "accepts, and builds 2 MiB of scores or masks" in str(explanation)
        second.given_reasons = ("not today",)
        assert explain(Q, Q, Q).chosen == "jax:flash"
        assert explain(Q, Q, Q).why == (
            "the automatic choice; jax:second refused; "
            "jax:first builds 2 MiB of scores or masks over (Sq, Sk)"
        )


def test_where_all_are_quadratic_the_automatic_choice_takes_the_least(monkeypatch):
    oracle = type(heedful.backends()["numpy:oracle"])  # were it so too
    monkeypatch.setattr(oracle, "score_bytes", lambda _, p: 8 * p.score_count, raising=False)
    q = np.ones((3, 8))  # float64, which no backend of JAX takes
    first = Fake("numpy:first", 5, automatic=-2, builds=2**40)
    second = Fake("numpy:second", 6, automatic=-1, builds=2**30)
    with registered(first, second):
        assert explain(q, q, q).chosen == "numpy:oracle"
        shape = np.broadcast_to(np.zeros((), np.float64), (2**20, 8))
        assert explain(shape, shape, shape).chosen == "numpy:second"
        assert explain(shape, shape, shape).why == (
            "the automatic choice; jax:flash, jax:plain refused; "
            "numpy:first builds 1 TiB of scores or masks over (Sq, Sk)"
        )


def test_what_the_caller_holds_over_the_scores_may_be_doubled():
    fake = Fake("jax:first", 5, automatic=-1, builds=4 * 2048**2)
    q = jax.ShapeDtypeStruct((1, 2, 2048, 8), jnp.float32)
    with registered(fake):

        def chosen(**options):
            shapes = {
                name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in options.items()
            }
            return explain(q, q, q, **shapes).chosen

        assert chosen(bias=((2048, 2048), jnp.float32)) == "jax:first"
        assert chosen(bias=((2, 1, 2048), jnp.float32)) == "jax:flash"
        assert chosen(mask=((2048, 2048), bool)) == "jax:flash"
        assert chosen(mask=((2, 2048, 2048), bool)) == "jax:flash"
        fake.builds //= 2
        assert chosen(mask=((2, 2048, 2048), bool)) == "jax:first"


def test_a_backend_that_cannot_say_what_it_builds_is_passed_over():
    fake = Fake("jax:first", 5, automatic=-1, builds="much")
    with registered(fake):
        assert who() == 1 == float(attention(Q, Q, Q)[0, 0, 0, 0])
        verdicts = {verdict.name: verdict for verdict in explain(Q, Q, Q).verdicts}
        assert "its score_bytes fails" in str(verdicts["jax:first"])


@pytest.mark.parametrize(
    ("backend", "bytes_a_score"),
    [("jax:flash", 0), ("jax:plain", 4), ("jax:nn-xla", 4), ("numpy:oracle", 0)],
)
def test_what_the_backends_of_core_build(backend, bytes_a_score):
    shapes = (jax.ShapeDtypeStruct((2, heads, 64, 8), jnp.float32) for heads in (4, 2, 2))
    verdicts = {verdict.name: verdict for verdict in explain(*shapes).verdicts}
    assert verdicts[backend].score_bytes == bytes_a_score * 2 * 4 * 64 * 64


def test_numpy_float64_goes_to_the_oracle_while_jax_has_none():
    q = np.ones((3, 8))
    explanation = explain(q, q, q)
    assert explanation.chosen == "numpy:oracle"
    assert explanation.why == "the automatic choice; jax:flash, jax:plain refused"
    assert attention(q, q, q).dtype == np.float64
    with pytest.raises(Refusal) as refusal:
        attention(q, q, q, softcap=1.0, backend="jax:nn-xla")
    assert refusal.value.reasons["jax:nn-xla"] == (
        'float64 needs jax.config.update("jax_enable_x64", True)',
        "jax.nn.dot_product_attention has no softcap",
        "jax.nn.dot_product_attention computes every softmax in float32",
    )
    with jax.enable_x64(True):
        assert explain(q, q, q).chosen == "jax:flash"


# Under JAX's transformations


@pytest.mark.usefixtures("fakes")
def test_the_choice_works_under_every_trace():
    def call(q):
        return attention(q, q, q, backend=["jax:unable", "jax:two"])

    assert float(jax.jit(call)(Q)[0, 0, 0, 0]) == 2
    assert float(jax.vmap(call)(Q[None])[0, 0, 0, 0, 0]) == 2
    assert jax.eval_shape(call, Q).shape == Q.shape
    assert float(jax.export.export(jax.jit(call))(Q).call(Q)[0, 0, 0, 0]) == 2


@pytest.mark.parametrize("backend", [None, "jax:flash", "jax:plain", "jax:nn-xla"])
def test_core_backends_work_under_eval_shape_and_export(backend):
    def call(q, mask):
        return attention(q, q, q, mask=mask, causal=True, backend=backend)

    mask = jnp.ones((1, 3), bool)
    assert jax.eval_shape(call, Q, mask).shape == Q.shape
    exported = jax.export.export(jax.jit(call))(Q, mask)
    np.testing.assert_allclose(exported.call(Q, mask), Q, rtol=1e-6)


def test_a_refusal_comes_while_tracing():
    with pytest.raises(Refusal, match="has no softcap"):
        jax.eval_shape(lambda q: attention(q, q, q, softcap=1.0, backend="jax:nn-xla"), Q)


# explain


@pytest.mark.usefixtures("fakes")
def test_an_explanation_is_data():
    explanation = explain(Q, Q, Q, softcap=2.0, backend=["jax:unable", "jax:two"])
    assert explanation.chosen == "jax:two"
    assert explanation.why == "asked for by backend=; jax:unable refused"
    assert explanation.problem.softcap == 2.0
    verdicts = {verdict.name: verdict for verdict in explanation.verdicts}
    assert list(verdicts) == list(heedful.backends())
    assert verdicts["jax:flash"].accepted
    assert not verdicts["jax:unable"].accepted
    assert verdicts["jax:unable"].reasons == ("the moon is full", "it is Tuesday")
    assert verdicts["jax:nn-xla"].reasons == ("jax.nn.dot_product_attention has no softcap",)
    assert explain(Q, Q, Q, backend="jax:unable").chosen is None
    assert explain(Q, Q, Q, backend="jax:unable").why == (
        "asked for by backend=; none of jax:unable accepts"
    )


@pytest.mark.usefixtures("fakes")
def test_an_explanation_prints():
    lines = str(explain(Q, Q, Q, backend="jax:two")).splitlines()
    assert lines[0] == "chosen: jax:two (asked for by backend=)"
    said = {name: " ".join(rest) for name, *rest in map(str.split, lines[1:])}
    assert said["jax:two"] == "accepts"
    assert said["jax:unable"] == "the moon is full; it is Tuesday"
    assert list(said) == list(heedful.backends())


def test_a_shape_is_enough_to_explain():
    shape = jax.ShapeDtypeStruct((2, 2, 1_000_000, 64), jnp.bfloat16)
    assert explain(shape, shape, shape, causal=True).chosen == "jax:flash"


# The registry


def test_register_and_unregister():
    fake = Fake("jax:fake", 9)
    heedful.register(fake)
    assert heedful.backends()["jax:fake"] is fake
    assert isinstance(fake, heedful.Backend)
    heedful.unregister("jax:fake")
    assert "jax:fake" not in heedful.backends()


def test_a_backend_that_is_defined_again_takes_its_place():
    heedful.register(Fake("jax:fake", 9))
    again = Fake("jax:fake", 10)
    heedful.register(again)
    assert heedful.backends()["jax:fake"] is again

    class Other(Fake):
        pass

    with pytest.raises(ValueError, match="'jax:fake' is there already"):
        heedful.register(Other("jax:fake", 11))
    heedful.unregister("jax:fake")


NAMED = 'a backend is named "framework:kernel", its framework one of jax, numpy, torch.'


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        (
            object(),
            TypeError,
            "a backend must have name, reasons and run. Got object without name, reasons, run.",
        ),
        (
            Fake("jax:flash", 0),
            ValueError,
            "a backend named 'jax:flash' is there already. Choose another name.",
        ),
        (Fake("flash", 0), ValueError, f"{NAMED} Got 'flash'."),
        (Fake("mlx:flash", 0), ValueError, f"{NAMED} Got 'mlx:flash'."),
        (Fake("jax:", 0), ValueError, f"{NAMED} Got 'jax:'."),
        (Fake(None, 0), ValueError, f"{NAMED} Got None."),
    ],
)
def test_wrong_backends_are_not_registered(backend, error, message):
    before = list(heedful.backends())
    with pytest.raises(error) as raised:
        heedful.register(backend)
    assert str(raised.value) == message
    assert list(heedful.backends()) == before


@pytest.mark.parametrize("name", ["jax:flash", "jax:nobody"])
def test_only_what_was_registered_is_unregistered(name):
    with pytest.raises(KeyError, match=f"{name} was not added by heedful.register"):
        heedful.unregister(name)


@contextlib.contextmanager
def given(backend):
    heedful.register(backend)
    try:
        yield backend
    finally:
        heedful.unregister(backend.name)


def raise_it(error):
    raise error


# A value of each option that asks for it, beside Q of (1, 2, 3, 8).
ASKING = {
    "mask": {"mask": jnp.ones((3, 3), bool)},
    "bias": {"bias": jnp.ones((3, 3))},
    "causal": {"causal": True},
    "window": {"window": (1, 0)},
    "q_offset": {"causal": True, "q_offset": 1},
    "q_lengths": {"q_lengths": jnp.array([2])},
    "kv_lengths": {"kv_lengths": jnp.array([2])},
    "q_segment_ids": dict.fromkeys(("q_segment_ids", "kv_segment_ids"), jnp.zeros((1, 3), int)),
    "kv_segment_ids": dict.fromkeys(("q_segment_ids", "kv_segment_ids"), jnp.zeros((1, 3), int)),
    "scale": {"scale": 1.0},
    "softcap": {"softcap": 1.0},
    "score_mod": {"score_mod": lambda score, b, h, i, j: score},
    "mask_mod": {"mask_mod": lambda b, h, i, j: i >= j},
    "sinks": {"sinks": jnp.zeros(2)},
    "alibi_slopes": {"alibi_slopes": jnp.zeros(2)},
    "dropout_rate": {"dropout_rate": 0.5, "dropout_seed": 1},
    "dropout_seed": {"dropout_rate": 0.5, "dropout_seed": 1},
    "return_lse": {"return_lse": True},
}


@pytest.mark.parametrize("option", [o.name for o in OPTIONS if o.name != "layout"])
def test_a_backend_that_takes_nothing_is_given_nothing(option):
    """So an option that is added tomorrow is refused by every backend that is written today."""
    fake = Fake("jax:nothing", 7)
    fake.takes = ()
    with given(fake):
        assert who(backend="jax:nothing") == 7
        with pytest.raises(Refusal, match=rf"does not take {option}(;|$)"):
            attention(Q, Q, Q, backend="jax:nothing", **ASKING[option])


def test_what_it_takes_may_be_broken_and_is_a_reason():
    fake = Fake("jax:odd", 0, automatic=-1)
    fake.takes = 7
    with given(fake):
        verdicts = {verdict.name: verdict for verdict in explain(Q, Q, Q).verdicts}
        assert verdicts["jax:odd"].reasons == (
            "its takes fails: TypeError: 'int' object is not iterable",
        )
        assert attention(Q, Q, Q).shape == Q.shape


def test_what_shapes_ask_for_is_refused_with_their_sizes():
    fake = Fake("jax:nothing", 7)
    fake.takes = ()
    with given(fake):
        verdicts = explain(Q, Q[:, :1], Q[:, :1, :, :4]).verdicts
    assert {verdict.name: verdict.reasons for verdict in verdicts}["jax:nothing"] == (
        "does not take grouped_heads: 2 query heads on 1 key heads",
        "does not take value_dim: Dv = 4, D = 8",
    )


@pytest.mark.parametrize(
    "said",
    [
        lambda: "cannot",  # not a list of letters
        lambda: None,
        lambda: False,
        lambda: 7,
        lambda: [None],
        lambda: ["true", 3],
        lambda: {"reason": "cannot"},
        lambda: (reason for reason in ["cannot"]),
        lambda: raise_it(RuntimeError("out of luck")),
        lambda: raise_it(SystemExit(0)),
        lambda: raise_it(Refusal("nobody", {"jax:other": ("mine",)})),
    ],
)
def test_reasons_that_fail_are_a_reason_and_spare_the_others(said):
    fake = Fake("jax:odd", 0, automatic=-1)
    fake.reasons = lambda problem: said()
    with given(fake):
        assert who() == 1
        verdicts = {verdict.name: verdict for verdict in explain(Q, Q, Q).verdicts}
        (why,) = verdicts["jax:odd"].reasons
        assert why.startswith(("its reasons fails: ", "it must give its reasons as a list"))
        with pytest.raises(Refusal) as refusal:
            attention(Q, Q, Q, backend="jax:odd")
        assert refusal.value.reasons == {"jax:odd": (why,)}


class Text:
    """What a backend may return in place of an array."""

    shape, dtype = (1, 2, 3, 8), "float32"


OUT, LSE = jnp.ones((2, 2, 3, 8)), jnp.ones((2, 2, 3))
WRONG = {
    "out alone": (lambda out, lse: out, None),
    "a list": (lambda out, lse: [out, lse], None),
    "one": (lambda out, lse: (out,), None),
    "three": (lambda out, lse: (out, lse, lse), None),
    "nothing": (lambda out, lse: None, None),
    "text": (lambda out, lse: "ab", None),
    "a dict": (lambda out, lse: {"out": out, "lse": lse}, None),
    "a generator": (lambda out, lse: (x for x in (out, lse)), None),
    "no out": (lambda out, lse: (None, lse), "out"),
    "numbers": (lambda out, lse: (1.0, lse), "out"),
    "letters": (lambda out, lse: ("a", "b"), "out"),
    "lists": (lambda out, lse: (out.tolist(), lse), "out"),
    "another framework's": (lambda out, lse: (np.asarray(out), lse), "out"),
    "no array": (lambda out, lse: (Text(), lse), "out"),
    "the other order": (lambda out, lse: (lse, out), "out"),
    "another dtype": (lambda out, lse: (out.astype("bfloat16"), lse), "out"),
    "integers": (lambda out, lse: (out.astype("int32"), lse), "out"),
    "one row": (lambda out, lse: (out[:1], lse), "out"),
    "one axis less": (lambda out, lse: (out[0], lse), "out"),
    "one axis more": (lambda out, lse: (out[None], lse), "out"),
    "bshd": (lambda out, lse: (out.swapaxes(1, 2), lse), "out"),
    "no lse": (lambda out, lse: (out, None), "lse"),
    "a column": (lambda out, lse: (out, lse[..., None]), "lse"),
    "queries before heads": (lambda out, lse: (out, lse.swapaxes(1, 2)), "lse"),
    "lse of q's dtype": (lambda out, lse: (out, lse.astype("bfloat16")), "lse"),
    "NumPy's lse": (lambda out, lse: (out, np.asarray(lse)), "lse"),
    "a number for lse": (lambda out, lse: (out, 0.0), "lse"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("jit", [False, True])
def test_what_a_backend_returns_is_checked(name, jit):
    change, tensor = WRONG[name]
    fake = Fake("jax:odd", 0)
    fake.run = lambda problem, operands: change(OUT, LSE)
    q = jnp.ones((2, 2, 3, 8))

    def call(q):
        return attention(q, q, q, return_lse=True, backend="jax:odd")

    with given(fake), pytest.raises(TypeError, match="jax:odd") as wrong:
        (jax.jit(call) if jit else call)(q)
    assert (wrong.value.backend, wrong.value.tensor) == ("jax:odd", tensor)


def test_an_lse_that_nobody_asked_for_is_dropped_unseen():
    fake = Fake("jax:odd", 0)
    fake.run = lambda problem, operands: (OUT, "no lse")
    with given(fake):
        assert attention(OUT, OUT, OUT, backend="jax:odd").shape == OUT.shape


def test_the_backends_of_the_design_are_installed():
    core = {"numpy:oracle", "jax:plain", "jax:flash", "jax:nn-xla", "jax:nn-cudnn"}
    assert core <= set(heedful.backends())
    for name, backend in heedful.backends().items():
        assert backend.name == name
        assert isinstance(backend, heedful.Backend)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Installs a package: a module, and entry points in the group heedful.backends."""

    def install(module, source, **points):
        (tmp_path / f"{module}.py").write_text(dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[heedful.backends]", *lines]))
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(dispatch.registry, "_loaded", {})
        forget()

    def forget():
        dispatch.registry._entry_points.cache_clear()
        dispatch.registry.ranked.cache_clear()

    yield install
    monkeypatch.undo()
    forget()


PACKAGE = """
    import jax.numpy as jnp

    class Ours:
        name = "jax:ours"
        takes = {"softcap"}

        def reasons(self, problem):
            return ["we do not like softcap"] if problem.softcap else []

        def run(self, problem, operands):
            return operands.v * 0 + 7, None

    backend = Ours()
"""


def test_a_package_adds_a_backend_through_its_entry_point(install):
    install("ours", PACKAGE, **{"jax:ours": "backend"})
    assert who(backend="jax:ours") == 7
    with pytest.raises(Refusal, match="we do not like softcap"):
        who(backend="jax:ours", softcap=1.0)
    with pytest.raises(ValueError, match="is there already"):
        heedful.register(Fake("jax:ours", 0))


def test_an_installed_backend_that_cannot_be_imported_refuses_and_spares_the_others(install):
    install("broken_package", "import something_not_there", **{"jax:broken": "backend"})
    verdicts = {verdict.name: verdict for verdict in explain(Q, Q, Q).verdicts}
    why = "cannot be imported: ModuleNotFoundError: No module named 'something_not_there'"
    assert verdicts["jax:broken"].reasons == (why,)
    assert verdicts["jax:flash"].accepted
    with pytest.raises(Refusal, match=why):
        who(backend="jax:broken")


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        (PACKAGE, "jax:theirs", "its entry point 'jax:theirs' holds a backend named 'jax:ours'"),
        (PACKAGE, "ours", "its entry point 'ours' holds a backend named 'jax:ours'"),
        ("backend = 7", "jax:seven", "a backend must have name, reasons and run. Got int without"),
        ("class backend: name, reasons = 'jax:lame', None", "jax:lame", "without run"),
        ("raise SystemExit(0)", "jax:quitter", "cannot be imported: SystemExit: 0"),
        ("nothing = None", "jax:absent", "cannot be imported: AttributeError"),
        (PACKAGE + "    Ours.__hash__ = None", "jax:ours", "unhashable"),
        (PACKAGE + "    Ours.automatic = 'first'", "jax:ours", "automatic must be a rank"),
    ],
)
def test_an_installed_backend_that_is_broken_is_a_reason_and_nothing_more(
    install, source, name, said
):
    install("odd_package", source, **{name: "backend"})
    assert who() == 1
    verdicts = {verdict.name: verdict for verdict in explain(Q, Q, Q).verdicts}
    assert said in str(verdicts[name])
    with pytest.raises(Refusal) as refusal:
        who(backend=name)
    assert said in str(refusal.value)


@pytest.mark.parametrize("name", ["jax:flash", "jax:ours"])
def test_a_name_that_two_packages_declare_is_refused_and_both_are_named(install, name):
    install("ours", PACKAGE, **{name: "backend"})
    install("theirs", PACKAGE, **{name: "backend"})
    for package in ("ours", "theirs"):
        verdicts = {verdict.name: verdict for verdict in explain(Q, Q, Q).verdicts}
        assert f"{package} ({package}:backend)" in str(verdicts[name])
        with pytest.raises(Refusal, match=f"more than one package: .*{package}"):
            who(backend=name)
    assert who() == 1


def test_listing_a_framework_loads_no_backend_of_another(install):
    install("loud", "raise RuntimeError('loaded')", **{"torch:loud": "backend"})
    assert who(backend="jax:plain") == 1
    assert who() == 1
