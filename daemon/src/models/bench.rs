//! `outpost models bench`: what each variant takes on this device.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::{Place, golden};
use crate::engine::measure::Effort;
use crate::engine::meter;
use crate::engine::model::Model;
use crate::engine::package::{Package, Precision, VariantSpec};
use crate::engine::registry::{self, Tried};

/// How often a variant is loaded; the shortest counts.
const LOADS: usize = 3;

/// One variant.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    version: String,
    variant: String,
    precision: &'static str,
    file: String,
    us_min: Option<f64>,
    us_median: Option<f64>,
    load_ms: Option<f64>,
    memory_mib: Option<f64>,
    kernels: Option<String>,
    golden: &'static str,
    chosen: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// Measures and prints; failure if a package has no variant that can be used.
pub fn run(place: &Place, names: &[String], effort: Effort, json: bool) -> Result<ExitCode> {
    let packages = place.packages(names)?;
    let mut good = !packages.is_empty();
    let mut rows = Vec::new();
    let shelf = place.shelf();
    if !json {
        println!(
            "{:<24}   {:<12} {:<6} {:>10} {:>10} {:>9} {:>11}  kernels",
            "model", "variant", "golden", "min us", "median us", "load ms", "memory MiB"
        );
    }
    for package in packages {
        let package = match package {
            Ok(package) => package,
            Err(refused) => {
                eprintln!("outpost: refused: {refused}");
                good = false;
                continue;
            }
        };
        let specs = &package.manifest.variant;
        // What the first load of a process takes besides is no variant's own.
        if rows.is_empty() {
            let _ = specs.first().map(|spec| Model::load(package.clone(), spec));
        }
        let (tried, chosen) = registry::attempt(&package, &shelf, effort);
        good &= chosen.is_some();
        for (at, (tried, spec)) in tried.iter().zip(specs).enumerate() {
            let row = row(&package, spec, tried, chosen == Some(at), shelf.as_ref());
            if !json {
                print(&row);
            }
            rows.push(row);
            if let Some(model) = &tried.model {
                shelf.remove(model);
            }
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        println!("* what the daemon runs: the fastest that passes; of those within 5% of it the smallest");
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn row(package: &Package, spec: &VariantSpec, tried: &Tried, chosen: bool, shelf: &crate::engine::Shelf) -> Row {
    let again = || Model::load(package.clone(), spec).ok().map(|model| model.footprint.load);
    let load = |model: &Model| {
        let loads = std::iter::once(model.footprint.load).chain((1..LOADS).filter_map(|_| again()));
        loads.min().map(|load: Duration| round(load.as_secs_f64() * 1e3))
    };
    let model = tried.model.as_deref();
    Row {
        model: package.manifest.name.clone(),
        version: package.manifest.version.clone(),
        variant: package.variant_name(spec).to_owned(),
        precision: Precision::as_str(spec.precision),
        file: spec.file.clone(),
        us_min: tried.figures.map(|figures| round(figures.us_min)),
        us_median: tried.figures.map(|figures| round(figures.us_median)),
        load_ms: model.and_then(load),
        memory_mib: model.map(|model| meter::mib(shelf.need(model))),
        kernels: model.map(|model| model.kernels.clone()),
        golden: golden(package, &tried.fit),
        chosen,
        why: tried.fit.as_ref().err().cloned(),
    }
}

fn print(row: &Row) {
    let number = |value: Option<f64>, places: usize| value.map_or("-".to_owned(), |value| format!("{value:.places$}"));
    println!(
        "{:<24} {} {:<12} {:<6} {:>10} {:>10} {:>9} {:>11}  {}",
        format!("{}@{}", row.model, row.version),
        if row.chosen { '*' } else { ' ' },
        row.variant,
        row.golden,
        number(row.us_min, 1),
        number(row.us_median, 1),
        number(row.load_ms, 1),
        number(row.memory_mib, 3),
        row.kernels.as_deref().unwrap_or("-"),
    );
    if let Some(why) = &row.why {
        println!("{:<24}   └ {why}", "");
    }
}

/// To a thousandth.
fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
