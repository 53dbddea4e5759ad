//! One model, ready to answer: a package with one of its variants loaded and its preparation.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::load::{Plan, State};
use super::package::{Expect, Package, VariantSpec};
use crate::intake::bare;
use crate::job::{Code, Fault, Input, Output};
use crate::task::{Preparation, output};

/// A loaded variant of a package.
#[derive(Debug)]
pub struct Model {
    /// The package that it comes from.
    pub package: Package,
    /// The variant that runs.
    pub variant: VariantSpec,
    plan: Plan,
    preparation: Preparation,
    /// Distinguishes loaded models, so that a thread finds its state for this one.
    serial: u64,
    /// Microseconds of one run, smoothed; 0: not yet measured.
    smoothed_us: AtomicU64,
}

/// States of the models that a thread has run.
pub type States = HashMap<u64, State>;

impl Model {
    /// Loads one variant.
    ///
    /// # Errors
    /// One sentence that names the file or key.
    pub fn load(package: Package, variant: &VariantSpec) -> Result<Self, String> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let spec = &package.manifest.input;
        let plan = Plan::load(&package.path(&variant.file), &spec.shape)
            .map_err(|error| format!("{}: {error:#}", variant.file))?;
        let dtype = plan.dtype();
        let preparation = Preparation::new(spec, plan.shape.clone(), &dtype)?;
        Ok(Model {
            variant: variant.clone(),
            preparation,
            plan,
            package,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            smoothed_us: AtomicU64::new(0),
        })
    }

    /// `name@version`.
    pub fn id(&self) -> String {
        self.package.id()
    }

    /// Whether the input is one that this model can be asked about.
    ///
    /// # Errors
    /// As [`Preparation::check`].
    pub fn check(&self, input: &Input) -> Result<(), Fault> {
        self.preparation.check(input)
    }

    /// How long an answer for `input` will take, by what was measured.
    pub fn estimate(&self, input: &Input) -> Duration {
        let one = self.smoothed_us.load(Ordering::Relaxed);
        Duration::from_micros(one.saturating_mul(self.preparation.runs(input) as u64))
    }

    /// Answers `input`, in the calling thread.
    ///
    /// # Errors
    /// As [`Preparation::prepare`]; `internal` where the model fails.
    pub fn answer(&self, states: &mut States, input: &Input, top_k: Option<usize>) -> Result<Output, Fault> {
        let started = Instant::now();
        let failed = |error: anyhow::Error| {
            tracing::error!(model = self.id(), "run failed: {error:#}");
            Fault::new(Code::Internal, format!("model {} failed on this input", self.id()))
        };
        let prepared = self.preparation.prepare(input)?;
        let state = match states.entry(self.serial) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(self.plan.state().map_err(failed)?),
        };
        let runs = self.plan.run(state, &prepared, self.package.manifest.input.quantize).map_err(failed)?;
        let output = output::read(&self.package, &prepared, &runs, top_k)?;
        self.measured(started.elapsed(), runs.len());
        Ok(output)
    }

    /// Exponential smoothing, a fifth of the weight to the newest.
    fn measured(&self, took: Duration, runs: usize) {
        let one = (took.as_micros() as u64 / runs.max(1) as u64).max(1);
        let smooth = |old: u64| Some(if old == 0 { one } else { (old * 4 + one) / 5 });
        let _ = self.smoothed_us.fetch_update(Ordering::Relaxed, Ordering::Relaxed, smooth);
    }

    /// Runs the package's golden cases.
    ///
    /// # Errors
    /// Names the case, what was expected and what came.
    pub fn prove(&self, states: &mut States) -> Result<(), String> {
        for case in &self.package.manifest.golden {
            let wrong = |what: String| format!("golden {} ({}): {what}", case.input, self.variant.file);
            let input = sample(&self.package.path(&case.input)).map_err(wrong)?;
            let found = self.answer(states, &input, None).map_err(|fault| wrong(fault.message))?;
            match (&case.expect, &found) {
                (Expect::Label(expected), _) => {
                    let found = verdict(&found).unwrap_or("no label");
                    if found != expected {
                        return Err(wrong(format!("expected {expected}, found {found}")));
                    }
                }
                (Expect::Numbers(expected), Output::Tensors { tensors }) => {
                    close(expected, &tensors[0].data, case.tolerance).map_err(wrong)?;
                }
                (Expect::Numbers(expected), Output::Embedding { embedding }) => {
                    let found: Vec<f64> = embedding.iter().map(|value| f64::from(*value)).collect();
                    close(expected, &found, case.tolerance).map_err(wrong)?;
                }
                (Expect::Numbers(_), _) => return Err(wrong("numbers are expected of a label".to_owned())),
            }
        }
        Ok(())
    }
}

/// The word that an answer comes down to: its label, or `normal` or `anomalous`.
pub fn verdict(output: &Output) -> Option<&str> {
    match output {
        Output::Classes { label, .. } => Some(label),
        Output::Anomaly { anomalous, .. } => Some(if *anomalous { "anomalous" } else { "normal" }),
        _ => None,
    }
}

/// A golden case's input, by its file's ending.
fn sample(path: &Path) -> Result<Input, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    bare::by_ending(ending, bytes).map_err(|fault| fault.message)
}

fn close(expected: &[f64], found: &[f64], tolerance: Option<f64>) -> Result<(), String> {
    if expected.len() != found.len() {
        return Err(format!("{} numbers were expected, {} found", expected.len(), found.len()));
    }
    let most = expected.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    let tolerance = tolerance.unwrap_or(most * 1e-3);
    match expected.iter().zip(found).position(|(a, b)| (a - b).abs() > tolerance) {
        None => Ok(()),
        Some(at) => Err(format!("number {at}: expected {}, found {}", expected[at], found[at])),
    }
}
