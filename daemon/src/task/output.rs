//! A model's outputs → the answer that the task promises.

use super::Prepared;
use super::tensor::Elements;
use crate::engine::package::{Activation, OutputKind, Package};
use crate::job::{Code, Fault, Output, Ranked, TensorOutput};

/// Labels listed in `top` where the job does not say.
const TOP: usize = 5;

/// The numbers behind an answer, before a temperature makes a confidence of them.
#[derive(Debug, Clone, PartialEq)]
pub enum Scores {
    /// A row of one number a label for each run of the model.
    Classes {
        /// The rows; at least one.
        rows: Vec<Vec<f64>>,
        /// What makes probabilities of them.
        activation: Activation,
    },
    /// A score against its threshold.
    Anomaly {
        /// Reconstruction error.
        score: f64,
        /// The score above which a series is anomalous.
        threshold: f64,
    },
}

impl Scores {
    /// The answer and how sure it is, 0 to 1: the place of its label, or 0 for normal and 1 for anomalous.
    ///
    /// Probabilities are sure by the best one; scores that are none, by the best one's distance from the next.
    pub fn judge(&self, temperature: f64) -> (usize, f64) {
        match self {
            Scores::Classes { rows, activation } => {
                let chances = self.chances(temperature);
                let best = best(&chances);
                let kind = Kind::of(rows, *activation);
                let margin = || rows.iter().map(|row| margin(row, best, temperature)).sum::<f64>() / rows.len() as f64;
                let confidence = match kind {
                    Kind::Logits | Kind::Probabilities => chances[best],
                    // Of labels that do not exclude each other two can be on: the first must be ahead as well.
                    Kind::Independent => chances[best].min(margin()),
                    Kind::Scores => margin(),
                };
                (best, confidence)
            }
            Scores::Anomaly { score, threshold } => {
                (usize::from(score > threshold), distance(*score, *threshold, temperature))
            }
        }
    }

    /// What each label has, the mean over the runs: its probability, or its score where it is none.
    pub fn chances(&self, temperature: f64) -> Vec<f64> {
        match self {
            Scores::Classes { rows, activation } => {
                let kind = Kind::of(rows, *activation);
                let mut mean = vec![0.0; rows[0].len()];
                for row in rows {
                    for (sum, chance) in mean.iter_mut().zip(probabilities(row, kind, temperature)) {
                        *sum += chance / rows.len() as f64;
                    }
                }
                mean
            }
            Scores::Anomaly { score, threshold } => {
                let sure = distance(*score, *threshold, temperature);
                if score > threshold { vec![1.0 - sure, sure] } else { vec![sure, 1.0 - sure] }
            }
        }
    }

    /// Whether [`Scores::chances`] are probabilities of answers that exclude each other.
    pub fn exclusive(&self) -> bool {
        match self {
            Scores::Classes { rows, activation } => {
                matches!(Kind::of(rows, *activation), Kind::Logits | Kind::Probabilities)
            }
            Scores::Anomaly { .. } => true,
        }
    }
}

/// What a classifier's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Through a softmax.
    Logits,
    /// Each through a sigmoid of its own.
    Independent,
    /// The graph has its softmax inside.
    Probabilities,
    /// Anything, the larger the better.
    Scores,
}

impl Kind {
    fn of(rows: &[Vec<f64>], activation: Activation) -> Self {
        // Quantized probabilities miss 1 by up to half a step each.
        let sums = |row: &Vec<f64>| {
            row.iter().all(|x| (0.0..=1.0).contains(x)) && (row.iter().sum::<f64>() - 1.0).abs() <= 0.05
        };
        match activation {
            Activation::Softmax => Kind::Logits,
            Activation::Sigmoid => Kind::Independent,
            Activation::None if rows.iter().all(sums) => Kind::Probabilities,
            Activation::None => Kind::Scores,
        }
    }
}

