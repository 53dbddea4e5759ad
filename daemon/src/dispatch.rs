//! A job's way from its arrival to its reply: read, admit, route, run or send up, reply.
//!
//! Reading and admitting are done by one thread of its own; each admitted job is then a task that
//! waits for workers and providers. The number of these tasks is the gate's, so it is bounded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::admit::{Admitted, Gate, Verdict};
use crate::config::{Prefer, Routing};
use crate::engine::package::{OutputKind, Package};
use crate::engine::{Model, Pool, Registry, meter};
use crate::hold::{Held, Hold};
use crate::intake::link::Arrived;
use crate::intake::{Incoming, Reader, Receipt};
use crate::job::{
    By, Code, Fault, Job, Outcome, Output, Privacy, Reply, ReplyTo, Station, Status, TASKS, Tier, Timing,
};
use crate::reply::{Keep, Message, Outbox};
use crate::route::{Device, Facts, Plan, Provider, Stop, route};
use crate::store::{Key, Store};
use crate::uplink::{self, Offer, Question, Reason, Request, Shape, Uplink, UplinkError};

/// Tokens that a label and its confidence take, with room to spare.
const ANSWER_TOKENS: u32 = 256;
/// Tokens of a generated text where the job does not say.
const TEXT_TOKENS: u32 = 1024;

/// Longest side of a picture that is sent up, in pixels; a model that sees less needs less.
const PICTURE_SIDE: (u32, u32) = (256, 1024);
/// Pixels sent up for each pixel that the local model sees.
const PICTURE_SCALE: u32 = 8;
/// Time that is kept for the way back of a closed model's answer, at most; an answer that comes later
/// would be late for the requester.
const WAY_BACK: Duration = Duration::from_millis(50);
/// How often a held job is tried while no provider can be reached.
const HOLD_EVERY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// Replies to held jobs that may wait for the broker.
const HELD_OUT: usize = 64;

/// Everything that a job meets on its way.
pub struct Dispatch {
    /// Reads messages.
    pub reader: Reader,
    /// Admits jobs.
    pub gate: Gate,
    /// Models that are active.
    pub registry: Registry,
    /// Runs them.
    pub pool: Pool,
    /// Closed models.
    pub uplink: Uplink,
    /// Rules.
    pub routing: Routing,
    /// Replies given.
    pub store: Arc<Store>,
    /// Replies going out.
    pub outbox: Arc<Outbox>,
    /// Jobs that wait for the way up to open.
    pub hold: Arc<Hold>,
}

/// The reply to a job, and whether it only is as it is for want of a way up.
struct Answered {
    reply: Reply,
    away: bool,
}

impl Dispatch {
    /// Reads and admits what arrives until the channel closes; for a thread of its own.
    pub fn work(self: &Arc<Self>, mut arrived: mpsc::Receiver<Arrived>, runtime: &tokio::runtime::Handle) {
        while let Some(arrived) = arrived.blocking_recv() {
            self.take(arrived, runtime);
        }
    }

    fn take(self: &Arc<Self>, arrived: Arrived, runtime: &tokio::runtime::Handle) {
        let Arrived { delivery, receipt } = arrived;
        let bytes = delivery.payload.len();
        let started = delivery.received.unwrap_or_else(Instant::now);
        let Incoming { id, reply_to, job } = self.reader.read(delivery);
        let refuse = |reply_to: ReplyTo, fault: Fault| {
            let timing = Timing { total: ms(started.elapsed()), ..Timing::default() };
            let payload = Reply::error(id.clone(), fault, Vec::new(), timing).encode();
            self.outbox.send(message(reply_to, payload), receipt.into_iter().collect(), None);
        };
        let (reply_to, job) = match (reply_to, job) {
            (Ok(reply_to), Ok(job)) => (reply_to, job),
            (Ok(reply_to), Err(fault)) => return refuse(reply_to, fault),
            (Err(fault), _) => {
                tracing::warn!(id = id.as_deref(), "job without a usable reply address: {}", fault.message);
                let topic = self.reader.topics.errors();
                return refuse(ReplyTo { topic, correlation: None }, fault);
            }
        };
        match self.gate.admit(job, reply_to.clone(), bytes, receipt, Instant::now()) {
            Verdict::Run(admitted) => {
                let this = Arc::clone(self);
                runtime.spawn(async move { this.carry_out(admitted).await });
            }
            Verdict::Joined | Verdict::Left => {}
            Verdict::Again(payload) => {
                self.outbox.send(message(reply_to, payload), receipt.into_iter().collect(), None)
            }
            Verdict::Refused(fault) => refuse(reply_to, fault),
        }
    }

