//! Accuracy and cost of the digits task: always the device, always the cloud, and the hybrid at its calibrated
//! threshold. Run by `tests/bench/hybrid`, which trains and serves the cloud's stand-in.

use std::fs;
use std::path::Path;
use std::process::Command;

use outpost::calibrate::{Case, Promise, fit, measure};
use outpost::engine::model::{Model, States};
use outpost::engine::package::Package;
use outpost::intake::envelope;
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "../common.rs"]
#[allow(dead_code)]
mod common;
use common::*;

const RESPLITS: usize = 200;
const ASSURANCE: f64 = 0.9;
const PROMISES: [Promise; 4] =
    [Promise::Accuracy(0.97), Promise::Accuracy(0.98), Promise::MaxUp(0.1), Promise::MaxUp(0.05)];

/// What is known of a held-out case.
struct Known {
    line: String,
    truth: usize,
    case: Case,
    device: usize,
    cloud: usize,
    cost_usd: f64,
}

/// splitmix64: the same resplits each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        (1..n).rev().for_each(|i| order.swap(i, self.below(i + 1)));
        order
    }
}

/// The shipped package with its int8 variant alone, so that every part runs the same model.
fn package(dir: &Path) {
    let (from, to) = (models_dir().join("digits"), dir.join("digits"));
    let copied = Command::new("cp").arg("-a").arg(&from).arg(&to).status().expect("cp");
    assert!(copied.success());
    let text = fs::read_to_string(from.join("model.toml")).expect("a manifest");
    let mut manifest: toml::Table = text.parse().expect("TOML");
    let variants = manifest["variant"].as_array_mut().expect("variants");
    variants.retain(|variant| variant["precision"].as_str() == Some("int8"));
    fs::write(to.join("model.toml"), manifest.to_string()).expect("written");
}

fn uplink(prefer: &str) -> String {
    let url = std::env::var("HYBRID_URL").expect("HYBRID_URL: start this with tests/bench/hybrid");
    format!(
        "[routing.task.\"image.classify\"]\nprefer = \"{prefer}\"\n[uplink.provider.cloud]\nkind = \"anthropic\"\n\
         base_url = \"{url}\"\nmodel = \"stand-in-larger-digits\"\ncredential = \"cloud-key\"\n\
         usd_per_million_input_tokens = 3.0\nusd_per_million_output_tokens = 15.0\n"
    )
}

/// The replies of a daemon to each line of a labelled set.
async fn replies(models: &Path, prefer: &str, lines: &[&str]) -> Vec<Value> {
    let broker = Mosquitto::start();
    let daemon = Daemon::start_with("n", &broker.url(), &uplink(prefer), models, &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let mut replies = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let reply = client.ask("n", "image.classify", json!({"id": i.to_string(), "input": line["input"]})).await;
        assert_eq!(reply["status"], "ok", "{reply}");
        replies.push(reply);
    }
    replies
}

fn label(reply: &Value) -> usize {
    reply["output"]["label"].as_str().and_then(|label| label.parse().ok()).expect("a digit")
}

async fn known(models: &Path) -> Vec<Known> {
    let text = fs::read_to_string(models_dir().join("train/heldout/digits.jsonl")).expect("the held-out set");
    let lines: Vec<&str> = text.lines().collect();
    let package = Package::read(&models.join("digits")).expect("a package");
    let variant = package.manifest.variant[0].clone();
    let model = Model::load(package, &variant).expect("it loads");
    let mut states = States::new();
    let device = replies(models, "device-only", &lines).await;
    let cloud = replies(models, "cloud-only", &lines).await;
    let row = |((line, device), cloud): ((&&str, &Value), &Value)| {
        let value: Value = serde_json::from_str(line).expect("JSON");
        let envelope = json!({"input": value["input"]}).to_string();
        let (_, input) = envelope::read(envelope.as_bytes()).expect("an input");
        let truth = value["label"].as_str().and_then(|label| label.parse().ok()).expect("a digit");
        let scores = model.scores(&mut states, &input).expect("an answer");
        assert_eq!(scores.as_ref().map(|scores| scores.judge(1.0).0), Some(label(device)));
        Known {
            line: (*line).to_owned(),
            truth,
            case: Case { scores, truth },
            device: label(device),
            cloud: label(cloud),
            cost_usd: cloud["cost_usd"].as_f64().expect("a cost"),
        }
    };
    lines.iter().zip(&device).zip(&cloud).map(row).collect()
}

