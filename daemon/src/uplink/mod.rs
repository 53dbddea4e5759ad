//! Closed models over HTTPS: one question up, one answer of the same shape as a local one back.

use serde::Deserialize;
use zeroize::Zeroizing;

use crate::job::{Input, Output, Usage};

/// A wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Anthropic Messages.
    Anthropic,
    /// OpenAI Responses.
    Openai,
    /// OpenAI Chat Completions, as spoken by many others.
    OpenaiCompatible,
}

/// A key: wiped from memory when dropped, never shown.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Takes the key over.
    pub fn new(key: String) -> Self {
        Secret(Zeroizing::new(key))
    }

    /// The key itself, for the one header that carries it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The shape that the answer must have.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// One of these labels, with a confidence.
    Classes {
        /// The labels; at least one.
        labels: Vec<String>,
    },
    /// Anomalous or not, with a score on the scale of this threshold.
    Anomaly {
        /// The score above which a series is anomalous.
        threshold: f64,
    },
    /// Free text.
    Text,
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Task.
    pub task: &'a str,
    /// What to answer and what the labels mean.
    pub instruction: &'a str,
    /// What it is about.
    pub input: &'a Input,
    /// The shape of the answer.
    pub shape: Shape,
    /// Most tokens that may be written.
    pub max_output_tokens: u32,
}

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The answer, in the shape of the task.
    pub output: Output,
    /// The model's name as the provider reported it.
    pub model: String,
    /// Tokens of all attempts that were billed.
    pub usage: Usage,
    /// What they cost, in US dollars, at the configured prices.
    pub cost_usd: f64,
}
