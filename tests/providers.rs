//! The wire formats before people who know them better: the providers' own SDKs.

use std::process::Command;
use std::time::Duration;

use outpost::config::{Kind, Provider};
use outpost::job::Input;
use outpost::secret::Secret;
use outpost::standin::{self, Standin};
use outpost::uplink::{Question, Request, Shape, Uplink};
use serde_json::{Value, json};

use crate::common::*;

const KINDS: [(Kind, &str); 4] = [
    (Kind::Anthropic, "anthropic"),
    (Kind::Openai, "openai"),
    (Kind::Gemini, "gemini"),
    (Kind::OpenaiCompatible, "openai-compatible"),
];

fn uplink(cloud: &Standin) -> Uplink {
    let provider = |(kind, name): (Kind, &str)| {
        let path = if matches!(kind, Kind::Anthropic | Kind::Gemini) { "" } else { "/v1" };
        let base_url = Some(cloud.url() + path);
        (Provider { base_url, ..Provider::new(name, kind, "big") }, Some(Secret::new(standin::KEY.to_owned())))
    };
    Uplink::with_keys(KINDS.into_iter().map(provider).collect()).expect("an uplink")
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
    // As the binary does; another test of this process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cloud = standin().await;
    let uplink = uplink(&cloud);
    let labels: Vec<String> = (0..10).map(|digit: u32| digit.to_string()).collect();
    let inputs = [
        Input::Text("smoke from the gearbox, 35 °C".to_owned()),
        Input::Image(sample("digit-uncertain.png")),
        Input::Series((0..600).map(|i| vec![(i as f32 * 0.1).sin(), 1e-7]).collect()),
        Input::Audio(wav()),
    ];
    let shapes = [Shape::Classes { labels }, Shape::Anomaly { threshold: 1.5 }, Shape::Text];
    let mut requests = Vec::new();
    for (kind, name) in KINDS {
        for input in &inputs {
            let deaf = matches!(kind, Kind::Anthropic | Kind::Openai);
            if matches!(input, Input::Audio(_)) && deaf {
                continue;
            }
            for shape in &shapes {
                // A long instruction is marked for the provider's prompt cache.
                for instruction in ["Say what it is.".to_owned(), "Say what it is, exactly. ".repeat(200)] {
                    let question = Question {
                        task: "some.task",
                        instruction: &instruction,
                        input,
                        shape: shape.clone(),
                        max_output_tokens: 99,
                        picture_side: 512,
                    };
                    let (job, deadline, max_cost_usd, cache) = (None, None, None, Duration::ZERO);
                    let request = Request { question: &question, job, deadline, max_cost_usd, cache };
                    let asked = uplink.ask(&[name.to_owned()], &request).await;
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
