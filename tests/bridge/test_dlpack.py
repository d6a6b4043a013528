"""The bridge between torch and JAX arrays: one test for each thing that DLPack gets quietly wrong."""

import copy
import ctypes
import gc
import io
import pickle
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful_torch import dlpack
from heedful_torch.dlpack import (
    CopyWarning,
    LentMemoryWritten,
    ReadOnlyTensor,
    adopt,
    lent,
    to_jax,
    to_torch,
)


def shares_memory(tensor: torch.Tensor, array: jax.Array) -> bool:
    return tensor.data_ptr() == array.unsafe_buffer_pointer()


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(shape)


# -------------------------------------------------------------------------------- dtypes and shapes


@pytest.mark.parametrize("name", sorted(dlpack.EXCHANGED))
def test_every_dtype_crosses_both_ways_without_a_copy_or_a_cast(name):
    tensor = torch.ones(4, 3).to(getattr(torch, name))
    with jax.enable_x64(True):
        array = to_jax(tensor)
        back = to_torch(array)
    assert str(array.dtype) == name and back.dtype == tensor.dtype
    assert shares_memory(tensor, array) and shares_memory(back, array)


@pytest.mark.parametrize("name", sorted(dlpack.WIDE))
@pytest.mark.parametrize("copy_", [False, None, True])
def test_64_bit_dtypes_are_refused_while_x64_is_off(name, copy_):
    # Trap 2: jax.dlpack.from_dlpack narrows them silently.
    with (
        jax.enable_x64(False),
        pytest.raises(TypeError, match=f"{name} while JAX's x64 mode is off.*jax.enable_x64"),
    ):
        to_jax(torch.ones(3, dtype=getattr(torch, name)), copy=copy_)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0, 2), (1, 5), (5, 1), (2, 1, 3)])
def test_scalars_and_empty_arrays(shape):
    tensor = torch.ones(shape)
    array = to_jax(tensor)
    assert array.shape == shape and shares_memory(tensor, array)
    assert (
        tuple(to_torch(array).shape) == shape and tuple(to_torch(array, copy=True).shape) == shape
    )


# -------------------------------------------------------------------------------- layout and copies


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_view_is_shared_if_dense_and_equal_in_any_case(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    base = numbers(*shape)
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    start = data.draw(st.integers(0, shape[0] - 1))
    view = base[start::step].permute(order)
    reason = dlpack.why_jax_must_copy(view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CopyWarning)
        array = to_jax(view, copy=None)
    np.testing.assert_array_equal(np.asarray(array), view.numpy())
    assert shares_memory(view, array) == (reason is None)
    if step == 1 and start == 0:
        assert reason is None


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_transposes_are_shared_and_compute_right_under_jit(order):
    tensor = numbers(2, 3, 4).permute(order)
    array = to_jax(tensor)
    assert shares_memory(tensor, array)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: x + 1)(array)), tensor.numpy() + 1)
    back = to_torch(array)
    assert back.stride() == tensor.stride() and shares_memory(back, array)


NOT_SHARED = {
    "slice": (lambda: numbers(4, 6, 8)[:, :3], r"strides \(48, 8, 1\) leave gaps \(a slice\)"),
    "step": (lambda: numbers(4, 8)[::2], r"leave gaps"),
    "column": (lambda: numbers(16, 16)[:, :1], r"leave gaps"),
    "broadcast": (
        lambda: numbers(1, 8).expand(4, 8),
        r"strides \(0, 1\) read the same memory more than once",
    ),
    "scalar broadcast": (lambda: torch.tensor(1.0).expand(4, 8), r"more than once \(a broadcast\)"),
    "unaligned": (lambda: numbers(65)[1:], "starts 4 bytes after a multiple of 64"),
}


@pytest.mark.parametrize(("make", "reason"), NOT_SHARED.values(), ids=NOT_SHARED)
def test_what_cannot_be_shared_is_refused_or_copied_aloud(make, reason):
    # Traps 3 and 4: JAX fails on strides with an UNIMPLEMENTED and copies unaligned memory in silence.
    tensor = make()
    with pytest.raises(ValueError, match=reason + r".*copy=None to copy when needed") as refusal:
        to_jax(tensor)
    assert str(tuple(tensor.shape)) in str(refusal.value)
    with pytest.warns(CopyWarning, match=reason) as record:
        array = to_jax(tensor, copy=None)
    assert record[0].filename == __file__  # points at the caller
    np.testing.assert_array_equal(np.asarray(array), tensor.numpy())
    np.testing.assert_array_equal(np.asarray(to_jax(tensor, copy=True)), tensor.numpy())
    to_jax(tensor.clone(memory_format=torch.contiguous_format))  # the mend that the message names


