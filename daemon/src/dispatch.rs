//! A job's way from its arrival to its reply: read, admit, route, run or send up, reply.
//!
//! Reading and admitting are done by one thread of its own; each admitted job is then a task that
//! waits for workers and providers. The number of these tasks is the gate's, so it is bounded.

use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc};

use crate::admit::{Admitted, Gate, Verdict};
use crate::config::Routing;
use crate::engine::{Model, Pool, Registry};
use crate::facts::Sources;
use crate::hold::{Held, Hold};
use crate::intake::link::Arrived;
use crate::intake::{Incoming, Reader, Receipt};
use crate::job::{By, Code, Fault, Job, Outcome, Output, Reply, ReplyTo, Station, Status, Tier, Timing, When};
use crate::reply::{Keep, Message, Outbox};
use crate::route::{Ask, Plan, Stop, doubt, route};
use crate::store::{Key, Store};
use crate::uplink::{self, Question, Reason, Request, Uplink, UplinkError};
use crate::vitals::{BEAT, Pulse};

/// Time that is kept for the way back of a closed model's answer, at most; an answer that comes later
/// would be late for the requester.
const WAY_BACK: Duration = Duration::from_millis(50);
/// How often a held job is tried while no provider can be reached.
const HOLD_EVERY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// Replies to held jobs that may wait for the broker.
const HELD_OUT: usize = 64;
/// A job that was told an uncertain answer asks again for a better one after this long, then twice that …
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// … and at last every so often, until its deadline.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// How often such a job looks whether the node is to stop.
const LOOK: Duration = Duration::from_millis(250);

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
    /// Jobs that wait for the way up to open.
    pub hold: Arc<Hold>,
    /// Jobs that may wait for an outage to end, having been told an uncertain answer.
    pub patient: Arc<Semaphore>,
}

/// The reply to a job, and whether it only is as it is for want of a way up.
struct Answered {
    reply: Reply,
    away: bool,
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

