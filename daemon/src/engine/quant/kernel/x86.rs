//! AVX2 (pairs of 16 bits) and AVX-512 VNNI (quads of bytes).

use std::arch::x86_64::*;

use super::portable::{add_bytes, round_floats, round_sums};
use super::{Block, Kernels, LANES, ROWS, Requant, Sums};

pub fn add_available(found: &mut Vec<&'static Kernels>) {
    if is_x86_feature_detected!("avx2") {
        found.push(&AVX2);
    }
    let wanted = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"];
    let have = [
        is_x86_feature_detected!("avx512f"),
        is_x86_feature_detected!("avx512bw"),
        is_x86_feature_detected!("avx512vl"),
        is_x86_feature_detected!("avx512dq"),
        is_x86_feature_detected!("avx512vnni"),
    ];
    if have.len() == wanted.len() && have.iter().all(|have| *have) {
        found.push(&VNNI);
    }
}

/// Defines the tables' elementwise functions: the portable loops, compiled for more instructions.
macro_rules! elementwise {
    ($features:literal, $requant:ident, $add:ident, $quantize:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $requant(
            sums: &[Sums],
            bias: &Sums,
            scale: &[f32; LANES],
            to: Requant,
            out: *mut u8,
            stride: usize,
            lanes: usize,
        ) {
            // SAFETY: the caller's.
            unsafe { round_sums(sums, bias, scale, to, out, stride, lanes) }
        }
        #[target_feature(enable = $features)]
        fn $add(a: &[u8], b: &[u8], by: (f32, f32, f32), range: (f32, f32), out: &mut [u8]) {
            add_bytes(a, b, by, range, out);
        }
        #[target_feature(enable = $features)]
        fn $quantize(x: &[f32], scale: f32, to: Requant, out: &mut [u8]) {
            round_floats(x, scale, to, out);
        }
    };
}
elementwise!("avx2", requant_avx2, add_avx2, quantize_avx2);
elementwise!("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", requant_vnni, add_vnni, quantize_vnni);

/// Calls a kernel whose numbers of rows and blocks are known to the compiler.
macro_rules! by_size {
    ($kernel:ident, $rows:expr, $blocks:expr, $($argument:expr),*) => {
        match ($rows, $blocks) {
            (1, 1) => $kernel::<1, 1>($($argument),*),
            (2, 1) => $kernel::<2, 1>($($argument),*),
            (3, 1) => $kernel::<3, 1>($($argument),*),
            (4, 1) => $kernel::<4, 1>($($argument),*),
            (5, 1) => $kernel::<5, 1>($($argument),*),
            (ROWS, 1) => $kernel::<6, 1>($($argument),*),
            (1, 2) => $kernel::<1, 2>($($argument),*),
            (2, 2) => $kernel::<2, 2>($($argument),*),
            (3, 2) => $kernel::<3, 2>($($argument),*),
            (4, 2) => $kernel::<4, 2>($($argument),*),
            (5, 2) => $kernel::<5, 2>($($argument),*),
            _ => $kernel::<6, 2>($($argument),*),
        }
    };
}

