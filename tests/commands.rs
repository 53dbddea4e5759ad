//! The commands as a person or a script meets them: output and exit status.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::*;
use crate::models::{copy, edit};

fn outpost(args: &[&str]) -> Output {
    Command::new(OUTPOST)
        .args(args)
        .env_remove("ANTHROPIC_API_KEY")
        .env_remove("OPENAI_API_KEY")
        .output()
        .expect("runs")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_demo_ends_well_and_labels_its_stand_in() {
    let demo = outpost(&["demo"]);
    let text = out(&demo);
    assert_eq!(demo.status.code(), Some(0), "{text}");
    assert!(text.contains("8 answered as expected"), "{text}");
    assert!(text.contains("cloud, stand-in (stand-in)"), "{text}");
    let json = outpost(&["demo", "--json"]);
    let replies: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(replies.as_array().map(Vec::len), Some(8), "{replies}");
}

#[test]
fn bad_usage_is_2() {
    for args in [
        &["dmo"][..],
        &["submit"],
        &["run", "--confg", "x"],
        &["models"],
        &["models", "add"],
        &["models", "run", "digits"],
        &["models", "bench", "--repeat", "0"],
        &["models", "bench", "--threads", "none"],
    ] {
        assert_eq!(outpost(args).status.code(), Some(2), "{args:?}");
    }
    for command in ["demo", "run", "check", "submit", "models"] {
        assert_eq!(outpost(&[command, "--help"]).status.code(), Some(0), "{command}");
    }
    for command in ["list", "add", "verify", "run", "bench"] {
        assert_eq!(outpost(&["models", command, "--help"]).status.code(), Some(0), "{command}");
    }
}

#[test]
fn a_wrong_configuration_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("outpost.toml");
    std::fs::write(&file, "[broker]\nurll = \"mqtt://x\"\n").expect("written");
    let file = file.display().to_string();
    for args in [&["run", "--config", &file][..], &["check", "--config", &file]] {
        let output = outpost(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let text = out(&output) + &String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("broker.urll") && text.contains("`url`"), "{text}");
    }
    let missing = outpost(&["run", "--config", "/no/such/file"]);
    assert_eq!(missing.status.code(), Some(1));
}

