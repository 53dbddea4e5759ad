//! Gemini generateContent, v1beta.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use super::money::Tokens;
use super::schema;
use super::wire::{Ask, Parsed, Said, Server, Wrong};

fn with_key(server: &Server<'_>, request: RequestBuilder) -> RequestBuilder {
    match server.key {
        Some(key) => request.header("x-goog-api-key", key.expose()),
        None => request,
    }
}

/// The base address comes with or without the version.
fn at(server: &Server<'_>, path: &str) -> String {
    let base = server.base_url;
    let versioned = base.rsplit('/').next().is_some_and(|last| last.starts_with("v1"));
    format!("{base}{}/{path}", if versioned { "" } else { "/v1beta" })
}

/// POST /v1beta/models/MODEL:generateContent.
pub fn post(server: &Server<'_>, model: &str) -> RequestBuilder {
    let model = model.trim_start_matches("models/");
    with_key(server, server.client.post(at(server, &format!("models/{model}:generateContent"))))
}

/// GET /v1beta/models.
pub fn models(server: &Server<'_>) -> RequestBuilder {
    with_key(server, server.client.get(at(server, "models")))
}

/// The body. What all questions of a task share comes first: prompts are cached by their beginning.
pub fn body(ask: &Ask<'_>) -> Value {
    let Ask { question, parts, .. } = ask;
    let mut content = vec![json!({"text": parts.head})];
    let inline = |(media_type, data): &(&str, String)| json!({"inlineData": {"mimeType": media_type, "data": data}});
    content.extend(parts.image.as_ref().map(inline));
    content.extend(parts.audio.as_ref().map(inline));
    content.extend(parts.text.as_ref().map(|text| json!({"text": text})));
    let mut config = json!({"maxOutputTokens": ask.max_output_tokens()});
    if let Some(schema) = schema::of(&question.shape) {
        config["responseMimeType"] = json!("application/json");
        config["responseJsonSchema"] = schema;
    }
    json!({"contents": [{"role": "user", "parts": content}], "generationConfig": config})
}

/// Reads a GenerateContentResponse: without candidates where the question was blocked.
pub fn parse(body: &Value) -> Parsed {
    let candidate = &body["candidates"][0];
    let parts = candidate["content"]["parts"].as_array().map(Vec::as_slice).unwrap_or_default();
    // Thoughts are parts, too, and no part of the answer.
    let text = parts.iter().filter(|part| part["thought"] != true).filter_map(|part| part["text"].as_str()).collect();
    let said = match candidate["finishReason"].as_str() {
        _ if body["promptFeedback"]["blockReason"].is_string() => Err(Wrong::filtered()),
        Some("STOP") => Ok(Said::whole(text)),
        Some("MAX_TOKENS") => Ok(Said::cut_off(text)),
        Some("SAFETY" | "RECITATION" | "BLOCKLIST" | "PROHIBITED_CONTENT" | "SPII" | "IMAGE_SAFETY" | "LANGUAGE") => {
            Err(Wrong::filtered())
        }
        _ => Err(Wrong::unended()),
    };
    let usage = &body["usageMetadata"];
    let count = |key: &str| usage[key].as_u64().unwrap_or(0);
    let tokens = usage["promptTokenCount"].as_u64().map(|prompt| Tokens {
        input: prompt + count("toolUsePromptTokenCount"),
        cached: count("cachedContentTokenCount"),
        stored: 0,
        output: count("candidatesTokenCount") + count("thoughtsTokenCount"),
    });
    let model = body["modelVersion"].as_str().unwrap_or_default().to_owned();
    Parsed { said, model, tokens }
}
