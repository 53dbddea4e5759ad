"""Puts request bodies before the providers' own SDKs, whose types nobody here wrote.

usage: check.py URL KEY FILE

FILE holds one JSON object a line: {"kind": …, "body": …}. Each body is validated against the types of the
provider's SDK, unknown keys included; then the SDK's client sends it to the server at URL, which speaks
all formats, and reads its answer with its own response types.
"""

import json
import sys

import anthropic
import openai
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming as AnthropicParams
from google import genai
from google.genai import types
from openai.types.chat import ChatCompletionContentPartParam as ChatPart
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming as ResponsesParams
from pydantic import TypeAdapter


def typed(params, body):
    """Validates by a TypedDict; what comes out must be what went in, or a key was not known."""
    adapter = TypeAdapter(params)
    out = json.loads(adapter.dump_json(adapter.validate_python(body), warnings=False))
    assert out == body, f"keys that the SDK does not know: {json.dumps(body)} became {json.dumps(out)}"


def check_anthropic(url, key, body):
    typed(AnthropicParams, body)
    # The SDK now sends the key as a bearer and asks for a later version by itself; both ways are served.
    headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, default_headers=headers)
    message = client.messages.create(**body)
    assert message.stop_reason == "end_turn" and message.usage.input_tokens > 0, message
    return message.content[0].text


def check_openai(url, key, body):
    typed(ResponsesParams, body)
    response = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).responses.create(**body)
    assert response.status == "completed" and response.usage.input_tokens > 0, response
    return response.output_text


def check_openai_compatible(url, key, body):
    # Parts are an iterable within a union there, which pydantic validates and does not give back: one by one.
    whole = [message for message in body["messages"] if isinstance(message["content"], str)]
    for message in body["messages"]:
        if message not in whole:
            for part in message["content"]:
                typed(ChatPart, part)
            whole.append(message | {"content": ""})
    typed(ChatParams, body | {"messages": whole})
    completion = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).chat.completions.create(**body)
    assert completion.choices[0].finish_reason == "stop" and completion.usage.prompt_tokens > 0, completion
    return completion.choices[0].message.content


def check_gemini(url, key, body):
    assert set(body) == {"contents", "generationConfig"}, body
    for content in body["contents"]:
        types.Content.model_validate(content)
    types.GenerationConfig.model_validate(body["generationConfig"])
    client = genai.Client(api_key=key, http_options=types.HttpOptions(base_url=url, api_version="v1beta"))
    config = types.GenerateContentConfig.model_validate(body["generationConfig"])
    answer = client.models.generate_content(model="big", contents=body["contents"], config=config)
    assert answer.candidates[0].finish_reason == types.FinishReason.STOP, answer
    assert answer.usage_metadata.prompt_token_count > 0, answer
    return "".join(part.text for part in answer.candidates[0].content.parts if not part.thought)


def main():
    url, key, file = sys.argv[1:]
    checks = {
        "anthropic": check_anthropic,
        "openai": check_openai,
        "openai-compatible": check_openai_compatible,
        "gemini": check_gemini,
    }
    count = 0
    for line in open(file):
        case = json.loads(line)
        try:
            text = checks[case["kind"]](url, key, case["body"])
            assert text, "an answer without text"
        except Exception as error:
            sys.exit(f"{case['kind']}: {type(error).__name__}: {error}\nbody: {json.dumps(case['body'])[:2000]}")
        count += 1
    print(f"{count} bodies taken by anthropic {anthropic.__version__}, openai {openai.__version__}, "
          f"google-genai {genai.__version__}")


main()
