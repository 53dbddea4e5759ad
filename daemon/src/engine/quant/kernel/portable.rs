//! The reference: plain loops, which the compiler may turn into what vector instructions every processor has.

use super::{Block, Kernels, LANES, ROWS, Requant, SIGNED, Sums};

/// Runs anywhere.
pub const PORTABLE: Kernels =
    Kernels { name: "portable", dot, depthwise, requant: round_sums, add: add_bytes, quantize: round_floats };

/// A stored byte's value.
#[inline(always)]
fn value(byte: u8) -> i32 {
    if SIGNED { i32::from(byte as i8) } else { i32::from(byte) }
}

unsafe fn dot(
    x: &[*const u8; ROWS],
    rows: usize,
    segments: &[usize],
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    for (row, x) in x[..rows].iter().enumerate() {
        for block in 0..blocks {
            let mut sum = [0_i32; LANES];
            for (at, segment) in segments.iter().enumerate() {
                for quad in 0..quads {
                    // SAFETY: the caller's, see [`Kernels::dot`].
                    let (x, w) = unsafe {
                        let w = w.add((block * segments.len() + at) * quads + quad);
                        (x.add(segment + quad * 4).cast::<[u8; 4]>().read(), &(*w).0)
                    };
                    for (lane, sum) in sum.iter_mut().enumerate() {
                        for i in 0..4 {
                            *sum = sum.wrapping_add(value(x[i]) * i32::from(w[lane * 4 + i]));
                        }
                    }
                }
            }
            // SAFETY: as above.
            unsafe { sums.add(block * rows + row).write(Sums(sum)) };
        }
    }
}

unsafe fn depthwise(x: *const u8, step: usize, pixels: usize, taps: &[usize], w: *const Block, sums: *mut Sums) {
    for pixel in 0..pixels {
        let mut sum = [0_i32; LANES];
        for (at, tap) in taps.iter().enumerate() {
            // SAFETY: the caller's, see [`Kernels::depthwise`].
            let (x, w) = unsafe { (x.add(pixel * step + tap).cast::<[u8; LANES]>().read(), &(*w.add(at / 4)).0) };
            for (lane, sum) in sum.iter_mut().enumerate() {
                *sum = sum.wrapping_add(value(x[lane]) * i32::from(w[lane * 4 + at % 4]));
            }
        }
        // SAFETY: as above.
        unsafe { sums.add(pixel).write(Sums(sum)) };
    }
}

/// To the byte that is stored. `x` is within what a byte holds.
#[inline(always)]
fn byte(x: f32, low: f32, high: f32, zero: i32) -> u8 {
    // Written so that a value that is no number gives the least byte on every processor.
    let x = if x > low { x } else { low };
    let x = if x < high { x } else { high };
    // SAFETY: between `low` and `high`, which are bytes.
    (unsafe { x.round_ties_even().to_int_unchecked::<i32>() } + zero) as u8
}

/// See [`Kernels::requant`].
///
/// # Safety
/// As there.
#[inline(always)]
pub unsafe fn round_sums(
    sums: &[Sums],
    bias: &Sums,
    scale: &[f32; LANES],
    to: Requant,
    out: *mut u8,
    stride: usize,
    lanes: usize,
) {
    for (row, sums) in sums.iter().enumerate() {
        let mut bytes = [0; LANES];
        for lane in 0..LANES {
            let sum = sums.0[lane].wrapping_add(bias.0[lane]) as f32 * scale[lane];
            bytes[lane] = byte(sum, to.low, to.high, to.zero);
        }
        // SAFETY: the caller's.
        unsafe {
            let out = out.add(row * stride);
            if lanes == LANES {
                out.cast::<[u8; LANES]>().write(bytes);
            } else {
                out.copy_from_nonoverlapping(bytes.as_ptr(), lanes);
            }
        }
    }
}

/// See [`Kernels::add`].
#[inline(always)]
pub fn add_bytes(a: &[u8], b: &[u8], by: (f32, f32, f32), range: (f32, f32), out: &mut [u8]) {
    for ((a, b), out) in a.iter().zip(b).zip(out) {
        *out = byte(value(*a) as f32 * by.0 + (value(*b) as f32 * by.1 + by.2), range.0, range.1, 0);
    }
}

/// See [`Kernels::quantize`].
#[inline(always)]
pub fn round_floats(x: &[f32], scale: f32, to: Requant, out: &mut [u8]) {
    for (x, out) in x.iter().zip(out) {
        *out = byte(x / scale, to.low, to.high, to.zero);
    }
}
