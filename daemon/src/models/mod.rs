//! `outpost models`: work on model packages without a broker.

mod add;
mod bench;
mod calibrate;
mod edit;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde_json::json;

use crate::config::{Config, DEFAULT_PATH};
use crate::engine::measure::Effort;
use crate::engine::model::{Model, States};
use crate::engine::package::{Package, PackageError};
use crate::engine::registry::{self, version_key};
use crate::engine::{Registry, Shelf, meter};
use crate::intake::bare;
use crate::job::{By, Fault, Outcome, Reply, Station, Status, Tier, Timing};
use crate::route::doubt;

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
    /// Check packages and put them into the model directory; what is there is never overwritten
    Add {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Folders that hold a model.toml, or .tar.gz archives of such
        #[arg(required = true, value_name = "FOLDER")]
        packages: Vec<PathBuf>,
    },
    /// Check packages: keys, files, hashes and every variant's golden cases
    Verify {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Packages, by folder, name or name@version [default: all]
        names: Vec<String>,
    },
    /// Answer files with one model: one JSON reply a line
    Run {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Model, by name or name@version
        name: String,
        /// Variant by its name or file [default: the one that the daemon would run]
        #[arg(long)]
        variant: Option<String>,
        /// Inputs; the ending says what each is: png, jpg, csv, txt, json (an envelope) or bin
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Time every variant of every package: one inference on prepared input
    Bench {
        /// Where the packages are.
        #[command(flatten)]
        dir: Dir,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Threads that run the same model at once, as the daemon's workers do
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
        threads: u16,
        /// Inferences of each variant that are timed
        #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
        repeat: u32,
        /// Packages, by folder, name or name@version [default: all]
        names: Vec<String>,
    },
    /// Fit a model's confidence to a labelled set: what is under the threshold goes up
    Calibrate(calibrate::Args),
}

/// A model directory and the memory for its models.
struct Place {
    dir: PathBuf,
    /// Bytes.
    limit: u64,
    threads: usize,
}

impl Dir {
    fn place(&self) -> Result<Place> {
        match &self.models {
            Some(dir) => Ok(Place { dir: dir.clone(), limit: u64::MAX, threads: 1 }),
            None => {
                let models = Config::load(Path::new(DEFAULT_PATH)).context("no --models was given")?.models;
                Ok(Place { dir: models.dir, limit: models.memory, threads: models.threads })
            }
        }
    }
}

impl Place {
    fn shelf(&self) -> Arc<Shelf> {
        Shelf::new(self.limit, self.threads)
    }

    /// The packages that the names mean; all where there is none.
    fn packages(&self, names: &[String]) -> Result<Vec<Result<Package, PackageError>>> {
        let folders = registry::folders(&self.dir).with_context(|| self.dir.display().to_string())?;
        let mut found = vec![names.is_empty(); names.len().max(1)];
        let mut packages = Vec::new();
        for folder in folders {
            let package = Package::read(&folder);
            let named = |name: &String| {
                folder.file_name().is_some_and(|folder| folder == name.as_str())
                    || package.as_ref().is_ok_and(|package| package.is(name))
            };
            let at = names.iter().position(named);
            if let Some(at) = at {
                found[at] = true;
            }
            if at.is_some() || names.is_empty() {
                packages.push(package);
            }
        }
        if let Some(missing) = found.iter().position(|found| !found) {
            bail!("no package `{}` in {}", names[missing], self.dir.display());
        }
        Ok(packages)
    }
}

/// Does it.
///
/// # Errors
/// The folder or a named package cannot be read.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::List { dir, json } => list(&dir.place()?, json),
        Command::Add { dir, json, packages } => add::run(&dir.place()?, &packages, json),
        Command::Verify { dir, json, names } => verify(&dir.place()?, &names, json),
        Command::Run { dir, name, variant, files } => answer(&dir.place()?, &name, variant.as_deref(), &files),
        Command::Bench { dir, json, threads, repeat, names } => {
            let place = Place { threads: threads.into(), ..dir.place()? };
            bench::run(&place, &names, Effort::of(repeat as usize, threads.into()), json)
        }
        Command::Calibrate(args) => calibrate::run(&args),
    }
}