    /// Sends held jobs up, oldest first, whenever a provider can be reached; never ends.
    pub async fn send_held(&self) {
        let mut pause = HOLD_EVERY.0;
        loop {
            self.get().send_oldest(&mut pause).await;
        }
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
            Verdict::Held => self.outbox.acknowledge(receipt.into_iter().collect()),
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
        // Not acknowledged and not remembered: after a crash the job comes again, for its better answer.
        let early = |reply: Reply| self.outbox.send(message(reply_to.clone(), reply.encode()), Vec::new(), None);
        let answered = self.answer(&job, 0.0, receipt.is_some(), &early).await;
        let Some(Answered { reply, away }) = answered else { return };
        let mut receipts: Vec<_> = receipt.into_iter().collect();
        if away && job.wishes.deadline.is_none() && self.hold.is_on() {
            let (hold, job, to) = (Arc::clone(&self.hold), Arc::clone(&job), reply_to.clone());
            let spent_usd = reply.cost_usd;
            let kept = tokio::task::spawn_blocking(move || hold.keep(&job, &to, key, spent_usd)).await;
            match kept.map_err(std::io::Error::other).and_then(|kept| kept) {
                Ok(()) => {
                    receipts.extend(key.map(|key| self.gate.held(key)).unwrap_or_default());
                    return self.outbox.acknowledge(receipts);
                }
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
            self.gate.held(key);
        }
    }

    /// Sends the oldest held job up, or waits until that is worth trying: for `pause`, where no provider could
    /// be reached.
    async fn send_oldest(self: &Arc<Self>, pause: &mut Duration) {
        // While the broker takes no replies, more of them need not be made.
        let this = Arc::clone(self);
        let oldest = move || {
            let held = this.hold.oldest()?;
            let given = held.key.and_then(|key| this.store.get(&key));
            Some((held, given))
        };
        let next = match self.hold.out() < HELD_OUT {
            true => tokio::task::spawn_blocking(oldest).await.ok().flatten(),
            false => None,
        };
        let Some((Held { job, reply_to, key, left, spent_usd, ticket }, given)) = next else {
            return self.hold.changed().await;
        };
        if let Some(payload) = given {
            // Answered, and the process ended before the broker had it.
            let receipts = key.map(|key| self.gate.answered(&key)).unwrap_or_default();
            self.outbox.send(message(reply_to, payload), receipts, Some(Keep::File(ticket)));
            return;
        }
        let job = Arc::new(job);
        let open = self.uplink.open() || left.is_zero();
        // What it could be told early it was told when it came.
        let answered = if open { self.answer(&job, spent_usd, false, &|_| {}).await } else { None };
        match answered {
            Some(Answered { reply, away }) if !away || left.is_zero() => {
                *pause = HOLD_EVERY.0;
                self.send(&job, reply, reply_to, key, Vec::new(), Keep::File(ticket)).await;
            }
            answered => {
                let failed = answered.is_some();
                let cost_usd = answered.map_or(spent_usd, |answered| answered.reply.cost_usd);
                let given_back = move || {
                    if cost_usd > spent_usd
                        && let Err(error) = ticket.spent(cost_usd)
                    {
                        tracing::warn!("what a held job has cost cannot be written down: {error}");
                    }
                    ticket.give_back(failed);
                };
                // A panic in it has been reported; the job is there again at the next start.
                let _ = tokio::task::spawn_blocking(given_back).await;
                tokio::select! {
                    () = tokio::time::sleep((*pause).min(left)) => *pause = (*pause * 2).min(HOLD_EVERY.1),
                    () = self.uplink.back() => *pause = HOLD_EVERY.0,
                }
            }
        }
    }

    /// The reply to a job: tried where the plan says, until something answers for certain. A job that asks for
    /// it is told the uncertain answer meanwhile, through `early`. None: the node is about to stop before a
    /// better answer came, and the job, which `comes_again`, is left for the next start. It has cost `spent_usd`
    /// before.
    async fn answer(
        &self,
        job: &Arc<Job>,
        spent_usd: f64,
        comes_again: bool,
        early: &(dyn Fn(Reply) + Sync),
    ) -> Option<Answered> {
        let facts = self.facts();
        let models = facts.candidates(job);
        let question = facts.question(job, &models);
        let way = Way { job, models: &models, question: question.as_ref().ok(), early };
        let mut tried = Tried { cost_usd: spent_usd, ..Tried::default() };
        let plan = route(&facts.about(job, &models, question.as_ref()));
        let mut answered = self.follow(plan, &way, &mut tried).await;
        let stations = tried.stations.len();
        let mut pause = FIRST_PAUSE;
        while answered.is_err() && tried.told && tried.away {
            let Ok(_patient) = self.patient.try_acquire() else { break };
            match self.pause(job, pause, comes_again).await {
                Pause::Over => {}
                Pause::Late => break,
                Pause::Stopping => return None,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            // The device has said what it can; of asking again the last round is told.
            tried.stations.truncate(stations);
            tried.away = false;
            let mut plan = route(&facts.about(job, &models, question.as_ref()));
            plan.stops.retain(|stop| matches!(stop, Stop::Cloud(_)));
            answered = self.follow(plan, &way, &mut tried).await;
        }
        let away = tried.away;
        let reply = conclude(job, answered, tried);
        // What a closed model has answered could not be had better.
        let away = away && !matches!(reply.by, Some(By::Cloud { .. })) && (reply.degraded || reply.error.is_some());
        Some(Answered { reply, away })
    }

    /// Waits before asking for a better answer again.
    async fn pause(&self, job: &Job, pause: Duration, comes_again: bool) -> Pause {
        let until = Instant::now() + pause;
        if job.wishes.deadline.is_none_or(|deadline| deadline <= until) {
            return Pause::Late;
        }
        loop {
            if self.gate.draining() {
                return if comes_again { Pause::Stopping } else { Pause::Late };
            }
            match until.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Pause::Over,
                left => tokio::time::sleep(left.min(LOOK)).await,
            }
        }
    }

    async fn follow(&self, plan: Plan, way: &Way<'_>, tried: &mut Tried) -> Result<(Output, By), Fault> {
        let job = way.job;
        let Plan { stops, fault, later } = plan;
        tried.away |= later;
        let last_up = stops.iter().rposition(|stop| matches!(stop, Stop::Cloud(_)));
        let mut stops = stops.into_iter().enumerate().peekable();
        while let Some((n, stop)) = stops.next() {
            match stop {
                Stop::Skip(station) => tried.stations.push(station),
                _ if job.wishes.deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    tried.fault = Some(late());
                    break;
                }
                Stop::Device(at) => {
                    let Some(model) = way.models.get(at) else { continue };
                    if let Some(answer) = self.run(job, model, tried).await? {
                        return Ok(answer);
                    }
                    let better = later || last_up.is_some_and(|last| last > n);
                    if better && job.wishes.when == When::NowThenBetter {
                        tried.tell(way);
                    }
                }
                Stop::Cloud(first) => {
                    let Some(question) = way.question else { continue };
                    // Providers in a row are asked together: the next may be asked beside a late one.
                    let mut asks = vec![first];
                    while let Some((_, Stop::Cloud(next))) = stops.next_if(|(_, stop)| matches!(stop, Stop::Cloud(_))) {
                        asks.push(next);
                    }
                    if let Some(answer) = self.ask(&asks, job, question, tried).await {
                        return Ok(answer);
                    }
                }
            }
        }
        Err(fault)
    }

