//! More jobs than room: each gets one reply, an answer or `overloaded`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n", &broker.url(), "[jobs]\nqueue = 4\n").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    // All at once: the daemon sleeps while they are sent.
    const JOBS: usize = 100;
    daemon.signal("STOP");
    for n in 0..JOBS {
        let properties = bare(Some("text/plain"), &format!("answers/{n}"), &n.to_string(), &[]);
        client.publish("outpost/n/jobs/text.classify", "the belt of press 4 slips now and then", properties).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    daemon.signal("CONT");
    let mut outcomes: BTreeMap<String, String> = BTreeMap::new();
    for _ in 0..JOBS {
        let message = client.next().await;
        let reply = message.json();
        let outcome = reply["error"]["code"].as_str().unwrap_or("ok").to_owned();
        if outcome == "overloaded" {
            assert_eq!(reply["error"]["limit"], 4, "{reply}");
        }
        assert!(outcomes.insert(message.topic.clone(), outcome).is_none(), "answered twice: {}", message.topic);
    }
    let count = |wanted: &str| outcomes.values().filter(|outcome| *outcome == wanted).count();
    assert_eq!(count("ok") + count("overloaded"), JOBS, "{outcomes:?}");
    assert!(count("ok") >= 4 && count("overloaded") > 0, "{outcomes:?}");
    let after = client.ask("n", "text.classify", json!({"input": {"text": "oil on the floor"}})).await;
    assert_eq!(after["status"], "ok", "{after}");
}

#[tokio::test(flavor = "multi_thread")]
async fn higher_priority_goes_first() {
    let broker = Mosquitto::start();
    // One worker, so that the order shows.
    let daemon = Daemon::start_with("m", &broker.url(), "", &models_dir(), &[("OUTPOST_MODELS__THREADS", "1")]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    const JOBS: usize = 300;
    const URGENT: usize = 10;
    daemon.signal("STOP");
    for n in 0..JOBS {
        let priority = if n >= JOBS - URGENT { "9" } else { "1" };
        let properties = bare(Some("text/plain"), &format!("answers/{n}"), &n.to_string(), &[("priority", priority)]);
        client.publish("outpost/m/jobs/text.classify", "the belt of press 4 slips. ".repeat(30), properties).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    daemon.signal("CONT");
    let mut order = Vec::new();
    for _ in 0..JOBS {
        let topic = client.next().await.topic;
        order.push(topic.trim_start_matches("answers/").parse::<usize>().expect("a number"));
    }
    // They came last; by then some others were done.
    let last_urgent = order.iter().rposition(|n| *n >= JOBS - URGENT).expect("answered");
    assert!(last_urgent < JOBS - 50, "the last urgent one was number {last_urgent}: {order:?}");
}
