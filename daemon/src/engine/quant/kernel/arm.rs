//! NEON for every core, and its dot product where there is one.

use std::arch::aarch64::*;
use std::arch::asm;

use super::portable::{add_bytes, round_floats};
use super::{Columns, Kernels, LANES, Product, Requant, Sums, Target};

pub fn add_available(found: &mut Vec<&'static Kernels>) {
    found.push(&NEON);
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        found.push(&DOTPROD);
    }
}

// NEON is part of the architecture: the portable loops are compiled for it as they are.
const NEON: Kernels =
    Kernels { name: "neon", product: product_neon, columns: columns_neon, add: add_bytes, quantize: round_floats };
const DOTPROD: Kernels = Kernels { name: "neon-dotprod", product: product_dotprod, columns: columns_dotprod, ..NEON };

/// Defines a table's walk over a layer in tiles of up to `$most` rows by one block of channels, whose weights stay
/// in the nearest cache.
macro_rules! product {
    ($features:literal, $product:ident, $tile:ident, $most:literal, $($rows:literal)*) => {
        #[target_feature(enable = $features)]
        unsafe fn $product(layer: &Product, target: &Target) {
            let tiles = layer.rows.len().div_ceil($most);
            for block in 0..layer.bias.len() {
                let mut row = 0;
                for tile in 0..tiles {
                    let n = (layer.rows.len() + tile) / tiles;
                    // SAFETY: the caller's, see [`Kernels::product`].
                    unsafe {
                        match n {
                            $($rows => $tile::<$rows>(layer, target, row, block),)*
                            _ => unreachable!("every tile is listed"),
                        }
                    }
                    row += n;
                }
            }
        }
    };
}
product!("neon", product_neon, tile_neon, 3, 1 2 3);
product!("neon,dotprod", product_dotprod, tile_dotprod, 6, 1 2 3 4 5 6);

/// The `R` rows from `row` on.
///
/// # Safety
/// There are as many.
#[inline(always)]
unsafe fn starts<const R: usize>(layer: &Product, row: usize) -> [*const u8; R] {
    // SAFETY: the caller's.
    std::array::from_fn(|i| unsafe { layer.x.add(*layer.rows.get_unchecked(row + i) as usize) })
}

#[inline(always)]
fn load(sums: &Sums) -> [int32x4_t; 4] {
    // SAFETY: 16 numbers.
    std::array::from_fn(|i| unsafe { vld1q_s32(sums.0.as_ptr().add(i * 4)) })
}

/// See [`super::portable::put`].
#[inline(always)]
unsafe fn put(target: &Target, row: usize, block: usize, blocks: usize, sums: [int32x4_t; 4]) {
    // SAFETY: the caller's.
    unsafe {
        match target {
            Target::Sums(to) => {
                let to = to.add(row * blocks + block).cast::<i32>();
                for (i, sum) in sums.into_iter().enumerate() {
                    vst1q_s32(to.add(i * 4), sum);
                }
            }
            Target::Bytes { scale, to, out, rows, channels } => {
                let scale: *const f32 = scale.as_ptr().add(block).cast();
                let (low, high, zero) = (vdupq_n_f32(to.low), vdupq_n_f32(to.high), vdupq_n_s32(to.zero));
                let words: [int16x4_t; 4] = std::array::from_fn(|i| {
                    let x = vmulq_f32(vcvtq_f32_s32(sums[i]), vld1q_f32(scale.add(i * 4)));
                    // These two take the limit where `x` is no number.
                    let x = vminnmq_f32(vmaxnmq_f32(x, low), high);
                    vmovn_s32(vaddq_s32(vcvtnq_s32_f32(x), zero))
                });
                let low = vmovn_s16(vcombine_s16(words[0], words[1]));
                let bytes = vcombine_s8(low, vmovn_s16(vcombine_s16(words[2], words[3])));
                let out = out.add(*rows.get_unchecked(row) as usize + block * LANES).cast::<i8>();
                let lanes = channels - block * LANES;
                if lanes >= LANES {
                    vst1q_s8(out, bytes);
                } else {
                    let mut all = [0; LANES];
                    vst1q_s8(all.as_mut_ptr(), bytes);
                    out.copy_from_nonoverlapping(all.as_ptr(), lanes);
                }
            }
        }
    }
}

/// `sum += a · b`, four bytes to each 32 bits.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes these registers alone; the intrinsic is not stable yet.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// The same with four bytes of `b`, those of lane `L`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_lane<const L: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as above.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) sum, in(vreg) a, in(vreg) b, const L,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
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