/// `outpost models COMMAND --models DIR …`: exit status, standard output, standard error.
fn models(command: &str, dir: &Path, more: &[&str]) -> (Option<i32>, String, String) {
    let dir = dir.display().to_string();
    let mut args = vec!["models", command, "--models", &dir];
    args.extend(more);
    let output = outpost(&args);
    (output.status.code(), out(&output), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn rows(json: &str) -> Vec<Value> {
    serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"))
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"))
}

#[test]
fn bench_measures_every_variant_and_marks_the_one_that_runs() {
    let (code, json, _) = models("bench", &models_dir(), &["--json", "--repeat", "30"]);
    assert_eq!(code, Some(0), "{json}");
    let first = rows(&json);
    assert_eq!(first.len(), 6, "{json}");
    for row in &first {
        assert!(number(row, "us_min") > 0.0 && number(row, "us_min") <= number(row, "us_median"), "{row}");
        assert!(number(row, "load_ms") > 0.0 && row["golden"] == "pass" && row["version"] == "1.0.0", "{row}");
        assert_eq!(row["variant"], row["precision"], "{row}");
        // Weights are in memory at the least.
        let file =
            models_dir().join(row["model"].as_str().expect("a name")).join(row["file"].as_str().expect("a file"));
        let on_disk = std::fs::metadata(file).expect("there").len() as f64 / f64::from(1 << 20);
        assert!(number(row, "memory_mib") > on_disk / 2.0 && number(row, "memory_mib") < on_disk * 8.0 + 0.5, "{row}");
        let kernels = row["kernels"].as_str().expect("kernels");
        match row["precision"].as_str() {
            Some("fp32") => assert!(kernels.starts_with("float-"), "{row}"),
            _ => assert!(kernels.starts_with(outpost::engine::kernels()), "{row}"),
        }
    }
    for name in ["bearing", "digits", "notes"] {
        let of: Vec<&Value> = first.iter().filter(|row| row["model"] == name).collect();
        let fastest = of.iter().map(|row| number(row, "us_min")).fold(f64::MAX, f64::min);
        let close = of.iter().filter(|row| number(row, "us_min") <= fastest * 1.05);
        let expected = close.map(|row| number(row, "memory_mib")).fold(f64::MAX, f64::min);
        let chosen: Vec<f64> =
            of.iter().filter(|row| row["chosen"] == true).map(|row| number(row, "memory_mib")).collect();
        assert_eq!(chosen, [expected], "{json}");
    }
    // With more workers the states add up.
    let (_, json, _) = models("bench", &models_dir(), &["--json", "--repeat", "2", "--threads", "2"]);
    for two in rows(&json) {
        let one = first.iter().find(|one| one["file"] == two["file"]).expect("the same");
        assert!(number(&two, "memory_mib") > number(one, "memory_mib"), "{one} {two}");
    }
    let (_, json, _) = models("bench", &models_dir(), &["--json", "--repeat", "2", "digits", "notes@1.0.0"]);
    let some = rows(&json);
    assert_eq!(some.len(), 4, "{json}");
    for row in &some {
        let same = first.iter().find(|other| other["file"] == row["file"]).expect("the same");
        let (a, b) = (number(row, "memory_mib"), number(same, "memory_mib"));
        // What tract keeps for itself depends on what ran before.
        assert!((a - b).abs() <= 0.2 * b, "{row} {same}");
    }
    let (code, text, _) = models("bench", &models_dir(), &["--repeat", "2", "bearing"]);
    assert!(code == Some(0) && text.contains("bearing@1.0.0") && text.contains(" * "), "{text}");
    let (code, _, error) = models("bench", &models_dir(), &["--json", "digit"]);
    assert!(code == Some(1) && error.contains("no package `digit`"), "{error}");
}

/// A shipped package in a folder of its own, with a second int8 variant that is no model.
fn odd_package(dir: &Path) {
    copy(&models_dir().join("notes"), &dir.join("notes"));
    std::fs::write(dir.join("notes/b.onnx"), "not a model").expect("written");
    let hash = format!("{:x}", <sha2::Sha256 as sha2::Digest>::digest("not a model"));
    let more = format!("[[variant]]\nfile = \"b.onnx\"\nprecision = \"int8\"\nsha256 = \"{hash}\"\n\n[input]");
    edit(&dir.join("notes"), "[input]", &more);
}

#[test]
fn bench_and_verify_say_what_does_not_run() {
    let dir = tempfile::tempdir().expect("a folder");
    odd_package(dir.path());
    let (code, json, _) = models("bench", dir.path(), &["--json", "--repeat", "2"]);
    assert_eq!(code, Some(0), "{json}");
    let found = rows(&json);
    let names: Vec<&str> = found.iter().filter_map(|row| row["variant"].as_str()).collect();
    assert_eq!(names, ["fp32", "notes.int8", "b"], "two of a precision go by their files");
    let bad = &found[2];
    assert!(bad["us_min"].is_null() && bad["golden"] == "fail" && bad["chosen"] == false, "{bad}");
    assert!(bad["why"].as_str().is_some_and(|why| why.contains("b.onnx")), "{bad}");
    let (_, text, _) = models("bench", dir.path(), &["--repeat", "2"]);
    assert!(text.contains("└ b.onnx"), "{text}");
    let (code, json, _) = models("verify", dir.path(), &["--json"]);
    assert_eq!(code, Some(1), "{json}");
    let verdicts: Vec<Value> = rows(&json).iter().map(|row| row["golden"].clone()).collect();
    assert_eq!(verdicts, ["pass", "pass", "fail"], "{json}");
    let (code, text, _) =
        models("run", dir.path(), &["notes", "--variant", "notes.int8", &sample_path("note-urgent.txt")]);
    let reply: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((code, &reply["by"]["variant"]), (Some(0), &"notes.int8".into()), "{reply}");
    let (code, _, error) = models("run", dir.path(), &["notes", "--variant", "int4", &sample_path("note-urgent.txt")]);
    assert!(code == Some(1) && error.contains("fp32, notes.int8, b"), "{error}");
}

/// Every file under `dir` with its bytes.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("read").flatten() {
        if entry.path().is_dir() {
            found.extend(tree(&entry.path()));
        } else if entry.file_name() != ".lock" {
            found.insert(entry.path(), std::fs::read(entry.path()).expect("read"));
        }
    }
    found
}

