//! Job in: an MQTT message → a job with its reply address, or the fault that the requester is told.
//!
//! Nothing here knows the MQTT client; a [`Delivery`] is what it hands over.

use std::time::{Duration, Instant};

use crate::job::{Code, Fault, Input, Job, ReplyTo, When, Wishes};
use crate::topic::{JobTopic, Topics};

pub mod bare;
pub mod envelope;
pub mod input;
pub mod link;

/// Bytes that are kept of a payload over the limit: an envelope may say in them where to reply.
pub const HEAD: usize = 4096;

/// A job message, as it came.
#[derive(Debug, Clone, Default)]
pub struct Delivery {
    /// Topic that it was published to.
    pub topic: String,
    /// Payload; only its first [`HEAD`] bytes where `oversize` is set.
    pub payload: Vec<u8>,
    /// Length in bytes of a payload over the limit, which is not kept.
    pub oversize: Option<usize>,
    /// MQTT 5 Content Type.
    pub content_type: Option<String>,
    /// MQTT 5 Response Topic.
    pub response_topic: Option<String>,
    /// MQTT 5 Correlation Data.
    pub correlation: Option<Vec<u8>>,
    /// MQTT 5 Message Expiry Interval, what is left of it.
    pub expiry: Option<Duration>,
    /// MQTT 5 User Properties.
    pub properties: Vec<(String, String)>,
    /// When it came; none only in tests.
    pub received: Option<Instant>,
}

/// What acknowledges a delivery: its packet identifier, which means something on one connection only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// MQTT packet identifier.
    pub pkid: u16,
    /// The connection that delivered it, counted.
    pub generation: u64,
}

/// A message that has been read.
#[derive(Debug)]
pub struct Incoming {
    /// The requester's name for the job.
    pub id: Option<String>,
    /// Where the reply goes, or why it cannot go where the requester wants; that is the job's own fault
    /// where it cannot be read and names no address.
    pub reply_to: Result<ReplyTo, Fault>,
    /// The job, or what is wrong with it.
    pub job: Result<Job, Fault>,
}

/// How messages are read.
#[derive(Debug, Clone)]
pub struct Reader {
    /// This node's topics.
    pub topics: Topics,
    /// Patterns of allowed reply topics; none: anything outside the prefix and `$`.
    pub reply_to: Option<Vec<String>>,
    /// Largest payload, bytes.
    pub max_bytes: usize,
}

/// What an envelope or user properties say beside the input: as they came.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    id: Option<String>,
    reply_to: Option<String>,
    model: Option<String>,
    deadline_ms: Option<f64>,
    priority: Option<u64>,
    privacy: Option<crate::job::Privacy>,
    min_confidence: Option<f64>,
    max_cost_usd: Option<f64>,
    when: Option<String>,
    params: serde_json::Map<String, serde_json::Value>,
}

impl Reader {
    /// Reads a message. Never fails: what is wrong is part of what it gives back.
    pub fn read(&self, mut delivery: Delivery) -> Incoming {
        let Some(topic) = self.topics.parse(&delivery.topic) else {
            let fault = Fault::bad("topic", format!("`{}` is not a job topic", delivery.topic));
            return Incoming { id: None, reply_to: Err(fault.clone()), job: Err(fault) };
        };
        let received = delivery.received.unwrap_or_else(Instant::now);
        let (mut options, input) = match self.body(&topic, &mut delivery) {
            Ok((options, input)) => (options, Ok(input)),
            Err((options, fault)) => (options, Err(fault)),
        };
        let reply_to = self.address(&topic, &delivery, &options);
        if options.id.is_none() {
            options.id = topic.client.as_ref().map(|(_, id)| id.clone());
        }
        let reply_to = match (reply_to, &input) {
            (None, Err(fault)) => Err(fault.clone()),
            (None, Ok(_)) => Err(Fault::bad("reply_to", "the job names no reply address")),
            (Some(reply_to), _) => reply_to,
        };
        let id = options.id.clone();
        let job = input.and_then(|input| {
            let wishes = wishes(options, delivery.expiry, received)?;
            Ok(Job { id: id.clone(), task: topic.task, input: input.into(), wishes, received })
        });
        Incoming { id, reply_to, job }
    }

