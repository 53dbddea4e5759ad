//! What only moves values: they stay the bytes that they are.

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::Dimension;
use tract_onnx::pb::tensor_shape_proto::dimension::Value::DimValue;
use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto,
    type_proto,
};
use tract_onnx::prelude::*;

use super::window::{attribute_list, axis_of};
use super::{Grid, Integers, Lowered, Lowering, Source, Table, Value, View, attribute, floats, integers};
use crate::engine::quant::program::Step;

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

fn permutation(perm: Option<&[i64]>, rank: usize) -> Lowered<Vec<usize>> {
    match perm {
        None => Ok((0..rank).rev().collect()),
        Some(perm) if perm.len() == rank => perm.iter().map(|axis| axis_of(*axis, rank)).collect(),
        Some(_) => Err("a perm of another rank".to_owned()),
    }
}

impl Lowering {
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

    pub(super) fn transpose(&mut self, value: Value, perm: Option<&[i64]>) -> Lowered<Value> {
        match value {
            Value::Bytes(view, datum) => Ok(Value::Bytes(self.turned(&view, perm)?, datum)),
            Value::Table(table) => Ok(Value::Table(Table { view: self.turned(&table.view, perm)?, ..table })),
            Value::Integers(weights) => {
                let perm = permutation(perm, weights.tensor.rank())?;
                let axis = perm.iter().position(|from| *from == weights.axis).ok_or("perm")?;
                let tensor = weights.tensor.as_ref().clone().permute_axes(&perm).map_err(|error| error.to_string())?;
                Ok(Value::Integers(Integers { tensor: Arc::new(tensor), axis, ..weights }))
            }
            Value::Pending { mut source, low, high } => {
                match &mut source {
                    Source::Linear(linear) => self.turn(&mut linear.shape, &mut linear.order, perm)?,
                    Source::Mean(mean) => self.turn(&mut mean.shape, &mut mean.order, perm)?,
                    Source::Sum(a, b) | Source::Product(a, b) if a.view.shape.len() == b.view.shape.len() => {
                        a.view = self.turned(&a.view, perm)?;
                        b.view = self.turned(&b.view, perm)?;
                    }
                    Source::Concat { parts, axis } => {
                        let perm = permutation(perm, parts[0].view.shape.len())?;
                        let list: Vec<i64> = perm.iter().map(|axis| *axis as i64).collect();
                        for part in parts.iter_mut() {
                            part.view = self.turned(&part.view, Some(&list))?;
                        }
                        *axis = perm.iter().position(|from| from == axis).ok_or("perm")?;
                    }
                    _ => return Err("of what is not yet rounded".to_owned()),
                }
                Ok(Value::Pending { source, low, high })
            }
            _ => Err("of floats".to_owned()),
        }
    }

    fn turn(&self, shape: &mut Vec<usize>, order: &mut Vec<usize>, perm: Option<&[i64]>) -> Lowered<()> {
        let view = View { slot: 0, shape: std::mem::take(shape), order: std::mem::take(order) };
        let turned = self.turned(&view, perm)?;
        (*shape, *order) = (turned.shape, turned.order);
        Ok(())
    }

