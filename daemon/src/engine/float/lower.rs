//! Nodes of a piece → a program.

use std::collections::HashMap;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::Downsample;
use tract_onnx::tract_core::ops::binary::TypedBinOp;
use tract_onnx::tract_core::ops::cnn::{Conv, MaxPool, PaddingSpec, PoolSpec, SumPool};
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::nn::{DataFormat, Reduce, Reducer, Softmax, SoftmaxKind};

use super::kernel::{self, LANES, Lanes};
use super::program::{Dim, Grid, Layer, Program, Slot, Step, Window};

/// Height, width and channels of a buffer, as axes go along them.
const HEIGHT: usize = 0;
const WIDTH: usize = 1;
const CHANNEL: usize = 2;

/// A result, or why there is none.
type Lowered<T> = Result<T, String>;

/// A node that cannot be lowered, and why.
#[derive(Debug)]
pub struct Refused {
    /// Its number in the model.
    pub node: usize,
    /// Why.
    pub why: String,
}

/// A tensor while a piece is lowered.
#[derive(Debug, Clone)]
enum Value {
    /// The piece's input, by axes.
    Input { at: usize, shape: Vec<usize>, strides: Vec<usize> },
    /// A buffer; for each axis that is not 1, along which of its dimensions it goes.
    Buffer { slot: Slot, shape: Vec<usize>, along: Vec<Option<usize>> },
}

impl Value {
    fn shape(&self) -> &[usize] {
        match self {
            Value::Input { shape, .. } | Value::Buffer { shape, .. } => shape,
        }
    }
}

/// Whether a node may be lowered, as far as can be said without doing it.
pub fn fits(model: &TypedModel, node: &TypedNode) -> bool {
    let real = |fact: &TypedFact| fact.datum_type == f32::datum_type() && fact.shape.as_concrete().is_some();
    let [output] = &node.outputs[..] else { return false };
    if !real(&output.fact) || output.fact.konst.is_some() {
        return false;
    }
    let Ok(inputs) = model.node_input_facts(node.id) else { return false };
    if !inputs.iter().all(|fact| real(fact)) {
        return false;
    }
    let constant = |at: usize| inputs.get(at).is_some_and(|fact| fact.konst.is_some());
    if let Some(conv) = node.op_as::<Conv>() {
        return conv.q_params.is_none() && constant(1) && constant(2);
    }
    if let Some(sum) = node.op_as::<EinSum>() {
        return sum.q_params.is_none() && inputs.len() == 2 && constant(0) != constant(1);
    }
    if let Some(op) = node.op_as::<TypedBinOp>() {
        let constants = [constant(0), constant(1)];
        return match op.0.name() {
            "Add" => constants != [true, true],
            "Max" | "Min" | "Mul" => constants[0] != constants[1],
            _ => false,
        };
    }
    if let Some(pool) = node.op_as::<MaxPool>() {
        return pool.with_index_outputs.is_none();
    }
    if let Some(reduce) = node.op_as::<Reduce>() {
        return reduce.reducer == Reducer::Sum;
    }
    if let Some(sample) = node.op_as::<Downsample>() {
        return sample.stride > 0;
    }
    node.op_is::<SumPool>() || node.op_is::<AxisOp>() || node.op_is::<Softmax>()
}

/// Whether a node is worth it: a piece without one is left to tract.
pub fn weighs(node: &TypedNode) -> bool {
    node.op_is::<Conv>() || node.op_is::<EinSum>()
}

