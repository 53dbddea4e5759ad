//! Answers given lately, for tasks that allow an identical question to be answered from here.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::{Answer, Question};

/// Answers kept at most.
const ENTRIES: usize = 1024;
/// Longer texts are not kept, bytes.
const LARGEST: usize = 16 << 10;

/// What a question is known by.
pub type Key = [u8; 32];

/// Everything that the answer depends on; none where the input has no bytes to compare.
pub fn key(question: &Question<'_>) -> Option<Key> {
    let Question { task, instruction, input, shape, max_output_tokens, picture_side, plot } = question;
    let parts = (task, instruction, &***input, shape, max_output_tokens, picture_side, plot);
    Some(Sha256::digest(postcard::to_stdvec(&parts).ok()?).into())
}

#[derive(Default)]
struct Inner {
    answers: HashMap<Key, (Instant, Answer)>,
    /// Keys in the order in which they came.
    order: VecDeque<Key>,
}

/// The answers, at most [`ENTRIES`] of them; the oldest make way.
#[derive(Default)]
pub struct Cache(Mutex<Inner>);

impl Cache {
    /// The answer to a question, if it is younger than `age` at `now`.
    pub fn get(&self, key: &Key, age: Duration, now: Instant) -> Option<(Answer, Duration)> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, answer) = inner.answers.get(key)?;
        let old = now.saturating_duration_since(*since);
        (old < age).then(|| (answer.clone(), old))
    }

    /// Keeps an answer.
    pub fn put(&self, key: Key, answer: &Answer, now: Instant) {
        let bytes = serde_json::to_vec(&answer.output).map_or(usize::MAX, |json| json.len());
        if bytes > LARGEST {
            return;
        }
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.answers.insert(key, (now, answer.clone())).is_none() {
            inner.order.push_back(key);
        }
        if inner.order.len() > ENTRIES
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.answers.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Input, Output, Ranked};
    use crate::uplink::Shape;

    fn answer() -> Answer {
        let top = vec![Ranked { label: "a".to_owned(), confidence: 1.0 }];
        Answer {
            provider: "p".to_owned(),
            model: "m".to_owned(),
            output: Output::Classes { label: "a".to_owned(), confidence: 1.0, top },
            age: None,
        }
    }

    #[test]
    fn bounded_and_aged() {
        let cache = Cache::default();
        let start = Instant::now();
        for n in 0..ENTRIES + 10 {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&n.to_le_bytes());
            cache.put(key, &answer(), start);
        }
        assert_eq!(cache.0.lock().expect("whole").answers.len(), ENTRIES);
        let second = Duration::from_secs(1);
        assert!(cache.get(&[0; 32], second, start).is_none(), "the oldest made way");
        let mut key = [0; 32];
        key[..8].copy_from_slice(&(ENTRIES + 9).to_le_bytes());
        assert!(cache.get(&key, second, start + second / 2).is_some());
        assert!(cache.get(&key, second, start + second).is_none());
    }

    #[test]
    fn another_question_has_another_key() {
        let (one, two) = (Input::Text("x".to_owned()).into(), Input::Text("y".to_owned()).into());
        let ask = |input, instruction| Question {
            task: "t",
            instruction,
            input,
            shape: Shape::Classes { labels: vec!["a".to_owned()] },
            max_output_tokens: 9,
            picture_side: 256,
            plot: None,
        };
        assert_eq!(key(&ask(&one, "i")), key(&ask(&one, "i")));
        assert_ne!(key(&ask(&one, "i")), key(&ask(&two, "i")));
        assert_ne!(key(&ask(&one, "i")), key(&ask(&one, "j")));
    }
}
