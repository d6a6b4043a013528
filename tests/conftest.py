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

pytest_plugins = ["pytester"]  # for tests of what others' tests are made with

# Their assertions are shown with their values, like those of the tests themselves.
pytest.register_assert_rewrite("definition", "reference")
