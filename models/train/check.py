"""Reads the packages as they are shipped and repeats every number and answer that they claim."""

import base64
import hashlib
import json
import tomllib

import numpy as np

import bearing
import common
import digits
import notes
from notes_corpus import LABELS, SEEN, UNSEEN


def series(content):
    return [float(line) for line in content.decode().split()]


# For each package: a held-out input, and a file's content, as what the model's preparation takes.
OF_RECORD = {
    "digits": lambda value: base64.b64decode(value["image"]),
    "bearing": lambda value: [row[0] for row in value["series"]],
    "notes": lambda value: value["text"],
}
OF_FILE = {"digits": lambda content: content, "bearing": series, "notes": lambda content: content.decode()}


def prepare(name, spec, value):
    """Inputs of the model: one, or one for each window."""
    if name == "digits":
        return digits.decode(value)[None]
    if name == "bearing":
        return ((bearing.features(value) - spec["mean"]) / spec["std"]).astype(np.float32)
    return notes.prepare(value)[None]


def answers(name, manifest, labels, path, values):
    """A label and its confidence for each value."""
    prepared = [prepare(name, manifest["input"], value) for value in values]
    outputs = common.run(path, np.concatenate(prepared))
    if name == "bearing":
        threshold = manifest["output"]["threshold"]
        errors = ((outputs - np.concatenate(prepared)) ** 2).mean(1)
        scores = [part.mean() for part in np.split(errors, np.cumsum([len(p) for p in prepared])[:-1])]
        return [(bearing.ANSWERS[int(s > threshold)], float(bearing.confidence(s, threshold))) for s in scores]
    chance = common.softmax(outputs, manifest["confidence"]["temperature"])
    return [(labels[row.argmax()], float(row.max())) for row in chance]


def check(name):
    folder = common.MODELS / name
    manifest = tomllib.loads((folder / "model.toml").read_text())
    labels = (folder / "labels.txt").read_text().split() if "labels" in manifest["output"] else []
    records, claimed = common.read_heldout(name), json.loads((common.HELDOUT / "accuracy.json").read_text())[name]
    expected = json.loads((common.SAMPLES / "expected.json").read_text())
    samples = {file: want for file, want in expected.items() if want["task"] == manifest["task"]}
    golden = [(folder / case["input"]).read_bytes() for case in manifest["golden"]]
    found = {}
    for variant in manifest["variant"]:
        path, precision = folder / variant["file"], variant["precision"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == variant["sha256"], path
        said = answers(name, manifest, labels, path, [OF_FILE[name](content) for content in golden])
        for case, (label, _) in zip(manifest["golden"], said):
            assert label == case["expect"], (path.name, case, label)
        said = answers(name, manifest, labels, path, [OF_RECORD[name](record["input"]) for record in records])
        found[precision] = float(np.mean([label == record["label"] for (label, _), record in zip(said, records)]))
        assert len(records) == claimed["n"] and round(found[precision], 4) == claimed[precision], (path.name, found, claimed)
        files = [OF_FILE[name]((common.SAMPLES / file).read_bytes()) for file in samples]
        for (file, want), (label, sure) in zip(samples.items(), answers(name, manifest, labels, path, files)):
            assert (sure >= manifest["confidence"]["threshold"]) == want["certain"], (path.name, file, label, sure)
            assert label == want["expect"] or not want["certain"], (path.name, file, label, sure)
    assert abs(found["fp32"] - found["int8"]) <= 0.01, found
    print(
        f"check {name}: hashes and {len(golden)} golden cases right, fp32 {found['fp32']:.4f}, int8 {found['int8']:.4f} of "
        f"{len(records)} held out, {len(samples)} samples as expected"
    )


def main():
    for key in UNSEEN:
        both = set(UNSEEN[key]) & set(SEEN[key]) - {""}
        assert not both, f"the notes' held-out set shares {both} with training"
    assert set(LABELS) <= set(UNSEEN)
    for name in OF_RECORD:
        check(name)


if __name__ == "__main__":
    main()
