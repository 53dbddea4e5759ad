//! Fixtures: brokers, the daemon as a process of its own, MQTT clients, sample inputs.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outpost::standin::{self, Asked, Standin};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PublishProperties};
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

pub const OUTPOST: &str = env!("CARGO_BIN_EXE_outpost");

/// The binary that daemons are started from: `OUTPOST_BIN`, else the one just built.
pub fn binary() -> String {
    std::env::var("OUTPOST_BIN").unwrap_or_else(|_| OUTPOST.to_owned())
}

/// How long anything may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn models_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

pub fn sample(name: &str) -> Vec<u8> {
    std::fs::read(models_dir().join("train/samples").join(name)).expect(name)
}

pub fn sample_path(name: &str) -> String {
    models_dir().join("train/samples").join(name).display().to_string()
}

pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).expect("a free port").local_addr().expect("an address").port()
}

/// A process that ends with its test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// mosquitto, with sessions and retained messages on disk.
pub struct Mosquitto {
    pub port: u16,
    dir: TempDir,
    more: String,
    process: Option<Process>,
}

impl Mosquitto {
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// With more lines of configuration.
    pub fn start_with(more: &str) -> Self {
        let dir = TempDir::new().expect("a folder");
        let mut broker = Mosquitto { port: free_port(), dir, more: more.to_owned(), process: None };
        broker.restart();
        broker
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    pub fn restart(&mut self) {
        self.stop();
        let conf = self.dir.path().join("mosquitto.conf");
        let text = format!(
            "listener {} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\npersistence true\npersistence_location {}/\n\
             max_queued_messages 0\nlog_type error\nuser root\n{}\n",
            self.port,
            self.dir.path().display(),
            self.more
        );
        std::fs::write(&conf, text).expect("written");
        let child = Command::new("/usr/sbin/mosquitto")
            .arg("-c")
            .arg(&conf)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto is installed");
        self.process = Some(Process(child));
        wait_for_port(self.port);
    }

    /// Stops in good order, so that sessions are saved.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            signal(&process.0, "TERM");
            process.0.wait().expect("it ends");
        }
    }
}

pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{name}");
}

