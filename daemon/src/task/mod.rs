//! What is done to an input before a model, and to its outputs after: one file a kind.
//!
//! Nothing here knows how a model is run; vectors of real numbers go in and come out.

use crate::engine::package::{InputKind, InputSpec, Layout};
use crate::job::{Code, Fault, Input};

pub mod image;
pub mod output;
pub mod series;
pub mod tensor;
pub mod text;

/// An input, ready for a model.
#[derive(Debug, Clone, PartialEq)]
pub enum Prepared {
    /// One flat vector of real values for each run of the model; at least one.
    Real(Vec<Vec<f32>>),
    /// Elements as they are, for a model that is asked with tensors.
    Raw(tensor::Elements),
}

/// How inputs are made ready for one model: its `[input]`, with tables computed once.
#[derive(Debug)]
pub struct Preparation {
    spec: InputSpec,
    shape: Vec<usize>,
    dtype: String,
    spectrum: Option<series::Spectrum>,
}

impl Preparation {
    /// Checks `spec` against the model's own input: its `shape` and the short name of its `dtype`.
    ///
    /// # Errors
    /// What does not fit, naming the key.
    pub fn new(spec: &InputSpec, shape: Vec<usize>, dtype: &str) -> Result<Self, String> {
        let elements: usize = shape.iter().product();
        let fit = |key: &str, wanted: usize| {
            if wanted == elements {
                Ok(())
            } else {
                Err(format!("input.{key}: makes {wanted} values, but input.shape {shape:?} holds {elements}"))
            }
        };
        match spec.kind {
            InputKind::Image => {
                let [width, height] = spec.size.unwrap_or_default().map(|side| side as usize);
                let channels = spec.channels.unwrap_or(3);
                let wanted = match spec.layout {
                    Layout::Nchw => [channels, height, width],
                    Layout::Nhwc => [height, width, channels],
                };
                if !shape.ends_with(&wanted) {
                    return Err(format!("input.size: {wanted:?} in this layout does not fit input.shape {shape:?}"));
                }
                fit("size", channels * width * height)?;
                per_channel(spec, channels)?;
            }
            InputKind::Series => {
                let values = series::values(spec);
                fit("window", values)?;
                per_channel(spec, if spec.bands.is_some() { values } else { spec.channels.unwrap_or(1) })?;
            }
            InputKind::Text | InputKind::Tensor | InputKind::Audio => {}
        }
        Ok(Preparation { spectrum: series::Spectrum::new(spec), spec: spec.clone(), shape, dtype: dtype.to_owned() })
    }

    /// Whether `input` is of the right kind and within the model's declared limits: what can be told
    /// without decoding it.
    ///
    /// # Errors
    /// `bad_request` for another kind of input, `input_out_of_range` for a limit.
    pub fn check(&self, input: &Input) -> Result<(), Fault> {
        let wanted = self.spec.kind.as_str();
        // A tensor goes to any model: it is the model's own input, prepared elsewhere.
        if input.kind() != wanted && !matches!(input, Input::Tensor(_)) {
            let message = format!("the input is of the kind `{}`, this model takes `{wanted}`", input.kind());
            return Err(Fault::bad(&format!("input.{}", input.kind()), message).limit(wanted));
        }
        match input {
            Input::Series(rows) => series::check(&self.spec, rows),
            Input::Text(text) => text::check(&self.spec, text),
            Input::Tensor(tensor) => tensor::check(tensor, &self.dtype, &self.shape),
            Input::Image(_) | Input::Audio(_) => Ok(()),
        }
    }

    /// Makes `input` ready.
    ///
    /// # Errors
    /// As [`Preparation::check`], and `bad_request` for what cannot be decoded.
    pub fn prepare(&self, input: &Input) -> Result<Prepared, Fault> {
        self.check(input)?;
        match input {
            Input::Image(bytes) => Ok(Prepared::Real(vec![image::prepare(&self.spec, bytes)?])),
            Input::Series(rows) => Ok(Prepared::Real(series::prepare(&self.spec, self.spectrum.as_ref(), rows))),
            Input::Text(text) => {
                let buckets = self.shape.iter().product();
                Ok(Prepared::Real(vec![text::prepare(&self.spec, buckets, text)]))
            }
            Input::Tensor(tensor) => Ok(Prepared::Raw(tensor::prepare(tensor, &self.dtype, &self.shape)?)),
            Input::Audio(_) => Err(Fault::new(Code::AboveCapability, "audio is not prepared by this version")),
        }
    }

    /// How many times the model will run for `input`.
    pub fn runs(&self, input: &Input) -> usize {
        match input {
            Input::Series(rows) => series::windows(&self.spec, rows.len()).max(1),
            _ => 1,
        }
    }
}

/// `mean` and `std` hold no, one, or `n` values.
fn per_channel(spec: &InputSpec, n: usize) -> Result<(), String> {
    for (key, values) in [("mean", &spec.mean), ("std", &spec.std)] {
        if values.len() > 1 && values.len() != n {
            return Err(format!("input.{key}: {} values, where 1 or {n} are needed", values.len()));
        }
    }
    Ok(())
}

/// `(value - mean) / std`, for the value of channel (or band) `i`.
fn standardise(spec: &InputSpec, i: usize, value: f32) -> f32 {
    let pick = |values: &[f32], default| match values {
        [] => default,
        [one] => *one,
        many => many[i],
    };
    (value - pick(&spec.mean, 0.0)) / pick(&spec.std, 1.0)
}
