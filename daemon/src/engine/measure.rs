//! How fast variants are on this device, taken in turns so that they can be compared.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use super::model::{Loaded, Model, Sample, States};
use super::shelf::Shelf;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// How often each has its turn.
    pub rounds: usize,
    /// Inferences of a turn.
    pub runs: usize,
    /// A turn ends after this time, though not before one inference.
    pub turn: Duration,
    /// Threads that run the same model at once, as workers do.
    pub threads: usize,
}

impl Effort {
    /// What the daemon measures before it chooses: a few milliseconds for small models.
    pub const CHOICE: Effort = Effort { rounds: 5, runs: 50, turn: Duration::from_millis(2), threads: 1 };

    /// `repeat` inferences of each, in ten turns.
    pub fn of(repeat: usize, threads: usize) -> Self {
        let rounds = repeat.clamp(1, 10);
        Effort { rounds, runs: repeat.div_ceil(rounds), turn: Duration::MAX, threads }
    }
}

/// What one variant takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// Shortest inference, microseconds.
    pub us_min: f64,
    /// Median inference, microseconds.
    pub us_median: f64,
    /// Bytes while loaded, a state for each worker included.
    pub bytes: u64,
}

/// Measures each of `models` in turns, all of one package; those that fail carry the reason.
///
/// Where they do not fit into memory together, each is loaded anew for its turn.
pub fn measure(
    models: &[Arc<Model>],
    shelf: &Shelf,
    states: &mut States,
    effort: Effort,
) -> Vec<Result<Figures, String>> {
    let mut times: Vec<Result<Vec<f64>, String>> = models.iter().map(|_| Ok(Vec::new())).collect();
    for _ in 0..effort.rounds {
        for (model, times) in models.iter().zip(&mut times) {
            let Ok(so_far) = times else { continue };
            match turn(model, shelf, states, effort) {
                Ok(more) => so_far.extend(more),
                Err(why) => *times = Err(why),
            }
        }
    }
    let figures = |(model, times): (&Arc<Model>, Result<Vec<f64>, String>)| {
        let mut times = times?;
        times.sort_by(f64::total_cmp);
        let (Some(least), Some(median)) = (times.first(), times.get(times.len() / 2)) else {
            return Err("nothing was measured".to_owned());
        };
        Ok(Figures { us_min: *least, us_median: *median, bytes: shelf.need(model) })
    };
    models.iter().zip(times).map(figures).collect()
}

fn turn(model: &Arc<Model>, shelf: &Shelf, states: &mut States, effort: Effort) -> Result<Vec<f64>, String> {
    let loaded = shelf.take(model, states).map_err(|fault| fault.message)?;
    let sample = model.sample(&loaded)?;
    if effort.threads <= 1 {
        return runs(model, &loaded, states, &sample, effort, || {});
    }
    let together = Barrier::new(effort.threads);
    let one = || {
        let mut states = States::new();
        runs(model, &loaded, &mut states, &sample, effort, || {
            together.wait();
        })
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..effort.threads).map(|_| scope.spawn(one)).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| format!("{} panicked", model.variant.file))??);
        }
        Ok(all)
    })
}

/// Microseconds of each inference of a turn; `ready` is called between the ones that warm up and the ones that count.
fn runs(
    model: &Model,
    loaded: &Arc<Loaded>,
    states: &mut States,
    sample: &Sample,
    effort: Effort,
    ready: impl Fn(),
) -> Result<Vec<f64>, String> {
    let warm = model.time(loaded, states, sample).and_then(|_| model.time(loaded, states, sample));
    ready();
    warm?;
    let started = Instant::now();
    let mut times = Vec::with_capacity(effort.runs);
    while times.len() < effort.runs.max(1) && (times.is_empty() || started.elapsed() < effort.turn) {
        times.push(model.time(loaded, states, sample)?.as_nanos() as f64 / 1e3);
    }
    Ok(times)
}

/// Times this close together count as equal.
const NOISE: f64 = 1.05;

/// Which of the measured variants is used: the fastest by its shortest time; of those within 5% of it, the one that
/// takes the least memory; then the first.
pub fn choose(figures: &[Option<Figures>]) -> Option<usize> {
    let fastest = figures.iter().flatten().map(|f| f.us_min).min_by(f64::total_cmp)?;
    let close = figures.iter().enumerate().filter_map(|(at, f)| Some((at, f.filter(|f| f.us_min <= fastest * NOISE)?)));
    close.min_by_key(|(at, f)| (f.bytes, *at)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_is_chosen_and_in_a_tie_the_smallest() {
        let f = |us_min: f64, bytes| Some(Figures { us_min, us_median: us_min * 2.0, bytes });
        for (figures, expected) in [
            (vec![], None),
            (vec![None, None], None),
            (vec![f(10.0, 1), f(5.0, 9)], Some(1)),
            (vec![f(10.0, 9), f(10.4, 1)], Some(1)),
            (vec![f(10.0, 9), f(10.6, 1)], Some(0)),
            (vec![f(10.0, 1), f(10.0, 1)], Some(0)),
            (vec![None, f(10.0, 9)], Some(1)),
        ] {
            assert_eq!(choose(&figures), expected, "{figures:?}");
        }
    }
}
