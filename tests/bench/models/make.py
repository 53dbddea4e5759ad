#!/usr/bin/env python3
"""Makes the four networks of MLPerf Tiny, trained briefly on made-up data, in every form that the peers run.

usage: make.py FOLDER [NAME...]

Each network gets FOLDER/NAME/ with
  NAME.fp32.tflite   NAME.fp32.onnx    float, by TensorFlow's converter and tf2onnx (opset 13) of that
  NAME.int8.tflite   NAME.int8.onnx    integers throughout, input and output too, weights by the channel; the ONNX
                                       file is QDQ in NHWC with transposes
  NAME.qdq-s8.onnx NAME.qdq-u8.onnx NAME.qop-u8.onnx
                                       onnxruntime's static quantizer on the float ONNX: weights i8 by the channel,
                                       activations i8 or u8, QDQ or QOperator
  NAME.inputs.npy                      held-out inputs, as the int8 model takes them
  NAME.json                            scale and zero point of these, labels, accuracy of each form
The weights mean nothing outside these files. The seeds are fixed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tensorflow.keras import Model, layers

HELD_OUT = 1500
CALIBRATION = 200


def normed(x, activate=True):
    x = layers.BatchNormalization()(x)
    return layers.Activation("relu")(x) if activate else x


def ds_cnn():
    """Keyword spotting: one 10x4 convolution, four separable blocks of 64 filters."""
    entry = layers.Input((49, 10, 1))
    x = normed(layers.Conv2D(64, (10, 4), strides=2, padding="same")(entry))
    for _ in range(4):
        x = normed(layers.DepthwiseConv2D(3, padding="same")(x))
        x = normed(layers.Conv2D(64, 1, padding="same")(x))
    x = layers.Flatten()(layers.AveragePooling2D((25, 5))(x))
    return Model(entry, layers.Dense(12, activation="softmax")(x))


def resnet8():
    """Image classification: three residual stacks of 16, 32 and 64 filters."""
    entry = layers.Input((32, 32, 3))
    x = normed(layers.Conv2D(16, 3, padding="same")(entry))
    for filters, stride in ((16, 1), (32, 2), (64, 2)):
        y = normed(layers.Conv2D(filters, 3, strides=stride, padding="same")(x))
        y = normed(layers.Conv2D(filters, 3, padding="same")(y), activate=False)
        if stride != 1:
            x = layers.Conv2D(filters, 1, strides=stride, padding="same")(x)
        x = layers.Activation("relu")(layers.add([x, y]))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    return Model(entry, layers.Dense(10, activation="softmax")(x))


def mobilenet():
    """Person or none: MobileNetV1 at a quarter of its width."""
    entry = layers.Input((96, 96, 3))
    x = normed(layers.Conv2D(8, 3, strides=2, padding="same")(entry))
    for filters, stride in (
        [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2)] + [(128, 1)] * 5 + [(256, 2), (256, 1)]
    ):
        x = normed(layers.DepthwiseConv2D(3, strides=stride, padding="same")(x))
        x = normed(layers.Conv2D(filters, 1, padding="same")(x))
    x = layers.Flatten()(layers.AveragePooling2D(3)(x))
    return Model(entry, layers.Dense(2, activation="softmax")(x))


def autoencoder():
    """Machine sound: dense layers, 640 numbers through 8 and back."""
    entry = layers.Input((640,))
    x = entry
    for units in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        x = normed(layers.Dense(units)(x))
    return Model(entry, layers.Dense(640)(x))


def smooth(random, *shape):
    """Noise whose neighbours are alike, as pixels and spectra are: sums of coarse grids, each stretched to size."""
    found = np.zeros(shape, np.float32)
    for cell in (2, 4, 8):
        coarse = random.normal(size=(-(-shape[0] // cell), -(-shape[1] // cell), shape[2])).astype(np.float32)
        found += coarse.repeat(cell, 0).repeat(cell, 1)[: shape[0], : shape[1]] / np.sqrt(3)
    return found


def classes(random, shape, count, n, noise, low, high):
    """`n` inputs of `count` classes: each is a class's pattern, shifted, scaled and mixed with another's, under noise."""
    patterns = np.stack([smooth(np.random.default_rng(7000 + at), *shape) for at in range(count)])
    labels = random.integers(count, size=n)
    others = random.integers(count, size=n)
    found = np.empty((n, *shape), np.float32)
    for at in range(n):
        shift = random.integers(-2, 3, size=2)
        strength, mixed = random.uniform(0.6, 1.4), random.uniform(0, 0.6)
        x = strength * np.roll(patterns[labels[at]], shift, (0, 1)) + mixed * patterns[others[at]]
        found[at] = x + noise * random.normal(size=shape)
    middle, span = (low + high) / 2, (high - low) / 2
    return np.clip(middle + found / 4 * span, low, high).astype(np.float32), labels


def spectra(random, n):
    """`n` rows of 640 that lie near a curved surface of eight dimensions, in decibels."""
    fixed = np.random.default_rng(7100)
    first, second = fixed.normal(size=(8, 48)) / np.sqrt(8), fixed.normal(size=(48, 640)) / np.sqrt(48)
    x = np.tanh(random.normal(size=(n, 8)) @ first) @ second
    return (12 * x - 20 + 0.8 * random.normal(size=x.shape)).astype(np.float32)


# Name: the network, its data, the epochs, and how many inputs an epoch has.
NETWORKS = {
    "dscnn": (ds_cnn, lambda random, n: classes(random, (49, 10, 1), 12, n, 1.0, -120, 80), 8, 4000),
    "resnet8": (resnet8, lambda random, n: classes(random, (32, 32, 3), 10, n, 1.6, 0, 255), 4, 3000),
    "mobilenet": (mobilenet, lambda random, n: classes(random, (96, 96, 3), 2, n, 3.0, 0, 1), 4, 1200),
    "autoencoder": (autoencoder, lambda random, n: (spectra(random, n), None), 8, 8000),
}


def train(build, data, epochs, size):
    model = build()
    x, labels = data(np.random.default_rng(1), size)
    target = x if labels is None else labels
    loss = "mse" if labels is None else "sparse_categorical_crossentropy"
    # A quick momentum: a few hundred steps must do for the statistics of the normalisation.
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.9
    model.compile(optimizer=tf.keras.optimizers.Adam(2e-3), loss=loss)
    model.fit(x, target, batch_size=32, epochs=epochs, verbose=0)
    return model


def tflite(model, samples, integer):
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if integer:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        # One scale for a dense layer, as in the published models; newer converters give each output its own.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
        converter.representative_dataset = lambda: ([x[None]] for x in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


class Samples(CalibrationDataReader):
    def __init__(self, name, samples):
        self.rows = iter([{name: x[None]} for x in samples])

    def get_next(self):
        return next(self.rows, None)


def quantize(source, folder, name, samples):
    """onnxruntime's own forms of the float model."""
    ready = folder / f"{name}.ready.onnx"
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    entry = onnx.load(ready).graph.input[0].name
    for kind, form, activation in (
        ("qdq-s8", QuantFormat.QDQ, QuantType.QInt8),
        ("qdq-u8", QuantFormat.QDQ, QuantType.QUInt8),
        ("qop-u8", QuantFormat.QOperator, QuantType.QUInt8),
    ):
        quantize_static(
            str(ready), str(folder / f"{name}.{kind}.onnx"), Samples(entry, samples), quant_format=form,
            activation_type=activation, weight_type=QuantType.QInt8, per_channel=True,
        )
    ready.unlink()


