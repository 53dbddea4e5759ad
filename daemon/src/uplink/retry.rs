//! When to ask a provider again: pure, one loop for all providers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::HeaderMap;
use serde_json::Value;

use crate::config::Kind;

/// Requests in all.
const ATTEMPTS: u32 = 3;
const BASE: Duration = Duration::from_millis(250);
const CAP: Duration = Duration::from_secs(4);

/// What an error body says, in the shape that the providers share.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// `error.code`, `error.error_code` or `error.type`.
    pub kind: String,
    /// `error.message`, for the log.
    pub message: String,
}

impl Detail {
    /// Reads `{"error": {…}}`.
    pub fn of(body: &Value) -> Self {
        let text = |key: &str| body["error"][key].as_str().map(str::to_owned);
        let kind = text("code").or_else(|| text("error_code")).or_else(|| text("type")).unwrap_or_default();
        Detail { kind, message: text("message").unwrap_or_default() }
    }
}

/// Whether a status may pass by itself.
pub fn worth(kind: Kind, status: u16, detail: &Detail) -> bool {
    let spent = ["insufficient_quota", "credit_balance_exhausted", "spend_limit", "billing"];
    match status {
        429 => !spent.iter().any(|word| detail.kind.contains(word)),
        408 | 500..=599 => true,
        409 => kind != Kind::Anthropic,
        _ => false,
    }
}

/// The wait that the provider asks for: `retry-after-ms`, else `retry-after` in seconds or as a date.
pub fn floor(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let number = |name: &str| text(name)?.parse::<f64>().ok();
    let date = || {
        let then = httpdate::parse_http_date(text("retry-after")?).ok()?;
        Some(then.duration_since(SystemTime::now()).unwrap_or_default().as_secs_f64())
    };
    let seconds = number("retry-after-ms").map(|ms| ms / 1e3).or_else(|| number("retry-after")).or_else(date)?;
    // An hour is as good as never.
    (seconds >= 0.0).then(|| Duration::from_secs_f64(seconds.min(3600.0)))
}

/// The wait after the `failures`-th failure; none: no more. Full jitter (Brooker, "Exponential backoff
/// and jitter", 2015) above the provider's own wish.
pub fn wait(failures: u32, floor: Option<Duration>) -> Option<Duration> {
    if failures >= ATTEMPTS {
        return None;
    }
    let most = (BASE * 2_u32.saturating_pow(failures)).min(CAP);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let share = f64::from(nanos % 1_000_003) / 1_000_003.0;
    Some(most.mul_f64(share).max(floor.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_itself() {
        for (kind, status, code, again) in [
            (Kind::Openai, 429, "rate_limit_exceeded", true),
            (Kind::Openai, 429, "insufficient_quota", false),
            (Kind::Anthropic, 429, "enforced_spend_limit_reached", false),
            (Kind::Anthropic, 529, "overloaded_error", true),
            (Kind::Openai, 409, "", true),
            (Kind::Anthropic, 409, "", false),
            (Kind::Openai, 408, "", true),
            (Kind::Openai, 500, "", true),
            (Kind::Openai, 400, "", false),
            (Kind::Openai, 401, "", false),
            (Kind::Openai, 404, "", false),
        ] {
            let detail = Detail { kind: code.to_owned(), message: String::new() };
            assert_eq!(worth(kind, status, &detail), again, "{kind:?} {status} {code}");
        }
    }

    #[test]
    fn waits_end_and_keep_the_floor() {
        let floor = Some(Duration::from_secs(2));
        assert!(wait(1, floor) >= floor);
        assert!(wait(2, None).is_some_and(|wait| wait <= Duration::from_secs(1)));
        assert_eq!(wait(ATTEMPTS, floor), None);
    }

    #[test]
    fn retry_after_is_read() {
        let mut headers = HeaderMap::new();
        assert_eq!(floor(&headers), None);
        headers.insert("retry-after", "2".parse().expect("a header"));
        assert_eq!(floor(&headers), Some(Duration::from_secs(2)));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(30));
        headers.insert("retry-after", soon.parse().expect("a header"));
        assert!(floor(&headers).is_some_and(|wait| (28..=30).contains(&wait.as_secs())));
        headers.insert("retry-after-ms", "150".parse().expect("a header"));
        assert_eq!(floor(&headers), Some(Duration::from_millis(150)));
    }
}
