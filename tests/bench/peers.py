#!/usr/bin/env python3
"""Times models side by side: ours, plain tract, onnxruntime and LiteRT, one thread each, taking turns.

usage: peers.py NAME=FP32.onnx,FP32.tflite,INT8.onnx,INT8.tflite[,MORE.onnx...] ...   (a part may be empty)

Each peer has each model in a process of its own, so memory is its own too. All get the same random input.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROUNDS = int(os.environ.get("PEERS_ROUNDS", "15"))
RUNS = int(os.environ.get("PEERS_RUNS", "60"))
DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}


class Peer:
    """A process that answers a number of runs with the microseconds of each."""

    def __init__(self, label, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        first = self.process.stdout.readline()
        if not first:
            raise RuntimeError("cannot run it")
        self.facts = json.loads(first)
        self.label, self.found = label, []

    def times(self, n):
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("stopped")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def onnx_session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_input(session):
    """Type and shape of the input, what is open taken as 1."""
    entry = session.get_inputs()[0]
    return DTYPES[entry.type], [dim if isinstance(dim, int) else 1 for dim in entry.shape]


def onnxruntime_runner(path, data):
    session = onnx_session(path)
    dtype, shape = onnx_input(session)
    # A bound value: no copy of Python's is in the time.
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, np.frombuffer(data, dtype).reshape(shape))
    binding.bind_output(session.get_outputs()[0].name)
    return lambda: session.run_with_iobinding(binding)


def litert_interpreter(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def litert_runner(path, data):
    interpreter = litert_interpreter(path)
    entry = interpreter.get_input_details()[0]
    interpreter.set_tensor(entry["index"], np.frombuffer(data, entry["dtype"]).reshape(entry["shape"]))
    return interpreter.invoke


def peak_mib():
    """Most memory that the process has held."""
    status = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def work(kind, path, source):
    """A peer's process, as peer.rs is for ours. Importing the library is in the memory, not in the time."""
    data = Path(source).read_bytes()
    before = peak_mib()
    if kind == "onnxruntime":
        import onnxruntime  # noqa: F401
    else:
        import ai_edge_litert.interpreter  # noqa: F401
    start = time.perf_counter()
    run = {"onnxruntime": onnxruntime_runner, "litert": litert_runner}[kind](path, data)
    run()
    load_ms = (time.perf_counter() - start) * 1e3
    peak = peak_mib()
    print(json.dumps({"load_ms": load_ms, "peak_mib": peak, "added_mib": peak - before}), flush=True)
    for line in sys.stdin:
        found = []
        for _ in range(int(line)):
            start = time.perf_counter_ns()
            run()
            found.append((time.perf_counter_ns() - start) / 1e3)
        print(json.dumps(found), flush=True)


def random_input(path, folder):
    """A file with a random input of the model's type and shape, the same for all that take the same."""
    if path.endswith(".tflite"):
        entry = litert_interpreter(path).get_input_details()[0]
        dtype, shape = np.dtype(entry["dtype"]), list(entry["shape"])
    else:
        dtype, shape = onnx_input(onnx_session(path))
        dtype = np.dtype(dtype)
    file = folder / f"{dtype.name}.{'x'.join(map(str, shape))}"
    if not file.exists():
        random = np.random.default_rng(11)
        if dtype == np.float32:
            data = random.uniform(-1, 1, shape).astype(np.float32)
        else:
            limits = np.iinfo(dtype)
            data = random.integers(limits.min, limits.max + 1, shape).astype(dtype)
        file.write_bytes(data.tobytes())
    return str(file)


def start(program, forms, folder, name):
    """The peers that can run a model's forms, warmed up."""
    peers = []
    for form, path in forms:
        if not path:
            continue
        source = random_input(path, folder)
        if path.endswith(".tflite"):
            commands = {"LiteRT": [sys.executable, __file__, "--work", "litert", path, source]}
        else:
            commands = {
                "outpost": [program, "outpost", path, source],
                "tract": [program, "tract", path, source],
                "onnxruntime": [sys.executable, __file__, "--work", "onnxruntime", path, source],
            }
        for peer, command in commands.items():
            try:
                peers.append(Peer((peer, form), command))
                peers[-1].times(20)
            except Exception as error:  # a peer that cannot run a model has no row
                print(f"{name}: {peer} {form}: {error}", file=sys.stderr)
    return peers


def summary(name, rows):
    """What the figures come to, by least and by median time."""
    def least(of, key):
        return min((row[key] for row in rows if of(row)), default=None)

    found = {"model": name}
    for key in ("us_min", "us_median"):
        ours = least(lambda row: row["peer"] == "outpost" and row["form"] == "int8", key)
        ours_float = least(lambda row: row["peer"] == "outpost" and row["form"] == "fp32", key)
        foreign = ("onnxruntime", "LiteRT")
        best = least(lambda row: row["peer"] in foreign and row["form"] in ("int8", "fp32"), key)
        best_float = least(lambda row: row["peer"] in foreign and row["form"] == "fp32", key)
        best_any = least(lambda row: row["peer"] in foreign, key)
        share = lambda a, b: a / b if a and b else None  # noqa: E731
        found[key] = {
            "int8 of the peers' best int8 or fp32": share(ours, best),
            "int8 of the peers' best in any form": share(ours, best_any),
            "int8 of our fp32": share(ours, ours_float),
            "fp32 of the peers' best fp32": share(ours_float, best_float),
        }
    return found


def measure(program, argument, folder):
    name, files = argument.split("=", 1)
    files = (files.split(",") + [""] * 4)
    fp32, fp32_lite, int8, int8_lite, *more = files
    forms = [("fp32", fp32), ("fp32", fp32_lite), ("int8", int8), ("int8", int8_lite)]
    forms += [(Path(path).name.split(".")[-2], path) for path in more if path]
    peers = start(program, forms, folder, name)
    for _ in range(ROUNDS):
        for peer in peers:
            peer.found += peer.times(RUNS)
    for peer in peers:
        peer.close()
    best = min((min(peer.found) for peer in peers if peer.label[0] in ("onnxruntime", "LiteRT")), default=None)
    return name, [
        {"model": name, "peer": peer.label[0], "form": peer.label[1], "us_min": min(peer.found),
         "us_median": float(np.median(peer.found)), **peer.facts, "of_best": min(peer.found) / best if best else None}
        for peer in peers
    ]


def main():
    program = os.environ["PEERS_PROGRAM"]
    every, sums = [], []
    with tempfile.TemporaryDirectory() as folder:
        for argument in sys.argv[1:]:
            name, rows = measure(program, argument, Path(folder))
            every += rows
            sums.append(summary(name, rows))
    if os.environ.get("PEERS_JSON"):
        print(json.dumps({"rows": every, "summary": sums}))
        return
    print(f"{'model':<12} {'peer':<12} {'form':<7} {'min us':>8} {'median':>8} {'of best':>8} "
          f"{'load ms':>8} {'peak MiB':>9} {'added':>7}")
    for row in every:
        share = f"{row['of_best']:.2f}" if row["of_best"] else ""
        print(f"{row['model']:<12} {row['peer']:<12} {row['form']:<7} {row['us_min']:>8.1f} {row['us_median']:>8.1f} "
              f"{share:>8} {row['load_ms']:>8.1f} {row['peak_mib']:>9.1f} {row['added_mib']:>7.1f}")
    print()
    for found in sums:
        for what in found["us_min"]:
            pair = [found[key][what] for key in ("us_min", "us_median")]
            if all(pair):
                print(f"{found['model']:<12} {what:<38} min {pair[0]:.2f}, median {pair[1]:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()
