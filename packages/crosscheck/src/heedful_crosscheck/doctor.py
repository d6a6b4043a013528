"""What is installed here, in which version, and what of it does not work: `heedful doctor`.

Which packages count is what heedful's own metadata names, extras included, and whoever else declares
backends: there is no list here. What is broken is told in its own words.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distributions, entry_points, requires, version
from typing import Any

from heedful.dispatch.registry import BACKENDS, in_a_line
from heedful_crosscheck.abilities import Here, here, load_torch
from heedful_crosscheck.report import environment

# Variables that change what is chosen or computed, by how their names begin.
VARIABLES = (
    "HEEDFUL_", "JAX_", "XLA_", "TF_CPP_", "CUDA_", "NVIDIA_VISIBLE", "TORCH", "PYTORCH_", "TRITON_",
    "FLASH_ATTENTION_", "ONEDNN_", "MKL_", "OMP_", "OPENBLAS_", "ATEN_", "CUBLAS", "CUDNN_",
)  # fmt: skip
SECRET = re.compile("key|token|secret|password|credential", re.IGNORECASE)
MEASURED = ("date", "python", "platform", "machine", "cpu_count")  # of the environment, no version


@dataclass(frozen=True)
class Examination:
    """What `heedful doctor` says; `str` of it is a text for a bug report.

    Attributes:
        machine: Python and what it runs on.
        packages: by name the version; None where it is not installed.
        devices: what each framework sees, or why it sees nothing; and the driver.
        variables: of the environment, those that are set.
        backends: every backend here.
    """

    machine: dict[str, str]
    packages: dict[str, str | None]
    devices: dict[str, str]
    variables: dict[str, str]
    backends: Here

    def __str__(self) -> str:
        installed = {n: v for n, v in self.packages.items() if v is not None}
        missing = [n for n, v in self.packages.items() if v is None]
        return "\n".join(
            [
                *_lines("machine", self.machine),
                *_lines("packages", installed),
                f"  not installed: {', '.join(missing) or 'none of what heedful can use'}",
                *_lines("devices", self.devices),
                *_lines("environment", self.variables or {"nothing": "of what heedful looks at"}),
                *_lines("chosen, without backend=", self.backends.chosen),
                *_lines("backends that run here", {b.backend: b.taken for b in self._able}),
                *_lines("backends that do not, and why", self._unable),
            ]
        )

    @property
    def _able(self) -> list[Any]:
        return [b for b in self.backends.backends if not b.unable]

    @property
    def _unable(self) -> dict[str, str]:
        return {b.backend: "; ".join(b.unable) for b in self.backends.backends if b.unable}

    def as_json(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self) | {"backends": self.backends.as_json()}


def _lines(title: str, said: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, said), default=0)
    yield f"{title}:"
    for name, text in said.items():
        yield f"  {name:<{width}}  {text}"


def examine() -> Examination:
    """Looks at everything; imports torch, and what backends need."""
    broken = load_torch()
    found = environment()
    devices = {"jax": ", ".join(found["jax_devices"]), "torch": broken or _of_torch()}
    if driver := _driver():
        devices["driver"] = driver
    return Examination(
        {name: str(found[name]) for name in MEASURED},
        packages(),
        devices,
        {n: x for n, x in sorted(os.environ.items()) if _counts(n)},
        here(),
    )


def packages() -> dict[str, str | None]:
    """By name the version of everything that heedful's packages, and whoever declares backends, name."""
    declaring = {point.dist.name for point in entry_points(group=BACKENDS) if point.dist}
    # JAX finds the code for a GPU by these.
    plugins = {point.dist.name for point in entry_points(group="jax_plugins") if point.dist}
    roots = sorted(declaring | {"heedful-crosscheck"}, key=lambda name: (name != "heedful", name))
    needed = [_name(line) for root in roots for line in requires(root) or ()]
    first = [*roots, "jax", "jaxlib", *sorted(plugins), "numpy"]
    return {_canonical(name): _version(name) for name in [*first, *sorted(needed)]}


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found.group() if found else requirement


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    """The version; where there are several of one name on the path, all: the first is imported."""
    try:
        used = version(name)
    except PackageNotFoundError:
        return None
    others = {d.version for d in distributions(name=name)} - {used}
    return f"{used}, and behind it {', '.join(sorted(others))}" if others else used


def _counts(variable: str) -> bool:
    return variable.startswith(VARIABLES) and not SECRET.search(variable)


def _of_torch() -> str:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if not torch.cuda.is_available():
        return f"{built}, sees no GPU"
    seen = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        seen.append(f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch's own
    return f"{built}, cuDNN {cudnn or 'none'}: {'; '.join(seen)}"


def _driver() -> str | None:
    """NVIDIA's, where its tool is here; what that says where it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = ("--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run([tool, *asked], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return in_a_line(error)
    return "; ".join((done.stdout or done.stderr).strip().splitlines())
