//! AVX2 with FMA.

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps,
    _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use super::{Kernels, LANES, ROWS, Tile, WIDE};

/// Needs AVX2 and FMA.
pub static AVX2: Kernels =
    Kernels { name: "avx2", two: rows::<ROWS, 2>, one: rows::<ROWS, 1>, single: rows::<1, WIDE>, each };

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize, const B: usize>(tile: &Tile<'_>) {
    // SAFETY: the tile has as much.
    unsafe {
        let size = tile.segments.len() * tile.length * LANES;
        let mut sums = start::<R, B>(tile);
        let mut weights = tile.weights.cast::<f32>();
        for offset in tile.segments {
            let mut x = [std::ptr::null(); R];
            for row in 0..R {
                x[row] = tile.x[row].add(*offset);
            }
            for k in 0..tile.length {
                let mut w = [_mm256_setzero_ps(); B];
                for block in 0..B {
                    w[block] = _mm256_loadu_ps(weights.add(block * size));
                }
                for row in 0..R {
                    let x = _mm256_broadcast_ss(&*x[row].add(k));
                    for block in 0..B {
                        sums[row][block] = _mm256_fmadd_ps(x, w[block], sums[row][block]);
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
#[target_feature(enable = "avx2,fma")]
unsafe fn each(tile: &Tile<'_>) {
    // SAFETY: the tile has as much.
    unsafe {
        let mut sums = start::<ROWS, 1>(tile);
        let mut weights = tile.weights.cast::<f32>();
        for offset in tile.segments {
            let w = _mm256_loadu_ps(weights);
            for row in 0..ROWS {
                sums[row][0] = _mm256_fmadd_ps(_mm256_loadu_ps(tile.x[row].add(*offset)), w, sums[row][0]);
            }
            weights = weights.add(LANES);
        }
        finish(tile, &sums);
    }
}

/// # Safety
/// As for [`super::Run`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn start<const R: usize, const B: usize>(tile: &Tile<'_>) -> [[__m256; B]; R] {
    // SAFETY: the tile has as much.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); B]; R];
        for row in 0..R {
            for block in 0..B {
                sums[row][block] = _mm256_loadu_ps(tile.bias.add(block).cast());
            }
        }
        if !tile.plus[0].is_null() {
            for row in 0..R {
                for block in 0..B {
                    let plus = _mm256_loadu_ps(tile.plus[row].add(block * LANES));
                    sums[row][block] = _mm256_add_ps(sums[row][block], plus);
                }
            }
        }
        sums
    }
}

/// # Safety
/// As for [`super::Run`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn finish<const R: usize, const B: usize>(tile: &Tile<'_>, sums: &[[__m256; B]; R]) {
    // SAFETY: the tile has as much.
    unsafe {
        let (low, high) = (_mm256_set1_ps(tile.low), _mm256_set1_ps(tile.high));
        for row in 0..R {
            for block in 0..B {
                let sum = _mm256_min_ps(_mm256_max_ps(sums[row][block], low), high);
                _mm256_storeu_ps(tile.out[row].add(block * LANES), sum);
            }
        }
    }
}