/// Lowers `nodes`, in order, with `inputs` from outside; `outputs` are what is wanted of them.
///
/// # Errors
/// The node that cannot be lowered.
pub fn lower(
    model: &TypedModel,
    nodes: &[usize],
    inputs: &[OutletId],
    outputs: &[OutletId],
) -> Result<Program, Refused> {
    let mut lowering = Lowering { model, outputs, values: HashMap::new(), steps: Vec::new(), grids: Vec::new() };
    let refused = |node: usize| move |why: String| Refused { node, why };
    for (at, input) in inputs.iter().enumerate() {
        let shape = lowering.shape(*input).map_err(refused(nodes[0]))?;
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        lowering.values.insert(*input, Value::Input { at, shape, strides });
    }
    for node in nodes {
        let value = lowering.node(&model.nodes[*node]).map_err(refused(*node))?;
        lowering.values.insert(OutletId::new(*node, 0), value);
    }
    let mut shapes = Vec::new();
    for (at, output) in outputs.iter().enumerate() {
        let Some(Value::Buffer { slot, shape, along }) = lowering.values.get(output).cloned() else {
            return Err(Refused { node: output.node, why: "an input as it is".to_owned() });
        };
        let dims = dims(&shape, &along);
        lowering.steps.push(Step::Write { source: slot, output: at, dims });
        shapes.push(shape);
    }
    Ok(Program::new(lowering.steps, &lowering.grids, shapes, kernel::best()))
}

struct Lowering<'a> {
    model: &'a TypedModel,
    outputs: &'a [OutletId],
    values: HashMap<OutletId, Value>,
    steps: Vec<Step>,
    grids: Vec<Grid>,
}

