//! A model's outputs → the answer that the task promises.

use super::Prepared;
use super::tensor::Elements;
use crate::engine::package::{Activation, OutputKind, Package};
use crate::job::{Code, Fault, Output, Ranked, TensorOutput};

/// Labels listed in `top` where the job does not say.
const TOP: usize = 5;

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
            let mut mean = vec![0.0; n];
            for output in &first {
                let chances = probabilities(&output.data, manifest.output.activation, manifest.confidence.temperature);
                for (sum, chance) in mean.iter_mut().zip(chances) {
                    *sum += chance / first.len() as f64;
                }
            }
            Ok(classes(&package.labels, &mean, top_k.unwrap_or(TOP)))
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
            Ok(anomaly(score, manifest.output.threshold.unwrap_or(f64::MAX)))
        }
        OutputKind::Embedding => {
            Ok(Output::Embedding { embedding: first[0].data.iter().map(|value| *value as f32).collect() })
        }
        OutputKind::Tensor => Ok(Output::Tensors { tensors: runs[0].clone() }),
        OutputKind::Boxes | OutputKind::Tokens => Err(wrong("this kind of output cannot be read yet".to_owned())),
    }
}

/// The best label, and the best few.
fn classes(labels: &[String], chances: &[f64], top_k: usize) -> Output {
    let mut top: Vec<Ranked> = labels
        .iter()
        .zip(chances)
        .map(|(label, confidence)| Ranked { label: label.clone(), confidence: *confidence })
        .collect();
    top.sort_by(|a, b| b.confidence.total_cmp(&a.confidence));
    top.truncate(top_k.max(1));
    Output::Classes { label: top[0].label.clone(), confidence: top[0].confidence, top }
}

/// A score against its threshold. The confidence is the larger one's share of both: 0.5 at the
/// threshold, nearing 1 away from it.
pub fn anomaly(score: f64, threshold: f64) -> Output {
    let confidence = score.max(threshold) / (score + threshold);
    Output::Anomaly { score, threshold, anomalous: score > threshold, confidence }
}

/// Logits at a temperature (Guo et al. 2017) through the activation.
fn probabilities(outputs: &[f64], activation: Activation, temperature: f64) -> Vec<f64> {
    match activation {
        Activation::None => outputs.to_vec(),
        Activation::Sigmoid => outputs.iter().map(|x| 1.0 / (1.0 + (-x / temperature).exp())).collect(),
        Activation::Softmax => {
            let most = outputs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = outputs.iter().map(|x| ((x - most) / temperature).exp()).collect();
            let sum: f64 = powers.iter().sum();
            powers.into_iter().map(|power| power / sum).collect()
        }
    }
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
            let found = probabilities(&logits, Activation::Softmax, temperature);
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-9), "{logits:?} gave {found:?}");
        }
    }

    #[test]
    fn an_anomaly_is_least_sure_at_its_threshold() {
        assert_eq!(anomaly(2.0, 2.0).confidence(), Some(0.5));
        assert!(anomaly(6.0, 2.0).confidence() > anomaly(3.0, 2.0).confidence());
        assert!(anomaly(0.5, 2.0).confidence() > anomaly(1.0, 2.0).confidence());
    }
}
