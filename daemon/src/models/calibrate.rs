//! `outpost models calibrate`: fits a model's confidence to a labelled set and writes it into its package.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Dir, Place, add, edit, open};
use crate::calibrate::{Broken, Fit, Point, Promise, binomial, fit, measure, plot, set};
use crate::engine::package::Package;

/// The method, for reports.
const METHOD: &str = "Learn then Test (arXiv:2110.01052): exact binomial tests in a fixed sequence";

/// What to calibrate, on what, for which promise.
#[derive(clap::Args, Debug)]
#[command(group(clap::ArgGroup::new("promise").required(true).args(["accuracy", "max_up"])))]
pub struct Args {
    /// Where the packages are.
    #[command(flatten)]
    pub(super) dir: Dir,
    /// Model, by name or name@version [default: the only one that gives the set's labels]
    name: Option<String>,
    /// Labelled set: a folder with a sub-folder for each label, or a file with {"input": …, "label": …} on each line
    #[arg(long, value_name = "FOLDER|FILE")]
    set: PathBuf,
    /// Promise that of the answers that stay on the device at least this share is right
    #[arg(long, value_name = "SHARE", value_parser = share)]
    accuracy: Option<f64>,
    /// Promise that at most this share of the jobs is sent up
    #[arg(long, value_name = "SHARE", value_parser = share)]
    max_up: Option<f64>,
    /// Probability with which the promise holds, over the draw of the set
    #[arg(long, value_name = "SHARE", value_parser = share, default_value = "0.9")]
    assurance: f64,
    /// Variant by its name or file [default: the one that the daemon would run]
    #[arg(long)]
    variant: Option<String>,
    /// Where the plot goes [default: calibration.svg in the package]
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Report only: the package stays as it is
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if 0.0 < share && share < 1.0 { Ok(share) } else { Err("a share between 0 and 1 is needed, like 0.95".to_owned()) }
}