def score(path, x, labels, scale, zero):
    """The share of held-out inputs that a form of the model gets right, or its mean error."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    integer = entry.type == "tensor(int8)"
    out = [session.run(None, {entry.name: (row if integer else (row.astype(np.float32) - zero) * np.float32(scale))[None]})[0][0]
           for row in x[:500]]
    if labels is not None:
        return float(np.mean([o.argmax() == label for o, label in zip(out, labels)]))
    return None


def make(name, folder):
    build, data, epochs, size = NETWORKS[name]
    tf.keras.utils.set_random_seed(5)
    model = train(build, data, epochs, size)
    samples, _ = data(np.random.default_rng(2), CALIBRATION)
    folder.mkdir(parents=True, exist_ok=True)
    for precision in ("fp32", "int8"):
        lite, graph = folder / f"{name}.{precision}.tflite", folder / f"{name}.{precision}.onnx"
        lite.write_bytes(tflite(model, samples, precision == "int8"))
        subprocess.run(
            [sys.executable, "-m", "tf2onnx.convert", "--tflite", str(lite), "--output", str(graph), "--opset", "13"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    quantize(folder / f"{name}.fp32.onnx", folder, name, samples)
    details = tf.lite.Interpreter(str(folder / f"{name}.int8.tflite")).get_input_details()[0]
    scale, zero = details["quantization"]
    x, labels = data(np.random.default_rng(3), HELD_OUT)
    inputs = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8)
    np.save(folder / f"{name}.inputs.npy", inputs)
    forms = {path.name: score(path, inputs, labels, scale, zero) for path in sorted(folder.glob(f"{name}.*.onnx"))}
    facts = {"scale": float(scale), "zero_point": int(zero), "accuracy": forms,
             "labels": None if labels is None else labels.tolist()}
    (folder / f"{name}.json").write_text(json.dumps(facts))
    print(name, forms, flush=True)


def main():
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or NETWORKS:
        make(name, folder / name)


main()
