//! The reference: plain loops, which the compiler may turn into what vector instructions every processor has.

use super::{Columns, Kernels, LANES, Product, Requant, SIGNED, Scales, Sums, Target};

/// Runs anywhere.
pub const PORTABLE: Kernels = Kernels { name: "portable", product, columns, add: add_bytes, quantize: round_floats };

/// A stored byte's value.
#[inline(always)]
fn value(byte: u8) -> i32 {
    if SIGNED { i32::from(byte as i8) } else { i32::from(byte) }
}

unsafe fn product(layer: &Product, target: &Target) {
    let size = layer.segments.len() * layer.quads;
    for (row, start) in layer.rows.iter().enumerate() {
        for (block, bias) in layer.bias.iter().enumerate() {
            let mut sum = bias.0;
            let mut weights = layer.weights[block * size..].iter();
            for segment in layer.segments {
                for (quad, w) in (0..layer.quads).zip(&mut weights) {
                    // SAFETY: the caller's, see [`Kernels::product`].
                    let x =
                        unsafe { layer.x.add(*start as usize + *segment as usize + quad * 4).cast::<[u8; 4]>().read() };
                    for (lane, sum) in sum.iter_mut().enumerate() {
                        for (i, x) in x.into_iter().enumerate() {
                            *sum = sum.wrapping_add(value(x) * i32::from(w.0[lane * 4 + i]));
                        }
                    }
                }
            }
            // SAFETY: as above.
            unsafe { put(target, row, block, layer.bias.len(), &Sums(sum)) };
        }
    }
}

unsafe fn columns(layer: &Columns, target: &Target) {
    for at in 0..layer.lines * layer.pixels {
        let window = at / layer.pixels * layer.line + at % layer.pixels * layer.step;
        let mut sum = layer.bias.0;
        for (taps, w) in layer.taps.iter().zip(layer.weights) {
            for (i, tap) in taps.iter().enumerate() {
                // SAFETY: the caller's, see [`Kernels::columns`].
                let x = unsafe { layer.x.add(window + *tap as usize).cast::<[u8; LANES]>().read_unaligned() };
                for (lane, sum) in sum.iter_mut().enumerate() {
                    *sum = sum.wrapping_add(value(x[lane]) * i32::from(w.0[lane * 4 + i]));
                }
            }
        }
        // SAFETY: as above.
        unsafe { put(target, at, 0, 1, &Sums(sum)) };
    }
}

/// Puts the sums of a row's block where they go.
///
/// # Safety
/// The target has room for that row and block.
#[inline(always)]
pub unsafe fn put(target: &Target, row: usize, block: usize, blocks: usize, sums: &Sums) {
    match target {
        // SAFETY: the caller's.
        Target::Sums(to) => unsafe { to.add(row * blocks + block).write(*sums) },
        Target::Bytes { scale, to, out, rows, channels } => {
            let bytes = round_sums(sums, &scale[block], *to);
            let lanes = LANES.min(channels - block * LANES);
            // SAFETY: the caller's.
            unsafe {
                out.add(rows[row] as usize + block * LANES).copy_from_nonoverlapping(bytes.as_ptr(), lanes);
            }
        }
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

/// Bytes of one block's sums.
#[inline(always)]
pub fn round_sums(sums: &Sums, scale: &Scales, to: Requant) -> [u8; LANES] {
    std::array::from_fn(|lane| byte(sums.0[lane] as f32 * scale.0[lane], to.low, to.high, to.zero))
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
