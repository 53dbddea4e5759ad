"""How a float network becomes a quantized one: onnxruntime's tools, and what tf2onnx makes of TFLite."""

import os
import tempfile

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from nets import Net


class Samples(CalibrationDataReader):
    def __init__(self, net):
        self.rows = iter([{"x": net.rng.normal(0, 1, net.shape).astype(np.float32)} for _ in range(6)])

    def get_next(self):
        return next(self.rows, None)


U8, S8 = QuantType.QUInt8, QuantType.QInt8
QDQ, QOP = QuantFormat.QDQ, QuantFormat.QOperator

# How onnxruntime's static quantizer is called.
STATIC = {
    "qdq.u8": dict(quant_format=QDQ, activation_type=U8, weight_type=S8),
    "qdq.u8.channel": dict(quant_format=QDQ, activation_type=U8, weight_type=S8, per_channel=True),
    "qdq.s8": dict(quant_format=QDQ, activation_type=S8, weight_type=S8),
    "qdq.s8.channel": dict(quant_format=QDQ, activation_type=S8, weight_type=S8, per_channel=True),
    "qdq.s8.even": dict(quant_format=QDQ, activation_type=S8, weight_type=S8, per_channel=True,
                        extra_options=dict(ActivationSymmetric=True)),
    "qdq.u8u8": dict(quant_format=QDQ, activation_type=U8, weight_type=U8),
    "qdq.pairs": dict(quant_format=QDQ, activation_type=S8, weight_type=S8, per_channel=True,
                      extra_options=dict(AddQDQPairToWeight=True, DedicatedQDQPair=True)),
    "qop.u8": dict(quant_format=QOP, activation_type=U8, weight_type=S8),
    "qop.u8.channel": dict(quant_format=QOP, activation_type=U8, weight_type=S8, per_channel=True),
    "qop.s8.channel": dict(quant_format=QOP, activation_type=S8, weight_type=S8, per_channel=True),
    "qop.u8u8": dict(quant_format=QOP, activation_type=U8, weight_type=U8),
}


def through_file(call):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        call(path)
        return onnx.load(path)


def static(net, form):
    options = dict(STATIC[form])
    return through_file(lambda path: quantize_static(net.model(), path, Samples(net), reduce_range=False, **options))


def dynamic(net, form):
    options = dict(weight_type=S8 if form.startswith("dyn.s8") else U8, per_channel=form.endswith("channel"))
    extra = dict(DefaultTensorType=TensorProto.FLOAT, MatMulConstBOnly=True)
    return through_file(lambda path: quantize_dynamic(net.model(), path, extra_options=extra, **options))


