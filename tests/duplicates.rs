//! The same job seen twice is run once, and the second delivery gets the same reply.

use serde_json::json;

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn answered_once_even_over_a_crash() {
    let broker = Mosquitto::start();
    let mut daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    let job = json!({"id": "same", "input": {"text": "bearing hot, smoke"}});
    let first = client.ask("n", "text.classify", job.clone()).await;
    assert_eq!(first["status"], "ok", "{first}");
    // Timings are part of the reply: a second run would give others.
    assert_eq!(client.ask("n", "text.classify", job.clone()).await, first);
    daemon.kill();
    daemon.restart().await;
    assert_eq!(client.ask("n", "text.classify", job.clone()).await, first);
    let other = client.ask("n", "text.classify", json!({"id": "other", "input": {"text": "bearing hot, smoke"}})).await;
    assert_ne!(other["timing_ms"], first["timing_ms"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_window_ends() {
    let broker = Mosquitto::start();
    let mut daemon = Daemon::start("n", &broker.url(), "[jobs]\nremember_s = 1\n").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    let job = json!({"id": "same", "input": {"text": "bearing hot, smoke"}});
    let first = client.ask("n", "text.classify", job.clone()).await;
    daemon.kill();
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    daemon.restart().await;
    let second = client.ask("n", "text.classify", job).await;
    assert_eq!(second["output"]["label"], first["output"]["label"]);
    assert_ne!(second["timing_ms"], first["timing_ms"]);
}
