use proptest::prelude::*;

use super::*;
use crate::uplink::Closed;

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn offer(provider: &str) -> Offer {
    Offer {
        provider: provider.to_owned(),
        usable: Ok(()),
        latency: None,
        estimate_usd: 0.001,
        left_usd: None,
        budget_usd: None,
    }
}

fn slow(provider: &str, ms: u64) -> Offer {
    Offer { latency: Some(millis(ms)), ..offer(provider) }
}

fn local(id: &str, wait: u64, run: u64) -> Local {
    Local { id: id.to_owned(), fit: Ok(()), wait: millis(wait), run: millis(run) }
}

fn unfit(id: &str, code: Code) -> Local {
    Local { fit: Err(Fault::new(code, format!("not for {id}"))), ..local(id, 0, 1) }
}

const OPEN: PrivacyRules = PrivacyRules { node: Privacy::Cloud, task: Privacy::Cloud, job: Privacy::Cloud };
const SHUT: PrivacyRules = PrivacyRules { job: Privacy::Device, ..OPEN };

fn facts() -> Facts {
    Facts {
        device: Device::Models(vec![local("m@1", 0, 5)]),
        offers: vec![offer("claude"), offer("gpt")],
        question: Ok(()),
        prefer: Prefer::Device,
        privacy: OPEN,
        max_cost_usd: None,
        left: None,
    }
}

/// The tried stops, in short: `d` and the model's place, or a provider's name.
fn tried(facts: &Facts) -> String {
    let word = |stop: &Stop| match stop {
        Stop::Device(at) => Some(format!("d{at}")),
        Stop::Cloud(ask) => Some(ask.provider.clone()),
        Stop::Skip(_) => None,
    };
    route(facts).stops.iter().filter_map(word).collect::<Vec<_>>().join(" ")
}

fn reasons(facts: &Facts) -> String {
    let why = |stop: &Stop| match stop {
        Stop::Skip(station) => station.why.clone(),
        _ => None,
    };
    route(facts).stops.iter().filter_map(why).collect::<Vec<_>>().join(" | ")
}

#[test]
fn order_by_rule() {
    for (prefer, expected) in [
        (Prefer::Device, "d0 claude gpt"),
        (Prefer::Cloud, "claude gpt d0"),
        (Prefer::DeviceOnly, "d0"),
        (Prefer::CloudOnly, "claude gpt"),
    ] {
        assert_eq!(tried(&Facts { prefer, ..facts() }), expected, "{prefer:?}");
    }
}

#[test]
fn the_first_model_that_fits_in_limits_memory_and_time() {
    for (models, left, expected, why) in [
        (vec![local("a", 0, 5), local("b", 0, 1)], None, "d0 claude gpt", ""),
        (vec![unfit("a", Code::InputOutOfRange), local("b", 0, 1)], None, "d1 claude gpt", "a: not for a"),
        // What is wrong for one model may be right for another.
        (vec![unfit("a", Code::BadRequest), local("b", 0, 1)], None, "d1 claude gpt", "a: not for a"),
        (
            vec![unfit("a", Code::AboveCapability), unfit("b", Code::BadRequest)],
            None,
            "claude gpt",
            "a: not for a | b: not for b",
        ),
        (
            vec![local("a", 10, 20), local("b", 1, 1)],
            Some(25),
            "d1 claude gpt",
            "a: it would take about 30 ms, 10 ms of it waiting, and 25 ms are left",
        ),
        // Of those that are late the soonest is the last resort.
        (
            vec![local("a", 0, 30), local("b", 0, 20), local("c", 0, 40)],
            Some(10),
            "claude gpt d1",
            "a: it would take about 30 ms, and 10 ms are left | c: it would take about 40 ms, and 10 ms are left | \
             it would take about 20 ms, and 10 ms are left",
        ),
    ] {
        let facts = Facts { device: Device::Models(models), left: left.map(millis), ..facts() };
        assert_eq!(tried(&facts), expected, "{facts:?}");
        assert_eq!(reasons(&facts), why, "{facts:?}");
    }
}

