//! SIGTERM: jobs in hand are answered, the rest waits for the next start, the status says so.

use std::collections::BTreeSet;

use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::json;

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_under_load() {
    let broker = Mosquitto::start();
    let mut daemon = Daemon::start("n", &broker.url(), "").await;
    let mut status = Client::connect(&broker.url()).await;
    status.subscribe("outpost/n/status").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    const JOBS: usize = 300;
    for n in 0..JOBS {
        let envelope = json!({"id": n.to_string(), "reply_to": format!("answers/{n}"), "input": {"text": "coolant low on the mill"}});
        client.publish("outpost/n/jobs/text.classify", envelope.to_string(), PublishProperties::default()).await;
    }
    assert_eq!(daemon.terminate().await, Some(0), "{}", daemon.log());
    let mut seen = Vec::new();
    while seen.last().is_none_or(|state: &String| state != "offline") {
        seen.push(status.next().await.json()["state"].as_str().unwrap_or_default().to_owned());
    }
    assert!(seen.contains(&"draining".to_owned()), "{seen:?}");
    daemon.restart().await;
    let mut answered = BTreeSet::new();
    while answered.len() < JOBS {
        let message = client.next().await;
        assert_eq!(message.json()["status"], "ok", "{message:?}");
        answered.insert(message.topic);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_daemon_stops_at_once() {
    let mut daemon = Daemon::start("n", "embedded", "").await;
    let started = std::time::Instant::now();
    assert_eq!(daemon.terminate().await, Some(0));
    assert!(started.elapsed() < std::time::Duration::from_secs(5));
}