/// The scores behind the outputs of each run; none where the package's kind of output has none.
///
/// # Errors
/// `internal` where the model gives something else than its package says.
pub fn scores(package: &Package, prepared: &Prepared, runs: &[Vec<TensorOutput>]) -> Result<Option<Scores>, Fault> {
    let wrong = |what: String| Fault::new(Code::Internal, format!("model {}: {what}", package.id()));
    let first: Vec<&TensorOutput> = runs.iter().filter_map(|outputs| outputs.first()).collect();
    if first.is_empty() || first.iter().any(|output| output.data.iter().any(|value| !value.is_finite())) {
        return Err(wrong("its output is not a finite number".to_owned()));
    }
    let manifest = &package.manifest;
    match manifest.output.kind {
        OutputKind::Classes => {
            let n = package.labels.len();
            if let Some(odd) = first.iter().find(|output| output.data.len() != n) {
                return Err(wrong(format!("{} outputs for {n} labels", odd.data.len())));
            }
            let rows = first.iter().map(|output| output.data.clone()).collect();
            Ok(Some(Scores::Classes { rows, activation: manifest.output.activation }))
        }
        OutputKind::Reconstruction => {
            let inputs = match prepared {
                Prepared::Real(inputs) => inputs.as_slice(),
                Prepared::Raw(Elements::F32(input)) => std::slice::from_ref(input),
                Prepared::Raw(_) => return Err(wrong("a reconstruction is compared with real inputs only".to_owned())),
            };
            let error = |(input, output): (&Vec<f32>, &&TensorOutput)| {
                let squares = input.iter().zip(&output.data).map(|(x, y)| (f64::from(*x) - y).powi(2));
                squares.sum::<f64>() / input.len() as f64
            };
            let score = inputs.iter().zip(&first).map(error).sum::<f64>() / inputs.len() as f64;
            Ok(Some(Scores::Anomaly { score, threshold: manifest.output.threshold.unwrap_or(f64::MAX) }))
        }
        _ => Ok(None),
    }
}

/// Reads the outputs of each run of a model. `top_k` is the number of labels to list.
///
/// # Errors
/// `internal` where the model gives something else than its package says.
pub fn read(
    package: &Package,
    prepared: &Prepared,
    runs: &[Vec<TensorOutput>],
    top_k: Option<usize>,
) -> Result<Output, Fault> {
    let temperature = package.manifest.confidence.temperature;
    match scores(package, prepared, runs)? {
        Some(scores @ Scores::Classes { .. }) => {
            let confidence = scores.judge(temperature).1;
            Ok(classes(&package.labels, &scores.chances(temperature), confidence, top_k.unwrap_or(TOP)))
        }
        Some(Scores::Anomaly { score, threshold }) => Ok(anomaly(score, threshold, temperature)),
        None => match package.manifest.output.kind {
            OutputKind::Embedding => {
                Ok(Output::Embedding { embedding: runs[0][0].data.iter().map(|value| *value as f32).collect() })
            }
            OutputKind::Tensor => Ok(Output::Tensors { tensors: runs[0].clone() }),
            _ => {
                let what = "this kind of output cannot be read yet";
                Err(Fault::new(Code::Internal, format!("model {}: {what}", package.id())))
            }
        },
    }
}

/// The place of the largest number; the first of equals.
fn best(numbers: &[f64]) -> usize {
    (0..numbers.len()).reduce(|best, i| if numbers[i] > numbers[best] { i } else { best }).unwrap_or(0)
}

/// The best label, and the best few.
fn classes(labels: &[String], chances: &[f64], confidence: f64, top_k: usize) -> Output {
    let mut top: Vec<Ranked> = labels
        .iter()
        .zip(chances)
        .map(|(label, confidence)| Ranked { label: label.clone(), confidence: *confidence })
        .collect();
    top.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    top.truncate(top_k.max(1));
    Output::Classes { label: top[0].label.clone(), confidence, top }
}

/// A score against its threshold.
pub fn anomaly(score: f64, threshold: f64, temperature: f64) -> Output {
    let confidence = distance(score, threshold, temperature);
    Output::Anomaly { score, threshold, anomalous: score > threshold, confidence }
}

/// How far a score is from its threshold, as a probability: the logistic of their logarithms' distance. At
/// temperature 1 that is the larger one's share of both: 0.5 at the threshold, nearing 1 away from it.
fn distance(score: f64, threshold: f64, temperature: f64) -> f64 {
    if temperature == 1.0 {
        // The same, without rounding.
        return score.max(threshold) / (score + threshold);
    }
    logistic((score.ln() - threshold.ln()).abs() / temperature)
}

