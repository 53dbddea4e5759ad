//! NEON for every aarch64 core; with the dot product instruction; with the matrix product instruction.

mod dotprod;
mod i8mm;
mod neon;

use std::arch::aarch64::*;
use std::arch::asm;

use super::portable::{add_bytes, round_floats};
use super::{Block, Columns, Kernels, LANES, Product, Requant, Sums, Target};

pub fn add_available(found: &mut Vec<&'static Kernels>) {
    found.push(&NEON);
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        found.push(&DOTPROD);
        if std::arch::is_aarch64_feature_detected!("i8mm") {
            found.push(&I8MM);
        }
    }
}

const NEON: Kernels = Kernels { name: "neon", product: neon::product, columns: neon::columns, add, quantize };
const DOTPROD: Kernels = Kernels { name: "neon-dotprod", product: dotprod::product, columns: dotprod::columns, ..NEON };
const I8MM: Kernels = Kernels { name: "neon-i8mm", product: i8mm::product, ..DOTPROD };

/// A block's sums, or 16 floats.
type Four<T> = [T; 4];

/// Where the rows from `row` on start.
///
/// # Safety
/// There are `R` of them.
#[inline(always)]
unsafe fn starts<const R: usize>(layer: &Product, row: usize) -> [*const i8; R] {
    // SAFETY: the caller's.
    std::array::from_fn(|i| unsafe { layer.x.cast::<i8>().add(*layer.rows.get_unchecked(row + i) as usize) })
}

/// The 4 bytes at `x`, four times; `x` moves on.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn four(x: &mut *const i8) -> int8x16_t {
    let bytes;
    // SAFETY: the caller's.
    unsafe {
        asm!("ld1r {{{bytes:v}.4s}}, [{x}], #4", bytes = out(vreg) bytes, x = inout(reg) *x,
             options(readonly, nostack, preserves_flags));
    }
    bytes
}

#[inline(always)]
fn load(sums: &Sums) -> Four<int32x4_t> {
    // SAFETY: 16 numbers.
    std::array::from_fn(|i| unsafe { vld1q_s32(sums.0.as_ptr().add(i * 4)) })
}

/// Where sums go, with what is the same for all of them worked out.
struct Out<'a> {
    target: &'a Target<'a>,
    blocks: usize,
    narrow: Narrow,
}

impl<'a> Out<'a> {
    fn new(target: &'a Target<'a>, blocks: usize) -> Self {
        let narrow = match target {
            Target::Sums(_) => Narrow::new(Requant { zero: 0, low: 0.0, high: 0.0 }),
            Target::Bytes { to, .. } => Narrow::new(*to),
        };
        Out { target, blocks, narrow }
    }

    /// Puts `R` rows of a block's sums where they go.
    ///
    /// # Safety
    /// The target has room for them.
    #[inline(always)]
    unsafe fn put<const R: usize>(&self, row: usize, block: usize, sums: [Four<int32x4_t>; R]) {
        // SAFETY: the caller's.
        unsafe {
            match self.target {
                Target::Sums(to) => {
                    for (i, sums) in sums.into_iter().enumerate() {
                        let to = to.add((row + i) * self.blocks + block).cast::<i32>();
                        for (i, sum) in sums.into_iter().enumerate() {
                            vst1q_s32(to.add(i * 4), sum);
                        }
                    }
                }
                Target::Bytes { scale, out, rows, channels, .. } => {
                    let scale = scale.as_ptr().add(block).cast::<f32>();
                    let scale: Four<float32x4_t> = std::array::from_fn(|i| vld1q_f32(scale.add(i * 4)));
                    let lanes = channels - block * LANES;
                    let (out, rows) = (out.cast::<i8>().add(block * LANES), rows.as_ptr().add(row));
                    let bytes = |sums: Four<int32x4_t>| {
                        self.narrow.round(std::array::from_fn(|i| vmulq_f32(vcvtq_f32_s32(sums[i]), scale[i])))
                    };
                    if lanes >= LANES {
                        for (i, sums) in sums.into_iter().enumerate() {
                            vst1q_s8(out.add(*rows.add(i) as usize), bytes(sums));
                        }
                    } else {
                        for (i, sums) in sums.into_iter().enumerate() {
                            store_part(out.add(*rows.add(i) as usize), bytes(sums), lanes);
                        }
                    }
                }
            }
        }
    }
}

/// The zero point, and the range as bytes.
#[derive(Clone, Copy)]
struct Narrow {
    zero: int16x8_t,
    low: int8x16_t,
    high: int8x16_t,
}

impl Narrow {
    #[inline(always)]
    fn new(to: Requant) -> Self {
        let byte = |x: f32| (x.round_ties_even() as i32 + to.zero) as i8;
        // SAFETY: NEON is part of the architecture.
        unsafe {
            Narrow { zero: vdupq_n_s16(to.zero as i16), low: vdupq_n_s8(byte(to.low)), high: vdupq_n_s8(byte(to.high)) }
        }
    }

