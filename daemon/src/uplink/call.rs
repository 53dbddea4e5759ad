//! One question to one provider: the one retry loop, with breaker, places, money and audit around each
//! request.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Client, Response};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};

use super::books::{Call, Denied};
use super::breaker::{Breaker, Pass, Shut};
use super::money::{self, Nano, Tokens};
use super::wire::{Manner, Parsed, Server, Wrong};
use super::{Answer, Closed, Question, Reason, Request, UplinkError, openai, prompt, retry, schema};
use crate::config::{self, Kind};
use crate::job::Usage;
use crate::secret::Secret;

/// Longest time that one request may take, where no deadline is nearer …
const ATTEMPT: Duration = Duration::from_secs(60);
/// … and for each token that the answer may have.
const TOKEN: Duration = Duration::from_millis(50);
/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// A wrong answer is asked for once more, and no oftener.
const WRONG_ANSWERS: u32 = 2;
/// A pause that a provider asks for is waited for up to this long; a longer one means the next provider.
const PAUSE: Duration = Duration::from_secs(2);
/// How often one job waits for such pauses.
const PAUSES: u32 = 8;
/// Longest wait between two requests, even where no deadline is near: a job holds a place meanwhile.
const WAIT: Duration = Duration::from_secs(30);
/// A request that was given less time than this tells nothing of the provider by being late.
const TELLING: Duration = Duration::from_secs(1);
/// How long a latency is believed.
const STALE: Duration = Duration::from_secs(30);
/// Weight of the newest answer in the mean latency.
const NEWEST: f64 = 0.3;
/// Bytes of shared beginning from which a prompt may be stored in a cache, which costs more.
const STORED: usize = 2048;

/// A configured provider with its state.
pub struct Entry {
    /// Its configuration.
    pub provider: config::Provider,
    /// Its key, or why there is none.
    pub key: Result<Option<Secret>, String>,
    base_url: String,
    breaker: Mutex<Breaker>,
    places: Semaphore,
    waiting: AtomicUsize,
    /// Mean of the latest answers, and when the last of them came.
    latency: Mutex<Option<(Duration, Instant)>>,
    /// By how much the provider's own count ever was above our estimate, in thousandths; at least 1000.
    above: AtomicU64,
    manner: Mutex<Manner>,
}

impl Entry {
    /// A provider that is believed to be well.
    pub fn new(provider: &config::Provider, key: Result<Option<Secret>, String>) -> Self {
        let base_url = provider.base_url.as_deref().unwrap_or(provider.kind.base_url());
        Entry {
            base_url: base_url.trim_end_matches('/').to_owned(),
            places: Semaphore::new(provider.concurrency.max(1)),
            provider: provider.clone(),
            key,
            breaker: Mutex::default(),
            waiting: AtomicUsize::new(0),
            latency: Mutex::default(),
            above: AtomicU64::new(1000),
            manner: Mutex::default(),
        }
    }

    /// How it wants to be asked, as far as is known.
    pub fn manner(&self) -> Manner {
        *lock(&self.manner)
    }