/// How far the best label is ahead of the next, as a probability; of one label, how far from 0.
fn margin(row: &[f64], best: usize, temperature: f64) -> f64 {
    let next = row.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, x)| *x).reduce(f64::max);
    logistic((row[best] - next.unwrap_or(0.0)) / temperature)
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A row at a temperature (Guo et al. 2017).
fn probabilities(row: &[f64], kind: Kind, temperature: f64) -> Vec<f64> {
    match kind {
        Kind::Scores => row.to_vec(),
        // What the graph gave, to the last digit.
        Kind::Probabilities if temperature == 1.0 => row.to_vec(),
        Kind::Independent => row.iter().map(|x| logistic(x / temperature)).collect(),
        // A softmax's logits are its logarithms, up to a constant.
        Kind::Probabilities => softmax(&row.iter().map(|p| p.max(1e-12).ln()).collect::<Vec<_>>(), temperature),
        Kind::Logits => softmax(row, temperature),
    }
}

fn softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|x| ((x - most) / temperature).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn softmax_holds_for_large_logits_and_temperatures() {
        for (logits, temperature, expected) in [
            (vec![1000.0, 1000.0], 1.0, vec![0.5, 0.5]),
            (vec![0.0, 2.0_f64.ln()], 1.0, vec![1.0 / 3.0, 2.0 / 3.0]),
            (vec![0.0, 2.0 * 2.0_f64.ln()], 2.0, vec![1.0 / 3.0, 2.0 / 3.0]),
        ] {
            let found = probabilities(&logits, Kind::Logits, temperature);
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-9), "{logits:?} gave {found:?}");
        }
    }

    #[test]
    fn an_anomaly_is_least_sure_at_its_threshold() {
        for temperature in [0.5, 1.0, 2.0] {
            let sure = |score: f64| anomaly(score, 2.0, temperature).confidence().expect("a score has one");
            assert_eq!(sure(2.0), 0.5);
            assert!(sure(6.0) > sure(3.0) && sure(0.5) > sure(1.0));
        }
        // Temperature 1 is the larger one's share, and the formula of the others meets it.
        let sure = |temperature: f64| anomaly(6.0, 2.0, temperature).confidence().expect("a score has one");
        assert_eq!(sure(1.0), 0.75);
        assert!((sure(1.0 + 1e-9) - 0.75).abs() < 1e-6);
        assert!(sure(0.5) > sure(1.0) && sure(2.0) < sure(1.0));
    }

    #[test]
    fn confidence_by_kind_of_output() {
        let of = |rows: Vec<Vec<f64>>, activation| Scores::Classes { rows, activation }.judge(1.0);
        let (ln3, half) = (3.0_f64.ln(), 0.5);
        for (rows, activation, label, confidence) in [
            (vec![vec![0.0, ln3]], Activation::Softmax, 1, 0.75),
            // The mean over the runs.
            (vec![vec![0.0, ln3], vec![0.0, 0.0]], Activation::Softmax, 1, 0.625),
            (vec![vec![0.25, 0.75]], Activation::None, 1, 0.75),
            // No probabilities: the distance of the first two.
            (vec![vec![5.0, 5.0 + ln3, -9.0]], Activation::None, 1, 0.75),
            // Both labels are on: none is ahead.
            (vec![vec![9.0, 9.0]], Activation::Sigmoid, 0, half),
            (vec![vec![ln3, -9.0]], Activation::Sigmoid, 0, 0.75),
            (vec![vec![ln3]], Activation::Sigmoid, 0, 0.75),
        ] {
            let (found, sure) = of(rows.clone(), activation);
            assert_eq!(found, label, "{rows:?}");
            assert!((sure - confidence).abs() < 1e-9, "{rows:?} {activation:?}: {sure}, not {confidence}");
        }
    }

    #[test]
    fn a_softmax_inside_the_graph_takes_a_temperature_too() {
        let logits = vec![vec![1.0, 3.0, -2.0]];
        let inside = vec![softmax(&logits[0], 1.0)];
        let outside = Scores::Classes { rows: logits, activation: Activation::Softmax }.judge(2.5);
        let inside = Scores::Classes { rows: inside, activation: Activation::None }.judge(2.5);
        assert_eq!(outside.0, inside.0);
        assert!((outside.1 - inside.1).abs() < 1e-12);
    }
}
