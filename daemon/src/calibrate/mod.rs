//! Calibration: from labelled cases to the temperature and the threshold of a model, with a promise that holds.
//!
//! Pure: scores in, a fit out. The method is *Learn then Test* (Angelopoulos, Bates, Candès, Jordan and Lei 2021,
//! arXiv:2110.01052) with exact binomial p-values and fixed-sequence testing; for an accuracy that is selective
//! classification with guaranteed risk (Geifman and El-Yaniv 2017, arXiv:1705.08500):
//!
//! 1. The set is cut in two. The first part, the smaller one, fits the temperature (Guo et al. 2017,
//!    arXiv:1706.04599) and lays out the thresholds that will be tested, and in which order.
//! 2. The second part tests them one after the other, from strict to lenient, until one fails. "Of the answers above
//!    this threshold more than `1 - accuracy` are wrong" is rejected where so few wrong ones as were seen would come
//!    with a probability of at most `1 - assurance`. The last threshold before the failure is taken.
//!
//! Whatever the model and the data, the promise is then broken with a probability of at most `1 - assurance` over the
//! draw of the set, as long as its cases are independent and drawn as the jobs to come will be. For a bound on the
//! share sent up the hypothesis is about that share; as it grows with the threshold, every threshold may be tested.

use serde::Serialize;

use crate::task::output::Scores;

pub mod binomial;
pub mod plot;
pub mod set;

/// At most so many cases fit the temperature and lay out the thresholds: more would add nothing.
const FIT: usize = 1000;
/// Thresholds that are tested at most.
const STEPS: usize = 60;
/// Temperatures that are considered.
const TEMPERATURES: (f64, f64) = (0.05, 20.0);
/// Digits of a threshold.
const DIGITS: f64 = 1e9;

/// One labelled case.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// What the model gives for it; none: the input is outside the model's limits, so it goes up anyway.
    pub scores: Option<Scores>,
    /// The right answer: the place of its label, or 0 for normal and 1 for anomalous.
    pub truth: usize,
}

/// What is to be promised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Promise {
    /// Of the answers that stay on the device at least this share is right.
    Accuracy(f64),
    /// At most this share of the jobs is sent up.
    MaxUp(f64),
}

/// How a threshold fares on the cases that did not fit it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// The threshold.
    pub threshold: f64,
    /// Cases whose answer stays on the device.
    pub kept: usize,
    /// Those of them that are right.
    pub right: usize,
    /// Share of the cases that is sent up.
    pub up: f64,
    /// Share of the kept answers that is right; 1 where none is kept.
    pub accuracy: f64,
}

/// What calibration comes down to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// Divides the logits.
    pub temperature: f64,
    /// Cases that fitted the temperature and laid out the thresholds.
    pub fitted: usize,
    /// Cases that tested them.
    pub tested: usize,
    /// The threshold that keeps the promise, or why none does.
    pub chosen: Result<Point, Broken>,
    /// Every threshold that makes a difference on the tested cases, from lenient to strict.
    pub curve: Vec<Point>,
}

/// Why no threshold keeps the promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Broken {
    /// Even without a single miss this set would be too small to show it.
    #[error("the set is too small for this promise: it takes {needed} cases at least, and there are {cases}")]
    TooSmall {
        /// Cases of the set.
        cases: usize,
        /// The fewest that could show it, if not one answer were wrong.
        needed: usize,
    },
    /// The model is not good enough, or too little better for a set of this size.
    #[error("the set does not show it: of the {kept} surest answers {wrong} are wrong, too many for this promise")]
    NotShown {
        /// Answers above the strictest threshold tested.
        kept: usize,
        /// Those of them that are wrong.
        wrong: usize,
    },
}

/// Fits `cases`, which are in random order, to a promise that is to hold with a probability of `assurance`.
pub fn fit(cases: &[Case], promise: Promise, assurance: f64) -> Fit {
    let risk = 1.0 - assurance;
    let fitted = (cases.len() / 4).min(FIT);
    let (first, second) = cases.split_at(fitted);
    let temperature = temperature(first);
    let (first, second) = (judge(first, temperature), judge(second, temperature));
    let chosen = match promise {
        Promise::Accuracy(accuracy) => by_accuracy(&first, &second, 1.0 - accuracy, risk),
        Promise::MaxUp(most) => by_share(&second, most, risk),
    };
    let chosen = chosen.map_err(|broken| match broken {
        // Of the whole set a quarter is for fitting.
        Broken::TooSmall { needed, .. } => {
            let needed = ((4 * needed - 1) / 3).min(needed + FIT);
            Broken::TooSmall { cases: cases.len(), needed: needed.max(cases.len() + 1) }
        }
        other => other,
    });
    Fit { temperature, fitted, tested: second.len(), chosen, curve: curve(&second) }
}

