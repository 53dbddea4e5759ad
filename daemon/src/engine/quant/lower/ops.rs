//! What each operator means for values that are not computed yet.

use tract_onnx::pb::NodeProto;
use tract_onnx::prelude::*;

use super::{
    Grid, Integers, Linear, Lowered, Lowering, Source, Table, Value, View, attribute, floats, integers, known, spread,
};
use crate::engine::quant::program::{Step, Window};

/// Channels last, for a tensor of rank 3 or 4.
fn last(rank: usize) -> Vec<usize> {
    std::iter::once(0).chain(2..rank).chain([1]).collect()
}

fn attribute_list(node: &NodeProto, name: &str) -> Option<Vec<i64>> {
    node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.clone())
}

fn text(node: &NodeProto, name: &str) -> String {
    node.attribute.iter().find(|a| a.name == name).map_or(String::new(), |a| String::from_utf8_lossy(&a.s).into_owned())
}

/// Two numbers of an attribute; for a sequence the first is `or`.
fn two(node: &NodeProto, name: &str, spatial: usize, or: usize) -> Lowered<[usize; 2]> {
    let Some(list) = attribute_list(node, name).filter(|list| !list.is_empty()) else { return Ok([or; 2]) };
    let list: Vec<usize> =
        list.iter().map(|x| usize::try_from(*x).map_err(|_| format!("{name} under 0"))).collect::<Lowered<_>>()?;
    match (&list[..], spatial) {
        ([one], 1) => Ok([or, *one]),
        ([a, b], 2) => Ok([*a, *b]),
        _ => Err(format!("{name} of {} numbers", list.len())),
    }
}

/// The windows of a convolution or pool over `shape`, batch 1, by the node's attributes.
fn window(node: &NodeProto, shape: &[usize], kernel: Option<&[usize]>) -> Lowered<Window> {
    let (spatial, source) = match shape {
        [1, c, w] => (1, [1, *w, *c]),
        [1, c, h, w] => (2, [*h, *w, *c]),
        _ => return Err(format!("an input of shape {shape:?}")),
    };
    let kernel = match kernel {
        Some([k]) if spatial == 1 => [1, *k],
        Some([a, b]) if spatial == 2 => [*a, *b],
        Some(_) => return Err("a kernel of another rank".to_owned()),
        None => two(node, "kernel_shape", spatial, 1)?,
    };
    let (stride, dilation) = (two(node, "strides", spatial, 1)?, two(node, "dilations", spatial, 1)?);
    if attribute(node, "ceil_mode", 0) != 0 || stride.contains(&0) || kernel.contains(&0) {
        return Err("ceil_mode, or a stride of 0".to_owned());
    }
    let reach: [usize; 2] = std::array::from_fn(|i| (kernel[i] - 1) * dilation[i] + 1);
    let (mut before, mut after) = ([0; 2], [0; 2]);
    match text(node, "auto_pad").as_str() {
        "" | "NOTSET" => {
            if let Some(pads) = attribute_list(node, "pads").filter(|pads| !pads.is_empty()) {
                let pads: Vec<usize> =
                    pads.iter().map(|x| usize::try_from(*x).map_err(|_| "pads under 0")).collect::<Result<_, _>>()?;
                match (&pads[..], spatial) {
                    ([a, b], 1) => (before, after) = ([0, *a], [0, *b]),
                    ([a, b, c, d], 2) => (before, after) = ([*a, *b], [*c, *d]),
                    _ => return Err("pads of another rank".to_owned()),
                }
            }
        }
        "VALID" => {}
        same @ ("SAME_UPPER" | "SAME_LOWER") => {
            for i in 0..2 {
                let result = source[i].div_ceil(stride[i]);
                let total = ((result - 1) * stride[i] + reach[i]).saturating_sub(source[i]);
                before[i] = if same == "SAME_UPPER" { total / 2 } else { total.div_ceil(2) };
                after[i] = total - before[i];
            }
        }
        other => return Err(format!("auto_pad {other}")),
    }
    let mut result = [0; 2];
    for i in 0..2 {
        let room = source[i] + before[i] + after[i];
        result[i] = room.checked_sub(reach[i]).ok_or("a kernel larger than its input")? / stride[i] + 1;
    }
    Ok(Window { source, result, kernel, stride, dilation, before })
}

fn spatial_shape(shape: &[usize], channels: usize, result: [usize; 2]) -> Vec<usize> {
    if shape.len() == 3 { vec![1, channels, result[1]] } else { vec![1, channels, result[0], result[1]] }
}

