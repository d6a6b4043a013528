"""heedful's sessions. Those with a star are the tests, and run unasked."""

from functools import partial

import nox

nox.needs_version = ">=2025.5.1"
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"  # uv would not read where pip is told to find torch

PYTHONS = nox.project.python_versions(nox.project.load_toml("packages/core-jax/pyproject.toml"))

# torch and what goes with it are over a gigabyte, so one environment serves all sessions that need
# them. Its Python is the one that torch is pinned for.
shared_session = partial(nox.session, venv_backend="none", requires=["environment"])

# What the tests compile is compiled once for all sessions of one JAX, and for the next run.
COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}

PACKAGES = ("packages/core-jax", "packages/bridge-torch", "packages/crosscheck")
TEST_TOOLS = ("hypothesis", "pytest", "pytest-xdist")
PYTEST = ("pytest", "-n", "auto")


def install(session: nox.Session, *requirements: str) -> None:
    """Installs exactly what constraints/ pins, the packages' build backend included."""
    pins = f"constraints/py{'311' if session.python == '3.11' else '312'}.txt"
    session.install("--constraint", pins, "--build-constraint", pins, *requirements)


def compiled(session: nox.Session) -> dict[str, str]:
    """Where JAX keeps what it has compiled, and that it keeps it all."""
    return {"JAX_COMPILATION_CACHE_DIR": str(session.cache_dir.parent / "compiled")} | COMPILED


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Runs a program of the shared environment."""
    path = session.cache_dir.parent / "environment" / "bin" / program
    if not path.exists():
        session.error("the session `environment`, which this one needs, did not run: see above why")
    session.run(str(path), *arguments, external=True)


@nox.session(python=PYTHONS)
def core(session: nox.Session) -> None:
    """Test heedful and its judge with no torch installed, on two generations of JAX."""
    install(session, "packages/core-jax", "packages/crosscheck", *TEST_TOOLS)
    session.env.update(compiled(session))
    session.run(*PYTEST, "tests/core", "tests/crosscheck", *session.posargs)


@nox.session(python="3.11", default=False)
def environment(session: nox.Session) -> None:
    """Make the environment that the sessions below share: all packages, torch, every tool."""
    install(session, *PACKAGES, *TEST_TOOLS, "mypy", "onnx", "ruff")


@shared_session()
@nox.parametrize("backend", ["torch:sdpa-math", "torch:sdpa-flash"])
def bridge(session: nox.Session, backend: str) -> None:
    """Test heedful-torch; the backend must be able to run."""
    session.env.update({"HEEDFUL_REQUIRE_BACKENDS": backend} | compiled(session))
    run(session, *PYTEST, "tests/bridge", *session.posargs)


@shared_session(name="bridge-gpu", default=False)
@nox.parametrize("backend", ["torch:sdpa-efficient", "torch:sdpa-cudnn"])
def bridge_gpu(session: nox.Session, backend: str) -> None:
    """Test heedful-torch; the backend, which needs a GPU, must be able to run."""
    session.env.update({"HEEDFUL_REQUIRE_BACKENDS": backend} | compiled(session))
    run(session, *PYTEST, "tests/bridge", *session.posargs)


@shared_session()
def conformance(session: nox.Session) -> None:
    """Test against ONNX's cases, backends broken on purpose, and what the README promises."""
    session.env.update(compiled(session))
    run(session, *PYTEST, "tests/conformance", *session.posargs)


@shared_session()
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    run(session, "ruff", "check")
    run(session, "ruff", "format", "--check")
    run(session, "mypy", *(f"{package}/src" for package in PACKAGES))


@shared_session(default=False)
def crosscheck(session: nox.Session) -> None:
    """Run the main job, with its options after `--`: which backends agree with the oracle?"""
    run(session, "heedful", "crosscheck", *session.posargs)


@shared_session(default=False)
def bench(session: nox.Session) -> None:
    """Time jax:flash, jax:plain, jax.nn and torch's SDPA in one run, their outputs checked."""
    run(session, "python", "benchmarks/attention.py", *session.posargs)


@shared_session(default=False)
def longseq(session: nox.Session) -> None:
    """Attend over 131072 keys in linear memory, and print the peak."""
    run(session, "python", "benchmarks/longseq.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Test what needs a GPU, in the Python on PATH with its own CUDA builds of jax and torch."""
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs, external=True)
