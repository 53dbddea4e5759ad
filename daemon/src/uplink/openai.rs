//! OpenAI: Responses for its own models, Chat Completions for the many servers that speak it.

use reqwest::RequestBuilder;
use serde_json::{Value, json};

use super::{Call, Parsed, Server, Wrong, schema};
use crate::job::Usage;

/// Name of the schema, which both formats ask for.
const SCHEMA: &str = "answer";

fn with_key(server: &Server<'_>, request: RequestBuilder) -> RequestBuilder {
    match server.key {
        Some(key) => request.bearer_auth(key.expose()),
        None => request,
    }
}

fn data_url((media_type, data): &(&str, String)) -> String {
    format!("data:{media_type};base64,{data}")
}

/// POST /responses; nothing is stored.
pub fn responses(call: &Call<'_>) -> RequestBuilder {
    let Call { server, model, question, parts } = call;
    let mut content = vec![json!({"type": "input_text", "text": parts.text})];
    if let Some(image) = &parts.image {
        content.push(json!({"type": "input_image", "image_url": data_url(image), "detail": "auto"}));
    }
    let mut body = json!({
        "model": model,
        "store": false,
        "max_output_tokens": question.max_output_tokens,
        "input": [{"role": "user", "content": content}],
    });
    if let Some(schema) = schema::of(&question.shape) {
        body["text"] = json!({"format": {"type": "json_schema", "name": SCHEMA, "strict": true, "schema": schema}});
    }
    with_key(server, server.client.post(format!("{}/responses", server.base_url))).json(&body)
}

/// POST /chat/completions.
pub fn chat(call: &Call<'_>) -> RequestBuilder {
    let Call { server, model, question, parts } = call;
    let content = match &parts.image {
        // Plain text is what every such server takes.
        None => json!(parts.text),
        Some(image) => json!([
            {"type": "text", "text": parts.text},
            {"type": "image_url", "image_url": {"url": data_url(image)}},
        ]),
    };
    let mut body = json!({
        "model": model,
        "max_completion_tokens": question.max_output_tokens,
        "messages": [{"role": "user", "content": content}],
    });
    if let Some(schema) = schema::of(&question.shape) {
        body["response_format"] =
            json!({"type": "json_schema", "json_schema": {"name": SCHEMA, "strict": true, "schema": schema}});
    }
    with_key(server, server.client.post(format!("{}/chat/completions", server.base_url))).json(&body)
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
    let text = contents.iter().filter(|content| content["type"] == "output_text").filter_map(|c| c["text"].as_str());
    let text = match body["status"].as_str() {
        _ if refused => Err(Wrong::Declined("the model declined to answer".to_owned())),
        Some("completed") => Ok(text.collect()),
        Some("incomplete") if body["incomplete_details"]["reason"] == "content_filter" => {
            Err(Wrong::Declined("the provider's filter stopped the answer".to_owned()))
        }
        Some("incomplete") => Err(Wrong::Again("its answer was cut off".to_owned())),
        _ => Err(Wrong::Again("its answer did not end".to_owned())),
    };
    parsed(body, text, ["input_tokens", "output_tokens"])
}

/// Reads a chat completion.
pub fn parse_chat(body: &Value) -> Parsed {
    let choice = &body["choices"][0];
    let message = &choice["message"];
    let text = match choice["finish_reason"].as_str() {
        _ if message["refusal"].is_string() => Err(Wrong::Declined("the model declined to answer".to_owned())),
        Some("content_filter") => Err(Wrong::Declined("the provider's filter stopped the answer".to_owned())),
        Some("stop") => message["content"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| Wrong::Again("its answer holds no text".to_owned())),
        Some("length") => Err(Wrong::Again("its answer was cut off".to_owned())),
        _ => Err(Wrong::Again("its answer did not end".to_owned())),
    };
    parsed(body, text, ["prompt_tokens", "completion_tokens"])
}

fn parsed(body: &Value, text: Result<String, Wrong>, [input, output]: [&str; 2]) -> Parsed {
    let count = |key: &str| body["usage"][key].as_u64().unwrap_or(0);
    let usage = Usage { input_tokens: count(input), output_tokens: count(output) };
    Parsed { text, model: body["model"].as_str().unwrap_or_default().to_owned(), usage }
}
