//! The wire formats before people who know them better: the providers' own SDKs.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outpost::config::{Kind, Provider};
use outpost::job::{Input, Output};
use outpost::secret::Secret;
use outpost::standin::{self, Fault};
use outpost::uplink::{Asked, Question, Reason, Request, Shape, Uplink};
use serde_json::{Value, json};

use crate::common::*;

const KINDS: [(Kind, &str); 4] = [
    (Kind::Anthropic, "anthropic"),
    (Kind::Openai, "openai"),
    (Kind::Gemini, "gemini"),
    (Kind::OpenaiCompatible, "openai-compatible"),
];

/// All kinds of provider at one server; `model` gives the name of each kind's model.
fn uplink(url: &str, model: impl Fn(&str) -> String) -> Uplink {
    // As the binary does; another test of this process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let provider = |(kind, name): (Kind, &str)| {
        let path = if matches!(kind, Kind::Anthropic | Kind::Gemini) { "" } else { "/v1" };
        let base_url = Some(format!("{url}{path}"));
        (Provider { base_url, ..Provider::new(name, kind, &model(name)) }, Some(Secret::new(standin::KEY.to_owned())))
    };
    Uplink::with_keys(KINDS.into_iter().map(provider).collect()).expect("an uplink")
}

/// Asks one provider, without a deadline or other wishes.
async fn ask(uplink: &Uplink, name: &str, question: &Question<'_>, deadline: Option<Instant>) -> Asked {
    let (job, max_cost_usd, cache) = (None, None, Duration::ZERO);
    uplink.ask(&[name.to_owned()], &Request { question, job, deadline, max_cost_usd, cache }).await
}

fn question<'a>(input: &'a Arc<Input>, instruction: &'a str, shape: Shape) -> Question<'a> {
    Question { task: "some.task", instruction, input, shape, max_output_tokens: 99, picture_side: 512, plot: None }
}

fn urgency() -> Shape {
    Shape::Classes { labels: ["urgent", "later"].map(str::to_owned).to_vec() }
}

/// The shortest WAV: one sample.
fn wav() -> Vec<u8> {
    let mut bytes = b"RIFF\x26\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0".to_vec();
    bytes.extend([16_000_u32.to_le_bytes(), 32_000_u32.to_le_bytes()].concat());
    bytes.extend(b"\x02\0\x10\0data\x02\0\0\0\0\0");
    bytes
}

/// Every kind of provider, input and shape: `anthropic`, `openai` and `google-genai` take what is sent.
#[tokio::test(flavor = "multi_thread")]
async fn the_providers_own_types_take_what_is_sent() {
    let cloud = standin().await;
    let uplink = uplink(&cloud.url(), |_| "big".to_owned());
    let labels: Vec<String> = (0..10).map(|digit: u32| digit.to_string()).collect();
    let inputs = [
        Input::Text("smoke from the gearbox, 35 °C".to_owned()),
        Input::Image(sample("digit-uncertain.png")),
        // As a table, and as a plot.
        Input::Series((0..60).map(|i| vec![(i as f32 * 0.1).sin(), 1e-7]).collect()),
        Input::Series((0..600).map(|i| vec![(i as f32 * 0.1).sin(), 1e-7]).collect()),
        Input::Audio(wav()),
    ]
    .map(Arc::new);
    let shapes = [Shape::Classes { labels }, Shape::Anomaly { threshold: 1.5 }, Shape::Text];
    let mut requests = Vec::new();
    for (kind, name) in KINDS {
        for input in &inputs {
            let deaf = matches!(kind, Kind::Anthropic | Kind::Openai);
            if matches!(**input, Input::Audio(_)) && deaf {
                continue;
            }
            for shape in &shapes {
                // A long instruction is marked for the provider's prompt cache.
                for instruction in ["Say what it is.".to_owned(), "Say what it is, exactly. ".repeat(200)] {
                    let question = question(input, &instruction, shape.clone());
                    let asked = ask(&uplink, name, &question, None).await;
                    let answer = asked.answer.unwrap_or_else(|| panic!("{name} {shape:?}: {:?}", asked.failed));
                    assert_eq!((answer.provider.as_str(), answer.model.as_str()), (name, standin::MODEL));
                    let body = cloud.asked().pop().expect("a request").body;
                    requests.push(json!({"kind": name, "body": serde_json::from_slice::<Value>(&body).expect("JSON")}));
                }
            }
        }
    }
    let file = tempfile::NamedTempFile::new().expect("a file");
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    std::fs::write(file.path(), lines.join("\n")).expect("written");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/providers/check");
    let mut command = Command::new(script);
    command.args([&cloud.url(), standin::KEY]).arg(file.path());
    let done = tokio::task::spawn_blocking(move || command.output()).await.expect("joined").expect("bash is there");
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    if done.status.code() == Some(77) {
        println!("skipped: {err}");
        return;
    }
    assert!(done.status.success(), "{out}\n{err}");
    assert!(out.contains(&format!("{} bodies taken", requests.len())), "{out}");
    print!("{out}");
}

