"""Small float networks: each a row of a table, or a few lines where it has branches."""

import math
import zlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A float graph with one input, built op by op; weights come from a generator seeded by the name."""

    def __init__(self, name, shape, opset=13, batch=None):
        self.name, self.shape, self.opset, self.batch = name, list(shape), opset, batch
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes, self.constants, self.outputs = [], [], []
        self.channels = {"x": shape[1] if len(shape) > 1 else shape[0]}
        # Operators that may be left to tract, by what it calls them; "*": any.
        self.left = set()

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind, *inputs, channels=None, outputs=1, domain="", **attributes):
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"t{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, name=f"n{len(self.nodes)}", domain=domain, **attributes))
        for name in made:
            self.channels[name] = channels if channels is not None else self.channels.get(names[0])
        return made[0] if outputs == 1 else made

    def weights(self, *shape, fan=None):
        fan = fan or max(1, math.prod(shape[1:]))
        # Channels of different sizes, so that a scale for each channel matters.
        spread = self.rng.uniform(0.3, 2.0, (shape[0],) + (1,) * (len(shape) - 1))
        return (self.rng.normal(0, 1, shape) * spread / math.sqrt(fan)).astype(np.float32)

    def bias(self, n):
        return self.rng.normal(0, 0.3, n).astype(np.float32)

    def conv(self, x, out, kernel, group=1, bias=True, **attributes):
        kernel = [kernel, kernel] if isinstance(kernel, int) else list(kernel)
        w = self.weights(out, self.channels[x] // group, *kernel)
        inputs = [x, w] + ([self.bias(out)] if bias else [])
        return self.op("Conv", *inputs, channels=out, kernel_shape=kernel, group=group, **attributes)

    def depthwise(self, x, kernel, times=1, **attributes):
        return self.conv(x, self.channels[x] * times, kernel, group=self.channels[x], **attributes)

    def gemm(self, x, inputs, out, bias=True, turned=True):
        w = self.weights(out, inputs)
        more = [self.bias(out)] if bias else []
        return self.op("Gemm", x, w if turned else w.T.copy(), *more, channels=out, transB=int(turned))

    def matmul(self, x, inputs, out, bias=True):
        x = self.op("MatMul", x, self.weights(out, inputs).T.copy(), channels=out)
        return self.op("Add", x, self.bias(out)) if bias else x

    def activation(self, x, kind):
        if not kind:
            return x
        if kind == "Relu6":
            return self.op("Clip", x, np.float32(0), np.float32(6))
        if kind == "Clip1":
            return self.op("Clip", x, np.float32(-1), np.float32(1))
        if kind == "Swish":
            return self.op("Mul", x, self.op("Sigmoid", x))
        attributes = {"LeakyRelu": {"alpha": 0.1}, "Softmax": {"axis": -1}}.get(kind, {})
        return self.op(kind, x, **attributes)

    def out(self, *names):
        self.outputs += names
        return self

    def model(self):
        shape = list(self.shape)
        if self.batch:
            shape[0] = self.batch
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


# name, input shape, output channels, kernel, attributes, activation
CONVOLUTIONS = [
    ("dense3", [1, 3, 11, 11], 16, 3, dict(pads=[1, 1, 1, 1]), "Relu"),
    ("dense3s2", [1, 3, 12, 10], 8, 3, dict(strides=[2, 2], auto_pad="SAME_UPPER"), "Relu6"),
    ("dense3lower", [1, 5, 9, 12], 17, 3, dict(strides=[2, 2], auto_pad="SAME_LOWER"), None),
    ("dense3valid", [1, 1, 9, 9], 5, 3, dict(auto_pad="VALID"), None),
    ("one", [1, 1, 6, 6], 1, 3, dict(pads=[1, 1, 1, 1], bias=False), None),
    ("point", [1, 16, 7, 7], 24, 1, dict(), "Relu"),
    ("point40", [1, 24, 6, 5], 40, 1, dict(strides=[2, 2]), None),
    ("point17", [1, 40, 5, 5], 17, 1, dict(bias=False), "Relu6"),
    ("point3", [1, 17, 5, 7], 3, 1, dict(), "LeakyRelu"),
    ("five", [1, 3, 13, 13], 5, 5, dict(strides=[2, 2], pads=[2, 2, 2, 2]), "LeakyRelu"),
    ("seven", [1, 3, 24, 24], 16, 7, dict(strides=[4, 4], pads=[3, 3, 3, 3]), "Relu"),
    ("two", [1, 4, 8, 8], 24, 2, dict(strides=[2, 2]), "Sigmoid"),
    ("dilated", [1, 3, 12, 12], 16, 3, dict(pads=[2, 2, 2, 2], dilations=[2, 2]), "Relu"),
    ("dilated23", [1, 16, 13, 14], 5, 3, dict(dilations=[2, 3]), "Tanh"),
    ("flat13", [1, 5, 6, 9], 16, [1, 3], dict(pads=[0, 1, 0, 1]), None),
    ("tall31", [1, 16, 9, 6], 17, [3, 1], dict(pads=[1, 0, 1, 0]), "Relu"),
    ("speech", [1, 1, 25, 10], 16, [10, 4], dict(strides=[2, 2], auto_pad="SAME_UPPER"), "Relu"),
    ("skewed", [1, 3, 9, 10], 24, 3, dict(pads=[0, 1, 2, 1], strides=[2, 1]), "Clip1"),
    ("wide", [1, 40, 6, 6], 40, 3, dict(pads=[1, 1, 1, 1]), "Relu"),
    ("whole", [1, 8, 5, 5], 24, 5, dict(), "Relu"),
    ("deep", [1, 130, 4, 4], 17, 3, dict(pads=[1, 1, 1, 1]), "Relu"),
    ("depth", [1, 17, 9, 9], 17, 3, dict(group=17, pads=[1, 1, 1, 1]), "Relu"),
    ("depth16", [1, 16, 9, 8], 16, 3, dict(group=16, strides=[2, 2], auto_pad="SAME_LOWER"), "Relu6"),
    ("depth24", [1, 24, 9, 9], 24, 5, dict(group=24, pads=[2, 2, 2, 2], bias=False), None),
    ("depth40", [1, 40, 8, 8], 40, 3, dict(group=40, strides=[2, 2], auto_pad="SAME_UPPER"), "Relu"),
    ("depth5", [1, 5, 9, 9], 5, 3, dict(group=5, dilations=[2, 2]), None),
    ("depth4", [1, 4, 8, 8], 4, 3, dict(group=4, pads=[1, 1, 1, 1]), "HardSwish"),
    ("depth8", [1, 8, 6, 10], 8, [1, 5], dict(group=8, pads=[0, 2, 0, 2]), "Relu"),
    ("multiplier2", [1, 8, 8, 8], 16, 3, dict(group=8, pads=[1, 1, 1, 1]), "Relu"),
    ("multiplier3", [1, 3, 8, 8], 9, 3, dict(group=3), None),
    ("multiplier1", [1, 1, 8, 8], 8, 3, dict(group=1, strides=[2, 2], pads=[1, 1, 1, 1]), "Relu"),
    ("group2", [1, 4, 8, 8], 8, 3, dict(group=2, pads=[1, 1, 1, 1]), "Relu"),
    ("group3", [1, 24, 7, 7], 24, 3, dict(group=3, pads=[1, 1, 1, 1]), None),
    ("group4", [1, 16, 6, 6], 32, 1, dict(group=4), "Relu6"),
    ("group5", [1, 40, 6, 6], 20, 3, dict(group=5, strides=[2, 2]), "LeakyRelu"),
    ("group2odd", [1, 6, 7, 7], 34, 3, dict(group=2, dilations=[2, 2], pads=[2, 2, 2, 2]), None),
    ("line", [1, 3, 40], 8, [3], dict(pads=[1, 1]), "Relu"),
    ("line5", [1, 8, 33], 16, [5], dict(strides=[2], auto_pad="SAME_UPPER"), "Relu6"),
    ("line9", [1, 16, 50], 16, [9], dict(group=16, pads=[4, 4]), None),
    ("line3d", [1, 5, 29], 17, [3], dict(dilations=[4], pads=[8, 0]), "Tanh"),
    ("line24", [1, 24, 20], 24, [3], dict(group=3, strides=[3]), "Relu"),
    ("line1", [1, 1, 64], 40, [16], dict(strides=[8]), "Relu"),
    ("lower1", [1, 5, 17], 3, [4], dict(strides=[2], auto_pad="SAME_LOWER"), None),
    ("batch2", [2, 3, 8, 8], 8, 3, dict(pads=[1, 1, 1, 1]), "Relu"),
    ("batch3", [3, 16, 6, 6], 16, 3, dict(group=16, pads=[1, 1, 1, 1]), None),
    ("batch4", [4, 5, 19], 17, [3], dict(), "Relu"),
]

# name, input shape, inputs, outputs, what
PRODUCTS = [
    ("gemm", [1, 16], 16, 24, dict(), "Relu"),
    ("gemm1", [1, 5], 5, 1, dict(), None),
    ("gemm17", [1, 40], 40, 17, dict(turned=False), "Relu6"),
    ("gemm600", [1, 640], 640, 10, dict(bias=False), None),
    ("gemm4", [4, 24], 24, 40, dict(), "Relu"),
    ("gemmsoft", [1, 24], 24, 10, dict(), "Softmax"),
    ("matmul", [1, 16], 16, 24, dict(), "Relu"),
    ("matmul3", [1, 17], 17, 3, dict(bias=False), None),
    ("matmul5", [5, 40], 40, 17, dict(), "Sigmoid"),
    ("rows", [1, 10, 16], 16, 8, dict(), "Relu"),
    ("rows3", [3, 7, 24], 24, 5, dict(bias=False), "Tanh"),
    ("heads", [1, 4, 6, 8], 8, 16, dict(), "LeakyRelu"),
]


def convolutions():
    for name, shape, out, kernel, attributes, activation in CONVOLUTIONS:
        def make(name=name, shape=shape, out=out, kernel=kernel, attributes=attributes, activation=activation):
            net = Net(name, shape, opset=14 if activation == "HardSwish" else 13)
            return net.out(net.activation(net.conv("x", out, kernel, **attributes), activation))
        yield make


def products():
    for name, shape, inputs, out, how, activation in PRODUCTS:
        def make(name=name, shape=shape, inputs=inputs, out=out, how=how, activation=activation):
            net = Net(name, shape)
            call = net.gemm if name.startswith("gemm") else net.matmul
            return net.out(net.activation(call("x", inputs, out, **how), activation))
        yield make


POOLS = [
    ("max2", "MaxPool", dict(kernel_shape=[2, 2], strides=[2, 2])),
    ("max3", "MaxPool", dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
    ("maxceil", "MaxPool", dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    ("maxceilpad", "MaxPool", dict(kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1, pads=[1, 1, 1, 1])),
    ("maxsame", "MaxPool", dict(kernel_shape=[2, 3], strides=[2, 1], auto_pad="SAME_UPPER")),
    ("maxdilated", "MaxPool", dict(kernel_shape=[2, 2], dilations=[2, 2])),
    ("mean2", "AveragePool", dict(kernel_shape=[2, 2], strides=[2, 2])),
    ("meanpad", "AveragePool", dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
    ("meanall", "AveragePool", dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1)),
    ("meanceil", "AveragePool", dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    ("meanceilall", "AveragePool",
     dict(kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 0, 0], count_include_pad=1)),
    ("meansame", "AveragePool", dict(kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_LOWER")),
    ("global", "GlobalAveragePool", dict()),
    ("globalmax", "GlobalMaxPool", dict()),
]


def pools():
    for name, kind, attributes in POOLS:
        def make(name=name, kind=kind, attributes=attributes):
            net = Net(name, [1, 3, 10, 9])
            x = net.conv("x", 17, 3, pads=[1, 1, 1, 1])
            x = net.op(kind, x, **attributes)
            x = net.conv(x, 5, 1)
            return net.out(x)
        yield make


UNARY = ["Relu", "Relu6", "Clip1", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Swish",
         "Softplus", "Abs", "Exp", "Erf", "Gelu", "PRelu", "Neg", "Softsign", "Mish", "Selu"]


def activations():
    """Each between two convolutions."""
    for kind in UNARY:
        def make(kind=kind):
            net = Net(f"act_{kind}", [1, 3, 6, 7],
                      opset={"HardSwish": 14, "Mish": 18, "Gelu": 20}.get(kind, 13))
            x = net.conv("x", 16, 3, pads=[1, 1, 1, 1])
            if kind == "PRelu":
                x = net.op("PRelu", x, net.bias(16).reshape(16, 1, 1))
                net.left.add("*")
            else:
                x = net.activation(x, kind)
            return net.out(net.conv(x, 5, 1))
        yield make


def branched():
    """Residuals, joins, moves, attention and graphs of several outputs."""

    def residual():
        net = Net("residual", [1, 8, 8, 8])
        y = net.activation(net.conv("x", 8, 3, pads=[1, 1, 1, 1]), "Relu")
        y = net.conv(y, 8, 3, pads=[1, 1, 1, 1])
        return net.out(net.activation(net.op("Add", "x", y), "Relu"))

    def shortcut():
        net = Net("shortcut", [1, 5, 9, 9])
        y = net.activation(net.conv("x", 17, 3, strides=[2, 2], pads=[1, 1, 1, 1]), "Relu")
        y = net.conv(y, 17, 3, pads=[1, 1, 1, 1])
        z = net.conv("x", 17, 1, strides=[2, 2])
        return net.out(net.activation(net.op("Add", y, z), "Relu"))

    def bottleneck():
        net = Net("bottleneck", [1, 8, 8, 8])
        y = net.activation(net.conv("x", 24, 1), "Relu6")
        y = net.activation(net.depthwise(y, 3, pads=[1, 1, 1, 1]), "Relu6")
        return net.out(net.op("Add", "x", net.conv(y, 8, 1)))

    def separable():
        net = Net("separable", [1, 1, 20, 10])
        y = net.activation(net.conv("x", 16, [10, 4], strides=[2, 2], auto_pad="SAME_UPPER"), "Relu")
        for _ in range(2):
            y = net.activation(net.depthwise(y, 3, pads=[1, 1, 1, 1]), "Relu")
            y = net.activation(net.conv(y, 16, 1), "Relu")
        y = net.op("Flatten", net.op("GlobalAveragePool", y))
        return net.out(net.activation(net.gemm(y, 16, 12), "Softmax"))

    def squeeze_excite():
        net = Net("excite", [1, 3, 8, 8])
        y = net.activation(net.conv("x", 16, 3, pads=[1, 1, 1, 1]), "Relu")
        s = net.op("GlobalAveragePool", y)
        s = net.activation(net.conv(s, 5, 1), "Relu")
        s = net.activation(net.conv(s, 16, 1), "Sigmoid")
        return net.out(net.conv(net.op("Mul", y, s), 3, 1))

    def inception():
        net = Net("inception", [1, 5, 8, 8])
        a = net.conv("x", 8, 1)
        b = net.activation(net.conv("x", 5, 3, pads=[1, 1, 1, 1]), "Relu")
        c = net.op("MaxPool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
        return net.out(net.conv(net.op("Concat", a, b, c, axis=1, channels=18), 7, 1))

    def dense_block():
        net = Net("denseblock", [1, 4, 7, 7])
        x, n = "x", 4
        for _ in range(3):
            y = net.activation(net.conv(x, 3, 3, pads=[1, 1, 1, 1]), "Relu")
            n += 3
            x = net.op("Concat", x, y, axis=1, channels=n)
        return net.out(net.conv(x, 8, 1))

    def concat_height():
        net = Net("concatheight", [1, 3, 6, 5])
        a = net.conv("x", 8, 3, pads=[1, 1, 1, 1])
        b = net.activation(net.conv("x", 8, 1), "Relu")
        return net.out(net.conv(net.op("Concat", a, b, axis=2), 5, 3))

    def shuffle():
        net = Net("shuffle", [1, 12, 6, 6])
        y = net.activation(net.conv("x", 12, 1, group=3), "Relu")
        y = net.op("Reshape", y, np.array([0, 3, 4, 6, 6], np.int64))
        y = net.op("Transpose", y, perm=[0, 2, 1, 3, 4])
        y = net.op("Reshape", y, np.array([0, 12, 6, 6], np.int64), channels=12)
        return net.out(net.depthwise(y, 3, pads=[1, 1, 1, 1]))

    def upsample():
        net = Net("upsample", [1, 3, 8, 8])
        a = net.activation(net.conv("x", 8, 3, pads=[1, 1, 1, 1]), "Relu")
        b = net.activation(net.conv(a, 16, 3, strides=[2, 2], pads=[1, 1, 1, 1]), "Relu")
        b = net.op("Resize", b, "", np.array([1, 1, 2, 2], np.float32), mode="nearest",
                   coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        return net.out(net.conv(net.op("Concat", a, b, axis=1, channels=24), 5, 1))

    def bilinear():
        net = Net("bilinear", [1, 3, 5, 6])
        y = net.activation(net.conv("x", 8, 3, pads=[1, 1, 1, 1]), "Relu")
        y = net.op("Resize", y, "", np.array([1, 1, 2, 2], np.float32), mode="linear",
                   coordinate_transformation_mode="half_pixel")
        net.left.add("*")
        return net.out(net.conv(y, 5, 1))

    def padded():
        net = Net("padded", [1, 3, 8, 8])
        y = net.activation(net.conv("x", 8, 3), "Relu")
        y = net.op("Pad", y, np.array([0, 0, 1, 0, 0, 0, 2, 1], np.int64))
        return net.out(net.conv(y, 5, 3, strides=[2, 2]))

    def padded_input():
        net = Net("paddedinput", [1, 3, 8, 8])
        net.left.add("Pad")
        y = net.op("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        return net.out(net.conv(y, 5, 3, strides=[2, 2]))

    def sliced():
        net = Net("sliced", [1, 3, 8, 8])
        y = net.conv("x", 16, 3, pads=[1, 1, 1, 1])
        y = net.op("Slice", y, np.array([4, 1], np.int64), np.array([13, 100], np.int64), np.array([1, 3], np.int64),
                   np.array([1, 2], np.int64), channels=9)
        return net.out(net.conv(y, 5, 1))

    def focus():
        net = Net("focus", [1, 3, 8, 8])
        net.left.add("Downsample")
        index = lambda *v: np.array(v, np.int64)
        parts = [net.op("Slice", "x", index(i, j), index(1 << 40, 1 << 40), index(2, 3), index(2, 2))
                 for i in (0, 1) for j in (0, 1)]
        y = net.op("Concat", *parts, axis=1, channels=12)
        return net.out(net.activation(net.conv(y, 8, 3, pads=[1, 1, 1, 1]), "Relu"))

    def split():
        net = Net("split", [1, 3, 8, 8])
        y = net.conv("x", 16, 3, pads=[1, 1, 1, 1])
        a, b = net.op("Split", y, np.array([6, 10], np.int64), axis=1, outputs=2)
        net.channels[a], net.channels[b] = 6, 10
        return net.out(net.op("Add", net.conv(a, 5, 1), net.conv(b, 5, 3, pads=[1, 1, 1, 1])))

    def csp():
        net = Net("csp", [1, 8, 6, 6])
        y = net.activation(net.conv("x", 16, 1), "Swish")
        a, b = net.op("Split", y, np.array([8, 8], np.int64), axis=1, outputs=2)
        net.channels[a] = net.channels[b] = 8
        c = net.activation(net.conv(b, 8, 3, pads=[1, 1, 1, 1]), "Swish")
        c = net.op("Add", b, c)
        return net.out(net.conv(net.op("Concat", a, b, c, axis=1, channels=24), 8, 1))

    def space_to_depth():
        net = Net("depthtospace", [1, 3, 6, 6])
        y = net.activation(net.conv("x", 16, 3, pads=[1, 1, 1, 1]), "Relu")
        y = net.op("DepthToSpace", y, blocksize=2, mode="DCR", channels=4)
        return net.out(net.conv(y, 3, 3))

    def outputs():
        net = Net("outputs", [1, 3, 8, 8])
        y = net.activation(net.conv("x", 16, 3, pads=[1, 1, 1, 1]), "Relu")
        a = net.conv(y, 5, 1)
        b = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", y)), 16, 4)
        return net.out(a, b, y)

    def detector():
        net = Net("detector", [1, 3, 16, 16])
        a = net.activation(net.conv("x", 8, 3, strides=[2, 2], pads=[1, 1, 1, 1]), "Relu")
        b = net.activation(net.conv(a, 16, 3, strides=[2, 2], pads=[1, 1, 1, 1]), "Relu")
        both = []
        for y, n in ((a, 64), (b, 16)):
            h = net.op("Transpose", net.conv(y, 12, 3, pads=[1, 1, 1, 1]), perm=[0, 2, 3, 1])
            both.append(net.op("Reshape", h, np.array([1, n * 2, 6], np.int64)))
        return net.out(net.op("Concat", *both, axis=1))

    def mean_axes(axes, keep):
        def make():
            net = Net(f"mean_{'_'.join(map(str, axes))}_{keep}".replace("-", "m"), [1, 3, 7, 6])
            y = net.activation(net.conv("x", 16, 3, pads=[1, 1, 1, 1]), "Relu")
            y = net.op("ReduceMean", y, axes=axes, keepdims=keep, channels=1 if axes == [1] else 16)
            return net.out(net.conv(y, 5, 1) if keep else net.gemm(y, 16, 5))
        return make

    def mean_rows():
        net = Net("meanrows", [1, 6, 16])
        y = net.activation(net.matmul("x", 16, 24), "Relu")
        return net.out(net.gemm(net.op("ReduceMean", y, axes=[1], keepdims=0), 24, 5))

    def autoencoder():
        net = Net("autoencoder", [1, 64], batch="N")
        y = net.activation(net.gemm("x", 64, 24), "Relu")
        y = net.activation(net.gemm(y, 24, 5), "Relu")
        y = net.activation(net.gemm(y, 5, 24), "Relu")
        return net.out(net.gemm(y, 24, 64))

    def autoencoder_matmul():
        net = Net("autoencodermm", [1, 40], batch="N")
        y = net.activation(net.matmul("x", 40, 16), "Relu")
        y = net.activation(net.matmul(y, 16, 3), "Relu")
        return net.out(net.matmul(y, 3, 40))

    def symbolic():
        net = Net("symbolic", [1, 3, 9, 9], batch="batch")
        y = net.activation(net.conv("x", 16, 3, strides=[2, 2], pads=[1, 1, 1, 1]), "Relu")
        y = net.op("GlobalAveragePool", y)
        y = net.op("Reshape", y, np.array([-1, 16], np.int64))
        return net.out(net.gemm(y, 16, 10))

    def attention(heads, rows, width):
        def make():
            net = Net(f"attention{heads}", [1, rows, width])
            each = width // heads

            def split(y, perm):
                y = net.op("Reshape", y, np.array([1, rows, heads, each], np.int64))
                return net.op("Transpose", y, perm=perm)
            q = split(net.matmul("x", width, width), [0, 2, 1, 3])
            k = split(net.matmul("x", width, width), [0, 2, 3, 1])
            v = split(net.matmul("x", width, width, bias=False), [0, 2, 1, 3])
            scores = net.op("Mul", net.op("MatMul", q, k), np.float32(1 / math.sqrt(each)))
            y = net.op("MatMul", net.activation(scores, "Softmax"), v)
            y = net.op("Transpose", y, perm=[0, 2, 1, 3])
            y = net.op("Reshape", y, np.array([1, rows, width], np.int64))
            return net.out(net.op("Add", "x", net.matmul(y, width, width)))
        return make

    def two_activations(shape, perm):
        def make():
            net = Net("mm" + "x".join(map(str, shape)), shape)
            net.left.add("OptMax")
            a = net.op("Relu", "x")
            b = net.op("Transpose", net.op("Sigmoid", "x"), perm=perm)
            return net.out(net.op("MatMul", a, b))
        return make

    def temporal():
        net = Net("temporal", [1, 5, 48])
        x = net.conv("x", 16, [1])
        for d in (1, 2, 4):
            y = net.activation(net.conv(x, 16, [3], dilations=[d], pads=[2 * d, 0]), "Relu")
            x = net.op("Add", x, y)
        y = net.op("GlobalAveragePool", x)
        return net.out(net.gemm(net.op("Flatten", y), 16, 4))

    def line_pool():
        net = Net("linepool", [1, 3, 41])
        y = net.activation(net.conv("x", 17, [5], strides=[2]), "Relu")
        y = net.op("MaxPool", y, kernel_shape=[3], strides=[2], pads=[1, 1])
        y = net.op("AveragePool", y, kernel_shape=[2], strides=[2])
        return net.out(net.conv(y, 5, [3]))

    def broadcast(kind, shape):
        def make():
            net = Net(f"{kind.lower()}_{'x'.join(map(str, shape)) or 'scalar'}", [1, 5, 6, 7])
            y = net.activation(net.conv("x", 8, 3, pads=[1, 1, 1, 1]), "Tanh")
            if kind == "Sub" and shape:
                net.left.add("OptSub")
            y = net.op(kind, y, net.rng.uniform(0.2, 1.5, shape).astype(np.float32))
            return net.out(net.conv(y, 5, 1))
        return make

    def broadcast_both():
        net = Net("broadcastboth", [1, 5, 6, 7])
        y = net.conv("x", 8, 3, pads=[1, 1, 1, 1])
        a = net.op("ReduceMean", y, axes=[2], keepdims=1)
        b = net.op("ReduceMean", y, axes=[3], keepdims=1)
        return net.out(net.conv(net.op("Add", a, b), 3, 1))

    def same_twice(kind):
        def make():
            net = Net(f"twice_{kind.lower()}", [1, 5, 6, 7])
            y = net.conv("x", 8, 3, pads=[1, 1, 1, 1])
            return net.out(net.conv(net.op(kind, y, y), 3, 1))
        return make

    def difference():
        net = Net("difference", [1, 5, 6, 7])
        return net.out(net.conv(net.op("Sub", net.conv("x", 8, 1), net.conv("x", 8, 1)), 3, 1))

    def quotient():
        net = Net("quotient", [1, 5, 6, 7])
        y = net.op("Div", net.conv("x", 8, 1), np.float32(3.7))
        return net.out(net.conv(y, 3, 1))

    def turned():
        net = Net("turned", [1, 8, 8, 3])
        net.left.add("MoveAxis")
        y = net.op("Transpose", "x", perm=[0, 3, 1, 2], channels=3)
        y = net.activation(net.conv(y, 17, 3, pads=[1, 1, 1, 1]), "Relu")
        return net.out(net.op("Transpose", y, perm=[0, 2, 3, 1]))

    def unsqueezed():
        net = Net("unsqueezed", [1, 3, 20])
        net.left.add("IntoShape")
        y = net.op("Unsqueeze", "x", np.array([2], np.int64))
        y = net.activation(net.conv(y, 8, [1, 3]), "Relu")
        y = net.op("Squeeze", y, np.array([2], np.int64))
        return net.out(net.conv(y, 5, [3]))

    def flattened():
        net = Net("flattened", [1, 3, 5, 6])
        y = net.activation(net.conv("x", 8, 3), "Relu")
        return net.out(net.gemm(net.op("Flatten", y), 8 * 12, 10))

    def last_rows():
        net = Net("lastrows", [1, 8, 5, 6])
        y = net.conv("x", 16, 1)
        y = net.op("Transpose", y, perm=[0, 2, 3, 1])
        y = net.activation(net.matmul(y, 16, 24), "Relu")
        return net.out(net.matmul(y, 24, 5))

    def soft_axis(axis):
        def make():
            net = Net(f"softaxis{axis}", [1, 3, 6, 5])
            y = net.conv("x", 8, 3, pads=[1, 1, 1, 1])
            return net.out(net.conv(net.op("Softmax", y, axis=axis), 4, 1))
        return make

    def soft_middle():
        net = Net("softmiddle", [1, 12])
        y = net.activation(net.gemm("x", 12, 8), "Softmax")
        return net.out(net.gemm(y, 8, 5))

    def transposed_convolution():
        net = Net("upconv", [1, 3, 6, 6])
        y = net.activation(net.conv("x", 8, 3, pads=[1, 1, 1, 1]), "Relu")
        y = net.op("ConvTranspose", y, net.weights(8, 4, 2, 2), strides=[2, 2], channels=4)
        net.left.add("*")
        return net.out(net.conv(y, 5, 3))

    def normalized():
        net = Net("normalized", [1, 3, 6, 6])
        net.left.add("*")
        y = net.conv("x", 8, 3, bias=False)
        y = net.op("BatchNormalization", y, np.abs(net.bias(8)) + 0.5, net.bias(8), net.bias(8), np.abs(net.bias(8)) + 1)
        return net.out(net.conv(net.activation(y, "Relu"), 5, 1))

    def layer_normalized():
        net = Net("layernorm", [1, 6, 16], opset=17)
        y = net.matmul("x", 16, 24)
        y = net.op("LayerNormalization", y, np.abs(net.bias(24)) + 0.5, net.bias(24), axis=-1)
        net.left.add("*")
        return net.out(net.matmul(y, 24, 5))

    def argmax():
        net = Net("argmax", [1, 16])
        y = net.gemm("x", 16, 10)
        return net.out(y)

    def elementwise_max():
        net = Net("maxof", [1, 3, 6, 6])
        a, b = net.conv("x", 8, 1), net.conv("x", 8, 1)
        net.left.add("*")
        return net.out(net.conv(net.op("Max", a, b), 5, 1))

    def gathered():
        net = Net("gathered", [1, 3, 6, 6])
        y = net.conv("x", 8, 1)
        y = net.op("Gather", y, np.array([7, 0, 3, 3], np.int64), axis=1, channels=4)
        return net.out(net.conv(y, 5, 1))

    yield from [residual, shortcut, bottleneck, separable, squeeze_excite, inception, dense_block, concat_height,
                shuffle, upsample, bilinear, padded, padded_input, sliced, focus, split, csp, space_to_depth, outputs,
                detector, autoencoder, autoencoder_matmul, symbolic, temporal, line_pool, broadcast_both, difference,
                quotient, turned, unsqueezed, flattened, last_rows, soft_middle, transposed_convolution, normalized,
                layer_normalized, argmax, elementwise_max, gathered, mean_rows]
    yield from [mean_axes([2, 3], 1), mean_axes([-1, -2], 0), mean_axes([2], 1), mean_axes([1], 1)]
    yield from [attention(1, 6, 16), attention(4, 5, 24)]
    yield from [two_activations([1, 5, 8], [0, 2, 1]), two_activations([2, 3, 7, 17], [0, 1, 3, 2]),
                two_activations([6, 24], [1, 0])]
    yield from [broadcast("Add", ()), broadcast("Add", (8, 1, 1)), broadcast("Mul", (1, 8, 1, 1)),
                broadcast("Mul", ()), broadcast("Add", (6, 7)), broadcast("Mul", (7,)), broadcast("Sub", (8, 1, 1))]
    yield from [same_twice("Add"), same_twice("Mul"), soft_axis(1), soft_axis(3)]