@pytest.mark.parametrize("offset", range(0, 132, 4))
def test_our_idea_of_alignment_is_jaxs(offset):
    tensor = torch.zeros(64)[offset // 4 :]
    ours = dlpack.why_jax_must_copy(tensor) is None
    if ours:
        assert shares_memory(tensor, jax.dlpack.from_dlpack(tensor, copy=False))
    else:
        with pytest.raises(ValueError, match="not aligned"):
            jax.dlpack.from_dlpack(tensor, copy=False)


@pytest.mark.parametrize(
    "make", [lambda: numbers(4, 8), lambda: numbers(4, 8).T, lambda: numbers(4, 8)[1:3]]
)
def test_copy_true_is_independent_in_both_directions(make):
    # jax.dlpack.from_dlpack(tensor, copy=True) shares aligned row-major CPU memory in jax 0.10.2.
    tensor = make()
    before = tensor.numpy().copy()
    array = to_jax(tensor, copy=True)
    tensor.zero_()
    np.testing.assert_array_equal(np.asarray(array), before)
    back = to_torch(array, copy=True)
    assert type(back) is torch.Tensor
    back.zero_()
    np.testing.assert_array_equal(np.asarray(array), before)


def test_copies_that_are_not_needed_are_not_made():
    tensor = numbers(4, 8)
    array = to_jax(tensor, copy=None)
    assert shares_memory(tensor, array) and shares_memory(to_torch(array, copy=None), array)


@pytest.mark.parametrize(
    ("convert", "argument"), [(to_jax, torch.ones(2)), (to_torch, jnp.ones(2))]
)
def test_copy_must_be_one_of_three(convert, argument):
    with pytest.raises(TypeError, match=r"expected copy to be True, False or None. Got 'never'"):
        convert(argument, copy="never")


# -------------------------------------------------------------------------- what has no counterpart


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("not reached")


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)


