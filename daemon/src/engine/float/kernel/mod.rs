//! Kernels over floats, behind one table of functions.
//!
//! Channels lie last and are taken in [`Lanes`] of 8. Sums are fused multiply-adds where the processor has them, so
//! tables differ in the last bits.
#![allow(unsafe_code, reason = "std::arch intrinsics, and rows that are addressed by pointer")]

mod portable;

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

pub use portable::PORTABLE;

/// Channels of a block.
pub const LANES: usize = 8;
/// Rows that one call takes.
pub const ROWS: usize = 6;
/// Blocks that [`Kernels::single`] takes.
pub const WIDE: usize = 8;

/// Numbers of the channels of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(32))]
pub struct Lanes(pub [f32; LANES]);

/// One call: `out[row] = clamp(bias + plus[row] + Σ x[row] · w)`, for some rows and blocks of channels.
///
/// A row is `segments`, offsets to its pointer, of `length` floats each; a block has `segments · length` weights.
#[derive(Debug)]
pub struct Tile<'a> {
    /// First element of each row.
    pub x: [*const f32; ROWS],
    /// What is added to each row, or null in all.
    pub plus: [*const f32; ROWS],
    /// Where each row goes.
    pub out: [*mut f32; ROWS],
    /// Where a row's floats lie.
    pub segments: &'a [usize],
    /// Floats of a segment.
    pub length: usize,
    /// Of the first block; the next follow.
    pub weights: *const Lanes,
    /// Of the first block; the next follow.
    pub bias: *const Lanes,
    /// Least value.
    pub low: f32,
    /// Greatest value.
    pub high: f32,
}

/// Runs a [`Tile`].
///
/// # Safety
/// The processor has the instructions; all that the tile points at is there: for [`Kernels::each`] a segment has
/// [`LANES`] floats, and a row of `plus` and `out` has as many floats as the blocks have channels.
pub type Run = unsafe fn(&Tile<'_>);

/// What an instruction set has.
#[derive(Debug)]
pub struct Kernels {
    /// Instruction set.
    pub name: &'static str,
    /// [`ROWS`] rows by 2 blocks.
    pub two: Run,
    /// [`ROWS`] rows by 1 block.
    pub one: Run,
    /// The first row by [`WIDE`] blocks.
    pub single: Run,
    /// [`ROWS`] rows by 1 block, each channel by itself: a weight for each segment, whose `length` is not used.
    pub each: Run,
}

/// The best that this processor has.
pub fn best() -> &'static Kernels {
    static BEST: LazyLock<&'static Kernels> = LazyLock::new(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return &x86::AVX2;
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            return &arm::NEON;
        }
        &PORTABLE
    });
    *BEST
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel of `kernels` against the sums in f64.
    fn check(kernels: &Kernels) {
        let mut state = 1_u64;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        };
        for (segments, length) in [(1, 1), (1, 64), (3, 9), (9, 8), (10, 4), (2, 13)] {
            let x: Vec<f32> = (0..4096).map(|_| next()).collect();
            let plus: Vec<f32> = (0..ROWS * WIDE * LANES).map(|_| next()).collect();
            let weights: Vec<Lanes> =
                (0..segments * length * WIDE).map(|_| Lanes(std::array::from_fn(|_| next()))).collect();
            let bias: Vec<Lanes> = (0..WIDE).map(|_| Lanes(std::array::from_fn(|_| next()))).collect();
            let offsets: Vec<usize> = (0..segments).map(|at| at * 100).collect();
            let cases =
                [(kernels.two, ROWS, 2, false), (kernels.one, ROWS, 1, false), (kernels.single, 1, WIDE, false)];
            for (run, rows, blocks, each) in cases.into_iter().chain([(kernels.each, ROWS, 1, true)]) {
                for add in [false, true] {
                    let width = blocks * LANES;
                    let mut out = vec![f32::NAN; ROWS * width];
                    let tile = Tile {
                        x: std::array::from_fn(|row| x[row * 17..].as_ptr()),
                        plus: std::array::from_fn(|row| {
                            if add { plus[row * width..].as_ptr() } else { std::ptr::null() }
                        }),
                        out: std::array::from_fn(|row| out[row * width..].as_mut_ptr()),
                        segments: &offsets,
                        length,
                        weights: weights.as_ptr(),
                        bias: bias.as_ptr(),
                        low: -1.5,
                        high: 2.0,
                    };
                    // SAFETY: sizes as above; the table is one that the processor has.
                    unsafe { run(&tile) };
                    for row in 0..rows {
                        for channel in 0..width {
                            let (block, lane) = (channel / LANES, channel % LANES);
                            let mut sum = f64::from(bias[block].0[lane]);
                            if add {
                                sum += f64::from(plus[row * width + channel]);
                            }
                            for (at, offset) in offsets.iter().enumerate() {
                                let x = &x[row * 17 + offset..];
                                if each {
                                    sum += f64::from(x[lane]) * f64::from(weights[at].0[lane]);
                                    continue;
                                }
                                for k in 0..length {
                                    let w = weights[(block * segments + at) * length + k].0[lane];
                                    sum += f64::from(x[k]) * f64::from(w);
                                }
                            }
                            let (want, found) = (sum.clamp(-1.5, 2.0), f64::from(out[row * width + channel]));
                            assert!((want - found).abs() < 1e-4, "{}: {want} {found}", kernels.name);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_kernel_sums_right() {
        check(&PORTABLE);
        check(best());
    }
}