const VNNI: Kernels = Kernels {
    name: "avx512-vnni",
    dot: dot_vnni,
    depthwise: depthwise_vnni,
    requant: requant_vnni,
    add: add_vnni,
    quantize: quantize_vnni,
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn dot_vnni(
    x: &[*const u8; ROWS],
    rows: usize,
    segments: &[usize],
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn tile<const R: usize, const B: usize>(
        x: &[*const u8; ROWS],
        segments: &[usize],
        quads: usize,
        mut w: *const Block,
        sums: *mut Sums,
    ) {
        // SAFETY: the caller's, see [`Kernels::dot`].
        unsafe {
            let between = segments.len() * quads;
            let mut sum = [[_mm512_setzero_si512(); B]; R];
            for segment in segments {
                let mut x: [*const u8; R] = std::array::from_fn(|row| x[row].add(*segment));
                for _ in 0..quads {
                    let blocks: [__m512i; B] = std::array::from_fn(|b| _mm512_load_si512(w.add(b * between).cast()));
                    for (x, sum) in x.iter_mut().zip(&mut sum) {
                        let four = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
                        *x = x.add(4);
                        for (sum, w) in sum.iter_mut().zip(blocks) {
                            *sum = _mm512_dpbusd_epi32(*sum, four, w);
                        }
                    }
                    w = w.add(1);
                }
            }
            for (row, sum) in sum.into_iter().enumerate() {
                for (block, sum) in sum.into_iter().enumerate() {
                    _mm512_store_si512(sums.add(block * R + row).cast(), sum);
                }
            }
        }
    }
    // SAFETY: the caller's.
    unsafe { by_size!(tile, rows, blocks, x, segments, quads, w, sums) }
}

/// Four taps of 16 channels as four registers of 4 channels by 4 taps.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose(x: *const u8, taps: &[usize; 4]) -> [__m128i; 4] {
    // SAFETY: the caller's: four taps with 16 bytes at each.
    let [a, b, c, d]: [__m128i; 4] = std::array::from_fn(|i| unsafe { _mm_loadu_si128(x.add(taps[i]).cast()) });
    let (ab, cd) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
    let (ab_high, cd_high) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
    [
        _mm_unpacklo_epi16(ab, cd),
        _mm_unpackhi_epi16(ab, cd),
        _mm_unpacklo_epi16(ab_high, cd_high),
        _mm_unpackhi_epi16(ab_high, cd_high),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn depthwise_vnni(x: *const u8, step: usize, pixels: usize, taps: &[usize], w: *const Block, sums: *mut Sums) {
    /// With the number of quads known, taps and weights stay in registers.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn row<const Q: usize>(
        x: *const u8,
        step: usize,
        pixels: usize,
        taps: &[[usize; 4]],
        w: *const Block,
        sums: *mut Sums,
    ) {
        // SAFETY: the caller's, see [`Kernels::depthwise`].
        unsafe {
            let taps: [[usize; 4]; Q] = std::array::from_fn(|quad| taps[quad]);
            let w: [[__m128i; 4]; Q] = std::array::from_fn(|quad| {
                std::array::from_fn(|i| _mm_load_si128(w.add(quad).cast::<__m128i>().add(i)))
            });
            for pixel in 0..pixels {
                let x = x.add(pixel * step);
                let mut sum = [_mm_setzero_si128(); 4];
                for (taps, w) in taps.iter().zip(&w) {
                    for (i, x) in transpose(x, taps).into_iter().enumerate() {
                        sum[i] = _mm_dpbusd_epi32(sum[i], x, w[i]);
                    }
                }
                for (i, sum) in sum.into_iter().enumerate() {
                    _mm_store_si128(sums.add(pixel).cast::<__m128i>().add(i), sum);
                }
            }
        }
    }
    let (quads, _) = taps.as_chunks::<4>();
    // SAFETY: the caller's, see [`Kernels::depthwise`].
    unsafe {
        match quads.len() {
            1 => return row::<1>(x, step, pixels, quads, w, sums),
            2 => return row::<2>(x, step, pixels, quads, w, sums),
            3 => return row::<3>(x, step, pixels, quads, w, sums),
            _ => {}
        }
        for pixel in 0..pixels {
            let x = x.add(pixel * step);
            let mut sum = [_mm_setzero_si128(); 4];
            for (quad, taps) in quads.iter().enumerate() {
                let w = w.add(quad).cast::<__m128i>();
                for (i, x) in transpose(x, taps).into_iter().enumerate() {
                    sum[i] = _mm_dpbusd_epi32(sum[i], x, _mm_load_si128(w.add(i)));
                }
            }
            for (i, sum) in sum.into_iter().enumerate() {
                _mm_store_si128(sums.add(pixel).cast::<__m128i>().add(i), sum);
            }
        }
    }
}

const AVX2: Kernels = Kernels {
    name: "avx2",
    dot: dot_avx2,
    depthwise: depthwise_avx2,
    requant: requant_avx2,
    add: add_avx2,
    quantize: quantize_avx2,
};

/// Bytes 0 and 2 of each 32 bits, and bytes 1 and 3, as pairs of 16 bits: `vpmaddwd` then multiplies and adds
/// without the saturation that `vpmaddubsw` has.
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned_pairs(x: __m256i) -> (__m256i, __m256i) {
    (_mm256_and_si256(x, _mm256_set1_epi32(0x00ff_00ff)), _mm256_srli_epi16::<8>(x))
}

#[inline]
#[target_feature(enable = "avx2")]
fn signed_pairs(w: __m256i) -> (__m256i, __m256i) {
    (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w)), _mm256_srai_epi16::<8>(w))
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_products(sum: __m256i, x: (__m256i, __m256i), w: (__m256i, __m256i)) -> __m256i {
    let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.0, w.0));
    _mm256_add_epi32(sum, _mm256_madd_epi16(x.1, w.1))
}