    /// Rounds, ties to even. Narrowing saturates, so that the range can wait until the values are bytes.
    #[inline(always)]
    fn round(self, x: Four<float32x4_t>) -> int8x16_t {
        // SAFETY: NEON is part of the architecture.
        unsafe {
            let both = |a, b| vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(a)), vcvtnq_s32_f32(b));
            let low = vqaddq_s16(both(x[0], x[1]), self.zero);
            let high = vqaddq_s16(both(x[2], x[3]), self.zero);
            vminq_s8(vmaxq_s8(vqmovn_high_s16(vqmovn_s16(low), high), self.low), self.high)
        }
    }
}

/// The first `lanes` < 16 bytes.
///
/// # Safety
/// There is room for as many.
#[inline(always)]
unsafe fn store_part(mut out: *mut i8, bytes: int8x16_t, lanes: usize) {
    // SAFETY: the caller's.
    unsafe {
        let bytes = vreinterpretq_u64_s8(bytes);
        let (mut low, high) = (vgetq_lane_u64::<0>(bytes), vgetq_lane_u64::<1>(bytes));
        if lanes & 8 != 0 {
            out.cast::<u64>().write_unaligned(low);
            out = out.add(8);
            low = high;
        }
        if lanes & 4 != 0 {
            out.cast::<u32>().write_unaligned(low as u32);
            out = out.add(4);
            low >>= 32;
        }
        if lanes & 2 != 0 {
            out.cast::<u16>().write_unaligned(low as u16);
            out = out.add(2);
            low >>= 16;
        }
        if lanes & 1 != 0 {
            out.write(low as i8);
        }
    }
}

/// Each of 16 bytes as a float.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn floats(x: *const u8) -> Four<float32x4_t> {
    /// Puts a byte on top of 32 bits; what is not in the table becomes 0.
    const TOP: Four<[u8; 16]> = {
        let mut top = [[255; 16]; 4];
        let mut at = 0;
        while at < 16 {
            top[at / 4][at % 4 * 4 + 3] = at as u8;
            at += 1;
        }
        top
    };
    // SAFETY: the caller's.
    unsafe {
        let x = vld1q_s8(x.cast());
        TOP.map(|top| vcvtq_n_f32_s32::<24>(vreinterpretq_s32_s8(vqtbl1q_s8(x, vld1q_u8(top.as_ptr())))))
    }
}

unsafe fn add(a: &[u8], b: &[u8], by: (f32, f32, f32), range: (f32, f32), out: &mut [u8]) {
    let whole = out.len() / LANES * LANES;
    // SAFETY: 16 bytes at a time within the slices, which are as long.
    unsafe {
        let narrow = Narrow::new(Requant { zero: 0, low: range.0, high: range.1 });
        let factors = [vdupq_n_f32(by.0), vdupq_n_f32(by.1), vdupq_n_f32(by.2)];
        for at in (0..whole).step_by(LANES) {
            let (a, b) = (floats(a.as_ptr().add(at)), floats(b.as_ptr().add(at)));
            // Each product is rounded by itself, as elsewhere.
            let sum = std::array::from_fn(|i| {
                vaddq_f32(vmulq_f32(a[i], factors[0]), vaddq_f32(vmulq_f32(b[i], factors[1]), factors[2]))
            });
            vst1q_s8(out.as_mut_ptr().add(at).cast(), narrow.round(sum));
        }
    }
    add_bytes(&a[whole..], &b[whole..], by, range, &mut out[whole..]);
}

unsafe fn quantize(x: &[f32], scale: f32, to: Requant, out: &mut [u8]) {
    let whole = out.len() / LANES * LANES;
    // SAFETY: 16 values at a time within the slices, which are as long.
    unsafe {
        let narrow = Narrow::new(to);
        let (by, low) = (vdupq_n_f32(scale), vdupq_n_f32(to.low));
        for at in (0..whole).step_by(LANES) {
            // Of a number and none, the number counts as the greater.
            let x = std::array::from_fn(|i| vmaxnmq_f32(vdivq_f32(vld1q_f32(x.as_ptr().add(at + i * 4)), by), low));
            vst1q_s8(out.as_mut_ptr().add(at).cast(), narrow.round(x));
        }
    }
    round_floats(&x[whole..], scale, to, &mut out[whole..]);
}

/// Cuts a layer into panels: all rows, some at a time, by a block of channels, or the only row by several. Blocks are the
/// outer loop: their weights stay in the nearest cache.
macro_rules! panels {
    ($layer:ident, $target:ident, $panel:ident, rows: $most:literal, single: $single:literal,
     $(($rows:literal, $blocks:literal))*) => {
        let (rows, blocks) = ($layer.rows.len(), $layer.bias.len());
        let out = Out::new($target, blocks);
        let tiles = rows.div_ceil($most).max(1);
        // So many tiles have one row less than the others.
        let few = tiles - (rows - rows / tiles * tiles);
        let mut block = 0;
        while block < blocks {
            let wide = if rows == 1 { $single.min(1 << (blocks - block).ilog2()) } else { 1 };
            let each = rows / tiles;
            for (each, from, to) in [(each, 0, few * each), (each + 1, few * each, rows)] {
                if from < to {
                    // SAFETY: the caller's, see [`Kernels::product`].
                    unsafe {
                        match (each, wide) {
                            $(($rows, $blocks) => $panel::<$rows, $blocks>($layer, &out, from, to, block),)*
                            _ => unreachable!("every tile is listed"),
                        }
                    }
                }
            }
            block += wide;
        }
    };
}
use panels;
