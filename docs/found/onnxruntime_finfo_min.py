"""ONNX Runtime's Attention gives 0 for a query whose additive mask is finfo.min at every key.

    pip install onnx onnxruntime
    python onnxruntime_finfo_min.py

All its scores are alike there, as beside the next larger number, and out is the mean of V. ONNX hides
a key by a boolean mask or by -inf; finfo.min is a number.
"""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

FLOAT = TensorProto.FLOAT
shapes = {"q": (1, 1, 1, 8), "k": (1, 1, 4, 8), "v": (1, 1, 4, 8), "mask": (1, 4)}
node = helper.make_node("Attention", list(shapes), ["out"])
inputs = [helper.make_tensor_value_info(n, FLOAT, shape) for n, shape in shapes.items()]
outputs = [helper.make_tensor_value_info("out", FLOAT, shapes["q"])]
graph = helper.make_graph([node], "attention", inputs, outputs)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString())

random = np.random.default_rng(0)
q, k, v = (random.standard_normal(shapes[n], np.float32) for n in "qkv")
lowest = np.finfo(np.float32).min
print(f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}")
for value in (lowest, np.nextafter(lowest, np.float32(0))):
    mask = np.full(shapes["mask"], value, np.float32)
    (out,) = session.run(None, {"q": q, "k": k, "v": v, "mask": mask})
    print(
        f"a mask of {value:.8g}: off the mean of V by {np.abs(out[0, 0, 0] - v[0, 0].mean(0)).max():.1e}"
    )
