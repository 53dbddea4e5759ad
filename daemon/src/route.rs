//! Route: facts in, an ordered plan out. Pure: no clock, no socket, no model.
//!
//! This is the one place that decides between the device and the cloud; its reasons go word for word
//! into the reply's `route`.

use std::time::Duration;

use crate::config::Prefer;
use crate::job::{Code, Fault, Outcome, Privacy, Station, Tier};

/// What is known about a job before it runs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What the device can do for it.
    pub device: Device,
    /// Providers in the order of the configuration.
    pub providers: Vec<Provider>,
    /// Whether a closed model can be asked for this at all; else the reason.
    pub question: Result<(), String>,
    /// The task's rule.
    pub prefer: Prefer,
    /// The strictest privacy of node, task and job.
    pub privacy: Privacy,
    /// Whose rule that is: `node`, `task` or `job`.
    pub privacy_of: &'static str,
    /// Most that the answer may cost, US dollars.
    pub max_cost_usd: Option<f64>,
    /// Time left until the deadline.
    pub left: Option<Duration>,
}

/// What the device can do for a job.
#[derive(Debug, Clone)]
pub enum Device {
    /// A model takes it, in about this time, waiting included.
    Able(Duration),
    /// It is above the device: a closed model may do better.
    Above(Fault),
    /// It is wrong, for any model.
    Wrong(Fault),
}

/// What is known about a provider.
#[derive(Debug, Clone)]
pub struct Provider {
    /// Its name in the configuration.
    pub name: String,
    /// Whether it can be asked; else the reason.
    pub usable: Result<(), String>,
    /// What the answer would cost, US dollars, estimated from above.
    pub estimate_usd: f64,
}

/// One stop of the plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Stop {
    /// Run it here.
    Device,
    /// Ask this provider.
    Cloud(String),
    /// Pass by, for the reason given.
    Skip(Station),
}

/// Where a job is tried, in order, until one answers for certain.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// At least one is tried, or the fault below is the answer.
    pub stops: Vec<Stop>,
    /// What the requester is told if nothing was tried.
    pub fault: Fault,
}

/// Decides where a job may be tried, and in which order.
pub fn route(facts: &Facts) -> Plan {
    let (cloud, cloud_fault) = up(facts);
    let cloud_open = cloud.iter().any(|stop| matches!(stop, Stop::Cloud(_)));
    let skip_device = |why: &str| Stop::Skip(skipped(Tier::Device, None, why));
    match &facts.device {
        Device::Wrong(fault) => Plan { stops: Vec::new(), fault: fault.clone() },
        Device::Above(fault) => {
            let mut stops = vec![skip_device(&fault.message)];
            stops.extend(cloud);
            // Why it cannot go up is the answer only where up is a way at all.
            let fault = match cloud_fault {
                Some(mut up) => {
                    up.message = format!("{}; {}", fault.message, up.message);
                    up.field = up.field.or_else(|| fault.field.clone());
                    up.limit = up.limit.or_else(|| fault.limit.clone());
                    up
                }
                None => fault.clone(),
            };
            Plan { stops, fault }
        }
        Device::Able(takes) => {
            let fault = cloud_fault
                .unwrap_or_else(|| Fault::new(Code::AboveCapability, "the task's rule leaves nowhere to run it"));
            let late = facts.left.filter(|left| takes > left);
            let stops = match (facts.prefer, late) {
                (Prefer::CloudOnly, _) => {
                    std::iter::once(skip_device("the task's rule is cloud-only")).chain(cloud).collect()
                }
                (Prefer::DeviceOnly, _) => {
                    let why = "the task's rule is device-only";
                    vec![Stop::Device, Stop::Skip(skipped(Tier::Cloud, None, why))]
                }
                (Prefer::Cloud, _) => cloud.into_iter().chain([Stop::Device]).collect(),
                (Prefer::Device, Some(left)) if cloud_open => {
                    let why = format!(
                        "it would take about {:.0} ms, and {:.0} ms are left",
                        takes.as_secs_f64() * 1e3,
                        left.as_secs_f64() * 1e3
                    );
                    // Still the last resort: an estimate can be wrong.
                    std::iter::once(skip_device(&why)).chain(cloud).chain([Stop::Device]).collect()
                }
                (Prefer::Device, _) => std::iter::once(Stop::Device).chain(cloud).collect(),
            };
            Plan { stops, fault }
        }
    }
}