/// How a threshold and temperature fare on `cases`.
pub fn measure(cases: &[Case], temperature: f64, threshold: f64) -> Point {
    at(&judge(cases, temperature), threshold)
}

/// The temperature of the least log loss. The right answer counts a little less than wholly, as if one more case had
/// been seen of each kind (Platt 1999): without a single miss the best temperature would be 0.
pub fn temperature(cases: &[Case]) -> f64 {
    let known: Vec<(&Scores, usize)> =
        cases.iter().filter_map(|case| Some((case.scores.as_ref()?, case.truth))).collect();
    if known.is_empty() {
        return 1.0;
    }
    let smoothing = 1.0 / (known.len() as f64 + 2.0);
    let loss = |log_temperature: f64| -> f64 {
        known.iter().map(|(scores, truth)| log_loss(scores, *truth, log_temperature.exp(), smoothing)).sum()
    };
    let (least, most) = TEMPERATURES;
    let best = golden(loss, least.ln(), most.ln()).exp();
    // Four digits are more than any set can tell.
    let digits = 10.0_f64.powi(3 - best.log10().floor() as i32);
    (best * digits).round() / digits
}

fn log_loss(scores: &Scores, truth: usize, temperature: f64, smoothing: f64) -> f64 {
    let log = |chance: f64| -chance.max(1e-12).ln();
    if scores.exclusive() {
        let chances = scores.chances(temperature);
        let all = chances.iter().map(|chance| log(*chance)).sum::<f64>() / chances.len() as f64;
        return (1.0 - smoothing) * chances.get(truth).map_or(0.0, |chance| log(*chance)) + smoothing * all;
    }
    let (answer, sure) = scores.judge(temperature);
    let (likely, other) = if answer == truth { (sure, 1.0 - sure) } else { (1.0 - sure, sure) };
    (1.0 - smoothing) * log(likely) + smoothing * log(other)
}

/// The least of a function with one valley, between `low` and `high`, by golden sections.
fn golden(f: impl Fn(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    let share = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut a, mut b) = (high - share * (high - low), low + share * (high - low));
    let (mut at_a, mut at_b) = (f(a), f(b));
    for _ in 0..30 {
        if at_a <= at_b {
            (high, b, at_b) = (b, a, at_a);
            a = high - share * (high - low);
            at_a = f(a);
        } else {
            (low, a, at_a) = (a, b, at_b);
            b = low + share * (high - low);
            at_b = f(b);
        }
    }
    (low + high) / 2.0
}

/// A case at a temperature: its confidence, and whether the answer is right. Without an answer it is never sure.
#[derive(Debug, Clone, Copy)]
struct Judged {
    sure: f64,
    right: bool,
}

fn judge(cases: &[Case], temperature: f64) -> Vec<Judged> {
    let judge = |case: &Case| match &case.scores {
        None => Judged { sure: f64::NEG_INFINITY, right: false },
        Some(scores) => {
            let (answer, sure) = scores.judge(temperature);
            Judged { sure, right: answer == case.truth }
        }
    };
    cases.iter().map(judge).collect()
}

fn at(cases: &[Judged], threshold: f64) -> Point {
    let kept = cases.iter().filter(|case| case.sure >= threshold);
    let (kept, right) = kept.fold((0, 0), |(kept, right), case| (kept + 1, right + usize::from(case.right)));
    let up = 1.0 - kept as f64 / cases.len().max(1) as f64;
    Point { threshold, kept, right, up, accuracy: if kept == 0 { 1.0 } else { right as f64 / kept as f64 } }
}

/// The confidences that occur, from small to large, each once.
fn distinct(cases: &[Judged]) -> Vec<f64> {
    let mut sure: Vec<f64> = cases.iter().map(|case| case.sure).filter(|sure| sure.is_finite()).collect();
    sure.sort_by(f64::total_cmp);
    sure.dedup();
    sure
}

