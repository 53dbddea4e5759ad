//! Bare inputs: the payload is the input, options come as MQTT 5 user properties.

use super::Options;
use super::input::{csv, picture, privacy, tensor, text};
use crate::job::{Fault, Input};

/// By the MQTT 5 Content Type, in lower case; plain text for a task about series is CSV.
///
/// # Errors
/// `bad_request` for a type that is not known, or a payload that is not of it.
pub fn by_content_type(content_type: &str, task: &str, payload: Vec<u8>) -> Result<Input, Fault> {
    match content_type {
        "text/plain" if task.starts_with("series.") => csv(&payload),
        "text/plain" => text(payload),
        "text/csv" => csv(&payload),
        "image/png" | "image/jpeg" => picture(payload),
        "audio/wav" | "audio/x-wav" | "audio/wave" => Ok(Input::Audio(payload)),
        "application/octet-stream" => Ok(tensor(payload)),
        "application/vnd.outpost+postcard" => {
            Err(Fault::bad("content_type", "postcard is not read by this version; send application/json"))
        }
        other => Err(Fault::bad("content_type", format!("`{other}` is not a type of job")).limit(
            "application/json, text/plain, text/csv, image/png, image/jpeg, audio/wav or application/octet-stream",
        )),
    }
}

/// By what the task takes, where no type is given.
///
/// # Errors
/// `bad_request` for a payload that is not of the task's kind.
pub fn by_task(task: &str, payload: Vec<u8>) -> Result<Input, Fault> {
    match task.split('.').next() {
        Some("image") => picture(payload),
        Some("series") => csv(&payload),
        Some("text") => text(payload),
        Some("audio") => Ok(Input::Audio(payload)),
        _ => Ok(tensor(payload)),
    }
}

/// By a file's ending, without its dot.
///
/// # Errors
/// `bad_request` for content that is not what the ending says.
pub fn by_ending(ending: &str, payload: Vec<u8>) -> Result<Input, Fault> {
    match ending {
        "txt" => text(payload),
        "csv" => csv(&payload),
        "png" | "jpg" | "jpeg" => picture(payload),
        "wav" => Ok(Input::Audio(payload)),
        "json" => super::envelope::read(&payload).map(|(_, input)| input).map_err(|(_, fault)| fault),
        _ => Ok(tensor(payload)),
    }
}

/// The content type that a file's ending stands for.
pub fn content_type(ending: &str) -> Option<&'static str> {
    match ending {
        "json" => Some("application/json"),
        "txt" => Some("text/plain"),
        "csv" => Some("text/csv"),
        "png" => Some("image/png"),
        "jpg" | "jpeg" => Some("image/jpeg"),
        "wav" => Some("audio/wav"),
        "bin" => Some("application/octet-stream"),
        _ => None,
    }
}

/// Options from user properties: the envelope's names with `-` for `_`. Others are left alone:
/// brokers and tracing add their own.
///
/// # Errors
/// `bad_request` naming the property, beside the options that say where to reply.
pub fn options(properties: &[(String, String)]) -> Result<Options, (Options, Fault)> {
    let find = |name: &str| properties.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let address = Options { id: find("id"), reply_to: find("reply-to"), ..Options::default() };
    others(properties, address.clone()).map_err(|fault| (address, fault))
}

fn others(properties: &[(String, String)], mut options: Options) -> Result<Options, Fault> {
    fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<Option<T>, Fault> {
        let wrong = |_| Fault::bad(&key.replace('-', "_"), format!("`{value}` is not a number that fits"));
        value.trim().parse().map(Some).map_err(wrong)
    }
    for (key, value) in properties {
        match key.as_str() {
            "model" => options.model = Some(value.clone()),
            "deadline-ms" => options.deadline_ms = number(key, value)?,
            "priority" => options.priority = number(key, value)?,
            "privacy" => options.privacy = Some(privacy(value)?),
            "min-confidence" => options.min_confidence = number(key, value)?,
            "max-cost-usd" => options.max_cost_usd = number(key, value)?,
            "when" => options.when = Some(value.clone()),
            "params" => {
                let wrong = |error| Fault::bad("params", format!("not a JSON object: {error}"));
                options.params = serde_json::from_str(value).map_err(wrong)?;
            }
            _ => {}
        }
    }
    Ok(options)
}
