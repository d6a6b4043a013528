"""For every test: JAX is strict, Hypothesis repeatable in CI, and a worker keeps to its core."""

import gc
import os

import pytest
from hypothesis import settings

# As environment variables, so that processes which a test starts are as strict as the test.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core, and XLA (NPROC), torch and BLAS would each take all cores.
    os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# What JAX traces and lowers are objects that live: to look for garbage among them takes a sixth of the
# time.
gc.freeze()
gc.set_threshold(100_000, 20, 20)

# No deadline: the first example of a shape also compiles.
settings.register_profile("heedful", deadline=None, max_examples=25, derandomize="CI" in os.environ)
settings.register_profile("many", deadline=None, max_examples=5000, derandomize=False)
settings.load_profile("heedful")

# What takes longest begins first, so that in the end no worker waits for another one's last test.
LONGEST = (
    "test_any_combination",
    "test_no_device_talks_and_each_holds_its_part",
    "test_inductor",
    "test_its_process_killed_during_a_call",
    "test_nothing_of_it_is_imported_where_the_user_is",
    "test_every_honest_backend_passes_with_three_seeds",
    "test_snippets_run",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


pytest_plugins = ["pytester"]  # for tests of what others' tests are made with

# Their assertions are shown with their values, like those of the tests themselves.
pytest.register_assert_rewrite("definition", "reference")