    /// Its server.
    pub fn server<'a>(&'a self, client: &'a Client, key: Option<&'a Secret>) -> Server<'a> {
        Server { client, base_url: &self.base_url, key }
    }

    /// Whether it can be asked at `now`.
    ///
    /// # Errors
    /// Why not.
    pub fn usable(&self, now: Instant) -> Result<(), Closed> {
        if let Err(why) = &self.key {
            return Err(Closed::lasting(why.clone()));
        }
        match lock(&self.breaker).ready(now) {
            Ok(()) => Ok(()),
            Err(Shut::Pause(left)) if left <= PAUSE => Ok(()),
            Err(shut) => Err(Closed::passing(words(shut))),
        }
    }

    /// How long an answer takes at `now`, waiting for a place included. None where that is not known, or not any more:
    /// a provider that was slow once would else never be asked again.
    pub fn latency(&self, now: Instant) -> Option<Duration> {
        let rounds = 1.0 + self.waiting.load(Ordering::Relaxed) as f64 / self.provider.concurrency.max(1) as f64;
        let (mean, last) = (*lock(&self.latency))?;
        (now.saturating_duration_since(last) < STALE).then(|| mean.mul_f64(rounds))
    }

    fn took(&self, took: Duration, now: Instant) {
        let mut latency = lock(&self.latency);
        let mean = latency.map_or(took, |(mean, _)| mean.mul_f64(1.0 - NEWEST) + took.mul_f64(NEWEST));
        *latency = Some((mean, now));
    }

    /// Tokens that a question takes to read, from above.
    fn input_tokens(&self, question: &Question<'_>) -> u64 {
        prompt::estimate_tokens(question) * self.above.load(Ordering::Relaxed) / 1000
    }

    /// What one answer costs at most.
    pub fn estimate(&self, question: &Question<'_>) -> Nano {
        let input = self.input_tokens(question);
        let stored = match self.provider.kind {
            // It stores what is marked, OpenAI what is long, the others ask nothing for it.
            Kind::Anthropic if question.instruction.len() + question.shape.bytes() >= STORED => input,
            Kind::Openai if input >= STORED as u64 / 2 => input,
            _ => 0,
        };
        let output = self.manner().max_output_tokens(question).into();
        // A cache that costs more than reading anew would be no bound.
        money::cost(&self.provider, Tokens { input, cached: 0, stored, output })
    }

    /// Learns from a provider that counts more than was estimated.
    fn counted(&self, question: &Question<'_>, tokens: Tokens) {
        let estimate = prompt::estimate_tokens(question).max(1);
        let above = (tokens.input * 1000).div_ceil(estimate);
        if above > self.above.fetch_max(above, Ordering::Relaxed) {
            let name = &self.provider.name;
            tracing::warn!(provider = name, "counts {} tokens where {estimate} were estimated", tokens.input);
        }
    }
}

fn words(shut: Shut) -> String {
    match shut {
        Shut::Pause(left) => format!("it asks to be left alone for {:.0} s more", left.as_secs_f64().ceil()),
        Shut::Open(left) if left.is_zero() => "it failed several times in a row and is being tried".to_owned(),
        Shut::Open(left) => {
            format!("it failed several times in a row and is tried again in {:.0} s", left.as_secs_f64().ceil())
        }
    }
}

/// What these locks guard is replaced by single statements: whole even after a panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A request that the breaker let through; dropped without a word it tells nothing.
struct Through<'a> {
    breaker: &'a Mutex<Breaker>,
    pass: Option<Pass>,
}

impl Through<'_> {
    fn failed(mut self) {
        if let Some(pass) = self.pass.take() {
            lock(self.breaker).failed(pass, Instant::now());
        }
    }

    fn succeeded(mut self) {
        self.pass = None;
        lock(self.breaker).succeeded();
    }
}

impl Drop for Through<'_> {
    fn drop(&mut self) {
        if let Some(pass) = self.pass {
            lock(self.breaker).dropped(pass, Instant::now());
        }
    }
}

/// Counts who waits for a place.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One question on its way to one provider.
pub struct Asking<'a> {
    /// The one HTTP client.
    pub client: &'a Client,
    /// The provider.
    pub entry: &'a Entry,
    /// Its key.
    pub key: Option<&'a Secret>,
    /// The question.
    pub request: &'a Request<'a>,
    /// How it is asked.
    pub manner: Manner,
    /// The body of each request.
    pub body: Vec<u8>,
    /// What it costs and what the audit says.
    pub call: Call<'a>,
    /// Told when an answer came.
    pub back: &'a Notify,
    /// Requests that failed.
    pub failures: u32,
    /// Answers that were none.
    pub wrong: u32,
    /// Pauses waited for.
    pub pauses: u32,
}

/// What came of one request.
enum Step {
    Answer(Answer),
    /// It failed; another may not.
    Again {
        why: String,
        floor: Option<Duration>,
    },
    /// There was an answer that is none.
    Wrong(String),
    Fail(Reason, String),
}

type Exchange = (u16, HeaderMap, Option<Vec<u8>>);