impl Lowering<'_> {
    fn shape(&self, outlet: OutletId) -> Lowered<Vec<usize>> {
        let fact = self.model.outlet_fact(outlet).map_err(|error| error.to_string())?;
        Ok(fact.shape.as_concrete().ok_or("a shape that is not known")?.to_vec())
    }

    fn value(&self, node: &TypedNode, at: usize) -> Lowered<Value> {
        self.values.get(&node.inputs[at]).cloned().ok_or_else(|| "an input from elsewhere".to_owned())
    }

    fn constant(&self, node: &TypedNode, at: usize) -> Option<Arc<Tensor>> {
        self.model.outlet_fact(node.inputs[at]).ok()?.konst.clone()
    }

    fn grid(&mut self, size: [usize; 2], depth: usize) -> Slot {
        self.grids.push(Grid { size, depth, ..Grid::default() });
        self.grids.len() - 1
    }

    /// The value in a buffer whose dimensions its axes go along as `along` says.
    fn buffer(&mut self, value: &Value, along: &[Option<usize>]) -> Lowered<Slot> {
        let along = bare(value.shape(), along);
        let mut size = [1; 3];
        for (n, along) in value.shape().iter().zip(&along) {
            match along {
                Some(along) if size[*along] == 1 => size[*along] = *n,
                None if *n == 1 => {}
                _ => return Err("axes that do not fit a buffer".to_owned()),
            }
        }
        let [height, width, depth] = size;
        match value {
            Value::Buffer { slot, along: have, .. } if *have == along => Ok(*slot),
            Value::Buffer { slot, along: have, .. } => {
                let from = |to: usize| {
                    let axis = along.iter().position(|along| *along == Some(to));
                    axis.and_then(|axis| have[axis]).unwrap_or(CHANNEL)
                };
                let dims = (0..3).map(|to| Dim::of(size[to], from(to))).collect();
                let result = self.grid([height, width], depth);
                self.steps.push(Step::Gather { source: *slot, result, dims });
                Ok(result)
            }
            Value::Input { at, strides, .. } => {
                let step =
                    |to: usize| along.iter().position(|along| *along == Some(to)).map_or(0, |axis| strides[axis]);
                let result = self.grid([height, width], depth);
                self.steps.push(Step::Read { input: *at, result, strides: [step(HEIGHT), step(WIDTH), step(CHANNEL)] });
                Ok(result)
            }
        }
    }

    /// The value of a node's output in a new buffer.
    fn result(&mut self, node: &TypedNode, along: &[Option<usize>]) -> Lowered<(Slot, Value)> {
        let shape = self.shape(OutletId::new(node.id, 0))?;
        let along = bare(&shape, along);
        let mut size = [1; 3];
        for (n, along) in shape.iter().zip(&along) {
            match along {
                Some(along) => size[*along] = *n,
                None if *n == 1 => {}
                None => return Err("a result that does not fit a buffer".to_owned()),
            }
        }
        let slot = self.grid([size[HEIGHT], size[WIDTH]], size[CHANNEL]);
        Ok((slot, Value::Buffer { slot, shape, along }))
    }

    /// The step that makes what a node reads, if nothing else reads that.
    fn made_for(&mut self, node: &TypedNode, at: usize) -> Option<usize> {
        let outlet = node.inputs[at];
        let readers = &self.model.nodes[outlet.node].outputs[outlet.slot].successors;
        if readers.len() != 1 || self.outputs.contains(&outlet) {
            return None;
        }
        // A view of a buffer that has other readers is no buffer of its own.
        let mut from = outlet.node;
        while self.model.nodes[from].op_is::<AxisOp>() {
            let inner = self.model.nodes[from].inputs[0];
            if self.model.nodes[inner.node].outputs[inner.slot].successors.len() != 1 || self.outputs.contains(&inner) {
                return None;
            }
            from = inner.node;
        }
        let Some(Value::Buffer { slot, .. }) = self.values.get(&outlet) else { return None };
        self.steps.iter().position(|step| match step {
            Step::Layer(layer) => layer.result == *slot,
            Step::Add { result, .. }
            | Step::Clamp { result, .. }
            | Step::MaxPool { result, .. }
            | Step::MeanPool { result, .. } => result == slot,
            _ => false,
        })
    }

    fn node(&mut self, node: &TypedNode) -> Lowered<Value> {
        if let Some(conv) = node.op_as::<Conv>() {
            return self.conv(node, conv);
        }
        if let Some(sum) = node.op_as::<EinSum>() {
            return self.product(node, sum);
        }
        if let Some(op) = node.op_as::<TypedBinOp>() {
            return match op.0.name() {
                "Add" => self.add(node),
                "Mul" => self.scale(node),
                name => self.clamp(node, name == "Max"),
            };
        }
        if let Some(pool) = node.op_as::<MaxPool>() {
            let (source, window, _) = self.pooled(node, &pool.pool_spec)?;
            let (result, value) = self.result(node, &formatted(pool.pool_spec.data_format, pool.pool_spec.rank())?)?;
            self.steps.push(Step::MaxPool { source, result, window, range: OPEN });
            return Ok(value);
        }
        if let Some(pool) = node.op_as::<SumPool>() {
            if !pool.normalize {
                return Err("a sum over windows".to_owned());
            }
            let (source, window, _) = self.pooled(node, &pool.pool_spec)?;
            let (result, value) = self.result(node, &formatted(pool.pool_spec.data_format, pool.pool_spec.rank())?)?;
            let all = pool.count_include_pad;
            self.steps.push(Step::MeanPool { source, result, window, all, scale: 1.0, range: OPEN });
            return Ok(value);
        }
        if let Some(reduce) = node.op_as::<Reduce>() {
            return self.total(node, reduce);
        }
        if let Some(softmax) = node.op_as::<Softmax>() {
            return self.softmax(node, softmax);
        }
        if let Some(op) = node.op_as::<AxisOp>() {
            return self.axes(node, op);
        }
        if let Some(sample) = node.op_as::<Downsample>() {
            return self.sampled(node, sample);
        }
        Err("of another kind".to_owned())
    }

    /// Every nth line or pixel.
    fn sampled(&mut self, node: &TypedNode, sample: &Downsample) -> Lowered<Value> {
        let value = self.value(node, 0)?;
        let Value::Buffer { slot, along, .. } = value else { return Err("some lines of an input".to_owned()) };
        let (result, value) = self.result(node, &along)?;
        let Grid { size, depth, .. } = self.grids[result];
        let mut dims = vec![Dim::of(size[0], HEIGHT), Dim::of(size[1], WIDTH), Dim::of(depth, CHANNEL)];
        let Some(axis) = along[sample.axis] else { return Err("some of one line".to_owned()) };
        dims[axis].step = sample.stride.unsigned_abs();
        dims[axis].first = sample.modulo;
        self.steps.push(Step::Gather { source: slot, result, dims });
        Ok(value)
    }

    /// A pool's or a convolution's source, its window, and the axes that both have.
    fn pooled(&mut self, node: &TypedNode, spec: &PoolSpec) -> Lowered<(Slot, Window, Vec<Option<usize>>)> {
        if matches!(spec.padding, PaddingSpec::ExplicitOnnxPool(_, _, true)) {
            return Err("a size rounded up".to_owned());
        }
        let value = self.value(node, 0)?;
        let along = formatted(spec.data_format, spec.rank())?;
        let shape = spec.data_format.shape(value.shape().to_vec()).map_err(|error| error.to_string())?;
        if shape.n().is_some_and(|n| *n != 1) {
            return Err("a batch".to_owned());
        }
        let padding = spec.computed_padding(shape.hw_dims());
        // A sequence is an image of one line.
        let pair = |or: usize, of: &dyn Fn(usize) -> usize| {
            if spec.rank() == 1 { [or, of(0)] } else { [of(0), of(1)] }
        };
        let window = Window {
            kernel: pair(1, &|axis| spec.kernel_shape[axis]),
            stride: pair(1, &|axis| spec.stride(axis)),
            dilation: pair(1, &|axis| spec.dilation(axis)),
            before: pair(0, &|axis| padding[axis].pad_before),
        };
        Ok((self.buffer(&value, &along)?, window, along))
    }

    fn conv(&mut self, node: &TypedNode, conv: &Conv) -> Lowered<Value> {
        let (source, window, along) = self.pooled(node, &conv.pool_spec)?;
        let kernel = self.constant(node, 1).ok_or("weights that are not constant")?;
        let kernel = conv.kernel_fmt.kernel_as_group_o_ihw(&kernel, conv.group).map_err(|error| error.to_string())?;
        let bias = self.constant(node, 2).ok_or("a bias that is not constant")?;
        let (kernel, bias) = (floats(&kernel)?, floats(&bias)?);
        let (result, value) = self.result(node, &along)?;
        let (from, to) = (self.grids[source], self.grids[result]);
        let (groups, taps) = (conv.group, window.kernel[0] * window.kernel[1]);
        let (inputs, channels) = (from.depth / groups, to.depth / groups);
        let bias = |channel: usize| bias.get(channel).or(bias.first()).copied().unwrap_or(0.0);
        // By output channel, input channel of its group, and tap.
        let weight = |channel: usize, input: usize, tap: usize| kernel[(channel * inputs + input) * taps + tap];
        let each = groups > 1 && inputs == 1 && channels == 1;
        let (groups, channels) = if each { (1, to.depth) } else { (groups, channels) };
        // Successive taps of a line lie side by side.
        let joined = !each && groups == 1 && window.dilation[1] == 1;
        let across = if joined { 1 } else { window.kernel[1] };
        let length = if each { 0 } else { inputs * window.kernel[1] / across };
        let runs: Vec<[usize; 2]> = (0..window.kernel[0]).flat_map(|y| (0..across).map(move |x| [y, x])).collect();
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for group in 0..groups {
            for block in (0..channels).step_by(LANES) {
                let lanes = |of: &dyn Fn(usize) -> f32| {
                    Lanes(std::array::from_fn(|lane| {
                        if block + lane < channels { of(group * channels + block + lane) } else { 0.0 }
                    }))
                };
                biases.push(lanes(&bias));
                for tap in 0..taps {
                    if each {
                        weights.push(lanes(&|channel| weight(channel, 0, tap)));
                    } else {
                        weights.extend((0..inputs).map(|input| lanes(&|channel| weight(channel, input, tap))));
                    }
                }
            }
        }
        self.layer(Layer {
            source,
            result,
            plus: None,
            window,
            groups,
            channels,
            taps: runs,
            length,
            weights,
            bias: biases,
            range: OPEN,
        });
        Ok(value)
    }

    fn layer(&mut self, layer: Layer) {
        let size = self.grids[layer.result].size;
        let from = &mut self.grids[layer.source];
        let after = layer.window.after(from.size, size);
        let wider = |has: [usize; 2], needs: [usize; 2]| [has[0].max(needs[0]), has[1].max(needs[1])];
        from.before = wider(from.before, layer.window.before);
        from.after = wider(from.after, after);
        self.steps.push(Step::Layer(Box::new(layer)));
    }

    /// A product with a constant matrix: a convolution of one tap.
    fn product(&mut self, node: &TypedNode, sum: &EinSum) -> Lowered<Value> {
        let at = usize::from(self.constant(node, 0).is_some());
        let matrix = self.constant(node, 1 - at).ok_or("weights that are not constant")?;
        let value = self.value(node, at)?;
        let mut along = vec![None; value.shape().len()];
        let mut result_along = vec![None; self.shape(OutletId::new(node.id, 0))?.len()];
        let (mut inner, mut outer) = (None, None);
        let mut rows: Vec<(usize, usize)> = Vec::new();
        for axis in sum.axes.iter_all_axes() {
            let one = |list: &[usize]| match list {
                [] => Ok(None),
                [axis] => Ok(Some(*axis)),
                _ => Err("a diagonal".to_owned()),
            };
            let (x, w) = (one(&axis.inputs[at])?, one(&axis.inputs[1 - at])?);
            let out = one(&axis.outputs[0])?;
            let big = |axis: Option<usize>, shape: &[usize]| axis.is_some_and(|axis| shape[axis] != 1);
            match (big(x, value.shape()), big(w, matrix.shape()), out) {
                (true, true, None) if inner.is_none() => {
                    inner = w;
                    along[x.ok_or("an axis")?] = Some(CHANNEL);
                }
                (false, true, Some(out)) if outer.is_none() => {
                    outer = w;
                    result_along[out] = Some(CHANNEL);
                }
                (true, false, Some(out)) => rows.push((x.ok_or("an axis")?, out)),
                (false, false, _) => {}
                _ => return Err("a product of another kind".to_owned()),
            }
        }
        // Rows stay as they lie, where they do.
        rows.sort_unstable();
        let lie = |axis: usize| match &value {
            Value::Buffer { along, .. } => along[axis].filter(|along| *along != CHANNEL),
            Value::Input { .. } => None,
        };
        let as_is = rows.iter().all(|(axis, _)| lie(*axis).is_some());
        let free = match rows.len() {
            0 | 1 => &[WIDTH][..],
            2 => &[HEIGHT, WIDTH][..],
            _ => return Err("a product of many axes".to_owned()),
        };
        for ((axis, out), free) in rows.iter().zip(free) {
            let row = if as_is { lie(*axis) } else { Some(*free) };
            along[*axis] = row;
            result_along[*out] = row;
        }
        let source = self.buffer(&value, &along)?;
        let (result, value) = self.result(node, &result_along)?;
        let (inputs, channels) = (self.grids[source].depth, self.grids[result].depth);
        let matrix_values = floats(&matrix)?;
        let stride = |axis: Option<usize>| axis.map_or(0, |axis| matrix.shape()[axis + 1..].iter().product::<usize>());
        let (down, right) = (stride(inner), stride(outer));
        let weights = (0..channels)
            .step_by(LANES)
            .flat_map(|block| (0..inputs).map(move |input| (block, input)))
            .map(|(block, input)| {
                Lanes(std::array::from_fn(|lane| {
                    let channel = block + lane;
                    if channel < channels { matrix_values[input * down + channel * right] } else { 0.0 }
                }))
            })
            .collect();
        let bias = vec![Lanes([0.0; LANES]); channels.div_ceil(LANES)];
        let window = Window { kernel: [1, 1], stride: [1, 1], dilation: [1, 1], before: [0, 0] };
        self.layer(Layer {
            source,
            result,
            plus: None,
            window,
            groups: 1,
            channels,
            taps: vec![[0, 0]],
            length: inputs,
            weights,
            bias,
            range: OPEN,
        });
        Ok(value)
    }

    fn add(&mut self, node: &TypedNode) -> Lowered<Value> {
        for at in 0..2 {
            if let Some(bias) = self.constant(node, at) {
                return self.biased(node, 1 - at, &bias);
            }
        }
        let (a, b) = (self.value(node, 0)?, self.value(node, 1)?);
        if a.shape() != b.shape() {
            return Err("an addition of different shapes".to_owned());
        }
        let along = match (&a, &b) {
            (Value::Buffer { along, .. }, _) | (_, Value::Buffer { along, .. }) => along.clone(),
            _ => return Err("an addition of inputs".to_owned()),
        };
        let slots = [self.buffer(&a, &along)?, self.buffer(&b, &along)?];
        let open = |step: &Step| matches!(step, Step::Layer(layer) if layer.plus.is_none() && layer.range == OPEN);
        let makers = [0, 1].map(|at| self.made_for(node, at).filter(|step| open(&self.steps[*step])));
        // The later of the two may add the other: that is there by then.
        let later = match makers {
            [Some(a), Some(b)] => Some(usize::from(b > a)),
            [Some(_), None] => Some(0),
            [None, Some(_)] => Some(1),
            [None, None] => None,
        };
        if let Some(at) = later
            && let Some(step) = makers[at]
            && self.steps[step + 1..].iter().all(|step| step.result() != Some(slots[1 - at]))
            && let Step::Layer(layer) = &mut self.steps[step]
            && layer.result == slots[at]
            && layer.source != slots[1 - at]
        {
            layer.plus = Some(slots[1 - at]);
            return Ok(Value::Buffer { slot: slots[at], shape: a.shape().to_vec(), along });
        }
        let (result, value) = self.result(node, &along)?;
        self.steps.push(Step::Add { a: slots[0], b: slots[1], result, range: OPEN });
        Ok(value)
    }

    /// A constant for each channel, added to a layer.
    fn biased(&mut self, node: &TypedNode, at: usize, bias: &Tensor) -> Lowered<Value> {
        let Value::Buffer { slot, shape, along } = self.value(node, at)? else {
            return Err("a constant added to an input".to_owned());
        };
        if self.shape(OutletId::new(node.id, 0))? != shape || bias.rank() != shape.len() {
            return Err("a constant of another shape".to_owned());
        }
        let by_channel = bias.shape().iter().zip(&along).all(|(n, along)| *n == 1 || *along == Some(CHANNEL));
        if !by_channel {
            return Err("a constant for each pixel".to_owned());
        }
        let bias = floats(bias)?;
        let Some(step) = self.made_for(node, at) else { return Err("a constant added to no layer".to_owned()) };
        let Step::Layer(layer) = &mut self.steps[step] else { return Err("a constant added to no layer".to_owned()) };
        if layer.range != OPEN || layer.result != slot {
            return Err("a constant added behind an activation".to_owned());
        }
        let blocks = layer.channels.div_ceil(LANES);
        for (block, lanes) in layer.bias.iter_mut().enumerate() {
            let (group, block) = (block / blocks, block % blocks);
            for (lane, value) in lanes.0.iter_mut().enumerate() {
                if block * LANES + lane < layer.channels {
                    let channel = group * layer.channels + block * LANES + lane;
                    *value += bias[if bias.len() == 1 { 0 } else { channel }];
                }
            }
        }
        Ok(Value::Buffer { slot, shape, along })
    }

    /// A mean is a sum with a factor.
    fn scale(&mut self, node: &TypedNode) -> Lowered<Value> {
        let at = usize::from(self.constant(node, 0).is_some());
        let factor = uniform(&*self.constant(node, 1 - at).ok_or("a factor that is not constant")?)?;
        let value = self.value(node, at)?;
        if self.shape(OutletId::new(node.id, 0))? != value.shape() {
            return Err("a factor of another shape".to_owned());
        }
        let step = self.made_for(node, at).ok_or("a factor of no sum")?;
        match &mut self.steps[step] {
            Step::MeanPool { scale, range, .. } if *range == OPEN => *scale *= factor,
            _ => return Err("a factor of no sum".to_owned()),
        }
        Ok(value)
    }

    fn clamp(&mut self, node: &TypedNode, least: bool) -> Lowered<Value> {
        let at = usize::from(self.constant(node, 0).is_some());
        let limit = uniform(&*self.constant(node, 1 - at).ok_or("a limit that is not constant")?)?;
        let value = self.value(node, at)?;
        if self.shape(OutletId::new(node.id, 0))? != value.shape() {
            return Err("a limit of another shape".to_owned());
        }
        let cut = |x: f32| if least { x.max(limit) } else { x.min(limit) };
        if let Some(step) = self.made_for(node, at)
            && let Step::Layer(_) | Step::Add { .. } | Step::Clamp { .. } | Step::MaxPool { .. } | Step::MeanPool { .. } =
                &self.steps[step]
        {
            let range = match &mut self.steps[step] {
                Step::Layer(layer) => &mut layer.range,
                Step::Add { range, .. }
                | Step::Clamp { range, .. }
                | Step::MaxPool { range, .. }
                | Step::MeanPool { range, .. } => range,
                _ => return Err("a step without a range".to_owned()),
            };
            *range = (cut(range.0), cut(range.1));
            return Ok(value);
        }
        let Value::Buffer { slot, along, .. } = value else { return Err("a limit to an input".to_owned()) };
        let (result, value) = self.result(node, &along)?;
        self.steps.push(Step::Clamp { source: slot, result, range: (cut(OPEN.0), cut(OPEN.1)) });
        Ok(value)
    }

    /// A sum over height and width.
    fn total(&mut self, node: &TypedNode, reduce: &Reduce) -> Lowered<Value> {
        let value = self.value(node, 0)?;
        let Value::Buffer { slot, shape, along } = &value else { return Err("a sum over an input".to_owned()) };
        let grid = self.grids[*slot];
        let gone: Vec<usize> = reduce.axes.iter().filter_map(|axis| along[*axis]).collect();
        if gone.contains(&CHANNEL) {
            return Err("a sum over channels".to_owned());
        }
        let kernel = [HEIGHT, WIDTH].map(|axis| if gone.contains(&axis) { grid.size[axis] } else { 1 });
        let window = Window { kernel, stride: [1, 1], dilation: [1, 1], before: [0, 0] };
        let (source, taps) = (*slot, kernel[0] * kernel[1]);
        if self.shape(OutletId::new(node.id, 0))?.len() != shape.len() {
            return Err("a sum that drops axes".to_owned());
        }
        let along: Vec<Option<usize>> = along.clone();
        let (result, value) = self.result(node, &along)?;
        self.steps.push(Step::MeanPool { source, result, window, all: true, scale: taps as f32, range: OPEN });
        Ok(value)
    }

    fn softmax(&mut self, node: &TypedNode, softmax: &Softmax) -> Lowered<Value> {
        let [axis] = softmax.axes[..] else { return Err("a softmax over many axes".to_owned()) };
        if softmax.quant_output_dt.is_some() || !matches!(softmax.kind, SoftmaxKind::Softmax) {
            return Err("a softmax of another kind".to_owned());
        }
        let value = self.value(node, 0)?;
        let mut rows = [WIDTH, HEIGHT].into_iter();
        let mut along = vec![None; value.shape().len()];
        for (at, n) in value.shape().iter().enumerate().filter(|(_, n)| **n != 1) {
            let _ = n;
            along[at] = Some(if at == axis { CHANNEL } else { rows.next().ok_or("a softmax of many axes")? });
        }
        let source = self.buffer(&value, &along)?;
        let (result, value) = self.result(node, &along)?;
        self.steps.push(Step::Softmax { source, result });
        Ok(value)
    }

    fn axes(&mut self, node: &TypedNode, op: &AxisOp) -> Lowered<Value> {
        let value = self.value(node, 0)?;
        let target = self.shape(OutletId::new(node.id, 0))?;
        match (value, op) {
            (Value::Input { at, mut shape, mut strides }, AxisOp::Move(from, to)) => {
                let (n, stride) = (shape.remove(*from), strides.remove(*from));
                shape.insert(*to, n);
                strides.insert(*to, stride);
                Ok(Value::Input { at, shape, strides })
            }
            (Value::Buffer { slot, mut shape, mut along }, AxisOp::Move(from, to)) => {
                let (n, dimension) = (shape.remove(*from), along.remove(*from));
                shape.insert(*to, n);
                along.insert(*to, dimension);
                Ok(Value::Buffer { slot, shape, along })
            }
            (value, _) => self.reshaped(value, target),
        }
    }

    fn reshaped(&mut self, value: Value, target: Vec<usize>) -> Lowered<Value> {
        let big = |shape: &[usize]| -> Vec<usize> { shape.iter().copied().filter(|n| *n != 1).collect() };
        let same = big(value.shape()) == big(&target);
        match value {
            Value::Input { at, shape, strides } if same => {
                let mut kept = shape.iter().zip(&strides).filter(|(n, _)| **n != 1).map(|(_, stride)| *stride);
                let strides = target.iter().map(|n| if *n == 1 { 0 } else { kept.next().unwrap_or(0) }).collect();
                Ok(Value::Input { at, shape: target, strides })
            }
            Value::Buffer { slot, along, .. } if same => {
                let mut kept = along.into_iter().flatten();
                let along = target.iter().map(|n| if *n == 1 { None } else { kept.next() }).collect();
                Ok(Value::Buffer { slot, shape: target, along })
            }
            Value::Buffer { slot, shape, along } => {
                let list = big(&target);
                let [n] = list[..] else { return Err("a shape of many axes".to_owned()) };
                let dims = dims(&shape, &along);
                let result = self.grid([1, 1], n);
                self.steps.push(Step::Gather { source: slot, result, dims });
                let along = target.iter().map(|n| (*n != 1).then_some(CHANNEL)).collect();
                Ok(Value::Buffer { slot: result, shape: target, along })
            }
            Value::Input { .. } => Err("an input of another shape".to_owned()),
        }
    }
}