    /// The same bytes, seen with their dimensions in another order.
    pub(super) fn turned(&self, view: &View, perm: Option<&[i64]>) -> Lowered<View> {
        let perm = permutation(perm, view.shape.len())?;
        let place = |axis: usize| perm.iter().position(|from| *from == axis).ok_or("perm");
        let order = view.order.iter().map(|axis| place(*axis)).collect::<Result<_, _>>()?;
        Ok(View { slot: view.slot, shape: perm.iter().map(|axis| view.shape[*axis]).collect(), order })
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

    /// Operators of [`MOVES`]: each value of the result is one of the source, or what padding is filled with.
    pub(super) fn moved(&mut self, node: &NodeProto) -> Lowered<Value> {
        let mut value = self.value(node, 0)?;
        let fill = match node.op_type.as_str() {
            "Pad" => match (self.has(node, 2), &value) {
                (true, _) => self.numbers(node, 2)?.first().copied().ok_or("nothing to fill with")?,
                _ => node.attribute.iter().find(|a| a.name == "value").map_or(0.0, |a| a.f),
            },
            _ => 0.0,
        };
        let (view, fill) = match &mut value {
            Value::Bytes(view, datum) => (view, Some((fill as i32 + super::offset(*datum)) as u8)),
            Value::Table(table) => {
                let near = |byte: &usize| (table.values[*byte] - fill).abs() <= 1e-6 * fill.abs();
                let fill = (0..256).find(near).map(|byte| byte as u8);
                (&mut table.view, fill)
            }
            _ => return Err("of floats".to_owned()),
        };
        let (picked, shape) = self.picked(node, &view.shape)?;
        // The result lies as the source does, where it has as many dimensions.
        let order: Vec<usize> =
            if shape.len() == view.shape.len() { view.order.clone() } else { (0..shape.len()).collect() };
        let (from, to) = (view.strides(), View { slot: 0, shape: shape.clone(), order: order.clone() }.strides());
        let at = |mut index: usize, dims: &[usize], strides: &[usize]| {
            let mut at = 0;
            for (dim, stride) in dims.iter().zip(strides).rev() {
                at += index % dim * stride;
                index /= dim;
            }
            at
        };
        let mut index = vec![0; picked.len()];
        for (result, source) in picked.iter().enumerate() {
            index[at(result, &shape, &to)] = match source {
                Some(source) => at(*source, &view.shape, &from) as u32,
                None => u32::MAX,
            };
        }
        let padded = picked.iter().any(Option::is_none);
        let fill = if padded { fill.ok_or("filled with what is not quantized")? } else { 0 };
        let slot = self.new_bytes(index.len());
        self.steps.push(Step::Pick { source: view.slot, result: slot, index, fill });
        *view = View { slot, shape, order };
        Ok(value)
    }

    /// Which element of an input of `shape` each of the result is, and the result's shape: tract moves numbers, once.
    fn picked(&self, node: &NodeProto, shape: &[usize]) -> Lowered<(Vec<Option<usize>>, Vec<usize>)> {
        let n: usize = shape.iter().product();
        if n >= 1 << 24 {
            return Err("too large to be moved".to_owned());
        }
        let mut node = NodeProto { domain: String::new(), ..node.clone() };
        if node.op_type == "Pad" {
            // Filled with 0, which is no number of an element.
            node.attribute.retain(|a| a.name != "value");
            if let Some(fill) = node.input.get_mut(2) {
                fill.clear();
            }
        }
        let names: Vec<String> = node.input.iter().skip(1).filter(|name| !name.is_empty()).cloned().collect();
        let initializer = (1..node.input.len())
            .filter(|at| self.has(&node, *at))
            .map(|at| proto(&node.input[at], &*self.constant(&node, at)?))
            .collect::<Lowered<Vec<_>>>()?;
        if names.contains(&node.input[0]) {
            return Err("moved by itself".to_owned());
        }
        let graph = GraphProto {
            input: vec![float_input(&node.input[0], shape)],
            output: vec![ValueInfoProto { name: node.output[0].clone(), ..ValueInfoProto::default() }],
            node: vec![node],
            initializer,
            ..GraphProto::default()
        };
        let opset = OperatorSetIdProto { domain: String::new(), version: self.opset };
        let model =
            ModelProto { ir_version: 8, graph: Some(graph), opset_import: vec![opset], ..ModelProto::default() };
        let run = || -> TractResult<Tensor> {
            let mut model = tract_onnx::onnx().model_for_proto_model(&model)?;
            model.set_input_fact(0, InferenceFact::dt_shape(f32::datum_type(), shape))?;
            model.set_output_fact(0, InferenceFact::default())?;
            let numbers: Vec<f32> = (1..=n).map(|at| at as f32).collect();
            let input = Tensor::from_shape(shape, &numbers)?.into_tvalue();
            let moved = model.into_typed()?.into_runnable()?.run(tvec!(input))?.remove(0);
            Ok(moved.into_tensor())
        };
        let moved = run().map_err(|error| format!("{error:#}"))?;
        let picked = floats(&moved)?
            .into_iter()
            .map(|x| match x as usize {
                0 => Ok(None),
                at if at as f32 == x && at <= n => Ok(Some(at - 1)),
                _ => Err("mixes what it moves".to_owned()),
            })
            .collect::<Lowered<_>>()?;
        Ok((picked, moved.shape().to_vec()))
    }
}

/// Operators that only move values, by constants.
pub(in crate::engine::quant) const MOVES: [&str; 8] =
    ["Slice", "Pad", "Gather", "Expand", "Tile", "Resize", "DepthToSpace", "SpaceToDepth"];

fn float_input(name: &str, shape: &[usize]) -> ValueInfoProto {
    let dim = |dim: &usize| Dimension { value: Some(DimValue(*dim as i64)), ..Dimension::default() };
    let shape = TensorShapeProto { dim: shape.iter().map(dim).collect() };
    let tensor = type_proto::Tensor { elem_type: DataType::Float as i32, shape: Some(shape) };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto { name: name.to_owned(), r#type: Some(r#type), ..ValueInfoProto::default() }
}

/// A constant as ONNX has it.
fn proto(name: &str, tensor: &Tensor) -> Lowered<TensorProto> {
    let data_type = match tensor.datum_type() {
        DatumType::I64 => DataType::Int64,
        DatumType::I32 => DataType::Int32,
        DatumType::F32 => DataType::Float,
        other => return Err(format!("moved by {other:?}")),
    };
    Ok(TensorProto {
        name: name.to_owned(),
        dims: tensor.shape().iter().map(|dim| *dim as i64).collect(),
        data_type: data_type as i32,
        raw_data: tensor.as_bytes().to_vec(),
        ..TensorProto::default()
    })
}