    /// Answers an admitted job, remembers the reply, sends it.
    async fn carry_out(&self, admitted: Admitted) {
        let Admitted { job, reply_to, key, receipt, slot } = admitted;
        let job = Arc::new(job);
        let Answered { reply, away } = self.answer(&job).await;
        let receipts: Vec<_> = receipt.into_iter().collect();
        if away && job.wishes.deadline.is_none() && self.hold.is_on() {
            let (hold, job, to) = (Arc::clone(&self.hold), Arc::clone(&job), reply_to.clone());
            let kept = tokio::task::spawn_blocking(move || hold.keep(&job, &to, key)).await;
            match kept.map_err(std::io::Error::other).and_then(|kept| kept) {
                Ok(()) => return self.outbox.acknowledge(receipts),
                Err(error) => tracing::warn!("a job is not held, but answered as it stands: {error}"),
            }
        }
        self.send(&job, reply, reply_to, key, receipts, Keep::Room(slot)).await;
    }

    /// Remembers a reply and sends it.
    async fn send(
        &self,
        job: &Job,
        reply: Reply,
        reply_to: ReplyTo,
        key: Option<Key>,
        mut receipts: Vec<Receipt>,
        keep: Keep,
    ) {
        if let Some(error) = &reply.error {
            tracing::debug!(id = job.id.as_deref(), task = job.task, code = ?error.code, "{}", error.message);
        }
        let payload = reply.encode();
        if let Some(key) = key {
            self.store.put(key, payload.clone()).await;
            receipts.extend(self.gate.answered(&key));
        }
        self.outbox.send(message(reply_to, payload), receipts, Some(keep));
    }

    /// Jobs held by an earlier run are known from the start, so that the same ones are not run beside them.
    pub fn resume_held(&self) {
        for key in self.hold.keys() {
            self.gate.resume(key);
        }
    }

    /// Sends held jobs up, oldest first, whenever a provider can be reached; never ends.
    pub async fn send_held(self: Arc<Self>) {
        let mut pause = HOLD_EVERY.0;
        loop {
            // While the broker takes no replies, more of them need not be made.
            let this = Arc::clone(&self);
            let oldest = move || {
                let held = this.hold.oldest()?;
                let given = held.key.and_then(|key| this.store.get(&key));
                Some((held, given))
            };
            let next = match self.hold.out() < HELD_OUT {
                true => tokio::task::spawn_blocking(oldest).await.ok().flatten(),
                false => None,
            };
            let Some((Held { job, reply_to, key, left, ticket }, given)) = next else {
                self.hold.changed().await;
                continue;
            };
            if let Some(payload) = given {
                // Answered, and the process ended before the broker had it.
                let receipts = key.map(|key| self.gate.answered(&key)).unwrap_or_default();
                self.outbox.send(message(reply_to, payload), receipts, Some(Keep::File(ticket)));
                continue;
            }
            let job = Arc::new(job);
            let open = self.uplink.open() || left.is_zero();
            let answered = if open { Some(self.answer(&job).await) } else { None };
            match answered {
                Some(Answered { reply, away }) if !away || left.is_zero() => {
                    pause = HOLD_EVERY.0;
                    self.send(&job, reply, reply_to, key, Vec::new(), Keep::File(ticket)).await;
                }
                _ => {
                    ticket.give_back();
                    tokio::select! {
                        () = tokio::time::sleep(pause.min(left)) => pause = (pause * 2).min(HOLD_EVERY.1),
                        () = self.uplink.back() => pause = HOLD_EVERY.0,
                    }
                }
            }
        }
    }

