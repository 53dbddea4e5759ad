//! What leaves the building for some questions: the bodies that a real daemon sends, one JSON object a line with the input
//! as it came and the size of each picture. Run by `tests/bench/tokens`, which counts their tokens.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::{ImageBuffer, Rgb};
use serde_json::{Value, json};

#[path = "../common.rs"]
#[allow(dead_code)]
mod common;
use common::*;

/// A photograph of a camera of 12 megapixels, in its size.
fn photo() -> String {
    let shade = |x: u32, y: u32| Rgb([(x / 16) as u8, (y / 12) as u8, ((x * y) >> 16) as u8]);
    let photo: ImageBuffer<Rgb<u8>, Vec<u8>> = ImageBuffer::from_fn(4000, 3000, shade);
    let mut out = Cursor::new(Vec::new());
    photo.write_with_encoder(JpegEncoder::new_with_quality(&mut out, 80)).expect("encodes");
    STANDARD.encode(out.into_inner())
}

/// Width and height of a picture.
fn size(bytes: &[u8]) -> (u32, u32) {
    let picture = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format().expect("bytes");
    picture.into_dimensions().expect("a picture")
}

fn series(rows: usize) -> Value {
    let text = String::from_utf8(sample("bearing-outer.csv")).expect("text");
    let value = |line: &str| vec![line.trim().parse::<f32>().expect("a number")];
    json!({"series": text.lines().take(rows).map(value).collect::<Vec<_>>()})
}

#[tokio::main]
async fn main() {
    let cloud = standin().await;
    let broker = Mosquitto::start();
    let tasks = ["image.classify", "series.anomaly", "text.classify"];
    let rules = tasks.map(|task| format!("[routing.task.\"{task}\"]\nprefer = \"cloud-only\"\ncache_s = 60\n"));
    let more = rules.concat() + &provider("openai-compatible", &cloud);
    let none = tempfile::tempdir().expect("a folder");
    let shipped = Daemon::start_with("shipped", &broker.url(), &more, &models_dir(), &[CLOUD_KEY]).await;
    let _bare = Daemon::start_with("bare", &broker.url(), &more, none.path(), &[CLOUD_KEY]).await;
    let mut client = Client::connect(&shipped.url).await;
    client.subscribe("answers/#").await;
    let photo = json!({"image": photo()});
    let labels = json!({"prompt": "Is the guard closed?", "labels": ["open", "closed"]});
    let manual = "If the lamp on the panel of station 7 blinks red, the guard is open: that is `stop`. ".repeat(80);
    let faq = json!({"prompt": manual, "labels": ["stop", "go"]});
    let note = json!({"text": "smoke from the gearbox of press 7, we have stopped it"});
    for (case, node, task, input, params) in [
        ("a note", "shipped", "text.classify", note.clone(), json!({})),
        ("a photo, 4000 × 3000, for a model that sees 28 × 28", "shipped", "image.classify", photo.clone(), json!({})),
        ("the same for no model", "bare", "image.classify", photo, labels),
        ("500 samples of a vibration", "shipped", "series.anomaly", series(500), json!({})),
        ("6000 samples of a vibration", "shipped", "series.anomaly", series(6000), json!({})),
        ("a note under a long instruction", "bare", "text.classify", note.clone(), faq.clone()),
        ("the same once more, with `cache_s`", "bare", "text.classify", note, faq),
    ] {
        let before = cloud.asked().len();
        let reply = client.ask(node, task, json!({"id": case, "input": input, "params": params})).await;
        assert_eq!(reply["by"]["tier"], "cloud", "{reply}");
        let asked = cloud.asked().split_off(before);
        let bodies: Vec<Value> = asked.iter().map(|asked| serde_json::from_slice(&asked.body).expect("JSON")).collect();
        let sent: Vec<_> = asked.iter().filter_map(|asked| asked.image.as_deref()).map(size).collect();
        let came = input["image"].as_str().map(|data| size(&STANDARD.decode(data).expect("base64")));
        println!("{}", json!({"case": case, "input": input, "bodies": bodies, "came": came, "sent": sent}));
    }
}
