//! The operator that tract runs: a program with its inputs and outputs.

use std::cell::RefCell;
use std::sync::Mutex;

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::{GraphProto, NodeProto};
use tract_onnx::prelude::*;
use tract_onnx::tract_core::internal::*;
use tract_onnx::tract_hir::internal::*;

use super::lower::{self, Body, Fact, Refused, Unit};

/// Name of the operator in a rewritten graph.
pub const NAME: &str = "OutpostQuantized";
/// Its attribute, a graph.
pub const BODY: &str = "body";

thread_local! {
    static REFUSED: RefCell<Vec<Refused>> = const { RefCell::new(Vec::new()) };
}

/// The nodes that the last attempt in this thread could not lower.
pub fn refused() -> Vec<Refused> {
    REFUSED.take()
}

/// Reads the node that [`super::rewrite`] wrote.
///
/// # Errors
/// A constant that cannot be read.
pub fn parse(context: &ParsingContext, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let graph = node.get_attr::<&GraphProto>(BODY)?;
    let constants = graph
        .initializer
        .iter()
        .map(|tensor| Ok((tensor.name.clone(), Arc::new(context.load_tensor(tensor)?))))
        .collect::<TractResult<_>>()?;
    let body = Body {
        nodes: graph.node.clone(),
        constants,
        opset: context.onnx_operator_set_version,
        inputs: node.input.clone(),
        outputs: node.output.clone(),
    };
    Ok((expand(Quantized { body: Arc::new(body), lowered: Arc::default() }), vec![]))
}

/// What a body was lowered to, and for which inputs.
type Lowered = (Vec<Fact>, Arc<Unit>);

/// A body, until the shapes of its inputs are known.
#[derive(Debug, Clone)]
struct Quantized {
    body: Arc<Body>,
    lowered: Arc<Mutex<Option<Lowered>>>,
}

impl Quantized {
    fn unit(&self, facts: &[Fact]) -> TractResult<Arc<Unit>> {
        let mut lowered = self.lowered.lock().map_err(|_| format_err!("a panic while lowering"))?;
        if let Some((known, unit)) = &*lowered
            && known == facts
        {
            return Ok(Arc::clone(unit));
        }
        let unit = lower::lower(&self.body, facts).map_err(|refused| {
            let why = refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            REFUSED.with_borrow_mut(|all| all.extend(refused));
            format_err!("{why}")
        })?;
        let unit = Arc::new(unit);
        *lowered = Some((facts.to_vec(), Arc::clone(&unit)));
        Ok(unit)
    }
}

impl Expansion for Quantized {
    fn name(&self) -> StaticName {
        NAME.into()
    }

    fn nboutputs(&self) -> TractResult<usize> {
        Ok(self.body.outputs.len())
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, self.body.inputs.len())?;
        check_output_arity(outputs, self.body.outputs.len())?;
        s.given_all(inputs.iter().map(|input| &input.datum_type), move |s, datums| {
            s.given_all(inputs.iter().map(|input| &input.shape), move |s, shapes| {
                let fact = |(shape, datum): (&TVec<TDim>, &DatumType)| -> TractResult<Fact> {
                    Ok((*datum, shape.iter().map(|dim| dim.to_usize()).collect::<Result<_, _>>()?))
                };
                // A shape that is not yet a number is asked for again when it is.
                let Ok(facts) = shapes.iter().zip(&datums).map(fact).collect::<TractResult<Vec<_>>>() else {
                    return Ok(());
                };
                for (port, output) in self.unit(&facts)?.outputs.iter().zip(outputs) {
                    let shape: TVec<TDim> = port.shape.iter().map(|dim| dim.to_dim()).collect();
                    s.equals(&output.datum_type, port.datum)?;
                    s.equals(&output.shape, shape)?;
                }
                Ok(())
            })
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let facts = inputs
            .iter()
            .map(|input| {
                let fact = model.outlet_fact(*input)?;
                let shape = fact.shape.as_concrete().with_context(|| format!("{prefix}: a dimension is not fixed"))?;
                Ok((fact.datum_type, shape.to_vec()))
            })
            .collect::<TractResult<Vec<Fact>>>()?;
        model.wire_node(prefix, Run { unit: self.unit(&facts)? }, inputs)
    }
}

/// A program in a plan.
#[derive(Debug, Clone)]
pub struct Run {
    unit: Arc<Unit>,
}

impl PartialEq for Run {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.unit, &other.unit)
    }
}
impl Eq for Run {}

impl Run {
    /// The program that all of `model` is, if it is one.
    pub fn alone(model: &TypedModel) -> Option<&Self> {
        let node = model.node(model.outputs.first()?.node);
        let all = (0..node.outputs.len()).map(|slot| OutletId::new(node.id, slot)).eq(model.outputs.iter().copied());
        node.op_as::<Self>().filter(|_| all && node.inputs[..] == model.inputs[..])
    }

    /// Runs the program.
    ///
    /// # Errors
    /// Inputs of other types or sizes than it was made for.
    pub fn answer(&self, inputs: &[TValue]) -> TractResult<TVec<TValue>> {
        let program = &self.unit.program;
        let mut memory = program.memory();
        for (port, input) in self.unit.inputs.iter().zip(inputs) {
            ensure!(input.datum_type() == port.datum && input.shape() == port.shape, "an input of {input:?}");
            if port.datum == f32::datum_type() {
                let to = &mut memory.floats[port.slot];
                to.copy_from_slice(input.try_as_plain_ram()?.as_slice::<f32>()?);
            } else {
                let from = input.as_bytes();
                let to = &mut memory.bytes[port.slot][..from.len()];
                stored(port.datum, from, to);
            }
        }
        program.run(&mut memory);
        let outputs = self
            .unit
            .outputs
            .iter()
            .map(|port| {
                let n: usize = port.shape.iter().product();
                if port.datum == f32::datum_type() {
                    return Ok(Tensor::from_shape(&port.shape, &memory.floats[port.slot][..n])?.into_tvalue());
                }
                let mut tensor = Tensor::zero_dt(port.datum, &port.shape)?;
                stored(port.datum, &memory.bytes[port.slot][..n], tensor.as_bytes_mut());
                Ok(tensor.into_tvalue())
            })
            .collect();
        program.give_back(memory);
        outputs
    }

    /// Instruction set that it runs on.
    pub fn kernels(&self) -> &'static str {
        self.unit.program.kernels.name
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
        self.answer(&inputs)
    }
}

impl TypedOp for Run {
    fn output_facts(&self, _: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        Ok(self.unit.outputs.iter().map(|port| port.datum.fact(&port.shape)).collect())
    }
    as_op!();
}

/// ONNX's bytes as they are stored, and back: the same operation.
fn stored(datum: DatumType, from: &[u8], to: &mut [u8]) {
    if lower::offset(datum) == 0 {
        to.copy_from_slice(from);
    } else {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from ^ 0x80);
    }
}
