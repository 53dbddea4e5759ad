//! One form for what quantized graphs say in several: `QuantizeLinear` and `DequantizeLinear` around plain operators.
//!
//! ```text
//! QLinearConv …, QGemm         dequantize → Conv … → quantize
//! DynamicQuantizeLinear →      OutpostDynamic → MatMul of dequantized weights
//!   MatMulInteger → Cast → Mul
//! QuantizeLinear(constant)     the quantized constant
//! Split                        a Slice for each part
//! Transpose → QuantizeLinear   the other way round: bytes are turned by reading them in another order
//! ```
//!
//! What cannot be lowered afterwards is at least an operator that tract has.

use std::collections::{HashMap, HashSet};

use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
use tract_onnx::prelude::*;

use super::lower::attribute;
use super::plain;

/// Reads a constant.
type Read<'a> = &'a dyn Fn(&TensorProto) -> Option<Tensor>;

/// `proto` in the one form.
pub fn normal(proto: &ModelProto, read: Read) -> ModelProto {
    let Some(graph) = &proto.graph else { return proto.clone() };
    let opset = proto.opset_import.iter().find(|set| set.domain.is_empty() || set.domain == "ai.onnx");
    let mut writer = Writer::new(graph, opset.map_or(13, |set| set.version), read);
    for at in 0..graph.node.len() {
        writer.node(at);
    }
    let nodes = pruned(writer.nodes, graph);
    let mut initializer = graph.initializer.clone();
    initializer.extend(writer.made);
    ModelProto { graph: Some(GraphProto { node: nodes, initializer, ..graph.clone() }), ..proto.clone() }
}

/// Without nodes of which nothing is read.
fn pruned(nodes: Vec<NodeProto>, graph: &GraphProto) -> Vec<NodeProto> {
    let mut read: HashSet<String> = graph.output.iter().map(|output| output.name.clone()).collect();
    let mut kept = Vec::new();
    for node in nodes.into_iter().rev() {
        if node.output.iter().any(|name| read.contains(name)) {
            read.extend(node.input.iter().cloned());
            inner_names(&node, &mut read);
            kept.push(node);
        }
    }
    kept.reverse();
    kept
}

/// Names that a node's own graphs read.
pub(super) fn inner_names(node: &NodeProto, read: &mut HashSet<String>) {
    for graph in node.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
        read.extend(graph.output.iter().map(|output| output.name.clone()));
        for node in &graph.node {
            read.extend(node.input.iter().cloned());
            inner_names(node, read);
        }
    }
}

struct Writer<'a> {
    graph: &'a GraphProto,
    opset: i64,
    read: Read<'a>,
    constants: HashMap<&'a str, &'a TensorProto>,
    made_by: HashMap<&'a str, usize>,
    readers: HashMap<&'a str, Vec<usize>>,
    /// Sums that are only scaled, by their place, with what scales them.
    scaled: HashMap<usize, Scaled>,
    /// Nodes that are written with another.
    within: HashSet<usize>,
    nodes: Vec<NodeProto>,
    made: Vec<TensorProto>,
    /// Values that were made, by what they were made from.
    known: HashMap<String, String>,
}

/// A product of integers, written where its scaling stood.
#[derive(Clone)]
struct Scaled {
    product: usize,
    /// Names of the scales of the two operands; none: 1.
    scales: [Option<String>; 2],
}

impl<'a> Writer<'a> {
    fn new(graph: &'a GraphProto, opset: i64, read: Read<'a>) -> Self {
        let mut constants: HashMap<&str, &TensorProto> =
            graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut made_by = HashMap::new();
        let mut readers: HashMap<&str, Vec<usize>> = HashMap::new();
        for (at, node) in graph.node.iter().enumerate() {
            if let ("Constant", [output], Some(value)) =
                (node.op_type.as_str(), &node.output[..], node.attribute.iter().find_map(|a| a.t.as_ref()))
            {
                constants.insert(output, value);
            }
            made_by.extend(node.output.iter().map(|name| (name.as_str(), at)));
            let inputs: HashSet<&str> = node.input.iter().map(String::as_str).collect();
            inputs.into_iter().for_each(|name| readers.entry(name).or_default().push(at));
        }
        // What is a graph's output, or read by a graph within, has a reader that is no node here.
        let mut outside: HashSet<String> = graph.output.iter().map(|output| output.name.clone()).collect();
        graph.node.iter().for_each(|node| inner_names(node, &mut outside));
        for (name, readers) in &mut readers {
            if outside.contains(*name) {
                readers.push(usize::MAX);
            }
        }
        let mut writer = Writer {
            graph,
            opset,
            read,
            constants,
            made_by,
            readers,
            scaled: HashMap::new(),
            within: HashSet::new(),
            nodes: Vec::new(),
            made: Vec::new(),
            known: HashMap::new(),
        };
        for at in 0..graph.node.len() {
            writer.find_scaled(at);
            if let Some(turned) = writer.turned(at) {
                writer.within.insert(turned);
            }
        }
        writer
    }

