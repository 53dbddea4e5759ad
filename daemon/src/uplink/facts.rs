//! What the decision may know of the providers before a job is sent: facts as plain values.

use std::time::Duration;

/// One provider, as it stands for one question.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// Its name in the configuration.
    pub provider: String,
    /// Whether it can be asked now.
    pub usable: Result<(), Closed>,
    /// How long an answer takes, by its latest answers and those that wait for a free place; none where
    /// it has not been asked yet.
    pub latency: Option<Duration>,
    /// What one answer to this question costs at most, US dollars, estimated from above.
    pub estimate_usd: f64,
    /// What is not yet spent of today's budget for this task, US dollars; none where no budget is set.
    pub left_usd: Option<f64>,
    /// That budget, US dollars.
    pub budget_usd: Option<f64>,
}

/// Why a provider cannot be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// In words, for the requester.
    pub why: String,
    /// Whether it may pass by itself: an outage does, a missing key does not.
    pub passing: bool,
}

impl Closed {
    /// A reason that stays until somebody acts.
    pub fn lasting(why: impl Into<String>) -> Self {
        Closed { why: why.into(), passing: false }
    }

    /// A reason that may pass by itself.
    pub fn passing(why: impl Into<String>) -> Self {
        Closed { why: why.into(), passing: true }
    }
}
