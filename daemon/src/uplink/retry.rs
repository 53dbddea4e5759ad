//! When to ask a provider again: pure, one loop for all providers.

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderMap;
use serde_json::Value;

use crate::config::Kind;

/// Requests in all.
const ATTEMPTS: u32 = 3;
const BASE: Duration = Duration::from_millis(250);
const CAP: Duration = Duration::from_secs(4);
/// An hour is as good as never.
const NEVER: Duration = Duration::from_secs(3600);

/// What an error body says, in the shapes of the providers.
#[derive(Debug, Default, PartialEq)]
pub struct Detail {
    /// `error.code`, `error.error_code`, `error.status` or `error.type`.
    pub kind: String,
    /// `error.message`, for the log.
    pub message: String,
    /// The wait that a `google.rpc.RetryInfo` asks for.
    pub wait: Option<Duration>,
    /// A quota of the day is spent: waiting does not help.
    pub spent: bool,
}

impl Detail {
    /// Reads `{"error": {…}}`, which one server wraps in a list.
    pub fn of(body: &Value) -> Self {
        let error = if body.is_array() { &body[0]["error"] } else { &body["error"] };
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        let kind = ["code", "error_code", "status", "type"].into_iter().find_map(text).unwrap_or_default();
        let details = error["details"].as_array().map(Vec::as_slice).unwrap_or_default();
        let of_type = |name: &'static str| {
            details.iter().filter(move |detail| detail["@type"].as_str().is_some_and(|kind| kind.ends_with(name)))
        };
        let wait = of_type("google.rpc.RetryInfo")
            .find_map(|info| info["retryDelay"].as_str()?.strip_suffix('s')?.parse::<f64>().ok())
            .and_then(seconds);
        let daily = |violation: &Value| violation["quotaId"].as_str().is_some_and(|quota| quota.contains("PerDay"));
        let daily = of_type("google.rpc.QuotaFailure")
            .any(|failure| failure["violations"].as_array().is_some_and(|list| list.iter().any(daily)));
        let paid = ["insufficient_quota", "credit_balance_exhausted", "spend_limit", "billing"];
        let spent = daily
            || ["code", "error_code", "type"]
                .into_iter()
                .filter_map(text)
                .any(|kind| paid.iter().any(|word| kind.contains(word)));
        Detail { kind, message: text("message").unwrap_or_default(), wait, spent }
    }
}

fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok().map(|wait| wait.min(NEVER))
}

/// Whether a status may pass by itself.
pub fn worth(kind: Kind, status: u16, detail: &Detail) -> bool {
    match status {
        429 => !detail.spent,
        408 | 500..=599 => true,
        409 => matches!(kind, Kind::Openai | Kind::OpenaiCompatible),
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
    number("retry-after-ms").map(|ms| ms / 1e3).or_else(|| number("retry-after")).or_else(date).and_then(seconds)
}

/// The wait after the `failures`-th failure; none: no more. Full jitter (Brooker, "Exponential backoff
/// and jitter", 2015), `share` being the draw from 0 to 1, above the provider's own wish.
pub fn wait(failures: u32, floor: Option<Duration>, share: f64) -> Option<Duration> {
    if failures >= ATTEMPTS {
        return None;
    }
    let most = (BASE * 2_u32.saturating_pow(failures)).min(CAP);
    let jitter = most.mul_f64(share.clamp(0.0, 1.0));
    // All who were told the same time would come back at the same time.
    Some(floor.map_or(jitter, |floor| floor + jitter.min(floor / 4)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_passes_by_itself() {
        for (kind, status, code, again) in [
            (Kind::Openai, 429, "rate_limit_exceeded", true),
            (Kind::Openai, 429, "slow_down", true),
            (Kind::Openai, 429, "insufficient_quota", false),
            (Kind::Openai, 429, "credit_balance_exhausted", false),
            (Kind::Anthropic, 429, "enforced_spend_limit_reached", false),
            (Kind::Anthropic, 529, "overloaded_error", true),
            (Kind::Openai, 409, "", true),
            (Kind::OpenaiCompatible, 409, "", true),
            (Kind::Anthropic, 409, "", false),
            (Kind::Gemini, 409, "", false),
            (Kind::Gemini, 503, "UNAVAILABLE", true),
            (Kind::Openai, 408, "", true),
            (Kind::Openai, 500, "", true),
            (Kind::Openai, 400, "", false),
            (Kind::Openai, 401, "", false),
            (Kind::Openai, 404, "", false),
        ] {
            let detail = Detail::of(&json!({"error": {"code": code}}));
            assert_eq!(worth(kind, status, &detail), again, "{kind:?} {status} {code}");
        }
    }

    #[test]
    fn the_words_of_googles_errors() {
        let body = |details: Value| json!({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m", "details": details}});
        let retry = json!([{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "37s"}]);
        let detail = Detail::of(&body(retry.clone()));
        assert_eq!((detail.kind.as_str(), detail.wait), ("RESOURCE_EXHAUSTED", Some(Duration::from_secs(37))));
        assert!(worth(Kind::Gemini, 429, &detail));
        let daily = json!([{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                            "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}]);
        assert!(!worth(Kind::Gemini, 429, &Detail::of(&body(daily))));
        let minute = json!([{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                             "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel"}]}]);
        assert!(worth(Kind::Gemini, 429, &Detail::of(&body(minute))));
        assert_eq!(Detail::of(&json!([body(retry)])).wait, Some(Duration::from_secs(37)));
        let odd = json!([{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "-1e400s"}]);
        assert_eq!(Detail::of(&body(odd)).wait, None);
    }

    #[test]
    fn waits_end_and_keep_the_floor() {
        let floor = Some(Duration::from_secs(2));
        for share in [0.0, 0.3, 1.0] {
            assert!(wait(1, floor, share) >= floor);
            assert!(wait(2, None, share).is_some_and(|wait| wait <= Duration::from_secs(1)));
            assert_eq!(wait(ATTEMPTS, floor, share), None);
        }
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
        headers.insert("retry-after-ms", "nan".parse().expect("a header"));
        assert_eq!(floor(&headers), None);
    }
}
