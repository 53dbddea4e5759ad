//! NEON for every aarch64 core, and NEON with the dot product instruction.

use std::arch::aarch64::*;
use std::arch::asm;

use super::portable::{add_bytes, round_floats, round_sums};
use super::{BLOCKS, Block, Kernels, LANES, ROWS, Requant, Sums};

pub fn add_available(found: &mut Vec<&'static Kernels>) {
    found.push(&NEON);
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        found.push(&DOTPROD);
    }
}

// NEON is part of the architecture: the portable loops are compiled for it as they are.
unsafe fn requant(sums: &[Sums], bias: &Sums, scale: &[f32; LANES], to: Requant, out: &mut [[u8; LANES]]) {
    round_sums(sums, bias, scale, to, out);
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
    x: *const u8,
    stride: usize,
    rows: usize,
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    /// `R` rows by one block: `4 R` sums, the block's 4 registers and a row's bytes.
    #[target_feature(enable = "dotprod")]
    unsafe fn tile<const R: usize>(x: *const u8, stride: usize, quads: usize, w: *const Block, sums: *mut Sums) {
        // SAFETY: the caller's, see [`Kernels::dot`].
        unsafe {
            let mut sum = [[vdupq_n_s32(0); 4]; R];
            let load = |quad: usize| -> [int8x16_t; 4] {
                std::array::from_fn(|i| vld1q_s8(w.add(quad).cast::<i8>().add(i * 16)))
            };
            let mut quad = 0;
            while quad + 4 <= quads {
                let x: [int8x16_t; R] = std::array::from_fn(|row| vld1q_s8(x.add(row * stride + quad * 4).cast()));
                macro_rules! step {
                    ($lane:literal) => {
                        let w = load(quad + $lane);
                        for row in 0..R {
                            for i in 0..4 {
                                sum[row][i] = sdot_lane::<$lane>(sum[row][i], w[i], x[row]);
                            }
                        }
                    };
                }
                step!(0);
                step!(1);
                step!(2);
                step!(3);
                quad += 4;
            }
            while quad < quads {
                let w = load(quad);
                for row in 0..R {
                    let x = vreinterpretq_s8_s32(vdupq_n_s32(
                        x.add(row * stride + quad * 4).cast::<i32>().read_unaligned(),
                    ));
                    for i in 0..4 {
                        sum[row][i] = sdot(sum[row][i], w[i], x);
                    }
                }
                quad += 1;
            }
            for (row, sum) in sum.into_iter().enumerate() {
                for (i, sum) in sum.into_iter().enumerate() {
                    vst1q_s32(sums.add(row).cast::<i32>().add(i * 4), sum);
                }
            }
        }
    }
    debug_assert!(rows <= ROWS && blocks <= BLOCKS);
    for block in 0..blocks {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's, within its rows and blocks.
            unsafe {
                let (x, w, sums) = (x.add(row * stride), w.add(block * quads), sums.add(block * rows + row));
                match rows - row {
                    1 => tile::<1>(x, stride, quads, w, sums),
                    2 => tile::<2>(x, stride, quads, w, sums),
                    3 => tile::<3>(x, stride, quads, w, sums),
                    4 => tile::<4>(x, stride, quads, w, sums),
                    5 => tile::<5>(x, stride, quads, w, sums),
                    _ => tile::<6>(x, stride, quads, w, sums),
                }
            }
            row += 6;
        }
    }
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
    x: *const u8,
    stride: usize,
    rows: usize,
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    /// `R` rows by one block. Each register of products holds two halves of a channel's four; pairs are added last.
    unsafe fn tile<const R: usize>(x: *const u8, stride: usize, quads: usize, w: *const Block, sums: *mut Sums) {
        // SAFETY: the caller's, see [`Kernels::dot`].
        unsafe {
            let mut sum = [[vdupq_n_s32(0); 8]; R];
            for quad in 0..quads {
                let x: [int8x8_t; R] = std::array::from_fn(|row| {
                    vreinterpret_s8_s32(vdup_n_s32(x.add(row * stride + quad * 4).cast::<i32>().read_unaligned()))
                });
                let w = w.add(quad).cast::<i8>();
                for i in 0..8 {
                    let w = vld1_s8(w.add(i * 8));
                    for row in 0..R {
                        sum[row][i] = vpadalq_s16(sum[row][i], vmull_s8(w, x[row]));
                    }
                }
            }
            for (row, sum) in sum.into_iter().enumerate() {
                for i in 0..4 {
                    vst1q_s32(sums.add(row).cast::<i32>().add(i * 4), vpaddq_s32(sum[2 * i], sum[2 * i + 1]));
                }
            }
        }
    }
    debug_assert!(rows <= ROWS && blocks <= BLOCKS);
    for block in 0..blocks {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's, within its rows and blocks.
            unsafe {
                let (x, w, sums) = (x.add(row * stride), w.add(block * quads), sums.add(block * rows + row));
                match rows - row {
                    1 => tile::<1>(x, stride, quads, w, sums),
                    2 => tile::<2>(x, stride, quads, w, sums),
                    _ => tile::<3>(x, stride, quads, w, sums),
                }
            }
            row += 3;
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
