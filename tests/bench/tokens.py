"""Counts what questions take: as the job came, and as the daemon sends it.

Reads `tokens.rs`'s lines. Words by OpenAI's o200k_base, which litellm's package brings; pictures by the rules that the
providers publish: OpenAI 85 and 170 for each tile of 512 once the picture fits 2048 and its shorter side 768; Anthropic
one for 750 pixels, the longer side at most 1568; Gemini 258 for each tile of 768.
"""

import importlib.util
import json
import math
import os
import sys

# Not imported: it would ask the internet for prices.
LITELLM = os.path.dirname(importlib.util.find_spec("litellm").origin)
os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(LITELLM, "litellm_core_utils", "tokenizers")
import tiktoken  # noqa: E402

WORDS = tiktoken.get_encoding("o200k_base")


def words(text):
    return len(WORDS.encode(text))


def openai(width, height):
    scale = min(1, 2048 / max(width, height))
    width, height = width * scale, height * scale
    scale = min(1, 768 / min(width, height))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def anthropic(width, height):
    scale = min(1, 1568 / max(width, height))
    return round(width * scale * height * scale / 750)


def gemini(width, height):
    return 258 * (1 if max(width, height) <= 384 else math.ceil(width / 768) * math.ceil(height / 768))


def picture(size):
    return [count(*size) for count in (openai, anthropic, gemini)]


def plus(number, three):
    return [number + each for each in three]


def shown(three):
    return str(three[0]) if len(set(three)) == 1 else " / ".join(map(str, three))


print("| question | as it came | as it is sent | of it the shared beginning |")
print("|---|---|---|---|")
for line in sys.stdin:
    case = json.loads(line)
    given = case["input"]
    sent, shared = [0, 0, 0], 0
    for body in case["bodies"]:
        content = body["messages"][0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] for part in parts if part["type"] == "text"]
        schema = words(json.dumps(body["response_format"]["json_schema"]["schema"]))
        sent = plus(schema + sum(map(words, texts)), [0, 0, 0])
        for size in case["sent"]:
            sent = [a + b for a, b in zip(sent, picture(size))]
        head = texts[0].split("\n\nInput:")[0]
        shared = schema + words(head)
        same = shared
    if case["came"]:
        came = plus(same, picture(case["came"]))
    else:
        came = plus(same + words(given["text"] if "text" in given else json.dumps(given["series"])), [0, 0, 0])
    print(f"| {case['case']} | {shown(came)} | {shown(sent)} | {shared} |")
