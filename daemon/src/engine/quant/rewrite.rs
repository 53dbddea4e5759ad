//! Which nodes of an ONNX graph are lowered, and which of those together.
//!
//! A piece may not be left and entered again, or the graph would have a circle. So every node has a level, the
//! number of changes between lowered and not lowered before it, and the lowered nodes of one level are a piece.
//! `DequantizeLinear` costs nothing and is copied to each piece that needs it: between pieces go bytes.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::Result;
use tract_onnx::Onnx;
use tract_onnx::pb::attribute_proto::AttributeType;
use tract_onnx::pb::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
use tract_onnx::prelude::*;

use super::operator;
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
/// A node that turns out not to be lowered is left to tract, and the rest tried again.
///
/// # Errors
/// tract's own, or that of `prepare`.
pub fn load<T>(path: &Path, prepare: impl Fn(&mut InferenceModel) -> Result<T>) -> Result<(TypedModel, T)> {
    let mut onnx = tract_onnx::onnx();
    onnx.op_register.insert(operator::NAME, operator::parse);
    let proto = onnx.proto_model_for_path(path)?;
    let dir = path.parent().and_then(Path::to_str);
    let mut left = HashSet::new();
    loop {
        operator::refused();
        let attempt = attempt(&onnx, &rewritten(&proto, &left), dir, &prepare);
        match (attempt, operator::refused()) {
            (Ok(model), _) => return Ok(model),
            (Err(_), Some(refused)) if left.insert(refused.node.clone()) => {
                tracing::debug!(file = %path.display(), "left to tract: {refused}");
            }
            (Err(error), _) => return Err(error),
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
        "MaxPool" => matches!(first, Bytes | Lazy).then_some(first),
        "Relu" | "LeakyRelu" | "Sigmoid" | "Tanh" | "HardSigmoid" | "HardSwish" | "Elu" | "Exp" | "Abs" | "Neg"
        | "Softplus" | "Sqrt" | "AveragePool" | "GlobalAveragePool" | "ReduceMean" => {
            (first == Lazy && constant(1..n)).then_some(Lazy)
        }
        "Clip" => (first == Lazy).then_some(Lazy),
        "Softmax" => (first == Lazy).then_some(Floats),
        "Conv" | "Gemm" | "MatMul" => (first == Lazy && second == Some(Weights)).then_some(Lazy),
        "Add" | "Sub" | "Mul" => {
            let both = [first, second?];
            (both.contains(&Lazy) && !both.contains(&Floats) && !both.contains(&Bytes)).then_some(Lazy)
        }
        "Concat" => (0..n).all(|at| kind(at) == Some(Lazy)).then_some(Lazy),
        "QGemm" => constant(1..n).then_some(if kind(7).is_some() { Bytes } else { Lazy }),
        "QLinearConv"
        | "QLinearMatMul"
        | "QLinearAdd"
        | "QLinearMul"
        | "QLinearConcat"
        | "QLinearAveragePool"
        | "QLinearGlobalAveragePool"
        | "QLinearSigmoid"
        | "QLinearLeakyRelu"
        | "QLinearSoftmax" => Some(Bytes),
        _ => None,
    }
}

fn cut(graph: &GraphProto, left: &HashSet<String>) -> GraphProto {
    let mut constants: HashMap<&str, TensorProto> = HashMap::new();
    for tensor in &graph.initializer {
        constants.insert(&tensor.name, tensor.clone());
    }
    for node in graph.node.iter().filter(|node| node.op_type == "Constant") {
        if let ([output], Some(value)) = (&node.output[..], node.attribute.iter().find_map(|a| a.t.as_ref())) {
            constants.insert(output, TensorProto { name: output.clone(), ..value.clone() });
        }
    }
    let mut kinds: HashMap<&str, Kind> = constants.keys().map(|name| (*name, Kind::Constant)).collect();
    let mut made_by: HashMap<&str, usize> = HashMap::new();
    let mut own: Vec<Option<Kind>> = Vec::new();
    for (at, node) in graph.node.iter().enumerate() {
        let one = node.output.first().filter(|_| node.output.iter().filter(|name| !name.is_empty()).count() == 1);
        let kind = one.filter(|name| !left.contains(*name)).and_then(|_| lowered(node, &kinds));
        own.push(kind);
        for name in &node.output {
            made_by.insert(name, at);
            if node.op_type != "Constant" {
                kinds.insert(name, kind.unwrap_or(Kind::Floats));
            }
        }
    }
    // Copied to where they are needed.
    let copied = |at: usize| {
        own[at] == Some(Kind::Weights) || (own[at].is_some() && graph.node[at].op_type == "DequantizeLinear")
    };
    let mut level = vec![0_usize; graph.node.len()];
    for (at, node) in graph.node.iter().enumerate() {
        let mut before = |name: &String| {
            let from = *made_by.get(name.as_str())?;
            let change = own[from].is_some() != own[at].is_some();
            Some(level[from] + usize::from(change))
        };
        level[at] = node.input.iter().filter_map(&mut before).max().unwrap_or(usize::from(own[at].is_some()));
    }
    let wanted: HashSet<&str> = graph.output.iter().map(|output| output.name.as_str()).collect();
    // Pieces: their nodes, without what is copied.
    let mut pieces: HashMap<usize, Vec<usize>> = HashMap::new();
    for at in (0..graph.node.len()).filter(|at| own[*at].is_some() && !copied(*at)) {
        pieces.entry(level[at]).or_default().push(at);
    }
    // What is copied stands by itself where something else reads it.
    for at in (0..graph.node.len()).filter(|at| copied(*at) && own[*at] != Some(Kind::Weights)) {
        let read = |name: &String| {
            wanted.contains(name.as_str())
                || graph
                    .node
                    .iter()
                    .enumerate()
                    .any(|(reader, node)| own[reader].is_none() && node.input.contains(name))
        };
        if graph.node[at].output.iter().any(read) {
            pieces.entry(level[at]).or_default().push(at);
        }
    }
    let mut keys: Vec<usize> = pieces.keys().copied().collect();
    keys.sort_unstable();
    let mut nodes: Vec<NodeProto> = Vec::new();
    let mut bodies: Vec<Vec<usize>> = Vec::new();
    for key in keys {
        let mut inside: HashSet<usize> = pieces[&key].iter().copied().collect();
        let mut look: Vec<usize> = inside.iter().copied().collect();
        while let Some(at) = look.pop() {
            for from in graph.node[at].input.iter().filter_map(|name| made_by.get(name.as_str())) {
                if copied(*from) && inside.insert(*from) {
                    look.push(*from);
                }
            }
        }
        let mut inside: Vec<usize> = inside.into_iter().collect();
        inside.sort_unstable();
        bodies.push(inside);
    }
    let taken: HashSet<usize> = bodies.iter().flatten().copied().collect();
    let outer = |at: &usize| !taken.contains(at) || own[*at] == Some(Kind::Weights);
    for at in (0..graph.node.len()).filter(outer) {
        nodes.push(graph.node[at].clone());
    }
    for (index, body) in bodies.iter().enumerate() {
        let assigned: HashSet<usize> =
            body.iter().copied().filter(|at| pieces.values().flatten().any(|own| own == at)).collect();
        let made: HashSet<&str> = body.iter().flat_map(|at| &graph.node[*at].output).map(String::as_str).collect();
        let mut inputs: Vec<String> = Vec::new();
        let mut initializer: Vec<TensorProto> = Vec::new();
        let mut seen: HashSet<&str> = HashSet::new();
        for name in body.iter().flat_map(|at| &graph.node[*at].input).filter(|name| !name.is_empty()) {
            if made.contains(name.as_str()) || !seen.insert(name) {
                continue;
            }
            match constants.get(name.as_str()) {
                Some(tensor) => initializer.push(tensor.clone()),
                None => inputs.push(name.clone()),
            }
        }
        let mut outputs: Vec<String> = Vec::new();
        for at in body.iter().filter(|at| assigned.contains(at)) {
            // A copy in another piece makes it again; the piece that it is assigned to gives it to the rest.
            let name = &graph.node[*at].output[0];
            let reads = |reader: usize| graph.node[reader].input.contains(name);
            let by_rest = (0..graph.node.len()).any(|reader| reads(reader) && own[reader].is_none());
            let by_piece = bodies
                .iter()
                .enumerate()
                .any(|(other, body)| other != index && body.iter().any(|reader| reads(*reader)) && !body.contains(at));
            let first = bodies.iter().position(|body| {
                body.contains(at)
                    && pieces.values().any(|piece| piece.contains(at) && piece.iter().all(|at| body.contains(at)))
            });
            if (wanted.contains(name.as_str()) || by_rest || by_piece) && first == Some(index) {
                outputs.push(name.clone());
            }
        }
        if outputs.is_empty() {
            continue;
        }
        let graph = GraphProto {
            name: format!("quantized.{index}"),
            node: body.iter().map(|at| graph.node[*at].clone()).collect(),
            initializer,
            ..GraphProto::default()
        };
        nodes.push(NodeProto {
            name: graph.name.clone(),
            op_type: operator::NAME.to_owned(),
            input: inputs,
            output: outputs,
            attribute: vec![AttributeProto {
                name: operator::BODY.to_owned(),
                r#type: AttributeType::Graph as i32,
                g: Some(graph),
                ..AttributeProto::default()
            }],
            ..NodeProto::default()
        });
    }
    GraphProto { node: nodes, ..graph.clone() }
}
