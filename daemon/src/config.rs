//! Configuration in two steps: the shape of the file, then a validated value. No I/O beyond reading.
//!
//! The file is TOML; `OUTPOST_SECTION__KEY` environment variables override it. Every mistake that
//! can be found is reported at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::job::Privacy;
use crate::keys::strict;
use crate::topic;

/// The default place of the configuration.
pub const DEFAULT_PATH: &str = "/etc/outpost/outpost.toml";

/// All settings, valid.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who this node is.
    pub node: Node,
    /// The way to the broker.
    pub broker: Broker,
    /// Models and what they may take.
    pub models: Models,
    /// Limits on jobs.
    pub jobs: Jobs,
    /// Rules for where a job may run.
    pub routing: Routing,
    /// Closed models.
    pub uplink: Uplink,
    /// What survives a crash lives here.
    pub store: PathBuf,
    /// Settings that are read and have no effect yet, each with a sentence saying so.
    pub notes: Vec<String>,
}

/// Who this node is.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// `[a-z0-9][a-z0-9-]{0,62}`.
    pub name: String,
    /// Groups whose jobs it shares.
    pub groups: Vec<String>,
}

/// The way to the broker.
#[derive(Debug, Clone, PartialEq)]
pub struct Broker {
    /// Where it is.
    pub at: BrokerAt,
    /// Whether anyone said so; where nobody did, `at` is the default.
    pub chosen: bool,
    /// First part of every topic.
    pub prefix: String,
    /// User name.
    pub username: Option<String>,
    /// Name of the credential that holds the password.
    pub password_credential: Option<String>,
    /// Certificate authority, PEM; the system's where absent.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Keep-alive.
    pub keep_alive: Duration,
    /// How long the broker keeps the session of a node that is away, in seconds.
    pub session_expiry_s: u32,
}

/// Where the broker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BrokerAt {
    /// `mqtt`, `mqtts`, `ws` or `wss`.
    Url(url::Url),
    /// The daemon is the broker as well, listening on this address.
    Embedded(std::net::SocketAddr),
}

/// Models and what they may take.
#[derive(Debug, Clone, PartialEq)]
pub struct Models {
    /// Folder of packages.
    pub dir: PathBuf,
    /// Memory for all loaded models together, bytes.
    pub memory: u64,
    /// Worker threads, at least 1.
    pub threads: usize,
}

/// Limits on jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct Jobs {
    /// Jobs admitted and not yet replied to; more are `overloaded`.
    pub queue: usize,
    /// Patterns of allowed reply topics; none: anything outside the prefix and `$`.
    pub reply_to: Option<Vec<String>>,
    /// Largest payload, bytes; more is `too_large`.
    pub max_bytes: usize,
    /// Window in which a job seen twice is answered once.
    pub remember: Duration,
}

/// Rules for where a job may run.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// The node's strictest rule.
    pub privacy: Privacy,
    /// Rules of single tasks.
    pub task: BTreeMap<String, TaskRule>,
}

/// One task's rule.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TaskRule {
    /// Which tier goes first, or alone.
    pub prefer: Prefer,
    /// The task's privacy.
    pub privacy: Option<Privacy>,
    /// Most that closed models may cost for this task in a day (UTC), US dollars; none: no limit.
    pub budget_usd_per_day: Option<f64>,
    /// How long a closed model's answer is given again to the same question, in seconds; 0: never.
    pub cache_s: u32,
}

/// Which tier goes first, or alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefer {
    /// The device first.
    #[default]
    Device,
    /// The cloud first.
    Cloud,
    /// Never up.
    DeviceOnly,
    /// Never on the device.
    CloudOnly,
}

/// Closed models.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Uplink {
    /// Providers in the order in which they are asked.
    pub providers: Vec<Provider>,
    /// Most that they may cost in a day (UTC), US dollars; none: no limit.
    pub budget_usd_per_day: Option<f64>,
    /// How long a job without a deadline is kept on disk while no provider can be reached; zero: it is
    /// answered as it stands.
    pub hold_offline: Duration,
    /// How long the first provider may take until the next one is asked beside it; none: never.
    pub hedge: Option<Duration>,
}

