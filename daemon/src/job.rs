//! What a job, a reply and their parts are, independent of how they travel.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Tasks that the program knows by itself; a model package may serve others too.
pub const TASKS: [&str; 9] = [
    "tensor.run",
    "image.classify",
    "image.detect",
    "audio.classify",
    "series.anomaly",
    "series.classify",
    "text.classify",
    "text.embed",
    "text.generate",
];

/// How far an input may travel. The order is the strictness: the smaller the stricter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Privacy {
    /// Never leaves the device.
    Device,
    /// May be sent to a cloud model.
    Cloud,
}

/// What a job asks about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// A line of text, UTF-8.
    Text(String),
    /// An encoded image, PNG or JPEG, as it came.
    Image(Vec<u8>),
    /// An encoded WAV file, as it came.
    Audio(Vec<u8>),
    /// Samples: rows are time, columns are channels; all rows have the same length.
    Series(Vec<Vec<f32>>),
    /// A tensor with its shape, or raw bytes in the model's own dtype and shape.
    Tensor(TensorInput),
}

impl Input {
    /// Bytes that it holds, roughly.
    pub fn bytes(&self) -> usize {
        match self {
            Input::Text(text) => text.len(),
            Input::Image(bytes) | Input::Audio(bytes) => bytes.len(),
            Input::Series(rows) => rows.len() * rows.first().map_or(0, Vec::len) * size_of::<f32>(),
            Input::Tensor(TensorInput { data: TensorData::Bytes(bytes), .. }) => bytes.len(),
            Input::Tensor(TensorInput { data: TensorData::Numbers(numbers), .. }) => numbers.len() * size_of::<f64>(),
        }
    }

    /// The word that names this kind in messages and packages.
    pub fn kind(&self) -> &'static str {
        match self {
            Input::Text(_) => "text",
            Input::Image(_) => "image",
            Input::Audio(_) => "audio",
            Input::Series(_) => "series",
            Input::Tensor(_) => "tensor",
        }
    }
}

/// A tensor as it came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorInput {
    /// Element type by its short name (`f32`, `i8`, `u8`, `i32`, `i64`); the model's own where absent.
    pub dtype: Option<String>,
    /// Dimensions; the model's own where absent.
    pub shape: Option<Vec<usize>>,
    /// The elements.
    pub data: TensorData,
}

/// A tensor's elements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum TensorData {
    /// Little-endian bytes.
    Bytes(Vec<u8>),
    /// Numbers of a JSON array.
    Numbers(Vec<f64>),
}

/// Where a reply goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyTo {
    /// Topic name.
    pub topic: String,
    /// MQTT 5 Correlation Data, returned byte for byte.
    pub correlation: Option<Vec<u8>>,
}

/// When the requester wants to hear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum When {
    /// Once: the best answer that can be had.
    #[default]
    Best,
    /// An uncertain answer of the device at once, and the better one when it comes.
    NowThenBetter,
}

/// What the requester asks for beside the input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wishes {
    /// One model by `name` or `name@version`.
    pub model: Option<String>,
    /// Moment after which an answer is worthless; it means nothing to another process.
    #[serde(skip)]
    pub deadline: Option<Instant>,
    /// 0 to 9, 9 first.
    pub priority: u8,
    /// The job's own privacy; node and task may only be stricter.
    pub privacy: Privacy,
    /// Confidence wanted, 0 to 1; the package's threshold where absent.
    pub min_confidence: Option<f64>,
    /// Most that the answer may cost, in US dollars.
    pub max_cost_usd: Option<f64>,
    /// When the requester wants to hear.
    pub when: When,
    /// The task's own parameters.
    #[serde(with = "as_text")]
    pub params: Map<String, Value>,
}

/// JSON within a format that does not tell its types: as text.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};
    use serde_json::{Map, Value};

    pub fn serialize<S: Serializer>(map: &Map<String, Value>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&serde_json::to_string(map).map_err(ser::Error::custom)?)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map<String, Value>, D::Error> {
        serde_json::from_str(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl Wishes {
    /// Number of labels to list, where the job says.
    pub fn top_k(&self) -> Option<usize> {
        self.params.get("top_k")?.as_u64().map(|k| k as usize)
    }
}

impl Default for Wishes {
    fn default() -> Self {
        Wishes {
            model: None,
            deadline: None,
            priority: 5,
            privacy: Privacy::Cloud,
            min_confidence: None,
            max_cost_usd: None,
            when: When::Best,
            params: Map::new(),
        }
    }
}

/// A job that is understood, though not yet admitted.
#[derive(Debug, Clone)]
pub struct Job {
    /// The requester's name for it, if it gave one.
    pub id: Option<String>,
    /// Task, as in the topic.
    pub task: String,
    /// What it asks about.
    pub input: Arc<Input>,
    /// How it wants to be treated.
    pub wishes: Wishes,
    /// When it came in.
    pub received: Instant,
}

/// Reply codes of the error replies; the names are a contract with requesters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Code {
    BadRequest,
    UnknownTask,
    UnknownModel,
    InputOutOfRange,
    TooLarge,
    AboveCapability,
    PrivacyForbids,
    BudgetExhausted,
    UplinkUnavailable,
    DeadlineExceeded,
    Overloaded,
    ShuttingDown,
    Internal,
}

/// Why a job has no answer, in words for the requester.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// The kind of failure.
    pub code: Code,
    /// One sentence; never a secret nor a provider's raw text.
    pub message: String,
    /// The field of the job that is at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The limit that it missed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<Value>,
}

