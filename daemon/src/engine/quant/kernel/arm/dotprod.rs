//! With `sdot`: 16 products an instruction.

use std::arch::aarch64::*;
use std::arch::asm;

use super::*;

/// Lanes of `sum` get four products each more.
#[inline]
#[target_feature(enable = "dotprod")]
pub fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only. The intrinsic is not stable yet.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
             options(nomem, nostack, preserves_flags));
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
             lane = const L, options(nomem, nostack, preserves_flags));
    }
    sum
}

#[target_feature(enable = "dotprod")]
pub unsafe fn product(layer: &Product, target: &Target) {
    panels!(layer, target, panel, rows: 6, single: 4, (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (1, 2) (1, 4));
}

/// 32 bytes of a block; `w` moves on.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn weights_of(w: &mut *const i8) -> (int8x16_t, int8x16_t) {
    let (a, b);
    // SAFETY: the caller's.
    unsafe {
        asm!("ld1 {{v30.16b, v31.16b}}, [{w}], #32", w = inout(reg) *w, out("v30") a, out("v31") b,
             options(readonly, nostack, preserves_flags));
    }
    (a, b)
}

/// Rows by `B` blocks, `R` rows at a time: at most 24 registers of sums, 6 of rows' bytes and 2 of weights.
#[target_feature(enable = "dotprod")]
pub unsafe fn panel<const R: usize, const B: usize>(layer: &Product, out: &Out, from: usize, to: usize, first: usize) {
    // SAFETY: the caller's, see [`Kernels::product`].
    unsafe {
        let size = layer.segments.len() * layer.quads;
        let bias = layer.bias.as_ptr().add(first);
        let weights: [*const i8; B] = std::array::from_fn(|b| layer.weights.as_ptr().add((first + b) * size).cast());
        for row in (from..to).step_by(R) {
            let start = starts::<R>(layer, row);
            let mut sums: [_; B] = std::array::from_fn(|b| [load(&*bias.add(b)); R]);
            let mut w = weights;
            for segment in layer.segments {
                let mut x = start.map(|x| x.add(*segment as usize));
                for _ in 0..layer.quads / 4 {
                    let bytes: [int8x16_t; R] = std::array::from_fn(|row| vld1q_s8(x[row]));
                    x.iter_mut().for_each(|x| *x = x.add(16));
                    for b in 0..B {
                        macro_rules! lanes {
                            ($($lane:literal)*) => {$(
                                for half in 0..2 {
                                    let weights = weights_of(&mut w[b]);
                                    for row in 0..R {
                                        let sum = &mut sums[b][row][half * 2..];
                                        sum[0] = sdot_lane::<$lane>(sum[0], weights.0, bytes[row]);
                                        sum[1] = sdot_lane::<$lane>(sum[1], weights.1, bytes[row]);
                                    }
                                }
                            )*};
                        }
                        lanes!(0 1 2 3);
                    }
                }
                for _ in 0..layer.quads % 4 {
                    let bytes: [int8x16_t; R] = std::array::from_fn(|row| four(&mut x[row]));
                    for b in 0..B {
                        for half in 0..2 {
                            let weights = weights_of(&mut w[b]);
                            for row in 0..R {
                                let sum = &mut sums[b][row][half * 2..];
                                sum[0] = sdot(sum[0], weights.0, bytes[row]);
                                sum[1] = sdot(sum[1], weights.1, bytes[row]);
                            }
                        }
                    }
                }
            }
            for (b, sums) in sums.into_iter().enumerate() {
                out.put(row, first + b, sums);
            }
        }
    }
}

/// Four taps of 16 channels as four registers of 4 channels by 4 taps.
///
/// # Safety
/// 16 bytes can be read at each.
#[inline(always)]
unsafe fn transposed(x: *const i8, taps: &[u32; 4]) -> Four<int8x16_t> {
    // SAFETY: the caller's.
    unsafe {
        let [a, b, c, d]: Four<int8x16_t> = std::array::from_fn(|i| vld1q_s8(x.add(taps[i] as usize)));
        let wide = |x: int8x16_t| vreinterpretq_s16_s8(x);
        let (ab, cd) = (vzipq_s8(a, b), vzipq_s8(c, d));
        let low = vzipq_s16(wide(ab.0), wide(cd.0));
        let high = vzipq_s16(wide(ab.1), wide(cd.1));
        [low.0, low.1, high.0, high.1].map(|x| vreinterpretq_s8_s16(x))
    }
}

#[target_feature(enable = "dotprod")]
fn add_products(sums: &mut Four<int32x4_t>, x: &Four<int8x16_t>, w: &Four<int8x16_t>) {
    for i in 0..4 {
        sums[i] = sdot(sums[i], x[i], w[i]);
    }
}

#[target_feature(enable = "dotprod")]
pub unsafe fn columns(layer: &Columns, target: &Target) {
    // SAFETY: the caller's, see [`Kernels::columns`].
    unsafe {
        let weights = |quad: usize| -> Four<int8x16_t> {
            std::array::from_fn(|i| vld1q_s8(layer.weights.as_ptr().add(quad).cast::<i8>().add(i * 16)))
        };
        let (bias, out) = (load(layer.bias), Out::new(target, 1));
        for line in 0..layer.lines {
            let x = layer.x.cast::<i8>().add(line * layer.line);
            let first_row = line * layer.pixels;
            match layer.taps {
                // Successive pixels have columns of their windows in common: those are transposed once.
                [taps, _, _] if layer.shift != 0 && layer.step == layer.shift => {
                    let w = [weights(0), weights(1), weights(2)];
                    let mut at = x;
                    let mut next = || {
                        let column = transposed(at, taps);
                        at = at.add(layer.shift);
                        column
                    };
                    let (mut first, mut second) = (next(), next());
                    for pixel in 0..layer.pixels {
                        let third = next();
                        let mut sums = bias;
                        add_products(&mut sums, &first, &w[0]);
                        add_products(&mut sums, &second, &w[1]);
                        add_products(&mut sums, &third, &w[2]);
                        out.put(first_row + pixel, 0, [sums]);
                        (first, second) = (second, third);
                    }
                }
                [taps, _, _] if layer.shift != 0 && layer.step == 2 * layer.shift => {
                    let w = [weights(0), weights(1), weights(2)];
                    let mut at = x;
                    let mut next = || {
                        let column = transposed(at, taps);
                        at = at.add(layer.shift);
                        column
                    };
                    let mut first = next();
                    for pixel in 0..layer.pixels {
                        let mut sums = bias;
                        add_products(&mut sums, &first, &w[0]);
                        add_products(&mut sums, &next(), &w[1]);
                        first = next();
                        add_products(&mut sums, &first, &w[2]);
                        out.put(first_row + pixel, 0, [sums]);
                    }
                }
                _ => {
                    for pixel in 0..layer.pixels {
                        let x = x.add(pixel * layer.step);
                        let mut sums = bias;
                        for (quad, taps) in layer.taps.iter().enumerate() {
                            add_products(&mut sums, &transposed(x, taps), &weights(quad));
                        }
                        out.put(first_row + pixel, 0, [sums]);
                    }
                }
            }
        }
    }
}
