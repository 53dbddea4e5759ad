//! The node's retained status: what it is, what it serves, how it fares.

use serde::Serialize;

use crate::dispatch::Dispatch;
use crate::engine;
use crate::reply::Message;
use crate::uplink::Account;

/// State of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Takes jobs.
    Online,
    /// Finishes what it has, takes no more.
    Draining,
    /// Gone; also the last will.
    Offline,
}

/// The status message.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Whether it takes jobs.
    pub state: State,
    /// Node.
    pub name: String,
    /// Version of the program.
    pub version: &'static str,
    /// Groups whose jobs it shares.
    pub groups: Vec<String>,
    /// Tasks that it answers on the device.
    pub tasks: Vec<String>,
    /// Models that are active.
    pub models: Vec<ModelReport>,
    /// Packages that are not, with the reason.
    pub refused: Vec<String>,
    /// SIMD features in use.
    pub simd: Vec<&'static str>,
    /// Jobs in hand.
    pub load: Load,
    /// Closed models.
    pub uplink: Vec<ProviderReport>,
    /// What they cost today, and what is left.
    pub cost: Account,
    /// Jobs on disk that wait for a provider to be there again.
    pub held: usize,
}

/// One active model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct ModelReport {
    pub model: String,
    pub variant: &'static str,
    pub task: String,
}

/// Jobs in hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Admitted, and the reply not yet accepted.
    pub jobs: usize,
    /// Waiting for a worker.
    pub waiting: usize,
    /// Workers that run a model.
    pub running: usize,
}

/// One provider.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProviderReport {
    /// Its name in the configuration.
    pub provider: String,
    /// Whether it can be asked.
    pub usable: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Report {
    /// The report of a node in `state`.
    pub fn new(state: State, name: &str, groups: &[String], dispatch: &Dispatch) -> Self {
        let model = |model: &std::sync::Arc<engine::Model>| ModelReport {
            model: model.id(),
            variant: model.variant.precision.as_str(),
            task: model.package.manifest.task.clone(),
        };
        let provider = |provider: &str| {
            let usable = dispatch.uplink.usable(provider);
            ProviderReport { provider: provider.to_owned(), usable: usable.is_ok(), why: usable.err() }
        };
        let (waiting, running) = dispatch.pool.load();
        Report {
            state,
            name: name.to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            groups: groups.to_vec(),
            tasks: dispatch.registry.tasks(),
            models: dispatch.registry.models().iter().map(model).collect(),
            refused: dispatch.registry.refused.iter().map(ToString::to_string).collect(),
            simd: engine::simd(),
            load: Load { jobs: dispatch.gate.jobs(), waiting, running },
            uplink: dispatch.uplink.names().map(provider).collect(),
            cost: dispatch.uplink.account(),
            held: dispatch.hold.len(),
        }
    }
}

/// The status of a node that is gone.
pub fn offline(topic: String, name: &str) -> Message {
    let json = serde_json::json!({"state": "offline", "name": name, "version": env!("CARGO_PKG_VERSION")});
    message(topic, json.to_string().into_bytes())
}

/// A retained status message.
pub fn message(topic: String, payload: Vec<u8>) -> Message {
    Message { topic, payload, correlation: None, retain: true }
}