/// Every threshold that makes a difference; thinned out for a large set.
fn curve(cases: &[Judged]) -> Vec<Point> {
    let sure = distinct(cases);
    let step = sure.len().div_ceil(200).max(1);
    std::iter::once(0.0).chain(sure.into_iter().step_by(step)).map(|threshold| at(cases, threshold)).collect()
}

fn by_accuracy(first: &[Judged], second: &[Judged], wrong: f64, risk: f64) -> Result<Point, Broken> {
    let fewest = binomial::fewest(wrong, risk);
    if second.iter().filter(|case| case.sure.is_finite()).count() < fewest {
        return Err(Broken::TooSmall { cases: second.len(), needed: fewest });
    }
    // From strict to lenient, and all of them by the first part alone.
    let sure = distinct(first);
    let step = sure.len().div_ceil(STEPS).max(1);
    let mut thresholds: Vec<f64> =
        sure.into_iter().step_by(step).map(|sure| (sure * DIGITS).floor() / DIGITS).collect();
    thresholds.insert(0, 0.0);
    thresholds.dedup();
    thresholds.reverse();
    let shown = |point: &Point| binomial::at_most(point.kept - point.right, point.kept, wrong) <= risk;
    let start = start(first, &thresholds, second.len(), wrong, risk);
    let tests: Vec<Point> = thresholds[start..].iter().map(|threshold| at(second, *threshold)).collect();
    match tests.iter().take_while(|point| shown(point)).last() {
        Some(point) => Ok(*point),
        None => Err(Broken::NotShown { kept: tests[0].kept, wrong: tests[0].kept - tests[0].right }),
    }
}

/// Where to begin: at the threshold that the test will most likely pass, by what the first part's confidences say of
/// errors. Stricter ones would keep too few answers to show anything.
fn start(first: &[Judged], thresholds: &[f64], tested: usize, wrong: f64, risk: f64) -> usize {
    let power = |threshold: f64| {
        let kept: Vec<f64> = first.iter().map(|case| case.sure).filter(|sure| *sure >= threshold).collect();
        let n = kept.len() * tested / first.len().max(1);
        let error = kept.iter().map(|sure| 1.0 - sure).sum::<f64>() / kept.len().max(1) as f64;
        // A model may overrate itself, and few cases say little.
        let error = 1.5 * error + 0.5 / (kept.len() + 1) as f64;
        // The chance of no more misses than pass.
        binomial::passing(n, wrong, risk).map_or(0.0, |most| binomial::at_most(most, n, error))
    };
    let powers: Vec<f64> = thresholds.iter().map(|threshold| power(*threshold)).collect();
    // Of equals the strictest.
    (0..powers.len()).reduce(|best, i| if powers[i] > powers[best] { i } else { best }).unwrap_or(0)
}

