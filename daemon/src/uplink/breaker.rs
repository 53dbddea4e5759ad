//! A circuit breaker: a pure state machine; time comes in as a parameter.
//!
//! After some failures in a row nothing is asked for a while. Then one request goes through as a probe:
//! its success closes the breaker, its failure doubles the wait. A provider that names its own time
//! (`retry-after`) is left alone until then, whatever the state.

use std::time::{Duration, Instant};

/// Failures in a row after which the breaker opens.
pub const FAILURES: u32 = 5;
const FIRST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { failures: u32 },
    Open { until: Instant, wait: Duration },
    HalfOpen { wait: Duration },
}

/// What [`Breaker::admit`] lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// A request like any other.
    Usual,
    /// The one that finds out whether the provider is back; it must be reported by one of
    /// [`Breaker::succeeded`], [`Breaker::failed`] and [`Breaker::dropped`].
    Probe,
}

/// Why nothing goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shut {
    /// The provider asked to be left alone for so long.
    Pause(Duration),
    /// It failed too often and is tried again after so long; zero while a probe is on its way.
    Open(Duration),
}

/// Whether a provider is worth asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    state: State,
    not_before: Option<Instant>,
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker { state: State::Closed { failures: 0 }, not_before: None }
    }
}

impl Breaker {
    /// Whether a request would go through at `now`.
    ///
    /// # Errors
    /// Why not.
    pub fn ready(&self, now: Instant) -> Result<(), Shut> {
        let until = |at: Instant| Some(at.saturating_duration_since(now)).filter(|left| !left.is_zero());
        match self.state {
            State::Closed { .. } => {}
            State::Open { until: at, .. } => until(at).map_or(Ok(()), |left| Err(Shut::Open(left)))?,
            State::HalfOpen { .. } => return Err(Shut::Open(Duration::ZERO)),
        }
        self.not_before.and_then(until).map_or(Ok(()), |left| Err(Shut::Pause(left)))
    }

    /// Lets a request through, or not.
    ///
    /// # Errors
    /// As [`Breaker::ready`].
    pub fn admit(&mut self, now: Instant) -> Result<Pass, Shut> {
        self.ready(now)?;
        match self.state {
            State::Open { wait, .. } => {
                self.state = State::HalfOpen { wait };
                Ok(Pass::Probe)
            }
            _ => Ok(Pass::Usual),
        }
    }

    /// A request was answered, whatever it was: the provider is there.
    pub fn succeeded(&mut self) {
        self.state = State::Closed { failures: 0 };
    }

    /// A request failed in a way that another would, too. Requests sent before the breaker opened
    /// change nothing.
    pub fn failed(&mut self, pass: Pass, now: Instant) {
        match (self.state, pass) {
            (State::Closed { failures }, _) if failures + 1 < FAILURES => {
                self.state = State::Closed { failures: failures + 1 };
            }
            (State::Closed { .. }, _) => self.state = State::Open { until: now + FIRST, wait: FIRST },
            (State::HalfOpen { wait }, Pass::Probe) => {
                let wait = (wait * 2).min(LONGEST);
                self.state = State::Open { until: now + wait, wait };
            }
            _ => {}
        }
    }

    /// A request ended without telling anything of the provider: another may probe at once.
    pub fn dropped(&mut self, pass: Pass, now: Instant) {
        if let (State::HalfOpen { wait }, Pass::Probe) = (self.state, pass) {
            self.state = State::Open { until: now, wait };
        }
    }

    /// The provider asks to be left alone for `wait`.
    pub fn pause(&mut self, wait: Duration, now: Instant) {
        let until = now + wait;
        self.not_before = Some(self.not_before.map_or(until, |before| before.max(until)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES {
            assert_eq!(breaker.admit(now), Ok(Pass::Usual));
            breaker.failed(Pass::Usual, now);
        }
        breaker
    }

    #[test]
    fn opens_probes_once_and_closes() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.admit(now), Err(Shut::Open(FIRST)));
        let later = now + FIRST;
        assert_eq!(breaker.admit(later), Ok(Pass::Probe));
        assert_eq!(breaker.admit(later), Err(Shut::Open(Duration::ZERO)), "one probe at a time");
        breaker.failed(Pass::Probe, later);
        assert_eq!(breaker.admit(later), Err(Shut::Open(FIRST * 2)), "the wait doubles");
        let later = later + FIRST * 2;
        assert_eq!(breaker.admit(later), Ok(Pass::Probe));
        breaker.succeeded();
        assert_eq!(breaker, Breaker::default());
    }

    #[test]
    fn a_probe_that_tells_nothing_makes_way_for_the_next() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.admit(now + FIRST), Ok(Pass::Probe));
        breaker.dropped(Pass::Probe, now + FIRST);
        assert_eq!(breaker.admit(now + FIRST), Ok(Pass::Probe));
    }

    #[test]
    fn a_success_between_failures_keeps_it_closed() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..3 * FAILURES {
            breaker.failed(Pass::Usual, now);
            breaker.succeeded();
        }
        assert_eq!(breaker.admit(now), Ok(Pass::Usual));
    }

    #[test]
    fn a_pause_holds_in_every_state() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.pause(Duration::from_secs(30), now);
        breaker.pause(Duration::from_secs(3), now);
        breaker.succeeded();
        assert_eq!(breaker.admit(now), Err(Shut::Pause(Duration::from_secs(30))));
        assert_eq!(breaker.admit(now + Duration::from_secs(30)), Ok(Pass::Usual));
    }

    proptest! {
        /// Whatever happens: never two probes at once, and never closed for longer than the longest wait.
        #[test]
        fn it_always_comes_back(events in proptest::collection::vec((0_u8..5, 0_u64..20), 0..200)) {
            let mut now = Instant::now();
            let mut breaker = Breaker::default();
            let mut on_the_way: Vec<Pass> = Vec::new();
            for (event, seconds) in events {
                now += Duration::from_secs(seconds);
                match (event, on_the_way.pop()) {
                    (0, Some(_)) => breaker.succeeded(),
                    (1, Some(pass)) => breaker.failed(pass, now),
                    (2, Some(pass)) => breaker.dropped(pass, now),
                    (_, back) => {
                        on_the_way.extend(back);
                        if let Ok(pass) = breaker.admit(now) {
                            prop_assert!(pass == Pass::Usual || breaker.admit(now).is_err(), "two probes at once");
                            on_the_way.push(pass);
                        }
                    }
                }
            }
            for pass in on_the_way {
                breaker.dropped(pass, now);
            }
            prop_assert!(breaker.ready(now + LONGEST).is_ok());
        }
    }
}
