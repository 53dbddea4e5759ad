//! Anthropic Messages, version 2023-06-01.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use super::{Call, Parsed, Server, Wrong, schema};
use crate::job::Usage;

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

/// POST /v1/messages. Temperature is left out: newer models refuse it.
pub fn request(call: &Call<'_>) -> RequestBuilder {
    let Call { server, model, question, parts } = call;
    let mut content = Vec::new();
    if let Some((media_type, data)) = &parts.image {
        content.push(json!({"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}));
    }
    content.push(json!({"type": "text", "text": parts.text}));
    let mut body = json!({
        "model": model,
        "max_tokens": question.max_output_tokens,
        "messages": [{"role": "user", "content": content}],
    });
    if let Some(schema) = schema::of(&question.shape) {
        body["output_config"] = json!({"format": {"type": "json_schema", "schema": schema}});
    }
    with_headers(server, server.client.post(at(server, "messages"))).json(&body)
}

/// GET /v1/models.
pub fn models(server: &Server<'_>) -> RequestBuilder {
    with_headers(server, server.client.get(at(server, "models")))
}

/// Reads a Message.
pub fn parse(body: &Value) -> Parsed {
    let blocks = body["content"].as_array().map(Vec::as_slice).unwrap_or_default();
    let text: String = blocks.iter().filter_map(|block| block["text"].as_str()).collect();
    let text = match body["stop_reason"].as_str() {
        Some("end_turn" | "stop_sequence") => Ok(text),
        Some("refusal") => Err(Wrong::Declined("the model declined to answer".to_owned())),
        Some("max_tokens" | "model_context_window_exceeded") => Err(Wrong::Again("its answer was cut off".to_owned())),
        _ => Err(Wrong::Again("its answer did not end".to_owned())),
    };
    let count = |key: &str| body["usage"][key].as_u64().unwrap_or(0);
    let input_tokens = count("input_tokens") + count("cache_creation_input_tokens") + count("cache_read_input_tokens");
    let usage = Usage { input_tokens, output_tokens: count("output_tokens") };
    Parsed { text, model: body["model"].as_str().unwrap_or_default().to_owned(), usage }
}