/// A wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Anthropic Messages.
    Anthropic,
    /// OpenAI Responses.
    Openai,
    /// Gemini generateContent.
    Gemini,
    /// OpenAI Chat Completions, as spoken by many others.
    OpenaiCompatible,
}

/// One provider.
#[derive(Debug, Clone, PartialEq)]
pub struct Provider {
    /// Its name here.
    pub name: String,
    /// Its wire format.
    pub kind: Kind,
    /// Where it is; the kind's public address where absent.
    pub base_url: Option<String>,
    /// Model to ask for.
    pub model: String,
    /// Name of the credential that holds its key.
    pub credential: Option<String>,
    /// US dollars for a million tokens read.
    pub usd_per_million_input_tokens: f64,
    /// US dollars for a million tokens written.
    pub usd_per_million_output_tokens: f64,
    /// US dollars for a million tokens read from the provider's prompt cache.
    pub usd_per_million_cached_tokens: f64,
    /// Requests that may be on their way at once, at least 1; more wait.
    pub concurrency: usize,
}

impl Provider {
    /// Requests on their way at once, where nothing is said.
    pub const CONCURRENCY: usize = 16;

    /// A provider that costs nothing and needs no credential, at the public address of its kind.
    pub fn new(name: &str, kind: Kind, model: &str) -> Self {
        Provider {
            name: name.to_owned(),
            kind,
            base_url: None,
            model: model.to_owned(),
            credential: None,
            usd_per_million_input_tokens: 0.0,
            usd_per_million_output_tokens: 0.0,
            usd_per_million_cached_tokens: 0.0,
            concurrency: Self::CONCURRENCY,
        }
    }
}

