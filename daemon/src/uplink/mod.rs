//! Closed models over HTTPS: one question up, one answer of the same shape as a local one back.
//!
//! [`Uplink::ask`] goes through the providers it is given, in order. With each, `call` is the one retry
//! loop; `breaker`, `money` and `retry` decide, purely, whether a request goes out; `books` keeps on disk
//! what was spent and what was sent. One file a wire format makes bodies and reads answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use reqwest::Client;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, Semaphore};

use crate::config::{self, Kind};
use crate::job::{Input, Output};
use crate::secret::{Secret, credential};

mod anthropic;
mod books;
mod breaker;
mod cache;
mod call;
mod facts;
mod gemini;
mod money;
mod openai;
mod picture;
mod plot;
mod prompt;
mod retry;
mod schema;
mod wire;

pub use books::{Account, Books, Line, TaskAccount};
pub use facts::{Closed, Offer};
pub use money::{Budgets, nano};

pub use call::in_time;
use call::{Asking, Entry};
use money::JobPurse;
use wire::{Ask, Manner};

const CONNECT: Duration = Duration::from_secs(5);
/// Pictures that are scaled or drawn at once.
const DRAWING: usize = 2;

/// The shape that the answer must have.
#[derive(Debug, Clone, PartialEq, Serialize)]
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

impl Shape {
    /// Bytes of its words.
    fn bytes(&self) -> usize {
        match self {
            Shape::Classes { labels } => labels.iter().map(|label| label.len() + 2).sum(),
            Shape::Anomaly { .. } | Shape::Text => 0,
        }
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Task.
    pub task: &'a str,
    /// What to answer and what the labels mean.
    pub instruction: &'a str,
    /// What it is about.
    pub input: &'a Arc<Input>,
    /// The shape of the answer.
    pub shape: Shape,
    /// Most tokens that may be written.
    pub max_output_tokens: u32,
    /// Longest side of a picture in pixels; a larger one is scaled down.
    pub picture_side: u32,
    /// Whether a series is sent as a plot and not as a table; none: where a table would leave rows out.
    pub plot: Option<bool>,
}

/// A question with the job's wishes.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The question.
    pub question: &'a Question<'a>,
    /// The job's id, for the audit.
    pub job: Option<&'a str>,
    /// Moment after which an answer is worthless.
    pub deadline: Option<Instant>,
    /// Most that all answers together may cost, US dollars.
    pub max_cost_usd: Option<f64>,
    /// Age up to which an answer that was given to the same question will do; zero: none will.
    pub cache: Duration,
}

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The provider's name in the configuration.
    pub provider: String,
    /// The model's name as the provider reported it.
    pub model: String,
    /// The answer, in the shape of the task.
    pub output: Output,
    /// How long ago it was given, where it comes from the cache.
    pub age: Option<Duration>,
}

/// What came of asking.
#[derive(Debug)]
pub struct Asked {
    /// Providers that gave none, in order.
    pub failed: Vec<UplinkError>,
    /// The answer of the first that gave one.
    pub answer: Option<Answer>,
    /// What all of it cost, US dollars, by the providers' own figures; requests without a bill at what
    /// they could cost.
    pub cost_usd: f64,
}

/// Why a provider gave no answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// No connection, no answer in time, or a failure that did not pass.
    Away,
    /// It will not serve this request, now or later.
    Refused,
    /// There was an answer, twice, that is none: another shape, prose, cut off.
    Unusable,
    /// The deadline passed, or would have passed while waiting.
    Deadline,
    /// A budget of the day does not allow it.
    Budget {
        /// `node` or `task`.
        of: &'static str,
        /// The budget, US dollars.
        budget_usd: f64,
    },
    /// The job's own bound does not allow it.
    MaxCost {
        /// The bound, US dollars.
        most_usd: f64,
    },
}

impl Reason {
    /// The word of the audit.
    fn word(&self) -> &'static str {
        match self {
            Reason::Away => "unreachable",
            Reason::Refused => "refused",
            Reason::Unusable => "unusable",
            Reason::Deadline => "late",
            Reason::Budget { .. } | Reason::MaxCost { .. } => "budget",
        }
    }
}

/// Why there is no answer from a provider. The words are for the requester: no key, no address, none of
/// the provider's own text.
#[derive(Debug, Clone, PartialEq)]
pub struct UplinkError {
    /// The provider's name in the configuration.
    pub provider: String,
    /// The kind of failure.
    pub reason: Reason,
    /// The last failure, in words.
    pub why: String,
}

impl std::fmt::Display for UplinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let UplinkError { provider, reason, why } = self;
        match reason {
            Reason::Away => write!(f, "{provider} cannot be reached: {why}"),
            Reason::Refused => write!(f, "{provider} refused the request: {why}"),
            Reason::Unusable => write!(f, "{provider} gave no usable answer: {why}"),
            Reason::Deadline => write!(f, "{provider} did not answer by the deadline"),
            Reason::Budget { .. } | Reason::MaxCost { .. } => write!(f, "{provider} was not asked: {why}"),
        }
    }
}

impl std::error::Error for UplinkError {}

