//! A long series as a picture. A table of it would leave rows out, and what lies between the rows that are left is
//! lost or folds into waves that are not there; a plot keeps every peak, and takes a fixed number of tokens.
//! Daswani et al. 2024, [arXiv:2410.02637](https://arxiv.org/abs/2410.02637), found that models that see read long
//! series better from plots, at a fraction of the tokens.

use std::fmt::Write;
use std::io::Cursor;

use image::{GrayImage, ImageFormat, Luma};

/// Width in pixels.
pub const WIDTH: u32 = 768;
/// Most channels that are drawn, one panel each.
pub const CHANNELS: usize = 8;
/// Pixels between panels.
const GAP: u32 = 8;
const PAPER: Luma<u8> = Luma([255]);
const ZERO: Luma<u8> = Luma([190]);
const INK: Luma<u8> = Luma([0]);

/// Height of one channel's panel in pixels.
fn panel(channels: usize) -> u32 {
    (512 / channels.max(1) as u32).clamp(64, 256)
}

/// Width and height of a picture of so many channels, in pixels.
pub fn size(channels: usize) -> (u32, u32) {
    (WIDTH, channels as u32 * (panel(channels) + GAP) - GAP)
}

/// Lowest and highest value of a channel.
fn range(rows: &[Vec<f32>], channel: usize) -> (f32, f32) {
    let (low, high) = rows.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), row| {
        let value = row[channel];
        (low.min(value), high.max(value))
    });
    (low, high)
}

/// What the picture shows, in words: it has no letters of its own.
pub fn legend(rows: &[Vec<f32>]) -> String {
    let channels = rows.first().map_or(0, Vec::len);
    let mut text = format!(
        "Input: the picture plots {} rows in order of time from left to right; where many fall on one column, it shows \
         all from the least to the greatest.",
        rows.len()
    );
    if channels > 1 {
        text += " One panel for each channel, the first on top. A grey line is zero.";
    } else {
        text += " The grey line is zero.";
    }
    for channel in 0..channels {
        let (low, high) = range(rows, channel);
        let squares: f64 = rows.iter().map(|row| f64::from(row[channel]).powi(2)).sum();
        let mean: f64 = rows.iter().map(|row| f64::from(row[channel])).sum::<f64>() / rows.len() as f64;
        let rms = (squares / rows.len() as f64).sqrt();
        let _ = write!(
            text,
            "\nChannel {channel}: from {low:.4e} at the bottom to {high:.4e} at the top, mean {mean:.4e}, RMS {rms:.4e}"
        );
    }
    text
}

/// Draws rows of samples, as PNG. At least one row, at most [`CHANNELS`] channels.
///
/// # Errors
/// The encoder's.
pub fn draw(rows: &[Vec<f32>]) -> Result<Vec<u8>, String> {
    let channels = rows.first().map_or(0, Vec::len);
    let (width, height) = size(channels);
    let mut paper = GrayImage::from_pixel(width, height, PAPER);
    for channel in 0..channels {
        let (low, high) = range(rows, channel);
        let bottom = channel as u32 * (panel(channels) + GAP) + panel(channels) - 1;
        let steps = f64::from(panel(channels) - 1);
        let span = f64::from(high) - f64::from(low);
        // A channel that stands still is a line in the middle.
        let y = |value: f64| {
            let part = if span > 0.0 { (value - f64::from(low)) / span } else { 0.5 };
            bottom - (part * steps).round() as u32
        };
        if low < 0.0 && high > 0.0 {
            (0..width).for_each(|x| paper.put_pixel(x, y(0.0), ZERO));
        }
        let last = (rows.len() - 1) as f64;
        let between = |at: f64| {
            let (before, part) = (at.floor() as usize, at.fract());
            let value = |row: usize| f64::from(rows[row.min(rows.len() - 1)][channel]);
            value(before) * (1.0 - part) + value(before + 1) * part
        };
        for x in 0..width {
            let (from, to) = (last * f64::from(x) / f64::from(width), last * f64::from(x + 1) / f64::from(width));
            let inside = from.ceil() as usize..=to.floor() as usize;
            let values = inside.map(|row| f64::from(rows[row][channel])).chain([between(from), between(to)]);
            let (least, most) = values.fold((f64::MAX, f64::MIN), |(least, most), v| (least.min(v), most.max(v)));
            (y(most)..=y(least)).for_each(|y| paper.put_pixel(x, y, INK));
        }
    }
    let mut out = Cursor::new(Vec::new());
    paper.write_to(&mut out, ImageFormat::Png).map_err(|error| format!("the series cannot be drawn: {error}"))?;
    Ok(out.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(rows: &[Vec<f32>]) -> GrayImage {
        image::load_from_memory(&draw(rows).expect("draws")).expect("a picture").into_luma8()
    }

    fn inked(picture: &GrayImage, x: u32) -> Vec<u32> {
        (0..picture.height()).filter(|y| picture.get_pixel(x, *y) == &INK).collect()
    }

    /// One sample of 100,000 that a table of 512 rows would leave out.
    #[test]
    fn a_peak_is_never_lost() {
        let mut rows = vec![vec![0.0]; 100_000];
        rows[54_321] = vec![9.0];
        let picture = drawn(&rows);
        assert_eq!(picture.dimensions(), size(1));
        let at = 54_321 * WIDTH / 100_000;
        let high: Vec<u32> = (0..WIDTH).filter(|x| inked(&picture, *x).contains(&0)).collect();
        assert!(!high.is_empty() && high.iter().all(|x| x.abs_diff(at) <= 1), "{high:?}, not {at}");
    }

    #[test]
    fn a_ramp_rises_and_has_no_gaps() {
        for rows in [2, 10, 767, 768, 5000] {
            let picture = drawn(&(0..rows).map(|row| vec![row as f32 - 1.0, 5.0]).collect::<Vec<_>>());
            let half = panel(2);
            let mut last = half - 1;
            for x in 0..WIDTH {
                let column: Vec<u32> = inked(&picture, x);
                let ramp: Vec<u32> = column.iter().copied().filter(|y| *y < half).collect();
                assert!(!ramp.is_empty() && ramp[ramp.len() - 1] <= last && ramp[ramp.len() - 1] + 1 >= last, "{x}");
                last = ramp[0];
                assert_eq!(column.len() - ramp.len(), 1, "the other channel stands still");
            }
            assert_eq!(last, 0);
        }
    }

    #[test]
    fn extremes_are_drawn() {
        for rows in [vec![vec![f32::MAX], vec![f32::MIN]], vec![vec![1e-30]], vec![vec![0.0; CHANNELS]; 3]] {
            assert_eq!(drawn(&rows).dimensions(), size(rows[0].len()));
            assert!(legend(&rows).len() < 300 + 120 * CHANNELS);
        }
    }
}