    /// Runs the job on the device. None: not for certain, go on. An error ends the job's way.
    async fn run(&self, job: &Arc<Job>, model: &Arc<Model>, tried: &mut Tried) -> Result<Option<(Output, By)>, Fault> {
        let station = |outcome, why| Station { tier: Tier::Device, provider: None, outcome, why };
        let queued = Instant::now();
        let done = match self.pool.submit(Arc::clone(job), Arc::clone(model)) {
            Ok(done) => uplink::in_time(job.wishes.deadline, done).await,
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
        match doubt(output.confidence(), wanted) {
            Some(why) => {
                tried.stations.push(station(Outcome::Uncertain, Some(why)));
                tried.uncertain = Some((output, by));
                Ok(None)
            }
            None => {
                tried.stations.push(station(Outcome::Answered, None));
                Ok(Some((output, by)))
            }
        }
    }

    /// Asks providers. None: no answer, go on.
    async fn ask(&self, asks: &[Ask], job: &Job, question: &Question<'_>, tried: &mut Tried) -> Option<(Output, By)> {
        let station = |provider, outcome, why| Station { tier: Tier::Cloud, provider: Some(provider), outcome, why };
        let started = Instant::now();
        let rule = self.routing.task.get(&job.task).copied().unwrap_or_default();
        let providers: Vec<String> = asks.iter().map(|ask| ask.provider.clone()).collect();
        let spare = asks.iter().map(|ask| ask.spare).min().unwrap_or_default();
        let request = Request {
            question,
            job: job.id.as_deref(),
            deadline: job.wishes.deadline.map(|deadline| {
                let before = deadline - way_back(deadline);
                before.checked_sub(spare).unwrap_or(before)
            }),
            max_cost_usd: job.wishes.max_cost_usd.map(|most| most - tried.cost_usd),
            cache: Duration::from_secs(rule.cache_s.into()),
        };
        let asked = self.uplink.ask(&providers, &request).await;
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

    fn facts(&self) -> Sources<'_> {
        Sources { registry: &self.registry, pool: &self.pool, uplink: &self.uplink, routing: &self.routing }
    }
}

/// What stays the same on a job's way.
struct Way<'a> {
    job: &'a Arc<Job>,
    models: &'a [&'a Arc<Model>],
    question: Option<&'a Question<'a>>,
    early: &'a (dyn Fn(Reply) + Sync),
}

/// What trying has brought so far.
#[derive(Clone, Default)]
struct Tried {
    stations: Vec<Station>,
    timing: Timing,
    cost_usd: f64,
    fault: Option<Fault>,
    uncertain: Option<(Output, By)>,
    /// The uncertain answer was told.
    told: bool,
    /// A provider would have been asked, had it been there.
    away: bool,
}

impl Tried {
    /// Tells the uncertain answer, if there is one.
    fn tell(&mut self, way: &Way<'_>) {
        if self.uncertain.is_some() {
            let fault = Fault::new(Code::AboveCapability, "no certain answer yet");
            let reply = conclude(way.job, Err(fault), self.clone());
            (way.early)(Reply { last: Some(false), ..reply });
            self.told = true;
        }
    }
}

/// What came of waiting.
enum Pause {
    Over,
    /// There is no time to ask again.
    Late,
    /// The node is about to stop.
    Stopping,
}

/// The reply that trying comes down to.
fn conclude(job: &Job, answered: Result<(Output, By), Fault>, tried: Tried) -> Reply {
    let Tried { stations, mut timing, cost_usd, fault, uncertain, .. } = tried;
    timing.total = ms(job.received.elapsed());
    let last = (job.wishes.when == When::NowThenBetter).then_some(true);
    let missed = |output: &Output| doubt(output.confidence(), job.wishes.min_confidence.unwrap_or(0.0)).is_some();
    let (output, by, degraded) = match (answered, uncertain) {
        (Ok((output, by)), _) => {
            let degraded = missed(&output);
            (output, by, degraded)
        }
        (Err(_), Some((output, by))) => (output, by, true),
        (Err(planned), None) => {
            let reply = Reply::error(job.id.clone(), fault.unwrap_or(planned), stations, timing);
            return Reply { cost_usd, last, ..reply };
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
        last,
        timing_ms: timing,
        cost_usd,
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
