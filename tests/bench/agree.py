#!/usr/bin/env python3
"""How far ours agrees with onnxruntime and LiteRT, input by input.

usage: agree.py NAME=MODEL.onnx,MODEL.tflite,INPUTS.npy[,FACTS.json] ...   (MODEL.tflite may be empty)

INPUTS are as the model takes them, or bytes for a float model whose FACTS say scale and zero point. A third as many
random inputs are added. For each pair of answers:

  top-1   the same class is greatest; left out where the model gives its input back
  exact   outputs that are the same, bit for bit
  near    outputs within one quantization step; for float outputs a step is 1/255 of the range that onnxruntime's span
  worst   the greatest difference, in steps
  right   the share of labelled inputs that each answers right, where FACTS have labels

Exits 1 if top-1 is equal to onnxruntime's on less than 99.5% anywhere, or a float model is off by more than 1e-4 of
the range.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import litert_interpreter, onnx_input, onnx_session

WANTED = 0.995


def inputs_of(path, facts, session):
    """The inputs in the model's own type, labelled ones first, and how many of those there are."""
    dtype, shape = onnx_input(session)
    rows = np.load(path).reshape(-1, *shape[1:])
    random = np.random.default_rng(12)
    if rows.dtype == np.int8:
        noise = random.integers(-128, 128, (len(rows) // 3, *rows.shape[1:])).astype(np.int8)
    else:
        noise = random.uniform(rows.min(), rows.max(), (len(rows) // 3, *rows.shape[1:])).astype(rows.dtype)
    every = np.concatenate([rows, noise])
    if every.dtype == np.int8 and dtype == np.float32:
        every = (every.astype(np.float32) - facts["zero_point"]) * np.float32(facts["scale"])
    assert every.dtype == dtype, f"{path}: {every.dtype}, and the model takes {np.dtype(dtype)}"
    return every, len(rows)


def by_ours(model, every, like):
    with tempfile.TemporaryDirectory() as folder:
        given, answers = Path(folder) / "in", Path(folder) / "out"
        given.write_bytes(every.tobytes())
        subprocess.run([os.environ["PEERS_PROGRAM"], "answer", model, given, answers], check=True)
        return np.frombuffer(answers.read_bytes(), like.dtype).reshape(like.shape)


def by_onnxruntime(session, every):
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in every])


def by_litert(path, every):
    interpreter = litert_interpreter(path)
    entry, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    found = []
    for row in every:
        interpreter.set_tensor(entry["index"], row[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(result["index"])[0].copy())
    return np.stack(found)


def compare(ours, theirs, classes):
    if ours.dtype == np.float32:
        step = (theirs.max() - theirs.min()) / 255
    else:
        step = 1
    off = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)) / step
    off, flat = off.reshape(len(off), -1), lambda x: x.reshape(len(x), -1)
    same = float((flat(ours).argmax(1) == flat(theirs).argmax(1)).mean()) if classes else None
    # A step of the range may be a little under the model's own.
    return {"top-1": same, "exact": float((ours == theirs).mean()), "near": float((off <= 1.05).mean()),
            "worst": float(off.max())}


def right(answers, labels):
    return float((answers[: len(labels)].reshape(len(labels), -1).argmax(1) == labels).mean())


def measure(argument):
    name, files = argument.split("=", 1)
    model, lite, inputs, facts = (files.split(",") + [""] * 4)[:4]
    own = facts and Path(facts).parent == Path(model).parent
    facts = json.loads(Path(facts).read_text()) if facts else {}
    session = onnx_session(model)
    every, labelled = inputs_of(inputs, facts, session)
    theirs = by_onnxruntime(session, every)
    ours = by_ours(model, every, theirs)
    classes = ours[0].size != every[0].size
    answers = {"onnxruntime": theirs}
    if lite:
        answers["LiteRT"] = by_litert(lite, every)
    # Another network has other classes.
    labels = facts.get("labels") if own else None
    rows = []
    for peer, theirs in answers.items():
        row = {"model": name, "with": peer, "n": len(every), **compare(ours, theirs, classes)}
        row["float"] = model.endswith(".fp32.onnx")
        if labels:
            assert len(labels) == labelled
            row["right"] = [right(ours, labels), right(theirs, labels)]
        rows.append(row)
    return rows


def main():
    rows = []
    print(f"{'model':<24} {'with':<12} {'n':>5} {'top-1':>8} {'exact':>8} {'near':>8} {'worst':>7}  right: ours, theirs")
    for argument in sys.argv[1:]:
        for row in measure(argument):
            rows.append(row)
            top = f"{row['top-1']:.2%}" if row["top-1"] is not None else "-"
            both = ", ".join(f"{share:.2%}" for share in row.get("right", []))
            print(f"{row['model']:<24} {row['with']:<12} {row['n']:>5} {top:>8} {row['exact']:>8.2%} {row['near']:>8.2%} "
                  f"{row['worst']:>7.3f}  {both}", flush=True)
    low = [row for row in rows if row["with"] == "onnxruntime" and row["top-1"] is not None and row["top-1"] < WANTED]
    for row in low:
        print(f"{row['model']}: top-1 is onnxruntime's on {row['top-1']:.2%}, under {WANTED:.1%}", file=sys.stderr)
    far = [row for row in rows if row["float"] and row["worst"] > 255 * 1e-4]
    for row in far:
        print(f"{row['model']}: off by {row['worst'] / 255:.1e} of the range from {row['with']}", file=sys.stderr)
    sys.exit(1 if low or far else 0)


if __name__ == "__main__":
    main()