impl<'a> Asking<'a> {
    /// Asks, again where that may help, until the deadline.
    pub async fn run(mut self) -> Result<Answer, UplinkError> {
        let mut last = None;
        loop {
            let (reason, why) = match self.attempt().await {
                Step::Answer(answer) => {
                    self.call.ends("answered");
                    return Ok(answer);
                }
                // It is not for money that there is no answer, but for the failure before.
                Step::Fail(Reason::MaxCost { .. } | Reason::Budget { .. }, _) if last.is_some() => {
                    last.take().unwrap_or((Reason::Away, String::new()))
                }
                Step::Fail(reason, why) => (reason, why),
                Step::Wrong(why) => {
                    self.wrong += 1;
                    if self.wrong < WRONG_ANSWERS {
                        last = Some((Reason::Unusable, why));
                        continue;
                    }
                    (Reason::Unusable, why)
                }
                Step::Again { why, floor } => {
                    self.failures += 1;
                    match retry::wait(self.failures, floor, fastrand::f64()) {
                        // Another provider may still be in time; this one is not.
                        Some(wait) if wait < self.left() && wait <= WAIT => {
                            tokio::time::sleep(wait).await;
                            last = Some((Reason::Away, why));
                            continue;
                        }
                        _ => (Reason::Away, why),
                    }
                }
            };
            self.call.ends(reason.word());
            return Err(UplinkError { provider: self.entry.provider.name.clone(), reason, why });
        }
    }

    /// Sends one request.
    async fn attempt(&mut self) -> Step {
        let (entry, deadline) = (self.entry, self.request.deadline);
        let late = || Step::Fail(Reason::Deadline, String::new());
        let waiting = Waiting::new(&entry.waiting);
        let Some(Ok(_place)) = in_time(deadline, entry.places.acquire()).await else { return late() };
        drop(waiting);
        let through = match self.pass().await {
            Ok(through) => through,
            Err(step) => return step,
        };
        match in_time(deadline, self.call.reserve(entry.estimate(self.request.question))).await {
            None => return late(),
            Some(Ok(())) => {}
            Some(Err(denied)) => return self.denied(denied),
        }
        let started = Instant::now();
        let request = entry
            .provider
            .kind
            .post(&entry.server(self.client, self.key), &entry.provider.model)
            .header(CONTENT_TYPE, "application/json")
            .body(self.body.clone())
            .timeout(ATTEMPT + TOKEN * self.manner.max_output_tokens(self.request.question));
        // Dropping the request at the deadline ends it, whatever it waits for.
        let exchange = in_time(deadline, async {
            let response = request.send().await?;
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            Ok::<Exchange, reqwest::Error>((status, headers, body(response).await?))
        });
        match exchange.await {
            None => {
                self.call.in_doubt();
                let usual = entry.latency(Instant::now()).unwrap_or_default();
                if started.elapsed() >= TELLING.max(usual * 2) {
                    through.failed();
                }
                late()
            }
            Some(Err(error)) => {
                tracing::warn!(provider = entry.provider.name, "request failed: {}", plain(&error));
                if error.is_connect() {
                    self.call.not_sent();
                } else {
                    self.call.in_doubt();
                }
                through.failed();
                // One that had all its time would take it again.
                if error.is_timeout() && !error.is_connect() {
                    return Step::Fail(Reason::Away, plain(&error));
                }
                Step::Again { why: plain(&error), floor: None }
            }
            Some(Ok((status, headers, body))) if !(200..300).contains(&status) => {
                self.call.settle(0, Tokens::default());
                self.refused(through, status, &headers, body.as_deref())
            }
            Some(Ok((_, _, body))) => {
                entry.took(started.elapsed(), Instant::now());
                self.answered(through, body.as_deref())
            }
        }
    }

