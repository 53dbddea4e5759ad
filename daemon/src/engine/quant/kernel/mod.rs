//! Kernels over bytes: what a processor's integer units are good at, behind one table of functions.
//!
//! Activations are stored as [`SIGNED`] says: `vpdpbusd` takes unsigned bytes, `sdot` signed ones.
//! Weights are signed, in [`Block`]s of 16 output channels by 4 inputs, the order in which both
//! instructions want them. Sums are rounded while they are still in registers. Every table gives
//! the same bits as [`PORTABLE`].
#![allow(unsafe_code, reason = "std::arch intrinsics, and rows that are addressed by pointer")]

mod portable;

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use portable::PORTABLE;

/// Output channels of a block.
pub const LANES: usize = 16;
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

/// Whether no weight is -128, as [`Product::small`] and [`Columns::small`] ask.
pub fn small(weights: &[Block]) -> bool {
    weights.iter().all(|block| !block.0.contains(&i8::MIN))
}

/// A factor for each of 16 channels.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub struct Scales(pub [f32; LANES]);

/// How sums become bytes: `clamp(round(sum * scale), low, high) + zero`, in f32, ties to even.
#[derive(Debug, Clone, Copy)]
pub struct Requant {
    /// Zero point, as stored.
    pub zero: i32,
    /// Least value before the zero point is added.
    pub low: f32,
    /// Greatest value before the zero point is added.
    pub high: f32,
}

/// Rows by channels: `sum[row][channel] = bias[channel] + Σ x[row] · w[channel]`.
///
/// A row is one run of `4 · quads` bytes for each segment.
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    /// Where offsets count from.
    pub x: *const u8,
    /// Where each row starts.
    pub rows: &'a [u32],
    /// Where each segment of a row starts, from the row's start.
    pub segments: &'a [u32],
    /// Groups of 4 bytes in a segment.
    pub quads: usize,
    /// For each block of channels, one for each quad of each segment.
    pub weights: &'a [Block],
    /// Whether no weight is -128: two products then fit 16 bits.
    pub small: bool,
    /// What the sums start from, for each block.
    pub bias: &'a [Sums],
}

/// Channels by themselves, for one block of them, over lines of pixels:
/// `sum[l][p][c] = bias[c] + Σ x[l · line + p · step + tap + c] · w[tap][c]`.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// Where offsets count from.
    pub x: *const u8,
    /// Bytes from one pixel's window to the next one's.
    pub step: usize,
    /// Number of pixels in a line.
    pub pixels: usize,
    /// Bytes from one line's first window to the next line's.
    pub line: usize,
    /// Number of lines.
    pub lines: usize,
    /// Where the kernel's taps are, four at a time.
    pub taps: &'a [[u32; 4]],
    /// Bytes from each four taps to the next four, where that is the same for all; else 0.
    pub shift: usize,
    /// One for each four taps.
    pub weights: &'a [Block],
    /// Whether no weight is -128.
    pub small: bool,
    /// What the sums start from.
    pub bias: &'a Sums,
}

/// Where sums go.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// As they are: those of a row's blocks side by side.
    Sums(*mut Sums),
    /// Rounded to bytes.
    Bytes {
        /// For each block.
        scale: &'a [Scales],
        /// How they are rounded.
        to: Requant,
        /// Where offsets count from.
        out: *mut u8,
        /// Where each row or pixel goes: its channels side by side.
        rows: &'a [u32],
        /// Channels that are written; those that only fill the last block are not.
        channels: usize,
    },
}

/// `out = clamp(round(a · by.0 + b · by.1 + by.2))`: an addition of two quantized tensors. `zero` is in `by.2`.
///
/// # Safety
/// The three slices are as long. The processor has the instructions.
pub type Add = unsafe fn(a: &[u8], b: &[u8], by: (f32, f32, f32), range: (f32, f32), out: &mut [u8]);

/// `out = clamp(round(x / scale)) + zero`: quantizes floats.
///
/// # Safety
/// The two slices are as long. The processor has the instructions.
pub type Quantize = unsafe fn(x: &[f32], scale: f32, to: Requant, out: &mut [u8]);