REFUSED_TENSORS = {
    "conjugated": (
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        "conjugate bit set. Pass tensor.resolve_conj",
    ),
    "negated": (
        lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
        "negative bit set. Pass tensor.resolve_neg",
    ),
    "sparse": (
        lambda: torch.ones(3, 3).to_sparse(),
        "layout torch.sparse_coo. Pass tensor.to_dense",
    ),
    "mkldnn": (lambda: torch.ones(3, 3).to_mkldnn(), "layout torch._mkldnn. Pass tensor.to_dense"),
    "quantized": (quantized, "quantized dtype torch.qint8. Pass tensor.dequantize"),
    "nested": (nested, "a nested tensor"),
    "meta": (lambda: torch.ones(3, device="meta"), "device meta"),
    "complex32": (lambda: torch.zeros(3, dtype=torch.complex32), "dtype torch.complex32"),
    "subclass": (
        lambda: torch.ones(3).as_subclass(Subclass),
        "a Subclass, which is not plain memory",
    ),
    "numpy": (lambda: np.ones(3), "expected a torch.Tensor. Got ndarray"),
    "jax": (lambda: jnp.ones(3), "expected a torch.Tensor"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
@pytest.mark.parametrize("copy_", [False, None, True])
def test_tensors_without_a_counterpart_are_refused(make, message, copy_):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ComplexHalf")
        tensor = make()
    with pytest.raises(TypeError, match=message):
        to_jax(tensor, copy=copy_)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_tensors_inside_torch_func_are_refused(transform):
    with pytest.raises(TypeError, match=r"inside a torch.func transform"):
        transform(to_jax)(torch.ones(3))


def test_a_tensor_that_requires_grad_is_detached():
    # Trap 1: torch refuses to export it.
    parameter = torch.nn.Parameter(numbers(3, 4))
    assert shares_memory(parameter, to_jax(parameter))
    assert shares_memory(parameter, to_jax(parameter.view(12)))
    assert parameter.requires_grad


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


REFUSED_ARRAYS = {
    "key": (lambda: jax.random.key(0), TypeError, "dtype that torch can hold. Got key<fry>"),
    "int4": (lambda: jnp.ones(4, jnp.int4), TypeError, "Got int4"),
    "deleted": (deleted, ValueError, "deleted or donated"),
    "numpy": (lambda: np.ones(3), TypeError, "expected a jax.Array. Got ndarray"),
    "torch": (lambda: torch.ones(3), TypeError, "expected a jax.Array. Got Tensor"),
}


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED_ARRAYS.values(), ids=REFUSED_ARRAYS)
def test_arrays_without_a_counterpart_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        to_torch(make())


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_tracers_are_refused_and_pointed_to_as_jax(transform):
    with pytest.raises(TypeError, match=r"being traced by jit, grad or vmap.*as_jax"):
        transform(to_torch)(jnp.ones(3))


# ------------------------------------------------------------------------------------- immutability


def optimizer_step(tensor):
    parameter = torch.nn.Parameter(tensor)
    parameter.sum().backward()
    torch.optim.SGD([parameter], lr=0.1).step()


WRITES = {
    "add_": lambda t: t.add_(1),
    "setitem": lambda t: t.__setitem__(0, 1.0),
    "copy_": lambda t: t.copy_(torch.zeros(4, 6)),
    "out=": lambda t: torch.add(torch.ones(4, 6), 1, out=t),
    "view": lambda t: t.view(24).add_(1),
    "item view": lambda t: t[0].add_(1),
    "transpose": lambda t: t.T.mul_(2),
    "split": lambda t: t.split(2)[1].mul_(2),
    "iteration": lambda t: next(iter(t)).add_(1),
    "expand": lambda t: t.expand(2, 4, 6)[0].add_(1),
    "bits": lambda t: t.view(torch.int32).add_(1),
    "contiguous": lambda t: t.contiguous().add_(1),
    "to": lambda t: t.to(torch.float32).add_(1),
    "detach": lambda t: t.detach().add_(1),
    "data": lambda t: t.data.add_(1),
    "no_grad": torch.no_grad()(lambda t: t.add_(1)),
    "inference_mode": torch.inference_mode()(lambda t: t.add_(1)),
    "inference_mode view": torch.inference_mode()(lambda t: t[0].add_(1)),
    "foreach": lambda t: torch._foreach_add_([t], 1),
    "inplace activation": lambda t: torch.nn.functional.relu(t, inplace=True),
    "init": lambda t: torch.nn.init.zeros_(t),
    "resize_": lambda t: t.resize_(2),
    "optimizer": optimizer_step,
    "parameter": lambda t: torch.nn.Parameter(t).data.zero_(),
    "numpy": lambda t: t.numpy().__setitem__(0, 1.0),
    "asarray": lambda t: np.asarray(t).__setitem__(0, 1.0),
    "requires_grad": lambda t: t.requires_grad_().add_(1),
    # ways round torch's dispatcher, which would be writers that nobody sees
    "untyped_storage": lambda t: t.untyped_storage().fill_(0),
    "storage": lambda t: t.storage().fill_(0),
    "view's storage": lambda t: t[1:].untyped_storage().fill_(0),
    "set_": lambda t: torch.empty(0).set_(t).add_(1),
    "set_ to the storage": lambda t: torch.empty(0).set_(t.untyped_storage()).add_(1),
    "share_memory_": lambda t: t.share_memory_().add_(1),
    "torch.from_dlpack": lambda t: torch.from_dlpack(t).add_(1),
    "np.from_dlpack": lambda t: np.from_dlpack(t).__setitem__(0, 1),
    "apply_": lambda t: t.apply_(lambda element: 0.0),
    "unbound numpy": lambda t: torch.Tensor.numpy(t).__setitem__(0, 1),
    "as_subclass": lambda t: t.as_subclass(torch.Tensor).add_(1),
    "torch.asarray": lambda t: torch.asarray(t).add_(1),
    "functionalize": lambda t: torch.func.functionalize(lambda x: x.add_(1))(t),
    "vmap": lambda t: torch.func.vmap(lambda x: x.add_(1))(t),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_shared_array_cannot_be_written_by_torch(write):
    # Trap 5: DLPack hands torch a writable alias of an immutable array.
    array = jnp.arange(24.0).reshape(4, 6)
    tensor = to_torch(array)
    assert shares_memory(tensor, array)
    refused = r"read-only|in-place operation|not supported for tensor subclasses"
    with pytest.raises((RuntimeError, ValueError), match=refused):
        write(tensor)
    np.testing.assert_array_equal(np.asarray(array), np.arange(24.0).reshape(4, 6))


def set_data(tensor):
    other = torch.empty(4, 6)
    other.data = tensor
    other.add_(1)


OPEN = {
    "data of another": set_data,
    "to_dlpack": lambda t: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t)).add_(1),
    "data_ptr": lambda t: ctypes.memset(t.data_ptr(), 0, 8),
}


