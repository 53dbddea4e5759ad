//! Strict TOML: an unknown key is an error that names the nearest known one.

use serde::de::DeserializeOwned;

/// Deserializes `value`, naming the path of what does not fit.
///
/// # Errors
/// One sentence: the key's path, what is wrong with it and, for an unknown key, the nearest known one.
pub fn strict<T: DeserializeOwned>(value: toml::Table) -> Result<T, String> {
    serde_path_to_error::deserialize(toml::Value::Table(value)).map_err(|error| {
        let path = error.path().to_string();
        let message = error.inner().message().to_owned();
        match nearest(&message) {
            Some((unknown, Some(known))) => {
                format!("{}: unknown key; did you mean `{known}`?", within(&path, &unknown))
            }
            Some((unknown, None)) => format!("{}: unknown key", within(&path, &unknown)),
            None if path == "." => message,
            None => format!("{path}: {message}"),
        }
    })
}

/// serde reports an unknown field with or without its own name at the end of the path.
fn within(path: &str, key: &str) -> String {
    if path == "." {
        key.to_owned()
    } else if path == key || path.ends_with(&format!(".{key}")) {
        path.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// Reads serde's "unknown field `x`, expected one of `a`, `b`".
fn nearest(message: &str) -> Option<(String, Option<String>)> {
    if !message.starts_with("unknown field") {
        return None;
    }
    let mut names = message.split('`').skip(1).step_by(2);
    let unknown = names.next()?.to_owned();
    let known = names
        .map(|name| (strsim::jaro_winkler(&unknown, name), name))
        .filter(|(likeness, _)| *likeness > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.to_owned());
    Some((unknown, known))
}