fn list(place: &Place, json: bool) -> Result<ExitCode> {
    let dir = &place.dir;
    let registry = Registry::load_within(dir, place.shelf()).with_context(|| dir.display().to_string())?;
    if json {
        let active = registry.models().iter().map(|model| {
            let manifest = &model.package.manifest;
            json!({
                "model": manifest.name, "version": manifest.version, "task": manifest.task,
                "variant": model.variant_name(), "kernels": model.kernels, "us": model.measured_us(),
                "memory_mib": meter::mib(registry.shelf.need(model)), "dir": model.package.dir, "active": true,
            })
        });
        let refused =
            registry.refused.iter().map(|refused| json!({"dir": refused.dir, "active": false, "why": refused.reason}));
        println!("{}", serde_json::Value::Array(active.chain(refused).collect()));
    } else {
        for model in registry.models() {
            let task = &model.package.manifest.task;
            println!("{:<24} {task:<18} {:<10} {}", model.id(), model.variant_name(), model.kernels);
        }
        for refused in &registry.refused {
            println!("refused: {refused}");
        }
    }
    Ok(if registry.refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `pass`, `fail` or `none`: what the golden cases say of a variant.
fn golden(package: &Package, fit: &Result<(), String>) -> &'static str {
    match fit {
        Err(_) => "fail",
        Ok(()) if package.manifest.golden.is_empty() => "none",
        Ok(()) => "pass",
    }
}

fn verify(place: &Place, names: &[String], json: bool) -> Result<ExitCode> {
    let packages = place.packages(names)?;
    let mut good = !packages.is_empty();
    let mut rows = Vec::new();
    for package in packages {
        let package = match package {
            Ok(package) => package,
            Err(error) => {
                good = false;
                if !json {
                    println!("FAIL {error}");
                }
                rows.push(json!({"dir": error.dir, "golden": "fail", "why": error.reason}));
                continue;
            }
        };
        let manifest = &package.manifest;
        for variant in &manifest.variant {
            let name = package.variant_name(variant);
            let fit = Model::load(package.clone(), variant).and_then(|model| model.prove(&mut States::new()));
            good &= fit.is_ok();
            if !json {
                match &fit {
                    Ok(()) => println!("ok   {} {name}: {} golden cases", package.id(), manifest.golden.len()),
                    Err(why) => println!("FAIL {} {name}: {why}", package.id()),
                }
            }
            rows.push(json!({
                "dir": package.dir, "model": manifest.name, "version": manifest.version, "variant": name,
                "file": variant.file, "golden": golden(&package, &fit), "why": fit.err(),
            }));
        }
    }
    if json {
        println!("{}", serde_json::Value::Array(rows));
    } else if rows.is_empty() {
        println!("FAIL {} holds no package", place.dir.display());
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The model of that name in the folder, the newest first: one variant, or the one that the daemon would run.
fn open(place: &Place, name: &str, variant: Option<&str>) -> Result<Arc<Model>> {
    let mut packages = Vec::new();
    let mut reasons = Vec::new();
    for package in place.packages(&[name.to_owned()])? {
        match package {
            Ok(package) => packages.push(package),
            Err(refused) => reasons.push(refused.to_string()),
        }
    }
    packages.sort_by_cached_key(|package| std::cmp::Reverse(version_key(&package.manifest.version)));
    for package in packages {
        if let Some(wanted) = variant {
            let Some(spec) = package.variant(wanted) else {
                let names: Vec<&str> = package.manifest.variant.iter().map(|spec| package.variant_name(spec)).collect();
                bail!("{} has no variant `{wanted}`: it has {}", package.id(), names.join(", "));
            };
            return Ok(Model::load(package.clone(), spec).map_err(anyhow::Error::msg)?.into());
        }
        let shelf = place.shelf();
        let (tried, chosen) = registry::attempt(&package, &shelf, Effort::CHOICE);
        if let Some(model) = chosen.and_then(|at| tried[at].model.clone()) {
            // Measuring on a small shelf may have put it away.
            shelf.take(&model, &mut States::new()).map_err(|fault| anyhow::anyhow!(fault.message))?;
            return Ok(model);
        }
        reasons.extend(tried.into_iter().filter_map(|tried| tried.fit.err()));
    }
    bail!("`{name}` in {} cannot be used: {}", place.dir.display(), reasons.join("; "))
}

fn answer(place: &Place, name: &str, variant: Option<&str>, files: &[PathBuf]) -> Result<ExitCode> {
    let model = open(place, name, variant)?;
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
            let uncertain = doubt(output.confidence(), wanted);
            let station = Station {
                tier: Tier::Device,
                provider: None,
                outcome: if uncertain.is_some() { Outcome::Uncertain } else { Outcome::Answered },
                why: uncertain,
            };
            Reply {
                id: Some(id),
                status: Status::Ok,
                output: Some(output),
                error: None,
                by: Some(By::Device { model: model.id(), variant: model.variant_name().to_owned() }),
                degraded: station.outcome == Outcome::Uncertain,
                route: vec![station],
                last: None,
                timing_ms: timing,
                cost_usd: 0.0,
            }
        }
    }
}