    fn tensor(&self, name: &str) -> Option<Tensor> {
        (self.read)(self.constants.get(name)?)
    }

    fn only_reader(&self, name: &str) -> Option<usize> {
        let [reader] = self.readers.get(name)?[..] else { return None };
        (reader != usize::MAX).then_some(reader)
    }

    /// The `Transpose` of floats that a `QuantizeLinear` at `at` alone reads.
    fn turned(&self, at: usize) -> Option<usize> {
        let node = &self.graph.node[at];
        let single = |at: usize| match node.input.get(at).filter(|name| !name.is_empty()) {
            Some(name) => self.tensor(name).is_some_and(|tensor| tensor.len() == 1),
            None => true,
        };
        if node.op_type != "QuantizeLinear" || !single(1) || !single(2) {
            return None;
        }
        let from = *self.made_by.get(node.input.first()?.as_str())?;
        let before = &self.graph.node[from];
        let turns =
            before.op_type == "Transpose" && !before.input.iter().any(|x| self.constants.contains_key(x.as_str()));
        (turns && self.only_reader(&node.input[0]) == Some(at)).then_some(from)
    }

    /// `MatMulInteger → Cast → Mul` by scales, one of which may be that of a `DynamicQuantizeLinear`.
    fn find_scaled(&mut self, at: usize) {
        let node = &self.graph.node[at];
        if !matches!(node.op_type.as_str(), "MatMulInteger" | "ConvInteger") {
            return;
        }
        let found = || {
            let cast = self.only_reader(node.output.first()?)?;
            let to = &self.graph.node[cast];
            if to.op_type != "Cast" || attribute(to, "to", 0) != i64::from(DataType::Float as i32) {
                return None;
            }
            let mul = self.only_reader(to.output.first()?)?;
            let times = &self.graph.node[mul];
            let [a, b] = &times.input[..] else { return None };
            if times.op_type != "Mul" || a == b {
                return None;
            }
            let by = if *a == to.output[0] { b } else { a };
            let scales = self.scales(node, by)?;
            Some((cast, mul, scales))
        };
        if let Some((cast, mul, scales)) = found() {
            self.within.extend([at, cast]);
            self.scaled.insert(mul, Scaled { product: at, scales });
        }
    }

    /// Which operand's scale each part of `by` is.
    fn scales(&self, product: &NodeProto, by: &str) -> Option<[Option<String>; 2]> {
        let own = |at: usize| -> Option<&str> {
            let from = &self.graph.node[*self.made_by.get(product.input.get(at)?.as_str())?];
            (from.op_type == "DynamicQuantizeLinear").then(|| from.output.get(1).map(String::as_str)).flatten()
        };
        let constant = |name: &str| self.constants.contains_key(name);
        if constant(by) {
            return Some([None, Some(by.to_owned())]);
        }
        if own(0) == Some(by) {
            return Some([Some(by.to_owned()), None]);
        }
        let mul = &self.graph.node[*self.made_by.get(by)?];
        let [a, b] = &mul.input[..] else { return None };
        if mul.op_type != "Mul" {
            return None;
        }
        for (a, b) in [(a, b), (b, a)] {
            if own(0) == Some(a) && (constant(b) || own(1) == Some(b)) {
                return Some([Some(a.clone()), Some(b.clone())]);
            }
        }
        None
    }

    /// A name that no other value has, made from that of a node's output.
    fn fresh(&self, of: &str, what: &str) -> String {
        format!("{of}/outpost/{what}{}", self.nodes.len() + self.made.len())
    }

    fn push(&mut self, op: &str, inputs: Vec<String>, output: String, attributes: Vec<AttributeProto>) -> String {
        self.nodes.push(NodeProto {
            name: output.clone(),
            op_type: op.to_owned(),
            input: inputs,
            output: vec![output.clone()],
            attribute: attributes,
            ..NodeProto::default()
        });
        output
    }

