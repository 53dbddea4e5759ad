"""Graphs of operators that the quantizer does not make, or not in these ways."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

KINDS = {np.dtype("uint8"): TensorProto.UINT8, np.dtype("int8"): TensorProto.INT8,
         np.dtype("float32"): TensorProto.FLOAT, np.dtype("int32"): TensorProto.INT32}
MS = "com.microsoft"


class Graph:
    """Nodes written out; what is left to tract may be named; "*": anything."""

    def __init__(self, name, dtype, shape, opset=13, left=()):
        self.name, self.dtype, self.shape, self.opset = name, np.dtype(dtype), list(shape), opset
        self.nodes, self.constants, self.ends = [], [], []
        self.left = set(left)

    def op(self, kind, *inputs, outputs=1, domain="", **attributes):
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"t{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def ms(self, kind, *inputs, **attributes):
        return self.op(kind, *inputs, domain=MS, **attributes)

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def dq(self, x, scale, zero, **attributes):
        return self.op("DequantizeLinear", x, np.float32(scale), zero, **attributes)

    def q(self, x, scale, zero, **attributes):
        return self.op("QuantizeLinear", x, np.float32(scale), zero, **attributes)

    def out(self, name, dtype):
        self.ends.append((name, KINDS[np.dtype(dtype)]))
        return self

    def model(self):
        graph = helper.make_graph(
            self.nodes, self.name, [helper.make_tensor_value_info("x", KINDS[self.dtype], self.shape)],
            [helper.make_tensor_value_info(name, kind, None) for name, kind in self.ends], self.constants)
        return helper.make_model(graph, ir_version=8, opset_imports=[
            helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)])


def graphs():
    rng = np.random.default_rng(20261124)
    yield from sums(rng)
    yield from joins(rng)
    yield from pools(rng)
    yield from functions(rng)
    yield from products(rng)
    yield from convolutions(rng)
    yield from integers(rng)
    yield from dynamics(rng)
    yield from borders(rng)


def any_of(rng, dtype, shape):
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, endpoint=True).astype(dtype)


def sums(rng):
    # Zero points at the ends and between; scales far apart.
    points = {"u8": (np.uint8, [(0, 0, 0), (255, 128, 7), (128, 0, 255), (3, 250, 128)]),
              "s8": (np.int8, [(-128, -128, -128), (127, 0, -7), (0, -128, 127), (-3, 90, 0)])}
    scales = [(0.02, 0.03, 0.05), (0.5, 0.001, 0.4), (0.01, 0.01, 0.02), (0.003, 0.9, 1.1)]
    shapes = [((1, 5, 4, 6), (1, 5, 4, 6)), ((1, 5, 4, 6), (5, 1, 1)), ((1, 17), (1, 17)), ((2, 3, 8), (8,))]
    for kind in ("Add", "Mul"):
        for short, (dtype, zeros) in points.items():
            for i, (zero, scale, (left, right)) in enumerate(zip(zeros, scales, shapes)):
                g = Graph(f"qlinear{kind.lower()}.{short}.{i}", dtype, left)
                b = any_of(rng, dtype, right)
                last = scale[2] if kind == "Add" else scale[0] * scale[1] * 90
                y = g.ms(f"QLinear{kind}", "x", np.float32(scale[0]), dtype(zero[0]), b, np.float32(scale[1]),
                         dtype(zero[1]), np.float32(last), dtype(zero[2]))
                yield g.out(y, dtype)
    for kind in ("Add", "Mul"):
        g = Graph(f"qlinear{kind.lower()}.self", np.uint8, [1, 3, 5, 5])
        turned = g.op("Transpose", "x", perm=[0, 1, 3, 2])
        y = g.ms(f"QLinear{kind}", "x", np.float32(0.1), np.uint8(100), turned, np.float32(0.1), np.uint8(100),
                 np.float32(0.25), np.uint8(90))
        yield g.out(y, np.uint8)


def joins(rng):
    for i, (dtype, axis, shape) in enumerate([(np.uint8, 1, (1, 3, 4, 5)), (np.int8, 2, (1, 5, 3, 4)),
                                              (np.uint8, -1, (2, 7)), (np.int8, 1, (1, 17, 6))]):
        g = Graph(f"qlinearconcat.{i}", dtype, shape)
        other = any_of(rng, dtype, shape)
        y = g.ms("QLinearConcat", np.float32(0.07), dtype(5), "x", np.float32(0.05), dtype(9), other, np.float32(0.07),
                 dtype(5), "x", np.float32(0.09), dtype(0), axis=axis)
        yield g.out(y, dtype)


def pools(rng):
    rows = [
        ((1, 3, 8, 9), dict(kernel_shape=[2, 2], strides=[2, 2])),
        ((1, 17, 7, 7), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
        ((1, 5, 7, 7), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1)),
        ((1, 4, 8, 8), dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
        ((1, 8, 9, 3), dict(kernel_shape=[2, 2], strides=[1, 1], channels_last=1)),
        ((1, 16, 30), dict(kernel_shape=[4], strides=[3])),
        ((2, 3, 6, 6), dict(kernel_shape=[3, 2], auto_pad="SAME_UPPER")),
    ]
    for i, (shape, attributes) in enumerate(rows):
        dtype = (np.uint8, np.int8)[i % 2]
        g = Graph(f"qlinearaveragepool.{i}", dtype, shape)
        y = g.ms("QLinearAveragePool", "x", np.float32(0.05), dtype(17), np.float32(0.04), dtype(11), **attributes)
        yield g.out(y, dtype)
    for i, (shape, last) in enumerate([((1, 3, 7, 7), 0), ((1, 17, 5, 9), 0), ((1, 6, 6, 24), 1), ((2, 8, 4, 4), 0),
                                       ((1, 40, 20), 0)]):
        dtype = (np.uint8, np.int8)[i % 2]
        g = Graph(f"qlinearglobalaveragepool.{i}", dtype, shape)
        y = g.ms("QLinearGlobalAveragePool", "x", np.float32(0.05), dtype(100), np.float32(0.02), dtype(64),
                 channels_last=last)
        yield g.out(y, dtype)
    for i, dtype in enumerate((np.uint8, np.int8)):
        g = Graph(f"maxpool.bytes.{i}", dtype, [1, 3, 7, 8])
        g.left.add("*")
        yield g.out(g.op("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0]), dtype)


def functions(rng):
    for i, dtype in enumerate((np.uint8, np.int8)):
        for kind, attributes, step, zero in [("QLinearSigmoid", {}, 1 / 256, np.iinfo(dtype).min),
                                             ("QLinearLeakyRelu", dict(alpha=0.2), 0.03, 40),
                                             ("QLinearLeakyRelu", {}, 0.05, np.iinfo(dtype).min)]:
            g = Graph(f"{kind.lower()}.{i}.{zero}", dtype, [1, 5, 7])
            yield g.out(g.ms(kind, "x", np.float32(0.04), dtype(110), np.float32(step), dtype(zero), **attributes), dtype)
        for axis, shape, opset in [(-1, (1, 10), 13), (1, (1, 5, 3, 4), 13), (3, (1, 5, 3, 4), 13), (1, (1, 5, 3, 4), 12)]:
            g = Graph(f"qlinearsoftmax.{i}.{len(shape)}.{axis}.{opset}", dtype, shape, opset=opset)
            y = g.ms("QLinearSoftmax", "x", np.float32(0.05), dtype(3), np.float32(1 / 256), dtype(np.iinfo(dtype).min),
                     axis=axis, opset=opset)
            yield g.out(y, dtype)
    # Softmax before opset 13 takes every axis from its own on together.
    for opset in (10, 11, 13):
        g = Graph(f"softmax.{opset}", np.uint8, [1, 4, 3, 5], opset=opset)
        y = g.op("Softmax", g.dq("x", 0.04, np.uint8(90)), axis=1)
        yield g.out(g.q(y, 1 / 256, np.uint8(0)), np.uint8)
    g = Graph("softmax.default.11", np.int8, [1, 4, 6], opset=11)
    yield g.out(g.q(g.op("Softmax", g.dq("x", 0.04, np.int8(9))), 1 / 256, np.int8(-128)), np.int8)
    g = Graph("logsoftmax", np.int8, [1, 12], left=["*"])
    yield g.out(g.q(g.op("LogSoftmax", g.dq("x", 0.04, np.int8(9)), axis=-1), 0.05, np.int8(127)), np.int8)
    # Between dequantize and quantize, and not element-wise.
    for kind, attributes in [("CumSum", {}), ("LpNormalization", dict(axis=1)), ("ReduceMax", dict(axes=[1])),
                             ("ReduceSum", {}), ("InstanceNormalization", {}), ("LRN", dict(size=3)),
                             ("Hardmax", dict(axis=1))]:
        g = Graph(f"between.{kind.lower()}", np.uint8, [1, 6, 5, 4], left=["*"])
        x = g.dq("x", 0.02, np.uint8(120))
        inputs = {"CumSum": [np.int64(1)], "ReduceSum": [np.array([2], np.int64)],
                  "InstanceNormalization": [np.linspace(0.5, 2, 6, dtype=np.float32), np.zeros(6, np.float32)]}
        y = g.op(kind, x, *inputs.get(kind, []), **attributes)
        yield g.out(g.q(y, 0.06, np.uint8(110)), np.uint8)


def products(rng):
    for i, (a, b, zero) in enumerate([(np.uint8, np.int8, 0), (np.uint8, np.uint8, 131), (np.int8, np.int8, 0),
                                      (np.int8, np.int8, -9)]):
        for shape, n in [((1, 16), 24), ((5, 40), 3), ((1, 3, 7, 17), 16)]:
            g = Graph(f"qlinearmatmul.{i}.{len(shape)}.{n}", a, shape)
            w = any_of(rng, b, (shape[-1], n))
            columns = len(shape) == 2 and n == 3
            scale = np.linspace(0.005, 0.02, n, dtype=np.float32) if columns else np.float32(0.01)
            point = np.full(n, zero, b) if columns else b(zero)
            y = g.op("QLinearMatMul", "x", np.float32(0.03), a(111), w, scale, point, np.float32(0.6), a(100))
            yield g.out(y, a)
        # Of two activations.
        g = Graph(f"qlinearmatmul.both.{i}", a, (2, 5, 12))
        turned = g.op("Transpose", "x", perm=[0, 2, 1])
        y = g.op("QLinearMatMul", "x", np.float32(0.03), a(111), turned, np.float32(0.02), a(30), np.float32(0.6), a(100))
        yield g.out(y, a)
        g = Graph(f"qgemm.{i}", a, (3, 17))
        y = g.ms("QGemm", "x", np.float32(0.03), a(7), any_of(rng, b, (24, 17)), np.float32(0.01), b(zero),
                 rng.integers(-9000, 9000, 24).astype(np.int32), np.float32(0.4), a(90), transB=1)
        yield g.out(y, a)
        g = Graph(f"qgemm.float.{i}", a, (1, 40))
        y = g.ms("QGemm", "x", np.float32(0.03), a(7), any_of(rng, b, (40, 5)), np.linspace(0.01, 0.02, 5, dtype=np.float32),
                 np.full(5, zero, b), rng.integers(-9000, 9000, 5).astype(np.int32))
        yield g.out(y, np.float32)
    g = Graph("qgemm.alpha", np.uint8, (3, 17))
    y = g.ms("QGemm", "x", np.float32(0.03), np.uint8(7), any_of(rng, np.int8, (24, 17)), np.float32(0.01), np.int8(0),
             "", np.float32(0.2), np.uint8(90), transB=1, alpha=0.5)
    yield g.out(y, np.uint8)
    g = Graph("qgemm.turned", np.uint8, (17, 3))
    y = g.ms("QGemm", "x", np.float32(0.03), np.uint8(7), any_of(rng, np.int8, (17, 24)), np.float32(0.01), np.int8(0),
             "", np.float32(0.4), np.uint8(90), transA=1)
    yield g.out(y, np.uint8)
    # Broadcast batches, vectors.
    g = Graph("matmul.batches", np.int8, (1, 4, 3, 6))
    w = any_of(rng, np.int8, (4, 6, 5))
    y = g.op("MatMul", g.dq("x", 0.03, np.int8(3)), g.dq(w, 0.02, np.int8(0)))
    yield g.out(g.q(y, 0.3, np.int8(-5)), np.int8)
    g = Graph("matmul.vector", np.int8, (4, 6), left=["*"])
    y = g.op("MatMul", g.dq("x", 0.03, np.int8(3)), g.dq(any_of(rng, np.int8, (6,)), 0.02, np.int8(0)))
    yield g.out(g.q(y, 0.3, np.int8(-5)), np.int8)
    g = Graph("matmul.left", np.int8, (6, 4))
    y = g.op("MatMul", g.dq(any_of(rng, np.int8, (5, 6)), 0.02, np.int8(0)), g.dq("x", 0.03, np.int8(3)))
    yield g.out(g.q(y, 0.3, np.int8(-5)), np.int8)
    for name, attributes in [("alpha", dict(alpha=0.5, transB=1)), ("beta", dict(beta=2.0, transB=1)),
                             ("turned", dict(transA=1, transB=1))]:
        shape = (6, 4) if name == "turned" else (4, 6)
        g = Graph(f"gemm.{name}", np.int8, shape)
        y = g.op("Gemm", g.dq("x", 0.03, np.int8(3)), g.dq(any_of(rng, np.int8, (5, 6)), 0.02, np.int8(0)),
                 rng.normal(0, 1, 5).astype(np.float32), **attributes)
        yield g.out(g.q(y, 0.1, np.int8(-5)), np.int8)


def convolutions(rng):
    rows = [
        ("u8s8", np.uint8, np.int8, (1, 3, 8, 8), (16, 3, 3, 3), 0, dict(pads=[1, 1, 1, 1])),
        ("u8u8", np.uint8, np.uint8, (1, 5, 8, 8), (17, 5, 3, 3), 120, dict(pads=[1, 1, 1, 1])),
        ("u8u8low", np.uint8, np.uint8, (1, 5, 8, 8), (8, 5, 3, 3), 0, dict(strides=[2, 2])),
        ("u8u8depth", np.uint8, np.uint8, (1, 16, 8, 8), (16, 1, 3, 3), 255, dict(group=16, pads=[1, 1, 1, 1])),
        ("s8s8", np.int8, np.int8, (1, 17, 8, 8), (24, 17, 1, 1), 0, dict()),
        ("s8s8zero", np.int8, np.int8, (1, 4, 8, 8), (8, 2, 3, 3), 5, dict(group=2)),
        ("u8line", np.uint8, np.int8, (1, 5, 30), (8, 5, 3), 0, dict(pads=[1, 1])),
        ("u8batch", np.uint8, np.int8, (2, 3, 8, 8), (8, 3, 3, 3), 0, dict(auto_pad="SAME_UPPER")),
        ("s8depth", np.int8, np.int8, (1, 40, 7, 7), (40, 1, 5, 5), 0, dict(group=40, pads=[2, 2, 2, 2])),
    ]
    for name, a, b, shape, w, zero, attributes in rows:
        for channel in (False, True):
            for opset in ((10, 13) if not channel else (13,)):
                g = Graph(f"qlinearconv.{name}.{'channel' if channel else opset}", a, shape, opset=opset)
                n = w[0]
                scale = rng.uniform(0.005, 0.02, n).astype(np.float32) if channel else np.float32(0.01)
                point = np.full(n, zero, b) if channel else b(zero)
                y = g.op("QLinearConv", "x", np.float32(0.03), a(77), any_of(rng, b, w), scale, point,
                         np.float32(0.5), a(99), rng.integers(-20000, 20000, n).astype(np.int32), **attributes)
                yield g.out(y, a)
    # A bias that is not in the sums' scale, and weights quantized twice.
    g = Graph("conv.floatbias", np.int8, (1, 3, 6, 6))
    y = g.op("Conv", g.dq("x", 0.03, np.int8(3)), g.dq(any_of(rng, np.int8, (8, 3, 3, 3)), 0.02, np.int8(0)),
             rng.normal(0, 1, 8).astype(np.float32))
    yield g.out(g.q(y, 0.3, np.int8(-5)), np.int8)
    g = Graph("conv.shared", np.int8, (1, 3, 6, 6))
    w = g.dq(any_of(rng, np.int8, (3, 3, 3, 3)), 0.02, np.int8(0))
    y = g.q(g.op("Conv", g.dq("x", 0.03, np.int8(3)), w, pads=[1, 1, 1, 1]), 0.3, np.int8(-5))
    y = g.q(g.op("Conv", g.dq(y, 0.3, np.int8(-5)), w, pads=[1, 1, 1, 1]), 3.0, np.int8(0))
    yield g.out(y, np.int8)
    g = Graph("conv.floatweights", np.int8, (1, 3, 6, 6), left=["*"])
    y = g.op("Conv", g.dq("x", 0.03, np.int8(3)), rng.normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32))
    yield g.out(g.q(y, 0.05, np.int8(-5)), np.int8)
    g = Graph("conv.float", np.int8, (1, 3, 6, 6))
    y = g.op("Conv", g.dq("x", 0.03, np.int8(3)), g.dq(any_of(rng, np.int8, (8, 3, 3, 3)), 0.02, np.int8(0)),
             rng.normal(0, 1, 8).astype(np.float32))
    yield g.out(g.op("Relu", y), np.float32)
    # Weights of one channel far over, a saturating scale, and a padding that is not zero as stored.
    g = Graph("conv.saturated", np.uint8, (1, 3, 6, 6))
    y = g.op("Conv", g.dq("x", 0.03, np.uint8(255)), g.dq(any_of(rng, np.int8, (8, 3, 3, 3)), 0.02, np.int8(0)),
             pads=[1, 1, 1, 1])
    yield g.out(g.q(y, 0.0001, np.uint8(0)), np.uint8)


def integers(rng):
    """MatMulInteger and ConvInteger with sums as the result, or scaled by constants."""
    for i, (a, b, za, zb) in enumerate([(np.uint8, np.int8, 128, 0), (np.uint8, np.uint8, 3, 200)]):
        g = Graph(f"matmulinteger.{i}", a, (4, 17), left=["*"])
        yield g.out(g.op("MatMulInteger", "x", any_of(rng, b, (17, 5)), a(za), b(zb)), np.int32)
        g = Graph(f"convinteger.{i}", a, (1, 3, 6, 6), left=["*"])
        yield g.out(g.op("ConvInteger", "x", any_of(rng, b, (8, 3, 3, 3)), a(za), b(zb), pads=[1, 1, 1, 1]), np.int32)
        g = Graph(f"matmulinteger.scaled.{i}", a, (4, 17))
        y = g.op("Cast", g.op("MatMulInteger", "x", any_of(rng, b, (17, 5)), a(za), b(zb)), to=TensorProto.FLOAT)
        yield g.out(g.op("Mul", y, np.float32(0.0123)), np.float32)


def dynamics(rng):
    g = Graph("dynamicquantize", np.float32, (3, 9), left=["*"])
    y, scale, zero = g.op("DynamicQuantizeLinear", "x", outputs=3)
    g.out(y, np.uint8).out(scale, np.float32)
    yield g.out(zero, np.uint8)
    g = Graph("dynamicquantize.back", np.float32, (3, 9), left=["*"])
    y, scale, zero = g.op("DynamicQuantizeLinear", "x", outputs=3)
    yield g.out(g.op("DequantizeLinear", y, scale, zero), np.float32)
    # Of two activations.
    g = Graph("matmulinteger.both", np.float32, (2, 5, 12), left=["*"])
    y, scale, zero = g.op("DynamicQuantizeLinear", "x", outputs=3)
    turned = g.op("Transpose", "x", perm=[0, 2, 1])
    w, scale2, zero2 = g.op("DynamicQuantizeLinear", turned, outputs=3)
    y = g.op("Cast", g.op("MatMulInteger", y, w, zero, zero2), to=TensorProto.FLOAT)
    yield g.out(g.op("Mul", y, g.op("Mul", scale, scale2)), np.float32)


def borders(rng):
    """Quantize and dequantize where no layer is near."""
    f = np.float32
    for i, dtype in enumerate((np.uint8, np.int8)):
        g = Graph(f"quantize.{i}", f, (1, 4, 5))
        yield g.out(g.q("x", 0.02, dtype(60)), dtype)
        g = Graph(f"dequantize.{i}", dtype, (1, 4, 5))
        yield g.out(g.dq("x", 0.02, dtype(60)), f)
        g = Graph(f"requantize.{i}", dtype, (1, 4, 5))
        yield g.out(g.q(g.dq("x", 0.02, dtype(60)), 0.013, (np.int8, np.uint8)[i](12)), (np.int8, np.uint8)[i])
        g = Graph(f"channels.{i}", f, (1, 4, 5), left=["*"])
        s, z = np.linspace(0.01, 0.05, 4, dtype=f), np.arange(4).astype(dtype)
        y = g.op("QuantizeLinear", "x", s, z, axis=1)
        yield g.out(g.op("DequantizeLinear", y, s, z, axis=1), f)
    g = Graph("nozero", f, (1, 4, 5))
    yield g.out(g.op("QuantizeLinear", "x", f(0.02)), np.uint8)
    g = Graph("int32", np.int32, (1, 7), left=["*"])
    yield g.out(g.op("DequantizeLinear", "x", f(1e-9)), f)
    for opset in (10, 13, 17, 19, 21, 23):
        g = Graph(f"opset.{opset}", np.uint8, (1, 3, 6, 6), opset=opset)
        y = g.op("Conv", g.dq("x", 0.03, np.uint8(128)), g.dq(any_of(rng, np.int8, (8, 3, 3, 3)), 0.02, np.int8(0)))
        y = g.op("Relu", y)
        yield g.out(g.q(y, 0.1, np.uint8(0)), np.uint8)
    # Moves of bytes.
    index = lambda *v: np.array(v, np.int64)
    moves = {
        "transpose": ("Transpose", [], dict(perm=[0, 2, 3, 1])),
        "reshape": ("Reshape", [index(1, -1, 4)], {}),
        "flatten": ("Flatten", [], dict(axis=2)),
        "slice": ("Slice", [index(1), index(3), index(1)], {}),
        "pad": ("Pad", [index(0, 0, 1, 1, 0, 0, 0, 2)], {}),
        "expand": ("Expand", [index(2, 3, 4, 4)], {}),
        "tile": ("Tile", [index(1, 2, 1, 1)], {}),
        "gather": ("Gather", [index(2, 0)], dict(axis=1)),
    }
    for name, (kind, inputs, attributes) in moves.items():
        for inside in (False, True):
            g = Graph(f"move.{name}.{'floats' if inside else 'bytes'}", np.uint8, (1, 3, 4, 4), left=["*"])
            y = g.dq("x", 0.03, np.uint8(128)) if inside else "x"
            y = g.op(kind, y, *inputs, **attributes)
            if inside:
                y = g.q(y, 0.03, np.uint8(128))
            yield g.out(g.op("DequantizeLinear", y, f(0.03), np.uint8(128)), f)
