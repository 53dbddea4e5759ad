#!/usr/bin/env python3
"""Times models side by side: ours, plain tract, onnxruntime and LiteRT, one thread each, taking turns.

usage: peers NAME=FP32.onnx,FP32.tflite,INT8.onnx,INT8.tflite ...   (a part may be empty)
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter

ROUNDS = int(os.environ.get("PEERS_ROUNDS", "15"))
RUNS = int(os.environ.get("PEERS_RUNS", "60"))


class Ours:
    """A process that answers `run N` with the microseconds of N runs."""

    def __init__(self, program, mode, path):
        self.process = subprocess.Popen(
            [program, mode, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        first = self.process.stdout.readline()
        if not first:
            raise RuntimeError(f"{mode} cannot run {path}")
        self.load_ms = json.loads(first)["load_ms"]

    def times(self, n):
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Onnxruntime:
    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        entry = self.session.get_inputs()[0]
        dtype = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}[entry.type]
        shape = [dim if isinstance(dim, int) else 1 for dim in entry.shape]
        # A bound value: no copy of Python's is in the time.
        self.binding = self.session.io_binding()
        self.binding.bind_cpu_input(entry.name, np.ones(shape, dtype))
        self.binding.bind_output(self.session.get_outputs()[0].name)

    def times(self, n):
        return timed(lambda: self.session.run_with_iobinding(self.binding), n)


class LiteRt:
    def __init__(self, path):
        self.interpreter = Interpreter(model_path=path, num_threads=1)
        self.interpreter.allocate_tensors()
        entry = self.interpreter.get_input_details()[0]
        self.interpreter.set_tensor(entry["index"], np.ones(entry["shape"], entry["dtype"]))

    def times(self, n):
        return timed(self.interpreter.invoke, n)


def timed(run, n):
    found = []
    for _ in range(n):
        start = time.perf_counter_ns()
        run()
        found.append((time.perf_counter_ns() - start) / 1e3)
    return found


def main():
    program = os.environ["PEERS_PROGRAM"]
    rows = []
    for argument in sys.argv[1:]:
        name, files = argument.split("=", 1)
        fp32, fp32_lite, int8, int8_lite = (files.split(",") + [""] * 4)[:4]
        makers = {}
        for precision, onnx, lite in (("fp32", fp32, fp32_lite), ("int8", int8, int8_lite)):
            if onnx:
                makers[f"outpost {precision}"] = lambda p=onnx: Ours(program, "outpost", p)
                makers[f"tract {precision}"] = lambda p=onnx: Ours(program, "tract", p)
                makers[f"onnxruntime {precision}"] = lambda p=onnx: Onnxruntime(p)
            if lite:
                makers[f"LiteRT {precision}"] = lambda p=lite: LiteRt(p)
        peers = {}
        for label, make in makers.items():
            try:
                peers[label] = make()
                peers[label].times(20)
            except Exception as error:  # a peer that cannot run a model has no row
                print(f"{name}: {label}: {error}", file=sys.stderr)
                peers.pop(label, None)
        times = {label: [] for label in peers}
        for _ in range(ROUNDS):
            for label, peer in peers.items():
                times[label] += peer.times(RUNS)
        best = min((min(t) for label, t in times.items() if label.startswith(("onnxruntime", "LiteRT"))), default=None)
        for label, found in times.items():
            least, middle = min(found), float(np.median(found))
            load = getattr(peers[label], "load_ms", None)
            rows.append({"model": name, "peer": label, "us_min": least, "us_median": middle, "load_ms": load,
                         "of_best": least / best if best else None})
    if os.environ.get("PEERS_JSON"):
        print(json.dumps(rows))
        return
    print(f"{'model':<18} {'peer':<18} {'min us':>9} {'median':>9} {'load ms':>8} {'of best':>8}")
    for row in rows:
        load = f"{row['load_ms']:.1f}" if row["load_ms"] is not None else ""
        share = f"{row['of_best']:.2f}" if row["of_best"] else ""
        print(f"{row['model']:<18} {row['peer']:<18} {row['us_min']:>9.1f} {row['us_median']:>9.1f} {load:>8} {share:>8}")


main()