    /// Options and input. The options come even where the input is at fault: they say where to reply.
    fn body(&self, topic: &JobTopic, delivery: &mut Delivery) -> Result<(Options, Input), (Options, Fault)> {
        let content_type = delivery.content_type.as_deref().map(|text| text.split(';').next().unwrap_or(text).trim());
        let json = match content_type {
            None | Some("") => delivery.payload.trim_ascii_start().first() == Some(&b'{'),
            Some(named) => named.eq_ignore_ascii_case("application/json"),
        };
        let payload = std::mem::take(&mut delivery.payload);
        if let Some(length) = delivery.oversize {
            let message = format!("a payload of {length} bytes; at most {} are taken", self.max_bytes);
            let fault = Fault::new(Code::TooLarge, message).field("payload").limit(self.max_bytes);
            let options = match json {
                true => envelope::address(&payload),
                false => bare::options(&delivery.properties).unwrap_or_else(|(options, _)| options),
            };
            return Err((options, fault));
        }
        if json {
            return envelope::read(&payload);
        }
        let options = bare::options(&delivery.properties)?;
        let input = match content_type {
            None | Some("") => bare::by_task(&topic.task, payload),
            Some(named) => bare::by_content_type(&named.to_ascii_lowercase(), &topic.task, payload),
        };
        match input {
            Ok(input) => Ok((options, input)),
            Err(fault) => Err((options, fault)),
        }
    }

    /// Response Topic, else the envelope's `reply_to`, else the topic's CLIENT/ID; none where there is
    /// none of them.
    fn address(&self, topic: &JobTopic, delivery: &Delivery, options: &Options) -> Option<Result<ReplyTo, Fault>> {
        let (address, field) = match (&delivery.response_topic, &options.reply_to) {
            (Some(address), _) => (address, "response_topic"),
            (None, Some(address)) => (address, "reply_to"),
            (None, None) => {
                let topic = self.topics.client_reply(topic)?;
                return Some(Ok(ReplyTo { topic, correlation: None }));
            }
        };
        let allowed = self.topics.allow_reply(address, self.reply_to.as_deref());
        Some(match allowed {
            Ok(()) => Ok(ReplyTo { topic: address.clone(), correlation: delivery.correlation.clone() }),
            Err(why) => Err(Fault::bad(field, format!("no reply can be sent there: {why}"))),
        })
    }
}

/// Checks the options' ranges; the nearest deadline holds.
fn wishes(options: Options, expiry: Option<Duration>, received: Instant) -> Result<Wishes, Fault> {
    if options.id.as_ref().is_some_and(|id| id.len() > 256) {
        return Err(Fault::range("id", "the id is longer than 256 bytes", 256));
    }
    let deadline_ms = match options.deadline_ms {
        Some(ms) if !ms.is_finite() => return Err(Fault::bad("deadline_ms", "not a finite number")),
        Some(ms) if ms <= 0.0 => {
            let message = format!("the deadline of {ms} ms has passed already");
            return Err(Fault::new(Code::DeadlineExceeded, message).field("deadline_ms").limit(0));
        }
        // A year is as good as never, and keeps the arithmetic whole.
        ms => ms.map(|ms| Duration::from_secs_f64((ms / 1e3).min(31_536_000.0))),
    };
    let within = |field: &str, value: Option<f64>, most: f64| match value {
        Some(value) if !(0.0..=most).contains(&value) => {
            let message = format!("{value} is not within 0 to {most}");
            Err(Fault::range(field, message, most))
        }
        value => Ok(value),
    };
    let priority = options.priority.unwrap_or(5);
    if priority > 9 {
        return Err(Fault::range("priority", format!("{priority} is not within 0 to 9"), 9));
    }
    let when = match options.when.as_deref() {
        None | Some("best") => When::Best,
        Some("now-then-better") => When::NowThenBetter,
        Some(other) => {
            let message = format!("`{other}` is neither `best` nor `now-then-better`");
            return Err(Fault::bad("when", message).limit("best or now-then-better"));
        }
    };
    if let Some(top_k) = options.params.get("top_k")
        && !top_k.as_u64().is_some_and(|k| (1..=1000).contains(&k))
    {
        return Err(Fault::range("params.top_k", format!("{top_k} is not a number within 1 to 1000"), 1000));
    }
    Ok(Wishes {
        model: options.model,
        deadline: [deadline_ms, expiry].into_iter().flatten().min().map(|left| received + left),
        priority: priority as u8,
        privacy: options.privacy.unwrap_or(crate::job::Privacy::Cloud),
        min_confidence: within("min_confidence", options.min_confidence, 1.0)?,
        max_cost_usd: within("max_cost_usd", options.max_cost_usd, 1e6)?,
        when,
        params: options.params,
    })
}
