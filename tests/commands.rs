//! The commands as a person or a script meets them: output and exit status.

use std::process::{Command, Output};

use serde_json::Value;

use crate::common::*;

fn outpost(args: &[&str]) -> Output {
    Command::new(OUTPOST)
        .args(args)
        .env_remove("ANTHROPIC_API_KEY")
        .env_remove("OPENAI_API_KEY")
        .output()
        .expect("runs")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_demo_ends_well_and_labels_its_stand_in() {
    let demo = outpost(&["demo"]);
    let text = out(&demo);
    assert_eq!(demo.status.code(), Some(0), "{text}");
    assert!(text.contains("8 answered as expected"), "{text}");
    assert!(text.contains("cloud, stand-in (stand-in)"), "{text}");
    let json = outpost(&["demo", "--json"]);
    let replies: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(replies.as_array().map(Vec::len), Some(8), "{replies}");
}

#[test]
fn bad_usage_is_2() {
    for args in [&["dmo"][..], &["submit"], &["run", "--confg", "x"]] {
        assert_eq!(outpost(args).status.code(), Some(2), "{args:?}");
    }
    for command in ["demo", "run", "check", "submit", "models"] {
        assert_eq!(outpost(&[command, "--help"]).status.code(), Some(0), "{command}");
    }
}

#[test]
fn a_wrong_configuration_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("outpost.toml");
    std::fs::write(&file, "[broker]\nurll = \"mqtt://x\"\n").expect("written");
    let file = file.display().to_string();
    for args in [&["run", "--config", &file][..], &["check", "--config", &file]] {
        let output = outpost(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let text = out(&output) + &String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("broker.urll") && text.contains("`url`"), "{text}");
    }
    let missing = outpost(&["run", "--config", "/no/such/file"]);
    assert_eq!(missing.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_to_do() {
    let broker = Mosquitto::start();
    let cloud = standin().await;
    let check = |url: String, models: String, provider: String| async move {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("outpost.toml");
        let text = format!(
            "[broker]\nurl = \"{url}\"\n[models]\ndir = \"{models}\"\n[store]\ndir = {:?}\n{provider}",
            dir.path().display().to_string()
        );
        std::fs::write(&file, text).expect("written");
        tokio::task::spawn_blocking(move || {
            let file = file.display().to_string();
            let output =
                Command::new(OUTPOST).args(["check", "--config", &file]).env(CLOUD_KEY.0, CLOUD_KEY.1).output();
            drop(dir);
            output.expect("runs")
        })
        .await
        .expect("joined")
    };
    let models = models_dir().display().to_string();
    let good = check(broker.url(), models.clone(), provider("anthropic", &cloud)).await;
    let text = out(&good);
    assert_eq!(good.status.code(), Some(0), "{text}");
    for part in ["digits@1.0.0 answers image.classify", "accepts this node", "can be reached"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let away = format!("mqtt://127.0.0.1:{}", free_port());
    let bad = check(away, "/no/such/dir".to_owned(), String::new()).await;
    let text = out(&bad);
    assert_eq!(bad.status.code(), Some(1), "{text}");
    assert_eq!(text.matches("FAIL").count(), 2, "{text}");
    assert!(text.contains('→'), "{text}");
    assert!(!text.contains(CLOUD_KEY.1), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn submit_prints_the_reply() {
    let broker = Mosquitto::start();
    let _daemon = Daemon::start("n", &broker.url(), "").await;
    let url = broker.url();
    let submit = |args: Vec<String>| async {
        tokio::task::spawn_blocking(move || Command::new(OUTPOST).arg("submit").args(&args).output().expect("runs"))
            .await
            .expect("joined")
    };
    let base = |task: &str, more: &[&str]| {
        let mut args: Vec<String> = ["--broker", &url, "--to", "n", "--task", task].map(str::to_owned).to_vec();
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    };
    let png = sample_path("digit-2.png");
    let output = submit(base("image.classify", &["--set", "id=c7", "--json", &png])).await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let reply: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((reply["id"].as_str(), reply["output"]["label"].as_str()), (Some("c7"), Some("2")), "{reply}");
    let refused = submit(base("text.classify", &["--set", "deadline_ms=-1", &sample_path("note-soon.txt")])).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(out(&refused).contains("deadline_exceeded"), "{}", out(&refused));
    let silent = submit({
        let mut args = base("text.classify", &["--timeout", "1", &sample_path("note-soon.txt")]);
        args[3] = "nobody".to_owned();
        args
    })
    .await;
    assert_eq!(silent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&silent.stderr).contains("no reply"), "{silent:?}");
}
