//! How fast a model answers on this device, by the size of the input.
//!
//! Preparation grows with the bytes of the input: a straight line through the latest times. The rest grows
//! with the runs of the model: so much a run.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;

/// Times measured, smoothed.
#[derive(Debug, Default)]
pub struct Pace {
    line: Mutex<Option<Line>>,
}

/// Exponentially weighted means; seconds and bytes.
#[derive(Debug, Clone, Copy)]
struct Line {
    bytes: f64,
    prepare: f64,
    /// Of the deviations from the means above.
    variance: f64,
    covariance: f64,
    /// Seconds of one run.
    run: f64,
}

impl Pace {
    /// Notes one answer: an input of `bytes` took `prepare` to be made ready, and `runs` of the model took `ran`.
    pub fn note(&self, bytes: usize, prepare: Duration, runs: usize, ran: Duration) {
        let (bytes, prepare) = (bytes as f64, prepare.as_secs_f64());
        let run = ran.as_secs_f64() / runs.max(1) as f64;
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        *line = Some(match *line {
            None => Line { bytes, prepare, variance: 0.0, covariance: 0.0, run },
            Some(old) => {
                let (dx, dy) = (bytes - old.bytes, prepare - old.prepare);
                Line {
                    bytes: old.bytes + NEWEST * dx,
                    prepare: old.prepare + NEWEST * dy,
                    variance: (1.0 - NEWEST) * (old.variance + NEWEST * dx * dx),
                    covariance: (1.0 - NEWEST) * (old.covariance + NEWEST * dx * dy),
                    run: old.run + NEWEST * (run - old.run),
                }
            }
        });
    }

    /// How long an answer takes for an input of `bytes`, which the model runs for `runs` times; nothing where
    /// none was measured.
    pub fn estimate(&self, bytes: usize, runs: usize) -> Duration {
        let Some(line) = *self.line.lock().unwrap_or_else(PoisonError::into_inner) else { return Duration::ZERO };
        // A larger input is never faster; inputs of one size say nothing about others.
        let slope = if line.variance > 0.0 { (line.covariance / line.variance).max(0.0) } else { 0.0 };
        let prepare = (line.prepare + slope * (bytes as f64 - line.bytes)).max(0.0);
        Duration::try_from_secs_f64(prepare + line.run * runs as f64).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn estimates_grow_with_bytes_and_runs() {
        let pace = Pace::default();
        assert_eq!(pace.estimate(1000, 1), Duration::ZERO);
        pace.note(1000, micros(20), 2, micros(200));
        assert_eq!(pace.estimate(1000, 3), micros(320));
        // One size alone says nothing about others.
        assert_eq!(pace.estimate(9000, 3), micros(320));
        for _ in 0..50 {
            pace.note(1000, micros(20), 1, micros(100));
            pace.note(5000, micros(60), 1, micros(100));
        }
        for (bytes, runs, us) in [(1000, 1, 120.0), (5000, 1, 160.0), (101_000, 1, 1120.0), (0, 10, 1010.0)] {
            let found = pace.estimate(bytes, runs).as_secs_f64() * 1e6;
            assert!((found - us).abs() < us * 0.02, "{bytes} {runs}: {found}, not {us}");
        }
    }

    #[test]
    fn a_slower_device_is_noticed() {
        let pace = Pace::default();
        pace.note(100, micros(10), 1, micros(100));
        (0..20).for_each(|_| pace.note(100, micros(10), 1, micros(400)));
        let found = pace.estimate(100, 1);
        assert!(found > micros(400) && found < micros(411), "{found:?}");
    }
}
