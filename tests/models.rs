//! The shipped models on held-out data, and packages that must be refused.

use std::path::Path;

use outpost::engine::Registry;
use outpost::engine::model::{Model, States, verdict};
use outpost::engine::package::Package;
use outpost::intake::bare;
use serde_json::Value;

use crate::common::*;

/// Share of right answers of one variant, by the daemon's own engine.
fn accuracy(name: &str, precision: &str) -> (f64, usize) {
    let package = Package::read(&models_dir().join(name)).expect("a package");
    let variant =
        package.manifest.variant.iter().find(|v| v.precision.as_str() == precision).expect("a variant").clone();
    let model = Model::load(package, &variant).expect("it loads");
    let mut states = States::new();
    let lines =
        std::fs::read_to_string(models_dir().join(format!("train/heldout/{name}.jsonl"))).expect("held-out data");
    let cases: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let right = cases.iter().filter(|case| {
        let envelope = serde_json::json!({"input": case["input"]}).to_string();
        let input = bare::by_ending("json", envelope.into_bytes()).expect("an input");
        let output = model.answer(&mut states, &input, None).expect("an answer");
        verdict(&output) == case["label"].as_str()
    });
    (right.count() as f64 / cases.len() as f64, cases.len())
}

#[test]
fn quantized_models_lose_less_than_a_point() {
    let told: Value =
        serde_json::from_slice(&std::fs::read(models_dir().join("train/heldout/accuracy.json")).expect("figures"))
            .expect("JSON");
    for name in ["digits", "bearing", "notes"] {
        let (fp32, n) = accuracy(name, "fp32");
        let (int8, _) = accuracy(name, "int8");
        println!("{name}: fp32 {fp32:.4}, int8 {int8:.4}, n {n}");
        assert!(n >= 300, "{name}: {n} cases");
        assert!(int8 >= fp32 - 0.01, "{name}: int8 {int8}, fp32 {fp32}");
        // The card's figures come from onnxruntime; a case on the edge may fall to either side.
        let card = std::fs::read_to_string(models_dir().join(name).join("README.md")).expect("a card");
        for (precision, found) in [("fp32", fp32), ("int8", int8)] {
            let claimed = told[name][precision].as_f64().expect("a figure");
            assert!((found - claimed).abs() <= 0.006, "{name} {precision}: found {found}, claimed {claimed}");
            let row = format!("| {precision} | {:.2}% |", claimed * 100.0);
            assert!(card.contains(&row), "{name}: the card lacks `{row}`");
        }
    }
}

/// A copy of a shipped package, changed.
fn changed(change: impl Fn(&Path)) -> (tempfile::TempDir, Registry) {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["notes", "digits"] {
        copy(&models_dir().join(name), &dir.path().join(name));
    }
    change(&dir.path().join("notes"));
    let registry = Registry::load(dir.path()).expect("a folder");
    (dir, registry)
}

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("made");
    for entry in std::fs::read_dir(from).expect("read").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

pub fn edit(dir: &Path, from: &str, to: &str) {
    let file = dir.join("model.toml");
    let text = std::fs::read_to_string(&file).expect("read");
    assert!(text.contains(from), "{from}");
    std::fs::write(file, text.replace(from, to)).expect("written");
}

#[test]
fn wrong_packages_are_refused_and_named() {
    type Change = fn(&Path);
    let rows: [(&str, Change, &str); 9] = [
        ("an unknown key", |dir| edit(dir, "[input]", "[input]\nbuckets = 3"), "input.buckets"),
        ("a missing file", |dir| std::fs::remove_file(dir.join("labels.txt")).expect("removed"), "labels.txt"),
        (
            "a file cut short",
            |dir| {
                for precision in ["fp32", "int8"] {
                    let file = dir.join(format!("notes.{precision}.onnx"));
                    let bytes = std::fs::read(&file).expect("read");
                    std::fs::write(&file, &bytes[..bytes.len() / 2]).expect("written");
                }
            },
            "SHA-256",
        ),
        (
            "a golden case that fails",
            |dir| {
                let file = dir.join("golden/urgent.txt");
                std::fs::copy(dir.join("golden/routine.txt"), file).expect("copied");
            },
            "golden/urgent.txt",
        ),
        ("a shape that does not fit", |dir| edit(dir, "shape = [1, 2048]", "shape = [1, 1024]"), "input.shape"),
        ("an unknown label", |dir| edit(dir, "expect = \"urgent\"", "expect = \"late\""), "`late`"),
        ("a path outside", |dir| edit(dir, "labels = \"labels.txt\"", "labels = \"../labels.txt\""), "../labels.txt"),
        ("no TOML", |dir| std::fs::write(dir.join("model.toml"), "name = ").expect("written"), "model.toml"),
        (
            "a threshold over 1",
            |dir| {
                let text = std::fs::read_to_string(dir.join("model.toml")).expect("read");
                let line = text.lines().find(|line| line.starts_with("threshold")).expect("a threshold").to_owned();
                edit(dir, &line, "threshold = 1.5");
            },
            "confidence.threshold",
        ),
    ];
    for (what, change, named) in rows {
        let (_dir, registry) = changed(change);
        assert_eq!(registry.models().len(), 1, "{what}: the other package stays active");
        let reason = registry.refused.first().map(|refused| refused.reason.clone()).unwrap_or_default();
        assert!(reason.contains(named), "{what}: {reason}");
    }
}