@pytest.mark.parametrize("write", OPEN.values(), ids=OPEN)
def test_the_ways_round_that_are_written_down_are_open(write):
    """As ReadOnlyTensor's docstring has it: where one of these closes, it is to be mended."""
    array = jnp.arange(24.0).reshape(4, 6) + 1
    write(to_torch(array))
    assert not np.array_equal(np.asarray(array), np.arange(24.0).reshape(4, 6) + 1)


def test_what_is_refused_for_writing_can_be_read():
    array = jnp.arange(6.0)
    tensor = to_torch(array)
    with pytest.raises(RuntimeError, match=r"np.asarray\(tensor\) or to_jax.*tensor.clone\(\)"):
        torch.from_dlpack(tensor)
    assert shares_memory(tensor, to_jax(tensor))
    assert np.asarray(tensor).ctypes.data == array.unsafe_buffer_pointer()
    torch.from_dlpack(tensor, copy=True).add_(1)  # a copy is the reader's own
    assert jnp.asarray(np.asarray(tensor)).tolist() == array.tolist() == list(range(6))


def test_a_saved_read_only_tensor_is_loaded_as_an_ordinary_one():
    tensor, file = to_torch(jnp.arange(6.0)), io.BytesIO()
    torch.save({"tensor": tensor}, file)
    file.seek(0)
    for loaded in (torch.load(file)["tensor"], pickle.loads(pickle.dumps(tensor))):
        assert type(loaded) is torch.Tensor and loaded.tolist() == list(range(6))
        loaded.add_(1)
    assert tensor.tolist() == list(range(6))


def test_a_read_only_tensor_is_otherwise_a_tensor():
    array = jnp.arange(12.0).reshape(3, 4)
    tensor = to_torch(array)
    plain = torch.arange(12.0).reshape(3, 4)
    torch.testing.assert_close(tensor * 2, plain * 2)
    assert (
        type(tensor * 2) is torch.Tensor
        and type(tensor.clone()) is torch.Tensor
        and type(tensor[0]) is ReadOnlyTensor
    )
    tensor.clone().add_(1)
    copy.deepcopy(tensor).add_(1)
    assert repr(tensor).endswith("read_only=True)") and tensor.tolist() == plain.tolist()
    np.testing.assert_array_equal(tensor.numpy(), plain.numpy())
    np.testing.assert_array_equal(np.asarray(tensor, dtype=np.float64), plain.double().numpy())
    torch.save(tensor, io.BytesIO())
    layer = torch.nn.Linear(4, 2)
    layer(tensor).sum().backward()  # may be saved for backward, which an inference tensor may not
    torch.testing.assert_close(layer.weight.grad, plain.sum(0).expand(2, 4))
    leaf = to_torch(array).requires_grad_()
    (leaf * leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * plain)
    np.testing.assert_array_equal(np.asarray(array), plain.numpy())


def test_a_read_only_tensor_goes_back_to_jax_without_a_copy():
    array = jnp.arange(12.0)
    assert to_jax(to_torch(array)).unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    assert (
        to_jax(to_torch(array).view(3, 4)).unsafe_buffer_pointer() == array.unsafe_buffer_pointer()
    )


