//! Which providers: those that privacy, rule, state, cost and time allow.

use std::time::Duration;

use super::{Ask, Facts, Stop, ms, skipped};
use crate::config::Prefer;
use crate::job::{Code, Fault, Privacy, Tier};
use crate::uplink::Offer;

/// What the way up comes down to.
#[derive(Debug)]
pub struct Up {
    /// Providers to ask, and the reasons against the others.
    pub stops: Vec<Stop>,
    /// Why none may be asked; none where there is none to ask in the first place.
    pub fault: Option<Fault>,
    /// Whether one of those passed by may be had later.
    pub later: bool,
}

/// The reason against one provider.
struct Against {
    why: String,
    /// As an error, if there is no other way.
    fault: Fault,
    passing: bool,
}

/// Goes through the providers. The device is tried for `before` first, or needs `spare` afterwards.
pub fn up(facts: &Facts, before: Duration, spare: Duration) -> Up {
    let closed =
        |why: &str, fault| Up { stops: vec![Stop::Skip(skipped(Tier::Cloud, None, why))], fault, later: false };
    if facts.offers.is_empty() {
        return closed("no provider is configured", None);
    }
    if let Err(why) = &facts.question {
        return closed(why, None);
    }
    if let (Privacy::Device, whose) = facts.privacy.strictest() {
        let why = format!("the {whose}'s privacy rule keeps it on the device");
        return closed(&why, Some(Fault::new(Code::PrivacyForbids, why.clone()).field("privacy")));
    }
    if facts.prefer == Prefer::DeviceOnly {
        return closed("the task's rule is device-only", None);
    }
    let left = facts.left.map(|left| left.saturating_sub(before));
    let (mut stops, mut against) = (Vec::new(), Vec::new());
    for offer in &facts.offers {
        match reason(facts, offer, left) {
            None => {
                stops.push(Stop::Cloud(Ask { provider: offer.provider.clone(), spare: spare_for(offer, left, spare) }))
            }
            Some(reason) => {
                stops.push(Stop::Skip(skipped(Tier::Cloud, Some(&offer.provider), reason.why.clone())));
                against.push((offer, reason));
            }
        }
    }
    let later = against.iter().any(|(_, reason)| reason.passing);
    let fault = (against.len() == facts.offers.len()).then(|| none_of(&against));
    Up { stops, fault, later }
}

/// Why this provider may not be asked, if it may not.
fn reason(facts: &Facts, offer: &Offer, left: Option<Duration>) -> Option<Against> {
    if let Err(closed) = &offer.usable {
        let fault = Fault::new(Code::UplinkUnavailable, closed.why.clone());
        return Some(Against { why: closed.why.clone(), fault, passing: closed.passing });
    }
    let costs = offer.estimate_usd;
    // A price that is no number is over every bound.
    let within = |most: f64| costs <= most;
    if let Some(most) = facts.max_cost_usd.filter(|most| !within(*most)) {
        let why = format!("it could cost ${costs:.6}, over the job's ${most:.6}");
        let fault = Fault::new(Code::BudgetExhausted, why.clone()).field("max_cost_usd").limit(most);
        return Some(Against { why, fault, passing: false });
    }
    if let Some(most) = offer.left_usd.filter(|most| !within(*most)) {
        let why = format!("it could cost ${costs:.6}, and ${most:.6} of today's budget are left");
        let fault = Fault::new(Code::BudgetExhausted, why.clone()).field("budget_usd_per_day");
        let fault = fault.limit(offer.budget_usd.unwrap_or(most));
        return Some(Against { why, fault, passing: false });
    }
    let (takes, left) = (offer.latency?, left?);
    (takes > left).then(|| {
        let why = format!("it lately took about {}, and {} are left for it", ms(takes), ms(left));
        let fault = Fault::new(Code::DeadlineExceeded, why.clone()).field("deadline_ms");
        Against { why, fault, passing: false }
    })
}

/// A provider is not cut short for the device if by its own estimate it would then be late.
fn spare_for(offer: &Offer, left: Option<Duration>, spare: Duration) -> Duration {
    match left {
        Some(left) if offer.latency.unwrap_or_default() + spare <= left => spare,
        _ => Duration::ZERO,
    }
}

/// The reasons against all of them as one fault: money before time before the rest, as the requester can
/// do something about the first two.
fn none_of(against: &[(&Offer, Against)]) -> Fault {
    let rank = |fault: &Fault| match fault.code {
        Code::BudgetExhausted => 0,
        Code::DeadlineExceeded => 1,
        _ => 2,
    };
    let worst = against.iter().map(|(_, reason)| &reason.fault).min_by_key(|fault| rank(fault));
    let reasons: Vec<String> =
        against.iter().map(|(offer, reason)| format!("{}: {}", offer.provider, reason.why)).collect();
    let mut fault = worst.cloned().unwrap_or_else(|| Fault::new(Code::UplinkUnavailable, ""));
    fault.message = reasons.join("; ");
    fault
}
