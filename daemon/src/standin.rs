//! A stand-in for closed models, where none can be reached: the demo and the tests.
//!
//! It speaks the providers' true wire formats over HTTP and refuses what they would refuse, but it is
//! no model: the answers are whatever the caller's function says, and the model that it names in every
//! answer is `stand-in`. Its token counts are estimates: a token for every four bytes of text.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The name of the model in every answer.
pub const MODEL: &str = "stand-in";
/// The key that it takes; any other is refused.
pub const KEY: &str = "stand-in-key";

/// A request, as the stand-in understood it.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Path, which tells the format.
    pub path: &'static str,
    /// All text of the question.
    pub text: String,
    /// Picture of the question, decoded.
    pub image: Option<Vec<u8>>,
    /// Sound of the question, decoded.
    pub audio: Option<Vec<u8>>,
    /// Schema that the answer must have; none for free text.
    pub schema: Option<Value>,
    /// The request's body, as it came.
    pub body: Vec<u8>,
}

/// A way of failing; each holds for one request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// A status with an error of this type and perhaps a header.
    Status(u16, &'static str, Option<(&'static str, &'static str)>),
    /// Nothing for so long, then the answer.
    Delay(Duration),
    /// The connection ends in the middle of the body.
    Cut,
    /// Status 200 and a body that is not JSON.
    NotJson,
    /// An answer in the right envelope with this text.
    Text(&'static str),
    /// The model declines.
    Refusal,
    /// The answer reaches its limit of tokens.
    CutOff,
    /// An answer of so many bytes.
    Huge(usize),
    /// A status with this body.
    Body(u16, Value),
}

type Answers = dyn Fn(&Asked) -> Value + Send + Sync;

struct Shared {
    answers: Box<Answers>,
    faults: Mutex<VecDeque<Fault>>,
    asked: Mutex<Vec<Asked>>,
    billed: Mutex<[u64; 2]>,
}

/// A running stand-in; dropping it stops it.
pub struct Standin {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

/// What is between lock and unlock cannot panic half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Standin {
    /// Listens on a free port of the loopback; `answers` gives the answer to each question, as JSON of
    /// its schema or, where there is none, as a string.
    ///
    /// # Errors
    /// No port can be had.
    pub async fn start(answers: impl Fn(&Asked) -> Value + Send + Sync + 'static) -> std::io::Result<Self> {
        Self::start_at(0, answers).await
    }

    /// As [`Standin::start`], on this port.
    ///
    /// # Errors
    /// The port is taken.
    pub async fn start_at(
        port: u16,
        answers: impl Fn(&Asked) -> Value + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (faults, asked, billed) = Default::default();
        let shared = Arc::new(Shared { answers: Box::new(answers), faults, asked, billed });
        let app = Router::new()
            .route("/v1/messages", post(messages))
            .route("/v1/responses", post(responses))
            .route("/v1/chat/completions", post(chat))
            .route("/v1beta/models/{call}", post(generate))
            .route("/v1/models", get(models))
            .route("/v1beta/models", get(models))
            .layer(axum::extract::DefaultBodyLimit::max(32 << 20))
            .with_state(Arc::clone(&shared));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                tracing::error!("the stand-in stopped: {error}");
            }
        });
        Ok(Standin { address, shared, task })
    }

    /// Its address, as `base_url` of the kinds `anthropic` and `gemini`; the others need `/v1` behind it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next request fails in this way.
    pub fn fail(&self, fault: Fault) {
        lock(&self.shared.faults).push_back(fault);
    }

    /// From now on nothing fails.
    pub fn recover(&self) {
        lock(&self.shared.faults).clear();
    }

    /// Tokens in and out of all answers so far, whole or not: what a provider would bill.
    pub fn billed(&self) -> [u64; 2] {
        *lock(&self.shared.billed)
    }

    /// Requests understood so far.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.shared.asked).clone()
    }
}

impl Drop for Standin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How the answer of one format is wrapped: text, why it ended, and tokens in and out.
struct Wrap {
    /// The text as an answer.
    whole: fn(&str, [u64; 2]) -> Value,
    /// A refusal.
    refusal: fn() -> Value,
    /// The text, cut off.
    cut_off: fn(&str, [u64; 2]) -> Value,
    /// An error of this type with this message.
    error: fn(&str, &str) -> Value,
}