#[test]
fn add_takes_good_packages_whole_and_refuses_the_rest() {
    let from = tempfile::tempdir().expect("a folder");
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path().join("models");
    let source = |name: &str| from.path().join(name).display().to_string();
    copy(&models_dir().join("digits"), &from.path().join("digits"));
    let add = |dir: &Path, name: &str| {
        let (code, json, _) = models("add", dir, &["--json", &source(name)]);
        let row = rows(&json).remove(0);
        (code, row["outcome"].as_str().unwrap_or("none").to_owned(), row)
    };
    let (code, outcome, row) = add(&dir, "digits");
    assert_eq!((code, outcome.as_str()), (Some(0), "added"), "{row}");
    assert_eq!(row["dir"], dir.join("digits@1.0.0").display().to_string(), "{row}");
    let before = tree(&dir);
    assert_eq!(before.len(), tree(&from.path().join("digits")).len());
    let (code, outcome, row) = add(&dir, "digits");
    assert_eq!((code, outcome.as_str()), (Some(0), "there"), "{row}");

    // The same version with another content, and what is broken: refused with the reason, and nothing changes.
    type Change = fn(&Path);
    let wrong: [(&str, Change, &str); 5] = [
        ("other", |dir| edit(dir, "threshold = 0.6", "threshold = 0.7"), "already with other contents"),
        ("cut", |dir| std::fs::write(dir.join("digits.int8.onnx"), "x").expect("written"), "SHA-256"),
        ("key", |dir| edit(dir, "[input]", "[input]\nsze = 3"), "did you mean `size`"),
        ("lost", |dir| std::fs::remove_file(dir.join("golden/3.png")).expect("removed"), "golden/3.png"),
        (
            "false",
            |dir| {
                edit(dir, "version = \"1.0.0\"", "version = \"3.0.0\"");
                std::fs::copy(dir.join("golden/1.png"), dir.join("golden/7.png")).expect("copied");
            },
            "golden golden/7.png",
        ),
    ];
    for (name, change, why) in wrong {
        copy(&models_dir().join("digits"), &from.path().join(name));
        change(&from.path().join(name));
        let (code, outcome, row) = add(&dir, name);
        assert_eq!((code, outcome.as_str()), (Some(1), "refused"), "{row}");
        assert!(row["why"].as_str().is_some_and(|found| found.contains(why)), "{name}: {row}");
        assert_eq!(tree(&dir), before, "{name}");
    }
    let (code, _, error) = models("add", &dir, &[&source("nothing")]);
    assert!(code == Some(1) && error.contains("is refused"), "{error}");

    // A newer version goes beside the old one, as an archive too; an older one changes nothing for the daemon.
    copy(&models_dir().join("digits"), &from.path().join("newer"));
    edit(&from.path().join("newer"), "version = \"1.0.0\"", "version = \"1.10.0\"");
    let packed =
        std::process::Command::new("tar").args(["czf", &source("newer.tar.gz"), "-C", &source(""), "newer"]).status();
    assert!(packed.is_ok_and(|status| status.success()));
    let (code, outcome, row) = add(&dir, "newer.tar.gz");
    assert_eq!((code, outcome.as_str()), (Some(0), "added"), "{row}");
    copy(&models_dir().join("digits"), &from.path().join("older"));
    edit(&from.path().join("older"), "version = \"1.0.0\"", "version = \"1.9.0\"");
    let (_, outcome, row) = add(&dir, "older");
    assert_eq!((outcome.as_str(), &row["newer"]), ("added", &"digits@1.10.0".into()), "{row}");
    assert!(before.iter().all(|(path, bytes)| std::fs::read(path).is_ok_and(|found| found == *bytes)));
    let (code, json, _) = models("list", &dir, &["--json"]);
    let versions: Vec<Value> = rows(&json).iter().map(|row| row["version"].clone()).collect();
    assert_eq!((code, &versions[..]), (Some(0), &["1.10.0".into(), "1.9.0".into(), "1.0.0".into()][..]), "{json}");
    let (_, text, _) = models("run", &dir, &["digits", &sample_path("digit-2.png")]);
    let reply: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(reply["by"]["model"], "digits@1.10.0", "{reply}");
}