fn wait_for_port(port: u16) {
    let started = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(started.elapsed() < PATIENCE, "nothing listens on {port}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A daemon of its own process, with its configuration and store.
pub struct Daemon {
    pub name: String,
    pub url: String,
    pub dir: TempDir,
    env: Vec<(String, String)>,
    process: Option<Process>,
}

impl Daemon {
    /// Starts `name` at the broker `url` with `more` configuration, and waits until it is online.
    pub async fn start(name: &str, url: &str, more: &str) -> Self {
        Self::start_with(name, url, more, &models_dir(), &[]).await
    }

    /// As [`Daemon::start`], in these groups.
    pub async fn start_in(name: &str, url: &str, groups: &[&str]) -> Self {
        Self::start(name, url, &format!("[node]\ngroups = {groups:?}\n")).await
    }

    pub async fn start_with(name: &str, url: &str, more: &str, models: &Path, env: &[(&str, &str)]) -> Self {
        if url == "embedded" {
            let port = free_port();
            let url = format!("mqtt://127.0.0.1:{port}");
            let more = format!("listen = \"127.0.0.1:{port}\"\n{more}");
            return Self::start_at(name, &url, "embedded", &more, models, env).await;
        }
        Self::start_at(name, url, url, more, models, env).await
    }

    /// Starts `name`, which reaches its broker at `at`; the test reaches the same one at `url`. `more`
    /// goes on with the section `[broker]`.
    pub async fn start_at(name: &str, url: &str, at: &str, more: &str, models: &Path, env: &[(&str, &str)]) -> Self {
        let mut daemon = Self::prepare_at(name, url, at, more, models, env);
        daemon.restart().await;
        daemon
    }

    /// Writes its configuration; [`Daemon::spawn`] starts it.
    pub fn prepare(name: &str, url: &str, more: &str, models: &Path, env: &[(&str, &str)]) -> Self {
        Self::prepare_at(name, url, url, more, models, env)
    }

    fn prepare_at(name: &str, url: &str, at: &str, more: &str, models: &Path, env: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().expect("a folder");
        let text = format!(
            "[models]\ndir = {:?}\n[store]\ndir = {:?}\n[broker]\nurl = {at:?}\n{more}",
            models.display().to_string(),
            dir.path().join("store").display().to_string(),
        );
        std::fs::write(dir.path().join("outpost.toml"), text).expect("written");
        let mut env: Vec<_> = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        env.push(("OUTPOST_NODE__NAME".to_owned(), name.to_owned()));
        Daemon { name: name.to_owned(), url: url.to_owned(), dir, env, process: None }
    }

    /// Its configuration, its log and its store.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("outpost.toml")
    }

    pub fn port(&self) -> u16 {
        self.url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    /// Starts the process and waits until its retained status says online.
    pub async fn restart(&mut self) {
        self.spawn();
        self.online().await;
    }

    pub fn spawn(&mut self) {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        let child = Command::new(binary())
            .args(["run", "--config"])
            .arg(self.config())
            .envs(self.env.iter().map(|(key, value)| (key, value)))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("it starts");
        self.process = Some(Process(child));
    }

    pub async fn online(&mut self) {
        let started = Instant::now();
        loop {
            let ended = self.process.as_mut().and_then(|process| process.0.try_wait().ok().flatten());
            assert!(ended.is_none() && started.elapsed() < PATIENCE, "not online: {ended:?}\n{}", self.log());
            if std::net::TcpStream::connect(("127.0.0.1", self.port())).is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut client = Client::connect(&self.url).await;
        client.subscribe(&format!("outpost/{}/status", self.name)).await;
        loop {
            let message = client.next_within(PATIENCE.saturating_sub(started.elapsed())).await;
            match message {
                Some(message) if message.json()["state"] == "online" => return,
                Some(_) => {}
                None => panic!("not online\n{}", self.log()),
            }
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.0.kill().expect("killed");
            process.0.wait().expect("ended");
        }
    }

    /// SIGTERM; its exit status.
    pub async fn terminate(&mut self) -> Option<i32> {
        let mut process = self.process.take().expect("running");
        signal(&process.0, "TERM");
        tokio::task::spawn_blocking(move || process.0.wait().expect("ended").code()).await.expect("joined")
    }

    /// Waits until its log has `text`.
    pub async fn logs(&self, text: &str) {
        let started = Instant::now();
        while !self.log().contains(text) {
            assert!(started.elapsed() < PATIENCE, "{text} is not in\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, name: &str) {
        signal(&self.process.as_ref().expect("running").0, name);
    }

    /// Resident memory now, KiB.
    pub fn rss_kib(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// Most resident memory so far, KiB.
    pub fn peak_kib(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, key: &str) -> u64 {
        let pid = self.process.as_ref().expect("running").0.id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
        let line = status.lines().find(|line| line.starts_with(key)).expect("its memory");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    }
}

/// A message that came.
#[derive(Debug, Clone)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub correlation: Option<Vec<u8>>,
    pub content_type: Option<String>,
}

impl Message {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// An MQTT 5 client that is not ours.
pub struct Client {
    pub client: AsyncClient,
    messages: mpsc::Receiver<Message>,
    suback: mpsc::Receiver<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    pub async fn connect(url: &str) -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let port = url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
        let mut options = MqttOptions::new(format!("test-{}-{number}", std::process::id()), "127.0.0.1", port);
        options.set_max_packet_size(Some(200 << 20)).set_clean_start(false);
        options.set_session_expiry_interval(Some(600));
        options.set_keep_alive(Duration::from_secs(60));
        let mut network = options.network_options();
        network.set_tcp_nodelay(true);
        options.set_network_options(network);
        let (client, mut eventloop) = AsyncClient::new(options, 4096);
        let (sender, messages) = mpsc::channel(65_536);
        let (subscribed, suback) = mpsc::channel(16);
        let task = tokio::spawn(async move {
            loop {
                match eventloop.poll().await {
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        let properties = publish.properties.unwrap_or_default();
                        let message = Message {
                            topic: String::from_utf8_lossy(&publish.topic).into_owned(),
                            payload: publish.payload.to_vec(),
                            correlation: properties.correlation_data.map(|data| data.to_vec()),
                            content_type: properties.content_type,
                        };
                        if sender.try_send(message).is_err() {
                            return;
                        }
                    }
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = subscribed.try_send(());
                    }
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
        Client { client, messages, suback, task }
    }

    pub async fn subscribe(&mut self, filter: &str) {
        self.client.subscribe(filter, QoS::AtLeastOnce).await.expect("subscribes");
        tokio::time::timeout(PATIENCE, self.suback.recv()).await.expect("a suback");
    }

    pub async fn next_within(&mut self, limit: Duration) -> Option<Message> {
        tokio::time::timeout(limit, self.messages.recv()).await.ok().flatten()
    }

    pub async fn next(&mut self) -> Message {
        self.next_within(PATIENCE).await.expect("a message in time")
    }

    pub async fn publish(&self, topic: &str, payload: impl Into<Vec<u8>>, properties: PublishProperties) {
        let payload: Vec<u8> = payload.into();
        self.client
            .publish_with_properties(topic, QoS::AtLeastOnce, false, payload, properties)
            .await
            .expect("publishes");
    }

    /// Sends an envelope and awaits its reply on `answers/ID`, which must be subscribed to.
    pub async fn ask(&mut self, node: &str, task: &str, mut envelope: Value) -> Value {
        let id = envelope["id"].as_str().unwrap_or("one").to_owned();
        envelope["id"] = json!(id);
        envelope["reply_to"] = json!(format!("answers/{id}"));
        self.publish(&format!("outpost/{node}/jobs/{task}"), envelope.to_string(), PublishProperties::default()).await;
        loop {
            let message = self.next().await;
            if message.topic == format!("answers/{id}") {
                return message.json();
            }
        }
    }
}

/// Properties of a bare job.
pub fn bare(
    content_type: Option<&str>,
    response_topic: &str,
    correlation: &str,
    options: &[(&str, &str)],
) -> PublishProperties {
    PublishProperties {
        content_type: content_type.map(str::to_owned),
        response_topic: Some(response_topic.to_owned()),
        correlation_data: Some(correlation.as_bytes().to_vec().into()),
        user_properties: options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..PublishProperties::default()
    }
}

/// A stand-in that gives every question the first label with full confidence.
pub async fn standin() -> Standin {
    Standin::start(first_label).await.expect("a stand-in")
}

pub fn first_label(asked: &Asked) -> Value {
    match asked.schema.as_ref().map(|schema| &schema["properties"]) {
        None => json!("a text"),
        Some(properties) if properties["label"].is_object() => {
            json!({"label": properties["label"]["enum"][0], "confidence": 1.0})
        }
        Some(_) => json!({"anomalous": true, "score": 1e9, "confidence": 1.0}),
    }
}

/// Configuration of one provider `cloud` of this kind at the stand-in; its key is in `CLOUD_KEY`.
pub fn provider(kind: &str, standin: &Standin) -> String {
    let path = if matches!(kind, "anthropic" | "gemini") { "" } else { "/v1" };
    format!(
        "[uplink.provider.cloud]\nkind = \"{kind}\"\nbase_url = \"{}{path}\"\nmodel = \"big\"\ncredential = \"cloud-key\"\n\
         usd_per_million_input_tokens = 3.0\nusd_per_million_output_tokens = 15.0\n",
        standin.url()
    )
}

pub const CLOUD_KEY: (&str, &str) = ("CLOUD_KEY", standin::KEY);