    /// The reply to a job: tried where the plan says, until something answers for certain.
    async fn answer(&self, job: &Arc<Job>) -> Answered {
        let wanted = job.wishes.model.as_deref();
        let model = self.registry.find(&job.task, wanted);
        let package = match model {
            Some(model) => Some(&model.package),
            None => self.registry.find_too_large(&job.task, wanted).map(|(package, _)| package),
        };
        let question = self.question(job, package);
        let offers = self.uplink.offers(question.as_ref().ok());
        let passing = |offer: &&Offer| offer.usable.as_ref().is_err_and(|closed| closed.passing);
        let passing: Vec<String> = offers.iter().filter(passing).map(|offer| offer.provider.clone()).collect();
        let plan = route(&self.facts(job, model, question.as_ref().map(|_| ()), offers));
        // A provider that the plan passes by may only be away for now.
        let skipped = |stop: &Stop| match stop {
            Stop::Skip(station) => station.provider.as_ref().is_some_and(|provider| passing.contains(provider)),
            _ => false,
        };
        let mut tried = Tried { away: plan.stops.iter().any(skipped), ..Tried::default() };
        let answered = self.follow(plan, job, model, question.ok().as_ref(), &mut tried).await;
        let Tried { stations, mut timing, cost_usd, fault, uncertain, away } = tried;
        timing.total = ms(job.received.elapsed());
        let missed = |output: &Output| {
            output.confidence().zip(job.wishes.min_confidence).is_some_and(|(found, wanted)| found < wanted)
        };
        let (output, by, degraded) = match (answered, uncertain) {
            (Ok((output, by)), _) => {
                let degraded = missed(&output);
                (output, by, degraded)
            }
            (Err(_), Some((output, by))) => (output, by, true),
            (Err(planned), None) => {
                let mut reply = Reply::error(job.id.clone(), fault.unwrap_or(planned), stations, timing);
                reply.cost_usd = cost_usd;
                return Answered { reply, away };
            }
        };
        let away = away && degraded && matches!(by, By::Device { .. });
        let reply = Reply {
            id: job.id.clone(),
            status: Status::Ok,
            output: Some(output),
            error: None,
            by: Some(by),
            route: stations,
            degraded,
            timing_ms: timing,
            cost_usd,
        };
        Answered { reply, away }
    }

