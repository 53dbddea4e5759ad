//! `outpost demo`: the whole way of a job with nothing else installed.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::app::{self, App};
use crate::config::{Config, Kind, Provider};
use crate::secret::{Secret, credential};
use crate::standin::{self, Asked, Standin};
use crate::submit::{Job, Requester};
use crate::uplink::Uplink;

/// Arguments of `outpost demo`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Leave it running, for jobs of your own
    #[arg(long)]
    keep: bool,
    /// Folder of model packages [default: the shipped ones]
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// Print the replies as JSON
    #[arg(long)]
    json: bool,
}

const NODE: &str = "demo";

/// How a sample travels.
enum Way {
    /// The payload is the input; MQTT 5 properties say the rest.
    Bare(&'static str),
    /// In a JSON envelope.
    Envelope,
    /// As from a device without MQTT 5: the topic says where the reply goes.
    Topic,
}

struct Sample {
    what: &'static str,
    task: &'static str,
    content: &'static [u8],
    way: Way,
    private: bool,
    expect: &'static str,
    tier: &'static str,
    degraded: bool,
}

macro_rules! sample {
    ($file:literal) => {
        include_bytes!(concat!("../../models/train/samples/", $file))
    };
}

const UNCLEAR_DIGIT: &[u8] = sample!("digit-uncertain.png");
const UNCLEAR_DIGIT_IS: &str = "8";

fn samples() -> Vec<Sample> {
    let sample = |what, task, content, way, expect| Sample {
        what,
        task,
        content,
        way,
        private: false,
        expect,
        tier: "device",
        degraded: false,
    };
    vec![
        sample("a digit, as PNG", "image.classify", sample!("digit-2.png"), Way::Bare("image/png"), "2"),
        sample("a digit, as JPEG in an envelope", "image.classify", sample!("digit-5.jpg"), Way::Envelope, "5"),
        sample(
            "a sound bearing, as CSV",
            "series.anomaly",
            sample!("bearing-normal.csv"),
            Way::Bare("text/csv"),
            "normal",
        ),
        sample(
            "a bearing with a cracked outer race",
            "series.anomaly",
            sample!("bearing-outer.csv"),
            Way::Envelope,
            "anomalous",
        ),
        sample("an operator's note", "text.classify", sample!("note-urgent.txt"), Way::Bare("text/plain"), "urgent"),
        sample("a note from an MQTT 3.1.1 device", "text.classify", sample!("note-routine.txt"), Way::Topic, "routine"),
        Sample {
            tier: "cloud",
            ..sample("an unclear digit", "image.classify", UNCLEAR_DIGIT, Way::Bare("image/png"), UNCLEAR_DIGIT_IS)
        },
        Sample {
            private: true,
            degraded: true,
            ..sample(
                "an unclear note, private",
                "text.classify",
                sample!("note-uncertain.txt"),
                Way::Bare("text/plain"),
                "soon",
            )
        },
    ]
}

/// Runs the demo; success only if every answer is the expected one.
///
/// # Errors
/// The daemon cannot start, or a reply does not come.
pub async fn run(args: Args) -> Result<ExitCode> {
    let models = match args.models.clone() {
        Some(dir) => dir,
        None => shipped().context("the shipped models are not found: name their folder with --models")?,
    };
    let dir = Scratch::new()?;
    let (uplink, _standin) = uplink().await?;
    let text = format!(
        "[node]\nname = \"{NODE}\"\n[broker]\nurl = \"embedded\"\nlisten = \"127.0.0.1:0\"\n\
         [models]\ndir = {:?}\n[store]\ndir = {:?}\n",
        models.display().to_string(),
        dir.0.display().to_string()
    );
    let config = Config::parse(&text, []).map_err(|mistakes| anyhow::anyhow!(mistakes.join("; ")))?;
    let broker = config.broker.clone();
    let provider = uplink.names().collect::<Vec<_>>().join(", ");
    let mut app = App::start(config, Some(uplink)).await?;
    tokio::time::timeout(Duration::from_secs(20), app.online()).await.context("the daemon does not come online")?;
    let url = app.broker_url().clone();
    let dispatch = app.dispatch();
    let active = dispatch.registry.models();
    if active.is_empty() {
        bail!("no model in {} is active", models.display());
    }
    if !args.json {
        let names: Vec<String> = active.iter().map(|m| format!("{} ({})", m.id(), m.variant_name())).collect();
        println!(
            "node `{NODE}` at {url}, embedded broker\nmodels on the device: {}\nabove the device: {provider}\n",
            names.join(", ")
        );
        println!("{:<36} {:<17} {:<32} {:>9}", "job", "answer", "answered by", "ms");
    }
    let requester = Requester::connect(&broker, &url, &[format!("outpost/{NODE}/replies/demo/+")]).await?;
    let mut replies = Vec::new();
    let mut good = 0;
    for (at, sample) in samples().iter().enumerate() {
        let reply = tokio::time::timeout(Duration::from_secs(60), send(&requester, at, sample))
            .await
            .with_context(|| format!("no reply to: {}", sample.what))??;
        let as_expected = is_as_expected(sample, &reply);
        good += usize::from(as_expected);
        if !args.json {
            print(sample, &reply, as_expected);
        }
        replies.push(reply);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&replies)?);
    } else {
        summary(&replies, good);
    }
    if args.keep {
        let example = format!("outpost submit --broker {url} --to {NODE} --task text.classify note.txt");
        eprintln!("\nrunning until Ctrl-C; the broker is {url}\ntry: {example}");
        tokio::signal::ctrl_c().await?;
    }
    drop(requester);
    app.stop(app::DRAIN).await;
    Ok(if good == replies.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn send(requester: &Requester, at: usize, sample: &Sample) -> Result<Value> {
    let topic = format!("outpost/{NODE}/jobs/{}", sample.task);
    let reply = match sample.way {
        Way::Topic => {
            let reply_topic = format!("outpost/{NODE}/replies/demo/{at}");
            requester.request_plain(format!("{topic}/demo/{at}"), sample.content.to_vec(), &reply_topic).await?
        }
        Way::Bare(content_type) => {
            let mut options = vec![("id".to_owned(), format!("demo-{at}"))];
            if sample.private {
                options.push(("privacy".to_owned(), "device".to_owned()));
            }
            let payload = sample.content.to_vec();
            requester.request(Job { topic, payload, content_type: Some(content_type.to_owned()), options }).await?
        }
        Way::Envelope => {
            let input = match sample.task {
                "series.anomaly" => {
                    let text = std::str::from_utf8(sample.content)?;
                    let series: Vec<[f64; 1]> =
                        text.lines().filter_map(|line| Some([line.trim().parse().ok()?])).collect();
                    json!({"series": series})
                }
                _ => json!({"image": STANDARD.encode(sample.content)}),
            };
            let payload = serde_json::to_vec(&json!({"id": format!("demo-{at}"), "input": input}))?;
            let content_type = Some("application/json".to_owned());
            requester.request(Job { topic, payload, content_type, options: Vec::new() }).await?
        }
    };
    serde_json::from_slice(&reply).context("the reply is not JSON")
}

/// The answer's one word.
fn verdict(reply: &Value) -> String {
    match (&reply["output"]["label"], &reply["output"]["anomalous"]) {
        (Value::String(label), _) => label.clone(),
        (_, Value::Bool(anomalous)) => if *anomalous { "anomalous" } else { "normal" }.to_owned(),
        _ => reply["error"]["code"].as_str().unwrap_or("?").to_owned(),
    }
}

fn is_as_expected(sample: &Sample, reply: &Value) -> bool {
    verdict(reply) == sample.expect && reply["by"]["tier"] == sample.tier && reply["degraded"] == sample.degraded
}

fn by(reply: &Value) -> String {
    let text = |key: &str| reply["by"][key].as_str().unwrap_or_default();
    match text("tier") {
        "device" => format!("device, {} {}", text("model"), text("variant")),
        "cloud" => format!("cloud, {} ({})", text("provider"), text("model")),
        _ => "nobody".to_owned(),
    }
}

fn print(sample: &Sample, reply: &Value, as_expected: bool) {
    let confidence = reply["output"]["confidence"].as_f64().map_or(String::new(), |c| format!(" ({c:.2})"));
    let answer = verdict(reply) + &confidence;
    let total = reply["timing_ms"]["total"].as_f64().unwrap_or_default();
    println!("{:<36} {answer:<17} {:<32} {total:>9.2}", sample.what, by(reply));
    for station in reply["route"].as_array().into_iter().flatten() {
        if let Some(why) = station["why"].as_str() {
            println!("{:<36} └ {}: {why}", "", station["tier"].as_str().unwrap_or_default());
        }
    }
    if reply["degraded"] == true {
        println!("{:<36} └ so this is the best that could be had (degraded)", "");
    }
    if !as_expected {
        println!("{:<36} └ NOT AS EXPECTED: {} by the {}", "", sample.expect, sample.tier);
    }
}

fn summary(replies: &[Value], good: usize) {
    let of = |tier: &str| replies.iter().filter(|reply| reply["by"]["tier"] == tier).count();
    let mut times: Vec<f64> = replies
        .iter()
        .filter(|reply| reply["by"]["tier"] == "device")
        .filter_map(|reply| reply["timing_ms"]["total"].as_f64())
        .collect();
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let cost: f64 = replies.iter().filter_map(|reply| reply["cost_usd"].as_f64()).sum();
    println!(
        "\n{} jobs, {good} answered as expected: {} on the device (median {median:.2} ms), {} above it; cost ${cost:.4}",
        replies.len(),
        of("device"),
        of("cloud"),
    );
}

/// Closed models whose keys are in the environment; without any, the stand-in.
async fn uplink() -> Result<(Uplink, Option<Standin>)> {
    let model = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let mut real = Vec::new();
    if let Some(key) = credential("anthropic-api-key") {
        let model = model("ANTHROPIC_MODEL", "claude-haiku-4-5");
        real.push((Provider::new("anthropic", Kind::Anthropic, &model), Some(key)));
    }
    if let Some(key) = credential("openai-api-key") {
        let model = model("OPENAI_MODEL", "gpt-5-mini");
        real.push((Provider::new("openai", Kind::Openai, &model), Some(key)));
    }
    if let Some(key) = credential("gemini-api-key") {
        let model = model("GEMINI_MODEL", "gemini-2.5-flash");
        real.push((Provider::new("gemini", Kind::Gemini, &model), Some(key)));
    }
    if !real.is_empty() {
        return Ok((Uplink::with_keys(real)?, None));
    }
    let standin = Standin::start(recorded).await.context("the stand-in")?;
    let base_url = Some(standin.url());
    let provider = Provider { base_url, ..Provider::new("stand-in", Kind::Anthropic, standin::MODEL) };
    let uplink = Uplink::with_keys(vec![(provider, Some(Secret::new(standin::KEY.to_owned())))])?;
    Ok((uplink, Some(standin)))
}

/// What the stand-in says: for the demo's unclear digit what its writer meant, which is written down
/// here; for anything else the first label, unsure.
fn recorded(asked: &Asked) -> Value {
    let properties = asked.schema.as_ref().map(|schema| &schema["properties"]);
    match properties {
        None => json!("This is a stand-in: no model is behind it."),
        Some(properties) if properties["label"].is_object() => match asked.image.as_deref() {
            Some(UNCLEAR_DIGIT) => json!({"label": UNCLEAR_DIGIT_IS, "confidence": 0.9}),
            _ => json!({"label": properties["label"]["enum"][0], "confidence": 0.5}),
        },
        Some(_) => json!({"anomalous": false, "score": 0.0, "confidence": 0.5}),
    }
}

/// Where the shipped packages are: beside the working directory, beside the binary, or where a
/// distribution puts them.
fn shipped() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok()?;
    let beside = beside.parent()?;
    // A package knows nothing of the place where it was built.
    let source = match option_env!("OUTPOST_PACKAGED") {
        Some(_) => None,
        None => Some(concat!(env!("CARGO_MANIFEST_DIR"), "/../models")),
    };
    let places =
        [PathBuf::from("models"), beside.join("../share/outpost/models"), PathBuf::from("/usr/share/outpost/models")];
    places.into_iter().chain(source.map(PathBuf::from)).find(|dir| dir.join("digits/model.toml").is_file())
}

/// A folder that goes when the demo does.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("outpost-demo-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
