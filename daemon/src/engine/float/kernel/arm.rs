//! NEON.

use std::arch::aarch64::{float32x4_t, vaddq_f32, vdupq_n_f32, vfmaq_f32, vld1q_f32, vmaxq_f32, vminq_f32, vst1q_f32};

use super::{Call, Kernels, Vector, dense, each};

/// What every aarch64 processor that runs Linux has.
pub static NEON: Kernels = Kernels { name: "neon", dense: neon_dense, each: neon_each };

impl Vector for float32x4_t {
    const N: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the trait's.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's.
        unsafe { vst1q_f32(to, self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { vaddq_f32(self, other) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { vfmaq_f32(self, a, b) }
    }

    #[inline(always)]
    unsafe fn clamp(self, low: Self, high: Self) -> Self {
        // SAFETY: the trait's.
        unsafe { vminq_f32(vmaxq_f32(self, low), high) }
    }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "neon")]
unsafe fn neon_dense(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { dense::<float32x4_t, 4, 4, 4, 16>(call) }
}

/// # Safety
/// As for [`super::Run`].
#[target_feature(enable = "neon")]
unsafe fn neon_each(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { each::<float32x4_t, 4>(call) }
}
