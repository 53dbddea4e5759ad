//! Every way to a broker: TLS with a client certificate, WebSocket, user name and password.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::common::*;

/// mosquitto with one listener of these settings.
fn mosquitto(dir: &std::path::Path, port: u16, settings: &str) -> Process {
    let conf = dir.join("mosquitto.conf");
    // A second listener for the test's own plain client.
    std::fs::write(&conf, format!("per_listener_settings true\nuser root\nlistener {port} 127.0.0.1\n{settings}\n"))
        .expect("written");
    let mut command = Command::new("/usr/sbin/mosquitto");
    Process(command.arg("-c").arg(conf).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("mosquitto"))
}

struct Certificates {
    ca: String,
    server: (String, String),
    client: (String, String),
}

fn certificates() -> Certificates {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let ca_key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    // A name of its own: a leaf of the same name would look self-signed.
    params.distinguished_name.push(rcgen::DnType::CommonName, "the plant's authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).expect("signed").pem();
    let issuer = Issuer::new(params, ca_key);
    let signed = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        (params.signed_by(&key, &issuer).expect("signed").pem(), key.serialize_pem())
    };
    Certificates { ca, server: signed("localhost"), client: signed("press-7") }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_websocket_and_password() {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).expect("written");
        dir.path().join(name).display().to_string()
    };
    let made = certificates();
    let ca = write("ca.pem", &made.ca);
    let (cert, key) = (write("server.pem", &made.server.0), write("server.key", &made.server.1));
    let (client_cert, client_key) = (write("client.pem", &made.client.0), write("client.key", &made.client.1));
    let passwords = dir.path().join("passwords");
    let status = Command::new("mosquitto_passwd").args(["-b", "-c"]).arg(&passwords).args(["node", "s3cret"]).status();
    assert!(status.is_ok_and(|status| status.success()), "mosquitto_passwd");

    let rows = [
        (
            "mqtts://localhost",
            format!("allow_anonymous true\ncafile {ca}\ncertfile {cert}\nkeyfile {key}\nrequire_certificate true"),
            format!("ca_file = {ca:?}\ncert_file = {client_cert:?}\nkey_file = {client_key:?}\n"),
        ),
        ("ws://127.0.0.1", "allow_anonymous true\nprotocol websockets".to_owned(), String::new()),
        (
            "mqtt://127.0.0.1",
            format!("allow_anonymous false\npassword_file {}", passwords.display()),
            "username = \"node\"\npassword_credential = \"mqtt-password\"\n".to_owned(),
        ),
    ];
    for (scheme, settings, broker) in rows {
        let (port, plain) = (free_port(), free_port());
        let settings = format!("{settings}\nlistener {plain} 127.0.0.1\nallow_anonymous true");
        let _mosquitto = mosquitto(dir.path(), port, &settings);
        let url = format!("mqtt://127.0.0.1:{plain}");
        let env = [("MQTT_PASSWORD", "s3cret")];
        let daemon = Daemon::start_at("n", &url, &format!("{scheme}:{port}"), &broker, &models_dir(), &env).await;
        let mut client = Client::connect(&url).await;
        client.subscribe("answers/#").await;
        let reply = client.ask("n", "text.classify", json!({"input": {"text": "oil on the floor"}})).await;
        assert_eq!(reply["status"], "ok", "{scheme}: {reply}");
        assert!(!daemon.log().contains("s3cret"), "the password is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    std::fs::write(dir.path().join("passwords"), "").expect("written");
    let settings = format!("allow_anonymous false\npassword_file {}", dir.path().join("passwords").display());
    let _mosquitto = mosquitto(dir.path(), port, &settings);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let file = dir.path().join("outpost.toml");
    let text = format!(
        "[broker]\nurl = \"mqtt://node:hunter2@127.0.0.1:{port}\"\n[models]\ndir = {:?}\n[store]\ndir = {:?}\n",
        models_dir().display().to_string(),
        dir.path().display().to_string()
    );
    std::fs::write(&file, text).expect("written");
    let output =
        tokio::task::spawn_blocking(move || Command::new(OUTPOST).args(["check", "--config"]).arg(file).output())
            .await
            .expect("joined")
            .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("refused the user name or password"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}
