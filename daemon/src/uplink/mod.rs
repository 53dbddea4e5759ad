//! Closed models over HTTPS: one question up, one answer of the same shape as a local one back.

use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder, Response};
use serde_json::Value;

use crate::config::{self, Kind};
use crate::job::{Input, Output, Usage};
use crate::secret::{Secret, credential};

mod anthropic;
mod facts;
mod openai;
mod prompt;
mod retry;
mod schema;

pub use facts::{Closed, Offer};

/// Longest time that one attempt may take, where no deadline is nearer.
const ATTEMPT: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(5);
/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// A wrong answer is asked for once more, and no oftener.
const WRONG_ANSWERS: u32 = 2;

/// The shape that the answer must have.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// One of these labels, with a confidence.
    Classes {
        /// The labels; at least one.
        labels: Vec<String>,
    },
    /// Anomalous or not, with a score on the scale of this threshold.
    Anomaly {
        /// The score above which a series is anomalous.
        threshold: f64,
    },
    /// Free text.
    Text,
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Task.
    pub task: &'a str,
    /// What to answer and what the labels mean.
    pub instruction: &'a str,
    /// What it is about.
    pub input: &'a Input,
    /// The shape of the answer.
    pub shape: Shape,
    /// Most tokens that may be written.
    pub max_output_tokens: u32,
}

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The answer, in the shape of the task.
    pub output: Output,
    /// The model's name as the provider reported it.
    pub model: String,
    /// Tokens of all attempts that were billed.
    pub usage: Usage,
    /// What they cost, in US dollars, at the configured prices.
    pub cost_usd: f64,
}

/// Why there is no answer. The words are for the requester: no key, no address, none of a provider's
/// own text.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UplinkError {
    /// No connection, no answer in time, or a failure that did not pass.
    #[error("{provider} cannot be reached: {why}")]
    Unreachable {
        /// The provider's name in the configuration.
        provider: String,
        /// The last failure.
        why: String,
        /// What was spent on the way, US dollars.
        cost_usd: f64,
    },
    /// The provider will not serve this request, now or later.
    #[error("{provider} refused the request: {why}")]
    Refused {
        /// The provider's name in the configuration.
        provider: String,
        /// The reason.
        why: String,
        /// What was spent on the way, US dollars.
        cost_usd: f64,
    },
    /// There was an answer, twice, that is none: another shape, prose, cut off.
    #[error("{provider} gave no usable answer: {why}")]
    Unusable {
        /// The provider's name in the configuration.
        provider: String,
        /// What was wrong with it.
        why: String,
        /// What was spent on the way, US dollars.
        cost_usd: f64,
    },
    /// The deadline passed, or would have passed while waiting.
    #[error("{provider} did not answer by the deadline")]
    Deadline {
        /// The provider's name in the configuration.
        provider: String,
        /// What was spent on the way, US dollars.
        cost_usd: f64,
    },
}

impl UplinkError {
    /// What was spent without an answer, US dollars.
    pub fn cost_usd(&self) -> f64 {
        match self {
            UplinkError::Unreachable { cost_usd, .. }
            | UplinkError::Refused { cost_usd, .. }
            | UplinkError::Unusable { cost_usd, .. }
            | UplinkError::Deadline { cost_usd, .. } => *cost_usd,
        }
    }

    /// Whether time ran out.
    pub fn is_deadline(&self) -> bool {
        matches!(self, UplinkError::Deadline { .. })
    }
}

/// A provider's server and the key to it.
struct Server<'a> {
    client: &'a Client,
    base_url: &'a str,
    key: Option<&'a Secret>,
}

/// A question to one model of a server.
struct Call<'a> {
    server: Server<'a>,
    model: &'a str,
    question: &'a Question<'a>,
    parts: prompt::Parts,
}

/// What a wire format makes of an answer's body.
struct Parsed {
    /// The text of the answer.
    text: Result<String, Wrong>,
    model: String,
    usage: Usage,
}

/// An answer that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wrong {
    /// Asking again may help: another shape, cut off.
    Again(String),
    /// Asking again will not: the model declined.
    Declined(String),
}

struct Entry {
    provider: config::Provider,
    key: Result<Option<Secret>, String>,
    base_url: String,
}

impl Entry {
    fn new(provider: &config::Provider, key: Result<Option<Secret>, String>) -> Self {
        let default = match provider.kind {
            Kind::Anthropic => "https://api.anthropic.com",
            Kind::Openai | Kind::OpenaiCompatible => "https://api.openai.com/v1",
        };
        let base_url = provider.base_url.as_deref().unwrap_or(default).trim_end_matches('/').to_owned();
        Entry { provider: provider.clone(), key, base_url }
    }

    fn cost_usd(&self, usage: Usage) -> f64 {
        let p = &self.provider;
        (usage.input_tokens as f64 * p.usd_per_million_input_tokens
            + usage.output_tokens as f64 * p.usd_per_million_output_tokens)
            / 1e6
    }
}

/// The way up: configured providers and one HTTP client.
pub struct Uplink {
    entries: Vec<Entry>,
    client: Client,
}

