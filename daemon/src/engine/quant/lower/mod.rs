//! ONNX nodes → a [`Program`]: what is quantized stays bytes from layer to layer.
//!
//! A float between a `DequantizeLinear` and a `QuantizeLinear` is never computed where it need not be. It is a
//! [`Value`]: bytes seen through a table, or a layer whose sums are still to be rounded. The `QuantizeLinear` that
//! ends it decides the rounding, as onnxruntime's fused operators do.

mod dynamic;
mod pack;
pub(super) mod pointwise;
mod pool;
mod product;
pub(super) mod shape;
mod window;

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;

use super::kernel::{self, Requant, SIGNED};
use super::plain;
use super::program::{Finish, Program, Slot, Step, Window, round, value};
use pack::Numbers;
use pool::Mean;
use product::Pair;
use shape::concat;

/// Why a node cannot be lowered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{node}: {why}")]
pub struct Refused {
    /// First output of the node.
    pub node: String,
    /// The reason.
    pub why: String,
}

type Lowered<T> = Result<T, String>;

/// Nodes that become one operator, with what they take and give.
#[derive(Debug, Clone)]
pub struct Body {
    /// In topological order.
    pub nodes: Vec<NodeProto>,
    /// Constants, by name.
    pub constants: HashMap<String, Arc<Tensor>>,
    /// Version of the operators.
    pub opset: i64,
    /// Names of what comes in.
    pub inputs: Vec<String>,
    /// Names of what goes out.
    pub outputs: Vec<String>,
}

/// Type of a value at the border.
pub type Fact = (DatumType, Vec<usize>);

/// A value at the border: its slot, in row-major order.
#[derive(Debug, Clone)]
pub struct Port {
    /// Bytes or floats by `datum`.
    pub slot: Slot,
    /// `u8`, `i8` or `f32`.
    pub datum: DatumType,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// A body lowered for inputs of known shapes.
#[derive(Debug)]
pub struct Unit {
    /// What runs.
    pub program: Program,
    /// Where inputs go.
    pub inputs: Vec<Port>,
    /// Where outputs lie.
    pub outputs: Vec<Port>,
}

/// Bytes or floats in a slot: logical shape, and which logical dimension each physical one is.
#[derive(Debug, Clone)]
struct View {
    slot: Slot,
    shape: Vec<usize>,
    order: Vec<usize>,
}

impl View {
    fn plain(slot: Slot, shape: Vec<usize>) -> Self {
        let order = (0..shape.len()).collect();
        View { slot, shape, order }
    }
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// Dimensions of size 1 lie anywhere.
    fn is_in(&self, order: &[usize]) -> bool {
        let real = |order: &[usize]| order.iter().copied().filter(|axis| self.shape[*axis] != 1).collect::<Vec<_>>();
        real(&self.order) == real(order)
    }
    /// Stride of each logical dimension.
    fn strides(&self) -> Vec<usize> {
        let mut strides = vec![0; self.shape.len()];
        let mut stride = 1;
        for axis in self.order.iter().rev() {
            strides[*axis] = stride;
            stride *= self.shape[*axis];
        }
        strides
    }
}

/// Scale and zero point; the zero point as stored.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Grid {
    scale: f32,
    zero: i32,
}

#[derive(Debug, Clone)]
struct Table {
    view: View,
    values: Box<[f32; 256]>,
    grid: Option<Grid>,
}

#[derive(Debug, Clone)]
struct Integers {
    tensor: Arc<Tensor>,
    scale: Vec<f32>,
    zero: Vec<i32>,
    axis: usize,
}

/// Sums of products, not yet rounded: `x · w + bias`.
#[derive(Debug, Clone)]
struct Linear {
    x: View,
    grid: Grid,
    /// Where the source's scale and zero point are at run time, if not `grid`.
    dynamic: Option<Slot>,
    /// Batch of a convolution.
    images: usize,
    window: Window,
    groups: usize,
    /// `[output channel][tap][input channel]`, with the zero point taken off.
    weights: Vec<i32>,
    scale: Vec<f32>,
    /// In units of `grid.scale * scale`.
    bias: Vec<i32>,
    /// Added as a float, where it does not come as an integer.
    shift: Vec<f32>,
    shape: Vec<usize>,
    order: Vec<usize>,
}

