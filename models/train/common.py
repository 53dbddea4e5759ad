"""What the three trainings share: the ONNX graph, its quantization, the package, the evaluation."""

import hashlib
import json
import pathlib
import tempfile

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import net

TRAIN = pathlib.Path(__file__).resolve().parent
MODELS = TRAIN.parent
HELDOUT = TRAIN / "heldout"
SAMPLES = TRAIN / "samples"


def export(path, layers, shape):
    """Writes the layers as an ONNX graph: batch of 1, static shapes, float32, logits out."""
    nodes, inits, last, size = [], [], "input", list(shape)

    def add(op, inputs, **attributes):
        nonlocal last
        name = f"{op.lower()}{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name + "_out"], name=name, **attributes))
        last = name + "_out"

    def constant(value, name):
        inits.append(numpy_helper.from_array(value, name))
        return name

    for i, layer in enumerate(layers):
        if isinstance(layer, net.Conv):
            w, b, s = constant(layer.w, f"w{i}"), constant(layer.b, f"b{i}"), layer.stride
            add("Conv", [last, w, b], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[s, s])
            size = [1, len(layer.w), -(-size[2] // s), -(-size[3] // s)]
        elif isinstance(layer, net.Dense):
            if len(size) > 2:
                size = [1, int(np.prod(size))]
                add("Reshape", [last, constant(np.array(size, np.int64), f"shape{i}")])
            # One row for each output, so that weights per channel means per output.
            w = constant(np.ascontiguousarray(layer.w.T), f"w{i}")
            add("Gemm", [last, w, constant(layer.b, f"b{i}")], transB=1)
            size = [1, len(layer.b)]
        else:
            add("Relu", [last])
    nodes[-1].output[0] = "output"
    graph = helper.make_graph(
        nodes,
        path.name.split(".")[0],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, size)],
        inits,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


class _Rows(CalibrationDataReader):
    def __init__(self, rows):
        self.rows = iter(rows)

    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {"input": row[None].astype(np.float32)}


def quantize(fp32, int8, rows, loss):
    """Static QDQ quantization, int8 weights per channel. `rows` calibrate; the activation type with
    the smaller `loss(path)`, measured on validation data, is kept (int8 where they are equal)."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        # Shapes only: the optimizer may merge nodes into ones that the quantizer leaves in float.
        quant_pre_process(str(fp32), str(folder / "ready.onnx"), skip_optimization=True, skip_symbolic_shape=True)
        best = None
        for kind in [QuantType.QInt8, QuantType.QUInt8]:
            path = folder / f"{kind}.onnx"
            quantize_static(
                str(folder / "ready.onnx"), str(path), _Rows(rows), quant_format=QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=["Conv", "Gemm"], weight_type=QuantType.QInt8, activation_type=kind,
            )
            value = loss(path)
            if best is None or value < best[0]:
                best = (value, kind, path.read_bytes())
    model = onnx.load_from_string(best[2])
    model.ir_version = min(model.ir_version, 8)
    onnx.save(model, int8)
    return best[1]


def run(path, rows):
    """The outputs for prepared inputs, run one at a time as the daemon does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": row[None].astype(np.float32)})[0] for row in rows])


def softmax(logits, temperature=1.0):
    e = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    return e / e.sum(1, keepdims=True)


def log_loss(logits, truth, temperature=1.0):
    return float(-np.log(softmax(logits, temperature)[np.arange(len(truth)), truth] + 1e-12).mean())


def fit_temperature(logits, truth):
    """Temperature of the least log loss (Guo et al. 2017)."""
    grid = np.geomspace(0.5, 4, 61).round(3)
    return float(grid[np.argmin([log_loss(logits, truth, t) for t in grid])])


def fit_threshold(chance, truth, wanted):
    """The smallest confidence above which at least `wanted` of the answers are right."""
    right, best = chance.argmax(1) == truth, chance.max(1)
    for threshold in np.arange(0.6, 0.91, 0.05):
        if right[best >= threshold].mean() >= wanted:
            break
    return float(round(threshold, 2))


def start(name):
    """The package's folder, without what an earlier run left in `golden` and among the samples."""
    golden = MODELS / name / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    HELDOUT.mkdir(exist_ok=True)
    SAMPLES.mkdir(exist_ok=True)
    prefix = {"digits": "digit", "notes": "note"}.get(name, name)
    for old in [*golden.iterdir(), *SAMPLES.glob(f"{prefix}-*")]:
        old.unlink()
    expected = SAMPLES / "expected.json"
    if expected.exists():
        known = json.loads(expected.read_text())
        kept = {file: value for file, value in known.items() if not file.startswith(prefix + "-")}
        expected.write_text(json.dumps(kept, indent=2) + "\n")
    return MODELS / name


def _merge(path, key, value):
    known = json.loads(path.read_text()) if path.exists() else {}
    known[key] = value
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")


def write_heldout(name, records):
    with open(HELDOUT / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for value, label in records:
            file.write(json.dumps({"input": value, "label": label}, separators=(",", ":")) + "\n")


def read_heldout(name):
    with open(HELDOUT / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_accuracy(name, fp32, int8, n):
    _merge(HELDOUT / "accuracy.json", name, {"fp32": round(fp32, 4), "int8": round(int8, 4), "n": n})
    print(f"{name}: fp32 {fp32:.4f}, int8 {int8:.4f}, n {n}", flush=True)


def write_sample(file, content, task, expect, certain):
    (SAMPLES / file).write_bytes(content)
    _merge(SAMPLES / "expected.json", file, {"task": task, "expect": expect, "certain": certain})


def card(name, title, text, fp32, int8, n, activation, limits, details=""):
    blank = "\n\n"
    size = lambda p: (MODELS / name / f"{name}.{p}.onnx").stat().st_size
    (MODELS / name / "README.md").write_text(
        f"# {title}\n\n{text.strip()}\n\n## Accuracy\n\n"
        f"On the {n} held-out cases of `models/train/heldout/{name}.jsonl`, measured with onnxruntime:\n\n"
        f"| variant | accuracy | n | file size, bytes |\n|---|---|---|---|\n"
        f"| fp32 | {fp32:.2%} | {n} | {size('fp32'):,} |\n| int8 | {int8:.2%} | {n} | {size('int8'):,} |\n\n"
        f"int8: static QDQ quantization, weights int8 per channel, activations "
        f"{'int8' if activation == QuantType.QInt8 else 'uint8'}, calibrated on training data.\n\n"
        f"{details and details.strip() + blank}## Limits\n\n{limits.strip()}\n\n## Rerun\n\n"
        "`models/train/run` trains, quantizes, evaluates and writes this package again, with fixed seeds.\n"
    )


def numbers(values):
    return "[" + ", ".join(f"{v:.6g}" for v in values) + "]"


def package(name, task, source, data, input_lines, output_lines, threshold, temperature, instruction, golden, labels=None):
    """Writes the manifest, the labels and the licence; the variants must be there."""
    folder = MODELS / name
    lines = [f'name = "{name}"', 'version = "1.0.0"', f'task = "{task}"', 'license = "Apache-2.0"']
    lines += [f"source = {json.dumps(source)}", ""]
    for precision in ["fp32", "int8"]:
        file = f"{name}.{precision}.onnx"
        digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        lines += ["[[variant]]", f'file = "{file}"', f'precision = "{precision}"', f'sha256 = "{digest}"', ""]
    lines += ["[input]", *input_lines, "", "[output]", *output_lines, ""]
    lines += ["[confidence]", f"threshold = {threshold}", f"temperature = {float(temperature)}", ""]
    lines += ["[uplink]", f"instruction = {json.dumps(instruction, ensure_ascii=False)}", ""]
    for file, expect in golden:
        lines += ["[[golden]]", f'input = "golden/{file}"', f'expect = "{expect}"', ""]
    (folder / "model.toml").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    if labels:
        (folder / "labels.txt").write_text("\n".join(labels) + "\n")
    (folder / "LICENSE").write_text(
        "SPDX-License-Identifier: Apache-2.0\n\n"
        "The weights were trained by the scripts in models/train and are licensed under the Apache License, Version 2.0:\n"
        f"https://www.apache.org/licenses/LICENSE-2.0\n\n{data}\n"
    )
