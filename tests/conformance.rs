//! Quantized graphs of every kind and form, made by `tests/conformance/generate.py`, against onnxruntime's answers.
//!
//! Integers are right within one step, floats that are dequantized integers within one of their scale, other floats
//! within 1e-4 of their size: of onnxruntime's answer, or of what lies between its answers with and without its
//! optimisations. What is quantized through and through must run as one program of ours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use outpost::engine::load::Plan;
use outpost::engine::package::Dim;
use outpost::task::Prepared;
use outpost::task::tensor::Elements;
use serde::Deserialize;
use sha2::Digest;

/// One graph, as `manifest.json` has it.
#[derive(Debug, Deserialize)]
struct Graph {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    runs: usize,
    outputs: Vec<Output>,
    /// Operators that may be left to tract; `*`: any, `elementwise`: all but products.
    left: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Output {
    dtype: String,
    shape: Vec<usize>,
    /// The scale, where the output is a dequantized integer.
    step: Option<f64>,
}

/// How many values were compared, and how many of them are the same bit for bit.
#[derive(Debug, Default)]
struct Tally {
    exact: usize,
    all: usize,
    /// Values that are right by the answer without optimisations only.
    plain: usize,
}

const SOURCES: [&str; 5] = ["generate.py", "forms.py", "hand.py", "nets.py", "requirements.txt"];

/// The folder with the graphs; made where the generator is not the one that made it.
fn graphs() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/conformance");
    let read = |name: &str| std::fs::read(here.join(name)).expect("a source of the generator");
    let hash = |names: &[&str]| {
        let mut sha = sha2::Sha256::new();
        names.iter().for_each(|name| sha.update(read(name)));
        format!("{:x}", sha.finalize())[..16].to_owned()
    };
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = target.join(format!("conformance-{}", hash(&SOURCES)));
    if folder.join("manifest.json").exists() {
        return folder;
    }
    let run = |command: &mut Command| {
        let output = command.output().expect("python3 with venv");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let venv = target.join(format!("conformance-venv-{}", hash(&["requirements.txt"])));
    if !venv.join("ready").exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv));
        let pip = ["install", "--quiet", "--disable-pip-version-check", "-r"];
        run(Command::new(venv.join("bin/pip")).args(pip).arg(here.join("requirements.txt")));
        std::fs::write(venv.join("ready"), "").expect("written");
    }
    let part = folder.with_extension("part");
    let _ = std::fs::remove_dir_all(&part);
    run(Command::new(venv.join("bin/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(here.join("generate.py"))
        .arg(&part));
    std::fs::rename(&part, &folder).expect("renamed");
    folder
}

/// Elements of `n` values, taken off the front of `bytes`.
fn take(bytes: &mut &[u8], dtype: &str, n: usize) -> Elements {
    let size = match dtype {
        "float32" | "int32" => 4,
        _ => 1,
    };
    let (own, rest) = bytes.split_at(n * size);
    *bytes = rest;
    let words = || own.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
    match dtype {
        "float32" => Elements::F32(words().map(f32::from_le_bytes).collect()),
        "int32" => Elements::I32(words().map(i32::from_le_bytes).collect()),
        "uint8" => Elements::U8(own.to_vec()),
        "int8" => Elements::I8(own.iter().map(|byte| *byte as i8).collect()),
        other => panic!("{other}"),
    }
}

fn numbers(elements: &Elements) -> Vec<f64> {
    match elements {
        Elements::F32(data) => data.iter().map(|x| f64::from(*x)).collect(),
        Elements::I32(data) => data.iter().map(|x| f64::from(*x)).collect(),
        Elements::U8(data) => data.iter().map(|x| f64::from(*x)).collect(),
        Elements::I8(data) => data.iter().map(|x| f64::from(*x)).collect(),
        Elements::I64(data) => data.iter().map(|x| *x as f64).collect(),
    }
}

/// Runs one graph; what is wrong with it.
fn check(folder: &Path, graph: &Graph, tally: &mut Tally) -> Result<(), String> {
    let shape: Vec<Dim> = graph.shape.iter().map(|n| Dim::Fixed(*n)).collect();
    let plan = Plan::load(&folder.join(format!("{}.onnx", graph.name)), &shape)
        .map_err(|error| format!("refused: {error:#}").replace('\n', " "))?;
    let mut state = plan.state().map_err(|error| format!("no state: {error:#}"))?;
    let data = std::fs::read(folder.join(format!("{}.bin", graph.name))).map_err(|error| error.to_string())?;
    let mut data = &data[..];
    for run in 0..graph.runs {
        let input = take(&mut data, &graph.dtype, graph.shape.iter().product());
        let found = plan
            .run(&mut state, &Prepared::Raw(input), None)
            .map_err(|error| format!("run {run}: {error:#}"))?
            .remove(0);
        let mut answers = || -> Vec<Vec<f64>> {
            let sizes = graph.outputs.iter().map(|output| (&output.dtype, output.shape.iter().product()));
            sizes.map(|(dtype, n)| numbers(&take(&mut data, dtype, n))).collect()
        };
        let (expected, plain) = (answers(), answers());
        for (at, (output, found)) in graph.outputs.iter().zip(&found).enumerate() {
            let place = format!("run {run}, output {at}");
            if found.shape != output.shape {
                return Err(format!("{place}: shape {:?} instead of {:?}", found.shape, output.shape));
            }
            let integer = output.dtype != "float32";
            let size = expected[at].iter().fold(0.0_f64, |size, x| size.max(x.abs()));
            let mut worst = (0.0, 0.0, 0.0, 0.0);
            for ((found, expected), plain) in found.data.iter().zip(&expected[at]).zip(&plain[at]) {
                let allowed = match output.step {
                    _ if integer => 1.0,
                    Some(step) => step * 1.001,
                    None => 1e-4 * expected.abs() + 1e-5 * size,
                };
                if integer || output.step.is_some() {
                    tally.all += 1;
                    tally.exact += usize::from(found == expected);
                }
                let off = (found - expected.min(*plain)).min(0.0).abs() + (found - expected.max(*plain)).max(0.0);
                tally.plain += usize::from(off <= allowed && (found - expected).abs() > allowed);
                if off.is_nan() || off > allowed.max(worst.0) {
                    worst = (off, *found, *expected, *plain);
                }
            }
            if worst != (0.0, 0.0, 0.0, 0.0) {
                let (_, found, expected, plain) = worst;
                return Err(format!("{place}: {found} instead of {expected} or {plain} (step {:?})", output.step));
            }
        }
    }
    let operators = plan.operators();
    let ours = operators.iter().filter(|name| *name == outpost::engine::quant::operator::NAME).count();
    let others: Vec<&String> = operators
        .iter()
        .filter(|name| !["Source", "Const", outpost::engine::quant::operator::NAME].contains(&name.as_str()))
        .filter(|name| {
            !graph.left.iter().any(|left| match left.as_str() {
                "*" => true,
                "elementwise" => {
                    !["Conv", "MatMul", "EinSum", "Im2", "DepthWise"].iter().any(|part| name.contains(part))
                }
                left => name.contains(left),
            })
        })
        .collect();
    if !others.is_empty() {
        return Err(format!("left to tract: {others:?}"));
    }
    if graph.left.is_empty() && ours != 1 {
        return Err(format!("{ours} programs instead of one"));
    }
    Ok(())
}

#[test]
fn quantized_graphs_answer_as_onnxruntime_does() {
    let folder = graphs();
    let manifest = std::fs::read(folder.join("manifest.json")).expect("a manifest");
    let mut graphs: Vec<Graph> = serde_json::from_slice(&manifest).expect("JSON");
    assert!(graphs.len() >= 300, "{} graphs", graphs.len());
    if let Ok(only) = std::env::var("CONFORMANCE") {
        graphs.retain(|graph| graph.name.contains(&only));
    }
    let mut failed: BTreeMap<&str, String> = BTreeMap::new();
    let mut tally = Tally::default();
    let (mut inexact, mut by_plain) = (0, 0);
    for graph in &graphs {
        let mut own = Tally::default();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&folder, graph, &mut own)));
        if let Err(why) = outcome.unwrap_or_else(|_| Err("panic".to_owned())) {
            failed.insert(&graph.name, why);
        }
        if own.exact < own.all {
            inexact += 1;
            println!("{}: {} of {} are not the same bit for bit", graph.name, own.all - own.exact, own.all);
        }
        by_plain += usize::from(own.plain > 0);
        tally.plain += own.plain;
        tally.all += own.all;
        tally.exact += own.exact;
    }
    println!(
        "{} graphs, {inexact} of them not bit for bit; {:.4}% of {} integers are",
        graphs.len(),
        100.0 * tally.exact as f64 / tally.all.max(1) as f64,
        tally.all
    );
    println!(
        "{} values of {by_plain} graphs lie over a step from the optimised answer, not from the plain one",
        tally.plain
    );
    let list: Vec<String> = failed.iter().map(|(name, why)| format!("{name}: {why}")).collect();
    assert!(list.is_empty(), "{} of {} graphs:\n{}", list.len(), graphs.len(), list.join("\n"));
}
