//! What takes values one by one, or in pairs.

use tract_onnx::pb::NodeProto;

use super::window::{axis_of, text};
use super::{Grid, Lowered, Lowering, Source, Table, Value, View, floats, integers, known, spread};
use crate::engine::quant::program::Step;

/// Functions of one value.
pub(in crate::engine::quant) const UNARY: [&str; 18] = [
    "Relu",
    "Clip",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "HardSigmoid",
    "HardSwish",
    "Elu",
    "Exp",
    "Abs",
    "Neg",
    "Sqrt",
    "Softplus",
    "Softsign",
    "Mish",
    "Erf",
    "Gelu",
    "Selu",
];

impl Lowering {
    pub(super) fn binary(&mut self, node: &NodeProto) -> Lowered<Value> {
        let (a, b) = (self.value(node, 0)?, self.value(node, 1)?);
        // A bias that comes as an addition.
        if node.op_type == "Add" {
            for (pending, bias) in [(&a, &b), (&b, &a)] {
                if let Value::Pending { source: Source::Linear(linear), low, high } = pending
                    && low.is_infinite()
                    && high.is_infinite()
                    && let Some(shift) = bias_values(bias)?
                {
                    let all = linear.scale.len();
                    let is_bias = match shift.1.iter().rev().position(|dim| *dim != 1) {
                        None => true,
                        // Along the channels, which lie last.
                        Some(from_end) => {
                            let axis = (linear.shape.len() - 1).checked_sub(from_end);
                            axis == linear.order.last().copied() && shift.0.len() == all
                        }
                    };
                    if is_bias {
                        let mut linear = linear.clone();
                        let add = spread(&shift.0, all)?;
                        linear.shift = if linear.shift.is_empty() {
                            add
                        } else {
                            linear.shift.iter().zip(add).map(|(a, b)| a + b).collect()
                        };
                        return Ok(Value::Pending { source: Source::Linear(linear), low: *low, high: *high });
                    }
                }
            }
        }
        if let Some(table) = by_number(&node.op_type, &a, &b)? {
            return Ok(Value::Table(table));
        }
        if node.op_type == "Div" {
            return Err("a quotient".to_owned());
        }
        let (a, b) = (self.operand(a)?, self.operand(b)?);
        self.pair(node.op_type == "Mul", a, b, if node.op_type == "Sub" { -1.0 } else { 1.0 })
    }

    pub(super) fn pair(&mut self, product: bool, a: Table, mut b: Table, sign: f32) -> Lowered<Value> {
        known(&a)?;
        let grid = known(&b)?;
        if sign < 0.0 {
            b.grid = Some(Grid { scale: -grid.scale, ..grid });
        }
        let source = if product { Source::Product(a, b) } else { Source::Sum(a, b) };
        Ok(Value::Pending { source, low: f32::NEG_INFINITY, high: f32::INFINITY })
    }

    /// Both in one shape and order, the smaller one repeated.
    pub(super) fn aligned(&mut self, a: Table, b: Table) -> Lowered<(Table, Table, Vec<usize>, Vec<usize>)> {
        let rank = a.view.shape.len().max(b.view.shape.len());
        let padded = |view: &View| -> Vec<usize> {
            vec![1; rank - view.shape.len()].into_iter().chain(view.shape.iter().copied()).collect()
        };
        let (left, right) = (padded(&a.view), padded(&b.view));
        let shape: Vec<usize> = left.iter().zip(&right).map(|(a, b)| if *a == 1 { *b } else { *a }).collect();
        let fits = |dims: &[usize]| dims.iter().zip(&shape).all(|(dim, all)| dim == all || *dim == 1);
        if !fits(&left) || !fits(&right) {
            return Err("shapes that do not match".to_owned());
        }
        let order = if left == shape && a.view.shape.len() == rank {
            a.view.order.clone()
        } else if right == shape && b.view.shape.len() == rank {
            b.view.order.clone()
        } else {
            (0..rank).collect()
        };
        let mut both = [a, b];
        for table in &mut both {
            if table.view.shape == shape {
                table.view = self.ordered(&table.view.clone(), &order);
                continue;
            }
            let own = table.view.strides();
            let lead = rank - own.len();
            let stride =
                |axis: usize| if axis < lead || table.view.shape[axis - lead] == 1 { 0 } else { own[axis - lead] };
            let slot = self.new_bytes(shape.iter().product());
            let dims = order.iter().map(|axis| shape[*axis]).collect();
            let strides = order.iter().map(|axis| stride(*axis)).collect();
            self.steps.push(Step::Gather { source: table.view.slot, result: slot, dims, strides });
            table.view = View { slot, shape: shape.clone(), order: order.clone() };
        }
        let [a, b] = both;
        Ok((a, b, shape, order))
    }

    /// `old`: over every axis from `axis` on, as before opset 13.
    pub(super) fn softmax(&mut self, x: Value, axis: i64, old: bool) -> Lowered<Value> {
        let view = self.floats_of(x)?;
        let rank = view.shape.len();
        let axis = axis_of(axis, rank)?;
        let plain: Vec<usize> = (0..rank).collect();
        let order = if old { plain } else { (0..rank).filter(|other| *other != axis).chain([axis]).collect() };
        let view = self.ordered_floats(&view, &order);
        let length = if old { view.shape[axis..].iter().product() } else { view.shape[axis] };
        let slot = self.new_floats(view.len());
        self.steps.push(Step::Softmax { source: view.slot, result: slot, length });
        Ok(Value::Floats(View { slot, ..view }))
    }

