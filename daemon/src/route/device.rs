//! Which model on the device: the first whose limits, memory and time allow it.

use std::time::Duration;

use super::{Device, Facts, Local, ms, skipped};
use crate::config::Prefer;
use crate::job::{Code, Fault, Station, Tier};

/// What the device comes down to.
#[derive(Debug, Default)]
pub struct Chosen {
    /// The model that may run.
    pub model: Option<Candidate>,
    /// The reasons against those before it, or against all.
    pub passed: Vec<Station>,
    /// Why none may run.
    pub fault: Option<Fault>,
}

/// The model that may run.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Its place among the task's models.
    pub at: usize,
    /// How long it takes, waiting included.
    pub takes: Duration,
    /// Why that is too long, if it is.
    pub late: Option<String>,
}

/// Chooses the model.
///
/// # Errors
/// The fault of a job that is wrong for every model.
pub fn choose(facts: &Facts) -> Result<Chosen, Fault> {
    let skip = |why: &str| vec![skipped(Tier::Device, None, why)];
    let models = match &facts.device {
        Device::Wrong(fault) => return Err(fault.clone()),
        Device::Above(fault) => {
            return Ok(Chosen { model: None, passed: skip(&fault.message), fault: Some(fault.clone()) });
        }
        Device::Models(models) => models,
    };
    if facts.prefer == Prefer::CloudOnly {
        return Ok(Chosen { passed: skip("the task's rule is cloud-only"), ..Chosen::default() });
    }
    let mut chosen = Chosen::default();
    let mut wrong = None;
    let mut late: Vec<Candidate> = Vec::new();
    let pass = |at: usize, why: &str| match models.len() {
        1 => skipped(Tier::Device, None, why),
        _ => skipped(Tier::Device, None, format!("{}: {why}", models[at].id)),
    };
    for (at, model) in models.iter().enumerate() {
        let takes = model.takes();
        match (&model.fit, facts.left) {
            (Ok(()), Some(left)) if takes > left => {
                late.push(Candidate { at, takes, late: Some(too_long(model, left)) })
            }
            (Ok(()), _) => {
                chosen.model = Some(Candidate { at, takes, late: None });
                break;
            }
            (Err(fault), _) => {
                let first = if fault.code == Code::BadRequest { &mut wrong } else { &mut chosen.fault };
                first.get_or_insert_with(|| fault.clone());
                chosen.passed.push(pass(at, &fault.message));
            }
        }
    }
    if chosen.model.is_none() {
        chosen.model = late.iter().min_by_key(|candidate| candidate.takes).cloned();
    }
    let run = chosen.model.as_ref().map(|model| model.at);
    for candidate in late.iter().filter(|candidate| Some(candidate.at) != run) {
        chosen.passed.push(pass(candidate.at, candidate.late.as_deref().unwrap_or_default()));
    }
    match (wrong, run, &chosen.fault) {
        // What is wrong for every model here is no better for a closed one.
        (Some(wrong), None, None) => Err(wrong),
        (_, Some(_), _) => Ok(Chosen { fault: None, ..chosen }),
        _ => Ok(chosen),
    }
}

fn too_long(model: &Local, left: Duration) -> String {
    let takes = format!("it would take about {}", ms(model.takes()));
    let takes = match model.wait.is_zero() {
        true => takes,
        false => format!("{takes}, {} of it waiting", ms(model.wait)),
    };
    format!("{takes}, and {} are left", ms(left))
}
