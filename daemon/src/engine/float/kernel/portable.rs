//! The kernels in plain Rust.

use super::{Kernels, LANES, ROWS, Tile, WIDE};

/// What every processor has.
pub static PORTABLE: Kernels =
    Kernels { name: "portable", two: rows::<ROWS, 2>, one: rows::<ROWS, 1>, single: rows::<1, WIDE>, each };

/// # Safety
/// As for [`super::Run`].
unsafe fn rows<const R: usize, const B: usize>(tile: &Tile<'_>) {
    let size = tile.segments.len() * tile.length;
    for block in 0..B {
        // SAFETY: the tile has as much.
        let (mut sums, weights) = unsafe { (start::<R>(tile, block), tile.weights.add(block * size)) };
        for (at, offset) in tile.segments.iter().enumerate() {
            for k in 0..tile.length {
                // SAFETY: the tile has as much.
                let w = unsafe { (*weights.add(at * tile.length + k)).0 };
                for (sums, x) in sums.iter_mut().zip(&tile.x) {
                    // SAFETY: the tile has as much.
                    let x = unsafe { *x.add(offset + k) };
                    sums.iter_mut().zip(&w).for_each(|(sum, w)| *sum += x * w);
                }
            }
        }
        // SAFETY: the tile has as much.
        unsafe { finish(tile, block, &sums) };
    }
}

/// # Safety
/// As for [`super::Run`].
unsafe fn each(tile: &Tile<'_>) {
    // SAFETY: the tile has as much.
    let mut sums = unsafe { start::<ROWS>(tile, 0) };
    for (at, offset) in tile.segments.iter().enumerate() {
        // SAFETY: the tile has as much.
        let w = unsafe { (*tile.weights.add(at)).0 };
        for (sums, x) in sums.iter_mut().zip(&tile.x) {
            for lane in 0..LANES {
                // SAFETY: the tile has as much.
                sums[lane] += unsafe { *x.add(offset + lane) } * w[lane];
            }
        }
    }
    // SAFETY: the tile has as much.
    unsafe { finish(tile, 0, &sums) };
}

/// # Safety
/// As for [`super::Run`].
unsafe fn start<const R: usize>(tile: &Tile<'_>, block: usize) -> [[f32; LANES]; R] {
    // SAFETY: the tile has as much.
    let mut sums = [unsafe { (*tile.bias.add(block)).0 }; R];
    if !tile.plus[0].is_null() {
        for (sums, plus) in sums.iter_mut().zip(&tile.plus) {
            for (lane, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the tile has as much.
                *sum += unsafe { *plus.add(block * LANES + lane) };
            }
        }
    }
    sums
}

/// # Safety
/// As for [`super::Run`].
unsafe fn finish<const R: usize>(tile: &Tile<'_>, block: usize, sums: &[[f32; LANES]; R]) {
    for (sums, out) in sums.iter().zip(&tile.out) {
        for (lane, sum) in sums.iter().enumerate() {
            // SAFETY: the tile has as much.
            unsafe { *out.add(block * LANES + lane) = sum.max(tile.low).min(tile.high) };
        }
    }
}
