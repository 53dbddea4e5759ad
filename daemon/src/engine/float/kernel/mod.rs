//! Kernels over floats, behind one table of functions.
//!
//! Channels lie last and are taken in [`Lanes`] of 16. Sums are fused multiply-adds where the processor has them, so
//! tables differ in the last bits. [`dense`] and [`each`] are written once, over a [`Vector`]; an instruction set gives
//! the vector, and how many of them its registers hold.
#![allow(unsafe_code, reason = "std::arch intrinsics, and rows that are addressed by pointer")]
#![allow(clippy::needless_range_loop, reason = "tiles of registers, which only counted loops are unrolled to")]

mod portable;

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

pub use portable::PORTABLE;

/// Channels of a block.
pub const LANES: usize = 16;
/// The tables of a [`Call`] have a multiple of so many rows.
pub const ROWS: usize = 6;

/// Numbers of the channels of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub struct Lanes(pub [f32; LANES]);

/// A layer, or one of its groups: `out[row] = clamp(bias + plus[row] + Σ x[row] · w)`.
///
/// A row is `segments`, offsets to its place in the source, of `length` floats each; a block of channels has
/// `segments · length` weights.
#[derive(Debug)]
pub struct Call<'a> {
    /// Where the offsets of `rows` start.
    pub source: *const f32,
    /// What is added to each row, by `plus_rows`; or null.
    pub plus: *const f32,
    /// Where the result goes, by `out_rows`.
    pub out: *mut f32,
    /// Rows that count; the tables repeat the last one up to a multiple of [`ROWS`].
    pub count: usize,
    /// Where each row lies.
    pub rows: &'a [usize],
    #[expect(missing_docs, reason = "as for rows")]
    pub plus_rows: &'a [usize],
    #[expect(missing_docs, reason = "as for rows")]
    pub out_rows: &'a [usize],
    /// Where a row's floats lie.
    pub segments: &'a [usize],
    /// Floats of a segment.
    pub length: usize,
    /// Block by block.
    pub weights: *const Lanes,
    /// One for each block.
    pub bias: *const Lanes,
    /// Channels of the result; the last block need not be full.
    pub channels: usize,
    /// Least value.
    pub low: f32,
    /// Greatest value.
    pub high: f32,
}

/// Runs a [`Call`].
///
/// # Safety
/// The processor has the instructions; all that the call points at is there, with [`LANES`] floats more behind
/// `source` and `plus`.
pub type Run = unsafe fn(&Call<'_>);

/// What an instruction set has.
#[derive(Debug)]
pub struct Kernels {
    /// Instruction set.
    pub name: &'static str,
    /// Every channel by every float of a row.
    pub dense: Run,
    /// Each channel by itself: a weight for each segment, whose `length` is not used.
    pub each: Run,
}

/// The best that this processor has.
pub fn best() -> &'static Kernels {
    static BEST: LazyLock<&'static Kernels> = LazyLock::new(|| available()[0]);
    *BEST
}

/// What this processor has, the best first.
pub fn available() -> Vec<&'static Kernels> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            found.push(&x86::AVX512);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            found.push(&x86::AVX2);
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        found.push(&arm::NEON);
    }
    found.push(&PORTABLE);
    found
}

/// A register of floats.
///
/// # Safety
/// For every function: the processor has the instructions, and pointers have [`Vector::N`] floats.
trait Vector: Copy {
    /// Floats in it.
    const N: usize;
    /// The same number everywhere.
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    /// `self + a · b`.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    unsafe fn clamp(self, low: Self, high: Self) -> Self;
}

/// Vectors of a block.
const fn parts<V: Vector>() -> usize {
    LANES / V::N
}