/// The functions of one instruction set.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Name, as `outpost models bench` and the status show it.
    pub name: &'static str,
    /// See [`Product`].
    ///
    /// # Safety
    /// The bytes of every row can be read, and [`SLACK`] behind them; the slices are as long as said; the target has
    /// room. The processor has the instructions.
    pub product: unsafe fn(layer: &Product, target: &Target),
    /// See [`Columns`].
    ///
    /// # Safety
    /// 16 bytes can be read at every tap of every pixel; the slices are as long as said; the target has room. The
    /// processor has the instructions.
    pub columns: unsafe fn(layer: &Columns, target: &Target),
    /// See [`Add`].
    pub add: Add,
    /// See [`Quantize`].
    pub quantize: Quantize,
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
        fn every_product_equals_the_portable(
            rows in 1..30_usize, channels in 1..150_usize, quads in 1..20_usize, segments in 1..5_usize,
            extra in 0..5_usize, scale in 1e-5_f32..0.1, zero in 0..256_i32, seed in any::<u64>(), extreme in any::<bool>(),
        ) {
            let mut random = random(seed, extreme);
            let blocks = channels.div_ceil(LANES);
            let stride = quads * 4 + extra;
            let x = bytes(&mut random, (rows + segments) * stride + SLACK);
            let (weights, small) = weights(&mut random, blocks * segments * quads);
            let bias: Vec<Sums> = (0..blocks).map(|_| sums(&mut random)).collect();
            let scale = scales(&mut random, blocks, scale);
            let segments: Vec<u32> = (0..segments).map(|at| (at * stride) as u32).collect();
            let starts: Vec<u32> = (0..rows).map(|row| (row * stride) as u32).collect();
            let layer = Product {
                x: x.as_ptr(), rows: &starts, segments: &segments, quads, weights: &weights, small, bias: &bias,
            };
            // One after another, with a gap that must stay as it is.
            let to: Vec<u32> = (0..rows).map(|row| (row * (channels + extra)) as u32).collect();
            let run = |kernels: &Kernels| {
                let mut raw = vec![Sums([-1; LANES]); rows * blocks];
                let mut out = vec![7; rows * (channels + extra)];
                // SAFETY: the sizes above.
                unsafe {
                    (kernels.product)(&layer, &Target::Sums(raw.as_mut_ptr()));
                    let to = Target::Bytes {
                        scale: &scale, to: rounding(zero), out: out.as_mut_ptr(), rows: &to, channels,
                    };
                    (kernels.product)(&layer, &to);
                }
                (raw, out)
            };
            let expected = run(&PORTABLE);
            for kernels in available() {
                prop_assert_eq!(&run(kernels), &expected, "{}", kernels.name);
            }
        }

        #[test]
        fn every_column_equals_the_portable(
            pixels in 1..20_usize, lines in 1..4_usize, pixel in 1..40_usize, stride in 1..4_usize, quads in 1..8_usize, even in any::<bool>(),
            padded in any::<bool>(),
            channels in 1..=LANES, scale in 1e-5_f32..0.1, zero in 0..256_i32,
            seed in any::<u64>(), extreme in any::<bool>(),
        ) {
            let mut random = random(seed, extreme);
            let four: [u32; 4] = std::array::from_fn(|_| random() as u32 % 200);
            let taps: Vec<[u32; 4]> = (0..quads)
                .map(|quad| four.map(|tap| if even { tap + (quad * pixel) as u32 } else { random() as u32 % 200 }))
                .collect();
            let step = pixel * stride;
            let line = pixels * step + 3;
            let x = bytes(&mut random, lines * line + quads * pixel + 200 + SLACK);
            let (mut weights, small) = weights(&mut random, quads);
            if padded {
                // As of a column of three taps.
                weights.iter_mut().for_each(|w| w.0.iter_mut().skip(3).step_by(4).for_each(|w| *w = 0));
            }
            let bias = sums(&mut random);
            let scale = scales(&mut random, 1, scale);
            let layer = Columns {
                x: x.as_ptr(), step, pixels, line, lines, taps: &taps, shift: if even { pixel } else { 0 }, weights: &weights, small,
                bias: &bias,
            };
            let to: Vec<u32> = (0..lines * pixels).map(|pixel| (pixel * (channels + 1)) as u32).collect();
            let run = |kernels: &Kernels| {
                let mut raw = vec![Sums([-1; LANES]); lines * pixels];
                let mut out = vec![7; lines * pixels * (channels + 1)];
                // SAFETY: the sizes above.
                unsafe {
                    (kernels.columns)(&layer, &Target::Sums(raw.as_mut_ptr()));
                    let to = Target::Bytes {
                        scale: &scale, to: rounding(zero), out: out.as_mut_ptr(), rows: &to, channels,
                    };
                    (kernels.columns)(&layer, &to);
                }
                (raw, out)
            };
            let expected = run(&PORTABLE);
            for kernels in available() {
                prop_assert_eq!(&run(kernels), &expected, "{}", kernels.name);
            }
        }

        #[test]
        fn every_rounding_equals_the_portable(
            n in 1..200_usize, seed in any::<u64>(), scale in 1e-6_f32..10.0, zero in 0..256_i32,
        ) {
            let mut random = random(seed, false);
            let (a, b) = (bytes(&mut random, n), bytes(&mut random, n));
            let x: Vec<f32> = (0..n).map(|_| (random() as i32 as f32) * 1e-8).collect();
            let low = if SIGNED { -128.0 } else { 0.0 };
            let run = |kernels: &Kernels| {
                let (mut sum, mut steps) = (vec![0; n], vec![0; n]);
                // SAFETY: the sizes above.
                unsafe {
                    (kernels.add)(&a, &b, (scale, 0.5, 3.25), (low, low + 255.0), &mut sum);
                    (kernels.quantize)(&x, scale, rounding(zero), &mut steps);
                }
                (sum, steps)
            };
            for kernels in available() {
                prop_assert_eq!(run(kernels), run(&PORTABLE), "{}", kernels.name);
            }
        }
    }

    #[test]
    #[ignore = "tests/arm says which kernels a processor has to have"]
    fn the_best_are_the_expected() {
        let expected = std::env::var("OUTPOST_EXPECT_KERNELS").expect("OUTPOST_EXPECT_KERNELS names a table");
        assert_eq!(best().name, expected);
        // Every lesser table of the architecture is there too, and so tested.
        let names: Vec<_> = available().iter().map(|kernels| kernels.name).collect();
        let all = ["portable", "neon", "neon-dotprod", "neon-i8mm"];
        assert_eq!(names, all[..=all.iter().position(|name| *name == expected).expect("a known table")]);
    }

    fn bytes(random: &mut impl FnMut() -> u64, n: usize) -> Vec<u8> {
        (0..n).map(|_| random() as u8).collect()
    }

    /// Every other time without -128.
    fn weights(random: &mut impl FnMut() -> u64, n: usize) -> (Vec<Block>, bool) {
        let least = if random() & 4 == 0 { -128 } else { -127 };
        let weights: Vec<Block> = (0..n).map(|_| Block(std::array::from_fn(|_| (random() as i8).max(least)))).collect();
        let small = small(&weights);
        (weights, small)
    }

    fn sums(random: &mut impl FnMut() -> u64) -> Sums {
        Sums(std::array::from_fn(|_| random() as i32 >> 12))
    }

    fn scales(random: &mut impl FnMut() -> u64, n: usize, scale: f32) -> Vec<Scales> {
        let mut one = || Scales(std::array::from_fn(|_| scale * (random() as u8 as f32 + 1.0) / 128.0));
        (0..n).map(|_| one()).collect()
    }

    /// To every byte there is; `zero` counts from the least.
    fn rounding(zero: i32) -> Requant {
        let low = if SIGNED { -128 } else { 0 };
        Requant { zero: zero + low, low: -zero as f32, high: (255 - zero) as f32 }
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
