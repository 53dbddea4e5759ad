//! Bad input: a clear error reply that names the field and the limit; nothing else is lost.

use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn envelopes() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let text = || json!({"text": "the pump is loud"});
    let rows: Vec<(&str, &str, Value, &str, &str)> = vec![
        ("wrong-type", "text.classify", json!({"input": {"text": 7}}), "bad_request", "input.text"),
        ("wrong-kind", "text.classify", json!({"input": {"series": [1, 2]}}), "bad_request", "input.series"),
        ("no-input", "text.classify", json!({}), "bad_request", "input"),
        ("two-inputs", "text.classify", json!({"input": {"text": "a", "image": ""}}), "bad_request", "input"),
        ("unknown-key", "text.classify", json!({"input": text(), "deadlin_ms": 4}), "bad_request", "deadlin_ms"),
        ("not-base64", "image.classify", json!({"input": {"image": "@@@"}}), "bad_request", "input.image"),
        ("not-an-image", "image.classify", json!({"input": {"image": "aGVsbG8="}}), "bad_request", "input.image"),
        ("ragged", "series.anomaly", json!({"input": {"series": [[1], [1, 2]]}}), "bad_request", "input.series[1]"),
        (
            "not-a-number",
            "series.anomaly",
            json!({"input": {"series": [[1], [null]]}}),
            "bad_request",
            "input.series[1][0]",
        ),
        ("too-short", "series.anomaly", json!({"input": {"series": [1, 2, 3]}}), "input_out_of_range", "input.series"),
        (
            "channels",
            "series.anomaly",
            json!({"input": {"series": vec![[0.0, 1.0]; 3000]}}),
            "input_out_of_range",
            "input.series",
        ),
        ("empty-text", "text.classify", json!({"input": {"text": " "}}), "input_out_of_range", "input.text"),
        (
            "long-text",
            "text.classify",
            json!({"input": {"text": "x".repeat(100_001)}}),
            "input_out_of_range",
            "input.text",
        ),
        ("past", "text.classify", json!({"input": text(), "deadline_ms": -5}), "deadline_exceeded", "deadline_ms"),
        ("now", "text.classify", json!({"input": text(), "deadline_ms": 0}), "deadline_exceeded", "deadline_ms"),
        ("priority", "text.classify", json!({"input": text(), "priority": 10}), "input_out_of_range", "priority"),
        (
            "confidence",
            "text.classify",
            json!({"input": text(), "min_confidence": 2}),
            "input_out_of_range",
            "min_confidence",
        ),
        ("privacy", "text.classify", json!({"input": text(), "privacy": "maybe"}), "bad_request", "privacy"),
        ("unknown-task", "text.translate", json!({"input": text()}), "unknown_task", "task"),
        ("above", "text.generate", json!({"input": text()}), "above_capability", "task"),
    ];
    for (id, task, mut envelope, code, field) in rows {
        envelope["id"] = json!(id);
        let reply = client.ask("n", task, envelope).await;
        assert_eq!(reply["status"], "error", "{id}: {reply}");
        assert_eq!(reply["error"]["code"], code, "{id}: {reply}");
        assert_eq!(reply["error"]["field"], field, "{id}: {reply}");
        assert!(reply["error"]["message"].as_str().is_some_and(|text| text.len() > 8), "{id}: {reply}");
        assert_eq!(reply["id"], id);
        if matches!(code, "input_out_of_range") {
            assert!(!reply["error"]["limit"].is_null(), "{id}: {reply}");
        }
    }
    let good = client.ask("n", "text.classify", json!({"id": "good", "input": text()})).await;
    assert_eq!(good["status"], "ok", "{good}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bare_payloads() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let png = sample("digit-2.png");
    let cut = png[..png.len() / 2].to_vec();
    let mut flipped = png.clone();
    for byte in flipped.iter_mut().skip(60) {
        *byte ^= 0x55;
    }
    let nan = {
        let mut csv = "0.1\n".repeat(2000);
        csv.insert_str(400, "NaN\n");
        csv.into_bytes()
    };
    let plain: &[(&str, &str)] = &[];
    type Row<'a> = (&'a str, &'a str, Option<&'a str>, Vec<u8>, &'a [(&'a str, &'a str)], &'a str, &'a str);
    let rows: Vec<Row> = vec![
        ("not-json", "text.classify", Some("application/json"), b"hello".to_vec(), plain, "bad_request", "payload"),
        ("cut-json", "text.classify", None, b"{\"input\": {\"text\"".to_vec(), plain, "bad_request", ""),
        ("cut-png", "image.classify", Some("image/png"), cut, plain, "bad_request", "input.image"),
        ("flipped-png", "image.classify", Some("image/png"), flipped, plain, "bad_request", "input.image"),
        ("not-an-image", "image.classify", Some("image/png"), b"hello".to_vec(), plain, "bad_request", "input.image"),
        ("nan", "series.anomaly", Some("text/csv"), nan, plain, "bad_request", "input.series[100][0]"),
        ("not-utf-8", "text.classify", Some("text/plain"), vec![0x66, 0xff, 0xfe], plain, "bad_request", "input.text"),
        ("unknown-type", "text.classify", Some("video/mp4"), vec![1], plain, "bad_request", "content_type"),
        (
            "bad-option",
            "text.classify",
            Some("text/plain"),
            b"x".to_vec(),
            &[("priority", "high")],
            "bad_request",
            "priority",
        ),
        (
            "past",
            "text.classify",
            Some("text/plain"),
            b"x".to_vec(),
            &[("deadline-ms", "-1")],
            "deadline_exceeded",
            "deadline_ms",
        ),
        (
            "wrong-length",
            "image.classify",
            Some("application/octet-stream"),
            vec![0; 7],
            plain,
            "input_out_of_range",
            "input.tensor.data",
        ),
        ("empty", "text.classify", Some("text/plain"), Vec::new(), plain, "input_out_of_range", "input.text"),
    ];
    for (id, task, content_type, payload, options, code, field) in rows {
        let properties = bare(content_type, &format!("answers/{id}"), id, options);
        client.publish(&format!("outpost/n/jobs/{task}"), payload, properties).await;
        let message = client.next().await;
        let reply = message.json();
        assert_eq!(message.topic, format!("answers/{id}"));
        assert_eq!(reply["error"]["code"], code, "{id}: {reply}");
        if !field.is_empty() {
            assert_eq!(reply["error"]["field"], field, "{id}: {reply}");
        }
        assert_eq!(message.correlation.as_deref(), Some(id.as_bytes()), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_address_or_a_forbidden_one_is_told_on_errors() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n", &broker.url(), "[jobs]\nreply_to = [\"plc/+/answers\"]\n").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("outpost/n/errors").await;
    client.subscribe("plc/#").await;
    for (id, address) in [
        ("a", None),
        ("b", Some("outpost/n/jobs/text.classify")),
        ("c", Some("plc/4/other")),
        ("d", Some("plc/+/answers")),
    ] {
        let mut envelope = json!({"id": id, "input": {"text": "hello there"}});
        if let Some(address) = address {
            envelope["reply_to"] = json!(address);
        }
        client.publish("outpost/n/jobs/text.classify", envelope.to_string(), PublishProperties::default()).await;
        let message = client.next().await;
        let reply = message.json();
        assert_eq!(message.topic, "outpost/n/errors");
        assert_eq!(reply["id"], id, "{reply}");
        assert_eq!(reply["error"]["code"], "bad_request", "{reply}");
        assert_eq!(reply["error"]["field"], "reply_to", "{reply}");
    }
    client.publish("outpost/n/jobs/text.classify", "{\"id\": \"cut", PublishProperties::default()).await;
    let reply = client.next().await.json();
    assert!(reply["error"]["message"].as_str().is_some_and(|text| text.contains("not JSON")), "{reply}");
    let envelope = json!({"id": "e", "reply_to": "plc/4/answers", "input": {"text": "hello there"}});
    client.publish("outpost/n/jobs/text.classify", envelope.to_string(), PublishProperties::default()).await;
    assert_eq!(client.next().await.topic, "plc/4/answers");
}

/// 100 MB is answered, not dropped; a flood of bad jobs leaves the memory where it was.
#[tokio::test(flavor = "multi_thread")]
async fn memory_does_not_grow() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let mut after_one = 0;
    for round in 0..4 {
        let huge = vec![b'x'; 100_000_000];
        client.publish("outpost/n/jobs/text.classify", huge, bare(Some("text/plain"), "answers/huge", "h", &[])).await;
        let reply = client.next().await.json();
        assert_eq!(reply["error"]["code"], "too_large", "{reply}");
        assert_eq!(reply["error"]["field"], "payload", "{reply}");
        assert_eq!(reply["error"]["limit"], 4_194_304, "{reply}");
        if round == 0 {
            after_one = daemon.rss_kib();
        }
    }
    // As an envelope, which says where to reply in its first bytes.
    let huge = format!(r#"{{"id": "e", "reply_to": "answers/e", "input": {{"text": "{}"}}}}"#, "x".repeat(5_000_000));
    client.publish("outpost/n/jobs/text.classify", huge, PublishProperties::default()).await;
    let message = client.next().await;
    assert_eq!((message.topic.as_str(), message.json()["id"].as_str()), ("answers/e", Some("e")));
    assert_eq!(message.json()["error"]["code"], "too_large");
    for n in 0..3000 {
        let payload = if n % 2 == 0 { b"\x89PNG\r\n\x1a\nbroken".to_vec() } else { vec![0xff; 2000] };
        let properties = bare(None, "answers/flood", &n.to_string(), &[]);
        client.publish("outpost/n/jobs/image.classify", payload, properties).await;
        if n % 100 == 99 {
            for _ in 0..100 {
                assert_eq!(client.next().await.json()["error"]["code"], "bad_request");
            }
        }
    }
    let good = client.ask("n", "text.classify", json!({"input": {"text": "belt torn, line stopped"}})).await;
    assert_eq!(good["status"], "ok");
    // The read buffer of one connection may keep the size of the largest packet that it met.
    let now = daemon.rss_kib();
    assert!(now < after_one + 20_000, "{after_one} KiB became {now} KiB");
}

/// Tensors, by value and as bytes, for a model that takes them as they are.
#[tokio::test(flavor = "multi_thread")]
async fn tensors() {
    let dir = tempfile::tempdir().expect("a folder");
    let package = dir.path().join("raw");
    std::fs::create_dir(&package).expect("made");
    let shipped = std::fs::read_to_string(models_dir().join("digits/model.toml")).expect("read");
    std::fs::copy(models_dir().join("digits/digits.fp32.onnx"), package.join("digits.fp32.onnx")).expect("copied");
    let hash = shipped.split("sha256 = \"").nth(1).and_then(|rest| rest.split('"').next()).expect("a hash");
    let manifest = format!(
        "name = \"raw\"\nversion = \"1\"\ntask = \"tensor.run\"\n[[variant]]\nfile = \"digits.fp32.onnx\"\n\
         precision = \"fp32\"\nsha256 = \"{hash}\"\n[input]\nkind = \"tensor\"\nshape = [\"batch\", 1, 16, 16]\n\
         [output]\nkind = \"tensor\"\n"
    );
    std::fs::write(package.join("model.toml"), manifest).expect("written");
    let broker = Mosquitto::start();
    let daemon = Daemon::start_with("n", &broker.url(), "", dir.path(), &[]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let values = vec![0.25; 256];
    let tensor = |dtype: &str, shape: Value, data: Value| json!({"dtype": dtype, "shape": shape, "data": data});
    let rows = [
        ("good", tensor("f32", json!([1, 1, 16, 16]), json!(values)), "", ""),
        ("short", tensor("f32", json!([1, 1, 16, 16]), json!([1, 2])), "input_out_of_range", "input.tensor.data"),
        ("shape", tensor("f32", json!([1, 3, 16, 16]), json!(values)), "input_out_of_range", "input.tensor.shape"),
        ("dtype", tensor("i8", json!([1, 1, 16, 16]), json!(values)), "input_out_of_range", "input.tensor.dtype"),
        ("no-data", json!({"dtype": "f32"}), "bad_request", "input.tensor.data"),
        ("words", tensor("f32", json!([1, 1, 16, 16]), json!(["a"])), "bad_request", "input.tensor.data"),
    ];
    let mut by_value = Value::Null;
    for (id, tensor, code, field) in rows {
        let reply = client.ask("n", "tensor.run", json!({"id": id, "input": {"tensor": tensor}})).await;
        assert_eq!(reply["error"]["code"].as_str().unwrap_or_default(), code, "{id}: {reply}");
        assert_eq!(reply["error"]["field"].as_str().unwrap_or_default(), field, "{id}: {reply}");
        if code.is_empty() {
            assert_eq!(reply["output"]["tensors"][0]["shape"], json!([1, 10]), "{reply}");
            by_value = reply["output"].clone();
        }
    }
    let bytes: Vec<u8> = values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect();
    let mut nan = bytes.clone();
    nan[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    for (id, payload, code, field) in [
        ("bytes", bytes.clone(), "", ""),
        ("cut", bytes[..100].to_vec(), "input_out_of_range", "input.tensor.data"),
        ("nan", nan, "bad_request", "input.tensor.data[2]"),
    ] {
        let properties = bare(Some("application/octet-stream"), "answers/bytes", id, &[]);
        client.publish("outpost/n/jobs/tensor.run", payload, properties).await;
        let reply = client.next().await.json();
        assert_eq!(reply["error"]["code"].as_str().unwrap_or_default(), code, "{id}: {reply}");
        assert_eq!(reply["error"]["field"].as_str().unwrap_or_default(), field, "{id}: {reply}");
        if code.is_empty() {
            assert_eq!(reply["output"], by_value);
        }
    }
}
