//! Which nodes of a graph become one operator, and that operator.
//!
//! As in [`crate::engine::quant::rewrite`], a piece may not be left and entered again: every node has a level, the
//! number of changes between lowered and not lowered before it, and the lowered nodes of one level are a piece.

use std::collections::{BTreeMap, HashMap, HashSet};

use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_core::ops::konst::Const;
use tract_onnx::tract_core::ops::source::TypedSource;

use super::lower::{self, Refused};
use super::program::Program;

/// Name of the operator in a plan.
pub const NAME: &str = "OutpostFloat";

/// The decluttered `model` with its convolutional pieces as one operator each. A node that turns out not to be
/// lowered is left to tract.
///
/// # Errors
/// tract's own.
pub fn rewrite(model: TypedModel) -> TractResult<TypedModel> {
    let mut left: HashSet<usize> = HashSet::new();
    loop {
        let pieces = Pieces::of(&model, &left)?;
        if pieces.nodes.is_empty() {
            return Ok(model);
        }
        match pieces.lowered(&model) {
            Ok(programs) => return assembled(&model, &pieces, programs),
            Err(Refused { node, why }) => {
                tracing::debug!(node = %model.nodes[node].name, "left to tract: {why}");
                left.insert(node);
            }
        }
    }
}

/// Nodes that become operators.
struct Pieces {
    order: Vec<usize>,
    level: HashMap<usize, usize>,
    /// Those of each piece, by level, in order.
    nodes: BTreeMap<usize, Vec<usize>>,
}

impl Pieces {
    fn of(model: &TypedModel, left: &HashSet<usize>) -> TractResult<Self> {
        let order = model.eval_order()?;
        let mut light: HashSet<usize> = HashSet::new();
        loop {
            let mut level: HashMap<usize, usize> = HashMap::new();
            let mut nodes: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
            let own = |id: usize| !left.contains(&id) && !light.contains(&id) && lower::fits(model, &model.nodes[id]);
            let owned: HashSet<usize> = order.iter().copied().filter(|id| own(*id)).collect();
            for id in &order {
                let inside = owned.contains(id);
                let before = model.nodes[*id].inputs.iter().filter(|input| !constant(model, **input)).map(|input| {
                    level.get(&input.node).copied().unwrap_or(0) + usize::from(owned.contains(&input.node) != inside)
                });
                let found = before.max().unwrap_or(usize::from(inside));
                level.insert(*id, found);
                if inside {
                    nodes.entry(found).or_default().push(*id);
                }
            }
            let more: Vec<usize> = nodes
                .values()
                .filter(|piece| !piece.iter().any(|id| lower::weighs(&model.nodes[*id])))
                .flatten()
                .copied()
                .collect();
            if more.is_empty() {
                return Ok(Pieces { order, level, nodes });
            }
            light.extend(more);
        }
    }

    fn lowered(&self, model: &TypedModel) -> Result<BTreeMap<usize, Piece>, Refused> {
        self.nodes
            .iter()
            .map(|(level, nodes)| {
                let inside: HashSet<usize> = nodes.iter().copied().collect();
                let mut inputs: Vec<OutletId> = Vec::new();
                for input in nodes.iter().flat_map(|id| &model.nodes[*id].inputs) {
                    if !inside.contains(&input.node) && !constant(model, *input) && !inputs.contains(input) {
                        inputs.push(*input);
                    }
                }
                let wanted = |outlet: &OutletId| {
                    let readers = &model.nodes[outlet.node].outputs[0].successors;
                    model.outputs.contains(outlet) || readers.iter().any(|reader| !inside.contains(&reader.node))
                };
                let outputs: Vec<OutletId> = nodes.iter().map(|id| OutletId::new(*id, 0)).filter(wanted).collect();
                let program = lower::lower(model, nodes, &inputs, &outputs)?;
                Ok((*level, Piece { inputs, outputs, program: Arc::new(program) }))
            })
            .collect()
    }
}

struct Piece {
    inputs: Vec<OutletId>,
    outputs: Vec<OutletId>,
    program: Arc<Program>,
}

fn constant(model: &TypedModel, outlet: OutletId) -> bool {
    model.outlet_fact(outlet).is_ok_and(|fact| fact.konst.is_some())
}

