//! The daemon under load, beside the broker's own echo: `cargo bench --bench load`.
//!
//! `OUTPOST_BIN` names another binary to measure. Everything runs over mosquitto on the loopback, so
//! the load generator, the broker and the daemon share the processors: ratios say more than figures.

use std::time::{Duration, Instant};

use rumqttc::v5::mqttbytes::v5::PublishProperties;

#[path = "../common.rs"]
#[allow(dead_code)]
mod common;
use common::*;

const ROUNDS: usize = 1000;
const KEPT_IN_FLIGHT: usize = 256;
const LOAD: Duration = Duration::from_secs(5);

fn quantile(times: &mut [Duration], share: f64) -> f64 {
    times.sort();
    times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
}

#[tokio::main]
async fn main() {
    let broker = Mosquitto::start();
    let mut starts = Vec::new();
    for _ in 0..5 {
        let mut daemon = Daemon::start("bench", &broker.url(), "").await;
        daemon.kill();
        let started = Instant::now();
        daemon.restart().await;
        starts.push(started.elapsed());
    }
    let daemon = Daemon::start("bench", &broker.url(), "").await;
    println!("start to online              {:>8.1} ms (median of 5)", quantile(&mut starts, 0.5));
    println!("resident when idle           {:>8.1} MiB", daemon.rss_kib() as f64 / 1024.0);

    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("echo").await;
    client.subscribe("answers/#").await;
    let jobs = [
        ("text.classify", "text/plain", sample("note-urgent.txt")),
        ("image.classify", "image/png", sample("digit-2.png")),
        ("series.anomaly", "text/csv", sample("bearing-outer.csv")),
    ];
    println!("\nround trip, one at a time    {:>8} {:>8} {:>8} {:>8}", "p50 ms", "p99 ms", "echo p50", "echo p99");
    for (task, content_type, payload) in &jobs {
        let topic = format!("outpost/bench/jobs/{task}");
        let (mut trips, mut echoes) = (Vec::new(), Vec::new());
        for n in 0..ROUNDS {
            let started = Instant::now();
            client.publish("echo", payload.clone(), PublishProperties::default()).await;
            client.next().await;
            echoes.push(started.elapsed());
            let properties = bare(Some(content_type), "answers/trip", &format!("{task}-{n}"), &[]);
            let started = Instant::now();
            client.publish(&topic, payload.clone(), properties).await;
            assert_eq!(client.next().await.json()["status"], "ok");
            trips.push(started.elapsed());
        }
        println!(
            "  {task:<26} {:>8.2} {:>8.2} {:>8.2} {:>8.2}",
            quantile(&mut trips, 0.5),
            quantile(&mut trips, 0.99),
            quantile(&mut echoes, 0.5),
            quantile(&mut echoes, 0.99)
        );
    }

    println!("\n{KEPT_IN_FLIGHT} kept in flight           {:>8}", "jobs/s");
    for (task, content_type, payload) in &jobs {
        let topic = format!("outpost/bench/jobs/{task}");
        for n in 0..KEPT_IN_FLIGHT {
            let properties = bare(Some(content_type), "answers/load", &format!("load-{task}-{n}"), &[]);
            client.publish(&topic, payload.clone(), properties).await;
        }
        let (mut sent, mut done, started) = (KEPT_IN_FLIGHT, 0, Instant::now());
        while started.elapsed() < LOAD {
            next_ok(&mut client).await;
            done += 1;
            let properties = bare(Some(content_type), "answers/load", &format!("load-{task}-{sent}"), &[]);
            client.publish(&topic, payload.clone(), properties).await;
            sent += 1;
        }
        let took = started.elapsed().as_secs_f64();
        while done < sent {
            next_ok(&mut client).await;
            done += 1;
        }
        println!("  {task:<26} {:>8.0}", (done - KEPT_IN_FLIGHT) as f64 / took);
    }
    println!("\npeak resident                {:>8.1} MiB", daemon.peak_kib() as f64 / 1024.0);
    let size = std::fs::metadata(binary()).expect("a binary").len();
    println!("binary                       {:>8.1} MiB  {}", size as f64 / f64::from(1 << 20), binary());
}

async fn next_ok(client: &mut Client) {
    let reply = client.next().await;
    assert_eq!(reply.json()["status"], "ok", "{reply:?}");
}
