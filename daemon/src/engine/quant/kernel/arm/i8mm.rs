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

/// The 8 bytes at two rows; both move on.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn eights(a: &mut *const i8, b: &mut *const i8) -> int8x16_t {
    let bytes;
    // SAFETY: the caller's.
    unsafe {
        asm!("ldr {bytes:d}, [{a}], #8", "ld1 {{{bytes:v}.d}}[1], [{b}], #8", bytes = out(vreg) bytes,
             a = inout(reg) *a, b = inout(reg) *b, options(readonly, nostack, preserves_flags));
    }
    bytes
}

/// 32 bytes of a block; `w` moves on.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn half(w: &mut *const i8) -> [int8x16_t; 2] {
    let (a, b);
    // SAFETY: the caller's.
    unsafe {
        asm!("ld1 {{v28.16b, v29.16b}}, [{w}], #32", w = inout(reg) *w, out("v28") a, out("v29") b,
             options(readonly, nostack, preserves_flags));
    }
    [a, b]
}

/// The same, elsewhere.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn other_half(w: &mut *const i8) -> [int8x16_t; 2] {
    let (a, b);
    // SAFETY: the caller's.
    unsafe {
        asm!("ld1 {{v30.16b, v31.16b}}, [{w}], #32", w = inout(reg) *w, out("v30") a, out("v31") b,
             options(readonly, nostack, preserves_flags));
    }
    [a, b]
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
                let mut x: [_; R] = std::array::from_fn(|row| start[row].add(*segment as usize));
                // The bytes of a pair of rows; the last one may have no other.
                macro_rules! pair {
                    ($p:expr) => {{
                        let mut a = x[$p * 2];
                        let mut b = x[($p * 2 + 1).min(R - 1)];
                        let bytes = eights(&mut a, &mut b);
                        x[$p * 2] = a;
                        x[($p * 2 + 1).min(R - 1)] = b;
                        bytes
                    }};
                }
                for _ in 0..layer.quads / 2 {
                    let mut bytes = [vdupq_n_s8(0); 3];
                    for p in 0..pairs {
                        bytes[p] = pair!(p);
                    }
                    let mut next = w.add(64);
                    for h in 0..2 {
                        let (one, other) = (half(&mut w), other_half(&mut next));
                        for i in 0..2 {
                            let weights = both(one[i], other[i]);
                            for p in 0..pairs {
                                let sums = &mut sums[p][h * 2 + i];
                                sums[0] = smmla(sums[0], bytes[p], weights[0]);
                                sums[1] = smmla(sums[1], bytes[p], weights[1]);
                            }
                        }
                    }
                    w = next;
                }
                if layer.quads % 2 == 1 {
                    // The other quad's weights are zeros, whatever bytes follow the row.
                    let mut bytes = [vdupq_n_s8(0); 3];
                    for p in 0..pairs {
                        bytes[p] = pair!(p);
                    }
                    for h in 0..2 {
                        let one = half(&mut w);
                        for i in 0..2 {
                            let weights = both(one[i], vdupq_n_s8(0));
                            for p in 0..pairs {
                                let sums = &mut sums[p][h * 2 + i];
                                sums[0] = smmla(sums[0], bytes[p], weights[0]);
                                sums[1] = smmla(sums[1], bytes[p], weights[1]);
                            }
                        }
                    }
                }
            }
            let bias = load(bias);
            let mut rows = [[vdupq_n_s32(0); 4]; R];
            for p in 0..pairs {
                for i in 0..4 {
                    let [even, odd] = sums[p][i];
                    let low = vreinterpretq_s64_s32(vtrn1q_s32(even, odd));
                    let high = vreinterpretq_s64_s32(vtrn2q_s32(even, odd));
                    rows[p * 2][i] = vaddq_s32(vreinterpretq_s32_s64(vzip1q_s64(low, high)), bias[i]);
                    if p * 2 + 1 < R {
                        rows[p * 2 + 1][i] = vaddq_s32(vreinterpretq_s32_s64(vzip2q_s64(low, high)), bias[i]);
                    }
                }
            }
            out.put(row, block, rows);
        }
    }
}
