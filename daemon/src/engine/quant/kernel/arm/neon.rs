//! What every core has: products of bytes in 16 bits, added up in pairs.

use std::arch::aarch64::*;
use std::arch::asm;

use super::*;

pub unsafe fn product(layer: &Product, target: &Target) {
    if layer.small {
        panels!(layer, target, small, rows: 2, single: 2, (1, 1) (2, 1) (1, 2));
    } else {
        panels!(layer, target, any, rows: 2, single: 2, (1, 1) (2, 1) (1, 2));
    }
}

unsafe fn small<const R: usize, const B: usize>(layer: &Product, out: &Out, from: usize, to: usize, block: usize) {
    // SAFETY: the caller's.
    unsafe { panel::<R, B, true>(layer, out, from, to, block) }
}

unsafe fn any<const R: usize, const B: usize>(layer: &Product, out: &Out, from: usize, to: usize, block: usize) {
    // SAFETY: the caller's.
    unsafe { panel::<R, B, false>(layer, out, from, to, block) }
}

/// Products of two halves of bytes; with `before`, added to those: if no weight is -128, two products fit 16 bits.
///
/// Written as instructions that stay where they are put: the compiler would take the halves apart first, and then run
/// out of registers.
#[inline(always)]
fn products(x: int8x16_t, w: int8x16_t) -> [int16x8_t; 2] {
    let (low, high): (int16x8_t, int16x8_t);
    // SAFETY: registers only.
    unsafe {
        asm!("smull {low:v}.8h, {x:v}.8b, {w:v}.8b", "smull2 {high:v}.8h, {x:v}.16b, {w:v}.16b",
             low = out(vreg) low, high = lateout(vreg) high, x = in(vreg) x, w = in(vreg) w,
             options(nomem, nostack, preserves_flags));
    }
    [low, high]
}

#[inline(always)]
fn add_products([mut low, mut high]: [int16x8_t; 2], x: int8x16_t, w: int8x16_t) -> [int16x8_t; 2] {
    // SAFETY: registers only.
    unsafe {
        asm!("smlal {low:v}.8h, {x:v}.8b, {w:v}.8b", "smlal2 {high:v}.8h, {x:v}.16b, {w:v}.16b",
             low = inout(vreg) low, high = inout(vreg) high, x = in(vreg) x, w = in(vreg) w,
             options(nomem, nostack, preserves_flags));
    }
    [low, high]
}

#[inline(always)]
fn add_pairs(sums: &mut [int32x4_t; 2], products: [int16x8_t; 2]) {
    // SAFETY: registers only.
    unsafe {
        asm!("sadalp {a:v}.4s, {low:v}.8h", "sadalp {b:v}.4s, {high:v}.8h",
             a = inout(vreg) sums[0], b = inout(vreg) sums[1], low = in(vreg) products[0], high = in(vreg) products[1],
             options(nomem, nostack, preserves_flags));
    }
}

