//! Now, then better: the uncertain answer at once, the stronger one when it comes.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use outpost::standin::{Fault, Standin};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

use crate::common::*;

async fn node(more: &str, cloud: &Standin) -> (Mosquitto, Daemon, Client) {
    let broker = Mosquitto::start();
    let more = provider("anthropic", cloud) + more;
    let daemon = Daemon::start_with("n", &broker.url(), &more, &models_dir(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    (broker, daemon, client)
}

/// Sends a job that asks for both; all replies up to the last one.
async fn both(client: &mut Client, id: &str, picture: &str, more: Value) -> Vec<Value> {
    let mut envelope = json!({"id": id, "when": "now-then-better", "reply_to": format!("answers/{id}"),
                              "input": {"image": STANDARD.encode(sample(picture))}});
    for (key, value) in more.as_object().into_iter().flatten() {
        envelope[key] = value.clone();
    }
    client.publish("outpost/n/jobs/image.classify", envelope.to_string(), PublishProperties::default()).await;
    let mut replies = Vec::new();
    loop {
        let reply = client.next().await.json();
        assert_eq!(reply["id"], id, "{reply}");
        let last = reply["final"].as_bool().unwrap_or_else(|| panic!("no `final` in {reply}"));
        replies.push(reply);
        if last {
            return replies;
        }
    }
}

fn tiers(replies: &[Value]) -> Vec<&str> {
    replies.iter().map(|reply| reply["by"]["tier"].as_str().unwrap_or("none")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uncertain_answer_at_once_and_a_better_one_later() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud).await;
    cloud.fail(Fault::Delay(Duration::from_millis(1500)));
    let started = Instant::now();
    let replies = both(&mut client, "a", "digit-uncertain.png", json!({})).await;
    assert_eq!(tiers(&replies), ["device", "cloud"], "{replies:?}");
    assert!(started.elapsed() >= Duration::from_millis(1500));
    let first = replies[0]["timing_ms"]["total"].as_f64().expect("a time");
    assert!(first < 1000.0, "the first reply waited for the cloud: {first} ms");
    assert_eq!((&replies[0]["degraded"], &replies[1]["degraded"]), (&json!(true), &json!(false)), "{replies:?}");
    assert_eq!(replies[0]["route"][0]["outcome"], "uncertain", "{replies:?}");
    assert!(replies[0]["cost_usd"] == 0.0 && replies[1]["cost_usd"].as_f64() > Some(0.0), "{replies:?}");
    // Seen twice, it gets the reply that counts.
    let again = both(&mut client, "a", "digit-uncertain.png", json!({})).await;
    assert_eq!(again, replies[1..], "{again:?}");
    assert_eq!(cloud.asked().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_reply_where_there_is_nothing_better_to_come() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud).await;
    let certain = both(&mut client, "certain", "digit-2.png", json!({})).await;
    assert_eq!((tiers(&certain), &certain[0]["degraded"]), (vec!["device"], &json!(false)), "{certain:?}");
    let private = both(&mut client, "private", "digit-uncertain.png", json!({"privacy": "device"})).await;
    assert_eq!((tiers(&private), &private[0]["degraded"]), (vec!["device"], &json!(true)), "{private:?}");
    let dear = both(&mut client, "dear", "digit-uncertain.png", json!({"max_cost_usd": 0.0})).await;
    assert_eq!((tiers(&dear), &dear[0]["degraded"]), (vec!["device"], &json!(true)), "{dear:?}");
    assert_eq!(cloud.asked().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_within_the_deadline_is_waited_for() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud).await;
    // As many failures as one question takes, and one more.
    (0..4).for_each(|_| cloud.fail(Fault::Status(503, "api_error", None)));
    let replies = both(&mut client, "out", "digit-uncertain.png", json!({"deadline_ms": 25_000})).await;
    assert_eq!(tiers(&replies), ["device", "cloud"], "{replies:?}");
    assert!(cloud.asked().len() >= 5, "{}", cloud.asked().len());
    let route = replies[1]["route"].as_array().expect("a route");
    assert!(route.iter().any(|station| station["outcome"] == "failed"), "{route:?}");
    // A deadline that passes meanwhile: the answer that there is, once more and for good.
    (0..40).for_each(|_| cloud.fail(Fault::Status(503, "api_error", None)));
    let started = Instant::now();
    let replies = both(&mut client, "over", "digit-uncertain.png", json!({"deadline_ms": 3000})).await;
    assert_eq!(tiers(&replies), ["device", "device"], "{replies:?}");
    assert_eq!(replies[1]["degraded"], true, "{replies:?}");
    assert!(started.elapsed() < Duration::from_millis(4000), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_is_not_lost_when_the_node_stops() {
    let cloud = standin().await;
    let (_broker, mut daemon, mut client) = node("", &cloud).await;
    (0..40).for_each(|_| cloud.fail(Fault::Status(503, "api_error", None)));
    let envelope = json!({"id": "w", "when": "now-then-better", "reply_to": "answers/w", "deadline_ms": 60_000,
                          "input": {"image": STANDARD.encode(sample("digit-uncertain.png"))}});
    client.publish("outpost/n/jobs/image.classify", envelope.to_string(), PublishProperties::default()).await;
    assert_eq!(client.next().await.json()["final"], false);
    let stopping = Instant::now();
    assert_eq!(daemon.terminate().await, Some(0));
    assert!(stopping.elapsed() < Duration::from_secs(15), "{:?}", stopping.elapsed());
    cloud.recover();
    daemon.restart().await;
    let replies = [client.next().await.json(), client.next().await.json()];
    assert_eq!(tiers(&replies), ["device", "cloud"], "{replies:?}");
    assert_eq!((&replies[0]["final"], &replies[1]["final"]), (&json!(false), &json!(true)), "{replies:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_may_be_asked_for_with_a_property_and_must_be_a_known_word() {
    let cloud = standin().await;
    let (_broker, _daemon, mut client) = node("", &cloud).await;
    for (when, replies) in [("now-then-better", 2), ("best", 1)] {
        let properties = bare(Some("image/png"), "answers/bare", when, &[("when", when)]);
        client.publish("outpost/n/jobs/image.classify", sample("digit-uncertain.png"), properties).await;
        for n in 1..=replies {
            let reply = client.next().await.json();
            let last = if when == "best" { Value::Null } else { json!(n == replies) };
            assert_eq!(reply["final"], last, "{reply}");
        }
    }
    let reply = client.ask("n", "text.classify", json!({"id": "w", "when": "soon", "input": {"text": "x"}})).await;
    assert_eq!((&reply["error"]["code"], &reply["error"]["field"]), (&json!("bad_request"), &json!("when")), "{reply}");
}