/// [`Kernels::dense`] with tiles of 6 rows by `A`, `B` or `C` vectors, `C` being one block, and of 1 row by `W`.
///
/// # Safety
/// As for [`Run`].
#[inline(always)]
unsafe fn dense<V: Vector, const A: usize, const B: usize, const C: usize, const W: usize>(call: &Call<'_>) {
    let blocks = call.channels.div_ceil(LANES);
    // SAFETY: the call's.
    unsafe {
        if call.count == 1 {
            let mut block = 0;
            while block < blocks {
                if blocks - block >= W / parts::<V>() {
                    tile::<V, 1, W>(call, 0, block);
                    block += W / parts::<V>();
                } else {
                    tile::<V, 1, C>(call, 0, block);
                    block += 1;
                }
            }
            return;
        }
        let mut row = 0;
        while row < call.count {
            // A few rows at the end need no whole tile.
            let few = call.count - row <= 3;
            let mut block = 0;
            while block < blocks {
                let left = (blocks - block) * parts::<V>();
                let taken = if left >= A {
                    if few {
                        tile::<V, 3, A>(call, row, block)
                    } else {
                        tile::<V, 6, A>(call, row, block)
                    }
                    A
                } else if left >= B {
                    if few {
                        tile::<V, 3, B>(call, row, block)
                    } else {
                        tile::<V, 6, B>(call, row, block)
                    }
                    B
                } else {
                    if few {
                        tile::<V, 3, C>(call, row, block)
                    } else {
                        tile::<V, 6, C>(call, row, block)
                    }
                    C
                };
                block += taken / parts::<V>();
            }
            row += 6;
        }
    }
}

/// `R` rows by `C` vectors of channels.
///
/// # Safety
/// As for [`Run`].
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const C: usize>(call: &Call<'_>, row: usize, block: usize) {
    let size = call.segments.len() * call.length * LANES;
    // SAFETY: the call's.
    unsafe {
        let mut sums = start::<V, R, C>(call, row, block);
        let mut weights = call.weights.cast::<f32>().add(block * size);
        for offset in call.segments {
            let mut x = [std::ptr::null::<f32>(); R];
            for r in 0..R {
                x[r] = call.source.add(call.rows[row + r] + offset);
            }
            for k in 0..call.length {
                let mut w = [V::splat(0.0); C];
                for c in 0..C {
                    w[c] = V::load(weights.add(c / parts::<V>() * size + c % parts::<V>() * V::N));
                }
                for r in 0..R {
                    let x = V::splat(*x[r].add(k));
                    for c in 0..C {
                        sums[r][c] = sums[r][c].fma(x, w[c]);
                    }
                }
                weights = weights.add(LANES);
            }
        }
        finish(call, row, block, &sums);
    }
}

/// [`Kernels::each`]; `C` vectors are one block.
///
/// # Safety
/// As for [`Run`].
#[inline(always)]
unsafe fn each<V: Vector, const C: usize>(call: &Call<'_>) {
    let size = call.segments.len() * LANES;
    for block in 0..call.channels.div_ceil(LANES) {
        for row in (0..call.count).step_by(6) {
            // SAFETY: the call's.
            unsafe {
                let mut sums = start::<V, 6, C>(call, row, block);
                let mut weights = call.weights.cast::<f32>().add(block * size);
                let mut x = [std::ptr::null::<f32>(); 6];
                for r in 0..6 {
                    x[r] = call.source.add(call.rows[row + r] + block * LANES);
                }
                for offset in call.segments {
                    for c in 0..C {
                        let w = V::load(weights.add(c * V::N));
                        for r in 0..6 {
                            sums[r][c] = sums[r][c].fma(V::load(x[r].add(offset + c * V::N)), w);
                        }
                    }
                    weights = weights.add(LANES);
                }
                finish(call, row, block, &sums);
            }
        }
    }
}

/// # Safety
/// As for [`Run`].
#[inline(always)]
unsafe fn start<V: Vector, const R: usize, const C: usize>(call: &Call<'_>, row: usize, block: usize) -> [[V; C]; R] {
    // SAFETY: the call's.
    unsafe {
        let bias = call.bias.add(block).cast::<f32>();
        let mut sums = [[V::splat(0.0); C]; R];
        for r in 0..R {
            for c in 0..C {
                sums[r][c] = V::load(bias.add(c * V::N));
            }
        }
        if !call.plus.is_null() {
            for r in 0..R {
                let plus = call.plus.add(call.plus_rows[row + r] + block * LANES);
                for c in 0..C {
                    // A block that is not full may end behind the last row.
                    if block * LANES + c * V::N < call.channels {
                        sums[r][c] = sums[r][c].add(V::load(plus.add(c * V::N)));
                    }
                }
            }
        }
        sums
    }
}

