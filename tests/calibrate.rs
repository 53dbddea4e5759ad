//! `outpost models calibrate` as a person or a script meets it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tempfile::TempDir;

use crate::common::*;
use crate::models::{copy, edit};

/// One of the shipped packages, in a folder of its own.
fn package(name: &str) -> TempDir {
    let dir = TempDir::new().expect("a folder");
    copy(&models_dir().join(name), &dir.path().join(name));
    dir
}

fn heldout(name: &str) -> PathBuf {
    models_dir().join("train/heldout").join(format!("{name}.jsonl"))
}

fn calibrate(dir: &Path, name: &str, set: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(OUTPOST);
    command.args(["models", "calibrate", name, "--variant", "int8", "--models"]).arg(dir).arg("--set").arg(set);
    command.args(more).output().expect("runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(output)))
}

fn manifest(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name).join("model.toml")).expect("a manifest")
}

#[test]
fn the_threshold_goes_into_the_package_and_nothing_else_changes() {
    let dir = package("digits");
    edit(&dir.path().join("digits"), "threshold = 0.6", "threshold = 0.6 # by hand");
    let before = manifest(dir.path(), "digits");
    let dry = calibrate(dir.path(), "digits", &heldout("digits"), &["--accuracy", "0.97", "--dry-run", "--json"]);
    assert_eq!(dry.status.code(), Some(0), "{}", text(&dry));
    assert_eq!(manifest(dir.path(), "digits"), before);
    let report = json(&calibrate(dir.path(), "digits", &heldout("digits"), &["--accuracy", "0.97", "--json"]));
    assert_eq!((&report["holds"], &report["written"]), (&Value::Bool(true), &Value::Bool(true)), "{report}");
    assert_eq!(report["set"]["cases"], 450);
    // The same set gives the same numbers.
    assert_eq!(report["threshold"], json(&dry)["threshold"]);
    let after = manifest(dir.path(), "digits");
    let changed: Vec<(&str, &str)> = before.lines().zip(after.lines()).filter(|(a, b)| a != b).collect();
    assert_eq!(before.lines().count(), after.lines().count());
    assert_eq!(changed.len(), 2, "{changed:?}");
    assert!(changed[0].1.ends_with(" # by hand"), "{changed:?}");
    let read: toml::Table = after.parse().expect("TOML");
    assert_eq!(read["confidence"]["threshold"].as_float(), report["threshold"].as_f64());
    assert_eq!(read["confidence"]["temperature"].as_float(), report["temperature"].as_f64());
    let svg = std::fs::read_to_string(dir.path().join("digits/calibration.svg")).expect("a plot");
    assert!(svg.starts_with("<svg ") && svg.contains("polyline"), "{svg}");
    // The package is one that the daemon takes, and it now runs at the new threshold.
    let verified = Command::new(OUTPOST).args(["models", "verify", "--models"]).arg(dir.path()).output().expect("runs");
    assert_eq!(verified.status.code(), Some(0), "{}", text(&verified));
    let again = json(&calibrate(dir.path(), "digits", &heldout("digits"), &["--accuracy", "0.97", "--json"]));
    assert_eq!(again["before"]["at"], again["chosen"], "{again}");
}

