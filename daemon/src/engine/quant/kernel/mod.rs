//! Kernels over bytes: what a processor's integer units are good at, behind one table of functions.
//!
//! Activations are stored as [`SIGNED`] says: `vpdpbusd` takes unsigned bytes, `sdot` signed ones.
//! Weights are signed, in [`Block`]s of 16 output channels by 4 inputs, the order in which both
//! instructions want them. Every table gives the same bits as [`PORTABLE`].
#![allow(unsafe_code, reason = "std::arch intrinsics, and rows that are addressed by pointer")]

mod portable;

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use portable::PORTABLE;

/// Output channels of a block.
pub const LANES: usize = 16;
/// Most rows that one call of [`Kernels::dot`] takes.
pub const ROWS: usize = 6;
/// Most blocks that one call of [`Kernels::dot`] takes.
pub const BLOCKS: usize = 2;
/// Bytes behind a buffer's end that kernels may read.
pub const SLACK: usize = 64;
/// Whether activations are stored as signed bytes.
pub const SIGNED: bool = cfg!(target_arch = "aarch64");

/// Weights of 16 channels for 4 successive inputs: `[channel][input]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Block(pub [i8; 64]);

/// Sums of 16 channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Sums(pub [i32; LANES]);

/// How sums become bytes: `clamp(round((sum + bias) * scale), low, high) + zero`, in f32, ties to even.
#[derive(Debug, Clone, Copy)]
pub struct Requant {
    /// Zero point, as stored.
    pub zero: i32,
    /// Least value before the zero point is added.
    pub low: f32,
    /// Greatest value before the zero point is added.
    pub high: f32,
}

/// `sums[block][row] = Σ x[row] · w[block]`: a row is `segments`, offsets to its pointer, of `quads` groups of 4
/// inputs each.
///
/// # Safety
/// The first `rows` ≤ [`ROWS`] pointers have `4 · quads` bytes at each segment; `w` has `segments · quads` blocks for
/// each of `blocks` ≤ [`BLOCKS`]; `sums` has room for `rows · blocks`. The processor has the instructions.
pub type Dot = unsafe fn(
    x: &[*const u8; ROWS],
    rows: usize,
    segments: &[usize],
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
);

/// One block of channels of a depthwise convolution: `sums[p][c] = Σ x[p · step + tap + c] · w[tap][c]`.
///
/// # Safety
/// 16 bytes can be read at `x + p · step + tap` for every pixel and tap; the number of taps is a multiple of 4
/// and `w` has a block for each 4; `sums` has room for `pixels`. The processor has the instructions.
pub type Depthwise =
    unsafe fn(x: *const u8, step: usize, pixels: usize, taps: &[usize], w: *const Block, sums: *mut Sums);

/// Bytes of `sums`: the first `lanes` of each at `out`, `stride` bytes apart, all with one block's `bias` and `scale`.
///
/// # Safety
/// `out` has room for them. The processor has the instructions.
pub type Finish =
    unsafe fn(sums: &[Sums], bias: &Sums, scale: &[f32; LANES], to: Requant, out: *mut u8, stride: usize, lanes: usize);

/// `out = clamp(round(a · by.0 + b · by.1 + by.2))`: an addition of two quantized tensors. `zero` is in `by.2`.
///
/// # Safety
/// The three slices are as long. The processor has the instructions.
pub type Add = unsafe fn(a: &[u8], b: &[u8], by: (f32, f32, f32), range: (f32, f32), out: &mut [u8]);

/// The functions of one instruction set.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Name, as `outpost models bench` and the status show it.
    pub name: &'static str,
    /// See [`Dot`].
    pub dot: Dot,
    /// See [`Depthwise`].
    pub depthwise: Depthwise,
    /// See [`Finish`].
    pub requant: Finish,
    /// See [`Add`].
    pub add: Add,
    /// `out = clamp(round(x · inverse scale ...) + zero)`: quantizes floats, dividing by `scale`.
    ///
    /// # Safety
    /// The two slices are as long. The processor has the instructions.
    pub quantize: unsafe fn(x: &[f32], scale: f32, to: Requant, out: &mut [u8]),
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Every table that this processor can run, the best last.
pub fn available() -> Vec<&'static Kernels> {
    #[allow(unused_mut, reason = "nothing is added on other architectures")]
    let mut found = vec![&PORTABLE];
    #[cfg(target_arch = "x86_64")]
    x86::add_available(&mut found);
    #[cfg(target_arch = "aarch64")]
    arm::add_available(&mut found);
    found
}