/// The way up: providers that may be asked and the reasons against the others; the fault if none may,
/// unless there is none to ask in the first place.
fn up(facts: &Facts) -> (Vec<Stop>, Option<Fault>) {
    let closed = |why: &str, fault| (vec![Stop::Skip(skipped(Tier::Cloud, None, why))], fault);
    if facts.providers.is_empty() {
        return closed("no provider is configured", None);
    }
    if let Err(why) = &facts.question {
        return closed(why, None);
    }
    if facts.privacy == Privacy::Device {
        let why = format!("the {}'s privacy rule keeps it on the device", facts.privacy_of);
        return closed(&why, Some(Fault::new(Code::PrivacyForbids, why.clone()).field("privacy")));
    }
    if facts.prefer == Prefer::DeviceOnly {
        return closed("the task's rule is device-only", None);
    }
    let mut reasons = Vec::new();
    let mut too_dear = None;
    let stops = facts.providers.iter().map(|provider| {
        let dear = facts.max_cost_usd.filter(|most| provider.estimate_usd > *most);
        let why = match (&provider.usable, dear) {
            (Err(why), _) => why.clone(),
            (Ok(()), Some(most)) => {
                too_dear = Some(most);
                format!("it could cost ${:.6}, over the job's ${most:.6}", provider.estimate_usd)
            }
            (Ok(()), None) => return Stop::Cloud(provider.name.clone()),
        };
        reasons.push(format!("{}: {why}", provider.name));
        Stop::Skip(skipped(Tier::Cloud, Some(&provider.name), &why))
    });
    let stops: Vec<Stop> = stops.collect();
    if stops.iter().any(|stop| matches!(stop, Stop::Cloud(_))) {
        return (stops, None);
    }
    let fault = match too_dear {
        Some(most) => Fault::new(Code::BudgetExhausted, reasons.join("; ")).field("max_cost_usd").limit(most),
        None => Fault::new(Code::UplinkUnavailable, reasons.join("; ")),
    };
    (stops, Some(fault))
}