#[test]
fn a_variant_that_fails_is_left_out() {
    use sha2::Digest;
    let (_dir, registry) = changed(|dir| {
        let bad = b"not a model";
        let good = std::fs::read(dir.join("notes.int8.onnx")).expect("read");
        let hash = |bytes: &[u8]| format!("{:x}", sha2::Sha256::digest(bytes));
        std::fs::write(dir.join("notes.int8.onnx"), bad).expect("written");
        edit(dir, &hash(&good), &hash(bad));
    });
    assert_eq!(registry.refused, []);
    let model = registry.find("text.classify", None).expect("active");
    assert_eq!(model.variant.precision.as_str(), "fp32");
}

/// The engine is allowed to be wrong about this graph, but not to pass its answer on.
#[test]
fn a_graph_that_runs_wrongly_is_refused() {
    let registry = Registry::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data")).expect("a folder");
    match registry.find("tensor.run", None) {
        None => assert!(registry.refused[0].reason.contains("golden case.json"), "{:?}", registry.refused),
        Some(model) => model.prove(&mut States::new()).expect("right where it is active"),
    }
    assert_eq!(registry.models().len() + registry.refused.len(), 1);
}

/// What each variant takes with that many workers, as `models bench` says.
fn memory(dir: &Path, threads: &str) -> Vec<(String, f64)> {
    let dir = dir.display().to_string();
    let output = std::process::Command::new(OUTPOST)
        .args(["models", "bench", "--json", "--repeat", "1", "--threads", threads, "--models", &dir])
        .output()
        .expect("runs");
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let row =
        |row: &Value| (row["model"].as_str().expect("a name").to_owned(), row["memory_mib"].as_f64().expect("MiB"));
    rows.iter().map(row).collect()
}

async fn status(url: &str) -> Value {
    let mut client = Client::connect(url).await;
    client.subscribe("outpost/n/status").await;
    client.next().await.json()
}

async fn limited(broker: &Mosquitto, models: &Path, mib: f64, threads: &str, more: &str) -> Daemon {
    let limit = mib.to_string();
    let env = [
        ("OUTPOST_MODELS__MEMORY_MIB", limit.as_str()),
        ("OUTPOST_MODELS__THREADS", threads),
        ("OUTPOST_LOG", "debug"),
        CLOUD_KEY,
    ];
    Daemon::start_with("n", &broker.url(), more, models, &env).await
}

