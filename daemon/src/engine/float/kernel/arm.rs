//! NEON.

use std::arch::aarch64::{
    float32x4_t, vaddq_f32, vdupq_n_f32, vfmaq_f32, vfmaq_n_f32, vld1q_f32, vmaxq_f32, vminq_f32, vst1q_f32,
};

use super::{Kernels, LANES, ROWS, Tile};

/// What every aarch64 processor that runs Linux has.
pub static NEON: Kernels = Kernels { name: "neon", two: rows::<ROWS, 4>, one: rows::<ROWS, 2>, single: rows::<1, 16>, each };

/// `H` half blocks.
///
/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "neon")]
unsafe fn rows<const R: usize, const H: usize>(tile: &Tile<'_>) {
    // SAFETY: the tile has as much.
    unsafe {
        let size = tile.segments.len() * tile.length * LANES;
        let mut sums = start::<R, H>(tile);
        let mut weights = tile.weights.cast::<f32>();
        for offset in tile.segments {
            for k in 0..tile.length {
                let mut w = [vdupq_n_f32(0.0); H];
                for half in 0..H {
                    w[half] = vld1q_f32(weights.add(half / 2 * size + half % 2 * 4));
                }
                for row in 0..R {
                    let x = *tile.x[row].add(offset + k);
                    for half in 0..H {
                        sums[row][half] = vfmaq_n_f32(sums[row][half], w[half], x);
                    }
                }
                weights = weights.add(LANES);
            }
        }
        finish(tile, &sums);
    }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "neon")]
unsafe fn each(tile: &Tile<'_>) {
    // SAFETY: the tile has as much.
    unsafe {
        let mut sums = start::<ROWS, 2>(tile);
        let mut weights = tile.weights.cast::<f32>();
        for offset in tile.segments {
            let w = [vld1q_f32(weights), vld1q_f32(weights.add(4))];
            for row in 0..ROWS {
                for half in 0..2 {
                    let x = vld1q_f32(tile.x[row].add(offset + half * 4));
                    sums[row][half] = vfmaq_f32(sums[row][half], x, w[half]);
                }
            }
            weights = weights.add(LANES);
        }
        finish(tile, &sums);
    }
}

/// # Safety
/// As for [`super::Run`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn start<const R: usize, const H: usize>(tile: &Tile<'_>) -> [[float32x4_t; H]; R] {
    // SAFETY: the tile has as much.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); H]; R];
        for row in 0..R {
            for half in 0..H {
                sums[row][half] = vld1q_f32(tile.bias.cast::<f32>().add(half * 4));
            }
        }
        if !tile.plus[0].is_null() {
            for row in 0..R {
                for half in 0..H {
                    sums[row][half] = vaddq_f32(sums[row][half], vld1q_f32(tile.plus[row].add(half * 4)));
                }
            }
        }
        sums
    }
}

/// # Safety
/// As for [`super::Run`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn finish<const R: usize, const H: usize>(tile: &Tile<'_>, sums: &[[float32x4_t; H]; R]) {
    // SAFETY: the tile has as much.
    unsafe {
        let (low, high) = (vdupq_n_f32(tile.low), vdupq_n_f32(tile.high));
        for row in 0..R {
            for half in 0..H {
                vst1q_f32(tile.out[row].add(half * 4), vminq_f32(vmaxq_f32(sums[row][half], low), high));
            }
        }
    }
}