def test_donating_an_array_does_not_let_xla_write_into_torch_memory():
    tensor = numbers(64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        result = jax.jit(lambda x: x * 0, donate_argnums=0)(to_jax(tensor))
    result.block_until_ready()
    torch.testing.assert_close(tensor, numbers(64))


def test_adopted_memory_may_be_written():
    tensor = adopt(jnp.arange(3.0))
    assert type(tensor) is torch.Tensor
    torch.testing.assert_close(tensor.add_(1), torch.tensor([1.0, 2.0, 3.0]))


def test_lent_shares_memory_and_lets_torch_read():
    first, second = jnp.arange(3.0), jnp.ones((2, 2), jnp.bfloat16)
    with lent(first, second) as (one, two):
        assert type(one) is torch.Tensor and two.dtype == torch.bfloat16
        assert shares_memory(one, first) and shares_memory(two, second)
        torch.testing.assert_close(one + 1, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "write", [lambda t: t.add_(1), lambda t: t[1:].zero_(), lambda t: t.detach().mul_(2)]
)
def test_lent_notices_a_write(mode, write):
    noticed = pytest.raises(LentMemoryWritten, match=r"its argument\(s\) \[1\].*clone\(\)")
    with noticed, lent(jnp.ones(3) * 1, jnp.ones(3) * 2) as (_, tensor), mode():
        write(tensor)


def test_lent_works_inside_inference_mode():
    with torch.inference_mode(), lent(jnp.ones(3) * 1) as (tensor,):
        assert not tensor.is_inference()
    noticed = pytest.raises(LentMemoryWritten)
    with noticed, torch.inference_mode(), lent(jnp.ones(3) * 1) as (tensor,):
        tensor.add_(1)


def test_lent_does_not_hide_an_error():
    def write_and_fail(tensor):
        tensor.add_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), lent(jnp.ones(3) * 1) as (tensor,):
        write_and_fail(tensor)


# -------------------------------------------------------------------------------- lifetime and time


def test_memory_outlives_its_first_owner():
    # Trap 6: a capsule is used up by its first reader, so every call must make its own.
    arrays = []
    for i in range(20):
        tensor = torch.full((1000,), float(i))
        arrays += [to_jax(tensor), to_jax(tensor)]
        del tensor
    gc.collect()
    torch.full((40000,), -1.0)
    assert [float(array[-1]) for array in arrays] == [float(i) for i in range(20) for _ in range(2)]
    tensors = [to_torch(jnp.full(1000, float(i))) for i in range(20)]
    gc.collect()
    jnp.full(20000, -1.0).block_until_ready()
    assert [tensor[-1].item() for tensor in tensors] == [float(i) for i in range(20)]


def test_an_array_still_being_computed_is_waited_for():
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: y @ x, x))
    eye = jnp.eye(500)
    slow(eye).block_until_ready()
    assert to_torch(slow(eye * 1)).diagonal().sum().item() == 500


# ---------------------------------------------------------------------------------------------- GPU

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or jax.default_backend() != "gpu",
    reason="torch and JAX both need a GPU",
)


@pytest.mark.gpu
@needs_gpu
def test_gpu_memory_is_shared_on_its_device_and_streams_wait():
    tensor = torch.zeros(4096, 4096, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            tensor += 1  # still running when JAX is handed the memory
        array = to_jax(tensor)
        assert shares_memory(tensor, array) and array.device.platform == "gpu"
        assert float(array.mean()) == 50
    back = to_torch(array * 2)
    assert back.is_cuda and back.mean().item() == 100


@pytest.mark.gpu
@needs_gpu
def test_cudas_array_interface_says_read_only():
    array = jnp.ones(4)
    pointer = array.unsafe_buffer_pointer()
    assert to_torch(array).__cuda_array_interface__["data"] == (pointer, True)


@pytest.mark.gpu
@needs_gpu
def test_pinned_memory_stays_on_the_cpu():
    tensor = torch.ones(64).pin_memory()
    with pytest.raises(ValueError, match="pinned"):
        to_jax(tensor)
    assert to_jax(tensor, copy=True).device.platform == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_on_a_gpu_that_is_not_current():
    tensor = torch.ones(64, device="cuda:1")
    assert to_jax(tensor).device.local_hardware_id == 1 and torch.cuda.current_device() == 0


# The end of the process


def test_what_is_lent_is_forgotten_when_it_is_let_go_of():
    gc.collect()
    before = len(dlpack._lent)
    x = torch.ones(1000)
    array = to_jax(x)
    assert len(dlpack._lent) == before + 1
    del array
    gc.collect()
    dlpack._wait_until_let_go()
    assert len(dlpack._lent) == before


def test_the_end_waits_for_what_jax_lets_go_of_on_its_own_thread():
    """Without the wait one process in four aborts here."""
    script = """
        import torch, heedful
        q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
        out = heedful.attention(q, k, v, backend="jax:flash")
    """
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
        assert ended.returncode == 0
