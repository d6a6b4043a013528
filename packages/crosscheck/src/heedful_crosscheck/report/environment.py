"""What may change a result: versions, machine, flags."""

import os
import platform
import sys
import time
from typing import Any

import jax
import jaxlib.version
import numpy as np

import heedful


def environment() -> dict[str, Any]:
    """What may change a result: versions, machine, flags."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "heedful": heedful.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "torch": torch and torch.__version__,  # where somebody imported it
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "jax_devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "torch_cuda_device": torch.cuda.get_device_name() if torch and on_gpu else None,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