    async fn follow(
        &self,
        plan: Plan,
        job: &Arc<Job>,
        model: Option<&Arc<Model>>,
        question: Option<&Question<'_>>,
        tried: &mut Tried,
    ) -> Result<(Output, By), Fault> {
        let mut stops = plan.stops.into_iter().peekable();
        while let Some(stop) = stops.next() {
            match stop {
                Stop::Skip(station) => tried.stations.push(station),
                _ if job.wishes.deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    tried.fault = Some(late());
                    break;
                }
                Stop::Device => {
                    let Some(model) = model else { continue };
                    if let Some(answer) = self.run(job, model, tried).await? {
                        return Ok(answer);
                    }
                }
                Stop::Cloud(first) => {
                    let Some(question) = question else { continue };
                    // Providers in a row are asked together: the next may be asked beside a late one.
                    let mut providers = vec![first];
                    while let Some(Stop::Cloud(next)) = stops.next_if(|stop| matches!(stop, Stop::Cloud(_))) {
                        providers.push(next);
                    }
                    if let Some(answer) = self.ask(&providers, job, question, tried).await {
                        return Ok(answer);
                    }
                }
            }
        }
        Err(plan.fault)
    }

    /// Runs the job on the device. None: not for certain, go on. An error ends the job's way.
    async fn run(&self, job: &Arc<Job>, model: &Arc<Model>, tried: &mut Tried) -> Result<Option<(Output, By)>, Fault> {
        let station = |outcome, why| Station { tier: Tier::Device, provider: None, outcome, why };
        let queued = Instant::now();
        let done = match self.pool.submit(Arc::clone(job), Arc::clone(model)) {
            Ok(done) => in_time(job, done).await,
            Err(fault) => {
                tried.stations.push(station(Outcome::Failed, Some(fault.message.clone())));
                tried.fault = Some(fault);
                return Ok(None);
            }
        };
        let done = match done {
            Some(Ok(done)) => done,
            Some(Err(_)) => return Err(Fault::new(Code::ShuttingDown, "this node is shutting down")),
            None => {
                tried.timing.queued += ms(queued.elapsed());
                tried.stations.push(station(Outcome::Failed, Some("not done by the deadline".to_owned())));
                tried.fault = Some(late());
                return Ok(None);
            }
        };
        tried.timing.queued += ms(done.queued);
        tried.timing.device += ms(done.took);
        let output = match done.result {
            Ok(output) => output,
            Err(fault) => {
                tried.stations.push(station(Outcome::Failed, Some(fault.message.clone())));
                tried.fault = Some(fault.clone());
                // What cannot be read is no better for a closed model.
                return if fault.code == Code::BadRequest { Err(fault) } else { Ok(None) };
            }
        };
        let by = By::Device { model: model.id(), variant: model.variant_name().to_owned() };
        let wanted = job.wishes.min_confidence.unwrap_or(model.package.manifest.confidence.threshold);
        match output.confidence() {
            Some(found) if found < wanted => {
                let why = format!("confidence {found:.2} is under {wanted:.2}");
                tried.stations.push(station(Outcome::Uncertain, Some(why)));
                tried.uncertain = Some((output, by));
                Ok(None)
            }
            _ => {
                tried.stations.push(station(Outcome::Answered, None));
                Ok(Some((output, by)))
            }
        }
    }

    /// Asks providers. None: no answer, go on.
    async fn ask(
        &self,
        providers: &[String],
        job: &Job,
        question: &Question<'_>,
        tried: &mut Tried,
    ) -> Option<(Output, By)> {
        let station = |provider, outcome, why| Station { tier: Tier::Cloud, provider: Some(provider), outcome, why };
        let started = Instant::now();
        let rule = self.routing.task.get(&job.task).copied().unwrap_or_default();
        let request = Request {
            question,
            job: job.id.as_deref(),
            deadline: job.wishes.deadline.map(|deadline| deadline - way_back(deadline)),
            max_cost_usd: job.wishes.max_cost_usd.map(|most| most - tried.cost_usd),
            cache: Duration::from_secs(rule.cache_s.into()),
        };
        let asked = self.uplink.ask(providers, &request).await;
        tried.timing.cloud += ms(started.elapsed());
        tried.cost_usd += asked.cost_usd;
        for error in asked.failed {
            tried.away |= error.reason == Reason::Away;
            tried.fault = Some(fault(&error));
            tried.stations.push(station(error.provider.clone(), Outcome::Failed, Some(error.to_string())));
        }
        let uplink::Answer { provider, model, output, age } = asked.answer?;
        let why = age.map(|age| format!("the same question was answered {:.0} s ago", age.as_secs_f64()));
        tried.stations.push(station(provider.clone(), Outcome::Answered, why));
        Some((output, By::Cloud { provider, model }))
    }

    fn facts(&self, job: &Job, model: Option<&Arc<Model>>, question: Result<(), &String>, offers: Vec<Offer>) -> Facts {
        let rule = self.routing.task.get(&job.task).copied().unwrap_or_default();
        let task_privacy = rule.privacy.unwrap_or(Privacy::Cloud);
        let rules = [(self.routing.privacy, "node"), (task_privacy, "task"), (job.wishes.privacy, "job")];
        let (privacy, privacy_of) = rules.into_iter().min_by_key(|(privacy, _)| *privacy).unwrap_or(rules[0]);
        let provider = |offer: Offer| Provider {
            name: offer.provider,
            usable: offer.usable.map_err(|closed| closed.why),
            estimate_usd: offer.estimate_usd,
        };
        Facts {
            device: self.device(job, model, rule.prefer),
            providers: offers.into_iter().map(provider).collect(),
            question: question.map_err(String::clone),
            prefer: rule.prefer,
            privacy,
            privacy_of,
            max_cost_usd: job.wishes.max_cost_usd,
            left: job.wishes.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())),
        }
    }

    fn device(&self, job: &Job, model: Option<&Arc<Model>>, prefer: Prefer) -> Device {
        let Some(model) = model else {
            let (task, wanted) = (&job.task, job.wishes.model.as_deref());
            if let Some((package, figures)) = self.registry.find_too_large(task, wanted) {
                let fault = Fault::new(Code::AboveCapability, format!("{}: {figures}", package.id()));
                return Device::Above(fault.field("models.memory_mib").limit(meter::mib(figures.limit)));
            }
            return match wanted {
                Some(wanted) => Device::Wrong(
                    Fault::new(Code::UnknownModel, format!("no active model `{wanted}` serves {task}"))
                        .field("model")
                        .limit(self.models_of(task)),
                ),
                None if TASKS.contains(&task.as_str()) => Device::Above(
                    Fault::new(Code::AboveCapability, format!("no model on this device serves {task}")).field("task"),
                ),
                None => Device::Wrong(
                    Fault::new(Code::UnknownTask, format!("`{task}` is not a task of this node"))
                        .field("task")
                        .limit(self.registry.tasks()),
                ),
            };
        };
        match model.check(&job.input) {
            Ok(()) => Device::Able(self.pool.wait() + model.estimate(&job.input)),
            Err(fault) if fault.code == Code::BadRequest && prefer != Prefer::CloudOnly => Device::Wrong(fault),
            Err(fault) => Device::Above(fault),
        }
    }

    fn models_of(&self, task: &str) -> Vec<String> {
        let of_task = self.registry.models().iter().filter(|model| model.package.manifest.task == task);
        of_task.map(|model| model.id()).collect()
    }

    /// What a closed model would be asked, or why it cannot be.
    fn question<'a>(&self, job: &'a Job, package: Option<&'a Package>) -> Result<Question<'a>, String> {
        let own = match package {
            Some(package) => match &package.manifest.uplink {
                Some(uplink) => Some(uplink.instruction.as_str()),
                None => return Err(format!("{} has no [uplink]: its task stays on the device", package.id())),
            },
            None => None,
        };
        let text = |key: &str| job.wishes.params.get(key).and_then(|value| value.as_str());
        let labels = || -> Vec<String> {
            let asked = job.wishes.params.get("labels").and_then(|labels| serde_json::from_value(labels.clone()).ok());
            asked.or_else(|| package.map(|package| package.labels.clone())).unwrap_or_default()
        };
        let (shape, instruction, max_output_tokens) = match job.task.as_str() {
            "text.generate" => {
                let tokens = job.wishes.params.get("max_tokens").and_then(serde_json::Value::as_u64);
                let instruction = text("prompt").or(own).unwrap_or("Answer what the text asks.");
                (Shape::Text, instruction, tokens.map_or(TEXT_TOKENS, |tokens| tokens.clamp(1, 32_768) as u32))
            }
            "series.anomaly" => {
                let threshold = package.and_then(|package| package.manifest.output.threshold).unwrap_or(1.0);
                let instruction = own.or(text("prompt")).unwrap_or("Say whether this series of samples is anomalous.");
                (Shape::Anomaly { threshold }, instruction, ANSWER_TOKENS)
            }
            task => {
                let classes = task.ends_with(".classify")
                    || package.is_some_and(|package| package.manifest.output.kind == OutputKind::Classes);
                let labels = labels();
                if !classes {
                    return Err(format!("a closed model cannot be asked for {task} by this version"));
                }
                if labels.is_empty() {
                    return Err("a closed model needs params.labels to choose from".to_owned());
                }
                let instruction = own.or(text("prompt")).unwrap_or("Choose the label that fits best.");
                (Shape::Classes { labels }, instruction, ANSWER_TOKENS)
            }
        };
        let sees = package.and_then(|package| package.manifest.input.size).map(|[width, height]| width.max(height));
        let picture_side = sees
            .map_or(PICTURE_SIDE.1, |side| side.saturating_mul(PICTURE_SCALE).clamp(PICTURE_SIDE.0, PICTURE_SIDE.1));
        let question =
            Question { task: &job.task, instruction, input: &job.input, shape, max_output_tokens, picture_side };
        uplink::sendable(&question)?;
        Ok(question)
    }
}