/// Bytes that are multiplied as integers.
#[derive(Debug, Clone)]
struct Factor {
    view: View,
    grid: Grid,
    /// As in [`Linear`].
    dynamic: Option<Slot>,
}

#[derive(Debug, Clone)]
enum Source {
    Linear(Box<Linear>),
    Sum(Table, Table),
    Product(Table, Table),
    Pair(Box<Pair>),
    Mean(Box<Mean>),
    Concat { parts: Vec<Table>, axis: usize },
}

#[derive(Debug, Clone)]
enum Value {
    Constant(Arc<Tensor>),
    Integers(Integers),
    Bytes(View, DatumType),
    Table(Table),
    /// Bytes whose scale and zero point are floats in a slot.
    Dynamic(View, Slot),
    Pending {
        source: Source,
        low: f32,
        high: f32,
    },
    Floats(View),
}

/// Lowers `body` for inputs of the given types.
///
/// # Errors
/// The nodes that cannot be lowered, without those that follow from them.
pub fn lower(body: &Body, inputs: &[Fact]) -> Result<Unit, Vec<Refused>> {
    let mut lowering = Lowering {
        values: HashMap::new(),
        opset: body.opset,
        steps: Vec::new(),
        bytes: Vec::new(),
        floats: Vec::new(),
    };
    for (name, tensor) in &body.constants {
        lowering.values.insert(name.clone(), Value::Constant(Arc::clone(tensor)));
    }
    let mut ports = Vec::new();
    for (name, (datum, shape)) in body.inputs.iter().zip(inputs) {
        let n = shape.iter().product();
        let (slot, value) = if *datum == f32::datum_type() {
            let slot = lowering.new_floats(n);
            (slot, Value::Floats(View::plain(slot, shape.clone())))
        } else if *datum == u8::datum_type() || *datum == i8::datum_type() {
            let slot = lowering.new_bytes(n);
            (slot, Value::Bytes(View::plain(slot, shape.clone()), *datum))
        } else {
            return Err(vec![Refused { node: first_reader(body, name), why: format!("takes {datum:?}") }]);
        };
        ports.push(Port { slot, datum: *datum, shape: shape.clone() });
        lowering.values.insert(name.clone(), value);
    }
    let mut refused: Vec<Refused> = Vec::new();
    let mut missing: HashSet<&str> = HashSet::new();
    for node in &body.nodes {
        let name = node.output.first().map_or("", String::as_str);
        if node.input.iter().any(|input| missing.contains(input.as_str())) {
            missing.insert(name);
            continue;
        }
        match lowering.node(node) {
            Ok(value) => drop(lowering.values.insert(name.to_owned(), value)),
            Err(why) => {
                missing.insert(name);
                refused.push(Refused { node: name.to_owned(), why });
            }
        }
    }
    let mut outputs = Vec::new();
    for name in body.outputs.iter().filter(|name| !missing.contains(name.as_str())) {
        let value = lowering.values.get(name).cloned();
        match value.ok_or_else(|| "is not made".to_owned()).and_then(|value| lowering.export(value)) {
            Ok(port) => outputs.push(port),
            Err(why) => refused.push(Refused { node: name.clone(), why }),
        }
    }
    if !refused.is_empty() {
        return Err(refused);
    }
    let Lowering { steps, bytes, floats, .. } = lowering;
    Ok(Unit { program: Program::new(steps, bytes, floats, kernel::best()), inputs: ports, outputs })
}

fn first_reader(body: &Body, name: &str) -> String {
    let reader = body.nodes.iter().find(|node| node.input.iter().any(|input| input == name));
    reader.and_then(|node| node.output.first()).cloned().unwrap_or_default()
}

struct Lowering {
    values: HashMap<String, Value>,
    opset: i64,
    steps: Vec<Step>,
    bytes: Vec<usize>,
    floats: Vec<usize>,
}

/// What stored bytes add to an ONNX integer of that type.
pub fn offset(datum: DatumType) -> i32 {
    match (datum == i8::datum_type(), SIGNED) {
        (true, false) => 128,
        (false, true) => -128,
        _ => 0,
    }
}

