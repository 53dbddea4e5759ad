//! ONNX file → a plan that tract can run: every dimension fixed, the graph optimised.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::DimLike;
use tract_onnx::tract_core::plan::SimpleState;
use tract_onnx::tract_hir::infer::Factoid;

use super::package::{Dim, Quantization};
use super::quant::operator::Run;
use super::{float, meter, quant};
use crate::job::TensorOutput;
use crate::task::Prepared;
use crate::task::tensor::Elements;

/// What one thread needs to run a plan; it keeps buffers between runs.
pub type State = SimpleState<TypedFact, Box<dyn TypedOp>>;

/// A model that can be run.
#[derive(Debug)]
pub struct Plan {
    runnable: Arc<TypedRunnableModel>,
    /// The one program that the whole model is, if it is: tract's executor would cost a small one a tenth of its time.
    alone: Option<Run>,
    datum: DatumType,
    /// Shape of the model's input.
    pub shape: Vec<usize>,
}

impl Plan {
    /// Reads `path` and optimises it for an input of `shape`. A named first dimension, the batch, is 1.
    ///
    /// # Errors
    /// What does not fit, or what tract cannot read or run.
    pub fn load(path: &Path, shape: &[Dim]) -> Result<Self> {
        let shape: Vec<usize> = shape
            .iter()
            .enumerate()
            .map(|(at, dim)| match dim {
                Dim::Fixed(n) => Ok(*n),
                Dim::Named(_) if at == 0 => Ok(1),
                Dim::Named(name) => bail!("input.shape: `{name}` is dynamic; this version needs its number"),
            })
            .collect::<Result<_>>()?;
        let (model, datum) = quant::load(path, |model| fix(model, &shape))?;
        let alone = Run::alone(&model).cloned();
        let runnable = model.into_runnable()?;
        Ok(Plan { runnable, alone, datum, shape })
    }

    /// Short name of the input's element type.
    pub fn dtype(&self) -> String {
        short(self.datum)
    }

    /// Names of the operators that it runs.
    pub fn operators(&self) -> Vec<String> {
        self.runnable.model().nodes().iter().map(|node| node.op.name().into_owned()).collect()
    }

    /// What a thread needs to run it.
    ///
    /// # Errors
    /// tract's own.
    pub fn state(&self) -> Result<State> {
        self.runnable.spawn()
    }

    /// What runs it, with a `+` between: the instruction set of our integer kernels, `float-` and that of our float
    /// kernels, and `tract` where it keeps matrix products or convolutions.
    pub fn kernels(&self) -> String {
        let nodes = self.runnable.model().nodes();
        let integer = nodes.iter().find_map(|node| node.op_as::<Run>()).map(|run| run.kernels());
        let real = nodes.iter().find_map(|node| node.op_as::<float::rewrite::Run>()).map(|run| run.kernels());
        let heavy = |node: &TypedNode| {
            let name = node.op().name().to_lowercase();
            ["matmul", "conv", "einsum"].iter().any(|part| name.contains(part))
        };
        let mut found: Vec<String> = integer.map(str::to_owned).into_iter().collect();
        found.extend(real.map(|name| format!("float-{name}")));
        if found.is_empty() || nodes.iter().any(heavy) {
            found.push("tract".to_owned());
        }
        found.join("+")
    }

    /// Bytes that a thread's state takes after a run, its scratch memory included.
    ///
    /// # Errors
    /// tract's own.
    pub fn state_bytes(&self) -> Result<u64> {
        let zeros = self.zeros()?;
        // A thread of its own: nothing of an earlier run is lying about to be used again.
        let measure = || {
            let (state, bytes) = meter::left_by(|| -> Result<State> {
                let mut state = self.state()?;
                self.infer(&mut state, zeros.clone())?;
                Ok(state)
            });
            drop(state?);
            Ok(bytes)
        };
        std::thread::scope(|scope| scope.spawn(measure).join()).unwrap_or_else(|_| bail!("it panics on zeros"))
    }

    /// An input of zeros.
    ///
    /// # Errors
    /// tract's own.
    pub fn zeros(&self) -> Result<TValue> {
        Ok(Tensor::zero_dt(self.datum, &self.shape)?.into_tvalue())
    }