    fn add_floats(&mut self, of: &str, what: &str, values: &[f32]) -> String {
        let name = self.fresh(of, what);
        self.made.push(TensorProto {
            name: name.clone(),
            dims: if values.len() == 1 { vec![] } else { vec![values.len() as i64] },
            data_type: DataType::Float as i32,
            float_data: values.to_vec(),
            ..TensorProto::default()
        });
        name
    }

    fn add_index(&mut self, of: &str, number: i64) -> String {
        let name = self.fresh(of, "index");
        self.made.push(TensorProto {
            name: name.clone(),
            dims: vec![1],
            data_type: DataType::Int64 as i32,
            int64_data: vec![number],
            ..TensorProto::default()
        });
        name
    }

    /// Sizes of a `Split`'s parts, where it says them.
    fn sizes(&self, node: &NodeProto) -> Option<Vec<i64>> {
        if let Some(sizes) = node.attribute.iter().find(|a| a.name == "split") {
            return Some(sizes.ints.clone());
        }
        let sizes = self.tensor(node.input.get(1)?)?;
        Some(sizes.try_as_plain_ram().ok()?.as_slice::<i64>().ok()?.to_vec())
    }

    /// The input at `at`, dequantized by the two behind it.
    fn dequantized(&mut self, node: &NodeProto, at: usize, axis: i64) -> String {
        let part = |at: usize| node.input.get(at).cloned().unwrap_or_default();
        self.dequantize(&node.output[0], part(at), part(at + 1), part(at + 2), axis)
    }

    fn dequantize(&mut self, of: &str, x: String, scale: String, zero: String, axis: i64) -> String {
        let key = format!("{x}\n{scale}\n{zero}\n{axis}");
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let mut inputs = vec![x, scale];
        inputs.extend((!zero.is_empty()).then_some(zero));
        let output = self.fresh(of, "float");
        let made = self.push("DequantizeLinear", inputs, output, vec![int("axis", axis)]);
        self.known.insert(key, made.clone());
        made
    }

    /// Ends `node` by quantizing `x` with the scale and zero point at `at`.
    fn quantized(&mut self, node: &NodeProto, x: String, at: usize) {
        let mut inputs = vec![x, node.input[at].clone()];
        inputs.extend(node.input.get(at + 1).filter(|zero| !zero.is_empty()).cloned());
        self.push("QuantizeLinear", inputs, node.output[0].clone(), vec![]);
    }

    /// Scale of sums of products: the product of two scales and a number.
    fn unit(&mut self, of: &str, a: &str, b: &str, by: f32) -> String {
        let numbers = |name: &str| {
            let tensor = self.tensor(name)?.cast_to::<f32>().ok()?.into_owned();
            Some(tensor.try_as_plain_ram().ok()?.as_slice::<f32>().ok()?.to_vec())
        };
        if let (Some(a), Some(b)) = (numbers(a), numbers(b))
            && let ([a], b) | (b, [a]) = (&a[..], &b[..])
        {
            let unit: Vec<f32> = b.iter().map(|b| a * b * by).collect();
            return self.add_floats(of, "unit", &unit);
        }
        let by = self.add_floats(of, "by", &[by]);
        let output = self.fresh(of, "unit");
        let unit = self.push("Mul", vec![a.to_owned(), b.to_owned()], output, vec![]);
        let output = self.fresh(of, "unit");
        self.push("Mul", vec![unit, by], output, vec![])
    }

