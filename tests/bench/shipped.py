#!/usr/bin/env python3
"""Writes the held-out inputs of the shipped packages, prepared, to FOLDER/NAME.inputs.npy.

usage: shipped.py FOLDER   (with the packages of models/train/requirements.txt)

Where there are under a thousand, copies with a little noise fill up.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models/train"))
sys.dont_write_bytecode = True

import check  # noqa: E402
import common  # noqa: E402
import tomllib  # noqa: E402

for name, of_record in check.OF_RECORD.items():
    manifest = tomllib.loads((common.MODELS / name / "model.toml").read_text())
    values = [of_record(record["input"]) for record in common.read_heldout(name)]
    rows = np.concatenate([check.prepare(name, manifest["input"], value) for value in values]).astype(np.float32)
    random, every = np.random.default_rng(13), rows
    while len(every) < 1000:
        every = np.concatenate([every, rows + random.normal(0, 0.1, rows.shape).astype(np.float32) * rows.std()])
    np.save(Path(sys.argv[1]) / f"{name}.inputs.npy", every[:4000])
