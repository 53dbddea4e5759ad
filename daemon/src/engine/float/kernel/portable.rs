//! The kernels in plain Rust.

use super::{Call, Kernels, Vector, dense, each};

/// What every processor has.
pub static PORTABLE: Kernels = Kernels { name: "portable", dense: plain_dense, each: plain_each };

impl Vector for [f32; 4] {
    const N: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 4]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|at| self[at] + other[at])
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|at| self[at] + a[at] * b[at])
    }

    #[inline(always)]
    unsafe fn clamp(self, low: Self, high: Self) -> Self {
        std::array::from_fn(|at| self[at].max(low[at]).min(high[at]))
    }
}

/// # Safety
/// As for [`super::Run`].
unsafe fn plain_dense(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { dense::<[f32; 4], 4, 4, 4, 4>(call) }
}

/// # Safety
/// As for [`super::Run`].
unsafe fn plain_each(call: &Call<'_>) {
    // SAFETY: the call's.
    unsafe { each::<[f32; 4], 4>(call) }
}
