//! What the wire formats share: each makes a body of a question and reads an answer's body.

use reqwest::{Client, RequestBuilder};
use serde_json::Value;

use super::money::Tokens;
use super::prompt::Parts;
use super::{Question, anthropic, gemini, openai};
use crate::config::Kind;
use crate::secret::Secret;

/// A provider's server and the key to it.
pub struct Server<'a> {
    /// The one HTTP client.
    pub client: &'a Client,
    /// Without a slash at its end.
    pub base_url: &'a str,
    /// The key, where one is needed.
    pub key: Option<&'a Secret>,
}

/// A question to a model.
pub struct Ask<'a> {
    /// The model's name with its provider.
    pub model: &'a str,
    /// The question.
    pub question: &'a Question<'a>,
    /// Its words and picture.
    pub parts: &'a Parts,
    /// How this provider wants to be asked.
    pub manner: Manner,
}

/// How a provider wants to be asked, as it has taught us by its answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Manner {
    /// It knows the limit of tokens only by Chat Completions' older name.
    pub older: bool,
    /// It thinks before it answers, and its thoughts count as tokens of the answer.
    pub thinks: bool,
}

/// Tokens for the thoughts of a model that thinks.
const THOUGHTS: u32 = 2048;

impl Manner {
    /// Most tokens that an answer to the question may take.
    pub fn max_output_tokens(self, question: &Question<'_>) -> u32 {
        question.max_output_tokens.saturating_add(if self.thinks { THOUGHTS } else { 0 })
    }
}

impl Ask<'_> {
    /// Most tokens that the answer may take.
    pub fn max_output_tokens(&self) -> u32 {
        self.manner.max_output_tokens(self.question)
    }
}

/// What a wire format makes of an answer's body.
#[derive(Debug)]
pub struct Parsed {
    /// The text of the answer.
    pub said: Result<Said, Wrong>,
    /// The model's name, as the provider reports it.
    pub model: String,
    /// The provider's own count; none where it sent none.
    pub tokens: Option<Tokens>,
}

/// What a model said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Its words.
    pub text: String,
    /// Whether it reached its limit of tokens.
    pub cut_off: bool,
}

impl Said {
    pub(super) fn whole(text: String) -> Self {
        Said { text, cut_off: false }
    }

    pub(super) fn cut_off(text: String) -> Self {
        Said { text, cut_off: true }
    }
}

/// An answer that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// Asking again may help: another shape, cut off.
    Again(String),
    /// Asking again will not: the model declined.
    Declined(String),
}

impl Wrong {
    pub(super) fn declined() -> Self {
        Wrong::Declined("the model declined to answer".to_owned())
    }

    pub(super) fn filtered() -> Self {
        Wrong::Declined("the provider's filter stopped the answer".to_owned())
    }

    pub(super) fn unended() -> Self {
        Wrong::Again("its answer did not end".to_owned())
    }
}

impl Kind {
    /// The public address of its servers.
    pub(super) fn base_url(self) -> &'static str {
        match self {
            Kind::Anthropic => "https://api.anthropic.com",
            Kind::Openai | Kind::OpenaiCompatible => "https://api.openai.com/v1",
            Kind::Gemini => "https://generativelanguage.googleapis.com",
        }
    }

    /// Whether it takes audio.
    pub(super) fn hears(self) -> bool {
        matches!(self, Kind::Gemini | Kind::OpenaiCompatible)
    }

    /// The body of the request.
    pub(super) fn body(self, ask: &Ask<'_>) -> Value {
        match self {
            Kind::Anthropic => anthropic::body(ask),
            Kind::Openai => openai::responses(ask),
            Kind::Gemini => gemini::body(ask),
            Kind::OpenaiCompatible => openai::chat(ask),
        }
    }

    /// The request without its body.
    pub(super) fn post(self, server: &Server<'_>, model: &str) -> RequestBuilder {
        match self {
            Kind::Anthropic => anthropic::post(server, "messages"),
            Kind::Openai => openai::post(server, "responses"),
            Kind::Gemini => gemini::post(server, model),
            Kind::OpenaiCompatible => openai::post(server, "chat/completions"),
        }
    }

    /// A request for the list of models, which costs nothing.
    pub(super) fn models(self, server: &Server<'_>) -> RequestBuilder {
        match self {
            Kind::Anthropic => anthropic::models(server),
            Kind::Openai | Kind::OpenaiCompatible => openai::models(server),
            Kind::Gemini => gemini::models(server),
        }
    }

    /// Reads the body of an answer.
    pub(super) fn parse(self, body: &Value) -> Parsed {
        match self {
            Kind::Anthropic => anthropic::parse(body),
            Kind::Openai => openai::parse_response(body),
            Kind::Gemini => gemini::parse(body),
            Kind::OpenaiCompatible => openai::parse_chat(body),
        }
    }
}