class Lite(Net):
    """As tf2onnx converts an int8 TFLite file: channels last, every convolution between two transposes, each
    operator's result quantized."""

    def __init__(self, name, shape, opset=13, ends="integer"):
        super().__init__(name, shape, opset)
        self.channels["x"] = shape[-1]
        self.marks, self.ends = [], ends

    def mark(self, x):
        self.marks.append(x)
        return x

    def planes(self, x, rank=4):
        return self.op("Transpose", x, perm=[0, rank - 1, *range(1, rank - 1)])

    def pixels(self, x, rank=4):
        return self.op("Transpose", x, perm=[0, *range(2, rank), 1])

    def conv(self, x, out, kernel, activation="Relu", rank=4, **attributes):
        y = super().conv(self.planes(x, rank), out, kernel, **attributes)
        return self.mark(self.activation(self.pixels(y, rank), activation))

    def depthwise(self, x, kernel, times=1, **attributes):
        return self.conv(x, self.channels[x] * times, kernel, group=self.channels[x], **attributes)

    def pool(self, kind, x, **attributes):
        return self.mark(self.pixels(self.op(kind, self.planes(x), **attributes)))

    def dense(self, x, inputs, out, activation=None):
        return self.mark(self.activation(self.matmul(x, inputs, out), activation))

    def model(self):
        """Quantized, with scales from the float graph's own ranges."""
        rows = [self.rng.normal(0, 1, self.shape).astype(np.float32) for _ in range(4)]
        outputs, self.outputs = self.outputs, list(dict.fromkeys(self.marks))
        session = ort.InferenceSession(super().model().SerializeToString(), providers=["CPUExecutionProvider"])
        found = [session.run(None, {"x": row}) for row in rows]
        ranges = {name: [f[i] for f in found] for i, name in enumerate(self.outputs)} | {"x": rows}
        self.outputs = outputs
        nodes, constants = [], {}
        grids = {name: grid(np.concatenate([v.ravel() for v in values])) for name, values in ranges.items()}

        def scale(name, value, zero):
            for suffix, data in (("scale", np.float32(value)), ("zero", zero)):
                constants[f"{name}_{suffix}"] = numpy_helper.from_array(np.asarray(data), f"{name}_{suffix}")
            return [f"{name}_scale", f"{name}_zero"]

        def pair(source, name, integer=False):
            if not integer:
                nodes.append(helper.make_node("QuantizeLinear", [source, *scale(name, *grids[name])], [f"{name}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *scale(name, *grids[name])], [f"{name}_f"]))

        integer = self.ends != "float"
        if integer:
            scale("x", *grids["x"])
            nodes.append(helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["x_f"]))
        else:
            pair("x", "x")
        names, unit = {"x": "x_f"}, {"x": grids["x"][0]}
        given = {c.name: numpy_helper.to_array(c) for c in self.constants}
        for node in self.nodes:
            inputs = [names.get(name, name) for name in node.input]
            unit[node.output[0]] = unit.get(node.input[0], 1.0)
            if node.op_type in ("Conv", "MatMul") and node.input[1] in given:
                w = given[node.input[1]]
                axis = 0 if node.op_type == "Conv" else 1
                others = tuple(a for a in range(w.ndim) if a != axis)
                # Convolutions have a scale for each channel, products one.
                step = np.abs(w).max(axis=others if axis == 0 else None, keepdims=False) / 127
                step = np.atleast_1d(step).astype(np.float32)
                along = step.reshape([-1 if a == axis else 1 for a in range(w.ndim)])
                stored = np.clip(np.rint(w / along), -127, 127).astype(np.int8)
                name = node.input[1]
                constants[name + "_i"] = numpy_helper.from_array(stored, name + "_i")
                s = step if axis == 0 else step[0]
                nodes.append(helper.make_node(
                    "DequantizeLinear", [name + "_i", *scale(name, s, np.zeros(np.shape(s), np.int8))], [name],
                    axis=axis))
                unit[node.output[0]] = unit[node.input[0]] * step
                if len(node.input) > 2:
                    bias(given, node.input[2], unit[node.output[0]], constants, nodes, scale)
            elif node.op_type == "Add" and node.input[1] in given:
                bias(given, node.input[1], unit[node.input[0]], constants, nodes, scale)
            else:
                for name in node.input:
                    if name in given:
                        constants[name] = numpy_helper.from_array(given[name], name)
            nodes.append(helper.make_node(node.op_type, inputs, node.output, **{
                a.name: helper.get_attribute_value(a) for a in node.attribute}))
            for name in node.output:
                if name in grids:
                    pair(name, name)
                    names[name], unit[name] = f"{name}_f", grids[name][0]
        kind = TensorProto.INT8 if integer else TensorProto.FLOAT
        ends = [name + ("_q" if integer else "_f") for name in self.outputs]
        graph = helper.make_graph(
            nodes, self.name, [helper.make_tensor_value_info("x", kind, self.shape)],
            [helper.make_tensor_value_info(name, kind, None) for name in ends], list(constants.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def grid(values):
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    step = np.float32(max(high - low, 1e-3) / 255)
    return step, np.int8(np.clip(np.rint(-128 - low / step), -128, 127))


def bias(given, name, unit, constants, nodes, scale):
    unit = np.asarray(unit, np.float32)
    stored = np.rint(given[name].astype(np.float64) / unit).astype(np.int32)
    constants[name + "_i"] = numpy_helper.from_array(stored, name + "_i")
    unit = unit if unit.size > 1 else np.float32(unit.reshape(-1)[0])
    nodes.append(helper.make_node(
        "DequantizeLinear", [name + "_i", *scale(name, unit, np.zeros(np.shape(unit), np.int32))], [name], axis=0))


def lites():
    """Networks as TFLite has them."""
    rows = [
        ("conv", [1, 12, 12, 3], 8, 3, dict(strides=[2, 2], auto_pad="SAME_UPPER"), "Relu"),
        ("conv6", [1, 9, 9, 3], 16, 3, dict(auto_pad="SAME_UPPER"), "Relu6"),
        ("valid", [1, 9, 9, 1], 5, 3, dict(auto_pad="VALID"), None),
        ("point", [1, 7, 7, 16], 24, 1, dict(), "Relu"),
        ("depth", [1, 9, 9, 16], 16, 3, dict(group=16, strides=[2, 2], auto_pad="SAME_UPPER"), "Relu6"),
        ("depth17", [1, 8, 8, 17], 17, 3, dict(group=17, auto_pad="SAME_UPPER"), None),
        ("times", [1, 25, 10, 1], 8, [10, 8], dict(strides=[2, 2], auto_pad="SAME_UPPER"), "Relu"),
        ("times3", [1, 8, 8, 3], 9, 3, dict(group=3, auto_pad="SAME_UPPER"), "Relu"),
        ("dilated", [1, 12, 12, 3], 5, 3, dict(dilations=[2, 2], pads=[2, 2, 2, 2]), "Relu"),
    ]
    for ends in ("integer", "float"):
        for name, shape, out, kernel, attributes, activation in rows:
            net = Lite(f"lite_{name}_{ends}", shape, ends=ends)
            yield net.out(net.conv("x", out, kernel, activation, **attributes))

        net = Lite(f"lite_resnet_{ends}", [1, 8, 8, 3], ends=ends)
        y = net.conv("x", 8, 3, auto_pad="SAME_UPPER")
        z = net.conv(net.conv(y, 8, 3, auto_pad="SAME_UPPER"), 8, 3, None, auto_pad="SAME_UPPER")
        y = net.mark(net.activation(net.op("Add", y, z), "Relu"))
        z = net.conv(net.conv(y, 16, 3, strides=[2, 2], auto_pad="SAME_UPPER"), 16, 3, None, auto_pad="SAME_UPPER")
        y = net.mark(net.activation(net.op("Add", net.conv(y, 16, 1, None, strides=[2, 2]), z), "Relu"))
        y = net.pool("AveragePool", y, kernel_shape=[4, 4])
        y = net.op("Reshape", y, np.array([-1, 16], np.int64), channels=16)
        y = net.dense(y, 16, 10)
        yield net.out(net.mark(net.op("Softmax", y, axis=-1)))

        net = Lite(f"lite_keywords_{ends}", [1, 49, 10, 1], ends=ends)
        y = net.conv("x", 16, [10, 4], strides=[2, 2], auto_pad="SAME_UPPER")
        for _ in range(2):
            y = net.conv(net.depthwise(y, 3, auto_pad="SAME_UPPER"), 16, 1)
        y = net.pool("AveragePool", y, kernel_shape=[25, 5], strides=[25, 5])
        y = net.dense(net.op("Reshape", y, np.array([-1, 16], np.int64), channels=16), 16, 12)
        yield net.out(net.mark(net.op("Softmax", y, axis=-1)))

        net = Lite(f"lite_mobile_{ends}", [1, 16, 16, 3], ends=ends)
        y = net.conv("x", 8, 3, "Relu6", strides=[2, 2], auto_pad="SAME_UPPER")
        y = net.conv(net.depthwise(y, 3, activation="Relu6", auto_pad="SAME_UPPER"), 16, 1, "Relu6")
        z = net.conv(net.depthwise(net.conv(y, 24, 1, "Relu6"), 3, activation="Relu6", auto_pad="SAME_UPPER"), 16, 1, None)
        y = net.mark(net.op("Add", y, z))
        y = net.mark(net.op("ReduceMean", y, axes=[1, 2], keepdims=0))
        yield net.out(net.dense(y, 16, 3))

        net = Lite(f"lite_meankeep_{ends}", [1, 8, 8, 5], ends=ends)
        y = net.mark(net.op("ReduceMean", net.conv("x", 16, 3), axes=[1, 2], keepdims=1))
        yield net.out(net.conv(y, 4, 1, None))

        net = Lite(f"lite_dense_{ends}", [1, 64], ends=ends)
        y = net.dense(net.dense("x", 64, 24, "Relu"), 24, 5, "Relu")
        yield net.out(net.dense(net.dense(y, 5, 24, "Relu"), 24, 64))

        net = Lite(f"lite_concat_{ends}", [1, 8, 8, 3], ends=ends)
        a, b = net.conv("x", 8, 3, auto_pad="SAME_UPPER"), net.pool("MaxPool", "x", kernel_shape=[3, 3], auto_pad="SAME_UPPER")
        y = net.mark(net.op("Concat", a, b, axis=3, channels=11))
        yield net.out(net.conv(y, 5, 1, None))

        net = Lite(f"lite_pad_{ends}", [1, 8, 8, 3], ends=ends)
        y = net.mark(net.op("Pad", "x", np.array([0, 1, 1, 0, 0, 1, 1, 0], np.int64)))
        yield net.out(net.conv(y, 8, 3, strides=[2, 2]))

        net = Lite(f"lite_swish_{ends}", [1, 6, 6, 3], ends=ends)
        y = net.conv("x", 8, 3, None)
        y = net.mark(net.op("Mul", y, net.mark(net.op("Sigmoid", y))))
        yield net.out(net.conv(y, 5, 1, None))

        net = Lite(f"lite_upsample_{ends}", [1, 4, 4, 3], ends=ends)
        y = net.planes(net.conv("x", 8, 1))
        y = net.op("Resize", y, "", np.array([1, 1, 2, 2], np.float32), mode="nearest",
                   coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        yield net.out(net.conv(net.mark(net.pixels(y)), 5, 3))

        net = Lite(f"lite_line_{ends}", [1, 40, 3], ends=ends)
        y = net.conv("x", 8, [5], rank=3, strides=[2])
        yield net.out(net.conv(y, 4, [3], None, rank=3))