    pub(super) fn unary(&self, node: &NodeProto) -> Lowered<Box<dyn Fn(f32) -> f32>> {
        let number = |name: &str, or: f32| node.attribute.iter().find(|a| a.name == name).map_or(or, |a| a.f);
        Ok(match node.op_type.as_str() {
            "Relu" => Box::new(|x| x.max(0.0)),
            "Clip" => {
                let end = |at: usize, name: &str, or: f32| -> Lowered<f32> {
                    if !self.has(node, at) {
                        return Ok(number(name, or));
                    }
                    match self.value(node, at)? {
                        Value::Constant(tensor) => {
                            floats(&tensor)?.first().copied().ok_or_else(|| "an empty limit".to_owned())
                        }
                        Value::Integers(limit) => {
                            let value = *integers(&limit.tensor)?.first().ok_or("an empty limit")?;
                            Ok((value - limit.zero[0]) as f32 * limit.scale[0])
                        }
                        _ => Err("a limit that is not constant".to_owned()),
                    }
                };
                let (low, high) = (end(1, "min", f32::NEG_INFINITY)?, end(2, "max", f32::INFINITY)?);
                Box::new(move |x| x.max(low).min(high))
            }
            "LeakyRelu" => {
                let alpha = number("alpha", 0.01);
                Box::new(move |x| if x < 0.0 { alpha * x } else { x })
            }
            "Sigmoid" => Box::new(|x| 1.0 / (1.0 + (-x).exp())),
            "Tanh" => Box::new(f32::tanh),
            "HardSigmoid" => {
                let (alpha, beta) = (number("alpha", 0.2), number("beta", 0.5));
                Box::new(move |x| (alpha * x + beta).clamp(0.0, 1.0))
            }
            "HardSwish" => Box::new(|x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
            "Elu" => {
                let alpha = number("alpha", 1.0);
                Box::new(move |x| if x < 0.0 { alpha * x.exp_m1() } else { x })
            }
            "Exp" => Box::new(f32::exp),
            "Abs" => Box::new(f32::abs),
            "Neg" => Box::new(|x| -x),
            "Sqrt" => Box::new(f32::sqrt),
            "Softplus" => Box::new(|x| x.max(0.0) + (-x.abs()).exp().ln_1p()),
            "Softsign" => Box::new(|x| x / (1.0 + x.abs())),
            "Mish" => Box::new(|x| x * (x.max(0.0) + (-x.abs()).exp().ln_1p()).tanh()),
            "Erf" => Box::new(libm::erff),
            "Gelu" if text(node, "approximate") == "tanh" => Box::new(|x| {
                let root = (2.0 / std::f32::consts::PI).sqrt();
                0.5 * x * (1.0 + (root * (x + 0.044_715 * x * x * x)).tanh())
            }),
            "Gelu" => Box::new(|x| 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))),
            "Selu" => {
                let (alpha, gamma) = (number("alpha", 1.673_263_2), number("gamma", 1.050_701));
                Box::new(move |x| if x > 0.0 { gamma * x } else { gamma * alpha * x.exp_m1() })
            }
            other => return Err(format!("{other} is not lowered")),
        })
    }
}

/// Values and shape of a constant that may be a bias.
fn bias_values(value: &Value) -> Lowered<Option<(Vec<f32>, Vec<usize>)>> {
    Ok(match value {
        Value::Constant(tensor) => Some((floats(tensor)?, tensor.shape().to_vec())),
        Value::Integers(bias) if bias.scale.len() == 1 || bias.tensor.rank() == 1 => {
            let values = integers(&bias.tensor)?;
            let (scale, zero) = (spread(&bias.scale, values.len())?, spread(&bias.zero, values.len())?);
            let values = values.iter().enumerate().map(|(i, x)| (x - zero[i]) as f32 * scale[i]).collect();
            Some((values, bias.tensor.shape().to_vec()))
        }
        _ => None,
    })
}

/// What a table becomes with one number added to it, or multiplied by it.
fn by_number(op: &str, a: &Value, b: &Value) -> Lowered<Option<Table>> {
    let one = |value: &Value, rank: usize| -> Lowered<Option<f32>> {
        Ok(bias_values(value)?.filter(|(values, shape)| values.len() == 1 && shape.len() <= rank).map(|(x, _)| x[0]))
    };
    let (table, number, turned) = match (a, b) {
        (Value::Table(table), other) => (table, one(other, table.view.shape.len())?, false),
        (other, Value::Table(table)) => (table, one(other, table.view.shape.len())?, true),
        _ => return Ok(None),
    };
    let Some(number) = number else { return Ok(None) };
    let of = |x: f32| {
        let (a, b) = if turned { (number, x) } else { (x, number) };
        match op {
            "Add" => a + b,
            "Sub" => a - b,
            "Mul" => a * b,
            _ => a / b,
        }
    };
    let values = Box::new(std::array::from_fn(|byte| of(table.values[byte])));
    if values.iter().any(|x: &f32| x.is_nan()) {
        return Err("what is no number".to_owned());
    }
    Ok(Some(Table { values, grid: None, ..table.clone() }))
}