#[test]
fn a_late_device_is_the_last_resort() {
    let left = Some(millis(2));
    assert_eq!(tried(&Facts { left, ..facts() }), "claude gpt d0");
    assert_eq!(tried(&Facts { left, offers: Vec::new(), ..facts() }), "d0");
    assert_eq!(tried(&Facts { left, privacy: SHUT, ..facts() }), "d0");
    assert_eq!(tried(&Facts { left, offers: vec![slow("claude", 900)], ..facts() }), "d0");
}

#[test]
fn what_is_wrong_for_every_model_is_wrong() {
    let wrong = |prefer| Facts {
        device: Device::Models(vec![unfit("a", Code::BadRequest), unfit("b", Code::BadRequest)]),
        prefer,
        ..facts()
    };
    assert_eq!(tried(&wrong(Prefer::Device)), "");
    assert_eq!(route(&wrong(Prefer::Device)).fault.code, Code::BadRequest);
    // A closed model takes other inputs than the one on the device.
    assert_eq!(tried(&wrong(Prefer::CloudOnly)), "claude gpt");
}

#[test]
fn above_the_device() {
    let device = Device::Above(Fault::new(Code::AboveCapability, "no model"));
    let closed = |closed| vec![Offer { usable: Err(closed), ..offer("claude") }];
    let above = Facts { device, ..facts() };
    for (facts, stops, code, later) in [
        (above.clone(), "claude gpt", Code::AboveCapability, false),
        (Facts { offers: Vec::new(), ..above.clone() }, "", Code::AboveCapability, false),
        (Facts { privacy: SHUT, ..above.clone() }, "", Code::PrivacyForbids, false),
        (Facts { offers: closed(Closed::lasting("no key")), ..above.clone() }, "", Code::UplinkUnavailable, false),
        (Facts { offers: closed(Closed::passing("resting")), ..above.clone() }, "", Code::UplinkUnavailable, true),
        (Facts { question: Err("no [uplink]".into()), ..above.clone() }, "", Code::AboveCapability, false),
        (Facts { max_cost_usd: Some(0.0), ..above.clone() }, "", Code::BudgetExhausted, false),
        (
            Facts { offers: vec![Offer { left_usd: Some(0.0005), ..offer("claude") }], ..above.clone() },
            "",
            Code::BudgetExhausted,
            false,
        ),
        (
            Facts { offers: vec![slow("claude", 900)], left: Some(millis(500)), ..above.clone() },
            "",
            Code::DeadlineExceeded,
            false,
        ),
        (Facts { prefer: Prefer::DeviceOnly, ..above }, "", Code::AboveCapability, false),
    ] {
        assert_eq!(tried(&facts), stops, "{facts:?}");
        let plan = route(&facts);
        assert_eq!((plan.fault.code, plan.later), (code, later), "{facts:?}");
    }
}

#[test]
fn reasons_against_providers_have_their_figures() {
    let facts = Facts {
        offers: vec![
            Offer { usable: Err(Closed::lasting("no key")), ..offer("a") },
            Offer { estimate_usd: 0.02, ..offer("b") },
            Offer { left_usd: Some(0.0), ..offer("c") },
            slow("d", 1200),
            slow("e", 300),
        ],
        max_cost_usd: Some(0.01),
        left: Some(millis(405)),
        ..facts()
    };
    assert_eq!(tried(&facts), "d0 e");
    assert_eq!(
        reasons(&facts),
        "no key | it could cost $0.020000, over the job's $0.010000 | \
         it could cost $0.001000, and $0.000000 of today's budget are left | \
         it lately took about 1200 ms, and 400 ms are left for it"
    );
}

#[test]
fn the_device_after_the_cloud_has_its_time_left() {
    for (latency, spare) in [(Some(100), 5), (None, 5), (Some(498), 0)] {
        let one = Offer { latency: latency.map(millis), ..offer("claude") };
        let plan = route(&Facts { prefer: Prefer::Cloud, offers: vec![one], left: Some(millis(500)), ..facts() });
        let Stop::Cloud(ask) = &plan.stops[0] else { panic!("{plan:?}") };
        assert_eq!(ask.spare, millis(spare), "{latency:?}");
    }
}

