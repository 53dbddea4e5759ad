//! Logs as systemd's journal keeps them: the message, its priority, and each field by itself, so that
//! `journalctl OUTPOST_MODEL=digits@1.0.0` finds what concerns one model.

use std::fmt::{Debug, Write};
use std::os::unix::fs::MetadataExt;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Whether stderr goes to the journal, which then takes fields as well.
pub fn is_stderr() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    // The variable is inherited by whatever redirects stderr elsewhere; only the file itself tells.
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|file| stream == format!("{}:{}", file.dev(), file.ino()))
}

/// Writes events to the journal.
#[derive(Debug)]
pub struct Journal;

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let meta = event.metadata();
        let mut fields = Fields { message: String::new(), more: Vec::new() };
        event.record(&mut fields);
        let mut lines = vec![
            format!("MESSAGE={}", fields.message),
            format!("PRIORITY={}", priority(*meta.level())),
            "SYSLOG_IDENTIFIER=outpost".to_owned(),
            format!("CODE_MODULE={}", meta.module_path().unwrap_or(meta.target())),
        ];
        lines.extend(meta.file().map(|file| format!("CODE_FILE={file}")));
        lines.extend(meta.line().map(|line| format!("CODE_LINE={line}")));
        lines.extend(fields.more);
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        if systemd::journal::send(&lines).is_err() {
            // The journal may be restarting; the plain way still ends there.
            eprintln!("{}", fields.message);
        }
    }
}

/// As syslog counts.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// A field's name in the journal, which allows capitals, digits and `_`.
fn name(field: &str) -> String {
    let fit = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    format!("OUTPOST_{}", field.chars().map(fit).take(50).collect::<String>())
}

/// An event's fields; those beside the message also follow it in words, as readers of a log expect.
struct Fields {
    message: String,
    more: Vec<String>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.insert_str(0, value),
            // What the `log` crate's bridge adds says nothing to a reader.
            name if name.starts_with("log.") => {}
            plain => {
                // Writing to a string cannot fail.
                let _ = write!(self.message, " {plain}={value}");
                self.more.push(format!("{}={value}", name(plain)));
            }
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_journal() {
        assert_eq!(name("model"), "OUTPOST_MODEL");
        assert_eq!(name("http.status-code"), "OUTPOST_HTTP_STATUS_CODE");
    }

    #[test]
    fn levels_are_priorities() {
        assert_eq!([Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG].map(priority), [3, 4, 6, 7]);
    }
}