/// A server that refuses the newer name of the limit of tokens is asked by the older one, at once and from then on.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_server_is_asked_in_its_own_words() {
    let cloud = standin().await;
    let uplink = uplink(&cloud.url(), |_| "big".to_owned());
    let input = Input::Text("smoke from the gearbox".to_owned()).into();
    let question = question(&input, "Say what it is.", Shape::Text);
    let detail = json!([{"loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}]);
    cloud.fail(Fault::Body(422, json!({"detail": detail})));
    for requests in [2, 3] {
        let asked = ask(&uplink, "openai-compatible", &question, None).await;
        assert!(asked.answer.is_some(), "{:?}", asked.failed);
        assert_eq!(cloud.asked().len(), requests);
    }
    let names = |asked: &standin::Asked| {
        let body: Value = serde_json::from_slice(&asked.body).expect("JSON");
        ["max_completion_tokens", "max_tokens"].map(|name| body[name].is_u64())
    };
    let sent: Vec<_> = cloud.asked().iter().map(names).collect();
    assert_eq!(sent, [[true, false], [false, true], [false, true]]);
}

/// litellm's proxy on a port of its own; ends when dropped.
struct Gateway {
    process: Child,
    url: String,
}

impl Gateway {
    /// None, with a word why, where it cannot be installed.
    fn start() -> Option<Gateway> {
        let port = free_port();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/providers/gateway");
        let log = tempfile::NamedTempFile::new().expect("a file");
        let mut command = Command::new(script);
        command.arg(port.to_string()).stdin(Stdio::piped()).stderr(log.reopen().expect("a file"));
        let mut gateway =
            Gateway { process: command.spawn().expect("bash is there"), url: format!("http://127.0.0.1:{port}") };
        // Longer than usual: it may have to be installed first.
        let until = Instant::now() + Duration::from_secs(600);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let said = || std::fs::read_to_string(log.path()).unwrap_or_default();
            match gateway.process.try_wait().expect("a child") {
                Some(status) if status.code() == Some(77) => {
                    println!("skipped: {}", said());
                    return None;
                }
                Some(status) => panic!("{status}: {}", said()),
                None => assert!(Instant::now() < until, "{}", said()),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Some(gateway)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// A gateway whose validation nobody here wrote takes every format and input, and its answers and errors are read.
#[tokio::test(flavor = "multi_thread")]
async fn litellms_proxy_is_a_provider_of_every_kind() {
    let Some(gateway) = tokio::task::spawn_blocking(Gateway::start).await.expect("joined") else { return };
    let model = |name: &str| match name {
        "anthropic" => "claude",
        "gemini" => "gemini",
        _ => "gpt",
    };
    let uplink_to = |what: &str| uplink(&gateway.url, |name| format!("{}{what}", model(name)));
    let text = Input::Text("smoke from the gearbox, 35 °C".to_owned());
    let inputs = [
        text,
        Input::Image(sample("digit-uncertain.png")),
        Input::Series((0..600).map(|i| vec![(i as f32 * 0.1).sin()]).collect()),
    ]
    .map(Arc::new);
    let [good, prose, unknown, limited] = ["", "-prose", "-unknown", "-limit"].map(uplink_to);
    for (_, name) in KINDS {
        for input in &inputs {
            let asked = ask(&good, name, &question(input, "How urgent is it?", urgency()), None).await;
            let answer = asked.answer.unwrap_or_else(|| panic!("{name}, {}: {:?}", input.kind(), asked.failed));
            let Output::Classes { label, confidence, .. } = &answer.output else { panic!("{answer:?}") };
            assert_eq!((label.as_str(), *confidence), ("urgent", 0.9));
        }
        let question = question(&inputs[0], "How urgent is it?", urgency());
        let asked = ask(&prose, name, &question, None).await;
        assert_eq!((asked.failed[0].reason.clone(), asked.answer), (Reason::Unusable, None), "{name}");
        let asked = ask(&unknown, name, &question, None).await;
        assert_eq!((asked.failed[0].reason.clone(), asked.answer), (Reason::Refused, None), "{name}");
        // Its mock fails on demand in these two formats only.
        if matches!(name, "anthropic" | "openai-compatible") {
            let soon = Instant::now() + Duration::from_secs(20);
            let asked = ask(&limited, name, &question, Some(soon)).await;
            assert_eq!((asked.failed[0].reason.clone(), asked.answer), (Reason::Away, None), "{name}");
            assert!(asked.failed[0].why.contains("429"), "{name}: {}", asked.failed[0].why);
        }
    }
}
