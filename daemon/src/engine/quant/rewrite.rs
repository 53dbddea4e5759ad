//! Which nodes of an ONNX graph are lowered, and which of those together.
//!
//! A piece may not be left and entered again, or the graph would have a circle. So every node has a level, the
//! number of changes between lowered and not lowered before it, and the lowered nodes of one level are a piece.
//! `DequantizeLinear` costs nothing and is copied to each piece that needs it: between pieces go bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

use anyhow::Result;
use tract_onnx::Onnx;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::*;

use super::lower::pointwise::UNARY;
use super::lower::shape::MOVES;
use super::normal::{inner_names, normal};
use super::{operator, plain};
use crate::engine::float;

/// What is known of a tensor before shapes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Constant,
    /// A dequantized constant.
    Weights,
    Bytes,
    /// Floats that a table or a layer stands for.
    Lazy,
    Floats,
}

/// Reads and optimises a model whose input facts `prepare` sets, with its quantized parts lowered.
///
/// Nodes that turn out not to be lowered are left to tract, and the rest tried again.
///
/// # Errors
/// tract's own, or that of `prepare`.
pub fn load<T>(path: &Path, prepare: impl Fn(&mut InferenceModel) -> Result<T>) -> Result<(TypedModel, T)> {
    let mut onnx = tract_onnx::onnx();
    onnx.op_register.insert(operator::NAME, operator::parse);
    plain::register(&mut onnx);
    let dir = path.parent().and_then(Path::to_str);
    let read = |tensor: &TensorProto| tract_onnx::tensor::load_tensor(&*onnx.provider, tensor, dir).ok();
    let proto = normal(&onnx.proto_model_for_path(path)?, &read);
    let mut left = HashSet::new();
    loop {
        operator::refused();
        let error = match attempt(&onnx, &rewritten(&proto, &left), dir, &prepare) {
            Ok(model) => return Ok(model),
            Err(error) => error,
        };
        let before = left.len();
        for refused in operator::refused() {
            tracing::debug!(file = %path.display(), "left to tract: {refused}");
            left.insert(refused.node);
        }
        if left.len() == before {
            return Err(error);
        }
    }
}

fn attempt<T>(
    onnx: &Onnx,
    proto: &ModelProto,
    dir: Option<&str>,
    prepare: &impl Fn(&mut InferenceModel) -> Result<T>,
) -> Result<(TypedModel, T)> {
    let mut model = onnx.parse(proto, dir)?.model;
    let known = prepare(&mut model)?;
    // What is left in floats: our own operators where they serve.
    let model = float::rewrite(model.into_typed()?.into_decluttered()?)?;
    Ok((model.into_optimized()?, known))
}

/// The model with its quantized pieces as one node each; nodes whose first output is in `left` stay.
fn rewritten(proto: &ModelProto, left: &HashSet<String>) -> ModelProto {
    let Some(graph) = &proto.graph else { return proto.clone() };
    let graph = cut(graph, left);
    ModelProto { graph: Some(graph), ..proto.clone() }
}

