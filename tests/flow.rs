//! A job's whole way, over each broker and with other people's clients.

use std::process::Command;

use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

use crate::common::*;

/// Runs a mosquitto client; its standard output.
async fn mosquitto_client(program: &str, args: Vec<String>) -> String {
    let program = program.to_owned();
    let output = tokio::task::spawn_blocking(move || Command::new(&program).args(&args).output())
        .await
        .expect("joined")
        .expect("mosquitto-clients is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn args(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn verdict(reply: &Value) -> &str {
    match reply["output"]["anomalous"].as_bool() {
        Some(true) => "anomalous",
        Some(false) => "normal",
        None => reply["output"]["label"].as_str().unwrap_or("nothing"),
    }
}

const SAMPLES: [(&str, &str, &str, &str); 8] = [
    ("digit-2.png", "image.classify", "image/png", "2"),
    ("digit-5.jpg", "image.classify", "image/jpeg", "5"),
    ("bearing-normal.csv", "series.anomaly", "text/csv", "normal"),
    ("bearing-outer.csv", "series.anomaly", "text/csv", "anomalous"),
    ("bearing-inner.csv", "series.anomaly", "text/csv", "anomalous"),
    ("note-urgent.txt", "text.classify", "text/plain", "urgent"),
    ("note-soon.txt", "text.classify", "text/plain", "soon"),
    ("note-routine.txt", "text.classify", "text/plain", "routine"),
];

async fn mqtt5_clients(daemon: &Daemon) {
    for (file, task, content_type, expected) in SAMPLES {
        let port = daemon.port();
        let listen = args(&format!("-V 5 -p {port} -q 1 -C 1 -W 20 -t replies/five -F %R|%D|%p"));
        let listener = tokio::spawn(mosquitto_client("mosquitto_sub", listen));
        tokio::time::sleep(std::time::Duration::from_millis(150)).await;
        let properties = format!(
            "-D publish content-type {content_type} -D publish response-topic replies/five -D publish correlation-data {file} \
             -D publish user-property id {file}"
        );
        let topic = format!("outpost/{}/jobs/{task}", daemon.name);
        let line = format!("-V 5 -p {port} -q 1 -t {topic} -f {} {properties}", sample_path(file));
        mosquitto_client("mosquitto_pub", args(&line)).await;
        let message = listener.await.expect("joined");
        let (properties, reply) = message.split_at(message.find('{').expect("JSON"));
        assert_eq!(properties, format!("|{file}|"), "no response topic, the same correlation data");
        let reply: Value = serde_json::from_str(reply).expect("JSON");
        assert_eq!(reply["status"], "ok", "{file}: {reply}");
        assert_eq!(reply["id"], file);
        assert_eq!(verdict(&reply), expected, "{file}: {reply}");
        assert_eq!(reply["by"]["tier"], "device", "{file}: {reply}");
        assert_eq!(reply["route"], json!([{"tier": "device", "outcome": "answered"}]), "{file}");
    }
}

/// MQTT 3.1.1 has no properties: bare payloads by topic, and envelopes that carry their address.
async fn mqtt311_clients(daemon: &Daemon) {
    let port = daemon.port();
    for (file, task, _, expected) in SAMPLES {
        let name = &daemon.name;
        let id = file.replace('.', "-");
        let listen = args(&format!("-V 311 -p {port} -q 1 -C 1 -W 20 -t outpost/{name}/replies/plc/{id} -t old/{id}"));
        for envelope in [false, true] {
            let listener = tokio::spawn(mosquitto_client("mosquitto_sub", listen.clone()));
            tokio::time::sleep(std::time::Duration::from_millis(150)).await;
            if envelope {
                let input = match task {
                    "text.classify" => json!({"text": String::from_utf8(sample(file)).expect("text")}),
                    "image.classify" => {
                        use base64::Engine;
                        json!({"image": base64::engine::general_purpose::STANDARD.encode(sample(file))})
                    }
                    _ => {
                        let text = String::from_utf8(sample(file)).expect("text");
                        json!({"series": text.lines().filter_map(|line| line.trim().parse().ok()).collect::<Vec<f64>>()})
                    }
                };
                let path = daemon.dir.path().join(&id);
                let envelope = json!({"id": id, "reply_to": format!("old/{id}"), "input": input});
                std::fs::write(&path, envelope.to_string()).expect("written");
                let line = format!("-V 311 -p {port} -q 1 -t outpost/{name}/jobs/{task} -f {}", path.display());
                mosquitto_client("mosquitto_pub", args(&line)).await;
            } else {
                let line =
                    format!("-V 311 -p {port} -q 1 -t outpost/{name}/jobs/{task}/plc/{id} -f {}", sample_path(file));
                mosquitto_client("mosquitto_pub", args(&line)).await;
            }
            let reply: Value = serde_json::from_str(&listener.await.expect("joined")).expect("JSON");
            assert_eq!(verdict(&reply), expected, "{file}: {reply}");
            assert_eq!(reply["id"], json!(id), "{file}: {reply}");
        }
    }
}

/// The uncertain one goes up, the private one does not.
async fn up_and_private(daemon: &Daemon, asked: impl Fn() -> usize) {
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("up").await;
    let topic = format!("outpost/{}/jobs/image.classify", daemon.name);
    let private: &[(&str, &str)] = &[("privacy", "device")];
    for (options, tier, degraded) in [(&[][..], "cloud", false), (private, "device", true)] {
        let before = asked();
        let correlation = format!("{tier}-{}", daemon.name);
        client
            .publish(&topic, sample("digit-uncertain.png"), bare(Some("image/png"), "up", &correlation, options))
            .await;
        let message = client.next().await;
        let reply = message.json();
        assert_eq!(message.correlation.as_deref(), Some(correlation.as_bytes()));
        assert_eq!(message.content_type.as_deref(), Some("application/json"));
        assert_eq!(reply["by"]["tier"], tier, "{reply}");
        assert_eq!(reply["degraded"], degraded, "{reply}");
        assert_eq!(reply["route"][0]["outcome"], "uncertain", "{reply}");
        assert_eq!(asked() - before, usize::from(tier == "cloud"));
        if tier == "cloud" {
            assert_eq!(reply["by"]["model"], "stand-in", "{reply}");
            assert!(reply["cost_usd"].as_f64().is_some_and(|usd| usd > 0.0), "{reply}");
            assert!(reply["timing_ms"]["cloud"].as_f64().is_some_and(|ms| ms > 0.0), "{reply}");
        } else {
            assert_eq!(reply["route"][1]["outcome"], "skipped", "{reply}");
            assert!(reply["route"][1]["why"].as_str().is_some_and(|why| why.contains("privacy")), "{reply}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_mosquitto() {
    let (broker, cloud) = (Mosquitto::start(), standin().await);
    let daemon =
        Daemon::start_with("press-7", &broker.url(), &provider("anthropic", &cloud), &models_dir(), &[CLOUD_KEY]).await;
    mqtt5_clients(&daemon).await;
    mqtt311_clients(&daemon).await;
    up_and_private(&daemon, || cloud.asked().len()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_embedded_broker() {
    let cloud = standin().await;
    let daemon =
        Daemon::start_with("press-8", "embedded", &provider("openai", &cloud), &models_dir(), &[CLOUD_KEY]).await;
    mqtt5_clients(&daemon).await;
    mqtt311_clients(&daemon).await;
    up_and_private(&daemon, || cloud.asked().len()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_retained_and_the_will_tells_the_end() {
    let broker = Mosquitto::start();
    let mut daemon = Daemon::start("n1", &broker.url(), "").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("outpost/n1/status").await;
    let status = client.next().await.json();
    assert_eq!(status["state"], "online", "{status}");
    assert_eq!(status["tasks"], json!(["image.classify", "series.anomaly", "text.classify"]));
    assert_eq!(status["models"].as_array().map(Vec::len), Some(3), "{status}");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    daemon.kill();
    assert_eq!(client.next().await.json()["state"], "offline");
    daemon.restart().await;
    assert_eq!(client.next().await.json()["state"], "online");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_shares_its_jobs() {
    let broker = Mosquitto::start();
    let _a = Daemon::start_in("a", &broker.url(), &["line-3"]).await;
    let _b = Daemon::start_in("b", &broker.url(), &["line-3"]).await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("shared/#").await;
    for n in 0..40 {
        let envelope =
            json!({"id": n.to_string(), "reply_to": format!("shared/{n}"), "input": {"text": "pump leaks oil"}});
        client.publish("outpost/line-3/jobs/text.classify", envelope.to_string(), PublishProperties::default()).await;
    }
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let message = client.next().await;
        assert_eq!(message.json()["status"], "ok");
        assert!(seen.insert(message.topic.clone()), "answered twice: {}", message.topic);
    }
    assert!(client.next_within(std::time::Duration::from_millis(300)).await.is_none(), "more replies than jobs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_can_be_asked_for_by_name() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n2", &broker.url(), "").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    for (model, code) in
        [("notes", None), ("notes@1.0.0", None), ("notes@9", Some("unknown_model")), ("digits", Some("unknown_model"))]
    {
        let reply = client
            .ask(
                "n2",
                "text.classify",
                json!({"id": model, "model": model, "input": {"text": "smoke from the motor, stop now"}}),
            )
            .await;
        assert_eq!(reply["error"]["code"].as_str(), code, "{model}: {reply}");
        if code.is_some() {
            assert_eq!(reply["error"]["field"], "model");
        }
    }
}