mod raw {
    use super::*;

    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct File {
        pub node: Node,
        pub broker: Broker,
        pub models: Models,
        pub jobs: Jobs,
        pub routing: Routing,
        pub uplink: Uplink,
        pub http: Http,
        pub store: Store,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Node {
        pub name: Option<String>,
        pub groups: Vec<String>,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Broker {
        pub url: Option<String>,
        pub listen: Option<String>,
        pub prefix: Option<String>,
        pub username: Option<String>,
        pub password_credential: Option<String>,
        pub ca_file: Option<PathBuf>,
        pub cert_file: Option<PathBuf>,
        pub key_file: Option<PathBuf>,
        pub keep_alive_s: Option<u16>,
        pub session_expiry_s: Option<u32>,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Models {
        pub dir: Option<PathBuf>,
        pub memory_mib: Option<f64>,
        pub threads: usize,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Jobs {
        pub queue: Option<usize>,
        pub reply_to: Option<Vec<String>>,
        pub max_bytes: Option<usize>,
        pub remember_s: Option<u64>,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Routing {
        pub privacy: Option<Privacy>,
        pub task: BTreeMap<String, TaskRule>,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Uplink {
        pub order: Option<Vec<String>>,
        pub budget_usd_per_day: Option<f64>,
        pub hold_offline_s: u32,
        pub hedge_ms: u32,
        pub provider: BTreeMap<String, Provider>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    pub struct Provider {
        pub kind: Kind,
        pub base_url: Option<String>,
        pub model: String,
        pub credential: Option<String>,
        #[serde(default)]
        pub usd_per_million_input_tokens: f64,
        #[serde(default)]
        pub usd_per_million_output_tokens: f64,
        pub usd_per_million_cached_tokens: Option<f64>,
        pub concurrency: Option<usize>,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Http {
        pub listen: Option<String>,
    }
    #[derive(Deserialize, Default)]
    #[serde(deny_unknown_fields, default)]
    pub struct Store {
        pub dir: Option<PathBuf>,
    }
}

/// Why a configuration cannot be used: every mistake found, a sentence each.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", path.display(), mistakes.join("; "))]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// The mistakes.
    pub mistakes: Vec<String>,
}

impl Config {
    /// Reads and validates `path`, with the process environment's overrides.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or holds mistakes; all of them are named.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let fail = |mistake: String| ConfigError { path: path.to_owned(), mistakes: vec![mistake] };
        let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
        Self::parse(&text, std::env::vars()).map_err(|mistakes| ConfigError { path: path.to_owned(), mistakes })
    }

    /// Validates `text` under `overrides` (`OUTPOST_SECTION__KEY`, value).
    ///
    /// # Errors
    /// Every mistake found, a sentence each.
    pub fn parse(text: &str, overrides: impl IntoIterator<Item = (String, String)>) -> Result<Self, Vec<String>> {
        let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| vec![error.to_string()])?;
        for (name, value) in overrides {
            if let Some(keys) = name.strip_prefix("OUTPOST_").filter(|keys| keys.contains("__")) {
                override_key(&mut table, &keys.to_lowercase(), value);
            }
        }
        validate(strict(table).map_err(|mistake| vec![mistake])?)
    }
}

/// Sets `a__b__c` in nested tables; the value is TOML where it parses as such, else a string.
fn override_key(table: &mut toml::Table, keys: &str, value: String) {
    let mut keys: Vec<&str> = keys.split("__").collect();
    let Some(last) = keys.pop() else { return };
    let mut inner = table;
    for key in keys {
        let next = inner.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        if !next.is_table() {
            *next = toml::Value::Table(toml::Table::new());
        }
        let toml::Value::Table(next) = next else { return };
        inner = next;
    }
    let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    inner.insert(last.to_owned(), parsed.unwrap_or(toml::Value::String(value)));
}

fn validate(file: raw::File) -> Result<Config, Vec<String>> {
    let mut wrong = Vec::new();
    let mut notes = Vec::new();

    let name = file.node.name.unwrap_or_else(host_name);
    for name in std::iter::once(&name).chain(&file.node.groups) {
        if !topic::is_name(name) {
            wrong.push(format!("node: `{name}` is not a name ([a-z0-9][a-z0-9-]{{0,62}})"));
        }
    }

    let prefix = file.broker.prefix.unwrap_or_else(|| "outpost".to_owned());
    if prefix.is_empty() || prefix.contains(['#', '+', '$']) || prefix.starts_with('/') {
        wrong.push(format!("broker.prefix: `{prefix}` cannot start a topic"));
    }
    let chosen = file.broker.url.is_some();
    let url = file.broker.url.unwrap_or_else(|| "mqtt://127.0.0.1:1883".to_owned());
    let at = broker_at(&url, file.broker.listen.as_deref(), &mut wrong);
    let identity = match (file.broker.cert_file, file.broker.key_file) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        _ => {
            wrong.push("broker: cert_file and key_file go together".to_owned());
            None
        }
    };
    let keep_alive = file.broker.keep_alive_s.unwrap_or(30);
    if keep_alive < 5 {
        wrong.push(format!("broker.keep_alive_s: {keep_alive} is under 5"));
    }

    let queue = file.jobs.queue.unwrap_or(1024);
    if !(1..=60_000).contains(&queue) {
        wrong.push(format!("jobs.queue: {queue} is not within 1 to 60000"));
    }
    let max_bytes = file.jobs.max_bytes.unwrap_or(4 << 20);
    if !(1..=64 << 20).contains(&max_bytes) {
        wrong.push(format!("jobs.max_bytes: {max_bytes} is not within 1 to {}", 64 << 20));
    }

    let mut providers = Vec::new();
    let order = file.uplink.order.unwrap_or_else(|| file.uplink.provider.keys().cloned().collect());
    for name in order {
        match file.uplink.provider.get(&name) {
            None => wrong.push(format!("uplink.order: no [uplink.provider.{name}]")),
            Some(p) => {
                if p.kind == Kind::OpenaiCompatible && p.base_url.is_none() {
                    wrong.push(format!("uplink.provider.{name}.base_url: needed for openai-compatible"));
                }
                if let Some(Err(error)) = p.base_url.as_deref().map(url::Url::parse) {
                    wrong.push(format!("uplink.provider.{name}.base_url: {error}"));
                }
                let (input, output) = (p.usd_per_million_input_tokens, p.usd_per_million_output_tokens);
                // Without a price of its own a cached token is counted as any other.
                let cached = p.usd_per_million_cached_tokens.unwrap_or(input);
                for usd in [input, output, cached] {
                    if !is_money(usd) {
                        wrong.push(format!("uplink.provider.{name}: a price of {usd} is not a price"));
                    }
                }
                let concurrency = p.concurrency.unwrap_or(Provider::CONCURRENCY);
                if !(1..=1024).contains(&concurrency) {
                    wrong.push(format!("uplink.provider.{name}.concurrency: {concurrency} is not within 1 to 1024"));
                }
                providers.push(Provider {
                    name,
                    kind: p.kind,
                    base_url: p.base_url.clone(),
                    model: p.model.clone(),
                    credential: p.credential.clone(),
                    usd_per_million_input_tokens: input,
                    usd_per_million_output_tokens: output,
                    usd_per_million_cached_tokens: cached,
                    concurrency,
                });
            }
        }
    }
    let memory_mib = file.models.memory_mib.unwrap_or(256.0);
    if !(memory_mib.is_finite() && memory_mib > 0.0) {
        wrong.push(format!("models.memory_mib: {memory_mib} is not over 0"));
    }
    let mut budget = |key: String, usd: Option<f64>| {
        if let Some(usd) = usd.filter(|usd| !is_money(*usd)) {
            wrong.push(format!("{key}: {usd} is not an amount of US dollars"));
        }
    };
    budget("uplink.budget_usd_per_day".to_owned(), file.uplink.budget_usd_per_day);
    let budgeted = file.uplink.budget_usd_per_day.is_some()
        || file.routing.task.values().any(|rule| rule.budget_usd_per_day.is_some());
    let free = |p: &&Provider| p.usd_per_million_input_tokens + p.usd_per_million_output_tokens == 0.0;
    for provider in providers.iter().filter(|_| budgeted).filter(free) {
        let name = &provider.name;
        notes.push(format!("uplink.provider.{name} has no prices: no budget counts what it costs"));
    }
    for (task, rule) in &file.routing.task {
        budget(format!("routing.task.\"{task}\".budget_usd_per_day"), rule.budget_usd_per_day);
    }
    if file.http.listen.is_some_and(|listen| !listen.is_empty()) {
        notes.push("http.listen is not served by this version".to_owned());
    }

    let config = Config {
        node: Node { name, groups: file.node.groups },
        broker: Broker {
            at,
            chosen,
            prefix,
            username: file.broker.username,
            password_credential: file.broker.password_credential,
            ca_file: file.broker.ca_file,
            identity,
            keep_alive: Duration::from_secs(keep_alive.into()),
            session_expiry_s: file.broker.session_expiry_s.unwrap_or(3600),
        },
        models: Models {
            dir: file.models.dir.unwrap_or_else(|| "/var/lib/outpost/models".into()),
            memory: (memory_mib * f64::from(1 << 20)) as u64,
            threads: match file.models.threads {
                0 => std::thread::available_parallelism().map_or(1, usize::from),
                threads => threads,
            },
        },
        jobs: Jobs {
            queue,
            reply_to: file.jobs.reply_to,
            max_bytes,
            remember: Duration::from_secs(file.jobs.remember_s.unwrap_or(3600)),
        },
        routing: Routing { privacy: file.routing.privacy.unwrap_or(Privacy::Cloud), task: file.routing.task },
        uplink: Uplink {
            providers,
            budget_usd_per_day: file.uplink.budget_usd_per_day,
            hold_offline: Duration::from_secs(file.uplink.hold_offline_s.into()),
            hedge: Some(Duration::from_millis(file.uplink.hedge_ms.into())).filter(|hedge| !hedge.is_zero()),
        },
        store: file.store.dir.unwrap_or_else(|| "/var/lib/outpost".into()),
        notes,
    };
    if wrong.is_empty() { Ok(config) } else { Err(wrong) }
}

/// Whether `usd` is an amount that can be counted.
fn is_money(usd: f64) -> bool {
    usd.is_finite() && (0.0..=1e9).contains(&usd)
}

fn broker_at(text: &str, listen: Option<&str>, wrong: &mut Vec<String>) -> BrokerAt {
    let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 1883));
    if text == "embedded" {
        return BrokerAt::Embedded(match listen.map(str::parse) {
            None => loopback,
            Some(Ok(address)) => address,
            Some(Err(_)) => {
                wrong.push("broker.listen: not an address and port, like 127.0.0.1:1883".to_owned());
                loopback
            }
        });
    }
    if listen.is_some() {
        wrong.push("broker.listen: only for url = \"embedded\"".to_owned());
    }
    match url::Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "mqtt" | "mqtts" | "ws" | "wss") && url.has_host() => {
            return BrokerAt::Url(url);
        }
        Ok(url) => wrong.push(format!(
            "broker.url: `{}://` with a host is needed as mqtt, mqtts, ws or wss (or \"embedded\")",
            url.scheme()
        )),
        Err(error) => wrong.push(format!("broker.url: {error}")),
    }
    BrokerAt::Embedded(loopback)
}