/// What trying has brought so far.
#[derive(Default)]
struct Tried {
    stations: Vec<Station>,
    timing: Timing,
    cost_usd: f64,
    fault: Option<Fault>,
    uncertain: Option<(Output, By)>,
    /// A provider would have been asked, had it been there.
    away: bool,
}

/// Awaits until the job's deadline at most.
async fn in_time<F: Future>(job: &Job, future: F) -> Option<F::Output> {
    match job.wishes.deadline {
        None => Some(future.await),
        Some(deadline) => tokio::time::timeout_at(deadline.into(), future).await.ok(),
    }
}

/// What is left of the time for a reply's own way: to be remembered, published and delivered.
fn way_back(deadline: Instant) -> Duration {
    (deadline.saturating_duration_since(Instant::now()) / 10).min(WAY_BACK)
}

fn late() -> Fault {
    Fault::new(Code::DeadlineExceeded, "the deadline passed before there was an answer").field("deadline_ms")
}

/// What a requester is told of a provider's failure.
fn fault(error: &UplinkError) -> Fault {
    match error.reason {
        Reason::Deadline => late(),
        Reason::Budget { budget_usd, .. } => {
            Fault::new(Code::BudgetExhausted, error.to_string()).field("budget_usd_per_day").limit(budget_usd)
        }
        Reason::MaxCost { most_usd } => {
            Fault::new(Code::BudgetExhausted, error.to_string()).field("max_cost_usd").limit(most_usd)
        }
        Reason::Away | Reason::Refused | Reason::Unusable => Fault::new(Code::UplinkUnavailable, error.to_string()),
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn message(reply_to: ReplyTo, payload: Vec<u8>) -> Message {
    Message { topic: reply_to.topic, payload, correlation: reply_to.correlation, retain: false }
}