    /// The breaker's word; short pauses are waited for.
    async fn pass(&mut self) -> Result<Through<'a>, Step> {
        let breaker = &self.entry.breaker;
        loop {
            // The guard of the lock is not held over the wait.
            let word = lock(breaker).admit(Instant::now());
            match word {
                Ok(pass) => return Ok(Through { breaker, pass: Some(pass) }),
                Err(Shut::Pause(left)) if left <= PAUSE && self.pauses < PAUSES => {
                    self.pauses += 1;
                    // All who wait would come at the same time.
                    let wait = left + left.mul_f64(fastrand::f64() / 4.0);
                    if wait >= self.left() {
                        return Err(Step::Fail(Reason::Away, words(Shut::Pause(left))));
                    }
                    tokio::time::sleep(wait).await;
                }
                Err(shut) => return Err(Step::Fail(Reason::Away, words(shut))),
            }
        }
    }

    fn denied(&self, denied: Denied) -> Step {
        let usd = money::usd(self.entry.estimate(self.request.question));
        match denied {
            Denied::Budget { of, budget_usd, left_usd } => Step::Fail(
                Reason::Budget { of, budget_usd },
                format!("it could cost ${usd:.6}, and ${left_usd:.6} of the {of}'s ${budget_usd} for the day are left"),
            ),
            Denied::Job => {
                let most_usd = self.request.max_cost_usd.unwrap_or_default();
                Step::Fail(
                    Reason::MaxCost { most_usd },
                    format!("it could cost ${usd:.6}, over the job's ${most_usd:.6}"),
                )
            }
            Denied::Unrecorded => {
                Step::Fail(Reason::Refused, "what is sent up cannot be recorded on this node's disk".to_owned())
            }
        }
    }

    /// An answer with a status that says no.
    fn refused(&self, through: Through<'_>, status: u16, headers: &HeaderMap, body: Option<&[u8]>) -> Step {
        let provider = &self.entry.provider;
        let json: Option<Value> = body.and_then(|body| serde_json::from_slice(body).ok());
        let detail = json.as_ref().map(retry::Detail::of).unwrap_or_default();
        let (kind, message) = (self.redacted(&detail.kind), self.redacted(&detail.message));
        tracing::warn!(provider = provider.name, status, kind, "{message}");
        let why = format!("status {status}");
        if !retry::worth(provider.kind, status, &detail) {
            through.succeeded();
            let sent = openai::limit(self.manner.older);
            let names = |body: &[u8]| String::from_utf8_lossy(body).contains(sent);
            if provider.kind == Kind::OpenaiCompatible && matches!(status, 400 | 422) && body.is_some_and(names) {
                lock(&self.entry.manner).older = !self.manner.older;
            }
            return Step::Fail(Reason::Refused, why);
        }
        let floor = retry::floor(headers).or(detail.wait);
        if status >= 500 || status == 408 {
            through.failed()
        } else {
            through.succeeded()
        }
        if let Some(wait) = floor {
            // What one was told holds for all.
            lock(&self.entry.breaker).pause(wait, Instant::now());
        }
        Step::Again { why, floor }
    }

    /// An answer, or what claims to be one; none: it was too large to be read.
    fn answered(&mut self, through: Through<'_>, body: Option<&[u8]>) -> Step {
        let entry = self.entry;
        let Some(body) = body else {
            through.succeeded();
            self.call.in_doubt();
            return Step::Fail(Reason::Unusable, format!("its answer is over {MAX_ANSWER} bytes"));
        };
        let Ok(json) = serde_json::from_slice::<Value>(body) else {
            // Not the provider, but what stands between.
            through.failed();
            self.call.in_doubt();
            return Step::Wrong("its answer is not JSON".to_owned());
        };
        through.succeeded();
        self.back.notify_waiters();
        let Parsed { said, model, tokens } = entry.provider.kind.parse(&json);
        match tokens {
            Some(tokens) => {
                self.call.settle(money::cost(&entry.provider, tokens), tokens);
                entry.counted(self.request.question, tokens);
            }
            // A bill without figures is counted in full.
            None => self.call.in_doubt(),
        }
        let tokens = tokens.unwrap_or_default();
        let usage = Usage { input_tokens: tokens.input, output_tokens: tokens.output };
        let question = self.request.question;
        let cut_off = said.as_ref().is_ok_and(|said| said.cut_off);
        match said.and_then(|said| schema::read(question, &said, usage).map_err(Wrong::Again)) {
            Ok(output) => {
                let model = if model.is_empty() { entry.provider.model.clone() } else { model };
                Step::Answer(Answer { provider: entry.provider.name.clone(), output, model, age: None })
            }
            // So few tokens are short for a model that thinks only: it is asked again with more.
            Err(Wrong::Again(why)) if cut_off && !self.manner.thinks => {
                lock(&entry.manner).thinks = true;
                Step::Fail(Reason::Unusable, why)
            }
            Err(Wrong::Again(why)) => Step::Wrong(why),
            Err(Wrong::Declined(why)) => Step::Fail(Reason::Unusable, why),
        }
    }

    fn left(&self) -> Duration {
        self.request.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()))
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

/// Awaits until the deadline at most.
pub async fn in_time<F: Future>(deadline: Option<Instant>, future: F) -> Option<F::Output> {
    match deadline {
        None => Some(future.await),
        Some(deadline) => tokio::time::timeout_at(deadline.into(), future).await.ok(),
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
pub fn plain(error: &reqwest::Error) -> String {
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