fn requant(grid: Grid, low: f32, high: f32) -> Requant {
    let least = if SIGNED { -128 } else { 0 };
    let (bottom, top) = ((least - grid.zero) as f32, (least + 255 - grid.zero) as f32);
    Requant {
        zero: grid.zero,
        low: bottom.max(low / grid.scale),
        high: top.min(high / grid.scale).max(bottom.max(low / grid.scale)),
    }
}

impl Lowering {
    fn new_bytes(&mut self, n: usize) -> Slot {
        self.bytes.push(n);
        self.bytes.len() - 1
    }

    fn new_floats(&mut self, n: usize) -> Slot {
        self.floats.push(n);
        self.floats.len() - 1
    }

    fn value(&self, node: &NodeProto, at: usize) -> Lowered<Value> {
        let name =
            node.input.get(at).filter(|name| !name.is_empty()).ok_or_else(|| format!("input {at} is missing"))?;
        self.values.get(name).cloned().ok_or_else(|| format!("input {name} is not known"))
    }

    fn has(&self, node: &NodeProto, at: usize) -> bool {
        node.input.get(at).is_some_and(|name| !name.is_empty())
    }

    fn constant(&self, node: &NodeProto, at: usize) -> Lowered<Arc<Tensor>> {
        match self.value(node, at)? {
            Value::Constant(tensor) => Ok(tensor),
            _ => Err(format!("input {at} is not constant")),
        }
    }

    fn numbers(&self, node: &NodeProto, at: usize) -> Lowered<Vec<f32>> {
        floats(&*self.constant(node, at)?)
    }

