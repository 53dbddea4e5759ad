"""image.classify: handwritten digits, a small convolutional network."""

import base64
import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import common
import net

LABELS = [str(digit) for digit in range(10)]
SIDE = 16
FILTERS = [Image.NEAREST, Image.BILINEAR, Image.BICUBIC, Image.LANCZOS]


def prepare(image):
    """Luma, triangle filter to 16x16, (v / 255 - 0.5) / 0.5; [1, 16, 16]."""
    small = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.BILINEAR), np.float32)
    return ((small * np.float32(1 / 255) - 0.5) / 0.5)[None]


def picture(pixels, side=8, resample=Image.BICUBIC):
    """The data set's 0 to 16 as an 8-bit image."""
    image = Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8))
    return image if side == 8 else image.resize((side, side), resample)


def augment(pixels, rng):
    """Any size and filter, turned, scaled, shifted: users do not send 8x8."""
    side = int(rng.choice([8, 16, 28, 32, 64, 160]))
    image = picture(pixels, side, FILTERS[rng.integers(len(FILTERS))])
    if rng.random() < 0.85:
        if side < 32:
            image = image.resize((32, 32), Image.BICUBIC)
        half = image.width / 2
        angle, shear = rng.normal(0, 0.14), rng.normal(0, 0.08)
        sx, sy = np.exp(rng.normal(0, 0.08, 2))
        dx, dy = rng.normal(0, 0.05, 2) * image.width
        a, b, d, e = np.cos(angle) / sx, np.sin(angle) + shear, -np.sin(angle), np.cos(angle) / sy
        move = (a, b, half - a * half - b * half + dx, d, e, half - d * half - e * half + dy)
        image = image.transform(image.size, Image.AFFINE, move, Image.BILINEAR)
    x = prepare(image)
    return np.clip((x + 1) * rng.uniform(0.8, 1.1) - 1 + rng.normal(0, 0.03, x.shape), -1, 1)


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 90}))
    return buffer.getvalue()


def decode(content):
    return prepare(Image.open(io.BytesIO(content)))


