//! The words of a question: instruction, rules of the answer, and the input as text, picture or sound.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{Question, Shape, picture, plot};
use crate::job::Input;

/// Rows of a series that a table has; of a longer one that cannot be plotted it has every n-th.
const ROWS: usize = 512;
/// A beginning of so many bytes is worth caching: about the 1024 tokens from which providers cache.
const CACHEABLE: usize = 4096;
/// Tokens that a provider may add around a question: roles, and the rules of structured output.
const AROUND: u64 = 400;

/// What every wire format wraps in its own way. What all questions of a task share comes first.
#[derive(Debug)]
pub struct Parts {
    /// Task, instruction and rules: the same for every question of a task.
    pub head: String,
    /// The input in words; none where it is a picture or a sound.
    pub text: Option<String>,
    /// Media type and base64 of a picture.
    pub image: Option<(&'static str, String)>,
    /// Media type and base64 of a sound.
    pub audio: Option<(&'static str, String)>,
}

impl Parts {
    /// All words in one text.
    pub fn in_words(&self) -> String {
        match &self.text {
            Some(text) => format!("{}{text}", self.head),
            None => self.head.clone(),
        }
    }

    /// Whether the beginning is long enough for a provider's prompt cache.
    pub fn cacheable(&self) -> bool {
        self.head.len() >= CACHEABLE
    }
}

/// Whether a series is sent as a plot: as the package says, else where a table would leave rows out.
fn is_plotted(question: &Question<'_>, rows: &[Vec<f32>]) -> bool {
    let channels = rows.first().map_or(0, Vec::len);
    (1..=plot::CHANNELS).contains(&channels) && question.plot.unwrap_or(rows.len() > ROWS)
}

/// Puts a question into words. Scales or draws a picture, which may take some milliseconds.
///
/// # Errors
/// The input is of a kind that cannot be sent, or is broken.
pub fn parts(question: &Question<'_>) -> Result<Parts, String> {
    let mut parts = Parts { head: head(question), text: None, image: None, audio: None };
    match &**question.input {
        Input::Text(text) => parts.text = Some(format!("Input:\n{text}")),
        Input::Series(rows) if is_plotted(question, rows) => {
            parts.text = Some(plot::legend(rows));
            parts.image = Some(("image/png", STANDARD.encode(plot::draw(rows)?)));
        }
        Input::Series(rows) => parts.text = Some(table(rows)),
        Input::Image(bytes) => {
            let (media_type, bytes) = picture::fit(bytes, question.picture_side)?;
            parts.image = Some((media_type, STANDARD.encode(bytes)));
        }
        Input::Audio(bytes) => parts.audio = Some(("audio/wav", STANDARD.encode(bytes))),
        Input::Tensor(_) => return Err(unsendable(question)),
    }
    if parts.text.is_some() {
        parts.head += "\n\n";
    }
    Ok(parts)
}

/// Whether [`parts`] takes so long that it should not be done on a thread of the runtime.
pub fn is_work(question: &Question<'_>) -> bool {
    match &**question.input {
        Input::Image(bytes) => picture::is_larger(bytes, question.picture_side),
        Input::Series(rows) => is_plotted(question, rows),
        _ => false,
    }
}

fn unsendable(question: &Question<'_>) -> String {
    format!("an input of the kind `{}` cannot be sent up", question.input.kind())
}

/// Whether the input is of a kind that can be sent.
///
/// # Errors
/// In words, why not.
pub fn sendable(question: &Question<'_>) -> Result<(), String> {
    if matches!(**question.input, Input::Tensor(_)) { Err(unsendable(question)) } else { Ok(()) }
}

fn head(question: &Question<'_>) -> String {
    format!("Task: {}\n{}\n\n{}", question.task, question.instruction, rules(&question.shape))
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

fn step(rows: usize) -> usize {
    rows.div_ceil(ROWS).max(1)
}

/// A compact table: every n-th row, four digits a value.
fn table(rows: &[Vec<f32>]) -> String {
    let step = step(rows.len());
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

/// Four significant digits, without a tail of zeros; with an exponent where that is shorter.
fn short(value: f32) -> String {
    let magnitude = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    if !(-4..=5).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let digits = (3 - magnitude).clamp(0, 8) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Tokens of a text, from above: two letters or blanks make at least one, any other byte may be one.
fn tokens(text: &str) -> u64 {
    let plain = text.bytes().filter(|byte| byte.is_ascii_alphabetic() || *byte == b' ').count() as u64;
    plain / 2 + (text.len() as u64 - plain) + 1
}

/// Tokens that the question takes, estimated from above, without putting it into words.
pub fn estimate_tokens(question: &Question<'_>) -> u64 {
    let labels = match &question.shape {
        // In the rules, and again in the schema.
        Shape::Classes { labels } => labels.iter().map(|label| 2 * (tokens(label) + 3)).sum(),
        _ => 0,
    };
    let input = match &**question.input {
        Input::Text(text) => tokens(text),
        Input::Series(rows) if is_plotted(question, rows) => {
            let channels = rows[0].len();
            picture::tokens(plot::size(channels)) + 100 + 60 * channels as u64
        }
        Input::Series(rows) => {
            let shown = rows.len().div_ceil(step(rows.len())) as u64;
            // A sign, a point, four digits, a comma and an exponent at times.
            shown * rows.first().map_or(0, |row| row.len() as u64) * 8 + 32
        }
        Input::Image(bytes) => picture::tokens(picture::fitted_size(bytes, question.picture_side)),
        // The densest count is 32 tokens a second, the thinnest file 8000 bytes a second.
        Input::Audio(bytes) => bytes.len() as u64 / 250 + 1,
        Input::Tensor(_) => 0,
    };
    AROUND + tokens(question.task) + tokens(question.instruction) + labels + input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.001_234_56, "0.001235"),
            (-12.5, "-12.5"),
            (123_456.0, "123456"),
            (1.234_56e9, "1.235e9"),
            (-1e-7, "-1.000e-7"),
            (f32::MAX, "3.403e38"),
        ] {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn a_series_is_plotted_where_a_table_would_leave_rows_out() {
        for (rows, channels, plot, plotted) in [
            (512, 3, None, false),
            (513, 3, None, true),
            (100_000, 8, None, true),
            (100_000, 9, None, false),
            (513, 1, Some(false), false),
            (3, 1, Some(true), true),
            (3, 9, Some(true), false),
        ] {
            let input = Input::Series(vec![vec![1.0; channels]; rows]).into();
            let (task, instruction, shape) = ("t", "i", Shape::Text);
            let question =
                Question { task, instruction, input: &input, shape, max_output_tokens: 9, picture_side: 512, plot };
            let parts = parts(&question).expect("words");
            let text = parts.text.expect("a legend or a table");
            assert_eq!(parts.image.is_some(), plotted, "{rows} rows of {channels}, {plot:?}");
            assert_eq!(text.lines().count() > 100, !plotted && rows > 100, "{text}");
        }
    }

    /// The whole text never has more tokens than estimated, even if every third byte were one.
    #[test]
    fn the_estimate_is_from_above() {
        let wave = |channels: usize| Input::Series((0..900).map(|i| vec![-0.123_45 * i as f32; channels]).collect());
        let labels = vec!["urgent".to_owned(), "later".to_owned()];
        for (input, shape, plot) in [
            (Input::Text("oil on the floor, 35 °C, 日本語".repeat(20)), Shape::Classes { labels }, None),
            (wave(1), Shape::Anomaly { threshold: 1.5 }, Some(false)),
            (wave(1), Shape::Anomaly { threshold: 1.5 }, None),
            (wave(3), Shape::Text, Some(false)),
            (wave(plot::CHANNELS), Shape::Text, None),
            (wave(plot::CHANNELS + 1), Shape::Text, Some(true)),
        ] {
            let (instruction, input) = ("Say what it is.", input.into());
            let question = Question {
                task: "t",
                instruction,
                input: &input,
                shape,
                max_output_tokens: 9,
                picture_side: 512,
                plot,
            };
            let words = parts(&question).expect("words").in_words();
            assert!(words.len() as u64 / 3 <= estimate_tokens(&question), "{} bytes", words.len());
        }
    }
}
