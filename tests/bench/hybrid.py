"""The strong side of the hybrid table: a larger digits model, trained here, behind a provider's wire format.

    hybrid.py train FILE          trains it, reports its held-out accuracy, writes its weights
    hybrid.py serve FILE          serves it as the Messages API; the first line says where

It is a stand-in for a closed model and says so in every answer. Tokens are counted as the API documents it for
pictures (width x height / 750, a token at least) and estimated for text (a token for every four bytes).
"""

import base64
import http.server
import io
import json
import pathlib
import sys

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "models" / "train"))
import common
import digits
import net

MODEL = "stand-in-larger-digits"
KEY = "stand-in-key"
# As in digits.py: what comes after is held out.
STOP = 1347
NETWORKS, EPOCHS = 2, 14


def layers(rng):
    return [
        net.Conv(rng, 1, 32, 1), net.Relu(), net.Conv(rng, 32, 64, 2), net.Relu(), net.Conv(rng, 64, 96, 2), net.Relu(),
        net.Dense(rng, 1536, 128), net.Relu(), net.Dense(rng, 128, 10, 1.0),
    ]


def train(path):
    images, truth = digits.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    weights = {}
    for number in range(NETWORKS):
        rng = np.random.default_rng(100 + number)
        network = layers(rng)

        def epoch(i):
            print(f"network {number + 1} of {NETWORKS}, epoch {i + 1} of {EPOCHS}", file=sys.stderr, flush=True)
            pick = np.tile(np.arange(STOP), 3)
            return np.stack([digits.augment(images[i], rng) for i in pick]).astype(np.float32), truth[pick]

        gradient = lambda logits, y: net.cross_entropy(logits, y, 0.02)
        net.train(network, epoch, None, gradient, rng, epochs=EPOCHS, rate=2e-3, decay=1e-2)
        for i, layer in enumerate(network):
            if hasattr(layer, "w"):
                weights[f"{number}.{i}.w"], weights[f"{number}.{i}.b"] = layer.w, layer.b
    np.savez(path, **weights)
    model, records = Strong(path), common.read_heldout("digits")
    said = [model.answer(base64.b64decode(record["input"]["image"]))[0] for record in records]
    right = np.mean([label == record["label"] for label, record in zip(said, records)])
    print(f"stand-in: {right:.2%} of {len(records)} held out", file=sys.stderr)


class Strong:
    """The mean of the networks' probabilities."""

    def __init__(self, path):
        weights = np.load(path)
        self.networks = [layers(np.random.default_rng(0)) for _ in range(NETWORKS)]
        for number, network in enumerate(self.networks):
            for i, layer in enumerate(network):
                if hasattr(layer, "w"):
                    layer.w, layer.b = weights[f"{number}.{i}.w"], weights[f"{number}.{i}.b"]

    def answer(self, picture):
        x = digits.decode(picture)[None].astype(np.float32)
        chance = np.mean([common.softmax(net.predict(network, x)) for network in self.networks], 0)[0]
        return digits.LABELS[chance.argmax()], float(chance.max())


class Messages(http.server.BaseHTTPRequestHandler):
    """POST /v1/messages, with a picture and a JSON schema."""

    protocol_version = "HTTP/1.1"
    # Or each answer waits for the other side's delayed acknowledgement.
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/messages" or self.headers["x-api-key"] != KEY or "anthropic-version" not in self.headers:
            return self.reply(404, {"type": "error", "error": {"type": "not_found_error", "message": self.path}})
        text, tokens, said = "", 0, None
        for part in body["messages"][0]["content"]:
            if part["type"] == "text":
                text += part["text"]
            else:
                picture = base64.b64decode(part["source"]["data"])
                width, height = Image.open(io.BytesIO(picture)).size
                tokens += max(1, width * height // 750)
                said = self.server.model.answer(picture)
        properties = body["output_config"]["format"]["schema"]["properties"]
        assert said and said[0] in properties["label"]["enum"], body
        answer = json.dumps({"label": said[0], "confidence": round(said[1], 4)})
        self.reply(200, {
            "id": "msg_stand_in", "type": "message", "role": "assistant", "model": MODEL,
            "content": [{"type": "text", "text": answer}], "stop_reason": "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": tokens + (len(text) + 3) // 4, "output_tokens": (len(answer) + 3) // 4},
        })

    def reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Messages)
    server.model = Strong(path)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    {"train": train, "serve": serve}[sys.argv[1]](sys.argv[2])
