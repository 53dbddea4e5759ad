//! Quantizing and dequantizing where it is left to tract: operators that tract runs and does not look into.
//!
//! tract's own ones are folded together with what lies between them, whatever that is, and multiply by the
//! reciprocal of a scale, which rounds to other steps than ONNX's division.

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_hir::internal::*;

/// Name of the operator that quantizes by the range of what it is given, and dequantizes again.
pub const DYNAMIC: &str = "OutpostDynamic";

/// Puts the operators in the place of tract's.
pub fn register(onnx: &mut Onnx) {
    onnx.op_register.insert("QuantizeLinear", parse);
    onnx.op_register.insert("DequantizeLinear", parse);
    onnx.op_register.insert("DynamicQuantizeLinear", parse);
    onnx.op_register.insert(DYNAMIC, parse);
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Plain {
    /// Floats, scale and zero point to integers of a type.
    Quantize { axis: i64, datum: DatumType },
    /// Integers, scale and zero point to floats.
    Dequantize { axis: i64 },
    /// Floats to bytes, their scale and zero point.
    Dynamic,
    /// Floats to the floats that the bytes stand for.
    DynamicBack,
}

fn parse(_: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let axis = node.get_attr_opt::<i64>("axis")?.unwrap_or(1);
    let blocked = node.get_attr_opt::<i64>("block_size")?.unwrap_or(0) != 0;
    ensure!(!blocked, "{}: scales for blocks are not supported", node.op_type);
    let op = match node.op_type.as_str() {
        "QuantizeLinear" => Plain::Quantize { axis, datum: u8::datum_type() },
        "DequantizeLinear" => Plain::Dequantize { axis },
        "DynamicQuantizeLinear" => Plain::Dynamic,
        _ => Plain::DynamicBack,
    };
    Ok((expand(op), vec![]))
}

impl Expansion for Plain {
    fn name(&self) -> StaticName {
        "OutpostPlain".into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(if *self == Plain::Dynamic { 3 } else { 1 })
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        s.equals(&outputs[0].shape, &inputs[0].shape)?;
        match self {
            Plain::Quantize { datum, .. } => match inputs.get(2) {
                Some(zero) => s.equals(&outputs[0].datum_type, &zero.datum_type),
                None => s.equals(&outputs[0].datum_type, *datum),
            },
            Plain::Dynamic => {
                s.equals(&outputs[0].datum_type, u8::datum_type())?;
                s.equals(&outputs[1].datum_type, f32::datum_type())?;
                s.equals(&outputs[1].rank, 0)?;
                s.equals(&outputs[2].datum_type, u8::datum_type())?;
                s.equals(&outputs[2].rank, 0)
            }
            _ => s.equals(&outputs[0].datum_type, f32::datum_type()),
        }
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let mut op = self.clone();
        if let (Plain::Quantize { datum, .. }, Some(zero)) = (&mut op, inputs.get(2)) {
            *datum = model.outlet_fact(*zero)?.datum_type;
        }
        model.wire_node(prefix, op, inputs)
    }
}

impl Op for Plain {
    fn name(&self) -> StaticName {
        match self {
            Plain::Quantize { .. } => "OutpostQuantize".into(),
            Plain::Dequantize { .. } => "OutpostDequantize".into(),
            Plain::Dynamic => "OutpostDynamicQuantize".into(),
            Plain::DynamicBack => DYNAMIC.into(),
        }
    }
    op_as_typed_op!();
}

impl EvalOp for Plain {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let zero = inputs.get(2).map(|zero| &**zero);
        match self {
            Plain::Quantize { axis, datum } => {
                Ok(tvec!(quantize(&inputs[0], &inputs[1], zero, *axis, *datum)?.into_tvalue()))
            }
            Plain::Dequantize { axis } => Ok(tvec!(dequantize(&inputs[0], &inputs[1], zero, *axis)?.into_tvalue())),
            Plain::Dynamic => {
                let x = inputs[0].try_as_plain_ram()?.as_slice::<f32>()?;
                let (scale, zero) = range(x);
                let bytes: Vec<u8> = x.iter().map(|x| step(*x, scale, zero) as u8).collect();
                let bytes = Tensor::from_shape(inputs[0].shape(), &bytes)?;
                Ok(tvec!(bytes.into_tvalue(), tensor0(scale).into_tvalue(), tensor0(zero as u8).into_tvalue()))
            }
            Plain::DynamicBack => {
                let x = inputs[0].try_as_plain_ram()?.as_slice::<f32>()?;
                let (scale, zero) = range(x);
                let back: Vec<f32> = x.iter().map(|x| (step(*x, scale, zero) - zero) * scale).collect();
                Ok(tvec!(Tensor::from_shape(inputs[0].shape(), &back)?.into_tvalue()))
            }
        }
    }
}

impl TypedOp for Plain {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let datum = match self {
            Plain::Quantize { datum, .. } => *datum,
            Plain::Dynamic => u8::datum_type(),
            _ => f32::datum_type(),
        };
        let mut facts = tvec!(datum.fact(inputs[0].shape.clone()));
        if *self == Plain::Dynamic {
            facts.push(f32::fact([0; 0]));
            facts.push(u8::fact([0; 0]));
        }
        Ok(facts)
    }
    as_op!();
}