/// The way up: configured providers and one HTTP client.
pub struct Uplink {
    entries: Vec<Entry>,
    client: Client,
    hedge: Option<Duration>,
    books: Books,
    cache: cache::Cache,
    back: Arc<Notify>,
    drawing: Arc<Semaphore>,
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
        let client = Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("outpost/", env!("CARGO_PKG_VERSION")))
            .build()?;
        let (books, back, drawing) = (Books::in_memory(), Arc::new(Notify::new()), Arc::new(Semaphore::new(DRAWING)));
        Ok(Uplink { entries, client, hedge: None, books, cache: cache::Cache::default(), back, drawing })
    }

    /// With books that are kept on disk; without them nothing binds and nothing is recorded.
    pub fn with_books(self, books: Books) -> Self {
        Uplink { books, ..self }
    }

    /// Asks the next provider beside one that has not answered after `hedge`.
    pub fn with_hedge(self, hedge: Option<Duration>) -> Self {
        Uplink { hedge, ..self }
    }

    /// Names of the providers, in the order in which they are asked.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.provider.name.as_str())
    }

    /// Whether a provider can be asked now.
    ///
    /// # Errors
    /// The reason why not, in words.
    pub fn usable(&self, name: &str) -> Result<(), String> {
        match self.entry(name) {
            Some(entry) => entry.usable(Instant::now()).map_err(|closed| closed.why),
            None => Err("not configured".to_owned()),
        }
    }

    /// Whether any provider can be asked now.
    pub fn open(&self) -> bool {
        let now = Instant::now();
        self.entries.iter().any(|entry| entry.usable(now).is_ok())
    }

    /// Ends when a provider has answered something.
    pub async fn back(&self) {
        self.back.notified().await;
    }

    /// Ends when all that was sent and spent so far is on the disk, or cannot be written there.
    pub async fn recorded(&self) {
        self.books.written().await;
    }

    /// What was spent today, and what is left.
    pub fn account(&self) -> Account {
        self.books.account()
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.provider.name == name)
    }

    /// The providers as they stand for a question, in the order in which they are asked; where there is
    /// none to put, their estimates are 0.
    pub fn offers(&self, question: Option<&Question<'_>>) -> Vec<Offer> {
        let now = Instant::now();
        let unspent = question.and_then(|question| self.books.unspent_usd(question.task));
        let deaf = |entry: &Entry| {
            question.is_some_and(|question| matches!(**question.input, Input::Audio(_)) && !entry.provider.kind.hears())
        };
        let offer = |entry: &Entry| Offer {
            provider: entry.provider.name.clone(),
            usable: match deaf(entry) {
                true => Err(Closed::lasting("its wire format takes no audio")),
                false => entry.usable(now),
            },
            latency: entry.latency(now),
            estimate_usd: question.map_or(0.0, |question| money::usd(entry.estimate(question))),
            left_usd: unspent.map(|(left, _)| left),
            budget_usd: unspent.map(|(_, budget)| budget),
        };
        self.entries.iter().map(offer).collect()
    }

    /// Asks these providers, the next one where one gives no answer or, where hedging is on, is late.
    pub async fn ask(&self, names: &[String], request: &Request<'_>) -> Asked {
        let key = (!request.cache.is_zero()).then(|| cache::key(request.question)).flatten();
        if let Some((answer, age)) = key.and_then(|key| self.cache.get(&key, request.cache, Instant::now())) {
            let answer = Some(Answer { age: Some(age), ..answer });
            return Asked { failed: Vec::new(), answer, cost_usd: 0.0 };
        }
        let purse = JobPurse::new(request.max_cost_usd);
        let not_put = |reason, why| {
            let provider = names.first().cloned().unwrap_or_default();
            (vec![UplinkError { provider, reason, why }], None)
        };
        let (failed, answer) = match in_time(request.deadline, self.parts(request.question)).await {
            Some(Ok(parts)) => self.ask_in_order(names, request, &parts, &purse).await,
            Some(Err(why)) => not_put(Reason::Refused, why),
            None => not_put(Reason::Deadline, String::new()),
        };
        if let (Some(key), Some(answer)) = (key, &answer) {
            self.cache.put(key, answer, Instant::now());
        }
        Asked { failed, answer, cost_usd: purse.cost_usd() }
    }

    /// The question in words; pictures are scaled and drawn beside the runtime, a few at a time: one that is decoded
    /// takes many times the bytes of its file.
    async fn parts(&self, question: &Question<'_>) -> Result<prompt::Parts, String> {
        if !prompt::is_work(question) {
            return prompt::parts(question);
        }
        let turn = Arc::clone(&self.drawing).acquire_owned().await.map_err(|error| error.to_string())?;
        let Question { task, instruction, input, shape, max_output_tokens, picture_side, plot } = question.clone();
        let (task, instruction, input) = (task.to_owned(), instruction.to_owned(), Arc::clone(input));
        let made = tokio::task::spawn_blocking(move || {
            // Kept to the end, even where nobody waits for it any more.
            let _turn = turn;
            let (task, instruction, input) = (task.as_str(), instruction.as_str(), &input);
            prompt::parts(&Question { task, instruction, input, shape, max_output_tokens, picture_side, plot })
        });
        made.await.map_err(|error| error.to_string())?
    }

    async fn ask_in_order(
        &self,
        names: &[String],
        request: &Request<'_>,
        parts: &prompt::Parts,
        purse: &JobPurse,
    ) -> (Vec<UplinkError>, Option<Answer>) {
        type Answering<'a> = Pin<Box<dyn Future<Output = Result<Answer, UplinkError>> + Send + 'a>>;
        let mut names = names.iter();
        let mut failed = Vec::new();
        let mut running: Vec<Answering<'_>> = Vec::new();
        loop {
            if running.is_empty() {
                let Some(name) = names.next() else { return (failed, None) };
                running.push(Box::pin(self.ask_one(name, request, parts, purse)));
            }
            let hedge = self.hedge.filter(|_| running.len() == 1 && names.len() > 0);
            let late = async {
                match hedge {
                    Some(hedge) => tokio::time::sleep(hedge).await,
                    None => std::future::pending().await,
                }
            };
            let done = std::future::poll_fn(|context| {
                let ready = running.iter_mut().enumerate().find_map(|(n, asking)| {
                    let Poll::Ready(result) = asking.as_mut().poll(context) else { return None };
                    Some((n, result))
                });
                ready.map_or(Poll::Pending, Poll::Ready)
            });
            tokio::select! {
                biased;
                (n, result) = done => {
                    drop(running.swap_remove(n));
                    match result {
                        // The others are dropped; what they have sent is counted in full.
                        Ok(answer) => return (failed, Some(answer)),
                        Err(error) => failed.push(error),
                    }
                }
                () = late => {
                    if let Some(name) = names.next() {
                        running.push(Box::pin(self.ask_one(name, request, parts, purse)));
                    }
                }
            }
        }
    }

    async fn ask_one(
        &self,
        name: &str,
        request: &Request<'_>,
        parts: &prompt::Parts,
        purse: &JobPurse,
    ) -> Result<Answer, UplinkError> {
        let Some(entry) = self.entry(name) else {
            let why = "not configured".to_owned();
            return Err(UplinkError { provider: name.to_owned(), reason: Reason::Refused, why });
        };
        let manner = entry.manner();
        let answer = self.ask_as(entry, manner, 0, request, parts, purse).await;
        let Err(UplinkError { reason: reason @ (Reason::Refused | Reason::Unusable), .. }) = &answer else {
            return answer;
        };
        // It may be for the manner of asking, which is known better now.
        match entry.manner() {
            better if better != manner => {
                let wrong = u32::from(*reason == Reason::Unusable);
                self.ask_as(entry, better, wrong, request, parts, purse).await
            }
            _ => answer,
        }
    }

    async fn ask_as(
        &self,
        entry: &Entry,
        manner: Manner,
        wrong: u32,
        request: &Request<'_>,
        parts: &prompt::Parts,
        purse: &JobPurse,
    ) -> Result<Answer, UplinkError> {
        let (name, question) = (&entry.provider.name, request.question);
        let refused = |why| UplinkError { provider: name.clone(), reason: Reason::Refused, why };
        let key = entry.key.as_ref().map_err(|why| refused(why.clone()))?.as_ref();
        let ask = Ask { model: &entry.provider.model, question, parts, manner };
        let body = serde_json::to_vec(&entry.provider.kind.body(&ask)).map_err(|error| refused(error.to_string()))?;
        let line = Line {
            at: books::now(),
            call: 0,
            job: request.job.map(str::to_owned),
            task: question.task.to_owned(),
            provider: name.clone(),
            model: entry.provider.model.clone(),
            bytes: body.len() as u64,
            sha256: Sha256::digest(&body).iter().map(|byte| format!("{byte:02x}")).collect(),
            requests: 0,
            input_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            cost_usd: 0.0,
            outcome: String::new(),
        };
        let call = self.books.call(purse, line);
        let (client, back) = (&self.client, &*self.back);
        let asking = Asking { client, entry, key, request, manner, body, call, back, failures: 0, wrong, pauses: 0 };
        asking.run().await
    }

    /// Whether a provider can be reached with its key: lists its models, which costs nothing.
    ///
    /// # Errors
    /// The reason, in words.
    pub async fn probe(&self, name: &str) -> Result<String, String> {
        let entry = self.entry(name).ok_or("not configured")?;
        let key = entry.key.as_ref().map_err(String::clone)?.as_ref();
        let server = entry.server(&self.client, key);
        match entry.provider.kind.models(&server).timeout(Duration::from_secs(10)).send().await {
            Ok(response) if matches!(response.status().as_u16(), 401 | 403) => {
                Err(format!("{} refuses the key", server.base_url))
            }
            Ok(_) => Ok(format!("{} can be reached", server.base_url)),
            Err(error) => Err(format!("{} cannot be reached: {}", server.base_url, call::plain(&error))),
        }
    }
}

/// Whether a question can be put to a closed model at all.
///
/// # Errors
/// In words, why not.
pub fn sendable(question: &Question<'_>) -> Result<(), String> {
    prompt::sendable(question)
}
