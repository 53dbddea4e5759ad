//! AVX2 with FMA, and AVX-512.

use std::arch::x86_64::{
    __m256, __m512, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_max_ps, _mm256_min_ps, _mm256_set1_ps,
    _mm256_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_max_ps, _mm512_min_ps, _mm512_set1_ps,
    _mm512_storeu_ps,
};

use super::{Call, Kernels, Vector, dense, each};

/// Needs AVX2 and FMA.
pub static AVX2: Kernels = Kernels { name: "avx2", dense: avx2_dense, each: avx2_each };
/// Needs AVX-512F.
pub static AVX512: Kernels = Kernels { name: "avx512", dense: avx512_dense, each: avx512_each };

impl Vector for __m256 {
    const N: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's.
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm256_add_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm256_fmadd_ps(a, b, self) }
    }

    #[inline(always)]
    unsafe fn clamp(self, low: Self, high: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm256_min_ps(_mm256_max_ps(self, low), high) }
    }
}

impl Vector for __m512 {
    const N: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's.
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm512_add_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm512_fmadd_ps(a, b, self) }
    }

    #[inline(always)]
    unsafe fn clamp(self, low: Self, high: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { _mm512_min_ps(_mm512_max_ps(self, low), high) }
    }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_dense(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { dense::<__m256, 2, 2, 2, 8>(call) }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_each(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { each::<__m256, 2>(call) }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "avx512f")]
unsafe fn avx512_dense(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { dense::<__m512, 4, 2, 1, 8>(call) }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "avx512f")]
unsafe fn avx512_each(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { each::<__m512, 1>(call) }
}