/// What a node's output would be, if it can be lowered.
fn lowered(node: &NodeProto, kinds: &HashMap<&str, Kind>) -> Option<Kind> {
    use Kind::{Bytes, Constant, Floats, Lazy, Weights};
    let kind = |at: usize| {
        node.input
            .get(at)
            .filter(|name| !name.is_empty())
            .map(|name| kinds.get(name.as_str()).copied().unwrap_or(Floats))
    };
    let constant =
        |range: std::ops::Range<usize>| range.into_iter().all(|at| matches!(kind(at), None | Some(Constant)));
    let n = node.input.len();
    let (first, second) = (kind(0)?, kind(1));
    match node.op_type.as_str() {
        "QuantizeLinear" => (!matches!(first, Constant | Weights) && constant(1..n)).then_some(Bytes),
        "DequantizeLinear" => {
            (first != Weights && constant(1..n)).then_some(if first == Constant { Weights } else { Lazy })
        }
        "Transpose" | "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Identity" | "Dropout" => {
            (matches!(first, Bytes | Lazy | Weights) && constant(1..n)).then_some(first)
        }
        "MaxPool" | "GlobalMaxPool" => matches!(first, Bytes | Lazy).then_some(first),
        "Clip" => (first == Lazy).then_some(Lazy),
        "AveragePool" | "GlobalAveragePool" | "ReduceMean" => (first == Lazy && constant(1..n)).then_some(Lazy),
        op if UNARY.contains(&op) => (first == Lazy).then_some(Lazy),
        op if MOVES.contains(&op) => (matches!(first, Bytes | Lazy) && constant(1..n)).then_some(first),
        "Softmax" => (first == Lazy).then_some(Floats),
        plain::DYNAMIC => matches!(first, Lazy | Floats).then_some(Lazy),
        "Conv" => (first == Lazy && second == Some(Weights)).then_some(Lazy),
        "Gemm" | "MatMul" => {
            let both = [first, second?];
            (both.contains(&Lazy) && both.iter().all(|kind| matches!(kind, Lazy | Weights))).then_some(Lazy)
        }
        "Add" | "Sub" | "Mul" | "Div" => {
            let both = [first, second?];
            (both.contains(&Lazy) && !both.contains(&Floats) && !both.contains(&Bytes)).then_some(Lazy)
        }
        "Concat" => {
            let kinds: Vec<_> = (0..n).map(kind).collect();
            let fit = kinds.iter().all(|kind| matches!(kind, Some(Lazy | Weights)));
            (fit && kinds.contains(&Some(Lazy))).then_some(Lazy)
        }
        _ => None,
    }
}

fn is_bytes(input: &ValueInfoProto) -> bool {
    let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_ref().and_then(|of| of.value.as_ref()) else {
        return false;
    };
    [DataType::Uint8 as i32, DataType::Int8 as i32].contains(&tensor.elem_type)
}

/// A graph with what is known of its nodes.
struct Known<'a> {
    graph: &'a GraphProto,
    constants: HashMap<&'a str, TensorProto>,
    made_by: HashMap<&'a str, usize>,
    readers: HashMap<String, Vec<usize>>,
    /// What each node gives, where it is lowered.
    own: Vec<Option<Kind>>,
}

/// Nodes that become one.
#[derive(Default)]
struct Piece {
    /// Those that are in no other piece.
    own: BTreeSet<usize>,
    /// With the copies that they need, in topological order.
    all: BTreeSet<usize>,
}

