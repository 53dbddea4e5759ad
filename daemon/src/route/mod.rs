//! Route: facts in, an ordered plan out. Pure: no clock, no socket, no model.
//!
//! This is the one place that decides between the device and the cloud, before running by what each
//! candidate can do ([`route`]) and after running by how sure an answer is ([`doubt`]). Its reasons go
//! word for word into the reply's `route`.

use std::time::Duration;

use crate::config::Prefer;
use crate::job::{Code, Fault, Outcome, Privacy, Station, Tier};
use crate::uplink::Offer;

mod cloud;
mod device;
#[cfg(test)]
mod tests;

/// What is known about a job before it runs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What the device can do for it.
    pub device: Device,
    /// Providers in the order of the configuration.
    pub offers: Vec<Offer>,
    /// Whether a closed model can be asked for this at all; else the reason.
    pub question: Result<(), String>,
    /// The task's rule.
    pub prefer: Prefer,
    /// Who says how far the input may travel.
    pub privacy: PrivacyRules,
    /// Most that the answer may cost, US dollars.
    pub max_cost_usd: Option<f64>,
    /// Time left until the deadline.
    pub left: Option<Duration>,
}

/// What the device can do for a job.
#[derive(Debug, Clone)]
pub enum Device {
    /// The models that serve its task, in the order in which they are asked; at least one.
    Models(Vec<Local>),
    /// No model on the device serves its task; a closed one may.
    Above(Fault),
    /// It is wrong, for any model.
    Wrong(Fault),
}

/// A model on the device.
#[derive(Debug, Clone)]
pub struct Local {
    /// `name@version`.
    pub id: String,
    /// Whether the input is within its limits and it within the memory; else the limit. `bad_request`:
    /// the input is wrong for this model.
    pub fit: Result<(), Fault>,
    /// How long the job would wait for a worker.
    pub wait: Duration,
    /// How long the model takes for an input of this size, as measured on this device.
    pub run: Duration,
}

impl Local {
    fn takes(&self) -> Duration {
        self.wait + self.run
    }
}

/// How far the input may travel, by each who may say so. The strictest holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct PrivacyRules {
    pub node: Privacy,
    pub task: Privacy,
    pub job: Privacy,
}

impl PrivacyRules {
    /// The strictest rule, and whose it is.
    pub fn strictest(&self) -> (Privacy, &'static str) {
        let rules = [(self.node, "node"), (self.task, "task"), (self.job, "job")];
        rules.into_iter().min_by_key(|(privacy, _)| *privacy).unwrap_or(rules[0])
    }
}

/// One stop of the plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Stop {
    /// Run the model of this place among [`Device::Models`].
    Device(usize),
    /// Ask a provider.
    Cloud(Ask),
    /// Pass by, for the reason given.
    Skip(Station),
}

/// A provider to be asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Its name in the configuration.
    pub provider: String,
    /// Time before the deadline to be left for the model on the device, which comes after it.
    pub spare: Duration,
}

/// Where a job is tried, in order, until one answers for certain.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// At least one is tried, or the fault below is the answer.
    pub stops: Vec<Stop>,
    /// What the requester is told if nothing was tried.
    pub fault: Fault,
    /// Whether a provider that is passed by may be had later.
    pub later: bool,
}

/// Decides where a job may be tried, and in which order.
pub fn route(facts: &Facts) -> Plan {
    let chosen = match device::choose(facts) {
        Ok(chosen) => chosen,
        Err(wrong) => return Plan { stops: Vec::new(), fault: wrong, later: false },
    };
    let in_time = chosen.model.as_ref().filter(|model| model.late.is_none()).map(|model| model.takes);
    // What the device takes before the cloud is asked, and what must be left for it after.
    let (before, spare) = match (in_time, facts.prefer) {
        (Some(takes), Prefer::Device) => (takes, Duration::ZERO),
        (Some(takes), _) => (Duration::ZERO, takes),
        (None, _) => (Duration::ZERO, Duration::ZERO),
    };
    let up = cloud::up(facts, before, spare);
    let open = up.stops.iter().any(|stop| matches!(stop, Stop::Cloud(_)));
    let device = chosen.model.as_ref().map(|model| Stop::Device(model.at));
    let late = chosen.model.and_then(|model| model.late);
    let mut stops: Vec<Stop> = chosen.passed.into_iter().map(Stop::Skip).collect();
    match (facts.prefer, late) {
        (Prefer::Cloud, _) => stops.extend(up.stops.into_iter().chain(device)),
        // An estimate can be wrong: what would be late is still the last resort.
        (Prefer::Device, Some(why)) if open => {
            stops.push(Stop::Skip(skipped(Tier::Device, None, why)));
            stops.extend(up.stops.into_iter().chain(device));
        }
        _ => stops.extend(device.into_iter().chain(up.stops)),
    }
    Plan { stops, fault: fault(chosen.fault, up.fault), later: up.later }
}

/// Why neither will do: the reason against the cloud is the answer only where up is a way at all.
fn fault(device: Option<Fault>, up: Option<Fault>) -> Fault {
    match (device, up) {
        (Some(device), Some(mut up)) => {
            up.message = format!("{}; {}", device.message, up.message);
            up.field = up.field.or(device.field);
            up.limit = up.limit.or(device.limit);
            up
        }
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => Fault::new(Code::AboveCapability, "the task's rule leaves nowhere to run it"),
    }
}

/// Why an answer is not certain enough, if it is not. An answer of a kind that cannot tell is certain.
pub fn doubt(found: Option<f64>, wanted: f64) -> Option<String> {
    let found = found.filter(|found| *found < wanted)?;
    // As many digits as it takes to tell them apart.
    let shown = |digits: usize| (format!("{found:.digits$}"), format!("{wanted:.digits$}"));
    let (found, wanted) = (2..9).map(shown).find(|(a, b)| a != b).unwrap_or_else(|| shown(9));
    Some(format!("confidence {found} is under {wanted}"))
}

fn skipped(tier: Tier, provider: Option<&str>, why: impl Into<String>) -> Station {
    Station { tier, provider: provider.map(str::to_owned), outcome: Outcome::Skipped, why: Some(why.into()) }
}

/// Milliseconds for people: as many digits as mean something.
fn ms(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}