/// # Safety
/// As for [`Run`].
#[inline(always)]
unsafe fn finish<V: Vector, const R: usize, const C: usize>(
    call: &Call<'_>,
    row: usize,
    block: usize,
    sums: &[[V; C]; R],
) {
    let width = (call.channels - block * LANES).min(C * V::N);
    // SAFETY: the call's.
    unsafe {
        let (low, high) = (V::splat(call.low), V::splat(call.high));
        for r in 0..R {
            let out = call.out.add(call.out_rows[row + r] + block * LANES);
            if width == C * V::N {
                for c in 0..C {
                    sums[r][c].clamp(low, high).store(out.add(c * V::N));
                }
            } else {
                // The next pixel's channels follow: they must not be written over.
                let mut whole = [0.0_f32; 16 * LANES];
                for c in 0..C {
                    sums[r][c].clamp(low, high).store(whole[c * V::N..].as_mut_ptr());
                }
                std::ptr::copy_nonoverlapping(whole.as_ptr(), out, width);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1, always the same.
    fn numbers() -> impl FnMut() -> f32 {
        let mut state = 1_u64;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        }
    }

    /// A kernel against the sums in f64.
    fn check(kernels: &Kernels, each: bool, count: usize, channels: usize, segments: usize, length: usize, add: bool) {
        let mut next = numbers();
        let blocks = channels.div_ceil(LANES);
        let size = segments * if each { 1 } else { length };
        let x: Vec<f32> = (0..8192).map(|_| next()).collect();
        let weights: Vec<Lanes> = (0..size * blocks).map(|_| Lanes(std::array::from_fn(|_| next()))).collect();
        let bias: Vec<Lanes> = (0..blocks).map(|_| Lanes(std::array::from_fn(|_| next()))).collect();
        let offsets: Vec<usize> = (0..segments).map(|at| at * 100).collect();
        let table = |step: usize| -> Vec<usize> {
            (0..count.next_multiple_of(ROWS)).map(|row| row.min(count - 1) * step).collect()
        };
        let (rows, places) = (table(17), table(channels));
        let plus: Vec<f32> = (0..count * channels + LANES).map(|_| next()).collect();
        let mut out = vec![f32::NAN; count * channels];
        let call = Call {
            source: x.as_ptr(),
            plus: if add { plus.as_ptr() } else { std::ptr::null() },
            out: out.as_mut_ptr(),
            count,
            rows: &rows,
            plus_rows: &places,
            out_rows: &places,
            segments: &offsets,
            length,
            weights: weights.as_ptr(),
            bias: bias.as_ptr(),
            channels,
            low: -1.5,
            high: 2.0,
        };
        // SAFETY: sizes as above; the table is one that the processor has.
        unsafe { (if each { kernels.each } else { kernels.dense })(&call) };
        for row in 0..count {
            for channel in 0..channels {
                let (block, lane) = (channel / LANES, channel % LANES);
                let mut sum = f64::from(bias[block].0[lane]);
                if add {
                    sum += f64::from(plus[row * channels + channel]);
                }
                for (at, offset) in offsets.iter().enumerate() {
                    let x = &x[row * 17 + offset..];
                    if each {
                        sum += f64::from(x[channel]) * f64::from(weights[block * size + at].0[lane]);
                        continue;
                    }
                    for k in 0..length {
                        sum += f64::from(x[k]) * f64::from(weights[block * size + at * length + k].0[lane]);
                    }
                }
                let (want, found) = (sum.clamp(-1.5, 2.0), f64::from(out[row * channels + channel]));
                assert!((want - found).abs() < 1e-4, "{} {count} by {channels}: {want} {found}", kernels.name);
            }
        }
    }

    #[test]
    fn every_kernel_sums_right() {
        for kernels in available() {
            for (segments, length) in [(1, 1), (3, 9), (9, 4)] {
                for count in [1, 3, 4, 6, 13] {
                    for channels in [1, 12, 16, 24, 64, 80, 200] {
                        for add in [false, true] {
                            check(kernels, false, count, channels, segments, length, add);
                            check(kernels, true, count, channels, segments, length, add);
                        }
                    }
                }
            }
        }
    }
}