impl Uplink {
    /// Providers in the order of the configuration; keys are looked up by [`credential`].
    ///
    /// # Errors
    /// The HTTP client cannot be made, for want of trust roots.
    pub fn new(providers: &[config::Provider]) -> anyhow::Result<Self> {
        let entry = |provider: &config::Provider| {
            let key = match &provider.credential {
                Some(name) => credential(name).map(Some).ok_or_else(|| {
                    format!("no key: credential `{name}` is in neither $CREDENTIALS_DIRECTORY nor the environment")
                }),
                // A model hosted on one's own may need none.
                None if provider.kind == Kind::OpenaiCompatible => Ok(None),
                None => Err("no key: `credential` is not set".to_owned()),
            };
            Entry::new(provider, key)
        };
        Self::of(providers.iter().map(entry).collect())
    }

    /// Providers with their keys.
    ///
    /// # Errors
    /// As [`Uplink::new`].
    pub fn with_keys(providers: Vec<(config::Provider, Option<Secret>)>) -> anyhow::Result<Self> {
        Self::of(providers.into_iter().map(|(provider, key)| Entry::new(&provider, Ok(key))).collect())
    }

    fn of(entries: Vec<Entry>) -> anyhow::Result<Self> {
        // Where there is nothing to ask, no trust roots are needed either.
        let client = Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("outpost/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Uplink { entries, client })
    }

    /// Names of the providers, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.provider.name.as_str())
    }

    /// Whether a provider can be asked.
    ///
    /// # Errors
    /// The reason why not, in words.
    pub fn usable(&self, name: &str) -> Result<(), String> {
        match self.entry(name) {
            Some(entry) => entry.key.as_ref().map(|_| ()).map_err(String::clone),
            None => Err("not configured".to_owned()),
        }
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.provider.name == name)
    }

    /// What an answer would cost at most, roughly, US dollars.
    pub fn estimate_usd(&self, name: &str, question: &Question<'_>) -> f64 {
        let output_tokens = u64::from(question.max_output_tokens);
        let usage = Usage { input_tokens: prompt::estimate_tokens(question), output_tokens };
        self.entry(name).map_or(0.0, |entry| entry.cost_usd(usage))
    }

    /// The providers as they stand for a question, in the order in which they are asked; where there is
    /// none to put, their estimates are 0.
    pub fn offers(&self, question: Option<&Question<'_>>) -> Vec<Offer> {
        let offer = |name: &str| Offer {
            provider: name.to_owned(),
            usable: self.usable(name).map_err(Closed::lasting),
            latency: None,
            estimate_usd: question.map_or(0.0, |question| self.estimate_usd(name, question)),
            left_usd: None,
        };
        self.names().map(offer).collect()
    }

    /// Asks a provider, again where that may help, until the deadline.
    ///
    /// # Errors
    /// See [`UplinkError`].
    pub async fn ask(
        &self,
        name: &str,
        question: &Question<'_>,
        deadline: Option<Instant>,
    ) -> Result<Answer, UplinkError> {
        let refused = |why: String| UplinkError::Refused { provider: name.to_owned(), why, cost_usd: 0.0 };
        let entry = self.entry(name).ok_or_else(|| refused("not configured".to_owned()))?;
        let key = entry.key.as_ref().map_err(|why| refused(why.clone()))?.as_ref();
        let parts = prompt::parts(question).map_err(refused)?;
        let server = Server { client: &self.client, base_url: &entry.base_url, key };
        let call = Call { server, model: &entry.provider.model, question, parts };
        let request = || match entry.provider.kind {
            Kind::Anthropic => anthropic::request(&call),
            Kind::Openai => openai::responses(&call),
            Kind::OpenaiCompatible => openai::chat(&call),
        };
        let mut asking = Asking { entry, key, deadline, usage: Usage::default(), failures: 0, wrong: 0 };
        loop {
            if let Some(answer) = asking.attempt(request(), question).await? {
                return Ok(answer);
            }
        }
    }

    /// Whether a provider can be reached with its key: lists its models, which costs nothing.
    ///
    /// # Errors
    /// The reason, in words.
    pub async fn probe(&self, name: &str) -> Result<String, String> {
        let entry = self.entry(name).ok_or("not configured")?;
        let key = entry.key.as_ref().map_err(String::clone)?.as_ref();
        let server = Server { client: &self.client, base_url: &entry.base_url, key };
        let request = match entry.provider.kind {
            Kind::Anthropic => anthropic::models(&server),
            Kind::Openai | Kind::OpenaiCompatible => openai::models(&server),
        };
        match request.timeout(Duration::from_secs(10)).send().await {
            Ok(response) if matches!(response.status().as_u16(), 401 | 403) => {
                Err(format!("{} refuses the key", entry.base_url))
            }
            Ok(_) => Ok(format!("{} can be reached", entry.base_url)),
            Err(error) => Err(format!("{} cannot be reached: {}", entry.base_url, plain(&error))),
        }
    }
}

/// One question on its way: what it has cost and how often it failed.
struct Asking<'a> {
    entry: &'a Entry,
    key: Option<&'a Secret>,
    deadline: Option<Instant>,
    usage: Usage,
    failures: u32,
    wrong: u32,
}

