//! Convolutions and products of matrices.

use tract_onnx::pb::NodeProto;

use super::window::{flat, last, spatial_shape, window};
use super::{
    Factor, Grid, Integers, Linear, Lowered, Lowering, Source, Value, View, attribute, floats, integers, spread,
};
use crate::engine::quant::program::{Finish, Matrix, Step};

/// A product of two values that both come at run time, not yet rounded.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    a: Factor,
    b: Factor,
    /// Number that sums are multiplied by, beside the scales.
    by: f32,
}

fn pending(source: Source) -> Value {
    Value::Pending { source, low: f32::NEG_INFINITY, high: f32::INFINITY }
}

impl Lowering {
    pub(super) fn convolution(&mut self, node: &NodeProto) -> Lowered<Value> {
        let x = self.value(node, 0)?;
        let Factor { view, grid, dynamic } = self.factor(x)?;
        let Value::Integers(w) = self.value(node, 1)? else {
            return Err("weights are not quantized".to_owned());
        };
        let bias = if self.has(node, 2) { Some(self.value(node, 2)?) } else { None };
        let shape = w.tensor.shape();
        let rank = view.shape.len();
        if shape.len() != rank || (w.scale.len() > 1 && w.axis != 0) {
            return Err("weights of another rank or axis".to_owned());
        }
        let window = window(node, &view.shape, Some(&shape[2..]))?;
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
        let (bias, shift) = bias_of(bias, grid, &scale, dynamic.is_some())?;
        let order = last(rank);
        let images = view.shape[0];
        let shape = spatial_shape(&view.shape, all, window.result);
        let x = self.ordered(&view, &order);
        let linear = Linear { x, grid, dynamic, images, window, groups, weights, scale, bias, shift, shape, order };
        Ok(pending(Source::Linear(Box::new(linear))))
    }

    /// `Gemm` and `MatMul`.
    pub(super) fn product(&mut self, node: &NodeProto) -> Lowered<Value> {
        let number = |name: &str| node.attribute.iter().find(|a| a.name == name).map_or(1.0, |a| a.f);
        let (alpha, beta) = (number("alpha"), number("beta"));
        let turned = |name: &str| attribute(node, name, 0) != 0;
        let x = self.value(node, 0)?;
        let mut x = self.factor(x)?;
        if turned("transA") {
            x.view = self.turned(&x.view, Some(&[1, 0]))?;
        }
        let bias = if self.has(node, 2) { Some(self.value(node, 2)?) } else { None };
        match self.value(node, 1)? {
            Value::Integers(mut w) if w.tensor.rank() == 2 => {
                w.scale.iter_mut().for_each(|scale| *scale *= alpha);
                self.by_constant(x, &w, turned("transB"), bias, beta)
            }
            b => {
                let mut b = self.factor(b)?;
                if turned("transB") {
                    b.view = self.turned(&b.view, Some(&[1, 0]))?;
                }
                if bias.is_some() || x.view.shape.len() < 2 || b.view.shape.len() < 2 {
                    return Err("a bias, or a vector".to_owned());
                }
                let order: Vec<usize> = (0..x.view.shape.len()).collect();
                x.view = self.ordered(&x.view, &order);
                Ok(pending(Source::Pair(Box::new(Pair { a: x, b, by: alpha }))))
            }
        }
    }

    /// `x · w`, or `x · wᵀ` where `turned`.
    fn by_constant(&mut self, x: Factor, w: &Integers, turned: bool, bias: Option<Value>, beta: f32) -> Lowered<Value> {
        let Factor { view, grid, dynamic } = x;
        let [a, b] = *w.tensor.shape() else { return Err("weights that are no matrix".to_owned()) };
        let (inputs, all) = if turned { (b, a) } else { (a, b) };
        if w.scale.len() > 1 && w.axis != usize::from(!turned) {
            return Err("a scale for each input".to_owned());
        }
        let Some((found, outer)) = view.shape.split_last() else { return Err("a scalar".to_owned()) };
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
        let (mut bias, mut shift) = bias_of(bias, grid, &scale, dynamic.is_some())?;
        if beta != 1.0 {
            if shift.is_empty() {
                shift = bias.iter().zip(&scale).map(|(bias, scale)| *bias as f32 * grid.scale * scale).collect();
            }
            shift.iter_mut().for_each(|shift| *shift *= beta);
            bias.clear();
        }
        let shape: Vec<usize> = outer.iter().copied().chain([all]).collect();
        let order: Vec<usize> = (0..shape.len()).collect();
        let window = flat(outer.iter().product(), inputs);
        let x = self.ordered(&view, &order);
        let linear =
            Linear { x, grid, dynamic, images: 1, window, groups: 1, weights, scale, bias, shift, shape, order };
        Ok(pending(Source::Linear(Box::new(linear))))
    }