    /// The model's input for each prepared vector; `quantize` is applied where it is integer.
    ///
    /// # Errors
    /// A length that is not the shape's.
    pub fn tensors(&self, prepared: &Prepared, quantize: Option<Quantization>) -> Result<Vec<TValue>> {
        let tensors = match prepared {
            Prepared::Real(rows) => {
                rows.iter().map(|row| self.quantized(row, quantize)).collect::<Result<Vec<Tensor>>>()?
            }
            Prepared::Raw(elements) => vec![match elements {
                Elements::F32(data) => Tensor::from_shape(&self.shape, data)?,
                Elements::I8(data) => Tensor::from_shape(&self.shape, data)?,
                Elements::U8(data) => Tensor::from_shape(&self.shape, data)?,
                Elements::I32(data) => Tensor::from_shape(&self.shape, data)?,
                Elements::I64(data) => Tensor::from_shape(&self.shape, data)?,
            }],
        };
        Ok(tensors.into_iter().map(Tensor::into_tvalue).collect())
    }

    /// Runs the model once. The input has the plan's type and shape.
    ///
    /// # Errors
    /// tract's own.
    pub fn infer(&self, state: &mut State, input: TValue) -> Result<TVec<TValue>> {
        match &self.alone {
            Some(run) => run.answer(&[input]),
            None => state.run(tvec!(input)),
        }
    }

    /// Runs the model once for each prepared vector; `quantize` is applied where its input is integer.
    ///
    /// # Errors
    /// A length that is not the shape's, or tract's own.
    pub fn run(
        &self,
        state: &mut State,
        prepared: &Prepared,
        quantize: Option<Quantization>,
    ) -> Result<Vec<Vec<TensorOutput>>> {
        let inputs = self.tensors(prepared, quantize)?.into_iter();
        inputs.map(|input| self.infer(state, input)?.iter().map(|value| read(value)).collect()).collect()
    }

    fn quantized(&self, row: &[f32], quantize: Option<Quantization>) -> Result<Tensor> {
        let steps = |least: f32, most: f32| {
            let q = quantize.context("the model's input is integer, so input.quantize is needed")?;
            // ONNX QuantizeLinear: round half to even, then saturate.
            let step = move |x: &f32| ((x / q.scale).round_ties_even() + q.zero_point as f32).clamp(least, most);
            anyhow::Ok(row.iter().map(step))
        };
        match self.datum.unquantized() {
            DatumType::F32 => Tensor::from_shape(&self.shape, row),
            DatumType::I8 => {
                let data: Vec<i8> = steps(-128.0, 127.0)?.map(|x| x as i8).collect();
                Tensor::from_shape(&self.shape, &data)
            }
            DatumType::U8 => {
                let data: Vec<u8> = steps(0.0, 255.0)?.map(|x| x as u8).collect();
                Tensor::from_shape(&self.shape, &data)
            }
            other => bail!("the model's input is of type {other:?}, which this kind of input cannot make"),
        }
    }
}

/// Gives the graph's one input its shape; the type of its elements.
fn fix(model: &mut InferenceModel, shape: &[usize]) -> Result<DatumType> {
    let inputs = model.input_outlets()?.len();
    ensure!(inputs == 1, "the graph has {inputs} inputs; one is served");
    let declared = model.input_fact(0)?.clone();
    let datum = declared.datum_type.concretize().context("the graph does not say its input's type")?;
    if let Some(rank) = declared.shape.rank().concretize() {
        ensure!(rank as usize == shape.len(), "input.shape has {} dimensions, the graph {rank}", shape.len());
    }
    for (at, dim) in declared.shape.dims().enumerate() {
        if let Some(fixed) = dim.concretize().and_then(|dim| dim.to_usize().ok()) {
            ensure!(
                shape.get(at) == Some(&fixed),
                "input.shape: dimension {at} is {fixed} in the graph, not {:?}",
                shape.get(at)
            );
        }
    }
    // A symbol left in costs four to six times the run.
    model.set_input_fact(0, InferenceFact::dt_shape(datum, shape))?;
    for at in 0..model.output_outlets()?.len() {
        model.set_output_fact(at, InferenceFact::default())?;
    }
    Ok(datum)
}

/// Short name of an element type: `f32`, `i8` …
fn short(datum: DatumType) -> String {
    format!("{:?}", datum.unquantized()).to_lowercase()
}

fn read(value: &Tensor) -> Result<TensorOutput> {
    let numbers = value.cast_to::<f64>()?;
    let data = numbers.to_plain_array_view::<f64>()?.iter().copied().collect();
    Ok(TensorOutput { dtype: short(value.datum_type()), shape: value.shape().to_vec(), data })
}