/// One model fits at a time, and jobs want all three by turns; each of two workers has its own state of a model.
#[tokio::test(flavor = "multi_thread")]
async fn models_take_turns_under_a_small_limit() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["digits", "bearing", "notes"] {
        let to = dir.path().join(name);
        copy(&models_dir().join(name), &to);
        // Only the one variant, so that the limit can be tight.
        let text = std::fs::read_to_string(to.join("model.toml")).expect("read");
        let parts: Vec<&str> =
            text.split("[[variant]]").filter(|part| !part.contains("precision = \"fp32\"")).collect();
        std::fs::write(to.join("model.toml"), parts.join("[[variant]]")).expect("written");
    }
    let needs: Vec<f64> = memory(dir.path(), "2").into_iter().map(|(_, mib)| mib).collect();
    let limit = needs.iter().copied().fold(0.0, f64::max) + 0.002;
    assert!(needs.len() == 3 && needs.iter().sum::<f64>() > limit, "{needs:?}");
    let broker = Mosquitto::start();
    let mut daemon = limited(&broker, dir.path(), limit, "2", "").await;
    let told = status(&broker.url()).await;
    assert_eq!(told["kernels"], outpost::engine::kernels(), "{told}");
    let used = told["memory"]["used_mib"].as_f64().expect("MiB");
    assert!((told["memory"]["limit_mib"].as_f64().expect("MiB") - limit).abs() < 0.001, "{told}");
    let models = told["models"].as_array().expect("models");
    let sum = |what: &dyn Fn(&Value) -> bool| -> f64 {
        models.iter().filter(|model| what(model)).filter_map(|model| model["memory_mib"].as_f64()).sum()
    };
    assert_eq!(models.len(), 3, "{told}");
    assert!(sum(&|_| true) > limit && used <= limit + 0.001, "{told}");
    assert!(used > 0.0 && (sum(&|model| model["loaded"] == true) - used).abs() < 0.002, "{told}");
    for model in models {
        assert!(model["us"].as_f64().is_some_and(|us| us > 0.0) && model["variant"] == "int8", "{model}");
        assert!(model["kernels"].as_str().is_some_and(|name| name.starts_with(outpost::engine::kernels())), "{model}");
    }
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    for round in 0..8 {
        for (at, (task, file, expected)) in [
            ("image.classify", "digit-2.png", "2"),
            ("series.anomaly", "bearing-outer.csv", "anomalous"),
            ("text.classify", "note-urgent.txt", "urgent"),
        ]
        .into_iter()
        .enumerate()
        {
            let content_type = ["image/png", "text/csv", "text/plain"][at];
            // Enough time for a load, which the estimate must count.
            let properties =
                bare(Some(content_type), "answers/a", &format!("{round}-{at}"), &[("deadline-ms", "20000")]);
            client.publish(&format!("outpost/n/jobs/{task}"), sample(file), properties).await;
            let reply = client.next().await.json();
            let output = &reply["output"];
            let found = match output["anomalous"].as_bool() {
                Some(anomalous) => {
                    if anomalous {
                        "anomalous"
                    } else {
                        "normal"
                    }
                }
                None => output["label"].as_str().unwrap_or("none"),
            };
            assert_eq!((found, reply["by"]["tier"].as_str()), (expected, Some("device")), "{reply}");
        }
    }
    assert_eq!(daemon.terminate().await, Some(0));
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
    // The two smallest may fit together; the largest leaves room for none.
    assert!(log.matches("unloaded: the least recently used").count() >= 16, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_can_never_fit_is_refused_with_the_figures() {
    let least = memory(&models_dir(), "1")
        .into_iter()
        .filter(|(model, _)| model == "notes")
        .map(|(_, mib)| mib)
        .fold(f64::MAX, f64::min);
    let limit = (least * 0.9 * 1e3).floor() / 1e3;
    let shown = format!("models.memory_mib is {limit}");
    let broker = Mosquitto::start();
    let ask = async |daemon: &Daemon, envelope: Value| {
        let mut client = Client::connect(&daemon.url).await;
        client.subscribe("answers/#").await;
        client.ask("n", "text.classify", envelope).await
    };
    let text = serde_json::json!({"id": "a", "input": {"text": "smoke from the gearbox"}});
    {
        let daemon = limited(&broker, &models_dir(), limit, "1", "").await;
        let told = status(&broker.url()).await;
        let refused = told["refused"].to_string();
        assert!(refused.contains("notes") && refused.contains(&shown) && refused.contains("MiB are needed"), "{told}");
        assert!(!told["tasks"].to_string().contains("text.classify"), "{told}");
        let reply = ask(&daemon, text.clone()).await;
        let error = &reply["error"];
        assert_eq!(
            (&error["code"], &error["field"]),
            (&"above_capability".into(), &"models.memory_mib".into()),
            "{reply}"
        );
        assert!(error["message"].as_str().is_some_and(|message| message.contains(&shown)), "{reply}");
        assert!((error["limit"].as_f64().expect("a limit") - limit).abs() < 0.001, "{reply}");
    }
    let cloud = standin().await;
    let daemon = limited(&broker, &models_dir(), limit, "1", &provider("anthropic", &cloud)).await;
    let reply = ask(&daemon, text.clone()).await;
    assert_eq!((reply["status"].as_str(), reply["by"]["tier"].as_str()), (Some("ok"), Some("cloud")), "{reply}");
    assert!(reply["route"][0]["why"].as_str().is_some_and(|why| why.contains(&shown)), "{reply}");
    let mut private = text;
    private["privacy"] = "device".into();
    private["id"] = "b".into();
    let reply = ask(&daemon, private).await;
    assert_eq!(reply["error"]["code"], "privacy_forbids", "{reply}");
}