fn error(wrap: &Wrap, status: u16, kind: &str, message: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, axum::Json((wrap.error)(kind, message))).into_response()
}

async fn answer(shared: &Shared, wrap: Wrap, asked: Result<Asked, String>) -> Response {
    let asked = match asked {
        Ok(asked) => asked,
        Err(message) => return error(&wrap, 400, "invalid_request_error", &message),
    };
    lock(&shared.asked).push(asked.clone());
    let found = (shared.answers)(&asked);
    let text = found.as_str().map_or_else(|| found.to_string(), str::to_owned);
    let tokens = |text: &str| text.len() as u64 / 4 + 1;
    let usage = [tokens(&asked.text) + asked.image.as_ref().map_or(0, |_| 85), tokens(&text)];
    let whole = || axum::Json((wrap.whole)(&text, usage)).into_response();
    let raw = |body: Body| ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    let fault = lock(&shared.faults).pop_front();
    if !matches!(fault, Some(Fault::Status(..) | Fault::Body(..))) {
        let mut billed = lock(&shared.billed);
        *billed = [billed[0] + usage[0], billed[1] + usage[1]];
    }
    match fault {
        None => whole(),
        Some(Fault::Status(status, kind, with)) => {
            let mut response = error(&wrap, status, kind, "as the test wants it");
            if let Some((name, value)) = with {
                response.headers_mut().insert(name, header::HeaderValue::from_static(value));
            }
            response
        }
        Some(Fault::Delay(wait)) => {
            tokio::time::sleep(wait).await;
            whole()
        }
        Some(Fault::Cut) => {
            // A length that the body does not reach.
            let body = (wrap.whole)(&text, usage).to_string();
            let mut response = raw(Body::from_stream(Half(Some(body[..body.len() / 2].to_owned()))));
            response.headers_mut().insert(header::CONTENT_LENGTH, header::HeaderValue::from(body.len()));
            response
        }
        Some(Fault::NotJson) => raw(Body::from("<html>gateway</html>")),
        Some(Fault::Text(text)) => axum::Json((wrap.whole)(text, usage)).into_response(),
        Some(Fault::Refusal) => axum::Json((wrap.refusal)()).into_response(),
        Some(Fault::CutOff) => axum::Json((wrap.cut_off)(&text[..text.len() / 2], usage)).into_response(),
        Some(Fault::Body(status, body)) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, axum::Json(body)).into_response()
        }
        Some(Fault::Huge(bytes)) => raw(Body::from(vec![b' '; bytes])),
    }
}

/// A body that ends in an error after its first part.
struct Half(Option<String>);