/// Rows and columns of a matrix that is multiplied.
fn flat(rows: usize, inputs: usize) -> Window {
    Window {
        source: [1, rows, inputs],
        result: [1, rows],
        kernel: [1, 1],
        stride: [1, 1],
        dilation: [1, 1],
        before: [0, 0],
    }
}

/// The index of an axis that may count from the end.
fn axis_of(axis: i64, rank: usize) -> Lowered<usize> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|axis| *axis < rank).ok_or_else(|| format!("axis {axis}"))
}

pub(super) fn concat(parts: Vec<Table>, axis: i64) -> Lowered<Value> {
    let first = parts.first().ok_or("nothing to join")?;
    let axis = axis_of(axis, first.view.shape.len())?;
    let fits = |part: &Table| {
        part.view.shape.len() == first.view.shape.len()
            && (0..first.view.shape.len()).all(|i| i == axis || part.view.shape[i] == first.view.shape[i])
    };
    if !parts.iter().all(fits) {
        return Err("parts that do not match".to_owned());
    }
    Ok(Value::Pending { source: Source::Concat { parts, axis }, low: f32::NEG_INFINITY, high: f32::INFINITY })
}

impl Lowering {
    /// A convolution whose bias comes as a value.
    pub(super) fn convolution(
        &mut self,
        node: &NodeProto,
        x: Table,
        w: &Integers,
        bias: Option<Value>,
    ) -> Lowered<Value> {
        let (bias, shift) = self.bias(bias, known(&x)?, w)?;
        self.convolution_with(node, x, w, bias, shift)
    }

    /// The bias as integers where its scale is that of the sums, else as floats.
    fn bias(&self, bias: Option<Value>, x: Grid, w: &Integers) -> Lowered<(Vec<i32>, Vec<f32>)> {
        match bias {
            None => Ok((Vec::new(), Vec::new())),
            Some(Value::Constant(tensor)) => Ok((Vec::new(), floats(&tensor)?)),
            Some(Value::Integers(bias)) => {
                let values = integers(&bias.tensor)?;
                let n = values.len();
                let (scale, zero, units) = (spread(&bias.scale, n)?, spread(&bias.zero, n)?, spread(&w.scale, n)?);
                let same = (0..n).all(|c| (scale[c] - x.scale * units[c]).abs() <= 1e-4 * scale[c].abs());
                if same {
                    Ok((values.iter().zip(&zero).map(|(x, zero)| x - zero).collect(), Vec::new()))
                } else {
                    Ok((Vec::new(), (0..n).map(|c| (values[c] - zero[c]) as f32 * scale[c]).collect()))
                }
            }
            Some(_) => Err("a bias that is not constant".to_owned()),
        }
    }

    pub(super) fn convolution_with(
        &mut self,
        node: &NodeProto,
        x: Table,
        w: &Integers,
        bias: Vec<i32>,
        shift: Vec<f32>,
    ) -> Lowered<Value> {
        let grid = known(&x)?;
        let shape = w.tensor.shape();
        let rank = x.view.shape.len();
        if shape.len() != rank || (w.scale.len() > 1 && w.axis != 0) {
            return Err("weights of another rank or axis".to_owned());
        }
        let window = window(node, &x.view.shape, Some(&shape[2..]))?;
        let groups = attribute(node, "group", 1).max(1) as usize;
        let (all, inputs) = (shape[0], shape[1]);
        if all % groups != 0 || inputs * groups != window.source[2] {
            return Err("groups that do not divide the channels".to_owned());
        }
        let (scale, zero) = (spread(&w.scale, all)?, spread(&w.zero, all)?);
        let values = integers(&w.tensor)?;
        let taps: usize = shape[2..].iter().product();
        let mut weights = vec![0; values.len()];
        for c in 0..all {
            for i in 0..inputs {
                for tap in 0..taps {
                    weights[(c * taps + tap) * inputs + i] = values[(c * inputs + i) * taps + tap] - zero[c];
                }
            }
        }
        let order = last(rank);
        let shape = spatial_shape(&x.view.shape, all, window.result);
        let x = self.ordered(&x.view, &order);
        let bias = if bias.is_empty() { bias } else { spread(&bias, all)? };
        let shift = if shift.is_empty() { shift } else { spread(&shift, all)? };
        let linear = Linear { x, grid, window, groups, weights, scale, bias, shift, shape, order };
        Ok(Value::Pending { source: Source::Linear(Box::new(linear)), low: f32::NEG_INFINITY, high: f32::INFINITY })
    }

