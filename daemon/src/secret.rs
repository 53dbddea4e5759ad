//! Keys and passwords: where they come from, and a type that does not show them.

use std::path::Path;

use zeroize::Zeroizing;

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

/// Looks a credential up in `$CREDENTIALS_DIRECTORY`, then in the environment (as named, then in
/// upper case with `_` for `-`).
pub fn credential(name: &str) -> Option<Secret> {
    let file = std::env::var_os("CREDENTIALS_DIRECTORY")
        .filter(|_| !name.contains('/'))
        .and_then(|dir| std::fs::read_to_string(Path::new(&dir).join(name)).ok());
    file.or_else(|| std::env::var(name).ok())
        .or_else(|| std::env::var(name.to_uppercase().replace('-', "_")).ok())
        .map(|text| text.trim().to_owned())
        .filter(|text| !text.is_empty())
        .map(Secret::new)
}