#[test]
fn doubts_show_the_difference() {
    for (found, wanted, why) in [
        (Some(0.38), 0.6, Some("confidence 0.38 is under 0.60")),
        (Some(0.5996), 0.6, Some("confidence 0.5996 is under 0.6000")),
        (Some(0.6), 0.6, None),
        (None, 0.6, None),
    ] {
        assert_eq!(doubt(found, wanted).as_deref(), why);
    }
}

fn any_privacy() -> impl Strategy<Value = Privacy> {
    prop_oneof![Just(Privacy::Device), Just(Privacy::Cloud)]
}

fn any_offer() -> impl Strategy<Value = Offer> {
    let usable = prop_oneof![
        3 => Just(Ok(())),
        1 => Just(Err(Closed::lasting("no key"))),
        1 => Just(Err(Closed::passing("resting"))),
    ];
    let latency = proptest::option::of((0..2000u64).prop_map(millis));
    (("[a-d]"), usable, latency, 0.0..0.01, proptest::option::of(0.0..0.01)).prop_map(
        |(provider, usable, latency, estimate_usd, left_usd)| Offer {
            provider,
            usable,
            latency,
            estimate_usd,
            left_usd,
            budget_usd: left_usd,
        },
    )
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let fault = |code| Fault::new(code, "above");
    let fit = prop_oneof![
        3 => Just(Ok(())),
        1 => Just(Err(fault(Code::InputOutOfRange))),
        1 => Just(Err(fault(Code::BadRequest))),
    ];
    let one = (fit, 0..1000u64, 0..1000u64).prop_map(|(fit, wait, run)| Local { fit, ..local("m@1", wait, run) });
    let device = prop_oneof![
        4 => proptest::collection::vec(one, 1..4).prop_map(Device::Models),
        1 => Just(Device::Above(fault(Code::AboveCapability))),
        1 => Just(Device::Wrong(fault(Code::UnknownTask))),
    ];
    let prefer =
        prop_oneof![Just(Prefer::Device), Just(Prefer::Cloud), Just(Prefer::DeviceOnly), Just(Prefer::CloudOnly)];
    (
        device,
        proptest::collection::vec(any_offer(), 0..4),
        prop_oneof![3 => Just(Ok(())), 1 => Just(Err("no".to_owned()))],
        prefer,
        (any_privacy(), any_privacy(), any_privacy()),
        proptest::option::of(0.0..0.01),
        proptest::option::of((0..3000u64).prop_map(millis)),
    )
        .prop_map(|(device, mut offers, question, prefer, (node, task, job), max_cost_usd, left)| {
            // Names are unique in a configuration.
            offers.sort_by(|a, b| a.provider.cmp(&b.provider));
            offers.dedup_by(|a, b| a.provider == b.provider);
            let privacy = PrivacyRules { node, task, job };
            Facts { device, offers, question, prefer, privacy, max_cost_usd, left }
        })
}

fn asked(plan: &Plan) -> Vec<&Ask> {
    let mut asked = Vec::new();
    for stop in &plan.stops {
        if let Stop::Cloud(ask) = stop {
            asked.push(ask);
        }
    }
    asked
}

fn names(plan: &Plan) -> std::collections::BTreeSet<String> {
    asked(plan).into_iter().map(|ask| ask.provider.clone()).collect()
}

