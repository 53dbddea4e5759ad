//! Providers that fail in every way: one reply a job, in time; and what waits for them to come back.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outpost::standin::{Fault, Standin};
use rumqttc::v5::mqttbytes::v5::PublishProperties;
use serde_json::{Value, json};

use crate::common::*;

/// What an answer may be late by, from the requester's side.
const GRACE: Duration = Duration::from_millis(50);

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn unclear(id: &str) -> Value {
    json!({"id": id, "input": {"image": base64(&sample("digit-uncertain.png"))}})
}

fn generate(id: &str) -> Value {
    json!({"id": id, "input": {"text": "say hello"}})
}

async fn daemon(broker: &Mosquitto, more: &str) -> (Daemon, Client) {
    let daemon = Daemon::start_with("n", &broker.url(), more, &models_dir(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&daemon.url).await;
    client.subscribe("answers/#").await;
    (daemon, client)
}

async fn publish(client: &Client, task: &str, mut envelope: Value) {
    let id = envelope["id"].as_str().expect("an id").to_owned();
    envelope["reply_to"] = json!(format!("answers/{id}"));
    client.publish(&format!("outpost/n/jobs/{task}"), envelope.to_string(), PublishProperties::default()).await;
}

/// A server whose certificate nobody vouches for; its port.
fn unverified() -> u16 {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("it fits");
    let config = Arc::new(config);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let config = Arc::clone(&config);
            std::thread::spawn(move || {
                let Ok(mut connection) = rustls::ServerConnection::new(config) else { return };
                while connection.is_handshaking() && connection.complete_io(&mut stream).is_ok() {}
            });
        }
    });
    port
}

/// A server that ends every connection without a word; its port.
fn mute() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    port
}

fn at(name: &str, base_url: &str) -> String {
    format!(
        "[uplink.provider.{name}]\nkind = \"openai-compatible\"\nbase_url = \"{base_url}\"\nmodel = \"m\"\n\
         usd_per_million_input_tokens = 3.0\nusd_per_million_output_tokens = 15.0\n"
    )
}

