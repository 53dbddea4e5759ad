//! Pools and means.

use tract_onnx::pb::NodeProto;

use super::window::{attribute_list, axis_of, image, last, spatial_shape, whole, window};
use super::{Lowered, Lowering, Source, Table, Value, View, attribute, integers, known};
use crate::engine::quant::program::{Step, Window};

/// Means of quantized values, not yet rounded.
#[derive(Debug, Clone)]
pub(super) struct Mean {
    pub table: Table,
    pub images: usize,
    pub window: Window,
    /// Padding counts.
    pub all: bool,
    /// As onnxruntime does it under windows; over everything its sums are integers.
    pub floats: bool,
    pub shape: Vec<usize>,
    pub order: Vec<usize>,
}

impl Lowering {
    pub(super) fn max_pool(&mut self, node: &NodeProto) -> Lowered<Value> {
        if node.output.len() > 1 {
            return Err("indices are wanted".to_owned());
        }
        let mut value = self.value(node, 0)?;
        let view = match &mut value {
            Value::Bytes(view, _) => view,
            // The greatest byte is the greatest value where the table rises.
            Value::Table(table) if table.grid.is_some_and(|grid| grid.scale > 0.0) => &mut table.view,
            _ => return Err("an input is not quantized".to_owned()),
        };
        let window = match node.op_type.as_str() {
            "GlobalMaxPool" => whole(image(&view.shape)?),
            _ => window(node, &view.shape, None)?,
        };
        let order = last(view.shape.len());
        let x = self.ordered(view, &order);
        let images = view.shape[0];
        let shape = spatial_shape(&view.shape, window.source[2], window.result);
        let m = shape.iter().product::<usize>() / images.max(1);
        let slot = self.images(images, x.slot, [x.len() / images.max(1), m], false, |lowering, source| {
            let result = lowering.new_bytes(m);
            lowering.steps.push(Step::MaxPool { source, result, window });
            Ok(result)
        })?;
        *view = View { slot, shape, order };
        Ok(value)
    }

    /// Averages under windows, and over axes.
    pub(super) fn mean(&mut self, node: &NodeProto) -> Lowered<Value> {
        let mut table = self.value(node, 0).and_then(|x| self.table(x))?;
        known(&table)?;
        let rank = table.view.shape.len();
        let mean = if node.op_type == "AveragePool" {
            let window = window(node, &table.view.shape, None)?;
            let order = last(rank);
            table.view = self.ordered(&table.view, &order);
            let shape = spatial_shape(&table.view.shape, window.source[2], window.result);
            let all = attribute(node, "count_include_pad", 0) != 0;
            Mean { images: shape[0], table, window, all, floats: true, shape, order }
        } else {
            let (gone, keep) = self.reduced(node, rank)?;
            let stay: Vec<usize> = (0..rank).filter(|axis| !gone.contains(axis)).collect();
            let size = |axes: &[usize]| axes.iter().map(|axis| table.view.shape[*axis]).product::<usize>();
            // What stays lies around what goes: the last of it as channels, the rest as images.
            let (channels, images) =
                stay.split_last().map_or((&[][..], &[][..]), |(_, rest)| (&stay[rest.len()..], rest));
            let window = whole([1, size(&gone), size(channels)]);
            let count = size(images);
            let order: Vec<usize> = images.iter().chain(&gone).chain(channels).copied().collect();
            let dim = |axis: usize| if gone.contains(&axis) { 1 } else { table.view.shape[axis] };
            let shape: Vec<usize> =
                if keep { (0..rank).map(dim).collect() } else { stay.iter().map(|a| dim(*a)).collect() };
            table.view = self.ordered(&table.view, &order);
            let order = (0..shape.len()).collect();
            Mean { table, images: count, window, all: false, floats: false, shape, order }
        };
        let source = Source::Mean(Box::new(mean));
        Ok(Value::Pending { source, low: f32::NEG_INFINITY, high: f32::INFINITY })
    }

    /// Axes that a mean takes together, and whether they stay with a size of 1.
    fn reduced(&self, node: &NodeProto, rank: usize) -> Lowered<(Vec<usize>, bool)> {
        if node.op_type == "GlobalAveragePool" {
            return Ok(((2..rank).collect(), true));
        }
        let axes = match attribute_list(node, "axes") {
            Some(axes) => axes,
            None if self.has(node, 1) => integers(&*self.constant(node, 1)?)?.into_iter().map(i64::from).collect(),
            None if attribute(node, "noop_with_empty_axes", 0) != 0 => return Err("a mean over no axis".to_owned()),
            None => (0..rank as i64).collect(),
        };
        let mut axes = axes.into_iter().map(|axis| axis_of(axis, rank)).collect::<Lowered<Vec<_>>>()?;
        axes.sort_unstable();
        axes.dedup();
        Ok((axes, attribute(node, "keepdims", 1) != 0))
    }
}