    /// `x · w`, or `x · wᵀ` where `turned`.
    pub(super) fn product(&mut self, x: Table, w: &Integers, turned: bool, bias: Option<Value>) -> Lowered<Value> {
        let grid = known(&x)?;
        let [a, b] = *w.tensor.shape() else { return Err("weights that are no matrix".to_owned()) };
        let (inputs, all) = if turned { (b, a) } else { (a, b) };
        if w.scale.len() > 1 && w.axis != usize::from(!turned) {
            return Err("a scale for each input".to_owned());
        }
        let Some((found, outer)) = x.view.shape.split_last() else { return Err("a scalar".to_owned()) };
        if *found != inputs {
            return Err("a matrix of another size".to_owned());
        }
        let (scale, zero) = (spread(&w.scale, all)?, spread(&w.zero, all)?);
        let values = integers(&w.tensor)?;
        let at = |c: usize, k: usize| if turned { c * inputs + k } else { k * all + c };
        let mut weights = Vec::with_capacity(values.len());
        for c in 0..all {
            weights.extend((0..inputs).map(|k| values[at(c, k)] - zero[c]));
        }
        let (bias, shift) = self.bias(bias, grid, w)?;
        let bias = if bias.is_empty() { vec![0; all] } else { spread(&bias, all)? };
        let shift = if shift.is_empty() { shift } else { spread(&shift, all)? };
        let shape: Vec<usize> = outer.iter().copied().chain([all]).collect();
        let order: Vec<usize> = (0..shape.len()).collect();
        let window = flat(outer.iter().product(), inputs);
        let x = self.ordered(&x.view, &order);
        let linear = Linear { x, grid, window, groups: 1, weights, scale, bias, shift, shape, order };
        Ok(Value::Pending { source: Source::Linear(Box::new(linear)), low: f32::NEG_INFINITY, high: f32::INFINITY })
    }

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
        let (a, b) = (self.operand(a)?, self.operand(b)?);
        self.pair(node.op_type == "Mul", a, b, if node.op_type == "Sub" { -1.0 } else { 1.0 })
    }

    /// A table, of a constant too.
    fn operand(&mut self, value: Value) -> Lowered<Table> {
        match value {
            Value::Integers(Integers { tensor, scale, zero, .. }) => {
                let ([scale], [zero]) = (&scale[..], &zero[..]) else {
                    return Err("a constant with many scales".to_owned());
                };
                let grid = Grid { scale: *scale, zero: zero + super::offset(tensor.datum_type()) };
                let datum = tensor.datum_type();
                if datum != u8::datum_type() && datum != i8::datum_type() {
                    return Err(format!("a constant of {datum:?}"));
                }
                self.dequantized(Value::Constant(tensor), grid, datum)
            }
            value => self.table(value),
        }
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

    pub(super) fn joined(&mut self, parts: Vec<Table>, axis: usize, grid: Grid) -> Lowered<View> {
        let order = parts[0].view.order.clone();
        let mut shape = parts[0].view.shape.clone();
        shape[axis] = parts.iter().map(|part| part.view.shape[axis]).sum();
        let slot = self.new_bytes(shape.iter().product());
        let place = order.iter().position(|x| *x == axis).ok_or("axis")?;
        let inner: usize = order[place + 1..].iter().map(|x| shape[*x]).product();
        let stride = inner * shape[axis];
        let mut offset = 0;
        for part in parts {
            let view = self.mapped(&part, grid);
            let view = self.ordered(&view, &order);
            let length = inner * view.shape[axis];
            self.steps.push(Step::Place { source: view.slot, result: slot, length, stride, offset });
            offset += length;
        }
        Ok(View { slot, shape, order })
    }

    pub(super) fn max_pool(&mut self, node: &NodeProto) -> Lowered<Value> {
        if node.output.len() > 1 {
            return Err("indices are wanted".to_owned());
        }
        let mut value = self.value(node, 0)?;
        let view = match &mut value {
            Value::Bytes(view, _) => view,
            // The greatest byte is the greatest value where the table rises.
            Value::Table(table) if table.grid.is_some() => &mut table.view,
            _ => return Err("an input is not quantized".to_owned()),
        };
        let window = window(node, &view.shape, None)?;
        let order = last(view.shape.len());
        let x = self.ordered(view, &order);
        let shape = spatial_shape(&view.shape, window.source[2], window.result);
        let slot = self.new_bytes(shape.iter().product());
        self.steps.push(Step::MaxPool { source: x.slot, result: slot, window });
        *view = View { slot, shape, order };
        Ok(value)
    }

    pub(super) fn mean(&mut self, node: &NodeProto, x: Table) -> Lowered<Value> {
        let grid = known(&x)?;
        let rank = x.view.shape.len();
        let mut drop = false;
        let whole = |shape: &[usize]| -> Lowered<Window> {
            let source = match shape {
                [1, c, w] => [1, *w, *c],
                [1, c, h, w] => [*h, *w, *c],
                _ => return Err(format!("an input of shape {shape:?}")),
            };
            let kernel = [source[0], source[1]];
            Ok(Window { source, result: [1, 1], kernel, stride: [1, 1], dilation: [1, 1], before: [0, 0] })
        };
        let window = match node.op_type.as_str() {
            "AveragePool" | "QLinearAveragePool" => window(node, &x.view.shape, None)?,
            "ReduceMean" => {
                let mut axes = match attribute_list(node, "axes") {
                    Some(axes) => axes,
                    None => integers(&*self.constant(node, 1)?)?.into_iter().map(i64::from).collect(),
                };
                axes.iter_mut().for_each(|axis| *axis += if *axis < 0 { rank as i64 } else { 0 });
                axes.sort_unstable();
                if !axes.iter().copied().eq(2..rank as i64) {
                    return Err("a mean over other axes".to_owned());
                }
                drop = attribute(node, "keepdims", 1) == 0;
                whole(&x.view.shape)?
            }
            _ => whole(&x.view.shape)?,
        };
        let mut order = last(rank);
        let view = self.ordered(&x.view, &order);
        let mut shape = spatial_shape(&x.view.shape, window.source[2], window.result);
        if drop {
            shape.truncate(2);
            order = vec![0, 1];
        }
        let all = attribute(node, "count_include_pad", 0) != 0;
        let floats = !node.op_type.starts_with("QLinear");
        let source = Source::Mean { x: view, grid, window, all, floats, shape, order };
        Ok(Value::Pending { source, low: f32::NEG_INFINITY, high: f32::INFINITY })
    }

    pub(super) fn softmax(&mut self, x: Table, axis: i64) -> Lowered<Value> {
        let rank = x.view.shape.len();
        let axis = axis_of(axis, rank)?;
        if x.view.shape[axis + 1..].iter().any(|dim| *dim != 1) {
            return Err("a softmax over another axis than the last".to_owned());
        }
        let view = self.floats_of(Value::Table(x))?;
        let view = self.ordered_floats(&view);
        let slot = self.new_floats(view.len());
        self.steps.push(Step::Softmax { source: view.slot, result: slot, length: view.shape[axis] });
        Ok(Value::Floats(View { slot, ..view }))
    }

    pub(super) fn transpose(&mut self, value: Value, perm: Option<Vec<i64>>) -> Lowered<Value> {
        let permutation = |rank: usize| -> Lowered<Vec<usize>> {
            match &perm {
                None => Ok((0..rank).rev().collect()),
                Some(perm) if perm.len() == rank => perm.iter().map(|axis| axis_of(*axis, rank)).collect(),
                Some(_) => Err("a perm of another rank".to_owned()),
            }
        };
        let turn = |view: &View| -> Lowered<View> {
            let perm = permutation(view.shape.len())?;
            let place = |axis: usize| perm.iter().position(|from| *from == axis).ok_or("perm");
            let order = view.order.iter().map(|axis| place(*axis)).collect::<Result<_, _>>()?;
            Ok(View { slot: view.slot, shape: perm.iter().map(|axis| view.shape[*axis]).collect(), order })
        };
        match value {
            Value::Bytes(view, datum) => Ok(Value::Bytes(turn(&view)?, datum)),
            Value::Table(table) => Ok(Value::Table(Table { view: turn(&table.view)?, ..table })),
            Value::Integers(weights) => {
                let perm = permutation(weights.tensor.rank())?;
                let axis = perm.iter().position(|from| *from == weights.axis).ok_or("perm")?;
                let tensor = weights.tensor.as_ref().clone().permute_axes(&perm).map_err(|error| error.to_string())?;
                Ok(Value::Integers(Integers { tensor: Arc::new(tensor), axis, ..weights }))
            }
            Value::Pending { source: Source::Linear(mut linear), low, high } => {
                let turned = turn(&View { slot: 0, shape: linear.shape.clone(), order: linear.order.clone() })?;
                (linear.shape, linear.order) = (turned.shape, turned.order);
                Ok(Value::Pending { source: Source::Linear(linear), low, high })
            }
            _ => Err("of floats".to_owned()),
        }
    }

    pub(super) fn reshape(&mut self, node: &NodeProto) -> Lowered<Value> {
        let value = self.value(node, 0)?;
        let axes = |rank: usize| -> Lowered<Vec<usize>> {
            let list = match attribute_list(node, "axes") {
                Some(list) => Some(list),
                None if self.has(node, 1) => {
                    Some(integers(&*self.constant(node, 1)?)?.into_iter().map(i64::from).collect())
                }
                None => None,
            };
            list.unwrap_or_default().into_iter().map(|axis| axis_of(axis, rank)).collect()
        };
        let to = |shape: &[usize]| -> Lowered<Vec<usize>> {
            match node.op_type.as_str() {
                "Flatten" => {
                    let axis = attribute(node, "axis", 1);
                    let axis = if axis < 0 { axis + shape.len() as i64 } else { axis };
                    let axis = usize::try_from(axis).ok().filter(|axis| *axis <= shape.len()).ok_or("axis")?;
                    Ok(vec![shape[..axis].iter().product(), shape[axis..].iter().product()])
                }
                "Squeeze" => {
                    let gone = axes(shape.len())?;
                    let keep = |at: usize, dim: usize| if gone.is_empty() { dim != 1 } else { !gone.contains(&at) };
                    Ok(shape.iter().enumerate().filter(|(at, dim)| keep(*at, **dim)).map(|(_, dim)| *dim).collect())
                }
                "Unsqueeze" => {
                    let count = attribute_list(node, "axes")
                        .map_or_else(|| Ok(self.constant(node, 1)?.len()), |list| Lowered::Ok(list.len()))?;
                    let new = axes(shape.len() + count)?;
                    let mut old = shape.iter();
                    Ok((0..shape.len() + count)
                        .map(|at| if new.contains(&at) { 1 } else { old.next().copied().unwrap_or(1) })
                        .collect())
                }
                _ => {
                    let wanted = integers(&*self.constant(node, 1)?)?;
                    let keep = attribute(node, "allowzero", 0) == 0;
                    let mut result: Vec<usize> = Vec::new();
                    for (at, dim) in wanted.iter().enumerate() {
                        result.push(match dim {
                            0 if keep => *shape.get(at).ok_or("a 0 in the shape")?,
                            -1 => 1,
                            dim => usize::try_from(*dim).map_err(|_| "a dimension under 0")?,
                        });
                    }
                    if let Some(at) = wanted.iter().position(|dim| *dim == -1) {
                        let rest: usize = result.iter().product();
                        result[at] = shape.iter().product::<usize>().checked_div(rest).ok_or("a dimension of 0")?;
                    }
                    Ok(result)
                }
            }
        };
        let checked = |shape: &[usize]| {
            let result = to(shape)?;
            let same = result.iter().product::<usize>() == shape.iter().product::<usize>();
            same.then_some(result).ok_or_else(|| "a shape of another size".to_owned())
        };
        match value {
            Value::Bytes(view, datum) => {
                let shape = checked(&view.shape)?;
                Ok(Value::Bytes(self.reshaped(&view, shape), datum))
            }
            Value::Table(table) => {
                let shape = checked(&table.view.shape)?;
                let view = self.reshaped(&table.view, shape);
                Ok(Value::Table(Table { view, ..table }))
            }
            Value::Integers(weights) if weights.scale.len() == 1 => {
                let shape = checked(weights.tensor.shape())?;
                let tensor = weights.tensor.as_ref().clone().into_shape(&shape).map_err(|error| error.to_string())?;
                Ok(Value::Integers(Integers { tensor: Arc::new(tensor), axis: 0, ..weights }))
            }
            _ => Err("of floats".to_owned()),
        }
    }

    fn reshaped(&mut self, view: &View, shape: Vec<usize>) -> View {
        let plain: Vec<usize> = (0..view.shape.len()).collect();
        let view = self.ordered(view, &plain);
        View::plain(view.slot, shape)
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
            "LeakyRelu" | "QLinearLeakyRelu" => {
                let alpha = number("alpha", 0.01);
                Box::new(move |x| if x < 0.0 { alpha * x } else { x })
            }
            "Sigmoid" | "QLinearSigmoid" => Box::new(|x| 1.0 / (1.0 + (-x).exp())),
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
            "Softplus" => Box::new(|x| x.exp().ln_1p()),
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