    fn node(&mut self, at: usize) {
        if self.within.contains(&at) {
            return;
        }
        let node = &self.graph.node[at];
        if let Some(scaled) = self.scaled.get(&at).cloned() {
            return self.product(&self.graph.node[scaled.product], scaled.scales, node.output[0].clone());
        }
        let Some(output) = node.output.first().cloned() else { return self.nodes.push(node.clone()) };
        let plain = node.op_type.strip_prefix("QLinear");
        let inner = |writer: &Self| writer.fresh(&output, "result");
        match node.op_type.as_str() {
            "QLinearConv" if node.input.len() >= 8 => {
                let mut inputs = vec![self.dequantized(node, 0, 1), self.dequantized(node, 3, 0)];
                if let Some(bias) = node.input.get(8).filter(|name| !name.is_empty()) {
                    let unit = self.unit(&output, &node.input[1], &node.input[4], 1.0);
                    inputs.push(self.dequantize(&output, bias.clone(), unit, String::new(), 0));
                }
                let result = inner(self);
                let result = self.push("Conv", inputs, result, node.attribute.clone());
                self.quantized(node, result, 6);
            }
            "QLinearMatMul" if node.input.len() >= 8 => {
                let inputs = vec![self.dequantized(node, 0, -2), self.dequantized(node, 3, -1)];
                let result = inner(self);
                let result = self.push("MatMul", inputs, result, vec![]);
                self.quantized(node, result, 6);
            }
            "QGemm" if node.input.len() >= 6 => {
                let turned = attribute(node, "transB", 0) != 0;
                let mut inputs = vec![self.dequantized(node, 0, 0), self.dequantized(node, 3, i64::from(!turned))];
                let alpha = node.attribute.iter().find(|a| a.name == "alpha").map_or(1.0, |a| a.f);
                if let Some(bias) = node.input.get(6).filter(|name| !name.is_empty()) {
                    let unit = self.unit(&output, &node.input[1], &node.input[4], alpha);
                    inputs.push(self.dequantize(&output, bias.clone(), unit, String::new(), -1));
                }
                let ends = node.input.get(7).is_some_and(|name| !name.is_empty());
                let result = if ends { inner(self) } else { output };
                let result = self.push("Gemm", inputs, result, node.attribute.clone());
                if ends {
                    self.quantized(node, result, 7);
                }
            }
            "QLinearAdd" | "QLinearMul" if node.input.len() >= 7 => {
                let inputs = vec![self.dequantized(node, 0, 0), self.dequantized(node, 3, 0)];
                let result = inner(self);
                let result = self.push(plain.unwrap_or_default(), inputs, result, vec![]);
                self.quantized(node, result, 6);
            }
            "QLinearConcat" if node.input.len() >= 5 => {
                let inputs = (2..node.input.len()).step_by(3).map(|at| self.dequantized(node, at, 0)).collect();
                let result = inner(self);
                let result = self.push("Concat", inputs, result, node.attribute.clone());
                self.quantized(node, result, 0);
            }
            "QLinearAveragePool"
            | "QLinearGlobalAveragePool"
            | "QLinearSigmoid"
            | "QLinearLeakyRelu"
            | "QLinearSoftmax"
                if node.input.len() >= 4 =>
            {
                let x = self.dequantized(node, 0, 0);
                let attributes: Vec<AttributeProto> =
                    node.attribute.iter().filter(|a| a.name != "channels_last" && a.name != "opset").cloned().collect();
                let op = plain.unwrap_or_default();
                let result = if attribute(node, "channels_last", 0) != 0 {
                    // A kernel has all dimensions but two; without one, an image is the only thing that it can be.
                    let kernel = node.attribute.iter().find(|a| a.name == "kernel_shape");
                    let rank = kernel.map_or(4, |a| a.ints.len() as i64 + 2);
                    let planes = std::iter::once(0).chain([rank - 1]).chain(1..rank - 1).collect();
                    let pixels = std::iter::once(0).chain(2..rank).chain([1]).collect();
                    let name = self.fresh(&output, "planes");
                    let x = self.push("Transpose", vec![x], name, vec![ints("perm", planes)]);
                    let name = self.fresh(&output, "pooled");
                    let x = self.push(op, vec![x], name, attributes);
                    let name = inner(self);
                    self.push("Transpose", vec![x], name, vec![ints("perm", pixels)])
                } else {
                    let name = inner(self);
                    if op == "Softmax" {
                        let old = attribute(node, "opset", self.opset) < 13;
                        self.softmax(node, x, name, old)
                    } else {
                        self.push(op, vec![x], name, attributes)
                    }
                };
                self.quantized(node, result, 3);
            }
            "Softmax" => {
                let old = self.opset < 13;
                self.softmax(node, node.input[0].clone(), output, old);
            }
            "MatMulInteger" | "ConvInteger" => {
                // Sums are whole numbers, in floats too.
                let result = inner(self);
                self.product(node, [None, None], result.clone());
                let to = int("to", i64::from(DataType::Int32 as i32));
                self.push("Cast", vec![result], output, vec![to]);
            }
            "Split" if self.opset >= 10 && self.sizes(node).is_some() => {
                let axis = attribute(node, "axis", 0);
                let mut start = 0;
                for (size, part) in self.sizes(node).unwrap_or_default().into_iter().zip(&node.output) {
                    let ends = [start, start + size, axis].map(|number| self.add_index(part, number));
                    let inputs = std::iter::once(node.input[0].clone()).chain(ends).collect();
                    self.push("Slice", inputs, part.clone(), vec![]);
                    start += size;
                }
            }
            "QuantizeLinear" => {
                if let Some(constant) = self.folded(node) {
                    self.made.push(TensorProto { name: output, ..constant });
                } else if let Some(from) =
                    self.made_by.get(node.input[0].as_str()).filter(|at| self.within.contains(at))
                {
                    let from = &self.graph.node[*from];
                    let mut inputs = node.input.clone();
                    inputs[0] = from.input[0].clone();
                    let bytes = inner(self);
                    let bytes = self.push("QuantizeLinear", inputs, bytes, vec![]);
                    self.push("Transpose", vec![bytes], output, from.attribute.clone());
                } else {
                    self.nodes.push(node.clone());
                }
            }
            _ => self.nodes.push(node.clone()),
        }
    }

