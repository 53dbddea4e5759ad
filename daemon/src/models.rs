//! `outpost models`: work on model packages without a broker.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use crate::config::{Config, DEFAULT_PATH};
use crate::engine::Registry;
use crate::engine::model::{Model, States};
use crate::engine::package::Package;
use crate::intake::bare;
use crate::job::{By, Fault, Outcome, Reply, Station, Status, Tier, Timing};

/// Where the packages are.
#[derive(clap::Args, Debug)]
pub struct Dir {
    /// Folder of packages [default: the configuration's]
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
}

/// What to do with the packages.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// List the packages and what became of each
    List {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check packages: keys, files, hashes and every variant's golden cases
    Verify {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Packages [default: all]
        names: Vec<String>,
    },
    /// Answer files with one model: one JSON reply a line
    Run {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Model, by name or name@version
        name: String,
        /// Variant by its precision [default: the one that the daemon would run]
        #[arg(long)]
        variant: Option<String>,
        /// Inputs; the ending says what each is: png, jpg, csv, txt, json (an envelope) or bin
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

impl Dir {
    fn path(&self) -> Result<PathBuf> {
        match &self.models {
            Some(dir) => Ok(dir.clone()),
            None => Ok(Config::load(Path::new(DEFAULT_PATH)).context("no --models was given")?.models.dir),
        }
    }
}

/// Does it.
///
/// # Errors
/// The folder or a named package cannot be read.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List { dir, json } => list(&dir.path()?, json),
        Command::Verify { dir, names } => verify(&dir.path()?, &names),
        Command::Run { dir, name, variant, files } => answer(&dir.path()?, &name, variant.as_deref(), &files),
    }
}

fn list(dir: &Path, json: bool) -> Result<ExitCode> {
    let registry = Registry::load(dir).with_context(|| dir.display().to_string())?;
    if json {
        let active = registry.models().iter().map(|model| {
            let manifest = &model.package.manifest;
            serde_json::json!({
                "model": manifest.name, "version": manifest.version, "task": manifest.task,
                "variant": model.variant.precision.as_str(), "active": true,
            })
        });
        let refused = registry
            .refused
            .iter()
            .map(|refused| serde_json::json!({"dir": refused.dir, "active": false, "why": refused.reason}));
        println!("{}", serde_json::Value::Array(active.chain(refused).collect()));
    } else {
        for model in registry.models() {
            let manifest = &model.package.manifest;
            println!("{:<24} {:<18} {}", model.id(), manifest.task, model.variant.precision.as_str());
        }
        for refused in &registry.refused {
            println!("refused: {refused}");
        }
    }
    Ok(if registry.refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verify(dir: &Path, names: &[String]) -> Result<ExitCode> {
    let mut folders: Vec<PathBuf> = match names {
        [] => std::fs::read_dir(dir)
            .with_context(|| dir.display().to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|folder| folder.join("model.toml").is_file())
            .collect(),
        names => names.iter().map(|name| dir.join(name)).collect(),
    };
    folders.sort();
    let mut good = !folders.is_empty();
    for folder in folders {
        let package = match Package::read(&folder) {
            Ok(package) => package,
            Err(error) => {
                println!("FAIL {error}");
                good = false;
                continue;
            }
        };
        for variant in &package.manifest.variant {
            let proven = Model::load(package.clone(), variant).and_then(|model| model.prove(&mut States::new()));
            match proven {
                Ok(()) => println!(
                    "ok   {} {}: {} golden cases",
                    package.id(),
                    variant.precision.as_str(),
                    package.manifest.golden.len()
                ),
                Err(why) => {
                    println!("FAIL {} {}: {why}", package.id(), variant.precision.as_str());
                    good = false;
                }
            }
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The model of that name in the folder: one variant, or the one that the daemon would run.
fn open(dir: &Path, name: &str, variant: Option<&str>) -> Result<std::sync::Arc<Model>> {
    let registry = Registry::load(dir).with_context(|| dir.display().to_string())?;
    let named = |model: &&std::sync::Arc<Model>| model.package.manifest.name == name || model.id() == name;
    let Some(model) = registry.models().iter().find(named) else {
        let refused: Vec<String> = registry.refused.iter().map(ToString::to_string).collect();
        bail!("no active model `{name}` in {} {}", dir.display(), refused.join("; "));
    };
    let Some(wanted) = variant else { return Ok(std::sync::Arc::clone(model)) };
    let of = |spec: &&crate::engine::package::VariantSpec| spec.precision.as_str() == wanted || spec.file == wanted;
    let spec =
        model.package.manifest.variant.iter().find(of).with_context(|| format!("{name} has no variant `{wanted}`"))?;
    Ok(Model::load(model.package.clone(), spec).map_err(anyhow::Error::msg)?.into())
}

fn answer(dir: &Path, name: &str, variant: Option<&str>, files: &[PathBuf]) -> Result<ExitCode> {
    let model = open(dir, name, variant)?;
    let mut states = States::new();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut good = true;
    for file in files {
        let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
        let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let started = Instant::now();
        let result = bare::by_ending(ending, bytes).and_then(|input| model.answer(&mut states, &input, None));
        let reply = reply(&model, file.display().to_string(), result, started);
        good &= reply.status == Status::Ok;
        writeln!(out, "{}", serde_json::to_string(&reply)?)?;
    }
    out.flush()?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn reply(model: &Model, id: String, result: Result<crate::job::Output, Fault>, started: Instant) -> Reply {
    let took = started.elapsed().as_secs_f64() * 1e3;
    let timing = Timing { device: took, total: took, ..Timing::default() };
    match result {
        Err(fault) => Reply::error(Some(id), fault, Vec::new(), timing),
        Ok(output) => {
            let wanted = model.package.manifest.confidence.threshold;
            let uncertain = output.confidence().filter(|found| *found < wanted);
            let station = Station {
                tier: Tier::Device,
                provider: None,
                outcome: if uncertain.is_some() { Outcome::Uncertain } else { Outcome::Answered },
                why: uncertain.map(|found| format!("confidence {found:.2} is under {wanted:.2}")),
            };
            Reply {
                id: Some(id),
                status: Status::Ok,
                output: Some(output),
                error: None,
                by: Some(By::Device { model: model.id(), variant: model.variant.precision.as_str().to_owned() }),
                route: vec![station],
                degraded: uncertain.is_some(),
                timing_ms: timing,
                cost_usd: 0.0,
            }
        }
    }
}
