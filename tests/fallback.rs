//! The way up: when, to whom, in which format, and what is told when it is closed.

use std::time::{Duration, Instant};

use outpost::standin::{Fault, Standin};
use serde_json::{Value, json};

use crate::common::*;

async fn node(more: &str, cloud: &Standin, kind: &str) -> (Mosquitto, Daemon, Client) {
    let broker = Mosquitto::start();
    let more = provider(kind, cloud) + more;
    let daemon = Daemon::start_with("n", &broker.url(), &more, &models_dir(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    (broker, daemon, client)
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn unclear(id: &str) -> Value {
    json!({"id": id, "input": {"image": base64(&sample("digit-uncertain.png"))}})
}

fn with(mut envelope: Value, key: &str, value: Value) -> Value {
    envelope[key] = value;
    envelope
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_provider_answers_in_the_shape_of_the_task() {
    for kind in ["anthropic", "openai", "gemini", "openai-compatible"] {
        let cloud = standin().await;
        let (_broker, _daemon, mut client) = node("", &cloud, kind).await;
        let series: Vec<f64> = (0..2000).map(|i| f64::from(i % 7)).collect();
        let rows = [
            ("image.classify", unclear("i"), "label"),
            ("series.anomaly", json!({"id": "s", "min_confidence": 1.0, "input": {"series": series}}), "anomalous"),
            (
                "text.generate",
                json!({"id": "g", "input": {"text": "say hello"}, "params": {"prompt": "Be brief."}}),
                "text",
            ),
            (
                "text.classify",
                json!({"id": "t", "min_confidence": 1.0, "input": {"text": "pump is a bit loud"}}),
                "label",
            ),
        ];
        for (task, envelope, key) in rows {
            let reply = client.ask("n", task, envelope).await;
            assert_eq!(
                reply["by"],
                json!({"tier": "cloud", "provider": "cloud", "model": "stand-in"}),
                "{kind} {task}: {reply}"
            );
            assert!(!reply["output"][key].is_null(), "{kind} {task}: {reply}");
            assert_eq!(reply["degraded"], false, "{kind} {task}: {reply}");
        }
        let asked = cloud.asked();
        assert_eq!(asked[0].image.as_deref(), Some(&sample("digit-uncertain.png")[..]));
        assert!(asked[1].text.contains("2000 rows"), "{}", asked[1].text);
        assert!(asked[2].text.contains("say hello") && asked[2].text.contains("Be brief."), "{}", asked[2].text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privacy_of_job_task_and_node() {
    for (more, job, tier, who) in [
        ("", None, "cloud", ""),
        ("", Some("device"), "device", "job"),
        ("[routing.task.\"image.classify\"]\nprivacy = \"device\"\n", Some("cloud"), "device", "task"),
        ("[routing]\nprivacy = \"device\"\n", Some("cloud"), "device", "node"),
    ] {
        let cloud = standin().await;
        let (_broker, _daemon, mut client) = node(more, &cloud, "anthropic").await;
        let mut envelope = unclear("p");
        if let Some(privacy) = job {
            envelope["privacy"] = json!(privacy);
        }
        let reply = client.ask("n", "image.classify", envelope).await;
        assert_eq!(reply["by"]["tier"], tier, "{more} {job:?}: {reply}");
        assert_eq!(reply["degraded"], tier == "device", "{reply}");
        if tier == "device" {
            assert!(reply["route"][1]["why"].as_str().is_some_and(|why| why.contains(who)), "{reply}");
            let above =
                client.ask("n", "text.generate", json!({"id": "g", "privacy": "device", "input": {"text": "x"}})).await;
            assert_eq!(above["error"]["code"], "privacy_forbids", "{above}");
            assert_eq!(cloud.asked().len(), 0, "something left the device");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_the_models_limits_goes_up() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud, "openai").await;
    let long = "the gearbox is humming ".repeat(200);
    let reply = client.ask("n", "text.classify", json!({"id": "long", "input": {"text": long}})).await;
    assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
    assert_eq!(reply["route"][0]["outcome"], "skipped", "{reply}");
    let private = json!({"id": "private", "privacy": "device", "input": {"text": long}});
    let reply = client.ask("n", "text.classify", private).await;
    assert_eq!(reply["error"]["code"], "privacy_forbids", "{reply}");
    assert_eq!(cloud.asked().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_of_a_task() {
    for (prefer, tier) in [("cloud", "cloud"), ("cloud-only", "cloud"), ("device", "device"), ("device-only", "device")]
    {
        let cloud = standin().await;
        let rule = format!("[routing.task.\"text.classify\"]\nprefer = \"{prefer}\"\n");
        let (_broker, _daemon, mut client) = node(&rule, &cloud, "anthropic").await;
        let envelope =
            json!({"id": "r", "input": {"text": String::from_utf8(sample("note-urgent.txt")).expect("text")}});
        let reply = client.ask("n", "text.classify", envelope).await;
        assert_eq!(reply["by"]["tier"], tier, "{prefer}: {reply}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_way_up_is_told() {
    let broker = Mosquitto::start();
    let dead = format!("http://127.0.0.1:{}", free_port());
    let without_key =
        "[uplink.provider.cloud]\nkind = \"anthropic\"\nmodel = \"m\"\ncredential = \"no-such-key\"\n".to_owned();
    let unreachable =
        format!("[uplink.provider.cloud]\nkind = \"openai-compatible\"\nbase_url = \"{dead}\"\nmodel = \"m\"\n");
    let unresolved =
        "[uplink.provider.cloud]\nkind = \"openai-compatible\"\nbase_url = \"https://no-such-host.invalid/v1\"\nmodel = \"m\"\n".to_owned();
    for (n, more) in [without_key, unreachable, unresolved].into_iter().enumerate() {
        let daemon = Daemon::start(&format!("n{n}"), &broker.url(), &more).await;
        let mut client = Client::connect(&daemon.url).await;
        client.subscribe("answers/#").await;
        let reply = client.ask(&daemon.name, "image.classify", unclear(&format!("u{n}"))).await;
        assert_eq!(reply["status"], "ok", "{reply}");
        assert_eq!(reply["degraded"], true, "{reply}");
        assert_eq!(reply["by"]["tier"], "device", "{reply}");
        assert_eq!(reply["route"][1]["provider"], "cloud", "{reply}");
        let generate = json!({"id": format!("g{n}"), "input": {"text": "x"}});
        let reply = client.ask(&daemon.name, "text.generate", generate).await;
        assert_eq!(reply["error"]["code"], "uplink_unavailable", "{reply}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_a_provider() {
    let cloud = standin().await;
    let (_broker, daemon, mut client) = node("", &cloud, "anthropic").await;
    let status = |code, kind| Fault::Status(code, kind, None);
    // Faults in a row, requests that follow, and whether the cloud answers in the end.
    let rows: Vec<(Vec<Fault>, usize, bool)> = vec![
        (vec![status(500, "api_error")], 2, true),
        (vec![status(529, "overloaded_error"), Fault::Cut], 3, true),
        (vec![Fault::Status(429, "rate_limit_error", Some(("retry-after-ms", "50")))], 2, true),
        (vec![status(500, "api_error"), status(500, "api_error"), status(500, "api_error")], 3, false),
        (vec![status(400, "invalid_request_error")], 1, false),
        (vec![status(401, "authentication_error")], 1, false),
        (vec![status(429, "enforced_spend_limit_reached")], 1, false),
        (vec![Fault::Text("{\"label\": \"eleven\", \"confidence\": 1}")], 2, true),
        (vec![Fault::Text("It is a 3."), Fault::Text("Sorry, a 3.")], 2, false),
        (vec![Fault::NotJson], 2, true),
        (vec![Fault::CutOff, Fault::CutOff], 2, false),
        (vec![Fault::Refusal], 1, false),
        (vec![Fault::Huge(10_000_000)], 1, false),
    ];
    for (n, (faults, requests, answered)) in rows.into_iter().enumerate() {
        let before = cloud.asked().len();
        let shown = format!("{faults:?}");
        for fault in faults {
            cloud.fail(fault);
        }
        let reply = client.ask("n", "image.classify", unclear(&format!("f{n}"))).await;
        assert_eq!(cloud.asked().len() - before, requests, "{shown}: {reply}");
        assert_eq!(reply["status"], "ok", "{shown}: {reply}");
        assert_eq!(reply["by"]["tier"], if answered { "cloud" } else { "device" }, "{shown}: {reply}");
        assert_eq!(reply["degraded"], !answered, "{shown}: {reply}");
        if !answered {
            assert_eq!(reply["route"][1]["outcome"], "failed", "{shown}: {reply}");
        }
    }
    let told = daemon.log();
    assert!(!told.contains(CLOUD_KEY.1), "the key is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_provider_does_not_break_the_deadline() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud, "openai").await;
    cloud.fail(Fault::Delay(Duration::from_secs(20)));
    let started = Instant::now();
    let reply = client.ask("n", "image.classify", with(unclear("slow"), "deadline_ms", json!(700))).await;
    assert_eq!(reply["by"]["tier"], "device", "{reply}");
    assert_eq!(reply["degraded"], true, "{reply}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    cloud.fail(Fault::Delay(Duration::from_secs(20)));
    let generate = json!({"id": "g", "deadline_ms": 300, "input": {"text": "x"}});
    let reply = client.ask("n", "text.generate", generate).await;
    assert_eq!(reply["error"]["code"], "deadline_exceeded", "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_may_say_what_it_costs_at_most() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud, "anthropic").await;
    let reply = client.ask("n", "image.classify", with(unclear("dear"), "max_cost_usd", json!(0.000_001))).await;
    assert_eq!(reply["by"]["tier"], "device", "{reply}");
    assert_eq!(reply["degraded"], true, "{reply}");
    let generate = json!({"id": "g", "max_cost_usd": 0, "input": {"text": "x"}});
    let reply = client.ask("n", "text.generate", generate).await;
    assert_eq!(reply["error"]["code"], "budget_exhausted", "{reply}");
    assert_eq!(cloud.asked().len(), 0);
    let reply = client.ask("n", "image.classify", with(unclear("fine"), "max_cost_usd", json!(0.1))).await;
    assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
}

/// A reply over the broker's limit would end the connection: the requester is told, the node goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_over_the_brokers_limit() {
    let cloud = Standin::start(|asked| match asked.schema {
        None => json!("word ".repeat(1000)),
        Some(_) => first_label(asked),
    })
    .await
    .expect("a stand-in");
    let broker = Mosquitto::start_with("max_packet_size 3000");
    let more = provider("openai", &cloud);
    let daemon = Daemon::start_with("n", &broker.url(), &more, &models_dir(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let reply = client.ask("n", "text.generate", json!({"id": "long", "input": {"text": "x"}})).await;
    assert_eq!(reply["id"], "long", "{reply}");
    assert_eq!(reply["error"]["code"], "too_large", "{reply}");
    assert_eq!(reply["error"]["limit"], 3000, "{reply}");
    let reply = client.ask("n", "text.classify", json!({"id": "next", "input": {"text": "oil on the floor"}})).await;
    assert_eq!(reply["status"], "ok", "{reply}");
}

/// A model that thinks spends the few tokens of a label on thoughts: it is asked with more, at once and from then on.
/// A text that reaches its requester's limit is an answer.
#[tokio::test(flavor = "multi_thread")]
async fn limits_of_tokens() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud, "gemini").await;
    cloud.fail(Fault::CutOff);
    let hello = |id: &str| json!({"id": id, "input": {"text": "say hello"}, "params": {"max_tokens": 50}});
    let reply = client.ask("n", "text.generate", hello("cut")).await;
    assert_eq!(reply["output"]["finish_reason"], "length", "{reply}");
    let reply = client.ask("n", "text.generate", hello("whole")).await;
    assert_eq!(reply["output"]["finish_reason"], "stop", "{reply}");
    cloud.fail(Fault::CutOff);
    for id in ["thinks", "again"] {
        let reply = client.ask("n", "image.classify", unclear(id)).await;
        assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
    }
    let limits: Vec<u64> = (cloud.asked().iter())
        .map(|asked| serde_json::from_slice::<Value>(&asked.body).expect("JSON"))
        .map(|body| body["generationConfig"]["maxOutputTokens"].as_u64().expect("a limit"))
        .collect();
    assert_eq!(limits, [50, 50, 256, 2304, 2304]);
}

/// A package without `[uplink]` that is refused does not open the way up for its task.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_package_keeps_its_task_on_the_device() {
    let (cloud, broker) = (standin().await, Mosquitto::start());
    let dir = tempfile::tempdir().expect("a folder");
    let package = dir.path().join("digits");
    crate::models::copy(&models_dir().join("digits"), &package);
    let manifest = std::fs::read_to_string(package.join("model.toml")).expect("a manifest");
    let mut table: toml::Table = manifest.parse().expect("TOML");
    table.remove("uplink").expect("an uplink");
    std::fs::write(package.join("model.toml"), table.to_string()).expect("written");
    std::fs::write(package.join("labels.txt"), "zero\n").expect("written");
    let daemon = Daemon::start_with("n", &broker.url(), &provider("anthropic", &cloud), dir.path(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let mut job = unclear("kept");
    job["params"] = json!({"labels": ["0", "1"]});
    let reply = client.ask("n", "image.classify", job).await;
    assert_eq!(reply["error"]["code"], "above_capability", "{reply}");
    assert!(reply["route"].to_string().contains("stays on the device"), "{reply}");
    assert!(cloud.asked().is_empty(), "it left the device");
}
