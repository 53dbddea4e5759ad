//! Text: counts of character n-grams in hashed buckets.

use super::InputSpec;
use crate::job::Fault;

const FIELD: &str = "input.text";
/// Longest text where the package does not say, in characters.
const MAX_CHARS: usize = 100_000;

/// Length against the model's limit.
///
/// # Errors
/// `input_out_of_range` with the limit; an empty text is out of range as well.
pub fn check(spec: &InputSpec, text: &str) -> Result<(), Fault> {
    if text.trim().is_empty() {
        return Err(Fault::range(FIELD, "the text is empty", 1));
    }
    let most = spec.max_chars.unwrap_or(MAX_CHARS);
    let found = text.chars().count();
    if found > most {
        let message = format!("{found} characters; this model takes at most {most}");
        return Err(Fault::range(FIELD, message, most));
    }
    Ok(())
}

/// ln(1 + count) of each bucket, divided by the vector's Euclidean length.
///
/// Lower case; each run of white space is one space, and one stands at both ends.
pub fn prepare(spec: &InputSpec, buckets: usize, text: &str) -> Vec<f32> {
    let [shortest, longest] = spec.ngrams.unwrap_or([3, 5]);
    let words: Vec<String> = text.to_lowercase().split_whitespace().map(str::to_owned).collect();
    let line = format!(" {} ", words.join(" "));
    let starts: Vec<usize> = line.char_indices().map(|(at, _)| at).chain([line.len()]).collect();
    let mut counts = vec![0u32; buckets];
    for length in shortest..=longest {
        for ends in starts.windows(length + 1) {
            let hash = fnv1a(&line.as_bytes()[ends[0]..ends[length]]);
            counts[hash as usize % buckets] += 1;
        }
    }
    let values: Vec<f64> = counts.into_iter().map(|count| f64::from(count).ln_1p()).collect();
    let length = values.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    values.into_iter().map(|v| (v / length) as f32).collect()
}

/// FNV-1a, 32 bits (draft-eastlake-fnv).
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(2_166_136_261, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(16_777_619))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_the_published_ones() {
        // Test vectors of the FNV authors.
        for (text, hash) in [("", 0x811c_9dc5_u32), ("a", 0xe40c_292c), ("foobar", 0xbf9c_f968)] {
            assert_eq!(fnv1a(text.as_bytes()), hash, "{text}");
        }
    }

    #[test]
    fn case_and_white_space_do_not_matter() {
        let spec: InputSpec = crate::keys::strict(
            "kind = \"text\"\nshape = [1, 64]\nfeatures = \"hashed-ngrams\"\nngrams = [2, 3]".parse().expect("TOML"),
        )
        .expect("a spec");
        let a = prepare(&spec, 64, "Öl leak\t at  pump");
        assert_eq!(a, prepare(&spec, 64, "  öl leak at pump\n"));
        assert!((a.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}