/// ONNX's scale and zero point, between 0 and 255, for values between the least and the greatest of `x` and 0.
pub fn range(x: &[f32]) -> (f32, f32) {
    let low = x.iter().fold(0.0_f32, |low, x| low.min(*x));
    let high = x.iter().fold(0.0_f32, |high, x| high.max(*x));
    // What is nothing but 0 has no range.
    let scale = if high == low { 1.0 } else { (high - low) / 255.0 };
    (scale, (-low / scale).clamp(0.0, 255.0).round_ties_even())
}

fn step(x: f32, scale: f32, zero: f32) -> f32 {
    ((x / scale).round_ties_even() + zero).clamp(0.0, 255.0)
}

/// Which of several scales each element has.
fn places(shape: &[usize], axis: i64, n: usize) -> TractResult<impl Fn(usize) -> usize + use<>> {
    let (mut inner, mut dim) = (1, 1);
    if n != 1 {
        let axis = usize::try_from(if axis < 0 { axis + shape.len() as i64 } else { axis })?;
        ensure!(shape.get(axis) == Some(&n), "{n} scales for axis {axis} of {shape:?}");
        (inner, dim) = (shape[axis + 1..].iter().product(), n);
    }
    Ok(move |at: usize| at / inner % dim)
}

fn zeros(zero: Option<&Tensor>, n: usize) -> TractResult<Vec<f32>> {
    let Some(zero) = zero else { return Ok(vec![0.0; n]) };
    let zero = zero.cast_to::<f32>()?;
    let zero = zero.try_as_plain_ram()?.as_slice::<f32>()?;
    ensure!(zero.len() == n || zero.len() == 1, "{} zero points for {n} scales", zero.len());
    Ok((0..n).map(|at| zero[at % zero.len()]).collect())
}

/// ONNX's QuantizeLinear to `datum`.
///
/// # Errors
/// Shapes that do not match, or a type that is not an integer's of at most 16 bits.
pub fn quantize(x: &Tensor, scale: &Tensor, zero: Option<&Tensor>, axis: i64, datum: DatumType) -> TractResult<Tensor> {
    let (x, scale) = (x.cast_to::<f32>()?, scale.cast_to::<f32>()?);
    let scale = scale.try_as_plain_ram()?.as_slice::<f32>()?;
    let zero = zeros(zero, scale.len())?;
    let (low, high) = match datum {
        DatumType::U8 => (0.0, 255.0),
        DatumType::I8 => (-128.0, 127.0),
        DatumType::U16 => (0.0, 65535.0),
        DatumType::I16 => (-32768.0, 32767.0),
        other => bail!("quantizing to {other:?} is not supported"),
    };
    let place = places(x.shape(), axis, scale.len())?;
    let data = x.try_as_plain_ram()?.as_slice::<f32>()?.iter().enumerate();
    let data: Vec<f32> =
        data.map(|(at, x)| ((x / scale[place(at)]).round_ties_even() + zero[place(at)]).clamp(low, high)).collect();
    Ok(Tensor::from_shape(x.shape(), &data)?.cast_to_dt(datum)?.into_owned())
}

fn dequantize(x: &Tensor, scale: &Tensor, zero: Option<&Tensor>, axis: i64) -> TractResult<Tensor> {
    let scale = scale.cast_to::<f32>()?;
    let scale = scale.try_as_plain_ram()?.as_slice::<f32>()?;
    let zero = zeros(zero, scale.len())?;
    let place = places(x.shape(), axis, scale.len())?;
    let numbers = x.cast_to::<i32>()?;
    let data = numbers.try_as_plain_ram()?.as_slice::<i32>()?.iter().enumerate();
    let data: Vec<f32> =
        data.map(|(at, x)| (x.wrapping_sub(zero[place(at)] as i32)) as f32 * scale[place(at)]).collect();
    Tensor::from_shape(x.shape(), &data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_zero() {
        for (x, scale, zero) in [
            (vec![0.0, 2.0, -3.0], 5.0 / 255.0, 153.0),
            (vec![-1.0, -4.0], 4.0 / 255.0, 255.0),
            (vec![1.0, 4.0], 4.0 / 255.0, 0.0),
            (vec![0.0, 0.0], 1.0, 0.0),
            (vec![], 1.0, 0.0),
        ] {
            assert_eq!(range(&x), (scale, zero), "{x:?}");
        }
    }

    #[test]
    fn what_is_quantized_is_divided_rounded_to_even_and_saturated() -> TractResult<()> {
        let x = tensor2(&[[0.5_f32, 1.5, 2.5, -1e9], [0.5, 1.5, 2.5, 1e9]]);
        let scale = tensor1(&[1.0_f32, 0.5]);
        let bytes = quantize(&x, &scale, Some(&tensor1(&[0_i8, 10])), 0, i8::datum_type())?;
        assert_eq!(bytes, tensor2(&[[0_i8, 2, 2, -128], [11, 13, 15, 127]]));
        let back = dequantize(&bytes, &scale, Some(&tensor1(&[0_i8, 10])), -2)?;
        assert_eq!(back, tensor2(&[[0.0_f32, 2.0, 2.0, -128.0], [0.5, 1.5, 2.5, 58.5]]));
        assert!(quantize(&x, &scale, None, 1, u8::datum_type()).is_err(), "two scales for four columns");
        Ok(())
    }
}
