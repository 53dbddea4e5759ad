//! Connections and processes end at the worst moment; no job is lost.

use std::collections::BTreeMap;
use std::time::Duration;

use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

use crate::common::*;

const JOBS: usize = 200;

async fn send_all(client: &Client, task: &str) {
    let text = String::from_utf8(sample("note-urgent.txt")).expect("text");
    for n in 0..JOBS {
        let envelope = json!({"id": n.to_string(), "reply_to": format!("answers/{n}"), "input": {"text": text}});
        client.publish(&format!("outpost/n/jobs/{task}"), envelope.to_string(), PublishProperties::default()).await;
    }
}

/// Every job is answered; a reply that comes twice is the same one.
async fn all_answered(client: &mut Client) -> usize {
    let mut replies: BTreeMap<String, Value> = BTreeMap::new();
    let mut again = 0;
    while replies.len() < JOBS {
        let Some(message) = client.next_within(PATIENCE).await else { break };
        let reply = message.json();
        assert_eq!(reply["status"], "ok", "{reply}");
        match replies.get(&message.topic) {
            Some(first) => {
                assert_eq!(*first, reply, "run twice: {}", message.topic);
                again += 1;
            }
            None => {
                replies.insert(message.topic, reply);
            }
        }
    }
    assert_eq!(replies.len(), JOBS, "jobs were lost");
    again
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_mid_work() {
    let broker = Mosquitto::start();
    let mut daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    send_all(&client, "text.classify").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    daemon.kill();
    tokio::time::sleep(Duration::from_millis(100)).await;
    daemon.restart().await;
    all_answered(&mut client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_restarts() {
    let mut broker = Mosquitto::start();
    let mut daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    send_all(&client, "text.classify").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    broker.restart();
    daemon.online().await;
    all_answered(&mut client).await;
    // And it goes on as before.
    let reply = client.ask("n", "text.classify", json!({"id": "after", "input": {"text": "leak at valve 3"}})).await;
    assert_eq!(reply["status"], "ok", "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_sent_while_it_is_away_are_answered_when_it_is_back() {
    let broker = Mosquitto::start();
    let mut daemon = Daemon::start("n", &broker.url(), "").await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    daemon.kill();
    send_all(&client, "text.classify").await;
    daemon.restart().await;
    assert_eq!(all_answered(&mut client).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_comes_late_is_waited_for() {
    let mut broker = Mosquitto::start();
    let url = broker.url();
    let mut daemon = Daemon::start("n", &url, "").await;
    daemon.kill();
    broker.stop();
    daemon.spawn();
    tokio::time::sleep(Duration::from_millis(600)).await;
    broker.restart();
    daemon.online().await;
}
