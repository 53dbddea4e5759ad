//! `outpost submit`: sends one job and prints its reply. Its [`Requester`] also serves the demo.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Packet, PublishProperties};
use rumqttc::v5::{AsyncClient, Event};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::config::{Broker, BrokerAt};
use crate::intake::{bare, link};
use crate::topic;

/// Arguments of `outpost submit`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Broker, like mqtt://127.0.0.1:1883
    #[arg(long, value_name = "URL")]
    broker: url::Url,
    /// Node or group
    #[arg(long, value_name = "NAME")]
    to: String,
    /// Task, like image.classify
    #[arg(long)]
    task: String,
    /// Content type [default: by the file's ending]
    #[arg(long, value_name = "T")]
    content_type: Option<String>,
    /// Option of the job, like privacy=device or deadline_ms=500; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = pair)]
    options: Vec<(String, String)>,
    /// Seconds to wait for the reply
    #[arg(long, value_name = "S", default_value_t = 30)]
    timeout: u64,
    /// First part of every topic
    #[arg(long, default_value = "outpost")]
    prefix: String,
    /// User name
    #[arg(long)]
    username: Option<String>,
    /// Environment variable that holds the password
    #[arg(long, value_name = "NAME")]
    password_credential: Option<String>,
    /// Certificate authority, PEM
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Print the reply as it came, on one line
    #[arg(long)]
    json: bool,
    /// Input, or `-` for standard input
    file: PathBuf,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("KEY=VALUE is needed")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Sends the job and prints its reply.
