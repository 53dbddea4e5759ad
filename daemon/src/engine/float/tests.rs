//! Graphs of every kind that is lowered, against tract's own operators.

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::cnn::{Conv, KernelFormat, MaxPool, PaddingSpec, PoolSpec, SumPool};
use tract_onnx::tract_core::ops::einsum::EinSum;
use tract_onnx::tract_core::ops::math::{add, max, min, mul};
use tract_onnx::tract_core::ops::nn::{DataFormat, Reduce, Reducer, Softmax, SoftmaxKind, sigmoid};

use super::rewrite::{Run, rewrite};

/// Numbers between -1 and 1, always the same for a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    fn tensor(&mut self, shape: &[usize]) -> TractResult<Tensor> {
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| self.next()).collect();
        Tensor::from_shape(shape, &data)
    }
}

/// A graph in the making.
struct Net {
    model: TypedModel,
    numbers: Numbers,
    made: usize,
}

impl Net {
    fn new(shape: &[usize]) -> TractResult<(Self, OutletId)> {
        let mut model = TypedModel::default();
        let input = model.add_source("input", f32::fact(shape))?;
        Ok((Net { model, numbers: Numbers(7), made: 0 }, input))
    }

    fn node(&mut self, op: impl Into<Box<dyn TypedOp>>, inputs: &[OutletId]) -> TractResult<OutletId> {
        self.made += 1;
        Ok(self.model.wire_node(format!("node.{}", self.made), op, inputs)?[0])
    }

    fn constant(&mut self, shape: &[usize]) -> TractResult<OutletId> {
        self.made += 1;
        let tensor = self.numbers.tensor(shape)?;
        self.model.add_const(format!("constant.{}", self.made), tensor)
    }

    fn number(&mut self, value: f32, rank: usize) -> TractResult<OutletId> {
        self.made += 1;
        self.model.add_const(format!("number.{}", self.made), Tensor::from_shape(&vec![1; rank], &[value])?)
    }

    fn shape(&self, outlet: OutletId) -> TractResult<Vec<usize>> {
        let fact = self.model.outlet_fact(outlet)?;
        Ok(fact.shape.as_concrete().context("a shape")?.to_vec())
    }

    fn conv(&mut self, x: OutletId, spec: PoolSpec, group: usize) -> TractResult<OutletId> {
        let (channels, inputs) = (spec.output_channels, spec.input_channels);
        let kernel = [&[channels, inputs / group], &spec.kernel_shape[..]].concat();
        let (kernel, bias) = (self.constant(&kernel)?, self.constant(&[channels])?);
        self.node(Conv { pool_spec: spec, kernel_fmt: KernelFormat::OIHW, group, q_params: None }, &[x, kernel, bias])
    }

    fn relu(&mut self, x: OutletId) -> TractResult<OutletId> {
        let zero = self.number(0.0, self.shape(x)?.len())?;
        self.node(max(), &[zero, x])
    }

    /// Runs it as tract does and with our operators, of which there must be `pieces`.
    fn check(mut self, outputs: &[OutletId], pieces: usize) -> TractResult<()> {
        self.model.select_output_outlets(outputs)?;
        let input = self.shape(self.model.inputs[0])?;
        let input = self.numbers.tensor(&input)?.into_tvalue();
        let plain = self.model.clone().into_optimized()?.into_runnable()?.run(tvec!(input.clone()))?;
        let ours = rewrite(self.model.into_decluttered()?)?;
        assert_eq!(ours.nodes.iter().filter(|node| node.op_is::<Run>()).count(), pieces, "{ours}");
        let ours = ours.into_optimized()?.into_runnable()?;
        // Twice: the second run has the first one's buffers.
        for _ in 0..2 {
            for (ours, plain) in ours.run(tvec!(input.clone()))?.iter().zip(&plain) {
                ours.close_enough(plain, Approximation::Approximate)?;
            }
        }
        Ok(())
    }
}

fn spec(kernel: &[usize], inputs: usize, outputs: usize) -> PoolSpec {
    PoolSpec {
        data_format: DataFormat::NCHW,
        kernel_shape: kernel.into(),
        padding: PaddingSpec::SameUpper,
        dilations: None,
        strides: None,
        input_channels: inputs,
        output_channels: outputs,
    }
}