fn by_share(cases: &[Judged], most: f64, risk: f64) -> Result<Point, Broken> {
    let n = cases.len();
    // So many of these may lie below the threshold.
    let Some(below) = binomial::passing(n, most, risk) else {
        return Err(Broken::TooSmall { cases: n, needed: binomial::fewest(most, risk) });
    };
    let mut sure: Vec<f64> = cases.iter().map(|case| case.sure).collect();
    sure.sort_by(f64::total_cmp);
    // Rounded down: an answer as sure as this one stays.
    let threshold = sure.get(below).map_or(1.0, |sure| (sure * DIGITS).floor() / DIGITS);
    if threshold.is_finite() {
        Ok(at(cases, threshold))
    } else {
        // More inputs are outside the model's limits than may go up.
        Err(Broken::NotShown { kept: n, wrong: sure.iter().filter(|sure| !sure.is_finite()).count() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::package::Activation;

    /// A generator good enough for tests (splitmix64), so that they need no seed from outside.
    struct Random(u64);

    impl Random {
        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    /// A model of two labels whose chance of being right is the logistic of its logit over `true_temperature`.
    fn cases(random: &mut Random, n: usize, true_temperature: f64) -> Vec<Case> {
        let case = |_| {
            let logit = random.uniform() * 8.0;
            let right = random.uniform() < 1.0 / (1.0 + (-logit / true_temperature).exp());
            let scores = Scores::Classes { rows: vec![vec![logit, 0.0]], activation: Activation::Softmax };
            Case { scores: Some(scores), truth: usize::from(!right) }
        };
        (0..n).map(case).collect()
    }

    /// The true accuracy above a threshold, and the true share sent up.
    fn truth(threshold: f64, temperature: f64, true_temperature: f64) -> (f64, f64) {
        let (mut kept, mut right) = (0.0, 0.0);
        for i in 0..8000 {
            let logit = (f64::from(i) + 0.5) / 1000.0;
            if 1.0 / (1.0 + (-logit / temperature).exp()) >= threshold {
                kept += 1.0;
                right += 1.0 / (1.0 + (-logit / true_temperature).exp());
            }
        }
        (if kept == 0.0 { 1.0 } else { right / kept }, 1.0 - kept / 8000.0)
    }

    #[test]
    fn the_temperature_is_found_again() {
        for wanted in [0.5, 1.0, 2.0] {
            let found = temperature(&cases(&mut Random(7), 20_000, wanted));
            assert!((found / wanted - 1.0).abs() < 0.1, "{found}, not {wanted}");
        }
        // Without a miss it stays away from 0.
        let sure = Case { scores: Some(Scores::Anomaly { score: 4.0, threshold: 1.0 }), truth: 1 };
        let found = temperature(&vec![sure; 50]);
        assert!((0.1..1.0).contains(&found), "{found}");
    }

    /// The promise itself: broken in no more draws than it says.
    #[test]
    fn the_promise_is_kept_in_the_promised_share_of_draws() {
        let (draws, assurance) = (400, 0.9);
        for (promise, true_temperature, n) in [
            (Promise::Accuracy(0.95), 1.0, 300),
            (Promise::Accuracy(0.9), 2.0, 600),
            (Promise::Accuracy(0.9), 1.5, 1000),
            (Promise::MaxUp(0.2), 1.0, 200),
            (Promise::MaxUp(0.05), 1.0, 500),
        ] {
            let mut random = Random(11);
            let (mut broken, mut none) = (0, 0);
            for _ in 0..draws {
                let fit = fit(&cases(&mut random, n, true_temperature), promise, assurance);
                let Ok(point) = fit.chosen else {
                    none += 1;
                    continue;
                };
                let (accuracy, up) = truth(point.threshold, fit.temperature, true_temperature);
                broken += u32::from(match promise {
                    Promise::Accuracy(wanted) => accuracy < wanted,
                    Promise::MaxUp(most) => up > most,
                });
            }
            // The bound on what chance does to a share of 400 draws.
            let most = (1.0 - assurance + 3.0 * (0.1f64 * 0.9 / 400.0).sqrt()) * f64::from(draws);
            assert!(f64::from(broken) <= most, "{promise:?} {true_temperature}: broken in {broken} of {draws}");
            // It must not be kept by promising nothing.
            assert!(none <= draws / 4, "{promise:?} {true_temperature}: no threshold in {none} of {draws}");
        }
    }

    #[test]
    fn a_small_set_is_called_small() {
        let all = cases(&mut Random(3), 40, 0.1);
        let fit = fit(&all, Promise::Accuracy(0.99), 0.9);
        let Err(Broken::TooSmall { cases: 40, needed }) = fit.chosen else { panic!("{:?}", fit.chosen) };
        // Exactly so many flawless cases do.
        let flawless = Case { scores: Some(Scores::Anomaly { score: 9.0, threshold: 1.0 }), truth: 1 };
        for (n, enough) in [(needed, true), (needed - 1, false)] {
            let fit = super::fit(&vec![flawless.clone(); n], Promise::Accuracy(0.99), 0.9);
            assert_eq!(fit.chosen.is_ok(), enough, "{n} cases: {:?}", fit.chosen);
        }
    }

    #[test]
    fn a_model_that_is_not_good_enough_gets_no_threshold() {
        let mut random = Random(5);
        let fit = fit(&cases(&mut random, 2000, 20.0), Promise::Accuracy(0.95), 0.9);
        assert!(matches!(fit.chosen, Err(Broken::NotShown { .. })), "{:?}", fit.chosen);
    }

    #[test]
    fn what_the_model_refuses_goes_up() {
        let mut all = cases(&mut Random(9), 400, 1.0);
        all.iter_mut().step_by(4).for_each(|case| case.scores = None);
        let fit = fit(&all, Promise::MaxUp(0.5), 0.9);
        assert!(fit.chosen.as_ref().is_ok_and(|point| (0.25..0.5).contains(&point.up)), "{:?}", fit.chosen);
        let none = super::fit(&all, Promise::MaxUp(0.2), 0.9);
        assert!(none.chosen.is_err(), "{:?}", none.chosen);
    }
}
