"""Small networks in numpy: convolution, dense and ReLU layers, trained with Adam."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class Conv:
    """3x3 convolution, padding 1."""

    def __init__(self, rng, inputs, outputs, stride):
        self.w = (rng.standard_normal((outputs, inputs, 3, 3)) * np.sqrt(2 / (inputs * 9))).astype(np.float32)
        self.b = np.zeros(outputs, np.float32)
        self.stride = stride

    def forward(self, x):
        s = self.stride
        self.shape = x.shape
        views = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))[:, :, ::s, ::s]
        n, c, h, w = views.shape[:4]
        self.columns = views.transpose(0, 2, 3, 1, 4, 5).reshape(n * h * w, c * 9)
        y = self.columns @ self.w.reshape(len(self.w), -1).T + self.b
        return y.reshape(n, h, w, -1).transpose(0, 3, 1, 2)

    def backward(self, dy):
        n, o, h, w = dy.shape
        flat = dy.transpose(0, 2, 3, 1).reshape(-1, o)
        self.dw, self.db = (flat.T @ self.columns).reshape(self.w.shape), flat.sum(0)
        c, s = self.shape[1], self.stride
        d = (flat @ self.w.reshape(o, -1)).reshape(n, h, w, c, 3, 3).transpose(0, 3, 4, 5, 1, 2)
        dx = np.zeros((n, c, self.shape[2] + 2, self.shape[3] + 2), np.float32)
        for i in range(3):
            for j in range(3):
                dx[:, :, i : i + h * s : s, j : j + w * s : s] += d[:, :, i, j]
        return dx[:, :, 1:-1, 1:-1]


class Dense:
    """Matrix product and bias; flattens what comes before it."""

    def __init__(self, rng, inputs, outputs, gain=2.0):
        self.w = (rng.standard_normal((inputs, outputs)) * np.sqrt(gain / inputs)).astype(np.float32)
        self.b = np.zeros(outputs, np.float32)

    def forward(self, x):
        self.shape, self.x = x.shape, x.reshape(len(x), -1)
        return self.x @ self.w + self.b

    def backward(self, dy):
        self.dw, self.db = self.x.T @ dy, dy.sum(0)
        return (dy @ self.w.T).reshape(self.shape)


class Relu:
    def forward(self, x):
        self.on = x > 0
        return x * self.on

    def backward(self, dy):
        return dy * self.on


def predict(layers, x):
    for layer in layers:
        x = layer.forward(x)
    return x


def cross_entropy(logits, truth, smoothing=0.0):
    """Gradient of the mean cross-entropy; `truth` holds class indices."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    target = np.full_like(p, smoothing / p.shape[1])
    target[np.arange(len(truth)), truth] += 1 - smoothing
    return (p - target) / len(truth)


def squared_error(output, target):
    return 2 * (output - target) / output.size


def train(layers, x, y, gradient, rng, epochs, batch=64, rate=2e-3, decay=1e-4):
    """AdamW with a cosine schedule. `x` may be a function of the epoch that returns (x, y)."""
    state = {}
    n = len(x(0)[0]) if callable(x) else len(x)
    step, steps = 0, epochs * -(-n // batch)
    for epoch in range(epochs):
        xs, ys = x(epoch) if callable(x) else (x, y)
        order = rng.permutation(n)
        for start in range(0, n, batch):
            pick = order[start : start + batch]
            grad = gradient(predict(layers, xs[pick]), ys[pick]).astype(np.float32)
            for layer in reversed(layers):
                grad = layer.backward(grad)
            lr = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            step += 1
            for i, layer in enumerate(layers):
                for key in ["w", "b"]:
                    if not hasattr(layer, key):
                        continue
                    value, g = getattr(layer, key), getattr(layer, "d" + key)
                    m, v = state.setdefault((i, key), (np.zeros_like(value), np.zeros_like(value)))
                    m += 0.1 * (g - m)
                    v += 0.001 * (g * g - v)
                    value -= lr * (m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8))
                    if key == "w":
                        value -= lr * decay * value