/// One figure over all resplits.
struct Figure(Vec<f64>);

impl Figure {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Figure(values)
    }

    fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// With its 95 % interval.
    fn shown(&self) -> String {
        let at = |share: f64| self.0[((self.0.len() - 1) as f64 * share).round() as usize];
        format!("{:.2} ({:.2} to {:.2})", self.mean(), at(0.025), at(0.975))
    }
}

/// One way of answering the measured half of one resplit.
#[derive(Clone, Copy, Default)]
struct Way {
    accuracy: f64,
    cost: f64,
    up: f64,
    /// Of the kept answers.
    kept_accuracy: f64,
    /// A promise was made.
    promised: bool,
    /// It was kept on the measured half.
    kept: bool,
    /// It was kept on all cases: those that the set was drawn from.
    kept_by_all: bool,
}

impl Way {
    fn keeps(&self, promise: Promise) -> bool {
        match promise {
            Promise::Accuracy(share) => self.kept_accuracy >= share,
            Promise::MaxUp(share) => self.up <= share * 100.0,
        }
    }
}

fn way(cases: &[&Known], keeps: impl Fn(&Known) -> bool) -> Way {
    let (mut way, mut kept, mut kept_right) = (Way::default(), 0, 0);
    for known in cases {
        let (answer, cost) = if keeps(known) { (known.device, 0.0) } else { (known.cloud, known.cost_usd) };
        let right = answer == known.truth;
        way.accuracy += f64::from(u8::from(right)) * 100.0 / cases.len() as f64;
        way.cost += cost * 1000.0 / cases.len() as f64;
        if keeps(known) {
            kept += 1;
            kept_right += usize::from(right);
        }
    }
    way.up = 100.0 * (1.0 - f64::from(kept) / cases.len() as f64);
    way.kept_accuracy = if kept == 0 { 1.0 } else { kept_right as f64 / f64::from(kept) };
    way
}

fn name(promise: Promise) -> String {
    match promise {
        Promise::Accuracy(share) => format!("--accuracy {share}"),
        Promise::MaxUp(share) => format!("--max-up {share}"),
    }
}