/// The host's name, made to fit the rule for names.
fn host_name() -> String {
    let host = hostname::get().unwrap_or_default().to_string_lossy().to_lowercase();
    let host = host.split('.').next().unwrap_or_default();
    let name: String = host.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    match name.trim_matches('-') {
        "" => "outpost".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Vec<String>> {
        Config::parse(text, [])
    }

    #[test]
    fn empty_file_is_all_defaults() {
        let config = parse("").expect("defaults are valid");
        assert_eq!(config.jobs.queue, 1024);
        assert_eq!(config.jobs.max_bytes, 4_194_304);
        assert_eq!(config.routing.privacy, Privacy::Cloud);
        assert_eq!(config.models.memory, 256 << 20);
    }

    #[test]
    fn memory_is_in_mib_and_may_be_a_part_of_one() {
        for (text, bytes) in [("64", 64 << 20), ("0.5", 1 << 19), ("1.25", 5 << 18)] {
            let config = parse(&format!("[models]\nmemory_mib = {text}")).expect("valid");
            assert_eq!(config.models.memory, bytes, "{text}");
            assert_eq!(config.notes, Vec::<String>::new());
        }
    }

    #[test]
    fn mistakes_name_the_key() {
        let rows = [
            ("[broker]\nurll = \"x\"", "broker.urll: unknown key; did you mean `url`?"),
            ("[nod]\nname = \"x\"", "nod: unknown key; did you mean `node`?"),
            ("[jobs]\nqueue = \"many\"", "jobs.queue: invalid type"),
            ("[jobs]\nqueue = 0", "jobs.queue: 0 is not within"),
            ("[models]\nmemory_mib = 0", "models.memory_mib: 0 is not over 0"),
            ("[models]\nmemory_mib = nan", "models.memory_mib: NaN is not over 0"),
            ("[node]\nname = \"Press 7\"", "`Press 7` is not a name"),
            ("[broker]\nurl = \"http://x\"", "broker.url: `http://`"),
            ("[uplink]\norder = [\"claude\"]", "no [uplink.provider.claude]"),
            ("[uplink]\nbudget_usd_per_day = -1.0", "uplink.budget_usd_per_day: -1 is not an amount"),
            ("[routing.task.\"x\"]\nbudget_usd_per_day = nan", "NaN is not an amount"),
            ("[uplink.provider.a]\nkind = \"gemini\"\nmodel = \"m\"\nconcurrency = 0", "concurrency: 0 is not within"),
            ("[routing.task.\"text.generate\"]\nprefer = \"moon\"", "prefer"),
        ];
        for (text, part) in rows {
            let mistakes = parse(text).expect_err(text).join("; ");
            assert!(mistakes.contains(part), "{text:?} gave {mistakes:?}");
        }
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let mistakes = parse("[jobs]\nqueue = 0\nmax_bytes = 0\n[broker]\nkeep_alive_s = 1").expect_err("three");
        assert_eq!(mistakes.len(), 3, "{mistakes:?}");
    }

    #[test]
    fn environment_overrides() {
        let set = [
            ("OUTPOST_BROKER__URL".to_owned(), "mqtt://10.0.0.1:1884".to_owned()),
            ("OUTPOST_JOBS__QUEUE".to_owned(), "7".to_owned()),
            ("OUTPOST_LOG".to_owned(), "debug".to_owned()),
        ];
        let config = Config::parse("[broker]\nurl = \"embedded\"", set).expect("valid");
        assert_eq!(config.jobs.queue, 7);
        assert!(matches!(config.broker.at, BrokerAt::Url(url) if url.port() == Some(1884)));
    }
}