/// Archives from elsewhere: no links, nothing outside, no nonsense.
#[test]
fn add_refuses_archives_that_reach_out() {
    let from = tempfile::tempdir().expect("a folder");
    let dir = tempfile::tempdir().expect("a folder");
    let package = from.path().join("p");
    copy(&models_dir().join("digits"), &package);
    std::os::unix::fs::symlink("/etc/hostname", package.join("link")).expect("linked");
    std::fs::write(from.path().join("text.tar.gz"), "no archive").expect("written");
    let at = |name: &str| from.path().join(name).display().to_string();
    for args in [
        &["czf", &at("link.tar.gz"), "-C", &at("p"), "."][..],
        &["czPf", &at("out.tar.gz"), "-C", &at("p"), "--transform", "s,^labels.txt,../../labels.txt,", "labels.txt"],
    ] {
        assert!(std::process::Command::new("tar").args(args).status().is_ok_and(|status| status.success()), "{args:?}");
    }
    for (name, why) in [
        ("link.tar.gz", "link: neither a file nor a folder"),
        ("out.tar.gz", "outside the archive"),
        ("text.tar.gz", "neither a folder nor a .tar.gz archive"),
        ("p", "link: neither a file nor a folder"),
    ] {
        let (code, _, error) = models("add", &dir.path().join("models"), &[&at(name)]);
        assert!(code == Some(1) && error.contains(why), "{name}: {error}");
    }
    assert_eq!(tree(dir.path()).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_to_do() {
    let broker = Mosquitto::start();
    let cloud = standin().await;
    let check = |url: String, models: String, provider: String| async move {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("outpost.toml");
        let text = format!(
            "[broker]\nurl = \"{url}\"\n[models]\ndir = \"{models}\"\n[store]\ndir = {:?}\n{provider}",
            dir.path().display().to_string()
        );
        std::fs::write(&file, text).expect("written");
        tokio::task::spawn_blocking(move || {
            let file = file.display().to_string();
            let output =
                Command::new(OUTPOST).args(["check", "--config", &file]).env(CLOUD_KEY.0, CLOUD_KEY.1).output();
            drop(dir);
            output.expect("runs")
        })
        .await
        .expect("joined")
    };
    let models = models_dir().display().to_string();
    let good = check(broker.url(), models.clone(), provider("anthropic", &cloud)).await;
    let text = out(&good);
    assert_eq!(good.status.code(), Some(0), "{text}");
    for part in ["digits@1.0.0 answers image.classify", "accepts this node", "can be reached"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let away = format!("mqtt://127.0.0.1:{}", free_port());
    let bad = check(away, "/no/such/dir".to_owned(), String::new()).await;
    let text = out(&bad);
    assert_eq!(bad.status.code(), Some(1), "{text}");
    assert_eq!(text.matches("FAIL").count(), 2, "{text}");
    assert!(text.contains('→'), "{text}");
    assert!(!text.contains(CLOUD_KEY.1), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn submit_prints_the_reply() {
    let broker = Mosquitto::start();
    let _daemon = Daemon::start("n", &broker.url(), "").await;
    let url = broker.url();
    let submit = |args: Vec<String>| async {
        tokio::task::spawn_blocking(move || Command::new(OUTPOST).arg("submit").args(&args).output().expect("runs"))
            .await
            .expect("joined")
    };
    let base = |task: &str, more: &[&str]| {
        let mut args: Vec<String> = ["--broker", &url, "--to", "n", "--task", task].map(str::to_owned).to_vec();
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    };
    let png = sample_path("digit-2.png");
    let output = submit(base("image.classify", &["--set", "id=c7", "--json", &png])).await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let reply: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((reply["id"].as_str(), reply["output"]["label"].as_str()), (Some("c7"), Some("2")), "{reply}");
    let refused = submit(base("text.classify", &["--set", "deadline_ms=-1", &sample_path("note-soon.txt")])).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(out(&refused).contains("deadline_exceeded"), "{}", out(&refused));
    let silent = submit({
        let mut args = base("text.classify", &["--timeout", "1", &sample_path("note-soon.txt")]);
        args[3] = "nobody".to_owned();
        args
    })
    .await;
    assert_eq!(silent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&silent.stderr).contains("no reply"), "{silent:?}");
}
