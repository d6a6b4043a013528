"""The three frameworks from which heedful is called, as the tests see them.

Each makes its arrays out of NumPy's, gives them back as float64, and pulls cotangents back through a
function; NumPy itself differentiates nothing.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class NumpyCaller:
    framework = "numpy"

    def array(self, x):
        return x

    def dtype(self, x):
        return str(x.dtype)

    def float64(self, x):
        assert isinstance(x, np.ndarray)
        return x.astype(np.float64)

    def pull_back(self, f, primals, constants, cotangents):
        """f's results, and the cotangents of the primals; None where nothing differentiates."""
        return f(primals, constants), None


# A test compiles a program to run it once: what XLA and LLVM spend on making it fast never comes back.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # later ones have no such option
    QUICKLY["xla_cpu_use_fusion_emitters"] = False


class JaxCaller:
    framework = "jax"

    def array(self, x):
        return jnp.asarray(x, x.dtype) if x.dtype in DTYPES.values() else jnp.asarray(x)

    def dtype(self, x):
        return str(x.dtype)

    def float64(self, x):
        assert isinstance(x, jax.Array)
        return np.asarray(x).astype(np.float64)

    def pull_back(self, f, primals, constants, cotangents):
        def forward_and_back(primals, constants, cotangents):
            results, back = jax.vjp(lambda primals: f(primals, constants), primals)
            return results, back(cotangents)[0]

        run = jax.jit(forward_and_back, compiler_options=QUICKLY)
        return run(primals, constants, cotangents)


class TorchCaller:
    framework = "torch"

    def __init__(self, on_gpu=False):
        self.on_gpu = on_gpu  # where there is one

    @property
    def device(self):
        import torch

        return "cuda" if self.on_gpu and torch.cuda.is_available() else "cpu"

    def array(self, x):
        import torch

        if x.dtype == DTYPES["bfloat16"]:  # which torch.from_numpy does not know
            return torch.tensor(x.astype(np.float32), device=self.device).to(torch.bfloat16)
        return torch.tensor(x, device=self.device)

    def dtype(self, x):
        return str(x.dtype).removeprefix("torch.")

    def float64(self, x):
        import torch

        assert isinstance(x, torch.Tensor) and x.device.type == self.device
        return x.detach().cpu().to(torch.float64).numpy()

    def pull_back(self, f, primals, constants, cotangents):
        import torch

        leaves = {name: x.clone().requires_grad_() for name, x in primals.items()}
        results = f(leaves, constants)
        gradients = torch.autograd.grad(results, list(leaves.values()), cotangents)
        return results, dict(zip(leaves, gradients, strict=True))