impl<'a> Known<'a> {
    fn new(graph: &'a GraphProto, left: &HashSet<String>) -> Self {
        let mut constants: HashMap<&str, TensorProto> =
            graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor.clone())).collect();
        for node in graph.node.iter().filter(|node| node.op_type == "Constant") {
            if let ([output], Some(value)) = (&node.output[..], node.attribute.iter().find_map(|a| a.t.as_ref())) {
                constants.insert(output, TensorProto { name: output.clone(), ..value.clone() });
            }
        }
        let mut kinds: HashMap<&str, Kind> = constants.keys().map(|name| (*name, Kind::Constant)).collect();
        for input in graph.input.iter().filter(|input| is_bytes(input)) {
            kinds.entry(&input.name).or_insert(Kind::Bytes);
        }
        let mut known = Known { graph, constants, made_by: HashMap::new(), readers: HashMap::new(), own: Vec::new() };
        for (at, node) in graph.node.iter().enumerate() {
            let one = node.output.first().filter(|_| node.output.iter().filter(|name| !name.is_empty()).count() == 1);
            let kind = one.filter(|name| !left.contains(*name)).and_then(|_| lowered(node, &kinds));
            known.own.push(kind);
            for name in &node.output {
                known.made_by.insert(name, at);
                if node.op_type != "Constant" {
                    kinds.insert(name, kind.unwrap_or(Kind::Floats));
                }
            }
            let mut read: HashSet<String> = node.input.iter().cloned().collect();
            inner_names(node, &mut read);
            for name in read {
                known.readers.entry(name).or_default().push(at);
            }
        }
        known
    }

    /// Whether a node is copied to each piece that reads it.
    fn is_copied(&self, at: usize) -> bool {
        self.own[at] == Some(Kind::Weights)
            || (self.own[at].is_some() && self.graph.node[at].op_type == "DequantizeLinear")
    }

    /// The nodes that make a node's inputs.
    fn before(&self, at: usize) -> impl Iterator<Item = usize> {
        self.graph.node[at].input.iter().filter_map(|name| self.made_by.get(name.as_str()).copied())
    }

    /// The nodes that read a lowered node's output.
    fn readers(&self, at: usize) -> &[usize] {
        self.readers.get(self.graph.node[at].output[0].as_str()).map_or(&[], |readers| readers)
    }

    fn is_output(&self, at: usize) -> bool {
        self.graph.output.iter().any(|output| output.name == self.graph.node[at].output[0])
    }

    /// The lowered nodes, piece by piece.
    fn pieces(&self) -> Vec<Piece> {
        let mut level = vec![0_usize; self.own.len()];
        let mut pieces: BTreeMap<usize, Piece> = BTreeMap::new();
        for at in 0..self.own.len() {
            let is_lowered = self.own[at].is_some();
            let after = |from: usize| level[from] + usize::from(self.own[from].is_some() != is_lowered);
            level[at] = self.before(at).map(after).max().unwrap_or(usize::from(is_lowered));
            // What is copied stands by itself as well where something else reads it.
            let stands = match self.own[at] {
                None | Some(Kind::Weights) => false,
                _ if !self.is_copied(at) => true,
                _ => self.is_output(at) || self.readers(at).iter().any(|reader| self.own[*reader].is_none()),
            };
            if stands {
                pieces.entry(level[at]).or_default().own.insert(at);
            }
        }
        let mut pieces: Vec<Piece> = pieces.into_values().collect();
        for piece in &mut pieces {
            piece.all = piece.own.clone();
            let mut look: Vec<usize> = piece.own.iter().copied().collect();
            while let Some(at) = look.pop() {
                look.extend(self.before(at).filter(|from| self.is_copied(*from) && piece.all.insert(*from)));
            }
        }
        pieces
    }

    /// A piece as one node; none where nothing of it is read.
    fn node(&self, index: usize, pieces: &[Piece]) -> Option<NodeProto> {
        let piece = &pieces[index];
        let nodes = || piece.all.iter().map(|at| &self.graph.node[*at]);
        let made: HashSet<&str> = nodes().flat_map(|node| &node.output).map(String::as_str).collect();
        let mut inputs: Vec<String> = Vec::new();
        let mut initializer: Vec<TensorProto> = Vec::new();
        let mut seen: HashSet<&str> = HashSet::new();
        for name in nodes().flat_map(|node| &node.input).filter(|name| !name.is_empty()) {
            if made.contains(name.as_str()) || !seen.insert(name) {
                continue;
            }
            match self.constants.get(name.as_str()) {
                Some(tensor) => initializer.push(tensor.clone()),
                None => inputs.push(name.clone()),
            }
        }
        let is_read = |at: usize| {
            let elsewhere =
                |reader: usize| pieces.iter().any(|other| other.all.contains(&reader) && !other.all.contains(&at));
            self.is_output(at)
                || self.readers(at).iter().any(|reader| self.own[*reader].is_none() || elsewhere(*reader))
        };
        let outputs: Vec<String> =
            piece.own.iter().filter(|at| is_read(**at)).map(|at| self.graph.node[*at].output[0].clone()).collect();
        let body = GraphProto {
            name: format!("quantized.{index}"),
            node: nodes().cloned().collect(),
            initializer,
            ..GraphProto::default()
        };
        (!outputs.is_empty()).then(|| NodeProto {
            name: body.name.clone(),
            op_type: operator::NAME.to_owned(),
            input: inputs,
            output: outputs,
            attribute: vec![AttributeProto {
                name: operator::BODY.to_owned(),
                r#type: AttributeType::Graph as i32,
                g: Some(body),
                ..AttributeProto::default()
            }],
            ..NodeProto::default()
        })
    }
}

/// The graph with one node for each of its lowered pieces; nodes whose first output is in `left` stay.
fn cut(graph: &GraphProto, left: &HashSet<String>) -> GraphProto {
    let known = Known::new(graph, left);
    let pieces = known.pieces();
    let taken: HashSet<usize> = pieces.iter().flat_map(|piece| &piece.all).copied().collect();
    let stays = |at: &usize| !taken.contains(at) || known.own[*at] == Some(Kind::Weights);
    let mut node: Vec<NodeProto> = (0..graph.node.len()).filter(stays).map(|at| graph.node[at].clone()).collect();
    node.extend((0..pieces.len()).filter_map(|index| known.node(index, &pieces)));
    GraphProto { node, ..graph.clone() }
}
