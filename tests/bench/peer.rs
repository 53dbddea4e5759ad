//! One model in a process of its own, for `tests/bench/peers` and `tests/bench/agree`.
//!
//! - `peer outpost|tract FILE [INPUT]` says how long it took from the file to the first answer and what memory that
//!   took, then for each number of runs on standard input how many microseconds each took.
//! - `peer answer FILE INPUTS OUTPUTS` writes ours' first output for each input.
//!
//! Inputs and outputs are files of little-endian elements, one after the other.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use outpost::engine::load::{Plan, State};
use outpost::engine::package::Dim;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::DimLike;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["answer", file, inputs, outputs] => answer(file, inputs, outputs),
        [mode, file] => time(mode, file, None),
        [mode, file, input] => time(mode, file, Some(input)),
        _ => {
            println!("peer: run by tests/bench/peers and tests/bench/agree");
            Ok(())
        }
    }
}

/// A model that is ready to run, ours or plain tract's.
enum Side {
    Ours(Box<Plan>, State),
    Tract(State),
}

impl Side {
    fn load(mode: &str, file: &str, shape: &[usize]) -> Result<Self> {
        match mode {
            "outpost" => {
                let dims: Vec<Dim> = shape.iter().map(|dim| Dim::Fixed(*dim)).collect();
                let plan = Plan::load(Path::new(file), &dims)?;
                let state = plan.state()?;
                Ok(Side::Ours(Box::new(plan), state))
            }
            "tract" => {
                let mut model = tract_onnx::onnx().model_for_path(file)?;
                fix(&mut model)?;
                Ok(Side::Tract(model.into_optimized()?.into_runnable()?.spawn()?))
            }
            other => bail!("{other} is neither outpost nor tract"),
        }
    }

    fn run(&mut self, input: TValue) -> Result<TVec<TValue>> {
        match self {
            Side::Ours(plan, state) => plan.infer(state, input),
            Side::Tract(state) => state.run(tvec!(input)),
        }
    }
}

/// Fixes every dimension of the input: what is open is 1.
fn fix(model: &mut InferenceModel) -> Result<(DatumType, Vec<usize>)> {
    let fact = model.input_fact(0)?.clone();
    let datum = fact.datum_type.concretize().context("a type")?;
    let rank = fact.shape.rank().concretize().context("a rank")?;
    let dim = |at: usize| fact.shape.dim(at).and_then(|dim| dim.concretize()).and_then(|dim| dim.to_usize().ok());
    let shape: Vec<usize> = (0..rank as usize).map(|at| dim(at).unwrap_or(1)).collect();
    model.set_input_fact(0, InferenceFact::dt_shape(datum, &shape))?;
    for at in 0..model.output_outlets()?.len() {
        model.set_output_fact(at, InferenceFact::default())?;
    }
    Ok((datum, shape))
}

fn tensor(datum: DatumType, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    let size = shape.iter().product::<usize>() * datum.size_of();
    ensure!(bytes.len() == size, "the model takes {size} bytes, not {}", bytes.len());
    Ok(match datum {
        DatumType::F32 => {
            let data: Vec<f32> =
                bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
            Tensor::from_shape(shape, &data)?
        }
        DatumType::I8 => Tensor::from_shape(shape, &bytes.iter().map(|byte| *byte as i8).collect::<Vec<_>>())?,
        DatumType::U8 => Tensor::from_shape(shape, bytes)?,
        other => bail!("an input of type {other:?}"),
    })
}

/// Most memory that the process has held, in MiB.
fn peak_mib() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}

/// Some input, always the same: whole numbers, as bytes or floats.
fn made(datum: DatumType, n: usize) -> Vec<u8> {
    let bytes = (0..n as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8);
    if datum == f32::datum_type() {
        bytes.flat_map(|byte| f32::from(byte).to_le_bytes()).collect()
    } else {
        bytes.collect()
    }
}

fn time(mode: &str, file: &str, input: Option<&str>) -> Result<()> {
    let (datum, shape) = fix(&mut tract_onnx::onnx().model_for_path(file)?)?;
    let input = match input {
        Some(input) => std::fs::read(input)?,
        None => made(datum, shape.iter().product()),
    };
    let before = peak_mib()?;
    let started = Instant::now();
    let mut side = Side::load(mode, file, &shape)?;
    let input = tensor(datum, &shape, &input)?.into_tvalue();
    side.run(input.clone())?;
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let peak = peak_mib()?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{{\"load_ms\": {load_ms}, \"peak_mib\": {peak}, \"added_mib\": {}}}", peak - before)?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let n: usize = line?.trim().parse()?;
        let mut times = Vec::with_capacity(n);
        for _ in 0..n {
            let started = Instant::now();
            side.run(input.clone())?;
            times.push(started.elapsed().as_nanos() as f64 / 1e3);
        }
        writeln!(out, "{times:?}")?;
        out.flush()?;
    }
    Ok(())
}

fn answer(file: &str, inputs: &str, outputs: &str) -> Result<()> {
    let (datum, shape) = fix(&mut tract_onnx::onnx().model_for_path(file)?)?;
    let mut side = Side::load("outpost", file, &shape)?;
    let size = shape.iter().product::<usize>() * datum.size_of();
    let inputs = std::fs::read(inputs)?;
    ensure!(inputs.len() % size == 0, "the model takes {size} bytes; the file has {}", inputs.len());
    let mut out = std::io::BufWriter::new(std::fs::File::create(outputs)?);
    for input in inputs.chunks_exact(size) {
        let answers = side.run(tensor(datum, &shape, input)?.into_tvalue())?;
        out.write_all(answers[0].as_bytes())?;
    }
    out.flush()?;
    Ok(())
}