/// Calibrates. Failure, and the package stays as it is, where no threshold keeps the promise.
///
/// # Errors
/// The package or the set cannot be read, or the package cannot be written.
pub fn run(args: &Args) -> Result<ExitCode> {
    let place = args.dir.place()?;
    let name = args.name.clone().map_or_else(|| fitting(&place, &args.set), Ok)?;
    let model = open(&place, &name, args.variant.as_deref())?;
    let set = set::read(&args.set, &model)?;
    let promise = match (args.accuracy, args.max_up) {
        (Some(accuracy), _) => Promise::Accuracy(accuracy),
        (None, max_up) => Promise::MaxUp(max_up.unwrap_or_default()),
    };
    let fit = fit(&set.cases, promise, args.assurance);
    let package = &model.package;
    let old = package.manifest.confidence;
    let before = measure(&set.cases[fit.fitted..], old.temperature, old.threshold);
    let written = fit.chosen.is_ok() && !args.dry_run;
    let own = written && add::own(&package.dir)?;
    let svg = match &args.svg {
        None if args.dry_run || fit.chosen.is_err() => None,
        path => Some(path.clone().unwrap_or_else(|| package.path("calibration.svg"))),
    };
    if let Some(path) = &svg {
        let title = format!("{}: accuracy against share sent up, {} cases", package.id(), fit.tested);
        let shown = || path.display().to_string();
        replace(path, plot::svg(&fit, promise, &title).as_bytes()).with_context(shown)?;
    }
    if let (Ok(point), true) = (&fit.chosen, written) {
        write(package, point.threshold, fit.temperature)?;
    }
    if args.json {
        println!(
            "{}",
            json!({
                "model": package.id(), "variant": model.variant_name(),
                "set": {"cases": set.cases.len(), "twice": set.twice, "outside_limits": set.refused,
                        "fitted": fit.fitted, "tested": fit.tested},
                "promise": promise, "assurance": args.assurance, "method": METHOD, "holds": fit.chosen.is_ok(),
                "why": fit.chosen.as_ref().err().map(ToString::to_string),
                "temperature": fit.temperature, "threshold": fit.chosen.as_ref().ok().map(|point| point.threshold),
                "chosen": fit.chosen.as_ref().ok(),
                "before": {"temperature": old.temperature, "at": before},
                "curve": fit.curve, "written": written, "svg": svg,
            })
        );
    } else {
        println!("{}, {}: {} cases", package.id(), model.variant_name(), set.cases.len());
        if set.twice > 0 {
            println!("  {} more were there twice and count once", set.twice);
        }
        if set.refused > 0 {
            println!("  {} of them are outside the model's limits and always go up", set.refused);
        }
        println!("  {} fitted the temperature and laid out the thresholds, {} tested them\n", fit.fitted, fit.tested);
        println!("{}", plot::text(&fit, promise));
        println!("before   {}", row(&before, old.temperature, fit.tested));
        report(&fit, promise, args.assurance);
        if let Some(svg) = &svg {
            println!("plot in {}", svg.display());
        }
        if own {
            println!("{} was a link and is a copy of its own now: upgrades leave it alone", package.dir.display());
        }
        if written {
            println!("written into {}", package.path("model.toml").display());
        } else {
            println!("{} stays as it is", package.path("model.toml").display());
        }
    }
    Ok(if fit.chosen.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The name of the one model that gives the labels of a set.
fn fitting(place: &Place, set: &Path) -> Result<String> {
    let packages: Vec<Package> = place.packages(&[])?.into_iter().filter_map(Result::ok).collect();
    let names: BTreeSet<&str> =
        set::fitting(set, &packages)?.iter().map(|package| package.manifest.name.as_str()).collect();
    let shown = || names.iter().copied().collect::<Vec<_>>().join(", ");
    match names.first() {
        Some(name) if names.len() == 1 => Ok((*name).to_owned()),
        Some(_) => bail!("which model? {} give the labels of {}", shown(), set.display()),
        None => bail!("no model in {} gives the labels of {}", place.dir.display(), set.display()),
    }
}

/// One threshold with its figures and their 95 % intervals.
fn row(point: &Point, temperature: f64, tested: usize) -> String {
    let interval = |k: usize, n: usize| {
        let (low, high) = (binomial::lower(k, n, 0.025), binomial::upper(k, n, 0.025));
        format!("{:.2} % ({:.2} to {:.2})", 100.0 * k as f64 / n.max(1) as f64, 100.0 * low, 100.0 * high)
    };
    format!(
        "threshold {:.6}, temperature {temperature}: {} sent up, of the rest {} right",
        point.threshold,
        interval(tested - point.kept, tested),
        interval(point.right, point.kept),
    )
}

fn report(fit: &Fit, promise: Promise, assurance: f64) {
    let sentence = match promise {
        Promise::Accuracy(share) => {
            format!("of the answers that stay on the device at least {} % are right", percent(share))
        }
        Promise::MaxUp(share) => format!("at most {} % of the jobs are sent up", percent(share)),
    };
    match &fit.chosen {
        Ok(point) => {
            println!("now      {}\n", row(point, fit.temperature, fit.tested));
            println!("Promise: {sentence}.");
            println!(
                "It holds with a probability of {} % over the draw of the set, whatever the model, for jobs drawn as the \
                 set was.\nMethod: {METHOD}.",
                percent(assurance)
            );
        }
        Err(broken) => {
            println!("\nNo promise that {sentence}: {broken}.");
            match broken {
                Broken::TooSmall { .. } => println!("Add cases, or promise less."),
                Broken::NotShown { .. } => println!("Promise less, take a better model, or add cases."),
            }
        }
    }
}

fn percent(share: f64) -> f64 {
    (share * 1e6).round() / 1e4
}

/// Puts the two numbers into the package's manifest and leaves all else as it is, comments included.
fn write(package: &Package, threshold: f64, temperature: f64) -> Result<()> {
    let path = package.path("model.toml");
    let shown = || path.display().to_string();
    let text = std::fs::read_to_string(&path).with_context(shown)?;
    replace(&path, edit::confidence(&text, threshold, temperature)?.as_bytes()).with_context(shown)?;
    // What was written must be what the daemon will read.
    Package::read(&package.dir)?;
    Ok(())
}

/// Writes a file at once or not at all: another process may read it at any time.
fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}.new"));
    let write = || {
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(content)?;
        if let Ok(old) = std::fs::metadata(path) {
            file.set_permissions(old.permissions())?;
        }
        file.sync_all()?;
        std::fs::rename(&fresh, path)
    };
    write().inspect_err(|_| {
        // The error is what matters; there may be nothing to remove.
        let _ = std::fs::remove_file(&fresh);
    })
}
