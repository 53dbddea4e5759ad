//! Topic names: what jobs come in on, where replies may go.

use rumqttc::v5::mqttbytes::{matches, valid_filter, valid_topic};

/// Whether `text` can name a node or a group: `[a-z0-9][a-z0-9-]{0,62}`.
pub fn is_name(text: &str) -> bool {
    let ok = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len()) && ok(bytes[0]) && bytes.iter().all(|c| ok(*c) || *c == b'-')
}

/// A job topic, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobTopic {
    /// Node or group that it was sent to.
    pub name: String,
    /// Task.
    pub task: String,
    /// CLIENT and ID, for devices that can give a reply address no other way.
    pub client: Option<(String, String)>,
}

/// The topics of one node.
#[derive(Debug, Clone)]
pub struct Topics {
    prefix: String,
    node: String,
}

impl Topics {
    /// Topics under `prefix` for `node`.
    pub fn new(prefix: &str, node: &str) -> Self {
        Topics { prefix: prefix.to_owned(), node: node.to_owned() }
    }

    /// Retained state of this node.
    pub fn status(&self) -> String {
        format!("{}/{}/status", self.prefix, self.node)
    }

    /// Where jobs without a usable reply address are answered.
    pub fn errors(&self) -> String {
        format!("{}/{}/errors", self.prefix, self.node)
    }

    /// Reply address of `…/jobs/TASK/CLIENT/ID`.
    pub fn client_reply(&self, topic: &JobTopic) -> Option<String> {
        let (client, id) = topic.client.as_ref()?;
        Some(format!("{}/{}/replies/{client}/{id}", self.prefix, topic.name))
    }

    /// Subscriptions for this node and its groups, both topic forms of each.
    pub fn subscriptions(&self, groups: &[String]) -> Vec<String> {
        let prefix = &self.prefix;
        let own = &self.node;
        let mut filters = vec![format!("{prefix}/{own}/jobs/+"), format!("{prefix}/{own}/jobs/+/+/+")];
        for group in groups {
            filters.push(format!("$share/{group}/{prefix}/{group}/jobs/+"));
            filters.push(format!("$share/{group}/{prefix}/{group}/jobs/+/+/+"));
        }
        filters
    }

    /// Takes a job topic apart.
    pub fn parse(&self, topic: &str) -> Option<JobTopic> {
        let rest = topic.strip_prefix(&self.prefix)?.strip_prefix('/')?;
        let parts: Vec<&str> = rest.split('/').collect();
        let (name, task, client) = match parts[..] {
            [name, "jobs", task] => (name, task, None),
            [name, "jobs", task, client, id] => (name, task, Some((client.to_owned(), id.to_owned()))),
            _ => return None,
        };
        Some(JobTopic { name: name.to_owned(), task: task.to_owned(), client })
    }

    /// Whether a requester may have its reply published to `topic`.
    ///
    /// # Errors
    /// The reason, for the requester.
    pub fn allow_reply(&self, topic: &str, allowed: Option<&[String]>) -> Result<(), String> {
        if topic.is_empty() || topic.len() > 65_535 || !valid_topic(topic) || topic.contains('\0') {
            return Err(format!("`{topic}` is not a topic that can be published to"));
        }
        let fits = match allowed {
            Some(patterns) => patterns.iter().any(|pattern| valid_filter(pattern) && matches(topic, pattern)),
            None => !topic.starts_with('$') && topic != self.prefix && !topic.starts_with(&format!("{}/", self.prefix)),
        };
        if fits { Ok(()) } else { Err(format!("`{topic}` is outside the allowed reply topics")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "press-7", "0", &"x".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", "A", "a_b", "a/b", "ä", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn reply_topics() {
        let topics = Topics::new("outpost", "n");
        let only = ["plc/+/answers".to_owned()];
        let rows: [(&str, Option<&[String]>, bool); 8] = [
            ("plc/4/answers", None, true),
            ("outpost/n/jobs/x", None, false),
            ("$SYS/x", None, false),
            ("a/#", None, false),
            ("", None, false),
            ("outposts/x", None, true),
            ("plc/4/answers", Some(&only), true),
            ("plc/4/other", Some(&only), false),
        ];
        for (topic, allowed, good) in rows {
            assert_eq!(topics.allow_reply(topic, allowed).is_ok(), good, "{topic}");
        }
    }
}
