//! NEON for every aarch64 core, and NEON with the dot product instruction.

use std::arch::aarch64::*;
use std::arch::asm;

use super::portable::{add_bytes, round_floats, round_sums};
use super::{Block, Kernels, LANES, ROWS, Requant, Sums};

pub fn add_available(found: &mut Vec<&'static Kernels>) {
    found.push(&NEON);
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        found.push(&DOTPROD);
    }
}

// NEON is part of the architecture: the portable loops are compiled for it as they are.
unsafe fn requant(
    sums: &[Sums],
    bias: &Sums,
    scale: &[f32; LANES],
    to: Requant,
    out: *mut u8,
    stride: usize,
    lanes: usize,
) {
    // SAFETY: the caller's.
    unsafe { round_sums(sums, bias, scale, to, out, stride, lanes) }
}
unsafe fn add(a: &[u8], b: &[u8], by: (f32, f32, f32), range: (f32, f32), out: &mut [u8]) {
    add_bytes(a, b, by, range, out);
}
unsafe fn quantize(x: &[f32], scale: f32, to: Requant, out: &mut [u8]) {
    round_floats(x, scale, to, out);
}

const NEON: Kernels = Kernels { name: "neon", dot: dot_neon, depthwise: depthwise_neon, requant, add, quantize };
const DOTPROD: Kernels =
    Kernels { name: "neon-dotprod", dot: dot_dotprod, depthwise: depthwise_dotprod, requant, add, quantize };

/// Lanes of `sum` get four products each more.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only. The intrinsic is not stable yet.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// The same with one of the four groups of 4 bytes of `b`, for every lane.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot_lane<const L: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{lane}]", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
             lane = const L, options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

#[target_feature(enable = "dotprod")]
unsafe fn dot_dotprod(
    x: &[*const u8; ROWS],
    rows: usize,
    segments: &[usize],
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    /// `R` rows by one block: `4 R` sums, the block's 4 registers and a row's bytes.
    #[target_feature(enable = "dotprod")]
    unsafe fn tile<const R: usize>(
        x: &[*const u8],
        segments: &[usize],
        quads: usize,
        mut w: *const Block,
        sums: *mut Sums,
    ) {
        // SAFETY: the caller's, see [`Kernels::dot`].
        unsafe {
            let mut sum = [[vdupq_n_s32(0); 4]; R];
            macro_rules! block {
                ($row:ident, $x:ident, $i:ident, $add:expr) => {
                    let weights: [int8x16_t; 4] = std::array::from_fn(|i| vld1q_s8(w.cast::<i8>().add(i * 16)));
                    w = w.add(1);
                    for $row in 0..R {
                        for $i in 0..4 {
                            let $x = weights[$i];
                            sum[$row][$i] = $add;
                        }
                    }
                };
            }
            for segment in segments {
                let mut at: [*const u8; R] = std::array::from_fn(|row| x[row].add(*segment));
                for _ in 0..quads / 4 {
                    let x: [int8x16_t; R] = std::array::from_fn(|row| vld1q_s8(at[row].cast()));
                    block!(row, weights, i, sdot_lane::<0>(sum[row][i], weights, x[row]));
                    block!(row, weights, i, sdot_lane::<1>(sum[row][i], weights, x[row]));
                    block!(row, weights, i, sdot_lane::<2>(sum[row][i], weights, x[row]));
                    block!(row, weights, i, sdot_lane::<3>(sum[row][i], weights, x[row]));
                    at.iter_mut().for_each(|at| *at = at.add(16));
                }
                for _ in 0..quads % 4 {
                    let x: [int8x16_t; R] = std::array::from_fn(|row| four(at[row]));
                    block!(row, weights, i, sdot(sum[row][i], weights, x[row]));
                    at.iter_mut().for_each(|at| *at = at.add(4));
                }
            }
            for (row, sum) in sum.into_iter().enumerate() {
                for (i, sum) in sum.into_iter().enumerate() {
                    vst1q_s32(sums.add(row).cast::<i32>().add(i * 4), sum);
                }
            }
        }
    }
    for block in 0..blocks {
        // SAFETY: the caller's, within its blocks.
        unsafe {
            let (x, w, sums) = (&x[..rows], w.add(block * segments.len() * quads), sums.add(block * rows));
            match rows {
                1 => tile::<1>(x, segments, quads, w, sums),
                2 => tile::<2>(x, segments, quads, w, sums),
                3 => tile::<3>(x, segments, quads, w, sums),
                4 => tile::<4>(x, segments, quads, w, sums),
                5 => tile::<5>(x, segments, quads, w, sums),
                _ => tile::<6>(x, segments, quads, w, sums),
            }
        }
    }
}

/// The 4 bytes at `x`, four times.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn four(x: *const u8) -> int8x16_t {
    // SAFETY: the caller's.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned())) }
}