#[target_feature(enable = "avx2")]
unsafe fn dot_avx2(
    x: &[*const u8; ROWS],
    rows: usize,
    segments: &[usize],
    quads: usize,
    w: *const Block,
    blocks: usize,
    sums: *mut Sums,
) {
    /// Three rows of a block's sums, its weights and a row's bytes fit the 16 registers.
    #[target_feature(enable = "avx2")]
    unsafe fn tile<const R: usize>(
        x: &[*const u8],
        segments: &[usize],
        quads: usize,
        mut w: *const Block,
        sums: *mut Sums,
    ) {
        // SAFETY: the caller's, see [`Kernels::dot`].
        unsafe {
            let mut sum = [[_mm256_setzero_si256(); 2]; R];
            for segment in segments {
                let mut x: [*const u8; R] = std::array::from_fn(|row| x[row].add(*segment));
                for _ in 0..quads {
                    let halves: [_; 2] =
                        std::array::from_fn(|half| signed_pairs(_mm256_load_si256(w.cast::<__m256i>().add(half))));
                    for (x, sum) in x.iter_mut().zip(&mut sum) {
                        let four = unsigned_pairs(_mm256_set1_epi32(x.cast::<i32>().read_unaligned()));
                        *x = x.add(4);
                        sum[0] = add_products(sum[0], four, halves[0]);
                        sum[1] = add_products(sum[1], four, halves[1]);
                    }
                    w = w.add(1);
                }
            }
            for (row, sum) in sum.into_iter().enumerate() {
                let to = sums.add(row).cast::<__m256i>();
                _mm256_store_si256(to, sum[0]);
                _mm256_store_si256(to.add(1), sum[1]);
            }
        }
    }
    for block in 0..blocks {
        for row in (0..rows).step_by(3) {
            // SAFETY: the caller's, within its rows and blocks.
            unsafe {
                let (x, w) = (&x[row..rows], w.add(block * segments.len() * quads));
                let sums = sums.add(block * rows + row);
                match x.len() {
                    1 => tile::<1>(x, segments, quads, w, sums),
                    2 => tile::<2>(x, segments, quads, w, sums),
                    _ => tile::<3>(x, segments, quads, w, sums),
                }
            }
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn depthwise_avx2(x: *const u8, step: usize, pixels: usize, taps: &[usize], w: *const Block, sums: *mut Sums) {
    for pixel in 0..pixels {
        // SAFETY: the caller's, see [`Kernels::depthwise`].
        unsafe {
            let x = x.add(pixel * step);
            let mut sum = [_mm256_setzero_si256(); 2];
            for (quad, taps) in taps.as_chunks::<4>().0.iter().enumerate() {
                let w = w.add(quad).cast::<__m256i>();
                let [a, b, c, d] = transpose(x, taps);
                let x = [_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)];
                for half in 0..2 {
                    sum[half] =
                        add_products(sum[half], unsigned_pairs(x[half]), signed_pairs(_mm256_load_si256(w.add(half))));
                }
            }
            let to = sums.add(pixel).cast::<__m256i>();
            _mm256_store_si256(to, sum[0]);
            _mm256_store_si256(to.add(1), sum[1]);
        }
    }
}