impl futures_core::Stream for Half {
    type Item = Result<String, std::io::Error>;
    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let part = self.0.take();
        std::task::Poll::Ready(Some(part.ok_or_else(|| std::io::ErrorKind::ConnectionAborted.into())))
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

fn picture(media_type: &str, data: &str) -> Result<Vec<u8>, String> {
    let bytes = STANDARD.decode(data).map_err(|error| format!("image: {error}"))?;
    let found = crate::task::image::media_type(&bytes);
    if found == Some(media_type) { Ok(bytes) } else { Err(format!("image: not {media_type}")) }
}

fn sound(media_type: &str, data: &str) -> Result<Vec<u8>, String> {
    let bytes = STANDARD.decode(data).map_err(|error| format!("audio: {error}"))?;
    if media_type == "audio/wav" && bytes.starts_with(b"RIFF") { Ok(bytes) } else { Err("audio: not a WAV".to_owned()) }
}

fn data_url(url: &str) -> Result<Vec<u8>, String> {
    let (media_type, data) = url
        .strip_prefix("data:")
        .and_then(|rest| rest.split_once(";base64,"))
        .ok_or("image: only data URLs are taken")?;
    picture(media_type, data)
}

fn bearer(headers: &HeaderMap) -> bool {
    headers.get("authorization").is_some_and(|value| value.as_bytes() == format!("Bearer {KEY}").as_bytes())
}

/// Strict mode wants every property required and no others.
fn strict(schema: &Value) -> Result<(), String> {
    let names = |value: &Value| value.as_object().map(|object| object.keys().cloned().collect::<Vec<_>>());
    let required: Option<Vec<String>> = serde_json::from_value(schema["required"].clone()).ok();
    if schema["type"] == "object" && schema["additionalProperties"] == false && names(&schema["properties"]) == required
    {
        Ok(())
    } else {
        Err("schema: additionalProperties must be false and every property required".to_owned())
    }
}

mod anthropic {
    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Request {
        pub model: String,
        pub max_tokens: u64,
        pub messages: Vec<Message>,
        pub output_config: Option<OutputConfig>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Message {
        pub role: String,
        pub content: Vec<Block>,
    }
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
    pub enum Block {
        Text { text: String, cache_control: Option<CacheControl> },
        Image { source: Source },
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct CacheControl {
        pub r#type: String,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Source {
        pub r#type: String,
        pub media_type: String,
        pub data: String,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct OutputConfig {
        pub format: Format,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Format {
        pub r#type: String,
        pub schema: Value,
    }

    pub fn read(body: &[u8]) -> Result<Asked, String> {
        let request: Request = parse(body)?;
        let mut asked = Asked {
            path: "/v1/messages",
            text: String::new(),
            image: None,
            audio: None,
            schema: None,
            body: body.to_vec(),
        };
        for block in request.messages.iter().filter(|message| message.role == "user").flat_map(|m| &m.content) {
            match block {
                Block::Text { cache_control: Some(cache), .. } if cache.r#type != "ephemeral" => {
                    return Err("cache_control.type: ephemeral is needed".to_owned());
                }
                Block::Text { text, .. } => asked.text += text,
                Block::Image { source } if source.r#type == "base64" => {
                    asked.image = Some(picture(&source.media_type, &source.data)?);
                }
                Block::Image { .. } => return Err("source.type: base64 is needed".to_owned()),
            }
        }
        if let Some(OutputConfig { format }) = request.output_config {
            if format.r#type != "json_schema" {
                return Err("output_config.format.type: json_schema is needed".to_owned());
            }
            asked.schema = Some(format.schema);
        }
        if asked.text.is_empty() { Err("messages: at least one text is needed".to_owned()) } else { Ok(asked) }
    }
}

async fn messages(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    fn body_of(text: &str, stop: &str, [input, output]: [u64; 2]) -> Value {
        json!({
            "id": "msg_stand_in", "type": "message", "role": "assistant", "model": MODEL,
            "content": [{"type": "text", "text": text}], "stop_reason": stop, "stop_sequence": null,
            "usage": {"input_tokens": input, "output_tokens": output,
                      "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0},
        })
    }
    let wrap = Wrap {
        whole: |text, usage| body_of(text, "end_turn", usage),
        refusal: || body_of("", "refusal", [1, 1]),
        cut_off: |text, usage| body_of(text, "max_tokens", usage),
        error: |kind, message| json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_stand_in"}),
    };
    if headers.get("x-api-key").is_none_or(|key| key != KEY) {
        return error(&wrap, 401, "authentication_error", "invalid x-api-key");
    }
    if headers.get("anthropic-version").is_none_or(|version| version != "2023-06-01") {
        return error(&wrap, 400, "invalid_request_error", "anthropic-version: header is required");
    }
    answer(&shared, wrap, anthropic::read(&body)).await
}

mod openai {
    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Responses {
        pub model: String,
        pub input: Vec<Item>,
        pub store: Option<bool>,
        pub max_output_tokens: Option<u64>,
        pub prompt_cache_key: Option<String>,
        pub text: Option<Text>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Item {
        pub role: String,
        pub content: Vec<Content>,
    }
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub enum Content {
        InputText { text: String },
        InputImage { image_url: String, detail: Option<String> },
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Text {
        pub format: Format,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Format {
        pub r#type: String,
        pub name: String,
        pub strict: bool,
        pub schema: Value,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Chat {
        pub model: String,
        pub messages: Vec<Message>,
        #[serde(alias = "max_tokens")]
        pub max_completion_tokens: Option<u64>,
        pub response_format: Option<ResponseFormat>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Message {
        pub role: String,
        pub content: ChatContent,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    pub enum ChatContent {
        Text(String),
        Parts(Vec<Part>),
    }
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
    pub enum Part {
        Text { text: String },
        ImageUrl { image_url: Url },
        InputAudio { input_audio: Audio },
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Audio {
        pub data: String,
        pub format: String,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Url {
        pub url: String,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct ResponseFormat {
        pub r#type: String,
        pub json_schema: JsonSchema,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "read to be required")]
    pub struct JsonSchema {
        pub name: String,
        pub strict: bool,
        pub schema: Value,
    }

    pub fn read_responses(body: &[u8]) -> Result<Asked, String> {
        let request: Responses = parse(body)?;
        let mut asked = Asked {
            path: "/v1/responses",
            text: String::new(),
            image: None,
            audio: None,
            schema: None,
            body: body.to_vec(),
        };
        for content in request.input.iter().flat_map(|item| &item.content) {
            match content {
                Content::InputText { text } => asked.text += text,
                Content::InputImage { image_url, .. } => asked.image = Some(data_url(image_url)?),
            }
        }
        if let Some(Text { format }) = request.text {
            strict(&format.schema)?;
            asked.schema = Some(format.schema);
        }
        Ok(asked)
    }

    pub fn read_chat(body: &[u8]) -> Result<Asked, String> {
        let request: Chat = parse(body)?;
        let mut asked = Asked {
            path: "/v1/chat/completions",
            text: String::new(),
            image: None,
            audio: None,
            schema: None,
            body: body.to_vec(),
        };
        for message in &request.messages {
            match &message.content {
                ChatContent::Text(text) => asked.text += text,
                ChatContent::Parts(parts) => {
                    for part in parts {
                        match part {
                            Part::Text { text } => asked.text += text,
                            Part::ImageUrl { image_url } => asked.image = Some(data_url(&image_url.url)?),
                            Part::InputAudio { input_audio } => {
                                asked.audio = Some(sound(&format!("audio/{}", input_audio.format), &input_audio.data)?);
                            }
                        }
                    }
                }
            }
        }
        if let Some(format) = request.response_format {
            strict(&format.json_schema.schema)?;
            asked.schema = Some(format.json_schema.schema);
        }
        Ok(asked)
    }
}

fn openai_error(kind: &str, message: &str) -> Value {
    json!({"error": {"message": message, "type": kind, "param": null, "code": kind}})
}

async fn responses(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    fn body_of(content: &Value, incomplete: Option<&str>, [input, output]: [u64; 2]) -> Value {
        json!({
            "id": "resp_stand_in", "object": "response", "model": MODEL, "error": null,
            "status": if incomplete.is_some() { "incomplete" } else { "completed" },
            "incomplete_details": incomplete.map(|reason| json!({"reason": reason})),
            "output": [
                {"type": "reasoning", "id": "rs_stand_in", "summary": []},
                {"type": "message", "id": "msg_stand_in", "role": "assistant", "status": "completed", "content": [content]},
            ],
            "usage": {"input_tokens": input, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": output,
                      "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": input + output},
        })
    }
    fn output_text(text: &str) -> Value {
        json!({"type": "output_text", "text": text, "annotations": []})
    }
    let wrap = Wrap {
        whole: |text, usage| body_of(&output_text(text), None, usage),
        refusal: || body_of(&json!({"type": "refusal", "refusal": "no"}), None, [1, 1]),
        cut_off: |text, usage| body_of(&output_text(text), Some("max_output_tokens"), usage),
        error: openai_error,
    };
    if !bearer(&headers) {
        return error(&wrap, 401, "invalid_api_key", "Incorrect API key provided");
    }
    answer(&shared, wrap, openai::read_responses(&body)).await
}

async fn chat(State(shared): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    fn body_of(content: Value, refusal: Value, finish: &str, [input, output]: [u64; 2]) -> Value {
        json!({
            "id": "chatcmpl-stand-in", "object": "chat.completion", "created": 0, "model": MODEL,
            "choices": [{"index": 0, "finish_reason": finish,
                         "message": {"role": "assistant", "content": content, "refusal": refusal}}],
            "usage": {"prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output},
        })
    }
    let wrap = Wrap {
        whole: |text, usage| body_of(json!(text), Value::Null, "stop", usage),
        refusal: || body_of(Value::Null, json!("no"), "stop", [1, 1]),
        cut_off: |text, usage| body_of(json!(text), Value::Null, "length", usage),
        error: openai_error,
    };
    if !bearer(&headers) {
        return error(&wrap, 401, "invalid_api_key", "Incorrect API key provided");
    }
    answer(&shared, wrap, openai::read_chat(&body)).await
}

/// Protocol Buffers' JSON, which takes each name in either spelling.
mod gemini {
    use super::*;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    pub struct Request {
        pub contents: Vec<Content>,
        #[serde(alias = "generation_config")]
        pub generation_config: Option<Config>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Content {
        pub role: String,
        pub parts: Vec<Part>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    pub struct Part {
        pub text: Option<String>,
        #[serde(alias = "inline_data")]
        pub inline_data: Option<Blob>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    pub struct Blob {
        #[serde(alias = "mime_type")]
        pub mime_type: String,
        pub data: String,
    }
    impl Blob {
        /// Either alphabet of base64 is taken; this is the usual one.
        fn usual(&self) -> String {
            self.data.replace('-', "+").replace('_', "/")
        }
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    #[expect(dead_code, reason = "read to be required")]
    pub struct Config {
        #[serde(alias = "max_output_tokens")]
        pub max_output_tokens: Option<u64>,
        #[serde(alias = "response_mime_type")]
        pub response_mime_type: Option<String>,
        #[serde(alias = "response_json_schema")]
        pub response_json_schema: Option<Value>,
    }

    pub fn read(body: &[u8]) -> Result<Asked, String> {
        let request: Request = parse(body)?;
        let path = "/v1beta/models:generateContent";
        let mut asked =
            Asked { path, text: String::new(), image: None, audio: None, schema: None, body: body.to_vec() };
        for part in request.contents.iter().filter(|content| content.role == "user").flat_map(|c| &c.parts) {
            match (&part.text, &part.inline_data) {
                (Some(text), None) => asked.text += text,
                (None, Some(blob)) if blob.mime_type.starts_with("audio/") => {
                    asked.audio = Some(sound(&blob.mime_type, &blob.usual())?);
                }
                (None, Some(blob)) => asked.image = Some(picture(&blob.mime_type, &blob.usual())?),
                _ => return Err("parts: one of text and inlineData is needed".to_owned()),
            }
        }
        if let Some(config) = request.generation_config {
            if config.response_json_schema.is_some() && config.response_mime_type.as_deref() != Some("application/json")
            {
                return Err("responseJsonSchema: responseMimeType application/json is needed".to_owned());
            }
            asked.schema = config.response_json_schema;
        }
        if asked.text.is_empty() { Err("contents: a text is needed".to_owned()) } else { Ok(asked) }
    }
}

async fn generate(
    State(shared): State<Arc<Shared>>,
    Path(call): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    fn body_of(text: &str, finish: &str, [input, output]: [u64; 2]) -> Value {
        json!({
            "candidates": [{"content": {"role": "model", "parts": [{"text": "hm", "thought": true}, {"text": text}]},
                            "finishReason": finish, "index": 0}],
            "modelVersion": MODEL, "responseId": "stand-in",
            "usageMetadata": {"promptTokenCount": input, "candidatesTokenCount": output, "thoughtsTokenCount": 1,
                              "totalTokenCount": input + output + 1},
        })
    }
    let wrap = Wrap {
        whole: |text, usage| body_of(text, "STOP", usage),
        refusal: || {
            json!({"promptFeedback": {"blockReason": "SAFETY"}, "modelVersion": MODEL,
                   "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 1}})
        },
        cut_off: |text, usage| body_of(text, "MAX_TOKENS", usage),
        error: |kind, message| json!({"error": {"code": 400, "message": message, "status": kind}}),
    };
    if !call.ends_with(":generateContent") {
        return error(&wrap, 404, "NOT_FOUND", "only generateContent is spoken");
    }
    if headers.get("x-goog-api-key").is_none_or(|key| key != KEY) {
        return error(&wrap, 400, "INVALID_ARGUMENT", "API key not valid");
    }
    answer(&shared, wrap, gemini::read(&body)).await
}

async fn models(headers: HeaderMap) -> Response {
    if bearer(&headers)
        || ["x-api-key", "x-goog-api-key"].iter().any(|name| headers.get(*name).is_some_and(|key| key == KEY))
    {
        axum::Json(json!({"data": [{"id": MODEL}]})).into_response()
    } else {
        (StatusCode::UNAUTHORIZED, axum::Json(openai_error("invalid_api_key", "Incorrect API key provided")))
            .into_response()
    }
}