/// Every way of failing that a server has, in a row.
fn faults() -> Vec<Fault> {
    let retry = json!([{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.05s"}]);
    vec![
        Fault::Delay(Duration::from_secs(20)),
        Fault::Cut,
        Fault::NotJson,
        Fault::Text("It is a 3, I think."),
        Fault::Text("{\"label\": \"eleven\", \"confidence\": 1}"),
        Fault::Status(429, "rate_limit_error", Some(("retry-after-ms", "20"))),
        Fault::Status(429, "rate_limit_error", None),
        Fault::Status(429, "rate_limit_error", Some(("retry-after", "1"))),
        Fault::Status(500, "api_error", None),
        Fault::Status(503, "api_error", None),
        Fault::Status(408, "timeout", None),
        Fault::Status(400, "invalid_request_error", None),
        Fault::Status(401, "authentication_error", None),
        Fault::Refusal,
        Fault::CutOff,
        Fault::Huge(10_000_000),
        Fault::Body(429, json!({"error": {"code": 429, "message": "m", "details": retry}})),
    ]
}

/// How late this machine wakes a task that sleeps 5 ms, at worst, while it lives: a busy one is late itself.
struct Stall(Arc<AtomicU64>, tokio::task::JoinHandle<()>);

impl Stall {
    fn new() -> Self {
        let worst = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&worst);
        let task = tokio::spawn(async move {
            let nap = Duration::from_millis(5);
            loop {
                let started = Instant::now();
                tokio::time::sleep(nap).await;
                seen.fetch_max(started.elapsed().saturating_sub(nap).as_micros() as u64, Ordering::Relaxed);
            }
        });
        Stall(worst, task)
    }

    fn worst(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        self.1.abort();
    }
}

/// A thousand jobs, of which every one meets another failure: one reply each, none twice, none late.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_jobs_through_every_failure() {
    const JOBS: usize = 1000;
    const WAVE: usize = 50;
    let deadline = Duration::from_millis(1500);
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let more = "[uplink]\norder = [\"tls\", \"name\", \"mute\", \"dead\", \"cloud\"]\n".to_owned()
        + &at("tls", &format!("https://localhost:{}", unverified()))
        + &at("name", "https://no-such-host.invalid/v1")
        + &at("mute", &format!("http://127.0.0.1:{}", mute()))
        + &at("dead", &format!("http://127.0.0.1:{}", free_port()))
        + &provider("anthropic", &cloud);
    let (daemon, mut client) = daemon(&broker, &more).await;
    let all = faults();
    let stall = Stall::new();
    let mut replies: HashMap<String, (Value, Duration)> = HashMap::new();
    let mut duplicates = 0;
    let mut published = HashMap::new();
    for wave in 0..JOBS / WAVE {
        for n in wave * WAVE..(wave + 1) * WAVE {
            // A good answer between the failures, so that the breaker does not spare us all of them.
            cloud.fail(all[n % all.len()].clone());
            cloud.fail(Fault::Delay(Duration::ZERO));
            let id = format!("f{n}");
            let (task, mut envelope) =
                if n % 3 == 0 { ("text.generate", generate(&id)) } else { ("image.classify", unclear(&id)) };
            envelope["deadline_ms"] = json!(deadline.as_millis());
            published.insert(id, Instant::now());
            publish(&client, task, envelope).await;
        }
        while replies.len() < (wave + 1) * WAVE {
            let message = client.next().await;
            let id = message.topic.trim_start_matches("answers/").to_owned();
            let took = published[&id].elapsed();
            duplicates += usize::from(replies.insert(id, (message.json(), took)).is_some());
        }
    }
    duplicates += usize::from(client.next_within(Duration::from_secs(1)).await.is_some());
    let mut outcomes: HashMap<String, usize> = HashMap::new();
    for (reply, _) in replies.values() {
        let outcome = match reply["error"]["code"].as_str() {
            Some(code) => code.to_owned(),
            None if reply["degraded"] == true => "degraded".to_owned(),
            None => reply["by"]["tier"].as_str().unwrap_or_default().to_owned(),
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    let stalled = stall.worst();
    let late = replies.values().filter(|(_, took)| *took > deadline + GRACE).count();
    let slowest = replies.values().map(|(_, took)| *took).max().unwrap_or_default();
    let requests = cloud.asked().len();
    let inside = replies.values().filter_map(|(reply, _)| reply["timing_ms"]["total"].as_f64()).fold(0.0, f64::max);
    println!(
        "{JOBS} jobs, {requests} requests: {} replies, {duplicates} duplicates, {late} late, slowest {slowest:?} ({inside:.0} ms inside, this machine's own delay {stalled:?}); {outcomes:?}",
        replies.len()
    );
    assert_eq!((replies.len(), duplicates), (JOBS, 0));
    let known = ["cloud", "degraded", "uplink_unavailable", "deadline_exceeded"];
    assert!(outcomes.keys().all(|outcome| known.contains(&outcome.as_str())), "{outcomes:?}");
    // Time is judged on a machine that has nothing else to do, and where that is asked for.
    if std::env::var_os("OUTPOST_JUDGE_TIME").is_none() || stalled > GRACE / 2 {
        println!("whether they are in time is not judged; this machine wakes a sleeper {stalled:?} late");
    } else {
        assert_eq!(late, 0, "slowest {slowest:?}");
        assert!(requests > JOBS / 2, "{requests} requests were enough");
        assert!(outcomes.get("cloud").is_some_and(|answered| *answered > JOBS / 10), "{outcomes:?}");
    }
    assert!(!daemon.log().contains(CLOUD_KEY.1), "the key is in the log");
}

/// After failures in a row a provider is left alone, and asked again by one probe.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_down_is_left_alone() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let (_daemon, mut client) = daemon(&broker, &provider("anthropic", &cloud)).await;
    for _ in 0..5 {
        cloud.fail(Fault::Status(500, "api_error", None));
    }
    for n in 0..5 {
        let reply = client.ask("n", "image.classify", unclear(&format!("b{n}"))).await;
        assert_eq!(reply["degraded"], true, "{reply}");
        if n > 1 {
            let why = reply["route"][1]["why"].as_str().unwrap_or_default();
            assert!(why.contains("failed several times in a row"), "{reply}");
        }
    }
    assert_eq!(cloud.asked().len(), 5, "the breaker let more through");
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let reply = client.ask("n", "image.classify", unclear("back")).await;
    assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
}

/// A wait longer than the deadline means the next provider, at once.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_provider_in_order() {
    let (first, second) = (standin().await, standin().await);
    let broker = Mosquitto::start();
    let more = "[uplink]\norder = [\"cloud\", \"next\"]\n".to_owned()
        + &provider("gemini", &first)
        + &provider("openai", &second).replace("provider.cloud", "provider.next");
    let (_daemon, mut client) = daemon(&broker, &more).await;
    let daily = json!([{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                        "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel"}]}]);
    let rows = [
        Fault::Status(400, "invalid_request_error", None),
        Fault::Body(429, json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": daily}})),
        Fault::Refusal,
        Fault::Status(429, "RESOURCE_EXHAUSTED", Some(("retry-after", "60"))),
    ];
    for (n, fault) in rows.into_iter().enumerate() {
        let shown = format!("{fault:?}");
        let (before, started) = (first.asked().len(), Instant::now());
        first.fail(fault);
        let mut envelope = unclear(&format!("o{n}"));
        envelope["deadline_ms"] = json!(10_000);
        let reply = client.ask("n", "image.classify", envelope).await;
        assert_eq!(reply["by"]["provider"], "next", "{shown}: {reply}");
        assert_eq!(reply["route"][1]["outcome"], "failed", "{shown}: {reply}");
        assert_eq!(first.asked().len() - before, 1, "{shown}");
        assert!(started.elapsed() < Duration::from_secs(5), "{shown}: {:?}", started.elapsed());
    }
    // What one job was told holds for the others, until then.
    let reply = client.ask("n", "image.classify", unclear("told")).await;
    assert_eq!(reply["route"][1]["outcome"], "skipped", "{reply}");
    assert!(reply["route"][1]["why"].as_str().is_some_and(|why| why.contains("left alone")), "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_provider_gets_company() {
    let (slow, quick) = (standin().await, standin().await);
    let broker = Mosquitto::start();
    let more = "[uplink]\norder = [\"cloud\", \"next\"]\nhedge_ms = 200\n".to_owned()
        + &provider("anthropic", &slow)
        + &provider("openai", &quick).replace("provider.cloud", "provider.next");
    let (_daemon, mut client) = daemon(&broker, &more).await;
    slow.fail(Fault::Delay(Duration::from_secs(20)));
    let started = Instant::now();
    let reply = client.ask("n", "image.classify", unclear("hedged")).await;
    assert_eq!(reply["by"]["provider"], "next", "{reply}");
    let took = started.elapsed();
    assert!((Duration::from_millis(200)..Duration::from_secs(10)).contains(&took), "{took:?}");
    assert_eq!((slow.asked().len(), quick.asked().len()), (1, 1));
    let reply = client.ask("n", "image.classify", unclear("not hedged")).await;
    assert_eq!(reply["by"]["provider"], "cloud", "{reply}");
    assert_eq!(quick.asked().len(), 1);
}

/// No more requests at once than a provider is allowed.
#[tokio::test(flavor = "multi_thread")]
async fn places_are_kept() {
    let most = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let count = Arc::clone(&most);
    let cloud = Standin::start(move |asked| {
        let now = count.0.fetch_add(1, Ordering::SeqCst) + 1;
        count.1.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(20));
        count.0.fetch_sub(1, Ordering::SeqCst);
        first_label(asked)
    })
    .await
    .expect("a stand-in");
    let broker = Mosquitto::start();
    let (_daemon, mut client) = daemon(&broker, &(provider("openai", &cloud) + "concurrency = 2\n")).await;
    for n in 0..20 {
        publish(&client, "image.classify", unclear(&format!("p{n}"))).await;
    }
    for _ in 0..20 {
        assert_eq!(client.next().await.json()["by"]["tier"], "cloud");
    }
    let most = most.1.load(Ordering::SeqCst);
    assert!((1..=2).contains(&most), "{most} at once");
}

