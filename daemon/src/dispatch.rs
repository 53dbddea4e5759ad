//! A job's way from its arrival to its reply: read, admit, route, run or send up, reply.
//!
//! Reading and admitting are done by one thread of its own; each admitted job is then a task that
//! waits for workers and providers. The number of these tasks is the gate's, so it is bounded.

use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::admit::{Admitted, Gate, Verdict};
use crate::config::{Prefer, Routing};
use crate::engine::package::{OutputKind, Package};
use crate::engine::{Model, Pool, Registry, meter};
use crate::intake::link::Arrived;
use crate::intake::{Incoming, Reader};
use crate::job::{
    By, Code, Fault, Job, Outcome, Output, Privacy, Reply, ReplyTo, Station, Status, TASKS, Tier, Timing,
};
use crate::reply::{Message, Outbox};
use crate::route::{Device, Facts, Plan, Provider, Stop, route};
use crate::store::Store;
use crate::uplink::{Question, Shape, Uplink, UplinkError};
use crate::vitals::{BEAT, Pulse};

/// Tokens that a label and its confidence take, with room to spare.
const ANSWER_TOKENS: u32 = 256;
/// Tokens of a generated text where the job does not say.
const TEXT_TOKENS: u32 = 1024;

/// Everything that a job meets on its way.
pub struct Dispatch {
    /// Reads messages.
    pub reader: Reader,
    /// Admits jobs.
    pub gate: Arc<Gate>,
    /// Models that are active.
    pub registry: Arc<Registry>,
    /// Runs them.
    pub pool: Arc<Pool>,
    /// Closed models.
    pub uplink: Arc<Uplink>,
    /// Rules.
    pub routing: Routing,
    /// Replies given.
    pub store: Arc<Store>,
    /// Replies going out.
    pub outbox: Arc<Outbox>,
}

/// The rules and models in force. A reload puts others in their place; jobs in hand go on under those
/// that they came under.
pub struct InForce(RwLock<Arc<Dispatch>>);

impl InForce {
    /// Begins with `dispatch`.
    pub fn new(dispatch: Dispatch) -> Self {
        InForce(RwLock::new(Arc::new(dispatch)))
    }

    /// What is in force now.
    pub fn get(&self) -> Arc<Dispatch> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From the next job on `dispatch` is in force.
    pub fn set(&self, dispatch: Dispatch) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(dispatch);
    }

    /// Reads and admits what arrives until the channel closes; for a thread of its own.
    pub fn work(&self, mut arrived: mpsc::Receiver<Arrived>, runtime: &tokio::runtime::Handle) {
        let pulse = Pulse::of("outpost-intake");
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut next = || loop {
            match arrived.poll_recv(&mut Context::from_waker(&waker)) {
                Poll::Ready(next) => return next,
                Poll::Pending => std::thread::park_timeout(BEAT),
            }
            pulse.beat();
        };
        while let Some(arrived) = next() {
            pulse.beat();
            self.get().take(arrived, runtime);
        }
    }
}

