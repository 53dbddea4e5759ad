//! One model in a process of its own, for `tests/bench/peers`: `peer outpost|tract FILE` says how long the load
//! took, then for each number of runs on standard input how many microseconds each took.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use outpost::engine::quant;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::DimLike;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (Some(mode), Some(file)) = (arguments.next(), arguments.next()) else {
        println!("peer: run by tests/bench/peers");
        return Ok(());
    };
    let started = Instant::now();
    let fix = |model: &mut InferenceModel| -> Result<(DatumType, Vec<usize>)> {
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
    };
    let (model, (datum, shape)) = match mode.as_str() {
        "outpost" => quant::load(Path::new(&file), fix)?,
        "tract" => {
            let mut model = tract_onnx::onnx().model_for_path(&file)?;
            let known = fix(&mut model)?;
            (model.into_optimized()?, known)
        }
        other => bail!("{other} is neither outpost nor tract"),
    };
    let mut state = model.into_runnable()?.spawn()?;
    let input = Tensor::zero_dt(datum, &shape)?.into_tvalue();
    state.run(tvec!(input.clone()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{{\"load_ms\": {}}}", started.elapsed().as_secs_f64() * 1e3)?;
    for line in std::io::stdin().lock().lines() {
        let n: usize = line?.trim().parse()?;
        let mut times = Vec::with_capacity(n);
        for _ in 0..n {
            let started = Instant::now();
            state.run(tvec!(input.clone()))?;
            times.push(started.elapsed().as_nanos() as f64 / 1e3);
        }
        writeln!(out, "{times:?}")?;
        out.flush()?;
    }
    Ok(())
}
