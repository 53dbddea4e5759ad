//! Anthropic Messages, version 2023-06-01.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use super::money::Tokens;
use super::schema;
use super::wire::{Ask, Parsed, Said, Server, Wrong};

/// The headers of every request.
fn with_headers(server: &Server<'_>, request: RequestBuilder) -> RequestBuilder {
    let request = request.header("anthropic-version", "2023-06-01");
    match server.key {
        Some(key) => request.header("x-api-key", key.expose()),
        None => request,
    }
}

/// The base address comes with or without the version.
fn at(server: &Server<'_>, path: &str) -> String {
    format!("{}/v1/{path}", server.base_url.trim_end_matches("/v1"))
}

/// POST /v1/PATH.
pub fn post(server: &Server<'_>, path: &str) -> RequestBuilder {
    with_headers(server, server.client.post(at(server, path)))
}

/// The body of /v1/messages. Temperature is left out: newer models refuse it. What all questions of a
/// task share comes first and, where it is long enough to be cached, says so.
pub fn body(ask: &Ask<'_>) -> Value {
    let Ask { model, question, parts, .. } = ask;
    let mut head = json!({"type": "text", "text": parts.head});
    if parts.cacheable() {
        head["cache_control"] = json!({"type": "ephemeral"});
    }
    let mut content = vec![head];
    if let Some((media_type, data)) = &parts.image {
        content.push(json!({"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}));
    }
    if let Some(text) = &parts.text {
        content.push(json!({"type": "text", "text": text}));
    }
    let mut body = json!({
        "model": model,
        "max_tokens": ask.max_output_tokens(),
        "messages": [{"role": "user", "content": content}],
    });
    if let Some(schema) = schema::of(&question.shape) {
        body["output_config"] = json!({"format": {"type": "json_schema", "schema": schema}});
    }
    body
}

/// GET /v1/models.
pub fn models(server: &Server<'_>) -> RequestBuilder {
    with_headers(server, server.client.get(at(server, "models")))
}

/// Reads a Message.
pub fn parse(body: &Value) -> Parsed {
    let blocks = body["content"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text: String =
        blocks.iter().filter(|block| block["type"] == "text").filter_map(|block| block["text"].as_str()).collect();
    let said = match body["stop_reason"].as_str() {
        Some("end_turn" | "stop_sequence") => Ok(Said::whole(text)),
        Some("refusal") => Err(Wrong::declined()),
        Some("max_tokens" | "model_context_window_exceeded") => Ok(Said::cut_off(text)),
        _ => Err(Wrong::unended()),
    };
    let usage = &body["usage"];
    let count = |key: &str| usage[key].as_u64().unwrap_or(0);
    let (cached, stored) = (count("cache_read_input_tokens"), count("cache_creation_input_tokens"));
    let tokens = usage["output_tokens"].as_u64().map(|output| Tokens {
        input: count("input_tokens") + cached + stored,
        cached,
        stored,
        output,
    });
    Parsed { said, model: body["model"].as_str().unwrap_or_default().to_owned(), tokens }
}
