//! The node's retained status: what it is, what it serves, how it fares.

use serde::Serialize;

use crate::dispatch::Dispatch;
use crate::engine::{self, meter::mib};
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
    /// Instruction set of the integer kernels.
    pub kernels: &'static str,
    /// Memory of the loaded models.
    pub memory: Memory,
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
    pub variant: String,
    pub task: String,
    /// What runs it: an instruction set of ours, `tract`, or both.
    pub kernels: String,
    /// Whether it is in memory; if not, its next job loads it.
    pub loaded: bool,
    /// What it takes while it is loaded.
    pub memory_mib: f64,
    /// Shortest inference on prepared input when it was activated, microseconds.
    pub us: Option<f64>,
}

/// Memory of the loaded models.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// Taken now, MiB.
    pub used_mib: f64,
    /// `models.memory_mib`.
    pub limit_mib: f64,
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
        let shelf = &dispatch.registry.shelf;
        let model = |model: &std::sync::Arc<engine::Model>| ModelReport {
            model: model.id(),
            variant: model.variant_name().to_owned(),
            task: model.package.manifest.task.clone(),
            kernels: model.kernels.clone(),
            loaded: model.loaded().is_some(),
            memory_mib: mib(shelf.need(model)),
            us: model.measured_us(),
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
            kernels: engine::kernels(),
            memory: Memory { used_mib: mib(shelf.used()), limit_mib: mib(shelf.limit()) },
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
