//! The words of a question: instruction, rules of the answer, and the input as text or picture.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{Question, Shape};
use crate::job::Input;
use crate::task::image;

/// Rows of a series that are sent; a longer one is thinned out.
const ROWS: usize = 512;
/// Tokens that a picture takes at most, over the providers' own rules.
const IMAGE_TOKENS: u64 = 1600;

/// What every wire format wraps in its own way.
pub struct Parts {
    /// Instruction and input in words.
    pub text: String,
    /// Media type and base64 of a picture.
    pub image: Option<(&'static str, String)>,
}

/// Puts a question into words.
///
/// # Errors
/// The input is of a kind that cannot be sent.
pub fn parts(question: &Question<'_>) -> Result<Parts, String> {
    let head = format!("Task: {}\n{}\n\n{}", question.task, question.instruction, rules(&question.shape));
    match question.input {
        Input::Text(text) => Ok(Parts { text: format!("{head}\n\nInput:\n{text}"), image: None }),
        Input::Series(rows) => Ok(Parts { text: format!("{head}\n\n{}", table(rows)), image: None }),
        Input::Image(bytes) => match image::media_type(bytes) {
            Some(media_type) => Ok(Parts { text: head, image: Some((media_type, STANDARD.encode(bytes))) }),
            None => Err("the picture is neither a PNG nor a JPEG".to_owned()),
        },
        Input::Audio(_) | Input::Tensor(_) => {
            Err(format!("an input of the kind `{}` cannot be sent up by this version", question.input.kind()))
        }
    }
}

fn rules(shape: &Shape) -> String {
    match shape {
        Shape::Classes { labels } => format!(
            "Answer with exactly one of these labels and your confidence in it from 0 to 1: {}.",
            labels.join(", ")
        ),
        Shape::Anomaly { threshold } => format!(
            "Answer whether the series is anomalous, a score of 0 or more that is above {threshold} only if it is, \
             and your confidence from 0 to 1."
        ),
        Shape::Text => "Answer with the text alone.".to_owned(),
    }
}

/// A compact table: every n-th row, four digits a value.
fn table(rows: &[Vec<f32>]) -> String {
    let step = rows.len().div_ceil(ROWS).max(1);
    let mut text = format!("Input: {} rows in order of time", rows.len());
    if step > 1 {
        text += &format!(", of which every {step}th is shown");
    }
    for row in rows.iter().step_by(step) {
        text.push('\n');
        text += &row.iter().map(|value| short(*value)).collect::<Vec<_>>().join(",");
    }
    text
}

/// Four significant digits, without a tail of zeros.
fn short(value: f32) -> String {
    let magnitude = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let digits = (3 - magnitude).clamp(0, 8) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Tokens that the question takes, estimated from above: three bytes each, and a picture's most.
pub fn estimate_tokens(question: &Question<'_>) -> u64 {
    parts(question).map_or(0, |parts| parts.text.len() as u64 / 3 + 1 + parts.image.map_or(0, |_| IMAGE_TOKENS))
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn values_are_short() {
        for (value, text) in
            [(0.0, "0"), (1.0, "1"), (0.001_234_56, "0.001235"), (-12.5, "-12.5"), (123_456.0, "123456")]
        {
            assert_eq!(short(value), text);
        }
    }
}