#[test]
fn the_report_says_what_is_promised_and_plots_it() {
    let dir = package("notes");
    let output = calibrate(dir.path(), "notes", &heldout("notes"), &["--accuracy", "0.93", "--dry-run"]);
    let told = text(&output);
    assert_eq!(output.status.code(), Some(0), "{told}");
    for part in [
        "share sent up",
        "◆",
        "┄",
        "Promise: of the answers that stay on the device at least 93 % are right",
        "probability of 90 %",
        "Learn then Test",
        "stays as it is",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn a_set_too_small_for_the_promise_is_called_so_and_changes_nothing() {
    let dir = package("digits");
    let few: String = std::fs::read_to_string(heldout("digits"))
        .expect("a set")
        .lines()
        .take(60)
        .map(|line| line.to_owned() + "\n")
        .collect();
    let set = dir.path().join("few.jsonl");
    std::fs::write(&set, few).expect("written");
    let before = manifest(dir.path(), "digits");
    let output = calibrate(dir.path(), "digits", &set, &["--accuracy", "0.99"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        text(&output).contains("too small for this promise: it takes 306 cases at least, and there are 60"),
        "{}",
        text(&output)
    );
    assert_eq!(manifest(dir.path(), "digits"), before);
    assert!(!dir.path().join("digits/calibration.svg").exists());
    let report = json(&calibrate(dir.path(), "digits", &set, &["--accuracy", "0.99", "--json"]));
    assert_eq!((&report["holds"], &report["written"]), (&Value::Bool(false), &Value::Bool(false)), "{report}");
}

#[test]
fn folders_and_lines_say_the_same_and_cases_count_once() {
    let dir = package("digits");
    let (mut lines, folder) = (String::new(), dir.path().join("set"));
    for (i, line) in std::fs::read_to_string(heldout("digits")).expect("a set").lines().take(120).enumerate() {
        let value: Value = serde_json::from_str(line).expect("JSON");
        let of_label = folder.join(value["label"].as_str().expect("a label"));
        std::fs::create_dir_all(&of_label).expect("made");
        let picture = STANDARD.decode(value["input"]["image"].as_str().expect("a picture")).expect("base64");
        std::fs::write(of_label.join(format!("{i}.png")), &picture).expect("written");
        if i == 0 {
            std::fs::write(of_label.join("twice.png"), &picture).expect("written");
            lines = format!("{line}\n\n");
        }
        lines += &format!("{line}\n");
    }
    let set = dir.path().join("set.jsonl");
    std::fs::write(&set, lines).expect("written");
    let more = ["--max-up", "0.2", "--dry-run", "--json"];
    let reports = [&folder, &set].map(|set| json(&calibrate(dir.path(), "digits", set, &more)));
    for report in &reports {
        assert_eq!((&report["set"]["cases"], &report["set"]["twice"]), (&120.into(), &1.into()), "{report}");
        assert!(report["chosen"]["up"].as_f64().is_some_and(|up| (0.0..0.2).contains(&up)), "{report}");
    }
}

#[test]
fn series_are_calibrated_by_their_distance_from_the_threshold() {
    let dir = package("bearing");
    let report = json(&calibrate(dir.path(), "bearing", &heldout("bearing"), &["--max-up", "0.3", "--json"]));
    assert_eq!(report["holds"], true, "{report}");
    assert!(report["threshold"].as_f64().is_some_and(|threshold| threshold > 0.5), "{report}");
    let up = report["chosen"]["up"].as_f64().expect("a share");
    assert!(up > 0.1 && up < 0.3, "{report}");
    // Those that stay are the surer ones.
    assert!(report["chosen"]["accuracy"].as_f64() > report["curve"][0]["accuracy"].as_f64(), "{report}");
}

#[test]
fn mistakes_are_named() {
    let dir = package("digits");
    let set = dir.path().join("set.jsonl");
    let good = std::fs::read_to_string(heldout("digits")).expect("a set");
    let good = good.lines().next().expect("a line");
    for (second, part) in [
        (good.replace("\"label\":\"", "\"label\":\"x"), "line 2: `x"),
        ("{\"input\": {\"text\": \"a\"}, \"label\": \"1\"}".to_owned(), "line 2"),
        ("{\"input\": {\"image\": \"AAAA\"}, \"label\": \"1\"}".to_owned(), "line 2"),
        ("{".to_owned(), "line 2"),
    ] {
        std::fs::write(&set, format!("{good}\n{second}\n")).expect("written");
        let output = calibrate(dir.path(), "digits", &set, &["--max-up", "0.2"]);
        assert_eq!(output.status.code(), Some(1), "{second}");
        assert!(text(&output).contains(part), "{second}: {}", text(&output));
    }
    for more in [&[][..], &["--accuracy", "95"], &["--accuracy", "0.9", "--max-up", "0.1"], &["--max-up", "0"]] {
        assert_eq!(calibrate(dir.path(), "digits", &set, more).status.code(), Some(2), "{more:?}");
    }
    let missing = calibrate(dir.path(), "digits", &dir.path().join("none"), &["--max-up", "0.2"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing).contains("none"), "{}", text(&missing));
}

#[test]
fn the_model_is_the_one_that_gives_the_labels() {
    let run = |set: &Path| {
        let mut command = Command::new(OUTPOST);
        command.args(["models", "calibrate", "--max-up", "0.1", "--dry-run", "--json", "--models"]);
        command.arg(models_dir()).arg("--set").arg(set).output().expect("runs")
    };
    for (set, model) in [("digits", "digits@1.0.0"), ("notes", "notes@1.0.0"), ("bearing", "bearing@1.0.0")] {
        assert_eq!(json(&run(&heldout(set)))["model"], model);
    }
    let dir = TempDir::new().expect("a folder");
    std::fs::create_dir(dir.path().join("soon")).expect("a folder");
    std::fs::write(dir.path().join("soon/1.txt"), "oil on the floor").expect("written");
    assert_eq!(json(&run(dir.path()))["model"], "notes@1.0.0");
    std::fs::create_dir(dir.path().join("later")).expect("a folder");
    let none = run(dir.path());
    assert_eq!(none.status.code(), Some(1));
    assert!(text(&none).contains("gives the labels"), "{}", text(&none));
}

/// What a distribution installed stays as it is; the model directory gets a copy.
#[test]
fn a_package_that_is_a_link_becomes_a_copy() {
    let (shipped, dir) = (package("digits"), TempDir::new().expect("a folder"));
    let before = manifest(shipped.path(), "digits");
    std::os::unix::fs::symlink(shipped.path().join("digits"), dir.path().join("digits")).expect("linked");
    let more = ["--max-up", "0.1"];
    let output = calibrate(dir.path(), "digits", &heldout("digits"), &more);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("a copy of its own"), "{}", text(&output));
    assert_eq!(manifest(shipped.path(), "digits"), before);
    assert_ne!(manifest(dir.path(), "digits"), before);
    assert!(!dir.path().join("digits").is_symlink() && dir.path().join("digits/calibration.svg").is_file());
    assert!(!shipped.path().join("digits/calibration.svg").exists());
}