fn skipped(tier: Tier, provider: Option<&str>, why: &str) -> Station {
    Station { tier, provider: provider.map(str::to_owned), outcome: Outcome::Skipped, why: Some(why.to_owned()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn provider(name: &str) -> Provider {
        Provider { name: name.to_owned(), usable: Ok(()), estimate_usd: 0.001 }
    }

    fn facts() -> Facts {
        Facts {
            device: Device::Able(Duration::from_millis(5)),
            providers: vec![provider("claude"), provider("gpt")],
            question: Ok(()),
            prefer: Prefer::Device,
            privacy: Privacy::Cloud,
            privacy_of: "node",
            max_cost_usd: None,
            left: None,
        }
    }

    /// The tried stops, in short: `d`, or a provider's name.
    fn tried(facts: &Facts) -> String {
        let word = |stop: &Stop| match stop {
            Stop::Device => Some("d".to_owned()),
            Stop::Cloud(name) => Some(name.clone()),
            Stop::Skip(_) => None,
        };
        route(facts).stops.iter().filter_map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn order_by_rule() {
        for (prefer, expected) in [
            (Prefer::Device, "d claude gpt"),
            (Prefer::Cloud, "claude gpt d"),
            (Prefer::DeviceOnly, "d"),
            (Prefer::CloudOnly, "claude gpt"),
        ] {
            assert_eq!(tried(&Facts { prefer, ..facts() }), expected, "{prefer:?}");
        }
    }

    #[test]
    fn a_late_device_is_the_last_resort() {
        let left = Some(Duration::from_millis(2));
        assert_eq!(tried(&Facts { left, ..facts() }), "claude gpt d");
        assert_eq!(tried(&Facts { left, providers: Vec::new(), ..facts() }), "d");
        assert_eq!(tried(&Facts { left, privacy: Privacy::Device, ..facts() }), "d");
    }

    #[test]
    fn above_the_device() {
        let device = Device::Above(Fault::new(Code::AboveCapability, "no model"));
        let unusable = |why: &str| vec![Provider { usable: Err(why.to_owned()), ..provider("claude") }];
        let above = Facts { device, ..facts() };
        for (facts, stops, code) in [
            (above.clone(), "claude gpt", Code::AboveCapability),
            (Facts { providers: Vec::new(), ..above.clone() }, "", Code::AboveCapability),
            (Facts { privacy: Privacy::Device, ..above.clone() }, "", Code::PrivacyForbids),
            (Facts { providers: unusable("no key"), ..above.clone() }, "", Code::UplinkUnavailable),
            (Facts { question: Err("no [uplink]".into()), ..above.clone() }, "", Code::AboveCapability),
            (Facts { max_cost_usd: Some(0.0), ..above }, "", Code::BudgetExhausted),
        ] {
            assert_eq!(tried(&facts), stops, "{facts:?}");
            assert_eq!(route(&facts).fault.code, code, "{facts:?}");
        }
    }

    fn any_facts() -> impl Strategy<Value = Facts> {
        let fault = || Fault::new(Code::AboveCapability, "above");
        let device = prop_oneof![
            (0..2000u64).prop_map(|ms| Device::Able(Duration::from_millis(ms))),
            Just(Device::Above(fault())),
            Just(Device::Wrong(fault())),
        ];
        let usable = prop_oneof![Just(Ok(())), Just(Err("no key".to_owned()))];
        let one = ("[a-c]", usable, 0.0..0.01).prop_map(|(name, usable, estimate_usd)| Provider {
            name,
            usable,
            estimate_usd,
        });
        let prefer =
            prop_oneof![Just(Prefer::Device), Just(Prefer::Cloud), Just(Prefer::DeviceOnly), Just(Prefer::CloudOnly)];
        let question = prop_oneof![Just(Ok(())), Just(Err("no".to_owned()))];
        (
            device,
            proptest::collection::vec(one, 0..4),
            question,
            prefer,
            prop_oneof![Just(Privacy::Device), Just(Privacy::Cloud)],
            proptest::option::of(0.0..0.01),
            proptest::option::of((0..2000u64).prop_map(Duration::from_millis)),
        )
            .prop_map(|(device, providers, question, prefer, privacy, max_cost_usd, left)| Facts {
                device,
                providers,
                question,
                prefer,
                privacy,
                privacy_of: "job",
                max_cost_usd,
                left,
            })
    }

    proptest! {
        #[test]
        fn rules_hold_for_all_facts(facts in any_facts()) {
            let plan = route(&facts);
            let ups: Vec<&String> = plan.stops.iter().filter_map(|stop| match stop {
                Stop::Cloud(name) => Some(name),
                _ => None,
            }).collect();
            let device = plan.stops.iter().filter(|stop| **stop == Stop::Device).count();
            if facts.privacy == Privacy::Device || facts.prefer == Prefer::DeviceOnly || facts.question.is_err() {
                prop_assert!(ups.is_empty());
            }
            if let Some(most) = facts.max_cost_usd {
                for name in &ups {
                    prop_assert!(facts.providers.iter().any(|p| p.name == **name && p.estimate_usd <= most));
                }
            }
            prop_assert!(device <= 1);
            prop_assert_eq!(device == 1, matches!(facts.device, Device::Able(_)) && facts.prefer != Prefer::CloudOnly);
            // Each thing passed by has its reason.
            for stop in &plan.stops {
                if let Stop::Skip(station) = stop {
                    prop_assert!(station.why.as_ref().is_some_and(|why| !why.is_empty()));
                }
            }
            prop_assert!(!plan.fault.message.is_empty());
        }
    }
}
