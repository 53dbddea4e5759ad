//! The JSON envelope of a job.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::Options;
use super::input::{picture, privacy, series};
use crate::job::{Fault, Input, TensorData, TensorInput};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    id: Option<String>,
    reply_to: Option<String>,
    input: RawInput,
    model: Option<String>,
    deadline_ms: Option<f64>,
    priority: Option<u64>,
    privacy: Option<String>,
    min_confidence: Option<f64>,
    max_cost_usd: Option<f64>,
    when: Option<String>,
    #[serde(default)]
    params: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInput {
    text: Option<String>,
    image: Option<String>,
    audio: Option<String>,
    series: Option<Vec<Row>>,
    tensor: Option<RawTensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: Option<String>,
    shape: Option<Vec<usize>>,
    data: RawData,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawData {
    Base64(String),
    Numbers(Vec<f64>),
}

/// A row of a series; a bare number is a row of one channel.
struct Row(Vec<f32>);

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RowVisitor;
        impl<'de> Visitor<'de> for RowVisitor {
            type Value = Row;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number or a row of numbers")
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Row, E> {
                Ok(Row(vec![value as f32]))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Row, E> {
                Ok(Row(vec![value as f32]))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Row, E> {
                Ok(Row(vec![value as f32]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Row, A::Error> {
                let mut row = Vec::with_capacity(seq.size_hint().unwrap_or(1));
                while let Some(value) = seq.next_element()? {
                    row.push(value);
                }
                Ok(Row(row))
            }
        }
        deserializer.deserialize_any(RowVisitor)
    }
}

/// Options and input of an envelope.
///
/// # Errors
/// The fault, beside what could be made out of the reply address.
pub fn read(payload: &[u8]) -> Result<(Options, Input), (Options, Fault)> {
    let mut json = serde_json::Deserializer::from_slice(payload);
    let parsed: Result<Envelope, _> = serde_path_to_error::deserialize(&mut json);
    let envelope = parsed
        .map_err(|error| {
            let path = error.path().to_string();
            // `?` stands for a place between fields.
            let path = path.trim_end_matches('?').trim_end_matches('.');
            let path = if path.is_empty() { "payload" } else { path };
            let inner = error.inner();
            if inner.is_data() {
                field_fault(path, plain(inner))
            } else {
                // Where reading stopped says more than a column does, for example at a NaN.
                Fault::bad(path, format!("not JSON: {inner}"))
            }
        })
        .and_then(|envelope| {
            json.end().map(|()| envelope).map_err(|error| Fault::bad("payload", format!("not JSON: {error}")))
        })
        .map_err(|fault| (address(payload), fault))?;
    let mut options = Options {
        id: envelope.id,
        reply_to: envelope.reply_to,
        model: envelope.model,
        deadline_ms: envelope.deadline_ms,
        priority: envelope.priority,
        privacy: None,
        min_confidence: envelope.min_confidence,
        max_cost_usd: envelope.max_cost_usd,
        when: envelope.when,
        params: envelope.params,
    };
    let finish = || Ok((envelope.privacy.as_deref().map(privacy).transpose()?, input(envelope.input)?));
    match finish() {
        Ok((privacy, input)) => {
            options.privacy = privacy;
            Ok((options, input))
        }
        Err(fault) => Err((options, fault)),
    }
}

/// serde names a missing field in its message only.
fn field_fault(path: &str, message: String) -> Fault {
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
    match (path, missing) {
        ("payload", Some(missing)) => Fault::bad(missing, "the field is missing"),
        (path, Some(missing)) => Fault::bad(&format!("{path}.{missing}"), "the field is missing"),
        (path, None) => Fault::bad(path, message),
    }
}

/// serde's message without the position, which means nothing to who reads the path.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_owned()
}

/// What is needed to answer an envelope that cannot be read, or not to its end: the id and the reply
/// address, as far as they come before the break.
pub fn address(payload: &[u8]) -> Options {
    struct Head<'a>(&'a mut Options);
    impl<'de> Visitor<'de> for Head<'_> {
        type Value = ();
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an envelope")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(key) = map.next_key::<String>()? {
                match key.as_str() {
                    "id" => self.0.id = map.next_value::<Value>()?.as_str().map(str::to_owned),
                    "reply_to" => self.0.reply_to = map.next_value::<Value>()?.as_str().map(str::to_owned),
                    _ => {
                        map.next_value::<de::IgnoredAny>()?;
                    }
                }
            }
            Ok(())
        }
    }
    let mut options = Options::default();
    // The error is why this is asked at all.
    let _ = serde_json::Deserializer::from_slice(payload).deserialize_map(Head(&mut options));
    options
}

