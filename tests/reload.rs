//! SIGHUP: models and rules change without a restart; what cannot change is said.

use serde_json::json;

use crate::common::*;

/// A shipped package into a folder of packages.
fn add(name: &str, to: &std::path::Path) {
    crate::models::copy(&models_dir().join(name), &to.join(name));
}

#[tokio::test(flavor = "multi_thread")]
async fn models_and_rules_change_in_place() {
    let broker = Mosquitto::start();
    let models = tempfile::tempdir().expect("a folder");
    add("notes", models.path());
    let mut daemon = Daemon::start_with("n", &broker.url(), "", models.path(), &[]).await;
    let mut client = Client::connect(&broker.url()).await;
    client.subscribe("answers/#").await;
    let text = json!({"text": "smoke from the gearbox"});
    let job = |id: &str| json!({"id": id, "input": text});
    assert_eq!(client.ask("n", "text.classify", job("1")).await["status"], "ok");

    // Another model comes, and the first is damaged: it stays as it was.
    add("digits", models.path());
    std::fs::write(models.path().join("notes/labels.txt"), "only one\n").expect("written");
    let line = "\n[routing.task.\"image.classify\"]\nprefer = \"cloud-only\"\n[jobs]\nqueue = 9\n";
    let before = std::fs::read_to_string(daemon.config()).expect("read");
    std::fs::write(daemon.config(), format!("{before}{line}")).expect("written");
    daemon.signal("HUP");
    daemon.logs("reloaded").await;
    assert!(daemon.log().contains("jobs.queue"), "{}", daemon.log());
    assert!(daemon.log().contains("package refused"), "{}", daemon.log());
    let reply = client.ask("n", "text.classify", job("2")).await;
    assert_eq!(reply["by"]["model"], "notes@1.0.0", "{reply}");
    let png = json!({"image": base64(&sample("digit-2.png"))});
    let reply = client.ask("n", "image.classify", json!({"id": "3", "input": png})).await;
    assert_eq!(reply["status"], "error", "the new rule keeps it off the device, and there is no other way: {reply}");

    // A mistake changes nothing.
    std::fs::write(daemon.config(), format!("{before}\n[jobz]\n")).expect("written");
    daemon.signal("HUP");
    daemon.logs("not reloaded").await;
    assert_eq!(client.ask("n", "text.classify", job("4")).await["status"], "ok");

    // The rule and the first model are taken away.
    std::fs::write(daemon.config(), &before).expect("written");
    std::fs::remove_dir_all(models.path().join("notes")).expect("removed");
    let so_far = daemon.log().matches("reloaded").count();
    daemon.signal("HUP");
    while daemon.log().matches("reloaded").count() == so_far {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let reply = client.ask("n", "image.classify", json!({"id": "5", "input": png})).await;
    assert_eq!(reply["output"]["label"], "2", "{reply}");
    let reply = client.ask("n", "text.classify", job("6")).await;
    assert_eq!(reply["error"]["code"], "above_capability", "{reply}");
    assert_eq!(daemon.terminate().await, Some(0));
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}
