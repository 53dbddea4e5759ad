//! Series of samples: windows, and for each its normalised samples or its logarithmic spectrum.

use std::sync::Arc;

use rustfft::num_complex::Complex;
use rustfft::{Fft, FftPlanner};

use super::standardise;
use crate::engine::package::{Features, InputSpec, Normalise};
use crate::job::Fault;

const FIELD: &str = "input.series";
/// Longest series where the package does not say, in samples.
const MAX_SAMPLES: usize = 1 << 20;
/// Added to a band's power, so that silence has a logarithm.
const FLOOR: f64 = 1e-10;

fn window(spec: &InputSpec) -> usize {
    spec.window.unwrap_or(1)
}

fn spectral(spec: &InputSpec) -> bool {
    spec.features == Some(Features::LogSpectrum)
}

/// Values that one window yields.
pub fn values(spec: &InputSpec) -> usize {
    let channels = spec.channels.unwrap_or(1);
    if spectral(spec) { spec.bands.unwrap_or(0) * channels } else { window(spec) * channels }
}

/// Whole windows in `samples` rows.
pub fn windows(spec: &InputSpec, samples: usize) -> usize {
    let (window, hop) = (window(spec), spec.hop.unwrap_or(window(spec)));
    if samples < window { 0 } else { (samples - window) / hop + 1 }
}

/// Columns and rows against the model's limits.
///
/// # Errors
/// `input_out_of_range` with the limit.
pub fn check(spec: &InputSpec, rows: &[Vec<f32>]) -> Result<(), Fault> {
    let channels = spec.channels.unwrap_or(1);
    if let Some(found) = rows.first().map(Vec::len).filter(|found| *found != channels) {
        let message = format!("{found} channels; this model takes {channels}");
        return Err(Fault::range(FIELD, message, channels));
    }
    let (least, most) = (window(spec), spec.max_samples.unwrap_or(MAX_SAMPLES));
    if rows.len() < least {
        let message = format!("{} samples; this model needs at least {least}", rows.len());
        return Err(Fault::range(FIELD, message, least));
    }
    if rows.len() > most {
        let message = format!("{} samples; this model takes at most {most}", rows.len());
        return Err(Fault::range(FIELD, message, most));
    }
    Ok(())
}

/// One vector for each whole window, channel after channel for spectra and row by row for samples.
pub fn prepare(spec: &InputSpec, spectrum: Option<&Spectrum>, rows: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let (window, hop) = (window(spec), spec.hop.unwrap_or(window(spec)));
    let channels = spec.channels.unwrap_or(1);
    (0..windows(spec, rows.len()))
        .map(|i| {
            let part = &rows[i * hop..i * hop + window];
            let columns: Vec<Vec<f64>> = (0..channels).map(|c| normalised(spec, part, c)).collect();
            match spectrum {
                Some(spectrum) => {
                    let features = columns.iter().flat_map(|column| spectrum.of(column));
                    features.enumerate().map(|(i, f)| standardise(spec, i, f as f32)).collect()
                }
                None => (0..window)
                    .flat_map(|row| (0..channels).map(move |c| (row, c)))
                    .map(|(row, c)| standardise(spec, c, columns[c][row] as f32))
                    .collect(),
            }
        })
        .collect()
}

fn normalised(spec: &InputSpec, part: &[Vec<f32>], channel: usize) -> Vec<f64> {
    let column = part.iter().map(|row| f64::from(row[channel]));
    let n = part.len() as f64;
    let mean = match spec.normalise {
        Normalise::None => 0.0,
        Normalise::Mean | Normalise::Zscore => column.clone().sum::<f64>() / n,
    };
    let scale = match spec.normalise {
        Normalise::Zscore => {
            let variance = column.clone().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            // A silent window stays silent.
            if variance > 0.0 { variance.sqrt().recip() } else { 0.0 }
        }
        _ => 1.0,
    };
    column.map(|x| (x - mean) * scale).collect()
}

/// Logarithm of the power in equal bands of frequency.
pub struct Spectrum {
    hann: Vec<f64>,
    fft: Arc<dyn Fft<f64>>,
    bands: usize,
}

impl std::fmt::Debug for Spectrum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Spectrum({} → {})", self.hann.len(), self.bands)
    }
}

impl Spectrum {
    /// Tables for the windows of `spec`, if it asks for a spectrum.
    pub fn new(spec: &InputSpec) -> Option<Self> {
        let bands = spec.bands.filter(|_| spectral(spec))?;
        let n = window(spec);
        // Periodic Hann window (Harris 1978).
        let hann = (0..n).map(|i| 0.5 - 0.5 * (std::f64::consts::TAU * i as f64 / n as f64).cos()).collect();
        Some(Spectrum { hann, fft: FftPlanner::new().plan_fft_forward(n), bands })
    }

    /// log10 of the mean power |X|²/N in each band; bins 1 to N/2, without the constant.
    fn of(&self, samples: &[f64]) -> Vec<f64> {
        let n = samples.len();
        let mean = samples.iter().sum::<f64>() / n as f64;
        let mut bins: Vec<Complex<f64>> =
            samples.iter().zip(&self.hann).map(|(x, w)| Complex::new((x - mean) * w, 0.0)).collect();
        self.fft.process(&mut bins);
        let width = n / 2 / self.bands;
        let power: Vec<f64> = bins[1..=n / 2].iter().map(|x| x.norm_sqr() / n as f64).collect();
        power.chunks_exact(width).map(|band| (band.iter().sum::<f64>() / width as f64 + FLOOR).log10()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(lines: &str) -> InputSpec {
        let head = "kind = \"series\"\nshape = [1, 4]\n";
        crate::keys::strict((head.to_owned() + lines).parse().expect("TOML")).expect("a spec")
    }

    #[test]
    fn only_whole_windows_count() {
        let spec = spec("window = 4\nhop = 2");
        for (samples, expected) in [(0, 0), (3, 0), (4, 1), (5, 1), (6, 2), (8, 3)] {
            assert_eq!(windows(&spec, samples), expected, "{samples}");
        }
    }

    #[test]
    fn a_tone_is_found_in_its_band() {
        let spec = spec("window = 64\nfeatures = \"log-spectrum\"\nbands = 8\nnormalise = \"zscore\"");
        let rows: Vec<Vec<f32>> =
            (0..64).map(|i| vec![(std::f32::consts::TAU * 14.0 * i as f32 / 64.0).sin()]).collect();
        let features = &prepare(&spec, Spectrum::new(&spec).as_ref(), &rows)[0];
        // Bin 14 lies in the band of bins 13 to 16, the fourth.
        let loudest = (0..8).max_by(|a, b| features[*a].total_cmp(&features[*b]));
        assert_eq!(loudest, Some(3), "{features:?}");
    }
}