def main():
    rng = np.random.default_rng(3)
    images, truth = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    # By index: the last quarter holds writers that the first part does not.
    fit, stop = 1150, 1347

    layers = [
        net.Conv(rng, 1, 12, 1), net.Relu(), net.Conv(rng, 12, 24, 2), net.Relu(), net.Conv(rng, 24, 32, 2), net.Relu(),
        net.Dense(rng, 512, 48), net.Relu(), net.Dense(rng, 48, 10, 1.0),
    ]

    def epoch(_):
        pick = np.tile(np.arange(fit), 3)
        return np.stack([augment(images[i], rng) for i in pick]).astype(np.float32), truth[pick]

    gradient = lambda logits, y: net.cross_entropy(logits, y, 0.02)
    net.train(layers, epoch, None, gradient, rng, epochs=24, rate=3e-3, decay=1e-2)

    out = common.start("digits")
    fp32, int8 = out / "digits.fp32.onnx", out / "digits.int8.onnx"
    common.export(fp32, layers, [1, 1, SIDE, SIDE])
    calibration = np.stack([augment(p, rng) for p in images[:fit:3]])
    check = [decode(encode(picture(p, 32))) for p in images[fit:stop]]
    activation = common.quantize(
        fp32, int8, calibration, lambda path: common.log_loss(common.run(path, check), truth[fit:stop])
    )
    logits = common.run(int8, check)
    temperature = common.fit_temperature(logits, truth[fit:stop])
    threshold = common.fit_threshold(common.softmax(logits, temperature), truth[fit:stop], 0.995)

    pictures, held = [encode(picture(p, 32)) for p in images[stop:]], truth[stop:]
    common.write_heldout(
        "digits", [({"image": base64.b64encode(p).decode()}, LABELS[t]) for p, t in zip(pictures, held)]
    )
    rows = [decode(p) for p in pictures]
    accuracy = {path: float((common.run(path, rows).argmax(1) == held).mean()) for path in [fp32, int8]}
    common.write_accuracy("digits", accuracy[fp32], accuracy[int8], len(held))

    golden = []
    sure = np.minimum(*(common.softmax(common.run(p, check), temperature)[np.arange(len(check)), truth[fit:stop]] for p in (fp32, int8)))
    for digit in range(10):
        of = np.flatnonzero(truth[fit:stop] == digit)
        pick = of[np.argmax(sure[of])]
        (out / "golden" / f"{digit}.png").write_bytes(encode(picture(images[fit + pick], 32)))
        golden.append((f"{digit}.png", LABELS[digit]))

    big = [encode(picture(p, 160)) for p in images[stop:]]
    # Sure, or not, with either variant.
    chance = [common.softmax(common.run(path, [decode(p) for p in big]), temperature) for path in [fp32, int8]]
    sure = np.minimum(*(c[np.arange(len(held)), held] for c in chance))
    for digit, kind, ending in [(2, "PNG", "png"), (4, "PNG", "png"), (7, "PNG", "png"), (5, "JPEG", "jpg")]:
        of = np.flatnonzero(held == digit)
        content = encode(picture(images[stop + of[np.argmax(sure[of])]], 160), kind)
        common.write_sample(f"digit-{digit}.{ending}", content, "image.classify", LABELS[digit], True)
    pick = int(np.argmin(np.maximum(*chance).max(1)))
    common.write_sample("digit-uncertain.png", big[pick], "image.classify", LABELS[held[pick]], False)

    common.card(
        "digits", "digits: one handwritten digit",
        f"""
Says which digit, 0 to 9, a picture shows: light strokes on a dark ground, one digit that fills the frame.
Task `image.classify`, labels `0` to `9`.

## Data and training

Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0):
the 1,797 pictures of 8x8 pixels that scikit-learn ships. Split by index: the first {fit:,} train the network, the next
{stop - fit} set the temperature and the confidence threshold, the last {len(held)} are held out; writers differ along the
data set, so the held-out part is a fair test of handwriting not seen before. In training each picture is enlarged to 8 to
160 pixels with a random filter, turned, sheared, scaled, shifted and changed in contrast.

Input 16x16 luma; three 3x3 convolutions (12, 24 and 32 channels, strides 1, 2, 2), a dense layer of 48, ReLU between, 10
logits. Trained with AdamW and label smoothing 0.02 by `models/train/digits.py`. Confidence is the softmax at temperature
{temperature}; below {threshold} the answer counts as uncertain.
""",
        accuracy[fp32], accuracy[int8], len(held), activation,
        """
- Dark ink on light paper must be inverted first.
- There is no answer "not a digit": any picture gets one of the ten labels.
- One digit at a time; a number of several digits must be cut up first.
- The source pictures have 8x8 pixels: finer detail in a larger picture is not used.
""",
    )
    common.package(
        "digits", "image.classify",
        "trained by models/train/digits.py on UCI Optical Recognition of Handwritten Digits as shipped in scikit-learn",
        "Training data: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0.",
        ['kind = "image"', f"shape = [1, 1, {SIDE}, {SIDE}]", f"size = [{SIDE}, {SIDE}]", "channels = 1", 'layout = "nchw"',
         "scale = 0.00392156862745098", "mean = [0.5]", "std = [0.5]", 'resize = "stretch"'],
        ['kind = "classes"', 'labels = "labels.txt"', 'activation = "softmax"'],
        threshold, temperature,
        "The picture shows one handwritten digit in light strokes on a dark ground; it may be small, blurred or enlarged "
        "from few pixels. Answer which digit the writer most likely meant. Each label is that digit: 0 zero, 1 one, 2 two, "
        "3 three, 4 four, 5 five, 6 six, 7 seven, 8 eight, 9 nine.",
        golden, LABELS,
    )


if __name__ == "__main__":
    main()
