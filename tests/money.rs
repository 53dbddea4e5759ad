//! Money and what is written down: budgets, bounds, the audit file, the cache, smaller pictures.

use std::collections::HashMap;
use std::time::Duration;

use outpost::standin::{Fault, Standin};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::*;

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn unclear(id: &str) -> Value {
    json!({"id": id, "input": {"image": base64(&sample("digit-uncertain.png"))}})
}

/// A provider at US prices so high that a few dozen answers take a dollar.
fn dear(cloud: &Standin) -> String {
    provider("anthropic", cloud).replace("input_tokens = 3.0", "input_tokens = 30.0").replace("= 15.0", "= 100.0")
}

fn billed_usd(cloud: &Standin) -> f64 {
    let [input, output] = cloud.billed();
    (input as f64 * 30.0 + output as f64 * 100.0) / 1e6
}

async fn daemon(broker: &Mosquitto, more: &str) -> (Daemon, Client) {
    let daemon = Daemon::start_with("n", &broker.url(), more, &models_dir(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    (daemon, client)
}

/// The lines of the audit file, once there are so many.
async fn audit(daemon: &Daemon, lines: usize) -> Vec<Value> {
    let path = daemon.dir().join("store/audit.jsonl");
    let started = std::time::Instant::now();
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let found: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        if found.len() >= lines || started.elapsed() > Duration::from_secs(5) {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn cost(daemon: &Daemon) -> Value {
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("outpost/n/status").await;
    client.next().await.json()["cost"].clone()
}

/// A dollar a day under 64 jobs at once, until nothing goes up any more: the provider never bills more.
#[tokio::test(flavor = "multi_thread")]
async fn a_dollar_is_a_dollar() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let more = "[uplink]\nbudget_usd_per_day = 1.0\n".to_owned() + &dear(&cloud) + "concurrency = 64\n";
    let (mut daemon, mut client) = daemon(&broker, &more).await;
    let (mut up, mut spent, mut sent) = (0, 0.0, 0);
    for wave in 0..3 {
        for n in 0..64 {
            // Some answers are wrong and asked for again; some break off and count in full.
            match n % 16 {
                _ if wave > 0 => {}
                3 => cloud.fail(Fault::Text("prose")),
                7 => cloud.fail(Fault::Cut),
                _ => {}
            }
            let id = format!("d{wave}-{n}");
            let mut envelope = unclear(&id);
            envelope["reply_to"] = json!(format!("answers/{id}"));
            client.publish("outpost/n/jobs/image.classify", envelope.to_string(), PublishProperties::default()).await;
            sent += 1;
        }
        for _ in 0..64 {
            let reply = client.next().await.json();
            assert_eq!(reply["status"], "ok", "{reply}");
            up += usize::from(reply["by"]["tier"] == "cloud");
            spent += reply["cost_usd"].as_f64().expect("a cost");
        }
    }
    let billed = billed_usd(&cloud);
    println!("{sent} jobs, {up} answered above: billed ${billed:.6}, counted ${spent:.6} of $1");
    assert!(billed <= 1.0 && spent <= 1.0 + 1e-9, "overspent: billed {billed}, counted {spent}");
    assert!(up > 50 && spent > 0.9, "{up} answered for {spent}");
    let generate = json!({"id": "g", "input": {"text": "x"}, "params": {"max_tokens": 3000}});
    let reply = client.ask("n", "text.generate", generate.clone()).await;
    assert_eq!(reply["error"]["code"], "budget_exhausted", "{reply}");
    assert_eq!(reply["error"]["limit"], 1.0, "{reply}");
    // Neither a crash nor a restart brings another dollar; what was settled is written at once.
    tokio::time::sleep(Duration::from_millis(500)).await;
    daemon.kill();
    daemon.restart().await;
    let before = cloud.asked().len();
    let reply = client.ask("n", "text.generate", generate.clone()).await;
    // The reply of before the crash is remembered: the same question under another id.
    assert_eq!(reply["error"]["code"], "budget_exhausted", "{reply}");
    let mut again = generate;
    again["id"] = json!("g2");
    let reply = client.ask("n", "text.generate", again).await;
    assert_eq!(reply["error"]["code"], "budget_exhausted", "{reply}");
    assert_eq!(cloud.asked().len(), before, "something was sent over the budget");
    let told = cost(&daemon).await;
    let (spent_usd, left_usd) = (told["spent_usd"].as_f64(), told["left_usd"].as_f64());
    assert!(spent_usd.is_some_and(|told| (told - spent).abs() < 1e-6), "{told} against {spent}");
    assert!(left_usd.is_some_and(|left| (left - (1.0 - spent)).abs() < 1e-6), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_has_a_budget_of_its_own() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let more = "[routing.task.\"image.classify\"]\nbudget_usd_per_day = 0.0\n".to_owned() + &dear(&cloud);
    let (daemon, mut client) = daemon(&broker, &more).await;
    let reply = client.ask("n", "image.classify", unclear("no")).await;
    assert_eq!(reply["degraded"], true, "{reply}");
    let reply = client.ask("n", "text.generate", json!({"id": "yes", "input": {"text": "x"}})).await;
    assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
    assert_eq!(cloud.asked().len(), 1);
    assert_eq!(cost(&daemon).await["task"]["image.classify"]["left_usd"], 0.0);
}

/// All answers to a job together, wrong ones included, keep the job's bound.
#[tokio::test(flavor = "multi_thread")]
async fn a_bound_holds_over_attempts() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let (_daemon, mut client) = daemon(&broker, &dear(&cloud)).await;
    let mut refused = 0;
    for n in 0..12 {
        let most = 0.05 * f64::from(n);
        cloud.fail(Fault::Text("prose"));
        let before = billed_usd(&cloud);
        let mut envelope = unclear(&format!("m{n}"));
        envelope["max_cost_usd"] = json!(most);
        let reply = client.ask("n", "image.classify", envelope).await;
        let billed = billed_usd(&cloud) - before;
        assert!(billed <= most, "{billed} of {most}: {reply}");
        assert!((reply["cost_usd"].as_f64().expect("a cost") - billed).abs() < 1e-6, "{billed}: {reply}");
        refused += usize::from(billed == 0.0);
    }
    assert!((1..8).contains(&refused), "{refused}");
}

/// One line for each job sent up, with the bytes that left, and nothing of what was in them.
#[tokio::test(flavor = "multi_thread")]
async fn every_job_sent_up_leaves_one_line() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let (daemon, mut client) = daemon(&broker, &provider("openai", &cloud)).await;
    let secret = "the gearbox of press seven";
    let mut costs = HashMap::new();
    for n in 0..6 {
        match n {
            1 => cloud.fail(Fault::Status(500, "api_error", None)),
            2 => cloud.fail(Fault::Status(400, "invalid_request_error", None)),
            3 => (0..2).for_each(|_| cloud.fail(Fault::Text(""))),
            _ => {}
        }
        let envelope = json!({"id": format!("a{n}"), "input": {"text": format!("{secret} {n}")}});
        let reply = client.ask("n", "text.generate", envelope).await;
        costs.insert(format!("a{n}"), reply["cost_usd"].clone());
    }
    let private = json!({"id": "private", "privacy": "device", "input": {"text": secret}});
    client.ask("n", "text.generate", private).await;
    let lines = audit(&daemon, 6).await;
    assert_eq!(lines.len(), 6, "{lines:?}");
    let asked = cloud.asked();
    let bodies: HashMap<String, usize> = asked
        .iter()
        .map(|asked| {
            let hash: String = Sha256::digest(&asked.body).iter().map(|byte| format!("{byte:02x}")).collect();
            (hash, asked.body.len())
        })
        .collect();
    let mut requests = 0;
    for (n, line) in lines.iter().enumerate() {
        let outcome = ["answered", "answered", "refused", "unusable", "answered", "answered"][n];
        assert_eq!(line["job"], format!("a{n}"), "{line}");
        assert_eq!(line["outcome"], outcome, "{line}");
        assert_eq!(
            (&line["task"], &line["provider"], &line["model"]),
            (&json!("text.generate"), &json!("cloud"), &json!("big"))
        );
        let hash = line["sha256"].as_str().expect("a hash");
        assert_eq!(bodies.get(hash).map(|bytes| json!(bytes)).as_ref(), Some(&line["bytes"]), "{line}");
        assert_eq!(line["cost_usd"], costs[&format!("a{n}")], "{line}");
        requests += line["requests"].as_u64().expect("a number");
    }
    assert_eq!(requests, asked.len() as u64);
    let text = std::fs::read_to_string(daemon.dir().join("store/audit.jsonl")).expect("an audit file");
    assert!(!text.contains(secret) && !text.contains(CLOUD_KEY.1), "content or key in the audit file");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_question_is_paid_once() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let rule = "[routing.task.\"image.classify\"]\ncache_s = 2\n".to_owned() + &provider("anthropic", &cloud);
    let (_daemon, mut client) = daemon(&broker, &rule).await;
    let first = client.ask("n", "image.classify", unclear("c1")).await;
    let second = client.ask("n", "image.classify", unclear("c2")).await;
    assert!(first["cost_usd"].as_f64().is_some_and(|cost| cost > 0.0), "{first}");
    assert_eq!((&second["cost_usd"], &second["output"]), (&json!(0.0), &first["output"]), "{second}");
    assert!(second["route"][1]["why"].as_str().is_some_and(|why| why.contains("same question")), "{second}");
    assert_eq!(cloud.asked().len(), 1);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    client.ask("n", "image.classify", unclear("c3")).await;
    assert_eq!(cloud.asked().len(), 2, "an old answer was given again");
    // A task without the rule is asked anew.
    for id in ["g1", "g2"] {
        client.ask("n", "text.generate", json!({"id": id, "input": {"text": "x"}})).await;
    }
    assert_eq!(cloud.asked().len(), 4);
}

/// A large picture is scaled to what the task needs.
#[tokio::test(flavor = "multi_thread")]
async fn pictures_are_scaled_down() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let rule = "[routing.task.\"image.classify\"]\nprefer = \"cloud\"\n".to_owned() + &provider("gemini", &cloud);
    let (_daemon, mut client) = daemon(&broker, &rule).await;
    let picture = image::RgbImage::from_fn(1600, 1200, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]));
    let mut large = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut large, image::ImageFormat::Jpeg).expect("encodes");
    let large = large.into_inner();
    let envelope = json!({"id": "large", "input": {"image": base64(&large)}});
    let reply = client.ask("n", "image.classify", envelope).await;
    assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
    let sent = cloud.asked()[0].image.clone().expect("a picture");
    let small = image::load_from_memory(&sent).expect("a picture");
    println!("1600x1200 in {} bytes went up as {}x{} in {}", large.len(), small.width(), small.height(), sent.len());
    assert_eq!((small.width(), small.height()), (256, 192));
    assert!(sent.len() * 10 < large.len(), "{} of {}", sent.len(), large.len());
}
