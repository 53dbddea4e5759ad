//! More jobs than room: each gets one reply, an answer or `overloaded`.

use std::collections::BTreeMap;

use serde_json::json;

use crate::common::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded() {
    let broker = Mosquitto::start();
    let daemon = Daemon::start("n", &broker.url(), "[jobs]\nqueue = 4\n").await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    // Long series keep the workers busy.
    let series: Vec<f64> = (0..100_000).map(|i| (f64::from(i) * 0.3).sin()).collect();
    let csv = series.iter().map(|x| format!("{x:.4}\n")).collect::<String>();
    const JOBS: usize = 60;
    for n in 0..JOBS {
        let properties = bare(Some("text/csv"), &format!("answers/{n}"), &n.to_string(), &[]);
        client.publish("outpost/n/jobs/series.anomaly", csv.clone(), properties).await;
    }
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
    let daemon = Daemon::start("n", &broker.url(), "[jobs]\nqueue = 100\n").await;
    // One worker, so that the order shows.
    drop(daemon);
    let daemon = Daemon::start_with("m", &broker.url(), "", &models_dir(), &[("OUTPOST_MODELS__THREADS", "1")]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    let csv = (0..100_000).map(|i| format!("{:.4}\n", (f64::from(i) * 0.3).sin())).collect::<String>();
    for n in 0..12 {
        let priority = if n >= 10 { "9" } else { "1" };
        let properties = bare(Some("text/csv"), &format!("answers/{n}"), &n.to_string(), &[("priority", priority)]);
        client.publish("outpost/m/jobs/series.anomaly", csv.clone(), properties).await;
    }
    let mut order = Vec::new();
    for _ in 0..12 {
        let topic = client.next().await.topic;
        order.push(topic.trim_start_matches("answers/").parse::<u32>().expect("a number"));
    }
    let place = |n: u32| order.iter().position(|other| *other == n).expect("answered");
    assert!(place(10) < place(9) && place(11) < place(9), "{order:?}");
}