#[tokio::main]
async fn main() {
    let models = TempDir::new().expect("a folder");
    package(models.path());
    let known = known(models.path()).await;
    let n = known.len();
    println!(
        "digits int8 on the device, a larger network as a stand-in for the closed model; {RESPLITS} resplits of {n} \
         held-out cases,\nhalf to calibrate and half to measure; means with 95 % intervals\n"
    );
    let all: Vec<&Known> = known.iter().collect();
    let mut random = Random(1);
    let (mut device, mut cloud) = (Vec::new(), Vec::new());
    let mut hybrid: Vec<Vec<Way>> = vec![Vec::new(); PROMISES.len()];
    for _ in 0..RESPLITS {
        let order = random.shuffled(n);
        let (calibrate, test) = order.split_at(n / 2);
        let cases: Vec<Case> = calibrate.iter().map(|i| known[*i].case.clone()).collect();
        let test: Vec<&Known> = test.iter().map(|i| &known[*i]).collect();
        device.push(way(&test, |_| true));
        cloud.push(way(&test, |_| false));
        for (promise, ways) in PROMISES.iter().zip(&mut hybrid) {
            let fit = fit(&cases, *promise, ASSURANCE);
            // Without a threshold that keeps the promise everything goes up.
            ways.push(match fit.chosen {
                Ok(point) => {
                    let keeps = |known: &Known| {
                        measure(std::slice::from_ref(&known.case), fit.temperature, point.threshold).kept == 1
                    };
                    let found = way(&test, keeps);
                    let kept_by_all = way(&all, keeps).keeps(*promise);
                    Way { promised: true, kept: found.keeps(*promise), kept_by_all, ..found }
                }
                Err(_) => way(&test, |_| false),
            });
        }
    }
    println!(
        "{:<26} {:<24} {:<20} {:<24} {:<23} {:<24} promise kept by all cases, and by the half",
        "", "accuracy, %", "$ for 1000 jobs", "sent up, %", "points under cloud", "cost, % of cloud's"
    );
    let row = |name: &str, ways: &[Way], kept: String| {
        let figure = |of: &dyn Fn(&Way) -> f64| Figure::of(ways.iter().map(of)).shown();
        let behind = Figure::of(ways.iter().zip(&cloud).map(|(way, cloud)| cloud.accuracy - way.accuracy)).shown();
        let cost = Figure::of(ways.iter().zip(&cloud).map(|(way, cloud)| 100.0 * way.cost / cloud.cost)).shown();
        println!(
            "{name:<26} {:<24} {:<20} {:<24} {behind:<23} {cost:<24} {kept}",
            figure(&|way| way.accuracy),
            figure(&|way| way.cost),
            figure(&|way| way.up)
        );
    };
    row("always device", &device, String::new());
    row("always cloud", &cloud, String::new());
    for (promise, ways) in PROMISES.iter().zip(&hybrid) {
        let promised = ways.iter().filter(|way| way.promised).count();
        let (kept, by_all) = ways
            .iter()
            .fold((0, 0), |(kept, by_all), way| (kept + u32::from(way.kept), by_all + u32::from(way.kept_by_all)));
        row(&format!("hybrid {}", name(*promise)), ways, format!("{by_all} and {kept} of {promised} made"));
    }
    live(models.path(), &known, &random.shuffled(n)).await;
}

/// The command's own threshold in a daemon: what the table computes must be what happens.
async fn live(models: &Path, known: &[Known], order: &[usize]) {
    let (calibrate, test) = order.split_at(known.len() / 2);
    let set = models.join("set.jsonl");
    let lines: Vec<&str> = calibrate.iter().map(|i| known[*i].line.as_str()).collect();
    fs::write(&set, lines.join("\n")).expect("written");
    let output = Command::new(binary())
        .args(["models", "calibrate", "digits", "--max-up", "0.1", "--json", "--models"])
        .arg(models)
        .arg("--set")
        .arg(&set)
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let number = |key: &str| report[key].as_f64().expect(key);
    let test: Vec<&Known> = test.iter().map(|i| &known[*i]).collect();
    let keeps = |known: &Known| {
        measure(std::slice::from_ref(&known.case), number("temperature"), number("threshold")).kept == 1
    };
    let expected = way(&test, keeps);
    let lines: Vec<&str> = test.iter().map(|known| known.line.as_str()).collect();
    let replies = replies(models, "device", &lines).await;
    for (known, reply) in test.iter().zip(&replies) {
        let tier = if keeps(known) { "device" } else { "cloud" };
        assert_eq!(reply["by"]["tier"], tier, "{reply}");
    }
    let right = test.iter().zip(&replies).filter(|(known, reply)| label(reply) == known.truth).count();
    let cost: f64 = replies.iter().filter_map(|reply| reply["cost_usd"].as_f64()).sum();
    assert!((right as f64 * 100.0 / test.len() as f64 - expected.accuracy).abs() < 1e-9);
    assert!((cost * 1000.0 / test.len() as f64 - expected.cost).abs() < 1e-9);
    println!(
        "\nasked for real, calibrated by `outpost models calibrate --max-up 0.1`: {right} of {} right, {:.2} % sent up, \
         ${cost:.4}; each of them went where the table says",
        test.len(),
        expected.up
    );
}