fn input(raw: RawInput) -> Result<Input, Fault> {
    let decode = |field: &str, text: String| {
        STANDARD.decode(text).map_err(|error| Fault::bad(field, format!("not base64: {error}")))
    };
    match raw {
        RawInput { text: Some(text), image: None, audio: None, series: None, tensor: None } => Ok(Input::Text(text)),
        RawInput { text: None, image: Some(image), audio: None, series: None, tensor: None } => {
            picture(decode("input.image", image)?)
        }
        RawInput { text: None, image: None, audio: Some(audio), series: None, tensor: None } => {
            Ok(Input::Audio(decode("input.audio", audio)?))
        }
        RawInput { text: None, image: None, audio: None, series: Some(rows), tensor: None } => {
            series(rows.into_iter().map(|Row(row)| row).collect())
        }
        RawInput { text: None, image: None, audio: None, series: None, tensor: Some(tensor) } => {
            let data = match tensor.data {
                RawData::Base64(text) => TensorData::Bytes(decode("input.tensor.data", text)?),
                RawData::Numbers(numbers) => TensorData::Numbers(numbers),
            };
            Ok(Input::Tensor(TensorInput { dtype: tensor.dtype, shape: tensor.shape, data }))
        }
        _ => Err(Fault::bad("input", "exactly one of text, image, audio, series and tensor is needed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Code;

    #[test]
    fn series_rows_or_plain_numbers() {
        for (text, rows) in [
            (r#"{"input": {"series": [1, -2, 0.5]}}"#, vec![vec![1.0], vec![-2.0], vec![0.5]]),
            (r#"{"input": {"series": [[1, 2], [3, 4]]}}"#, vec![vec![1.0, 2.0], vec![3.0, 4.0]]),
        ] {
            assert_eq!(read(text.as_bytes()).expect("good").1, Input::Series(rows), "{text}");
        }
    }

    #[test]
    fn faults_name_the_field_and_keep_the_address() {
        for (text, field) in [
            (r#"{"id": "a", "reply_to": "r", "input": {"text": 5}}"#, "input.text"),
            (r#"{"id": "a", "reply_to": "r", "input": {"txt": "x"}}"#, "input.txt"),
            (r#"{"id": "a", "reply_to": "r", "input": {}}"#, "input"),
            (r#"{"id": "a", "reply_to": "r", "input": {"text": "x", "image": ""}}"#, "input"),
            (r#"{"id": "a", "reply_to": "r"}"#, "input"),
            (r#"{"id": "a", "reply_to": "r", "input": {"image": "@@"}}"#, "input.image"),
            (r#"{"id": "a", "reply_to": "r", "input": {"series": [[1], ["x"]]}}"#, "input.series[1][0]"),
            (r#"{"id": "a", "reply_to": "r", "input": {"series": [[1], [1e999]]}}"#, "input.series[1][0]"),
            (r#"{"id": "a", "reply_to": "r", "input": {"text": "x"}, "priority": -1}"#, "priority"),
            (r#"{"id": "a", "reply_to": "r", "input": {"text": "x"}, "privacy": "none"}"#, "privacy"),
            (r#"{"id": "a", "reply_to": "r", "input": {"text": "x"}, "deadline": 5}"#, "deadline"),
        ] {
            let (options, fault) = read(text.as_bytes()).expect_err(text);
            assert_eq!(fault.code, Code::BadRequest, "{text}");
            assert_eq!(fault.field.as_deref(), Some(field), "{text} gave {fault:?}");
            assert_eq!(options.id.as_deref(), Some("a"), "{text}");
            assert_eq!(options.reply_to.as_deref(), Some("r"), "{text}");
        }
    }

    #[test]
    fn an_envelope_cut_short_still_says_where_to_reply() {
        for (text, id, reply_to) in [
            (r#"{"id": "a", "reply_to": "r", "input": {"text": "x"#, Some("a"), Some("r")),
            (r#"{"reply_to": "r", "input": {"series": [NaN]}, "id": "a"}"#, None, Some("r")),
            (r#"{"id": 7, "reply_to": "r"}"#, None, Some("r")),
            ("[1]", None, None),
        ] {
            let options = address(text.as_bytes());
            assert_eq!((options.id.as_deref(), options.reply_to.as_deref()), (id, reply_to), "{text}");
        }
    }

    #[test]
    fn not_json_at_all() {
        for (text, field) in [
            ("{", "payload"),
            ("{]", "payload"),
            (r#"{"input": {"series": [NaN]}}"#, "input.series[0]"),
            (r#"{"input":{"text":"x"}} trailing"#, "payload"),
        ] {
            let (_, fault) = read(text.as_bytes()).expect_err(text);
            assert_eq!(fault.field.as_deref(), Some(field), "{text} gave {fault:?}");
            assert!(fault.message.starts_with("not JSON"), "{fault:?}");
        }
    }
}
