#!/usr/bin/env python3
"""Writes quantized graphs with inputs and onnxruntime's answers: `generate.py FOLDER`.

A graph is NAME.onnx, its inputs and answers NAME.bin: for each run the input, the outputs with onnxruntime's default
optimisations, and the outputs without any, little-endian, in the order that manifest.json has them. Where the two
differ, as a chain of roundings may, or a fused operator of onnxruntime's has a fault, neither is more right.
`tests/conformance.rs` reads them.
"""

import json
import os
import sys
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

import forms
import hand
import nets

# How often each kind of network is quantized, and in which ways: by turns, so that all meet all.
CONVOLUTION = ["qdq.u8", "qdq.s8.channel", "qop.u8.channel", "qdq.u8u8", "qop.s8.channel", "qdq.pairs", "qdq.s8",
               "qop.u8", "qdq.u8.channel", "qdq.s8.even", "qop.u8u8"]
RUNS = 5


def plan():
    """Pairs of a name and what makes its model."""
    rows = []
    turn = 0
    for group, times in ((nets.convolutions, 2), (nets.products, 3), (nets.pools, 2), (nets.activations, 2)):
        for make in group():
            for _ in range(times):
                rows.append((make, CONVOLUTION[turn % len(CONVOLUTION)]))
                turn += 1
    for make in nets.branched():
        rows += [(make, "qdq.u8" if turn % 2 else "qdq.s8.channel"), (make, "qop.u8.channel" if turn % 3 else "qop.u8")]
        turn += 1
    for turn, make in enumerate(list(nets.convolutions())[::3] + list(nets.products())):
        rows.append((make, ["dyn.u8", "dyn.s8", "dyn.s8.channel"][turn % 3]))
    for make in nets.branched():
        if make().name in ("separable", "residual", "autoencoder", "autoencodermm", "attention4", "temporal", "excite"):
            rows.append((make, "dyn.s8"))
    for turn, make in enumerate(nets.branched()):
        if turn % 6 == 0:
            rows.append((make, "opset17"))
            rows.append((make, "opset21"))
    return rows


def model_of(row):
    make, form = row
    net = make()
    if form.startswith("opset"):
        net.opset = max(net.opset, int(form[5:]))
        if any(node.op_type == "ReduceMean" for node in net.nodes) and net.opset >= 18:
            return None
        model = forms.static(net, "qdq.s8.channel")
    elif form.startswith("dyn"):
        model = forms.dynamic(net, form)
    else:
        model = forms.static(net, form)
    # In between, what is quantized dynamically is floats.
    left = sorted(net.left)
    if form.startswith("dyn"):
        left += ["elementwise"] + (["OptMatMul"] if net.name.startswith("attention") else [])
    return f"{form}.{net.name}", net.shape, model, left


def saturates():
    """Whether onnxruntime's products by signed weights lose sums over 16 bits here: on x86-64 without VNNI."""
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return False
    return "avx2" in text and "vnni" not in text


SATURATES = saturates()


def session(model, plain=False):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if SATURATES:
        # The answers are to be the same anywhere: in float, or with weights that are not signed.
        if any(node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "ConvInteger")
               for node in model.graph.node):
            options.add_session_config_entry("session.x64quantprecision", "1")
        else:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(rng, dtype, shape):
    """Random, saturating, and constant ones."""
    if dtype == np.float32:
        normal = lambda size: rng.normal(0, size, shape).astype(np.float32)
        ends = rng.choice(np.array([-40, 40], np.float32), shape)
        return [normal(1), normal(0.3), normal(3), ends, np.zeros(shape, np.float32)]
    if dtype == np.int32:
        return [rng.integers(-(1 << 30), 1 << 30, shape).astype(np.int32) for _ in range(RUNS)]
    info = np.iinfo(dtype)
    free = lambda: rng.integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    ends = rng.choice(np.array([info.min, info.max], dtype), shape)
    return [free(), free(), ends, np.full(shape, info.min, dtype), np.full(shape, info.max, dtype)]


def steps(model):
    """For each output that is a dequantized integer, its scale."""
    made = {name: node for node in model.graph.node for name in node.output}
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    found = []
    for output in model.graph.output:
        node = made.get(output.name)
        # What only moves an integer leaves its step.
        while node and node.op_type in ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze"):
            node = made.get(node.input[0])
        scale = node and node.op_type == "DequantizeLinear" and constants.get(node.input[1])
        found.append(float(scale.max()) if isinstance(scale, np.ndarray) else None)
    return found


def write(folder, name, shape, model, left):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    run, plain = session(model), session(model, plain=True)
    dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8,
             "tensor(int32)": np.int32}[run.get_inputs()[0].type]
    data, outputs = [], None
    for x in inputs(rng, dtype, shape):
        answer = run.run(None, {run.get_inputs()[0].name: x})
        outputs = [dict(dtype=str(y.dtype), shape=list(y.shape)) for y in answer]
        other = plain.run(None, {run.get_inputs()[0].name: x})
        data += [x.tobytes(), *(y.tobytes() for y in answer), *(y.tobytes() for y in other)]
    for output, step in zip(outputs, steps(model)):
        output["step"] = step
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    for value, output in zip(model.graph.output, outputs):
        dims = list(output["shape"])
        if first.dim_param:
            dims[0] = first.dim_param
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, dims))
    onnx.checker.check_model(model)
    onnx.save(model, os.path.join(folder, f"{name}.onnx"))
    with open(os.path.join(folder, f"{name}.bin"), "wb") as file:
        file.write(b"".join(data))
    return dict(name=name, dtype=np.dtype(dtype).name, shape=shape, runs=RUNS, outputs=outputs, left=left)


def one(task):
    folder, kind, at = task
    warnings.simplefilter("ignore")
    import logging
    logging.disable(logging.WARNING)
    if kind == "net":
        made = model_of(plan()[at])
        return made and write(folder, *made)
    if kind == "lite":
        net = list(forms.lites())[at]
        return write(folder, net.name, net.shape, net.model(), sorted(net.left))
    graph = list(hand.graphs())[at]
    return write(folder, graph.name, graph.shape, graph.model(), sorted(graph.left))


def guarded(task):
    try:
        return one(task)
    except Exception as error:  # told with its graph's place, then the script fails
        return f"{task[1:]}: {type(error).__name__}: {error}"


def main():
    folder = sys.argv[1]
    os.makedirs(folder, exist_ok=True)
    tasks = [(folder, "net", at) for at in range(len(plan()))]
    tasks += [(folder, "lite", at) for at in range(len(list(forms.lites())))]
    tasks += [(folder, "hand", at) for at in range(len(list(hand.graphs())))]
    with ProcessPoolExecutor() as pool:
        results = [r for r in pool.map(guarded, tasks, chunksize=8) if r]
    failed = [r for r in results if isinstance(r, str)]
    for line in failed:
        print(line, file=sys.stderr)
    if failed:
        sys.exit(1)
    names = [r["name"] for r in results]
    assert len(set(names)) == len(names), [n for n in names if names.count(n) > 1]
    with open(os.path.join(folder, "manifest.json"), "w") as file:
        json.dump(results, file)
    print(len(results), "graphs")


if __name__ == "__main__":
    main()