    /// The product of two values that come at run time.
    pub(super) fn matrix(&mut self, pair: Pair, finish: impl Fn(usize) -> Finish, by: f32) -> Lowered<View> {
        let Pair { a, b, by: times } = pair;
        let (left, right) = (&a.view.shape, &b.view.shape);
        let ([before @ .., rows, depth], [behind @ .., deep, columns]) = (&left[..], &right[..]) else {
            return Err("a vector".to_owned());
        };
        let (rows, depth, columns) = (*rows, *depth, *columns);
        if depth != *deep || depth == 0 || columns == 0 {
            return Err("matrices that do not match".to_owned());
        }
        let rank = left.len().max(right.len());
        let dim = |dims: &[usize], axis: usize| (axis + dims.len() + 2).checked_sub(rank).map_or(1, |at| dims[at]);
        let mut shape: Vec<usize> = Vec::new();
        for axis in 0..rank - 2 {
            let (one, other) = (dim(before, axis), dim(behind, axis));
            if one != other && one != 1 && other != 1 {
                return Err("batches that do not match".to_owned());
            }
            shape.push(one.max(other));
        }
        let strides = b.view.strides();
        let steps = |view: &View, axis: usize| {
            let own = view.strides();
            let at = (axis + own.len()).checked_sub(rank);
            at.filter(|at| view.shape[*at] != 1).map_or(0, |at| own[at])
        };
        let mut starts = vec![[0, 0]];
        for (axis, dim) in shape.iter().enumerate() {
            let step = [steps(&a.view, axis), steps(&b.view, axis)];
            starts = starts
                .iter()
                .flat_map(|start| (0..*dim).map(move |at| [start[0] + at * step[0], start[1] + at * step[1]]))
                .collect();
        }
        shape.extend([rows, columns]);
        let finish = finish(columns);
        let n: usize = shape.iter().product();
        let result = if matches!(finish, Finish::Bytes(_)) { self.new_bytes(n) } else { self.new_floats(n) };
        self.steps.push(Step::Matrix(Box::new(Matrix {
            a: a.view.slot,
            b: b.view.slot,
            result,
            starts,
            rows,
            depth,
            columns,
            strides: [strides[strides.len() - 2], strides[strides.len() - 1]],
            zeros: [a.grid.zero, b.grid.zero],
            dynamic: [a.dynamic, b.dynamic],
            scale: times * a.grid.scale * b.grid.scale / by,
            finish,
        })));
        Ok(View::plain(result, shape))
    }

    /// Runs `each` on every image of a batch in turn: on `n` bytes, with a result of `m` bytes or floats.
    pub(super) fn images(
        &mut self,
        images: usize,
        source: usize,
        [n, m]: [usize; 2],
        floats: bool,
        each: impl FnOnce(&mut Self, usize) -> Lowered<usize>,
    ) -> Lowered<usize> {
        if images == 1 {
            return each(self, source);
        }
        let part = self.new_bytes(n);
        let outer = std::mem::take(&mut self.steps);
        let made = each(self, part);
        let steps = std::mem::replace(&mut self.steps, outer);
        let made = made?;
        let result = if floats { self.new_floats(m * images) } else { self.new_bytes(m * images) };
        self.steps.push(Step::Images { images, source, part, n, steps, made, result, m, floats });
        Ok(result)
    }
}

/// The bias as integers where its scale is that of the sums, else as floats; none of both where there is none.
fn bias_of(bias: Option<Value>, x: Grid, w: &[f32], dynamic: bool) -> Lowered<(Vec<i32>, Vec<f32>)> {
    let all = w.len();
    let (shape, bias, shift) = match bias {
        None => return Ok((Vec::new(), Vec::new())),
        Some(Value::Constant(tensor)) => (tensor.shape().to_vec(), Vec::new(), floats(&tensor)?),
        Some(Value::Integers(bias)) => {
            let values = integers(&bias.tensor)?;
            let n = values.len();
            let (scale, zero) = (spread(&bias.scale, n)?, spread(&bias.zero, n)?);
            let shape = bias.tensor.shape().to_vec();
            let unit = |c: usize| x.scale * w[c];
            if !dynamic && n == all && (0..n).all(|c| (scale[c] - unit(c)).abs() <= 1e-4 * scale[c].abs()) {
                (shape, values.iter().zip(&zero).map(|(x, zero)| x - zero).collect(), Vec::new())
            } else {
                (shape, Vec::new(), (0..n).map(|c| (values[c] - zero[c]) as f32 * scale[c]).collect())
            }
        }
        Some(_) => return Err("a bias that is not constant".to_owned()),
    };
    let count: usize = shape.iter().product();
    if count != 1 && (count != all || shape.last() != Some(&all)) {
        return Err("a bias that is not the channels'".to_owned());
    }
    let bias = if bias.is_empty() { bias } else { spread(&bias, all)? };
    let shift = if shift.is_empty() { shift } else { spread(&shift, all)? };
    Ok((bias, shift))
}