/// Wakes a thread that waits for a message. The runtime's own timers would not outlive the runtime.
struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Dispatch {
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
        let reply = self.answer(&job).await;
        if let Some(error) = &reply.error {
            tracing::debug!(id = job.id.as_deref(), task = job.task, code = ?error.code, "{}", error.message);
        }
        let payload = reply.encode();
        let mut receipts: Vec<_> = receipt.into_iter().collect();
        if let Some(key) = key {
            self.store.put(key, payload.clone()).await;
            receipts.extend(self.gate.answered(&key));
        }
        self.outbox.send(message(reply_to, payload), receipts, Some(slot));
    }

    /// The reply to a job: tried where the plan says, until something answers for certain.
    pub async fn answer(&self, job: &Arc<Job>) -> Reply {
        let wanted = job.wishes.model.as_deref();
        let model = self.registry.find(&job.task, wanted);
        let package = match model {
            Some(model) => Some(&model.package),
            None => self.registry.find_too_large(&job.task, wanted).map(|(package, _)| package),
        };
        let question = self.question(job, package);
        let plan = route(&self.facts(job, model, question.as_ref()));
        let mut tried =
            Tried { stations: Vec::new(), timing: Timing::default(), cost_usd: 0.0, fault: None, uncertain: None };
        let answered = self.follow(plan, job, model, question.ok().as_ref(), &mut tried).await;
        let Tried { stations, mut timing, cost_usd, fault, uncertain } = tried;
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
                return reply;
            }
        };
        Reply {
            id: job.id.clone(),
            status: Status::Ok,
            output: Some(output),
            error: None,
            by: Some(by),
            route: stations,
            degraded,
            timing_ms: timing,
            cost_usd,
        }
    }

    async fn follow(
        &self,
        plan: Plan,
        job: &Arc<Job>,
        model: Option<&Arc<Model>>,
        question: Option<&Question<'_>>,
        tried: &mut Tried,
    ) -> Result<(Output, By), Fault> {
        for stop in plan.stops {
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
                Stop::Cloud(provider) => {
                    let Some(question) = question else { continue };
                    if let Some(answer) = self.ask(&provider, job, question, tried).await {
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

    /// Asks a provider. None: no answer, go on.
    async fn ask(&self, provider: &str, job: &Job, question: &Question<'_>, tried: &mut Tried) -> Option<(Output, By)> {
        let station = |outcome, why| Station { tier: Tier::Cloud, provider: Some(provider.to_owned()), outcome, why };
        let started = Instant::now();
        let answer = self.uplink.ask(provider, question, job.wishes.deadline).await;
        tried.timing.cloud += ms(started.elapsed());
        match answer {
            Ok(answer) => {
                tried.cost_usd += answer.cost_usd;
                tried.stations.push(station(Outcome::Answered, None));
                Some((answer.output, By::Cloud { provider: provider.to_owned(), model: answer.model }))
            }
            Err(error) => {
                tried.cost_usd += error.cost_usd();
                tried.stations.push(station(Outcome::Failed, Some(error.to_string())));
                tried.fault = Some(fault(&error));
                None
            }
        }
    }

    fn facts(&self, job: &Job, model: Option<&Arc<Model>>, question: Result<&Question<'_>, &String>) -> Facts {
        let rule = self.routing.task.get(&job.task).copied().unwrap_or_default();
        let task_privacy = rule.privacy.unwrap_or(Privacy::Cloud);
        let rules = [(self.routing.privacy, "node"), (task_privacy, "task"), (job.wishes.privacy, "job")];
        let (privacy, privacy_of) = rules.into_iter().min_by_key(|(privacy, _)| *privacy).unwrap_or(rules[0]);
        let provider = |name: &str| Provider {
            name: name.to_owned(),
            usable: self.uplink.usable(name),
            estimate_usd: question.map_or(0.0, |question| self.uplink.estimate_usd(name, question)),
        };
        Facts {
            device: self.device(job, model, rule.prefer),
            providers: self.uplink.names().map(provider).collect(),
            question: question.map(|_| ()).map_err(String::clone),
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
        Ok(Question { task: &job.task, instruction, input: &job.input, shape, max_output_tokens })
    }
}

/// What trying has brought so far.
struct Tried {
    stations: Vec<Station>,
    timing: Timing,
    cost_usd: f64,
    fault: Option<Fault>,
    uncertain: Option<(Output, By)>,
}

/// Awaits until the job's deadline at most.
async fn in_time<F: Future>(job: &Job, future: F) -> Option<F::Output> {
    match job.wishes.deadline {
        None => Some(future.await),
        Some(deadline) => tokio::time::timeout_at(deadline.into(), future).await.ok(),
    }
}

fn late() -> Fault {
    Fault::new(Code::DeadlineExceeded, "the deadline passed before there was an answer").field("deadline_ms")
}

/// What a requester is told of a provider's failure.
fn fault(error: &UplinkError) -> Fault {
    if error.is_deadline() { late() } else { Fault::new(Code::UplinkUnavailable, error.to_string()) }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn message(reply_to: ReplyTo, payload: Vec<u8>) -> Message {
    Message { topic: reply_to.topic, payload, correlation: reply_to.correlation, retain: false }
}
