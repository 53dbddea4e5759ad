//! With `smmla`: 2 rows by 8 inputs times 2 channels by 8 inputs, 32 products an instruction.

use std::arch::aarch64::*;
use std::arch::asm;

use super::*;

/// `sum[r][c] += Σ a[r] · b[c]`, for two rows of each.
#[inline]
#[target_feature(enable = "i8mm")]
fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers only. The intrinsic is not stable yet.
    unsafe {
        asm!("smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
             options(nomem, nostack, preserves_flags));
    }
    sum
}

#[target_feature(enable = "dotprod,i8mm")]
pub unsafe fn product(layer: &Product, target: &Target) {
    if layer.rows.len() == 1 {
        // Half of each instruction would be for nothing.
        // SAFETY: the caller's.
        return unsafe { dotprod::product(layer, target) };
    }
    panels!(layer, target, panel, rows: 6, single: 1, (2, 1) (3, 1) (4, 1) (5, 1) (6, 1));
}

/// The 8 bytes at two rows.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn eights(a: *const i8, b: *const i8) -> int8x16_t {
    // SAFETY: the caller's.
    unsafe { vcombine_s8(vld1_s8(a), vld1_s8(b)) }
}

#[inline(always)]
fn both(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    // SAFETY: NEON is part of the architecture.
    unsafe {
        let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
        [vreinterpretq_s8_s32(vtrn1q_s32(a, b)), vreinterpretq_s8_s32(vtrn2q_s32(a, b))]
    }
}

/// Rows by a block, `R` rows at a time, in pairs of which the last may be one row twice.
///
/// Two quads of 4 channels become two registers of 2 channels by 8 inputs each: channels 0 and 2, 1 and 3.
#[target_feature(enable = "dotprod,i8mm")]
unsafe fn panel<const R: usize, const B: usize>(layer: &Product, out: &Out, from: usize, to: usize, block: usize) {
    // SAFETY: the caller's, see [`Kernels::product`].
    unsafe {
        let size = layer.segments.len() * layer.quads;
        let bias = layer.bias.get_unchecked(block);
        let weights: *const i8 = layer.weights.as_ptr().add(block * size).cast();
        let pairs = const { R.div_ceil(2) };
        for row in (from..to).step_by(R) {
            let start = starts::<R>(layer, row);
            let mut w = weights;
            let mut sums = [[[vdupq_n_s32(0); 2]; 4]; 3];
            for segment in layer.segments {
                let mut x = start.map(|x| x.add(*segment as usize));
                for _ in 0..layer.quads / 2 {
                    let bytes: [int8x16_t; 3] =
                        std::array::from_fn(|p| eights(x[(p * 2).min(R - 1)], x[(p * 2 + 1).min(R - 1)]));
                    x.iter_mut().for_each(|x| *x = x.add(8));
                    for i in 0..4 {
                        let weights = both(vld1q_s8(w.add(i * 16)), vld1q_s8(w.add(64 + i * 16)));
                        for p in 0..pairs {
                            sums[p][i][0] = smmla(sums[p][i][0], bytes[p], weights[0]);
                            sums[p][i][1] = smmla(sums[p][i][1], bytes[p], weights[1]);
                        }
                    }
                    w = w.add(128);
                }
                if layer.quads % 2 == 1 {
                    // The other quad's weights are zeros, whatever bytes follow the row.
                    let bytes: [int8x16_t; 3] =
                        std::array::from_fn(|p| eights(x[(p * 2).min(R - 1)], x[(p * 2 + 1).min(R - 1)]));
                    for i in 0..4 {
                        let weights = both(vld1q_s8(w.add(i * 16)), vdupq_n_s8(0));
                        for p in 0..pairs {
                            sums[p][i][0] = smmla(sums[p][i][0], bytes[p], weights[0]);
                            sums[p][i][1] = smmla(sums[p][i][1], bytes[p], weights[1]);
                        }
                    }
                    w = w.add(64);
                }
            }
            let bias = load(bias);
            let rows: [[Four<int32x4_t>; 2]; 3] = sums.map(|sums| {
                let four = sums.map(|[even, odd]| {
                    let low = vreinterpretq_s64_s32(vtrn1q_s32(even, odd));
                    let high = vreinterpretq_s64_s32(vtrn2q_s32(even, odd));
                    [vreinterpretq_s32_s64(vzip1q_s64(low, high)), vreinterpretq_s32_s64(vzip2q_s64(low, high))]
                });
                std::array::from_fn(|row| std::array::from_fn(|i| vaddq_s32(four[i][row], bias[i])))
            });
            let rows: [Four<int32x4_t>; R] = std::array::from_fn(|i| rows[i / 2][i % 2]);
            out.put(row, block, rows);
        }
    }
}