#[target_feature(enable = "dotprod")]
unsafe fn depthwise_dotprod(
    x: *const u8,
    step: usize,
    pixels: usize,
    taps: &[usize],
    w: *const Block,
    sums: *mut Sums,
) {
    for pixel in 0..pixels {
        // SAFETY: the caller's, see [`Kernels::depthwise`].
        unsafe {
            let x = x.add(pixel * step).cast::<i8>();
            let mut sum = [vdupq_n_s32(0); 4];
            for (quad, taps) in taps.chunks_exact(4).enumerate() {
                let w = w.add(quad).cast::<i8>();
                let [a, b, c, d]: [int8x16_t; 4] = std::array::from_fn(|i| vld1q_s8(x.add(taps[i])));
                let (ab, cd) = (vzipq_s8(a, b), vzipq_s8(c, d));
                let wide = |x: int8x16_t| vreinterpretq_s16_s8(x);
                let low = vzipq_s16(wide(ab.0), wide(cd.0));
                let high = vzipq_s16(wide(ab.1), wide(cd.1));
                for (i, x) in [low.0, low.1, high.0, high.1].into_iter().enumerate() {
                    sum[i] = sdot(sum[i], vreinterpretq_s8_s16(x), vld1q_s8(w.add(i * 16)));
                }
            }
            for (i, sum) in sum.into_iter().enumerate() {
                vst1q_s32(sums.add(pixel).cast::<i32>().add(i * 4), sum);
            }
        }
    }
}

unsafe fn dot_neon(
    x: &[*const u8; ROWS],
    rows: usize,
    segments: &[usize],
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    /// `R` rows by one block. Each register of sums holds two halves of a channel's four; pairs are added last.
    unsafe fn tile<const R: usize>(
        x: &[*const u8],
        segments: &[usize],
        quads: usize,
        mut w: *const Block,
        sums: *mut Sums,
    ) {
        // SAFETY: the caller's, see [`Kernels::dot`].
        unsafe {
            let mut sum = [[vdupq_n_s32(0); 8]; R];
            for segment in segments {
                let mut x: [*const u8; R] = std::array::from_fn(|row| x[row].add(*segment));
                for _ in 0..quads {
                    let bytes: [int8x16_t; R] = std::array::from_fn(|row| four(x[row]));
                    for i in 0..4 {
                        let w = vld1q_s8(w.cast::<i8>().add(i * 16));
                        for row in 0..R {
                            let low = vmull_s8(vget_low_s8(w), vget_low_s8(bytes[row]));
                            sum[row][2 * i] = vpadalq_s16(sum[row][2 * i], low);
                            sum[row][2 * i + 1] = vpadalq_s16(sum[row][2 * i + 1], vmull_high_s8(w, bytes[row]));
                        }
                    }
                    x.iter_mut().for_each(|x| *x = x.add(4));
                    w = w.add(1);
                }
            }
            for (row, sum) in sum.into_iter().enumerate() {
                for i in 0..4 {
                    let pairs = vpaddq_s32(sum[2 * i], sum[2 * i + 1]);
                    vst1q_s32(sums.add(row).cast::<i32>().add(i * 4), pairs);
                }
            }
        }
    }
    for block in 0..blocks {
        for row in (0..rows).step_by(3) {
            // SAFETY: the caller's, within its rows and blocks.
            unsafe {
                let (x, w) = (&x[row..rows], w.add(block * segments.len() * quads));
                let sums = sums.add(block * rows + row);
                match x.len() {
                    1 => tile::<1>(x, segments, quads, w, sums),
                    2 => tile::<2>(x, segments, quads, w, sums),
                    _ => tile::<3>(x, segments, quads, w, sums),
                }
            }
        }
    }
}

unsafe fn depthwise_neon(x: *const u8, step: usize, pixels: usize, taps: &[usize], w: *const Block, sums: *mut Sums) {
    for pixel in 0..pixels {
        // SAFETY: the caller's, see [`Kernels::depthwise`].
        unsafe {
            let x = x.add(pixel * step).cast::<i8>();
            let mut sum = [vdupq_n_s32(0); 4];
            for (quad, taps) in taps.chunks_exact(4).enumerate() {
                for half in 0..2 {
                    // Four taps of 8 channels, taken apart by the load.
                    let w = vld4_s8(w.add(quad).cast::<i8>().add(half * 32));
                    for (i, w) in [w.0, w.1, w.2, w.3].into_iter().enumerate() {
                        let products = vmull_s8(vld1_s8(x.add(taps[i] + half * 8)), w);
                        sum[half * 2] = vaddw_s16(sum[half * 2], vget_low_s16(products));
                        sum[half * 2 + 1] = vaddw_high_s16(sum[half * 2 + 1], products);
                    }
                }
            }
            for (i, sum) in sum.into_iter().enumerate() {
                vst1q_s32(sums.add(pixel).cast::<i32>().add(i * 4), sum);
            }
        }
    }
}