/// A block's weights; `w` moves on.
///
/// # Safety
/// They can be read.
#[inline(always)]
unsafe fn block(w: &mut *const Block) -> Four<int8x16_t> {
    let (a, b, c, d);
    // SAFETY: the caller's.
    unsafe {
        asm!("ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{w}], #64", w = inout(reg) *w,
             out("v28") a, out("v29") b, out("v30") c, out("v31") d, options(readonly, nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// The same, elsewhere.
///
/// # Safety
/// As above.
#[inline(always)]
unsafe fn other_block(w: &mut *const Block) -> Four<int8x16_t> {
    let (a, b, c, d);
    // SAFETY: the caller's.
    unsafe {
        asm!("ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{w}], #64", w = inout(reg) *w,
             out("v24") a, out("v25") b, out("v26") c, out("v27") d, options(readonly, nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// Rows by `B` blocks, `R` rows at a time. Each register of sums holds two halves of a channel's four; they are put
/// together last.
unsafe fn panel<const R: usize, const B: usize, const SMALL: bool>(
    layer: &Product,
    out: &Out,
    from: usize,
    to: usize,
    first: usize,
) {
    // SAFETY: the caller's, see [`Kernels::product`].
    unsafe {
        let size = layer.segments.len() * layer.quads;
        // One half starts from the bias, the other from nothing.
        let mut bias = [[[vdupq_n_s32(0); 2]; 4]; B];
        for b in 0..B {
            for (halves, bias) in bias[b].iter_mut().zip(load(layer.bias.get_unchecked(first + b))) {
                *halves = [vzip1q_s32(bias, halves[0]), vzip2q_s32(bias, halves[0])];
            }
        }
        let weights: [*const Block; B] = std::array::from_fn(|b| layer.weights.as_ptr().add((first + b) * size));
        for row in (from..to).step_by(R) {
            let start = starts::<R>(layer, row);
            let mut sums: [_; B] = std::array::from_fn(|b| [bias[b]; R]);
            let mut w = weights;
            for segment in layer.segments {
                let mut x = start.map(|x| x.add(*segment as usize));
                for _ in 0..layer.quads / 2 {
                    let bytes: [[int8x16_t; 2]; R] = std::array::from_fn(|row| [four(&mut x[row]), four(&mut x[row])]);
                    for b in 0..B {
                        let (low, high) = (block(&mut w[b]), other_block(&mut w[b]));
                        for i in 0..4 {
                            let one: [_; R] = std::array::from_fn(|row| products(bytes[row][0], low[i]));
                            if SMALL {
                                let both: [_; R] =
                                    std::array::from_fn(|row| add_products(one[row], bytes[row][1], high[i]));
                                (0..R).for_each(|row| add_pairs(&mut sums[b][row][i], both[row]));
                            } else {
                                (0..R).for_each(|row| add_pairs(&mut sums[b][row][i], one[row]));
                                let other: [_; R] = std::array::from_fn(|row| products(bytes[row][1], high[i]));
                                (0..R).for_each(|row| add_pairs(&mut sums[b][row][i], other[row]));
                            }
                        }
                    }
                }
                if layer.quads % 2 == 1 {
                    let bytes: [int8x16_t; R] = std::array::from_fn(|row| four(&mut x[row]));
                    for b in 0..B {
                        for (i, w) in block(&mut w[b]).into_iter().enumerate() {
                            let one: [_; R] = std::array::from_fn(|row| products(bytes[row], w));
                            (0..R).for_each(|row| add_pairs(&mut sums[b][row][i], one[row]));
                        }
                    }
                }
            }
            for (b, sums) in sums.into_iter().enumerate() {
                let mut four = [[vdupq_n_s32(0); 4]; R];
                for row in 0..R {
                    for i in 0..4 {
                        four[row][i] = vpaddq_s32(sums[row][i][0], sums[row][i][1]);
                    }
                }
                out.put(row, first + b, four);
            }
        }
    }
}

pub unsafe fn columns(layer: &Columns, target: &Target) {
    // SAFETY: the caller's, see [`Kernels::columns`].
    unsafe {
        // The fourth tap of a column of three has no weight.
        let three = layer.taps.len() == 3 && {
            let fourth: [int8x16_t; 3] = std::array::from_fn(|i| vld4q_s8(layer.weights.as_ptr().add(i).cast()).3);
            vmaxvq_u8(vreinterpretq_u8_s8(vorrq_s8(vorrq_s8(fourth[0], fourth[1]), fourth[2]))) == 0
        };
        match (three, layer.small) {
            (true, true) => pixels::<3, 3, true>(layer, target),
            (true, false) => pixels::<3, 3, false>(layer, target),
            (false, true) => any_pixels::<true>(layer, target),
            (false, false) => any_pixels::<false>(layer, target),
        }
    }
}

#[inline(always)]
fn widen(sums: Four<int32x4_t>, products: [int16x8_t; 2]) -> Four<int32x4_t> {
    // SAFETY: NEON is part of the architecture.
    unsafe {
        [
            vaddw_s16(sums[0], vget_low_s16(products[0])),
            vaddw_high_s16(sums[1], products[0]),
            vaddw_s16(sums[2], vget_low_s16(products[1])),
            vaddw_high_s16(sums[3], products[1]),
        ]
    }
}

/// `Q` times `T` taps: with the numbers known, the weights stay in registers.
unsafe fn pixels<const Q: usize, const T: usize, const SMALL: bool>(layer: &Columns, target: &Target) {
    // SAFETY: the caller's, see [`Kernels::columns`].
    unsafe {
        let weights: [Four<int8x16_t>; Q] = std::array::from_fn(|quad| {
            let w = vld4q_s8(layer.weights.as_ptr().add(quad).cast());
            [w.0, w.1, w.2, w.3]
        });
        let taps: [[usize; T]; Q] = std::array::from_fn(|quad| std::array::from_fn(|i| layer.taps[quad][i] as usize));
        let (bias, out) = (load(layer.bias), Out::new(target, 1));
        for line in 0..layer.lines {
            for pixel in 0..layer.pixels {
                let x = layer.x.cast::<i8>().add(line * layer.line + pixel * layer.step);
                let mut sums = bias;
                let mut held = None;
                for quad in 0..Q {
                    for tap in 0..T {
                        let (x, w) = (vld1q_s8(x.add(taps[quad][tap])), weights[quad][tap]);
                        match held {
                            None if SMALL => held = Some(products(x, w)),
                            None => sums = widen(sums, products(x, w)),
                            Some(before) => {
                                sums = widen(sums, add_products(before, x, w));
                                held = None;
                            }
                        }
                    }
                }
                if let Some(products) = held {
                    sums = widen(sums, products);
                }
                out.put(line * layer.pixels + pixel, 0, [sums]);
            }
        }
    }
}

unsafe fn any_pixels<const SMALL: bool>(layer: &Columns, target: &Target) {
    // SAFETY: the caller's, see [`Kernels::columns`].
    unsafe {
        let (bias, out) = (load(layer.bias), Out::new(target, 1));
        for line in 0..layer.lines {
            for pixel in 0..layer.pixels {
                let x = layer.x.cast::<i8>().add(line * layer.line + pixel * layer.step);
                let mut sums = bias;
                for (taps, w) in layer.taps.iter().zip(layer.weights) {
                    let w = vld4q_s8(w.0.as_ptr());
                    let x: Four<int8x16_t> = std::array::from_fn(|i| vld1q_s8(x.add(taps[i] as usize)));
                    if SMALL {
                        sums = widen(sums, add_products(products(x[0], w.0), x[1], w.1));
                        sums = widen(sums, add_products(products(x[2], w.2), x[3], w.3));
                    } else {
                        for (x, w) in x.into_iter().zip([w.0, w.1, w.2, w.3]) {
                            sums = widen(sums, products(x, w));
                        }
                    }
                }
                out.put(line * layer.pixels + pixel, 0, [sums]);
            }
        }
    }
}