///
/// # Errors
/// The broker cannot be reached, or no reply comes in time.
pub async fn run(args: Args) -> Result<ExitCode> {
    if !topic::is_name(&args.to) {
        bail!("--to: `{}` is not a name ([a-z0-9][a-z0-9-]{{0,62}})", args.to);
    }
    let payload = if args.file.as_os_str() == "-" {
        tokio::task::spawn_blocking(|| {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes).map(|_| bytes)
        })
        .await?
        .context("standard input")?
    } else {
        tokio::fs::read(&args.file).await.with_context(|| args.file.display().to_string())?
    };
    let ending = args.file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    let content_type = args.content_type.clone().or_else(|| bare::content_type(ending).map(str::to_owned));
    let broker = Broker {
        at: BrokerAt::Url(args.broker.clone()),
        prefix: args.prefix.clone(),
        username: args.username,
        password_credential: args.password_credential,
        ca_file: args.ca_file,
        identity: None,
        keep_alive: Duration::from_secs(30),
        session_expiry_s: 0,
    };
    let wait = Duration::from_secs(args.timeout);
    let job = async {
        let requester = Requester::connect(&broker, &args.broker, &[]).await?;
        let topic = format!("{}/{}/jobs/{}", args.prefix, args.to, args.task);
        let job = Job { topic, payload, content_type, options: args.options };
        let early = |reply: &[u8]| {
            if let Err(error) = print(reply, args.json) {
                tracing::warn!("{error:#}");
            }
        };
        anyhow::Ok(requester.request_all(job.with_options()?, early).await?)
    };
    let reply = tokio::time::timeout(wait, job).await.with_context(|| {
        format!("no reply within {} s: is `{}` online at {}?", args.timeout, args.to, args.broker)
    })??;
    let reply = print(&reply, args.json)?;
    Ok(if reply["status"] == "error" { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn print(reply: &[u8], json: bool) -> Result<Value> {
    let Ok(value) = serde_json::from_slice::<Value>(reply) else {
        bail!("the reply is not JSON: {}", String::from_utf8_lossy(reply));
    };
    println!("{}", if json { value.to_string() } else { serde_json::to_string_pretty(&value)? });
    Ok(value)
}

/// Whether another reply to the same job follows this one.
fn more_to_come(reply: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Part {
        #[serde(rename = "final", default = "yes")]
        last: bool,
    }
    fn yes() -> bool {
        true
    }
    serde_json::from_slice::<Part>(reply).is_ok_and(|part| !part.last)
}

/// A job to be sent.
#[derive(Debug, Clone, Default)]
pub struct Job {
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
    /// MQTT 5 Content Type.
    pub content_type: Option<String>,
    /// MQTT 5 User Properties.
    pub options: Vec<(String, String)>,
}

impl Job {
    /// Puts the options where the payload has them: in an envelope, or in user properties.
    fn with_options(mut self) -> Result<Self> {
        if self.content_type.as_deref() == Some("application/json") && !self.options.is_empty() {
            let mut envelope: Value = serde_json::from_slice(&self.payload).context("the envelope is not JSON")?;
            let Some(object) = envelope.as_object_mut() else { bail!("the envelope is not a JSON object") };
            for (key, value) in self.options.drain(..) {
                let value = serde_json::from_str(&value).unwrap_or(Value::String(value));
                object.insert(key.replace('-', "_"), value);
            }
            self.payload = serde_json::to_vec(&envelope)?;
        }
        for (key, _) in &mut self.options {
            *key = key.replace('_', "-");
        }
        Ok(self)
    }
}

/// Replies awaited, by correlation data, or by topic for those without.
type Waiting = Arc<Mutex<HashMap<Vec<u8>, mpsc::Sender<Vec<u8>>>>>;

/// An MQTT 5 client that sends jobs and awaits their replies.
pub struct Requester {
    client: AsyncClient,
    response_topic: String,
    waiting: Waiting,
    task: tokio::task::JoinHandle<()>,
    next: std::sync::atomic::AtomicU64,
}

impl Requester {
    /// Connects and subscribes to its own response topic and to `also`.
    ///
    /// # Errors
    /// The broker cannot be reached or refuses.
    pub async fn connect(broker: &Broker, url: &url::Url, also: &[String]) -> Result<Self> {
        let unique = format!("{}-{}", std::process::id(), random());
        let mut options = link::options(broker, url, &format!("outpost-submit-{unique}"))?;
        options.set_clean_start(true);
        let (client, mut eventloop) = AsyncClient::new(options, 64);
        let response_topic = format!("outpost-submit/{unique}");
        let waiting: Waiting = Arc::default();
        loop {
            match eventloop.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    for filter in also.iter().chain([&response_topic]) {
                        client.try_subscribe(filter, QoS::AtLeastOnce)?;
                    }
                }
                Ok(Event::Incoming(Packet::SubAck(_))) => break,
                Ok(_) => {}
                Err(error) => bail!("{url}: {}", link::describe(&error)),
            }
        }
        let replies = Arc::clone(&waiting);
        let task = tokio::spawn(async move {
            loop {
                match eventloop.poll().await {
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        let correlation = publish.properties.and_then(|properties| properties.correlation_data);
                        let key = correlation.map_or_else(|| publish.topic.to_vec(), |data| data.to_vec());
                        let mut replies = replies.lock().unwrap_or_else(PoisonError::into_inner);
                        let reply = match more_to_come(&publish.payload) {
                            true => replies.get(&key).cloned(),
                            false => replies.remove(&key),
                        };
                        if let Some(reply) = reply {
                            // Who no longer waits needs no reply.
                            let _ = reply.try_send(publish.payload.to_vec());
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!("{}", link::describe(&error));
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        });
        Ok(Requester { client, response_topic, waiting, task, next: std::sync::atomic::AtomicU64::new(0) })
    }

    /// Sends a job with Response Topic and Correlation Data; its last reply.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn request(&self, job: Job) -> Result<Vec<u8>> {
        self.request_all(job, |_| {}).await
    }

    /// As [`Requester::request`]; `early` gets the replies that others follow.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn request_all(&self, job: Job, early: impl Fn(&[u8])) -> Result<Vec<u8>> {
        let correlation = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_be_bytes().to_vec();
        let mut replies = self.expect(correlation.clone());
        let properties = PublishProperties {
            response_topic: Some(self.response_topic.clone()),
            correlation_data: Some(correlation.into()),
            content_type: job.content_type,
            user_properties: job.options,
            ..PublishProperties::default()
        };
        self.client.publish_with_properties(job.topic, QoS::AtLeastOnce, false, job.payload, properties).await?;
        loop {
            let reply = replies.recv().await.context("the connection is gone")?;
            if !more_to_come(&reply) {
                return Ok(reply);
            }
            early(&reply);
        }
    }

    /// Sends a job as a device without MQTT 5 properties does; the reply comes on `reply_topic`.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn request_plain(&self, topic: String, payload: Vec<u8>, reply_topic: &str) -> Result<Vec<u8>> {
        let mut replies = self.expect(reply_topic.as_bytes().to_vec());
        self.client.publish(topic, QoS::AtLeastOnce, false, payload).await?;
        replies.recv().await.context("the connection is gone")
    }

    fn expect(&self, key: Vec<u8>) -> mpsc::Receiver<Vec<u8>> {
        // A first and a last reply, and some to spare.
        let (sender, receiver) = mpsc::channel(8);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(key, sender);
        receiver
    }
}

impl Drop for Requester {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// 64 bits that two processes will not share; the standard library seeds its hasher from the system.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