    /// A product of integers as one of floats, scaled.
    fn product(&mut self, node: &NodeProto, scales: [Option<String>; 2], output: String) {
        let [left, right] = scales.clone().map(|scale| scale.unwrap_or_default());
        let named = |writer: &mut Self, scale: String| {
            if scale.is_empty() { writer.add_floats(&output, "one", &[1.0]) } else { scale }
        };
        let convolution = node.op_type == "ConvInteger";
        let zero = |at: usize| node.input.get(at).cloned().unwrap_or_default();
        let mut operands = Vec::new();
        for (at, scale) in [left, right].into_iter().enumerate() {
            let x = node.input[at].clone();
            let dynamic = self.made_by.get(x.as_str()).map(|from| &self.graph.node[*from]).filter(|from| {
                from.op_type == "DynamicQuantizeLinear"
                    && from.output.get(1) == Some(&scale)
                    && from.output.get(2) == Some(&zero(at + 2))
                    && from.output[0] == x
            });
            operands.push(match dynamic {
                Some(from) => {
                    let key = format!("dynamic\n{}", from.input[0]);
                    match self.known.get(&key) {
                        Some(known) => known.clone(),
                        None => {
                            let name = self.fresh(&output, "dynamic");
                            let made = self.push(plain::DYNAMIC, vec![from.input[0].clone()], name, vec![]);
                            self.known.insert(key, made.clone());
                            made
                        }
                    }
                }
                None => {
                    let mut scale = named(self, scale);
                    // Scales for channels, in whatever shape they were broadcast.
                    if let Some(tensor) = self.tensor(&scale).filter(|tensor| tensor.rank() > 1)
                        && let Ok(view) = tensor.to_plain_array_view::<f32>()
                    {
                        let values: Vec<f32> = view.iter().copied().collect();
                        scale = self.add_floats(&output, "scale", &values);
                    }
                    let axis = match (convolution, at) {
                        (true, _) => 0,
                        (false, 0) => -2,
                        (false, _) => -1,
                    };
                    self.dequantize(&output, x, scale, zero(at + 2), axis)
                }
            });
        }
        let op = if convolution { "Conv" } else { "MatMul" };
        self.push(op, operands, output, node.attribute.clone());
    }

    /// `old`: as before opset 13, over every axis from its own on.
    fn softmax(&mut self, node: &NodeProto, x: String, output: String, old: bool) -> String {
        let axis = attribute(node, "axis", if old { 1 } else { -1 });
        let mut attributes = vec![int("axis", axis)];
        attributes.extend(old.then(|| int("old", 1)));
        self.push("Softmax", vec![x], output, attributes)
    }

    /// What the quantizer has left to quantize, of constants.
    fn folded(&self, node: &NodeProto) -> Option<TensorProto> {
        let part = |at: usize| node.input.get(at).filter(|name| !name.is_empty());
        let (x, scale) = (self.tensor(part(0)?)?, self.tensor(part(1)?)?);
        let zero = match part(2) {
            Some(name) => Some(self.tensor(name)?),
            None => None,
        };
        let datum = zero.as_ref().map_or(u8::datum_type(), |zero| zero.datum_type());
        let data_type = match datum {
            DatumType::U8 => DataType::Uint8,
            DatumType::I8 => DataType::Int8,
            _ => return None,
        };
        let made = plain::quantize(&x, &scale, zero.as_ref(), attribute(node, "axis", 1), datum).ok()?;
        Some(TensorProto {
            dims: made.shape().iter().map(|dim| *dim as i64).collect(),
            data_type: data_type as i32,
            raw_data: made.as_bytes().to_vec(),
            ..TensorProto::default()
        })
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.to_owned(), r#type: AttributeType::Int as i32, i: value, ..AttributeProto::default() }
}

fn ints(name: &str, values: Vec<i64>) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: AttributeType::Ints as i32,
        ints: values,
        ..AttributeProto::default()
    }
}
