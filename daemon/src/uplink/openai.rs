//! OpenAI: Responses for its own models, Chat Completions for the many servers that speak it.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use super::money::Tokens;
use super::schema;
use super::wire::{Ask, Parsed, Said, Server, Wrong};

/// Name of the schema, which both formats ask for.
const SCHEMA: &str = "answer";

/// Chat Completions' names for the limit of tokens. Servers of either kind are about, and some refuse the other's.
pub fn limit(older: bool) -> &'static str {
    if older { "max_tokens" } else { "max_completion_tokens" }
}

fn with_key(server: &Server<'_>, request: RequestBuilder) -> RequestBuilder {
    match server.key {
        Some(key) => request.bearer_auth(key.expose()),
        None => request,
    }
}

fn data_url((media_type, data): &(&str, String)) -> String {
    format!("data:{media_type};base64,{data}")
}

/// POST /PATH.
pub fn post(server: &Server<'_>, path: &str) -> RequestBuilder {
    with_key(server, server.client.post(format!("{}/{path}", server.base_url)))
}

/// The body of /responses; nothing is stored. What all questions of a task share comes first: prompts
/// are cached by their beginning, and where that is long enough its key keeps them together.
pub fn responses(ask: &Ask<'_>) -> Value {
    let Ask { model, question, parts, .. } = ask;
    let mut content = vec![json!({"type": "input_text", "text": parts.head})];
    if let Some(image) = &parts.image {
        content.push(json!({"type": "input_image", "image_url": data_url(image), "detail": "auto"}));
    }
    if let Some(text) = &parts.text {
        content.push(json!({"type": "input_text", "text": text}));
    }
    let mut body = json!({
        "model": model,
        "store": false,
        "max_output_tokens": ask.max_output_tokens(),
        "input": [{"role": "user", "content": content}],
    });
    if parts.cacheable() {
        body["prompt_cache_key"] = json!(format!("outpost-{}", question.task));
    }
    if let Some(schema) = schema::of(&question.shape) {
        body["text"] = json!({"format": {"type": "json_schema", "name": SCHEMA, "strict": true, "schema": schema}});
    }
    body
}

/// The body of /chat/completions.
pub fn chat(ask: &Ask<'_>) -> Value {
    let Ask { model, question, parts, manner } = ask;
    let content = if parts.image.is_none() && parts.audio.is_none() {
        // Plain text is what every such server takes.
        json!(parts.in_words())
    } else {
        let mut content = vec![json!({"type": "text", "text": parts.head})];
        if let Some(image) = &parts.image {
            content.push(json!({"type": "image_url", "image_url": {"url": data_url(image)}}));
        }
        if let Some((_, data)) = &parts.audio {
            content.push(json!({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}));
        }
        if let Some(text) = &parts.text {
            content.push(json!({"type": "text", "text": text}));
        }
        json!(content)
    };
    let most = limit(manner.older);
    let mut body = json!({
        "model": model,
        most: ask.max_output_tokens(),
        "messages": [{"role": "user", "content": content}],
    });
    if let Some(schema) = schema::of(&question.shape) {
        body["response_format"] =
            json!({"type": "json_schema", "json_schema": {"name": SCHEMA, "strict": true, "schema": schema}});
    }
    body
}

/// GET /models.
pub fn models(server: &Server<'_>) -> RequestBuilder {
    with_key(server, server.client.get(format!("{}/models", server.base_url)))
}

/// Reads a Response: its output holds items of several kinds, of which the messages count.
pub fn parse_response(body: &Value) -> Parsed {
    let items = body["output"].as_array().map(Vec::as_slice).unwrap_or_default();
    let contents: Vec<&Value> = items
        .iter()
        .filter(|item| item["type"] == "message")
        .filter_map(|item| item["content"].as_array())
        .flatten()
        .collect();
    let refused = contents.iter().any(|content| content["type"] == "refusal");
    let words = contents.iter().filter(|content| content["type"] == "output_text").filter_map(|c| c["text"].as_str());
    let said = match body["status"].as_str() {
        _ if refused => Err(Wrong::declined()),
        Some("completed") => Ok(Said::whole(words.collect())),
        Some("incomplete") if body["incomplete_details"]["reason"] == "content_filter" => Err(Wrong::filtered()),
        Some("incomplete") => Ok(Said::cut_off(words.collect())),
        _ => Err(Wrong::unended()),
    };
    parsed(body, said, ["input_tokens", "output_tokens", "input_tokens_details"])
}

/// Reads a chat completion.
pub fn parse_chat(body: &Value) -> Parsed {
    let choice = &body["choices"][0];
    let message = &choice["message"];
    let text = message["content"].as_str().map(str::to_owned);
    let said = match choice["finish_reason"].as_str() {
        _ if message["refusal"].is_string() => Err(Wrong::declined()),
        Some("content_filter") => Err(Wrong::filtered()),
        Some("stop") => text.map(Said::whole).ok_or_else(|| Wrong::Again("its answer holds no text".to_owned())),
        Some("length") => Ok(Said::cut_off(text.unwrap_or_default())),
        _ => Err(Wrong::unended()),
    };
    parsed(body, said, ["prompt_tokens", "completion_tokens", "prompt_tokens_details"])
}

fn parsed(body: &Value, said: Result<Said, Wrong>, [input, output, details]: [&str; 3]) -> Parsed {
    let usage = &body["usage"];
    let count = |value: &Value| value.as_u64();
    let total = count(&usage["total_tokens"]).unwrap_or(0);
    let tokens = count(&usage[input]).zip(count(&usage[output])).map(|(input, output)| Tokens {
        input,
        cached: count(&usage[details]["cached_tokens"]).unwrap_or(0),
        stored: count(&usage[details]["cache_write_tokens"]).unwrap_or(0),
        // Some servers count hidden reasoning in the total alone.
        output: output.max(total.saturating_sub(input)),
    });
    Parsed { said, model: body["model"].as_str().unwrap_or_default().to_owned(), tokens }
}