impl Fault {
    /// A fault without field or limit.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Fault { code, message: message.into(), field: None, limit: None }
    }

    /// Names the field at fault.
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// States the limit that was missed.
    pub fn limit(mut self, limit: impl Into<Value>) -> Self {
        self.limit = Some(limit.into());
        self
    }

    /// Shorthand for the most usual one: a field that cannot be read.
    pub fn bad(field: &str, message: impl Into<String>) -> Self {
        Fault::new(Code::BadRequest, message).field(field)
    }

    /// A readable field whose value is outside a limit.
    pub fn range(field: &str, message: impl Into<String>, limit: impl Into<Value>) -> Self {
        Fault::new(Code::InputOutOfRange, message).field(field).limit(limit)
    }
}

/// One label with its probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// The label.
    pub label: String,
    /// Probability, 0 to 1.
    pub confidence: f64,
}

/// An answer; its shape depends on the task alone, not on who answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Output {
    /// `*.classify`.
    Classes {
        /// The best label.
        label: String,
        /// Its probability, 0 to 1.
        confidence: f64,
        /// The best few, best first.
        top: Vec<Ranked>,
    },
    /// `series.anomaly`.
    Anomaly {
        /// Reconstruction error; for a cloud model its own estimate on the same scale.
        score: f64,
        /// The score above which a series is anomalous.
        threshold: f64,
        /// Whether it is.
        anomalous: bool,
        /// How far the score is from the threshold, 0.5 to 1.
        confidence: f64,
    },
    /// `tensor.run`.
    Tensors {
        /// In the order of the model's outputs.
        tensors: Vec<TensorOutput>,
    },
    /// `text.embed`.
    Embedding {
        /// The vector.
        embedding: Vec<f32>,
    },
    /// `text.generate`.
    Text {
        /// What was written.
        text: String,
        /// `stop` or `length`.
        finish_reason: String,
        /// Tokens in and out.
        usage: Usage,
    },
}

impl Output {
    /// How sure the answer is, 0 to 1, where its kind can tell.
    pub fn confidence(&self) -> Option<f64> {
        match self {
            Output::Classes { confidence, .. } | Output::Anomaly { confidence, .. } => Some(*confidence),
            _ => None,
        }
    }
}

/// A tensor of a reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorOutput {
    /// Element type by its short name.
    pub dtype: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// The elements, row by row.
    pub data: Vec<f64>,
}

/// Tokens that an answer took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens read.
    pub input_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
}

/// Who answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "tier", rename_all = "lowercase")]
pub enum By {
    /// A model on the device.
    Device {
        /// `name@version`.
        model: String,
        /// Precision of the variant that ran.
        variant: String,
    },
    /// A closed model.
    Cloud {
        /// The provider's name in the configuration.
        provider: String,
        /// The model's name, as the provider reported it.
        model: String,
    },
}

/// Where a job was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// A model on the device.
    Device,
    /// A closed model.
    Cloud,
}

/// What came of trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// This is the answer.
    Answered,
    /// An answer, though under the threshold.
    Uncertain,
    /// Not tried, by rule or by estimate.
    Skipped,
    /// Tried in vain.
    Failed,
}

/// One station of a job's way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Station {
    /// Where.
    pub tier: Tier,
    /// Which provider, for the cloud.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// What came of it.
    pub outcome: Outcome,
    /// The reason, with the figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Milliseconds spent, by station.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Timing {
    /// Waiting for a worker.
    pub queued: f64,
    /// Preparation, model and reading of its output.
    pub device: f64,
    /// Calls to providers, retries included.
    pub cloud: f64,
    /// From arrival to the reply's encoding.
    pub total: f64,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There is an answer.
    Ok,
    /// There is none.
    Error,
}

/// What goes back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The job's own id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// How it ended.
    pub status: Status,
    /// The answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Fault>,
    /// Who answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<By>,
    /// Where it was tried, in order.
    pub route: Vec<Station>,
    /// The best that could be had, though it missed a wish.
    pub degraded: bool,
    /// Whether it is the last one on this id; only for jobs that asked for more than one.
    #[serde(rename = "final", default, skip_serializing_if = "Option::is_none")]
    pub last: Option<bool>,
    /// Where the time went.
    pub timing_ms: Timing,
    /// What it cost, in US dollars.
    pub cost_usd: f64,
}

impl Reply {
    /// As JSON. It is made of strings and numbers, so this cannot fail.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a reply is always JSON")
    }

    /// An error reply.
    pub fn error(id: Option<String>, fault: Fault, route: Vec<Station>, timing: Timing) -> Self {
        Reply {
            id,
            status: Status::Error,
            output: None,
            error: Some(fault),
            by: None,
            route,
            degraded: false,
            last: None,
            timing_ms: timing,
            cost_usd: 0.0,
        }
    }
}