/// `R` rows by one block: `4 R` sums, the block's 4 registers and a row's bytes.
#[target_feature(enable = "neon,dotprod")]
unsafe fn tile_dotprod<const R: usize>(layer: &Product, target: &Target, row: usize, block: usize) {
    // SAFETY: the caller's, see [`Kernels::product`].
    unsafe {
        let start = starts::<R>(layer, row);
        let mut w = layer.weights.as_ptr().add(block * layer.segments.len() * layer.quads);
        let mut sums = [load(&layer.bias[block]); R];
        macro_rules! quad {
            ($sdot:expr, $x:ident) => {
                let weights: [int8x16_t; 4] = std::array::from_fn(|i| vld1q_s8(w.cast::<i8>().add(i * 16)));
                w = w.add(1);
                for row in 0..R {
                    for i in 0..4 {
                        sums[row][i] = $sdot(sums[row][i], weights[i], $x[row]);
                    }
                }
            };
        }
        for segment in layer.segments {
            let mut x = start.map(|x| x.add(*segment as usize));
            for _ in 0..layer.quads / 4 {
                let bytes = x.map(|x| vld1q_s8(x.cast()));
                quad!(sdot_lane::<0>, bytes);
                quad!(sdot_lane::<1>, bytes);
                quad!(sdot_lane::<2>, bytes);
                quad!(sdot_lane::<3>, bytes);
                x = x.map(|x| x.add(16));
            }
            for _ in 0..layer.quads % 4 {
                let bytes = x.map(|x| four(x));
                quad!(sdot, bytes);
                x = x.map(|x| x.add(4));
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            put(target, row + i, block, layer.bias.len(), sums);
        }
    }
}

/// `R` rows by one block. Each register of sums holds two halves of a channel's four; pairs are added last.
#[target_feature(enable = "neon")]
unsafe fn tile_neon<const R: usize>(layer: &Product, target: &Target, row: usize, block: usize) {
    // SAFETY: the caller's, see [`Kernels::product`].
    unsafe {
        let start = starts::<R>(layer, row);
        let mut w = layer.weights.as_ptr().add(block * layer.segments.len() * layer.quads);
        let mut sums = [[vdupq_n_s32(0); 8]; R];
        for segment in layer.segments {
            let mut x = start.map(|x| x.add(*segment as usize));
            for _ in 0..layer.quads {
                let bytes = x.map(|x| four(x));
                for i in 0..4 {
                    let w = vld1q_s8(w.cast::<i8>().add(i * 16));
                    for row in 0..R {
                        let low = vmull_s8(vget_low_s8(w), vget_low_s8(bytes[row]));
                        sums[row][2 * i] = vpadalq_s16(sums[row][2 * i], low);
                        sums[row][2 * i + 1] = vpadalq_s16(sums[row][2 * i + 1], vmull_high_s8(w, bytes[row]));
                    }
                }
                x = x.map(|x| x.add(4));
                w = w.add(1);
            }
        }
        let bias = load(&layer.bias[block]);
        for (i, sums) in sums.into_iter().enumerate() {
            let sums = std::array::from_fn(|i| vaddq_s32(bias[i], vpaddq_s32(sums[2 * i], sums[2 * i + 1])));
            put(target, row + i, block, layer.bias.len(), sums);
        }
    }
}

/// Four taps of 16 channels as 16 channels of 4 taps.
#[inline(always)]
unsafe fn transposed(x: *const u8, taps: &[u32; 4]) -> [int8x16_t; 4] {
    // SAFETY: the caller's: 16 bytes at each tap.
    unsafe {
        let [a, b, c, d] = taps.map(|tap| vld1q_s8(x.add(tap as usize).cast()));
        let (ab, cd) = (vzipq_s8(a, b), vzipq_s8(c, d));
        let half = |ab: int8x16_t, cd: int8x16_t| vzipq_s16(vreinterpretq_s16_s8(ab), vreinterpretq_s16_s8(cd));
        let (low, high) = (half(ab.0, cd.0), half(ab.1, cd.1));
        [low.0, low.1, high.0, high.1].map(|x| vreinterpretq_s8_s16(x))
    }
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn columns_dotprod(layer: &Columns, target: &Target) {
    let bias = load(layer.bias);
    for pixel in 0..layer.pixels {
        // SAFETY: the caller's, see [`Kernels::columns`].
        unsafe {
            let x = layer.x.add(pixel * layer.step);
            let mut sums = bias;
            for (taps, w) in layer.taps.iter().zip(layer.weights) {
                for (i, x) in transposed(x, taps).into_iter().enumerate() {
                    sums[i] = sdot(sums[i], x, vld1q_s8(w.0.as_ptr().add(i * 16)));
                }
            }
            put(target, pixel, 0, 1, sums);
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn columns_neon(layer: &Columns, target: &Target) {
    let bias = load(layer.bias);
    for pixel in 0..layer.pixels {
        // SAFETY: the caller's, see [`Kernels::columns`].
        unsafe {
            let x = layer.x.add(pixel * layer.step);
            let mut sums = [vdupq_n_s32(0); 8];
            for (taps, w) in layer.taps.iter().zip(layer.weights) {
                for (i, x) in transposed(x, taps).into_iter().enumerate() {
                    let w = vld1q_s8(w.0.as_ptr().add(i * 16));
                    sums[2 * i] = vpadalq_s16(sums[2 * i], vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                    sums[2 * i + 1] = vpadalq_s16(sums[2 * i + 1], vmull_high_s8(w, x));
                }
            }
            let sums = std::array::from_fn(|i| vaddq_s32(bias[i], vpaddq_s32(sums[2 * i], sums[2 * i + 1])));
            put(target, pixel, 0, 1, sums);
        }
    }
}
