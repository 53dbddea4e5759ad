//! What single steps of a job's way cost: `cargo bench --bench functions`.

#![allow(missing_docs)] // criterion writes public functions

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use outpost::config::{Kind, Prefer, Provider, Routing};
use outpost::engine::model::{Model, States};
use outpost::engine::package::Package;
use outpost::engine::shelf::Shelf;
use outpost::engine::{Pool, Registry};
use outpost::facts::Sources;
use outpost::intake::{Delivery, Reader, bare};
use outpost::job::{Fault, Input, Job, Privacy, Wishes};
use outpost::route::{Device, Facts, Local, PrivacyRules, Stop, route};
use outpost::secret::Secret;
use outpost::task::Preparation;
use outpost::topic::Topics;
use outpost::uplink::{Closed, Offer, Uplink};

fn models() -> std::path::PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../models").into()
}

const SAMPLES: [(&str, &str); 3] =
    [("digits", "digit-2.png"), ("bearing", "bearing-outer.csv"), ("notes", "note-urgent.txt")];

fn input(file: &str) -> Input {
    let bytes = std::fs::read(models().join("train/samples").join(file)).expect(file);
    let ending = file.rsplit('.').next().expect("an ending");
    bare::by_ending(ending, bytes).expect("an input")
}

/// Preparation alone, and the whole answer of each variant.
fn answers(c: &mut Criterion) {
    for (name, file) in SAMPLES {
        let input = input(file);
        let package = Package::read(&models().join(name)).expect("a package");
        let shape = package
            .manifest
            .input
            .shape
            .iter()
            .map(|dim| match dim {
                outpost::engine::package::Dim::Fixed(n) => *n,
                outpost::engine::package::Dim::Named(_) => 1,
            })
            .collect();
        let preparation = Preparation::new(&package.manifest.input, shape, "f32").expect("it fits");
        c.bench_function(&format!("prepare/{name}"), |b| b.iter(|| preparation.prepare(black_box(&input))));
        for variant in &package.manifest.variant {
            let model = Model::load(package.clone(), variant).expect("it loads");
            let mut states = States::new();
            c.bench_function(&format!("answer/{name}/{}", variant.precision.as_str()), |b| {
                b.iter(|| model.answer(&mut states, black_box(&input), None));
            });
        }
    }
}

fn reading(c: &mut Criterion) {
    let reader = Reader { topics: Topics::new("outpost", "n"), reply_to: None, max_bytes: 4 << 20 };
    let series: Vec<[f64; 1]> = (0..6000).map(|i| [f64::from(i) * 0.001]).collect();
    let rows = [
        ("text", serde_json::json!({"id": "1", "reply_to": "a", "input": {"text": "pump 3 is leaking"}})),
        ("series of 6000", serde_json::json!({"id": "1", "reply_to": "a", "input": {"series": series}})),
    ];
    for (name, envelope) in rows {
        let delivery = Delivery {
            topic: "outpost/n/jobs/x.y".into(),
            payload: envelope.to_string().into(),
            ..Delivery::default()
        };
        c.bench_function(&format!("read/{name}"), |b| b.iter(|| reader.read(black_box(delivery.clone()))));
    }
}

fn deciding(c: &mut Criterion) {
    let ms = Duration::from_millis;
    let offer = |name: &str, latency: u64, left_usd: f64| Offer {
        provider: name.into(),
        usable: Ok(()),
        latency: Some(ms(latency)),
        estimate_usd: 0.001,
        left_usd: Some(left_usd),
        budget_usd: Some(1.0),
    };
    let local = |id: &str, fit| Local { id: id.into(), fit, wait: ms(1), run: ms(3) };
    let small = Err(Fault::range("input.series", "9000 samples are over the model's 6000", 6000));
    // Every kind of reason is given: the longest way through the decision.
    let facts = Facts {
        device: Device::Models(vec![local("small@1.0.0", small), local("large@1.0.0", Ok(()))]),
        offers: vec![
            offer("claude", 900, 1.0),
            offer("gpt", 100, 0.0),
            Offer {
                usable: Err(Closed::passing("it failed 5 times; asked again in 3 s")),
                ..offer("gemini", 100, 1.0)
            },
            offer("own", 100, 1.0),
        ],
        question: Ok(()),
        prefer: Prefer::Device,
        privacy: PrivacyRules { node: Privacy::Cloud, task: Privacy::Cloud, job: Privacy::Cloud },
        max_cost_usd: Some(0.01),
        left: Some(ms(500)),
    };
    c.bench_function("route", |b| b.iter(|| route(black_box(&facts))));
}

/// The whole decision about a job: models and providers are asked for facts, the question is put, the plan made.
fn decide(c: &mut Criterion) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let provider = |name: &str, kind| {
        let priced = Provider { usd_per_million_input_tokens: 3.0, ..Provider::new(name, kind, "big") };
        (priced, Some(Secret::new("key".to_owned())))
    };
    let kinds = [("claude", Kind::Anthropic), ("gpt", Kind::Openai), ("gemini", Kind::Gemini)];
    let uplink = Uplink::with_keys(kinds.map(|(name, kind)| provider(name, kind)).to_vec()).expect("an uplink");
    let shelf = Shelf::new(256 << 20, 1);
    let registry = Registry::load_within(&models(), Arc::clone(&shelf)).expect("models");
    let pool = Pool::start(1, 16, &shelf).expect("a worker");
    let routing = Routing { privacy: Privacy::Cloud, task: Default::default() };
    let sources = Sources { registry: &registry, pool: &pool, uplink: &uplink, routing: &routing };
    for (name, task, file) in [
        ("image", "image.classify", "digit-uncertain.png"),
        ("series", "series.anomaly", "bearing-outer.csv"),
        ("text", "text.classify", "note-urgent.txt"),
    ] {
        let deadline = Some(Instant::now() + Duration::from_secs(3600));
        let wishes = Wishes { deadline, max_cost_usd: Some(0.01), ..Wishes::default() };
        let job = Job { id: None, task: task.into(), input: input(file).into(), wishes, received: Instant::now() };
        let decide = |job: &Job| {
            let models = sources.candidates(job);
            let question = sources.question(job, &models);
            route(&sources.about(job, &models, question.as_ref()))
        };
        let asked = |stop: &Stop| !matches!(stop, Stop::Skip(_));
        assert_eq!(decide(&job).stops.iter().filter(|stop| asked(stop)).count(), 4, "the model, then the providers");
        c.bench_function(&format!("decide/{name}"), |b| b.iter(|| decide(black_box(&job))));
    }
}

criterion_group!(benches, answers, reading, deciding, decide);
criterion_main!(benches);