/// The best table for this processor.
pub fn best() -> &'static Kernels {
    static BEST: std::sync::OnceLock<&'static Kernels> = std::sync::OnceLock::new();
    BEST.get_or_init(|| available().last().copied().unwrap_or(&PORTABLE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn every_dot_equals_the_portable(
            rows in 1..=ROWS, blocks in 1..=BLOCKS, quads in 0..20_usize, segments in 1..5_usize, extra in 0..5_usize,
            seed in any::<u64>(), extreme in any::<bool>(),
        ) {
            let mut random = random(seed, extreme);
            let stride = quads * 4 + extra;
            let x: Vec<u8> = (0..(rows + segments) * stride + SLACK).map(|_| random() as u8).collect();
            let n = blocks * segments * quads;
            let w: Vec<Block> = (0..n).map(|_| Block(std::array::from_fn(|_| random() as i8))).collect();
            let pointers = std::array::from_fn(|row| x[row.min(rows - 1) * stride..].as_ptr());
            let segments: Vec<usize> = (0..segments).map(|at| at * stride).collect();
            let run = |kernels: &Kernels| {
                let mut sums = vec![Sums([-1; LANES]); rows * blocks];
                // SAFETY: the sizes above.
                unsafe { (kernels.dot)(&pointers, rows, &segments, quads, w.as_ptr(), blocks, sums.as_mut_ptr()) };
                sums
            };
            for kernels in available() {
                prop_assert_eq!(run(kernels), run(&PORTABLE), "{}", kernels.name);
            }
        }

        #[test]
        fn every_depthwise_equals_the_portable(
            pixels in 1..20_usize, step in 1..70_usize, quads in 1..8_usize,
            seed in any::<u64>(), extreme in any::<bool>(),
        ) {
            let mut random = random(seed, extreme);
            let taps: Vec<usize> = (0..quads * 4).map(|_| random() as usize % 200).collect();
            let x: Vec<u8> = (0..pixels * step + 200 + SLACK).map(|_| random() as u8).collect();
            let w: Vec<Block> = (0..quads).map(|_| Block(std::array::from_fn(|_| random() as i8))).collect();
            let run = |kernels: &Kernels| {
                let mut sums = vec![Sums([-1; LANES]); pixels];
                // SAFETY: the sizes above.
                unsafe { (kernels.depthwise)(x.as_ptr(), step, pixels, &taps, w.as_ptr(), sums.as_mut_ptr()) };
                sums
            };
            for kernels in available() {
                prop_assert_eq!(run(kernels), run(&PORTABLE), "{}", kernels.name);
            }
        }

        #[test]
        fn every_rounding_equals_the_portable(
            n in 1..70_usize, lanes in 1..=LANES, seed in any::<u64>(), scale in 1e-6_f32..10.0, zero in 0..256_i32,
        ) {
            let mut random = random(seed, false);
            let low = if SIGNED { -128 } else { 0 };
            let zero = zero + low;
            let to = Requant { zero, low: (low - zero) as f32, high: (low + 255 - zero) as f32 };
            let sums: Vec<Sums> = (0..n).map(|_| Sums(std::array::from_fn(|_| random() as i32 >> 8))).collect();
            let bias = Sums(std::array::from_fn(|_| random() as i32 >> 12));
            let scales: [f32; LANES] = std::array::from_fn(|_| scale * (random() as u8 as f32 + 1.0) / 128.0);
            let (a, b): (Vec<u8>, Vec<u8>) = (0..n).map(|_| (random() as u8, random() as u8)).unzip();
            let x: Vec<f32> = (0..n).map(|_| (random() as i32 as f32) * 1e-8).collect();
            let run = |kernels: &Kernels| {
                let (mut out, mut sum, mut steps) = (vec![0; n * LANES], vec![0; n], vec![0; n]);
                // SAFETY: the sizes above.
                unsafe {
                    (kernels.requant)(&sums, &bias, &scales, to, out.as_mut_ptr(), lanes, lanes);
                    (kernels.add)(&a, &b, (scale, 0.5, 3.25), (low as f32, (low + 255) as f32), &mut sum);
                    (kernels.quantize)(&x, scale, to, &mut steps);
                }
                (out, sum, steps)
            };
            for kernels in available() {
                prop_assert_eq!(run(kernels), run(&PORTABLE), "{}", kernels.name);
            }
        }
    }

    /// Splitmix64; `extreme`: only the values at which sums overflow in 16 bits.
    fn random(mut state: u64, extreme: bool) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            if extreme { [0x80, 0x7f, 0xff, 0x81][(z & 3) as usize] } else { z }
        }
    }
}