/// The axes of a buffer that are not 1.
fn dims(shape: &[usize], along: &[Option<usize>]) -> Vec<Dim> {
    shape.iter().zip(along).filter_map(|(n, along)| along.map(|along| Dim::of(*n, along))).collect()
}

/// No limits.
const OPEN: (f32, f32) = (f32::NEG_INFINITY, f32::INFINITY);

/// `along` with nothing where an axis is 1.
fn bare(shape: &[usize], along: &[Option<usize>]) -> Vec<Option<usize>> {
    shape.iter().zip(along).map(|(n, along)| if *n == 1 { None } else { *along }).collect()
}

/// What the axes of an image or a sequence go along.
fn formatted(format: DataFormat, rank: usize) -> Lowered<Vec<Option<usize>>> {
    let spatial: &[Option<usize>] = match rank {
        1 => &[Some(WIDTH)],
        2 => &[Some(HEIGHT), Some(WIDTH)],
        _ => return Err(format!("{rank} dimensions of space")),
    };
    let batch: &[Option<usize>] = if format.has_n() { &[None] } else { &[] };
    let channel: &[Option<usize>] = &[Some(CHANNEL)];
    Ok(if format.c_is_last() { [batch, spatial, channel].concat() } else { [batch, channel, spatial].concat() })
}

fn floats(tensor: &Tensor) -> Lowered<Vec<f32>> {
    let view = tensor.to_plain_array_view::<f32>().map_err(|error| error.to_string())?;
    Ok(view.iter().copied().collect())
}

/// The one value that a tensor has everywhere.
fn uniform(tensor: &Tensor) -> Lowered<f32> {
    let values = floats(tensor)?;
    let first = *values.first().ok_or("an empty constant")?;
    if values.iter().all(|value| *value == first) { Ok(first) } else { Err("a constant for each element".to_owned()) }
}