#[test]
fn convolutions_of_every_kind() -> TractResult<()> {
    let paddings = [
        PaddingSpec::Valid,
        PaddingSpec::SameUpper,
        PaddingSpec::SameLower,
        PaddingSpec::Explicit(tvec!(1, 2), tvec!(2, 0)),
    ];
    for (group, inputs, outputs) in [(1, 3, 8), (1, 16, 20), (12, 12, 12), (32, 32, 32), (4, 8, 16), (5, 5, 10)] {
        for kernel in [[1, 1], [3, 3], [2, 5]] {
            for (stride, dilation) in
                [([1, 1], [1, 1]), ([2, 1], [1, 1]), ([2, 2], [1, 1]), ([1, 1], [2, 1]), ([1, 2], [1, 2])]
            {
                for padding in &paddings {
                    for format in [DataFormat::NCHW, DataFormat::NHWC] {
                        let shape = format.from_n_c_hw(1, inputs, [11, 13])?;
                        let (mut net, x) = Net::new(&shape.shape)?;
                        let spec = PoolSpec {
                            data_format: format,
                            padding: padding.clone(),
                            dilations: Some(dilation.as_slice().into()),
                            strides: Some(stride.as_slice().into()),
                            ..spec(&kernel, inputs, outputs)
                        };
                        let x = net.conv(x, spec, group)?;
                        let x = net.relu(x)?;
                        net.check(&[x], 1)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn sequences() -> TractResult<()> {
    let (mut net, x) = Net::new(&[1, 6, 40])?;
    let x = net.conv(x, PoolSpec { strides: Some(tvec!(2)), ..spec(&[5], 6, 16) }, 1)?;
    let x = net.relu(x)?;
    let x = net.conv(x, spec(&[3], 16, 16), 16)?;
    net.check(&[x], 1)
}

#[test]
fn residuals_share_buffers_of_different_margins() -> TractResult<()> {
    let (mut net, x) = Net::new(&[1, 3, 12, 10])?;
    let x = net.conv(x, spec(&[3, 3], 3, 24), 1)?;
    let x = net.relu(x)?;
    let y = net.conv(x, spec(&[3, 3], 24, 24), 1)?;
    let y = net.relu(y)?;
    let y = net.conv(y, spec(&[1, 1], 24, 24), 1)?;
    let sum = net.node(add(), &[x, y])?;
    let sum = net.relu(sum)?;
    // What is added has a wider reader, and is an output, too.
    let wide = net.conv(x, spec(&[5, 5], 24, 24), 24)?;
    let last = net.node(add(), &[sum, wide])?;
    net.check(&[last, x, sum], 1)
}

#[test]
fn an_addition_of_what_comes_later_waits() -> TractResult<()> {
    let (mut net, x) = Net::new(&[1, 8, 6, 6])?;
    let a = net.conv(x, spec(&[3, 3], 8, 16), 1)?;
    let b = net.conv(x, spec(&[1, 1], 8, 16), 1)?;
    let b = net.relu(b)?;
    let sum = net.node(add(), &[a, b])?;
    let double = net.node(add(), &[sum, sum])?;
    net.check(&[double], 1)
}

#[test]
fn pools_and_classes() -> TractResult<()> {
    for pool in 0..4 {
        let (mut net, x) = Net::new(&[1, 12, 12, 3])?;
        let x = net.node(AxisOp::Move(3, 1), &[x])?;
        let x = net.conv(x, spec(&[3, 3], 3, 20), 1)?;
        let six = net.number(0.6, 4)?;
        let x = net.relu(x)?;
        let x = net.node(min(), &[x, six])?;
        let window = PoolSpec { strides: Some(tvec!(2, 2)), ..spec(&[3, 3], 20, 20) };
        let x = match pool {
            0 => net.node(MaxPool { pool_spec: window, with_index_outputs: None }, &[x])?,
            1 => net.node(SumPool { pool_spec: window, count_include_pad: false, normalize: true }, &[x])?,
            2 => net.node(SumPool { pool_spec: window, count_include_pad: true, normalize: true }, &[x])?,
            _ => {
                let x = net.node(Reduce { axes: tvec!(2, 3), reducer: Reducer::Sum }, &[x])?;
                let factor = net.number(1.0 / 144.0, 4)?;
                net.node(mul(), &[x, factor])?
            }
        };
        let n: usize = net.shape(x)?.iter().product();
        let shape = net.shape(x)?.iter().map(|n| n.to_dim()).collect();
        let x = net.node(AxisOp::Reshape(0, shape, tvec!(1.to_dim(), n.to_dim())), &[x])?;
        let matrix = net.constant(&[n, 10])?;
        let product = EinSum::new("mk,kn->mn".parse()?, f32::datum_type());
        let x = net.node(product, &[x, matrix])?;
        let bias = net.constant(&[1, 10])?;
        let x = net.node(add(), &[x, bias])?;
        let x = net.node(Softmax { axes: tvec!(1), quant_output_dt: None, kind: SoftmaxKind::Softmax }, &[x])?;
        net.check(&[x], 1)?;
    }
    Ok(())
}

#[test]
fn what_is_not_lowered_stays_between() -> TractResult<()> {
    let (mut net, x) = Net::new(&[1, 4, 9, 9])?;
    let x = net.conv(x, spec(&[3, 3], 4, 16), 1)?;
    let gate = net.node(sigmoid(), &[x])?;
    let x = net.node(mul(), &[x, gate])?;
    let x = net.conv(x, spec(&[3, 3], 16, 4), 1)?;
    net.check(&[x], 2)
}

#[test]
fn a_batch_is_left_to_tract() -> TractResult<()> {
    let (mut net, x) = Net::new(&[2, 4, 9, 9])?;
    let x = net.conv(x, spec(&[3, 3], 4, 16), 1)?;
    net.check(&[x], 0)
}
