//! Quantization whose scale and zero point are known when the values are.

use tract_onnx::prelude::*;

use super::{Factor, Grid, Integers, Linear, Lowered, Lowering, Value, View, known, offset};
use crate::engine::quant::program::{Finish, Step};

impl Lowering {
    /// Floats to bytes by their own range.
    pub(super) fn ranged(&mut self, value: Value) -> Lowered<Value> {
        let view = self.floats_of(value)?;
        let (slot, numbers) = (self.new_bytes(view.len()), self.new_floats(2));
        self.steps.push(Step::Range { source: view.slot, result: slot, numbers });
        Ok(Value::Dynamic(View { slot, ..view }, numbers))
    }

    /// A value that can be multiplied as integers.
    pub(super) fn factor(&mut self, value: Value) -> Lowered<Factor> {
        match value {
            Value::Dynamic(view, numbers) => {
                Ok(Factor { view, grid: Grid { scale: 1.0, zero: 0 }, dynamic: Some(numbers) })
            }
            value => {
                let table = self.operand(value)?;
                Ok(Factor { grid: known(&table)?, view: table.view, dynamic: None })
            }
        }
    }

    /// Quantized bytes of a known scale, of a constant too.
    pub(super) fn operand(&mut self, value: Value) -> Lowered<super::Table> {
        match value {
            Value::Integers(Integers { tensor, scale, zero, .. }) => {
                let ([scale], [zero]) = (&scale[..], &zero[..]) else {
                    return Err("a constant with many scales".to_owned());
                };
                let datum = tensor.datum_type();
                if datum != u8::datum_type() && datum != i8::datum_type() {
                    return Err(format!("a constant of {datum:?}"));
                }
                let grid = Grid { scale: *scale, zero: zero + offset(datum) };
                self.dequantized(Value::Constant(tensor), grid, datum)
            }
            value => self.table(value),
        }
    }

    /// A layer, for each image of a batch, whose source may have a scale of its run.
    pub(super) fn layer(&mut self, linear: Linear, finish: Finish, by: f32) -> Lowered<View> {
        let (images, floats) = (linear.images, matches!(finish, Finish::Floats { .. }));
        let (shape, order) = (linear.shape.clone(), linear.order.clone());
        let sizes = [linear.x.len() / images.max(1), shape.iter().product::<usize>() / images.max(1)];
        let slot = self.images(images, linear.x.slot, sizes, floats, |lowering, slot| {
            let mut linear = linear;
            linear.x.slot = slot;
            if images > 1 {
                linear.shape = vec![sizes[1]];
            }
            let Some(numbers) = linear.dynamic else { return Ok(lowering.linear(linear, finish, by)?.slot) };
            if !floats {
                return Err("a scale of the run, and quantized".to_owned());
            }
            // The place of the bias has the sums of the weights: each is to be taken off as often as the zero point
            // is, which is known when the layer runs.
            let all = linear.scale.len();
            let per = linear.weights.len() / all;
            linear.bias = linear.weights.chunks_exact(per).map(|of| of.iter().sum()).collect();
            let view = lowering.linear(linear, finish, by)?;
            let layer = lowering.steps.pop().ok_or("no layer")?;
            lowering.steps.push(Step::Scaled { numbers, layer: Box::new(layer) });
            Ok(view.slot)
        })?;
        Ok(View { slot, shape, order })
    }
}
