//! A package's manifest, changed by a program and still the work of whoever wrote it.

use anyhow::{Context, Result};

/// `text` with these numbers in `[confidence]`, and all else as it was, comments included.
///
/// # Errors
/// It is not TOML, or `confidence` is no table.
pub fn confidence(text: &str, threshold: f64, temperature: f64) -> Result<String> {
    let mut document: toml_edit::DocumentMut = text.parse().context("model.toml")?;
    let table = document.entry("confidence").or_insert_with(toml_edit::table);
    let table = table.as_table_like_mut().context("model.toml: `confidence` is not a table")?;
    for (key, number) in [("threshold", threshold), ("temperature", temperature)] {
        match table.get_mut(key).and_then(toml_edit::Item::as_value_mut) {
            Some(old) => {
                // With the spaces and the comment around it.
                let decor = old.decor().clone();
                *old = number.into();
                *old.decor_mut() = decor;
            }
            None => {
                table.insert(key, toml_edit::value(number));
            }
        }
    }
    Ok(document.to_string())
}

#[cfg(test)]
mod tests {
    use super::confidence;

    #[test]
    fn only_the_two_numbers_change() {
        let text = "# ours\nname = \"m\"\n\n[confidence] # below it goes up\nthreshold = 0.6 # by hand\n\
                    temperature = 1.0\n\n[[golden]]\ninput = \"a\" # first\n";
        let expected = text.replace("0.6", "0.75").replace("1.0", "2.5");
        assert_eq!(confidence(text, 0.75, 2.5).expect("TOML"), expected);
        for (text, expected) in [
            ("name = \"m\"\n", "name = \"m\"\n\n[confidence]\nthreshold = 0.75\ntemperature = 2.5\n"),
            ("confidence = { threshold = 0.1 }\n", "confidence = { threshold = 0.75 , temperature = 2.5}\n"),
        ] {
            let found = confidence(text, 0.75, 2.5).expect("TOML");
            let table: toml::Table = found.parse().expect("TOML");
            assert_eq!(table, expected.parse::<toml::Table>().expect("TOML"), "{found}");
        }
    }
}