/// Jobs without a deadline wait on the disk, over a crash, and are sent in order, once.
#[tokio::test(flavor = "multi_thread")]
async fn held_while_the_way_up_is_closed() {
    let broker = Mosquitto::start();
    let port = free_port();
    let more = "[uplink]\nhold_offline_s = 600\n".to_owned()
        + &at("cloud", &format!("http://127.0.0.1:{port}/v1"))
        + "credential = \"cloud-key\"\n";
    let (mut daemon, mut client) = daemon(&broker, &more).await;
    for n in 0..5 {
        let (task, envelope) =
            if n % 2 == 0 { ("text.generate", generate("h")) } else { ("image.classify", unclear("h")) };
        let mut envelope = envelope;
        envelope["id"] = json!(format!("h{n}"));
        publish(&client, task, envelope).await;
        // One after the other, so that their order is known.
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    // One with a deadline does not wait.
    let mut hurried = unclear("hurried");
    hurried["deadline_ms"] = json!(5000);
    let reply = client.ask("n", "image.classify", hurried).await;
    assert_eq!(reply["degraded"], true, "{reply}");
    // Its delivery is acknowledged by then, and does not come again.
    tokio::time::sleep(Duration::from_millis(500)).await;
    daemon.kill();
    daemon.restart().await;
    // The same job again is still the same job.
    publish(&client, "text.generate", generate("h0")).await;
    let mut status = Client::connect(&daemon.url).await;
    status.subscribe("outpost/n/status").await;
    assert_eq!(status.next().await.json()["held"], 5);
    let early = client.next_within(Duration::from_secs(1)).await;
    assert!(early.is_none(), "answered with nobody to ask: {early:?}");
    let cloud = Standin::start_at(port, first_label).await.expect("the port is still free");
    let mut order = Vec::new();
    for _ in 0..5 {
        let message = client.next().await;
        let reply = message.json();
        assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
        order.push(message.topic);
    }
    assert_eq!(order, ["answers/h0", "answers/h1", "answers/h2", "answers/h3", "answers/h4"]);
    let extra = client.next_within(Duration::from_secs(2)).await;
    assert!(extra.is_none(), "{extra:?}");
    assert_eq!(cloud.asked().len(), 5);
    // Once the broker has the replies, the files are gone.
    let held = daemon.dir().join("store/held");
    let started = Instant::now();
    while std::fs::read_dir(&held).expect("a folder").count() > 0 {
        assert!(started.elapsed() < PATIENCE, "files are left in {}", held.display());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Nobody waits for ever: when the time is over the job is answered as it stands.
#[tokio::test(flavor = "multi_thread")]
async fn held_no_longer_than_allowed() {
    let broker = Mosquitto::start();
    let more =
        "[uplink]\nhold_offline_s = 3\n".to_owned() + &at("cloud", &format!("http://127.0.0.1:{}/v1", free_port()));
    let (_daemon, mut client) = daemon(&broker, &more).await;
    let started = Instant::now();
    publish(&client, "image.classify", unclear("degraded")).await;
    publish(&client, "text.generate", generate("error")).await;
    let mut replies = HashMap::new();
    for _ in 0..2 {
        let message = client.next().await;
        replies.insert(message.topic.clone(), message.json());
    }
    assert!(started.elapsed() >= Duration::from_millis(2900), "{:?}", started.elapsed());
    assert_eq!(replies["answers/degraded"]["degraded"], true, "{replies:?}");
    assert_eq!(replies["answers/error"]["error"]["code"], "uplink_unavailable", "{replies:?}");
}