impl Asking<'_> {
    /// Sends one request. None: worth another.
    async fn attempt(
        &mut self,
        request: RequestBuilder,
        question: &Question<'_>,
    ) -> Result<Option<Answer>, UplinkError> {
        let left = self.left();
        if left.is_zero() {
            return Err(self.late());
        }
        // Dropping the request at the deadline ends it, whatever it waits for.
        let exchange = async {
            let response = request.timeout(left.min(ATTEMPT)).send().await?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Ok::<_, reqwest::Error>((status, headers, body(response).await?))
        };
        let (status, headers, body) = match exchange.await {
            Ok(exchange) => exchange,
            Err(_) if self.left().is_zero() => return Err(self.late()),
            Err(error) => {
                tracing::warn!(provider = self.entry.provider.name, "request failed: {}", plain(&error));
                return self.again(plain(&error), None).await;
            }
        };
        let Some(body) = body else {
            return Err(self.unusable(format!("its answer is over {MAX_ANSWER} bytes")));
        };
        let json: Option<Value> = serde_json::from_slice(&body).ok();
        if !(200..300).contains(&status) {
            let detail = json.as_ref().map(retry::Detail::of).unwrap_or_default();
            tracing::warn!(
                provider = self.entry.provider.name,
                status,
                kind = self.redacted(&detail.kind),
                "{}",
                self.redacted(&detail.message)
            );
            let why = format!("status {status}");
            return match retry::worth(self.entry.provider.kind, status, &detail) {
                true => self.again(why, retry::floor(&headers)).await,
                false => Err(UplinkError::Refused { provider: self.name(), why, cost_usd: self.cost() }),
            };
        }
        let parsed = json.map(|json| match self.entry.provider.kind {
            Kind::Anthropic => anthropic::parse(&json),
            Kind::Openai => openai::parse_response(&json),
            Kind::OpenaiCompatible => openai::parse_chat(&json),
        });
        let Some(Parsed { text, model, usage }) = parsed else {
            return self.once_more("its answer is not JSON".to_owned());
        };
        self.usage.input_tokens += usage.input_tokens;
        self.usage.output_tokens += usage.output_tokens;
        match text.and_then(|text| schema::read(question, &text, usage).map_err(Wrong::Again)) {
            Ok(output) => Ok(Some(Answer { output, model, usage: self.usage, cost_usd: self.cost() })),
            Err(Wrong::Again(why)) => self.once_more(why),
            Err(Wrong::Declined(why)) => Err(self.unusable(why)),
        }
    }

    /// Waits as the schedule says, if there is an attempt left and the deadline allows.
    async fn again(&mut self, why: String, floor: Option<Duration>) -> Result<Option<Answer>, UplinkError> {
        self.failures += 1;
        let Some(wait) = retry::wait(self.failures, floor) else {
            return Err(UplinkError::Unreachable { provider: self.name(), why, cost_usd: self.cost() });
        };
        if wait >= self.left() {
            // Another provider may still be in time; this one is not.
            return Err(UplinkError::Unreachable { provider: self.name(), why, cost_usd: self.cost() });
        }
        tokio::time::sleep(wait).await;
        Ok(None)
    }

    fn once_more(&mut self, why: String) -> Result<Option<Answer>, UplinkError> {
        self.wrong += 1;
        if self.wrong < WRONG_ANSWERS { Ok(None) } else { Err(self.unusable(why)) }
    }

    fn left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()))
    }

    fn name(&self) -> String {
        self.entry.provider.name.clone()
    }

    fn cost(&self) -> f64 {
        self.entry.cost_usd(self.usage)
    }

    fn late(&self) -> UplinkError {
        UplinkError::Deadline { provider: self.name(), cost_usd: self.cost() }
    }

    fn unusable(&self, why: String) -> UplinkError {
        UplinkError::Unusable { provider: self.name(), why, cost_usd: self.cost() }
    }

    /// A provider's own text for the log: short, and without the key should it echo it.
    fn redacted(&self, text: &str) -> String {
        let text = match self.key {
            Some(key) => text.replace(key.expose(), "…"),
            None => text.to_owned(),
        };
        text.chars().filter(|c| !c.is_control()).take(200).collect()
    }
}

/// The body, or none if it is over the limit.
async fn body(mut response: Response) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > MAX_ANSWER {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}

/// A transport error in a few words, without the URL, which may carry a secret.
fn plain(error: &reqwest::Error) -> String {
    let kind = if error.is_timeout() {
        "no answer in time"
    } else if error.is_connect() {
        "no connection"
    } else if error.is_body() || error.is_decode() {
        "the answer broke off"
    } else {
        "the request failed"
    };
    // The innermost cause is the one that an administrator can act upon.
    let mut source: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut last = None;
    while let Some(error) = source {
        last = Some(error.to_string());
        source = error.source();
    }
    match last {
        Some(cause) if !error.is_timeout() => format!("{kind} ({cause})"),
        _ => kind.to_owned(),
    }
}
