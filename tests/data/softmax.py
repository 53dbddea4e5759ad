"""Writes the package `softmax`: a quantized graph that some runtimes answer wrongly in silence.

Run with the virtual environment of models/train: models/train/.venv/bin/python tests/data/softmax.py
DequantizeLinear, Softmax and QuantizeLinear in a row look like an element-wise function, which softmax is not.
The expected numbers are onnxruntime's.
"""

import hashlib
import json
import pathlib

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, save

FOLDER = pathlib.Path(__file__).resolve().parent / "softmax"
FOLDER.mkdir(exist_ok=True)


def scalar(name, value, dtype):
    return numpy_helper.from_array(np.array(value, dtype), name)


nodes = [
    helper.make_node("QuantizeLinear", ["input", "s_in", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "s_in", "zero"], ["d"]),
    helper.make_node("Softmax", ["d"], ["p"], axis=1),
    helper.make_node("QuantizeLinear", ["p", "s_out", "z_out"], ["qp"]),
    helper.make_node("DequantizeLinear", ["qp", "s_out", "z_out"], ["output"]),
]
constants = [
    scalar("s_in", 0.05, np.float32), scalar("zero", 0, np.int8), scalar("s_out", 1 / 256, np.float32), scalar("z_out", -128, np.int8),
]
graph = helper.make_graph(
    nodes, "softmax", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 4])],
    [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 4])], constants,
)
path = FOLDER / "softmax.onnx"
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
values = [0.5, 1.0, -0.5, 2.0]
found = ort.InferenceSession(str(path)).run(None, {"input": np.array([values], np.float32)})[0][0]
(FOLDER / "case.json").write_text(json.dumps({"input": {"tensor": {"data": values}}}) + "\n")
(FOLDER / "model.toml").write_text(f'''name = "softmax"
version = "1.0.0"
task = "tensor.run"

[[variant]]
file = "softmax.onnx"
precision = "int8"
sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"

[input]
kind = "tensor"
shape = [1, 4]

[output]
kind = "tensor"

[[golden]]
input = "case.json"
expect = {[round(float(value), 6) for value in found]}
tolerance = 0.004
''')