/// The same facts with one rule or bound tightened.
fn stricter(facts: &Facts) -> Vec<Facts> {
    let with = |privacy| Facts { privacy, ..facts.clone() };
    let of = |prefer| Facts { prefer, ..facts.clone() };
    let mut all = vec![
        with(PrivacyRules { node: Privacy::Device, ..facts.privacy }),
        with(PrivacyRules { task: Privacy::Device, ..facts.privacy }),
        with(PrivacyRules { job: Privacy::Device, ..facts.privacy }),
        of(Prefer::DeviceOnly),
        Facts { max_cost_usd: Some(facts.max_cost_usd.unwrap_or(1.0) / 2.0), ..facts.clone() },
    ];
    let mut poorer = facts.clone();
    poorer.offers.iter_mut().for_each(|offer| offer.left_usd = Some(offer.left_usd.unwrap_or(1.0) / 2.0));
    all.push(poorer);
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn never_up_when_a_rule_forbids(facts in any_facts()) {
        let private = [facts.privacy.node, facts.privacy.task, facts.privacy.job].contains(&Privacy::Device);
        if private || facts.prefer == Prefer::DeviceOnly || facts.question.is_err() {
            prop_assert!(asked(&route(&facts)).is_empty());
        }
    }

    #[test]
    fn never_over_a_bound_or_budget(facts in any_facts()) {
        for ask in asked(&route(&facts)) {
            let offer = facts.offers.iter().find(|offer| offer.provider == ask.provider).expect("it is offered");
            prop_assert!(offer.usable.is_ok());
            prop_assert!(facts.max_cost_usd.is_none_or(|most| offer.estimate_usd <= most));
            prop_assert!(offer.left_usd.is_none_or(|most| offer.estimate_usd <= most));
        }
    }

    #[test]
    fn stricter_never_loosens(facts in any_facts()) {
        let before = names(&route(&facts));
        for tighter in stricter(&facts) {
            prop_assert!(names(&route(&tighter)).is_subset(&before), "{:?}", tighter);
        }
    }

    #[test]
    fn a_plan_without_a_try_has_its_error(facts in any_facts()) {
        let plan = route(&facts);
        let tries = plan.stops.iter().any(|stop| !matches!(stop, Stop::Skip(_)));
        prop_assert!(!plan.fault.message.is_empty());
        if !tries {
            // Only a device that is able, and a provider that nothing speaks against, are tried.
            let able = matches!(&facts.device, Device::Models(models) if models.iter().any(|model| model.fit.is_ok()));
            prop_assert!(!able || facts.prefer == Prefer::CloudOnly);
        }
        for stop in &plan.stops {
            if let Stop::Skip(station) = stop {
                prop_assert!(station.why.as_ref().is_some_and(|why| !why.is_empty()));
            }
        }
    }

    #[test]
    fn the_deadline_is_respected_by_estimate(facts in any_facts()) {
        let plan = route(&facts);
        let Some(left) = facts.left else { return Ok(()) };
        let mut spent = Duration::ZERO;
        let last = plan.stops.iter().rposition(|stop| !matches!(stop, Stop::Skip(_)));
        let tries = plan.stops.iter().filter(|stop| !matches!(stop, Stop::Skip(_))).count();
        for (at, stop) in plan.stops.iter().enumerate() {
            match stop {
                Stop::Skip(_) => {}
                Stop::Device(model) => {
                    let Device::Models(models) = &facts.device else { panic!("no model") };
                    let takes = models[*model].takes();
                    // What would be late is tried only where nothing else is left to try.
                    prop_assert!(takes <= left || Some(at) == last || tries == 1);
                    prop_assert!(takes <= left || models.iter().all(|m| m.fit.is_err() || m.takes() >= takes));
                    spent += takes;
                }
                Stop::Cloud(ask) => {
                    let offer = facts.offers.iter().find(|offer| offer.provider == ask.provider).expect("offered");
                    prop_assert!(offer.latency.is_none_or(|takes| spent + takes + ask.spare <= left));
                    prop_assert!(ask.spare <= left);
                }
            }
        }
    }

    #[test]
    fn each_candidate_is_tried_once_or_has_a_reason(facts in any_facts()) {
        let plan = route(&facts);
        let device = plan.stops.iter().filter(|stop| matches!(stop, Stop::Device(_))).count();
        prop_assert!(device <= 1);
        prop_assert_eq!(names(&plan).len(), asked(&plan).len());
        let order: Vec<_> = asked(&plan).iter().map(|ask| ask.provider.clone()).collect();
        let offered = facts.offers.iter().map(|offer| offer.provider.clone());
        prop_assert_eq!(&order, &offered.filter(|name| order.contains(name)).collect::<Vec<_>>());
    }
}