    /// A scale, positive and a number, and a zero point, as stored, of the type that it has.
    fn grid(&self, node: &NodeProto, scale: usize, zero: usize, or: DatumType) -> Lowered<(Grid, DatumType)> {
        let scale = self.numbers(node, scale)?;
        let [scale] = scale[..] else { return Err("a scale for each channel".to_owned()) };
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(format!("a scale of {scale}"));
        }
        let (zero, datum) = if self.has(node, zero) {
            let tensor = self.constant(node, zero)?;
            let [zero] = integers(&tensor)?[..] else { return Err("a zero point for each channel".to_owned()) };
            (zero, tensor.datum_type())
        } else {
            (0, or)
        };
        if datum != u8::datum_type() && datum != i8::datum_type() {
            return Err(format!("quantized to {datum:?}"));
        }
        Ok((Grid { scale, zero: zero + offset(datum) }, datum))
    }

    fn table(&self, value: Value) -> Lowered<Table> {
        match value {
            Value::Table(table) => Ok(table),
            _ => Err("an input is not quantized".to_owned()),
        }
    }

    /// Quantized bytes of a known scale.
    fn dequantized(&mut self, value: Value, grid: Grid, datum: DatumType) -> Lowered<Table> {
        let view = match value {
            Value::Bytes(view, found) if found == datum => view,
            Value::Bytes(_, found) => return Err(format!("{found:?} read as {datum:?}")),
            Value::Constant(tensor) => self.bytes_of(&tensor)?,
            _ => return Err("an input is not quantized".to_owned()),
        };
        let values = Box::new(std::array::from_fn(|byte| (value_of(byte) - grid.zero) as f32 * grid.scale));
        Ok(Table { view, values, grid: Some(grid) })
    }

    /// A constant tensor of bytes, made at the start of every run.
    fn bytes_of(&mut self, tensor: &Tensor) -> Lowered<View> {
        let values: Vec<f32> = integers(tensor)?.iter().map(|x| (x + offset(tensor.datum_type())) as f32).collect();
        let slot = self.new_bytes(values.len());
        self.steps.push(Step::Constant { result: slot, bytes: values.iter().map(|x| *x as i32 as u8).collect() });
        Ok(View::plain(slot, tensor.shape().to_vec()))
    }

    fn node(&mut self, node: &NodeProto) -> Lowered<Value> {
        let u8s = u8::datum_type();
        match node.op_type.as_str() {
            "QuantizeLinear" => {
                let (grid, datum) = self.grid(node, 1, 2, u8s)?;
                let value = self.value(node, 0)?;
                self.quantize(value, grid, datum)
            }
            "DequantizeLinear" => match self.value(node, 0)? {
                Value::Constant(tensor) => {
                    let scale = self.numbers(node, 1)?;
                    let zero =
                        if self.has(node, 2) { integers(&*self.constant(node, 2)?)? } else { vec![0; scale.len()] };
                    let axis = attribute(node, "axis", 1);
                    let rank = tensor.rank() as i64;
                    let axis = if scale.len() == 1 {
                        0
                    } else {
                        usize::try_from(if axis < 0 { axis + rank } else { axis }).map_err(|_| "axis")?
                    };
                    if attribute(node, "block_size", 0) != 0
                        || scale.len() != zero.len()
                        || (scale.len() > 1 && tensor.shape().get(axis) != Some(&scale.len()))
                    {
                        return Err("scales that do not match".to_owned());
                    }
                    Ok(Value::Integers(Integers { tensor, scale, zero, axis }))
                }
                value => {
                    let found = if let Value::Bytes(_, datum) = &value { *datum } else { u8s };
                    let (grid, datum) = self.grid(node, 1, 2, found)?;
                    Ok(Value::Table(self.dequantized(value, grid, datum)?))
                }
            },
            "Identity" | "Dropout" => self.value(node, 0),
            "Transpose" => {
                let value = self.value(node, 0)?;
                let perm = node.attribute.iter().find(|a| a.name == "perm").map(|a| &a.ints[..]);
                self.transpose(value, perm)
            }
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => self.reshape(node),
            op if pointwise::UNARY.contains(&op) => {
                let function = self.unary(node)?;
                match self.value(node, 0)? {
                    Value::Table(mut table) => {
                        table.values.iter_mut().for_each(|x| *x = function(*x));
                        table.grid = None;
                        Ok(Value::Table(table))
                    }
                    Value::Pending { source, low, high } if matches!(op, "Relu" | "Clip") => {
                        Ok(Value::Pending { source, low: function(low), high: function(high) })
                    }
                    _ => Err("of floats".to_owned()),
                }
            }
            plain::DYNAMIC => {
                let value = self.value(node, 0)?;
                self.ranged(value)
            }
            "Conv" => self.convolution(node),
            "Gemm" | "MatMul" => self.product(node),
            "Add" | "Sub" | "Mul" | "Div" => self.binary(node),
            "MaxPool" | "GlobalMaxPool" => self.max_pool(node),
            "AveragePool" | "GlobalAveragePool" | "ReduceMean" => self.mean(node),
            "Concat" => {
                let parts = (0..node.input.len())
                    .map(|at| self.value(node, at).and_then(|x| self.operand(x)))
                    .collect::<Lowered<Vec<_>>>()?;
                concat(parts, attribute(node, "axis", 0))
            }
            "Softmax" => {
                let x = self.value(node, 0)?;
                self.softmax(x, attribute(node, "axis", -1), attribute(node, "old", 0) != 0)
            }
            op if shape::MOVES.contains(&op) => self.moved(node),
            other => Err(format!("{other} is not lowered")),
        }
    }

    /// Ends a value in bytes.
    fn quantize(&mut self, value: Value, grid: Grid, datum: DatumType) -> Lowered<Value> {
        let to = requant(grid, f32::NEG_INFINITY, f32::INFINITY);
        let view = match value {
            Value::Table(table) => self.mapped(&table, grid),
            Value::Floats(view) => {
                let slot = self.new_bytes(view.len());
                self.steps.push(Step::Quantize { source: view.slot, result: slot, scale: grid.scale, to });
                View { slot, ..view }
            }
            Value::Pending { source, low, high } => {
                let to = requant(grid, low, high);
                match source {
                    Source::Linear(linear) => self.layer(*linear, Finish::Bytes(to), grid.scale)?,
                    Source::Sum(a, b) => {
                        let (a, b, shape, order) = self.aligned(a, b)?;
                        let (left, right) = (known(&a)?, known(&b)?);
                        let by = (left.scale / grid.scale, right.scale / grid.scale);
                        // Each zero point by its own scale, and the result's.
                        let fixed = grid.zero as f32 - (by.0 * left.zero as f32 + by.1 * right.zero as f32);
                        let range = (to.low + grid.zero as f32, to.high + grid.zero as f32);
                        let slot = self.new_bytes(shape.iter().product());
                        self.steps.push(Step::Add {
                            a: a.view.slot,
                            b: b.view.slot,
                            result: slot,
                            by: (by.0, by.1, fixed),
                            range,
                        });
                        View { slot, shape, order }
                    }
                    Source::Product(a, b) => {
                        let (a, b, shape, order) = self.aligned(a, b)?;
                        let (left, right) = (known(&a)?, known(&b)?);
                        let slot = self.new_bytes(shape.iter().product());
                        let scale = left.scale * right.scale / grid.scale;
                        let zeros = (left.zero, right.zero);
                        self.steps.push(Step::Multiply {
                            a: a.view.slot,
                            b: b.view.slot,
                            result: slot,
                            zeros,
                            scale,
                            to,
                        });
                        View { slot, shape, order }
                    }
                    Source::Pair(pair) => self.matrix(*pair, |_| Finish::Bytes(to), grid.scale)?,
                    Source::Mean(mean) => {
                        let Mean { table, images, window, all, floats, shape, order } = *mean;
                        let from = known(&table)?;
                        let (n, m) = (table.view.len(), shape.iter().product::<usize>());
                        let (scales, zero) = ([from.scale, grid.scale], from.zero);
                        let sizes = [n / images.max(1), m / images.max(1)];
                        let slot = self.images(images, table.view.slot, sizes, false, |lowering, source| {
                            let result = lowering.new_bytes(sizes[1]);
                            lowering.steps.push(Step::MeanPool {
                                source,
                                result,
                                window,
                                zero,
                                scales,
                                all,
                                floats,
                                to,
                            });
                            Ok(result)
                        })?;
                        View { slot, shape, order }
                    }
                    Source::Concat { parts, axis } => self.joined(parts, axis, grid)?,
                }
            }
            _ => return Err("a constant is quantized".to_owned()),
        };
        Ok(Value::Bytes(view, datum))
    }

    /// Bytes of a table in another grid.
    fn mapped(&mut self, table: &Table, grid: Grid) -> View {
        if table.grid == Some(grid) {
            return table.view.clone();
        }
        let to = requant(grid, f32::NEG_INFINITY, f32::INFINITY);
        let map: Box<[u8; 256]> = Box::new(std::array::from_fn(|byte| round(table.values[byte] / grid.scale, to)));
        let slot = self.new_bytes(table.view.len());
        self.steps.push(Step::Map { source: table.view.slot, result: slot, table: map });
        View { slot, ..table.view.clone() }
    }

    /// Brings bytes into a physical order.
    fn ordered(&mut self, view: &View, order: &[usize]) -> View {
        if view.is_in(order) {
            return View { order: order.to_vec(), ..view.clone() };
        }
        let strides = view.strides();
        let slot = self.new_bytes(view.len());
        let dims = order.iter().map(|axis| view.shape[*axis]).collect();
        let strides = order.iter().map(|axis| strides[*axis]).collect();
        self.steps.push(Step::Gather { source: view.slot, result: slot, dims, strides });
        View { slot, shape: view.shape.clone(), order: order.to_vec() }
    }

    fn ordered_floats(&mut self, view: &View, order: &[usize]) -> View {
        if view.is_in(order) {
            return View { order: order.to_vec(), ..view.clone() };
        }
        let strides = view.strides();
        let slot = self.new_floats(view.len());
        let dims = order.iter().map(|axis| view.shape[*axis]).collect();
        let strides = order.iter().map(|axis| strides[*axis]).collect();
        self.steps.push(Step::GatherFloats { source: view.slot, result: slot, dims, strides });
        View { slot, shape: view.shape.clone(), order: order.to_vec() }
    }

    fn export(&mut self, value: Value) -> Lowered<Port> {
        match value {
            Value::Bytes(view, datum) => {
                let order: Vec<usize> = (0..view.shape.len()).collect();
                let view = self.ordered(&view, &order);
                Ok(Port { slot: view.slot, datum, shape: view.shape })
            }
            value => {
                let view = self.floats_of(value)?;
                let order: Vec<usize> = (0..view.shape.len()).collect();
                let view = self.ordered_floats(&view, &order);
                Ok(Port { slot: view.slot, datum: f32::datum_type(), shape: view.shape })
            }
        }
    }

    /// Computes the floats that a value stands for.
    fn floats_of(&mut self, value: Value) -> Lowered<View> {
        match value {
            Value::Floats(view) => Ok(view),
            Value::Table(table) => {
                let slot = self.new_floats(table.view.len());
                self.steps.push(Step::Expand { source: table.view.slot, result: slot, table: table.values });
                Ok(View { slot, ..table.view })
            }
            Value::Pending { source: Source::Linear(linear), low, high } => {
                // The bias as a float where it came as one.
                let channels = linear.scale.len();
                let shift = if linear.shift.is_empty() { vec![0.0; channels] } else { linear.shift.clone() };
                self.layer(*linear, Finish::Floats { shift, low, high }, 1.0)
            }
            Value::Pending { source: Source::Pair(pair), low, high } => {
                self.matrix(*pair, |columns| Finish::Floats { shift: vec![0.0; columns], low, high }, 1.0)
            }
            _ => Err("is used as floats".to_owned()),
        }
    }

    fn linear(&mut self, linear: Linear, finish: Finish, by: f32) -> Lowered<View> {
        let Linear { x, grid, window, groups, weights, scale, mut bias, shift, shape, order, .. } = linear;
        let all = scale.len();
        let per = weights.len() / all;
        let unit = |c: usize| grid.scale * scale[c];
        if bias.is_empty() {
            bias = vec![0; all];
        }
        if matches!(finish, Finish::Bytes(_)) {
            for (c, shift) in shift.iter().enumerate() {
                let steps = (shift / unit(c)).round_ties_even();
                if steps.abs() > 2e9 {
                    return Err("a bias far over its weights".to_owned());
                }
                bias[c] = bias[c].wrapping_add(steps as i32);
            }
        }
        let factor: Vec<f32> = (0..all).map(|c| unit(c) / by).collect();
        if factor.iter().any(|factor| !factor.is_finite()) {
            return Err("scales that are out of range".to_owned());
        }
        for (c, bias) in bias.iter_mut().enumerate() {
            let sum: i32 = weights[c * per..][..per].iter().sum();
            *bias = bias.wrapping_sub(sum.wrapping_mul(grid.zero));
        }
        let n: usize = shape.iter().product();
        let result = if matches!(finish, Finish::Bytes(_)) { self.new_bytes(n) } else { self.new_floats(n) };
        let zero = grid.zero as u8;
        let numbers = Numbers { source: x.slot, result, window, groups, weights, bias, factor, zero, finish };
        self.steps.push(pack::step(numbers)?);
        Ok(View { slot: result, shape, order })
    }
}