/// The model anew, with an operator where each piece was.
fn assembled(model: &TypedModel, pieces: &Pieces, mut programs: BTreeMap<usize, Piece>) -> TractResult<TypedModel> {
    let mut new =
        TypedModel { symbols: model.symbols.clone(), properties: model.properties.clone(), ..TypedModel::default() };
    let mut made: HashMap<OutletId, OutletId> = HashMap::new();
    for input in &model.inputs {
        let node = &model.nodes[input.node];
        made.insert(*input, new.add_source(&node.name, node.outputs[input.slot].fact.clone())?);
    }
    let mut order = pieces.order.clone();
    order.sort_by_key(|id| pieces.level.get(id));
    for id in order {
        let node = &model.nodes[id];
        let level = pieces.level.get(&id).copied().unwrap_or(0);
        let lookup = |made: &HashMap<OutletId, OutletId>, inputs: &[OutletId]| -> TractResult<TVec<OutletId>> {
            inputs.iter().map(|input| made.get(input).copied().context("a node before its input")).collect()
        };
        if pieces.nodes.get(&level).is_some_and(|piece| piece.contains(&id)) {
            if let Some(piece) = programs.remove(&level) {
                let inputs = lookup(&made, &piece.inputs)?;
                let outlets = new.wire_node(format!("float.{level}"), Run { program: piece.program }, &inputs)?;
                made.extend(piece.outputs.into_iter().zip(outlets));
            }
        } else if node.op_is::<TypedSource>() {
            // There already.
        } else if node.op_is::<Const>() {
            let needed = node.outputs[0].successors.iter().any(|reader| {
                let level = pieces.level.get(&reader.node);
                !level.and_then(|level| pieces.nodes.get(level)).is_some_and(|piece| piece.contains(&reader.node))
            });
            if needed || model.outputs.contains(&OutletId::new(id, 0)) {
                let outlets = new.wire_node(&node.name, node.op.clone(), &[])?;
                made.insert(OutletId::new(id, 0), outlets[0]);
            }
        } else {
            let inputs = lookup(&made, &node.inputs)?;
            let outlets = new.wire_node(&node.name, node.op.clone(), &inputs)?;
            made.extend(outlets.into_iter().enumerate().map(|(slot, outlet)| (OutletId::new(id, slot), outlet)));
        }
    }
    let outputs: Vec<OutletId> = model.outputs.iter().filter_map(|output| made.get(output).copied()).collect();
    ensure!(outputs.len() == model.outputs.len(), "an output was lost");
    new.select_output_outlets(&outputs)?;
    for (outlet, label) in &model.outlet_labels {
        if let Some(outlet) = made.get(outlet) {
            new.outlet_labels.insert(*outlet, label.clone());
        }
    }
    Ok(new)
}

/// A program in a plan.
#[derive(Debug, Clone)]
pub struct Run {
    program: Arc<Program>,
}

impl PartialEq for Run {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.program, &other.program)
    }
}
impl Eq for Run {}

impl Run {
    /// Instruction set that it runs on.
    pub fn kernels(&self) -> &'static str {
        self.program.kernels()
    }
}

impl Op for Run {
    fn name(&self) -> StaticName {
        NAME.into()
    }
    op_as_typed_op!();
}

impl EvalOp for Run {
    op_out_of_plan!();

    fn eval(&self, _: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let inputs =
            inputs.iter().map(|input| input.try_as_plain_ram()?.as_slice::<f32>()).collect::<TractResult<Vec<_>>>()?;
        let size = |shape: &Vec<usize>| shape.iter().product();
        let mut outputs: Vec<Vec<f32>> = self.program.outputs.iter().map(|shape| vec![0.0; size(shape)]).collect();
        let mut slices: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
        self.program.run(&inputs, &mut slices);
        outputs
            .iter()
            .zip(&self.program.outputs)
            .map(|(data, shape)| Ok(Tensor::from_shape(shape, data)?.into_tvalue()))
            .collect()
    }
}

impl TypedOp for Run {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(self.program.outputs.iter().map(|shape| f32::datum_type().fact(shape)).collect())
    }
    as_op!();
}
