//! The JSON schema of an answer, and the reading of one: what does not fit is never passed on.

use serde::Deserialize;
use serde_json::{Value, json};

use super::wire::Said;
use super::{Question, Shape};
use crate::job::{Output, Ranked, Usage};

/// The schema of a shape; none for free text. Bounds are left out, for not every provider takes them:
/// [`read`] checks them.
pub fn of(shape: &Shape) -> Option<Value> {
    let object = |properties: Value, required: &[&str]| json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false});
    match shape {
        Shape::Classes { labels } => Some(object(
            json!({"label": {"type": "string", "enum": labels}, "confidence": {"type": "number"}}),
            &["label", "confidence"],
        )),
        Shape::Anomaly { .. } => Some(object(
            json!({"anomalous": {"type": "boolean"}, "score": {"type": "number"}, "confidence": {"type": "number"}}),
            &["anomalous", "score", "confidence"],
        )),
        Shape::Text => None,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Class {
    label: String,
    confidence: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Anomaly {
    anomalous: bool,
    score: f64,
    confidence: f64,
}

/// Reads what a model said. A text may be cut off, for its requester has set the limit; what has a schema may not.
///
/// # Errors
/// What is wrong with it, without quoting it.
pub fn read(question: &Question<'_>, said: &Said, usage: Usage) -> Result<Output, String> {
    let text = said.text.as_str();
    let sure = |confidence: f64| match (0.0..=1.0).contains(&confidence) {
        true => Ok(confidence),
        false => Err("its confidence is not within 0 to 1".to_owned()),
    };
    let prose = |_| "its answer is not of the shape asked for".to_owned();
    match &question.shape {
        Shape::Text if text.trim().is_empty() => Err("its answer is empty".to_owned()),
        Shape::Text => {
            let finish_reason = if said.cut_off { "length" } else { "stop" };
            Ok(Output::Text { text: text.to_owned(), finish_reason: finish_reason.to_owned(), usage })
        }
        _ if said.cut_off => Err("its answer was cut off".to_owned()),
        Shape::Classes { labels } => {
            let Class { label, confidence } = serde_json::from_str(text.trim()).map_err(prose)?;
            if !labels.contains(&label) {
                return Err("its label is none of those asked for".to_owned());
            }
            let confidence = sure(confidence)?;
            Ok(Output::Classes { top: vec![Ranked { label: label.clone(), confidence }], label, confidence })
        }
        Shape::Anomaly { threshold } => {
            let Anomaly { anomalous, score, confidence } = serde_json::from_str(text.trim()).map_err(prose)?;
            if !score.is_finite() || score < 0.0 || (score > *threshold) != anomalous {
                return Err("its score contradicts its verdict".to_owned());
            }
            Ok(Output::Anomaly { score, threshold: *threshold, anomalous, confidence: sure(confidence)? })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Input;

    #[test]
    fn nothing_but_the_shape_passes() {
        let input = Input::Text("x".to_owned()).into();
        let ask = |shape| Question {
            task: "t",
            instruction: "i",
            input: &input,
            shape,
            max_output_tokens: 9,
            picture_side: 256,
            plot: None,
        };
        let classes = || Shape::Classes { labels: vec!["a".to_owned(), "b".to_owned()] };
        let anomaly = || Shape::Anomaly { threshold: 1.0 };
        for (shape, text, good) in [
            (classes(), r#"{"label": "a", "confidence": 0.5}"#, true),
            (classes(), r#" {"label": "b", "confidence": 1} "#, true),
            (classes(), r#"{"label": "c", "confidence": 0.5}"#, false),
            (classes(), r#"{"label": "a", "confidence": 1.5}"#, false),
            (classes(), r#"{"label": "a"}"#, false),
            (classes(), r#"{"label": "a", "confidence": null}"#, false),
            (classes(), "a", false),
            (classes(), "Sure! The label is a.", false),
            (classes(), "", false),
            (anomaly(), r#"{"anomalous": true, "score": 2, "confidence": 0.9}"#, true),
            (anomaly(), r#"{"anomalous": false, "score": 2, "confidence": 0.9}"#, false),
            (anomaly(), r#"{"anomalous": false, "score": -1, "confidence": 0.9}"#, false),
            (Shape::Text, "hello", true),
            (Shape::Text, " ", false),
        ] {
            let found = read(&ask(shape), &Said::whole(text.to_owned()), Usage::default());
            assert_eq!(found.is_ok(), good, "{text:?} gave {found:?}");
        }
    }
}