fn value_of(byte: usize) -> i32 {
    value(byte as u8)
}

fn known(table: &Table) -> Lowered<Grid> {
    table.grid.ok_or_else(|| "an input is no longer quantized".to_owned())
}

/// An integer attribute.
pub fn attribute(node: &NodeProto, name: &str, or: i64) -> i64 {
    node.attribute.iter().find(|a| a.name == name).map_or(or, |a| a.i)
}

fn floats(tensor: &Tensor) -> Lowered<Vec<f32>> {
    let tensor = tensor.cast_to::<f32>().map_err(|error| error.to_string())?;
    Ok(tensor.to_plain_array_view::<f32>().map_err(|error| error.to_string())?.iter().copied().collect())
}

fn integers(tensor: &Tensor) -> Lowered<Vec<i32>> {
    let tensor = tensor.cast_to::<i32>().map_err(|error| error.to_string())?;
    Ok(tensor.to_plain_array_view::<i32>().map_err(|error| error.to_string())?.iter().copied().collect())
}

fn spread<T: Copy>(values: &[T], n: usize) -> Lowered<Vec<T>> {
    match values {
        [one] => Ok(vec![*one; n]),
        many if many.len() == n => Ok(many.to_vec()),
        many => Err(format!("{} values for {n} channels", many.len())),
    }
}
