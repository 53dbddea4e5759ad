//! AVX2 (pairs of 16 bits), AVX-VNNI and AVX-512 VNNI (quads of bytes).

use std::arch::x86_64::*;

use super::portable::{add_bytes, round_floats};
use super::{Columns, Kernels, LANES, Product, Requant, Sums, Target};

pub fn add_available(found: &mut Vec<&'static Kernels>) {
    if !is_x86_feature_detected!("avx2") {
        return;
    }
    found.push(&AVX2);
    if is_x86_feature_detected!("avxvnni") {
        found.push(&AVX_VNNI);
    }
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni")
    {
        found.push(&AVX512_VNNI);
    }
}

const AVX2: Kernels =
    Kernels { name: "avx2", product: product_avx2, columns: columns_avx2, add: add_avx2, quantize: quantize_avx2 };
const AVX_VNNI: Kernels = Kernels { name: "avx-vnni", product: product_vnni, columns: columns_vnni, ..AVX2 };
const AVX512_VNNI: Kernels =
    Kernels { name: "avx512-vnni", product: product_512, columns: columns_512, add: add_512, quantize: quantize_512 };

/// Defines a table's elementwise functions: the portable loops, compiled for more instructions.
macro_rules! elementwise {
    ($features:literal, $add:ident, $quantize:ident) => {
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
elementwise!("avx2", add_avx2, quantize_avx2);
elementwise!("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", add_512, quantize_512);

/// Defines a table's walk over a layer: which tiles, of rows by blocks of channels, it is cut into.
///
/// Blocks are the outer loop: their weights stay in the nearest cache. A lone block leaves registers for more rows,
/// and a single row takes many blocks at once, or each sum would wait for the one before it.
macro_rules! product {
    ($features:literal, $product:ident, $tile:ident, rows: $most:literal, lone: $lone:literal, blocks: $blocks:literal,
     single: $single:literal, $(($rows:literal, $wide:literal))*) => {
        #[target_feature(enable = $features)]
        unsafe fn $product(layer: &Product, target: &Target) {
            let (rows, blocks) = (layer.rows.len(), layer.bias.len());
            let mut block = 0;
            while block < blocks {
                let left = blocks - block;
                let wide = if rows == 1 { $single.min(1 << left.ilog2()) } else { $blocks.min(left) };
                let most = if wide == 1 { $lone } else { $most };
                let tiles = rows.div_ceil(most);
                let mut row = 0;
                for tile in 0..tiles {
                    let n = (rows + tile) / tiles;
                    // SAFETY: the caller's, see [`Kernels::product`].
                    unsafe {
                        match (n, wide) {
                            $(($rows, $wide) => $tile::<$rows, $wide>(layer, target, row, block),)*
                            _ => unreachable!("every tile is listed"),
                        }
                    }
                    row += n;
                }
                block += wide;
            }
        }
    };
}

product!("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", product_512, tile_512, rows: 6, lone: 12, blocks: 2, single: 8,
    (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (7, 1) (8, 1) (9, 1) (10, 1) (11, 1) (12, 1) (1, 2) (2, 2) (3, 2) (4, 2) (5, 2) (6, 2) (1, 4) (1, 8));
product!("avx2,avxvnni", product_vnni, tile_vnni, rows: 6, lone: 6, blocks: 1, single: 4,
    (1, 1) (2, 1) (3, 1) (4, 1) (5, 1) (6, 1) (1, 2) (1, 4));
product!("avx2", product_avx2, tile_avx2, rows: 3, lone: 3, blocks: 1, single: 2,
    (1, 1) (2, 1) (3, 1) (1, 2));

/// The `R` rows from `row` on.
///
/// # Safety
/// There are as many.
#[inline(always)]
unsafe fn starts<const R: usize>(layer: &Product, row: usize) -> [*const u8; R] {
    // SAFETY: the caller's.
    std::array::from_fn(|i| unsafe { layer.x.add(*layer.rows.get_unchecked(row + i) as usize) })
}

/// Sums of `R` rows by `B` blocks, in registers of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn tile_512<const R: usize, const B: usize>(layer: &Product, target: &Target, row: usize, block: usize) {
    // SAFETY: the caller's, see [`Kernels::product`].
    unsafe {
        let size = layer.segments.len() * layer.quads;
        let start = starts::<R>(layer, row);
        let mut w = layer.weights.as_ptr().add(block * size);
        let bias: [__m512i; B] = std::array::from_fn(|b| load_512(&layer.bias[block + b]));
        let mut sums = [bias; R];
        for segment in layer.segments {
            let x = start.map(|x| x.add(*segment as usize));
            for quad in 0..layer.quads {
                let weights: [__m512i; B] = std::array::from_fn(|b| _mm512_load_si512(w.add(b * size).cast()));
                for (x, sums) in x.iter().zip(&mut sums) {
                    let four = _mm512_set1_epi32(x.add(quad * 4).cast::<i32>().read_unaligned());
                    for (sum, w) in sums.iter_mut().zip(weights) {
                        *sum = _mm512_dpbusd_epi32(*sum, four, w);
                    }
                }
                w = w.add(1);
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (b, sum) in sums.into_iter().enumerate() {
                put_512(target, row + i, block + b, layer.bias.len(), sum);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_512(sums: &Sums) -> __m512i {
    // SAFETY: 64 bytes, aligned.
    unsafe { _mm512_load_si512(std::ptr::from_ref(sums).cast()) }
}

/// See [`super::portable::put`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn put_512(target: &Target, row: usize, block: usize, blocks: usize, sum: __m512i) {
    // SAFETY: the caller's.
    unsafe {
        match target {
            Target::Sums(to) => _mm512_store_si512(to.add(row * blocks + block).cast(), sum),
            Target::Bytes { scale, to, out, rows, channels } => {
                let scale = _mm512_load_ps(scale.as_ptr().add(block).cast());
                // The second operand is taken where the first is no number.
                let x = _mm512_max_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale), _mm512_set1_ps(to.low));
                let x = _mm512_min_ps(x, _mm512_set1_ps(to.high));
                let x = _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(to.zero)));
                let out = out.add(*rows.get_unchecked(row) as usize + block * LANES);
                let lanes = channels - block * LANES;
                if lanes >= LANES {
                    _mm_storeu_si128(out.cast(), x);
                } else {
                    _mm_mask_storeu_epi8(out.cast(), (1 << lanes) - 1, x);
                }
            }
        }
    }
}

/// Defines tiles in registers of 8 sums: how weights and bytes are prepared, and how they are multiplied and added.
macro_rules! narrow {
    ($features:literal, $tile:ident, $columns:ident, $run:ident, $weights:ident, $bytes:ident, $add:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $tile<const R: usize, const B: usize>(layer: &Product, target: &Target, row: usize, block: usize) {
            // SAFETY: the caller's, see [`Kernels::product`].
            unsafe {
                let size = layer.segments.len() * layer.quads;
                let start = starts::<R>(layer, row);
                let mut w = layer.weights.as_ptr().add(block * size);
                let bias: [[__m256i; 2]; B] = std::array::from_fn(|b| load_256(&layer.bias[block + b]));
                let mut sums = [bias; R];
                for segment in layer.segments {
                    let x = start.map(|x| x.add(*segment as usize));
                    for quad in 0..layer.quads {
                        for b in 0..B {
                            let w = w.add(b * size).cast::<__m256i>();
                            let halves = [$weights(_mm256_load_si256(w)), $weights(_mm256_load_si256(w.add(1)))];
                            for (x, sums) in x.iter().zip(&mut sums) {
                                let four = $bytes(_mm256_set1_epi32(x.add(quad * 4).cast::<i32>().read_unaligned()));
                                sums[b][0] = $add(sums[b][0], four, halves[0]);
                                sums[b][1] = $add(sums[b][1], four, halves[1]);
                            }
                        }
                        w = w.add(1);
                    }
                }
                for (i, sums) in sums.into_iter().enumerate() {
                    for (b, sums) in sums.into_iter().enumerate() {
                        put_256(target, row + i, block + b, layer.bias.len(), sums);
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $run<const Q: usize, const KEPT: usize>(layer: &Columns, target: &Target) {
            // SAFETY: the caller's, see [`Kernels::columns`].
            unsafe {
                let bias = load_256(layer.bias);
                let mut quads = [[_mm256_setzero_si256(); 2]; Q];
                for line in 0..layer.lines {
                    for pixel in 0..layer.pixels {
                        let x = layer.x.add(line * layer.line + pixel * layer.step);
                        let first = if pixel == 0 { 0 } else { KEPT };
                        quads.copy_within(Q - first.., 0);
                        for (quad, taps) in quads.iter_mut().zip(layer.taps).skip(first) {
                            *quad = transposed(x, taps);
                        }
                        let mut sums = bias;
                        for (quad, w) in quads.iter().zip(layer.weights) {
                            for (half, sum) in sums.iter_mut().enumerate() {
                                let w = _mm256_load_si256(std::ptr::from_ref(w).cast::<__m256i>().add(half));
                                *sum = $add(*sum, $bytes(quad[half]), $weights(w));
                            }
                        }
                        put_256(target, line * layer.pixels + pixel, 0, 1, sums);
                    }
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn $columns(layer: &Columns, target: &Target) {
            // SAFETY: the caller's, see [`Kernels::columns`].
            unsafe {
                by_columns!(layer, target, $run);
                let bias = load_256(layer.bias);
                for line in 0..layer.lines {
                    for pixel in 0..layer.pixels {
                        let x = layer.x.add(line * layer.line + pixel * layer.step);
                        let mut sums = bias;
                        for (taps, w) in layer.taps.iter().zip(layer.weights) {
                            let quad = transposed(x, taps);
                            for (half, sum) in sums.iter_mut().enumerate() {
                                let w = _mm256_load_si256(std::ptr::from_ref(w).cast::<__m256i>().add(half));
                                *sum = $add(*sum, $bytes(quad[half]), $weights(w));
                            }
                        }
                        put_256(target, line * layer.pixels + pixel, 0, 1, sums);
                    }
                }
            }
        }
    };
}

/// Runs a kernel whose number of quads, and of those that a pixel shares with the one before, the compiler knows.
/// Falls through where there is none for these numbers.
macro_rules! by_columns {
    ($layer:ident, $target:ident, $run:ident) => {
        match ($layer.taps.len(), kept($layer)) {
            (1, _) => return $run::<1, 0>($layer, $target),
            (2, 0) => return $run::<2, 0>($layer, $target),
            (3, 0) => return $run::<3, 0>($layer, $target),
            (3, 1) => return $run::<3, 1>($layer, $target),
            (3, 2) => return $run::<3, 2>($layer, $target),
            (4, 3) => return $run::<4, 3>($layer, $target),
            _ => {}
        }
    };
}

/// How many of a pixel's quads the next one needs again.
fn kept(layer: &Columns) -> usize {
    match layer.step.checked_div(layer.shift) {
        Some(apart) if layer.step == apart * layer.shift => layer.taps.len().saturating_sub(apart),
        _ => 0,
    }
}

narrow!("avx2,avxvnni", tile_vnni, columns_vnni, run_vnni, same, same, add_quads);
narrow!("avx2", tile_avx2, columns_avx2, run_avx2, signed_pairs, unsigned_pairs, add_pairs);

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn same(x: __m256i) -> __m256i {
    x
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_quads(sum: __m256i, x: __m256i, w: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, x, w)
}

/// Bytes 0 and 2 of each 32 bits, and bytes 1 and 3, as pairs of 16 bits: `vpmaddwd` then multiplies and adds
/// without the saturation that `vpmaddubsw` has.
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned_pairs(x: __m256i) -> [__m256i; 2] {
    [_mm256_and_si256(x, _mm256_set1_epi32(0x00ff_00ff)), _mm256_srli_epi16::<8>(x)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn signed_pairs(w: __m256i) -> [__m256i; 2] {
    [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w)), _mm256_srai_epi16::<8>(w)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_pairs(sum: __m256i, x: [__m256i; 2], w: [__m256i; 2]) -> __m256i {
    let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x[0], w[0]));
    _mm256_add_epi32(sum, _mm256_madd_epi16(x[1], w[1]))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_256(sums: &Sums) -> [__m256i; 2] {
    let at = std::ptr::from_ref(sums).cast::<__m256i>();
    // SAFETY: 64 bytes, aligned.
    unsafe { [_mm256_load_si256(at), _mm256_load_si256(at.add(1))] }
}

/// See [`super::portable::put`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn put_256(target: &Target, row: usize, block: usize, blocks: usize, sums: [__m256i; 2]) {
    // SAFETY: the caller's.
    unsafe {
        match target {
            Target::Sums(to) => {
                let to = to.add(row * blocks + block).cast::<__m256i>();
                _mm256_store_si256(to, sums[0]);
                _mm256_store_si256(to.add(1), sums[1]);
            }
            Target::Bytes { scale, to, out, rows, channels } => {
                let scale: *const f32 = scale.as_ptr().add(block).cast();
                let [a, b] = [0, 1].map(|half| {
                    let scale = _mm256_load_ps(scale.add(half * 8));
                    // The second operand is taken where the first is no number.
                    let x = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), scale);
                    let x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(to.low)), _mm256_set1_ps(to.high));
                    _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(to.zero))
                });
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
                let x = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                let out = out.add(*rows.get_unchecked(row) as usize + block * LANES);
                let lanes = channels - block * LANES;
                if lanes >= LANES {
                    _mm_storeu_si128(out.cast(), x);
                } else {
                    let mut bytes = [0; LANES];
                    _mm_storeu_si128(bytes.as_mut_ptr().cast(), x);
                    out.copy_from_nonoverlapping(bytes.as_ptr(), lanes);
                }
            }
        }
    }
}

/// Four taps of 16 channels as 16 channels of 4 taps.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transposed(x: *const u8, taps: &[u32; 4]) -> [__m256i; 2] {
    // SAFETY: the caller's: 16 bytes at each tap.
    let [a, b, c, d] = taps.map(|tap| unsafe { _mm_loadu_si128(x.add(tap as usize).cast()) });
    let (ab, cd) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
    let (ab_high, cd_high) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
    [
        _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd)),
        _mm256_set_m128i(_mm_unpackhi_epi16(ab_high, cd_high), _mm_unpacklo_epi16(ab_high, cd_high)),
    ]
}

/// The same in one register: 4 by 4 groups of four bytes are turned, then 4 by 4 bytes in each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn transposed_512(x: *const u8, taps: &[u32; 4]) -> __m512i {
    // SAFETY: the caller's: 16 bytes at each tap.
    let [a, b, c, d] = taps.map(|tap| unsafe { _mm_loadu_si128(x.add(tap as usize).cast()) });
    let all = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(a), b);
    let all = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(all, c), d);
    let groups = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let bytes = _mm512_set4_epi32(0x0f0b_0703, 0x0e0a_0602, 0x0d09_0501, 0x0c08_0400);
    _mm512_shuffle_epi8(_mm512_permutexvar_epi32(groups, all), bytes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn run_512<const Q: usize, const KEPT: usize>(layer: &Columns, target: &Target) {
    // SAFETY: the caller's, see [`Kernels::columns`].
    unsafe {
        let bias = load_512(layer.bias);
        let w: [__m512i; Q] = std::array::from_fn(|quad| _mm512_load_si512(layer.weights.as_ptr().add(quad).cast()));
        let taps: [[u32; 4]; Q] = std::array::from_fn(|quad| layer.taps[quad]);
        let mut quads = [_mm512_setzero_si512(); Q];
        for line in 0..layer.lines {
            let x = layer.x.add(line * layer.line);
            for quad in 0..KEPT {
                quads[Q - KEPT + quad] = transposed_512(x, &taps[quad]);
            }
            for pixel in 0..layer.pixels {
                let x = x.add(pixel * layer.step);
                for quad in 0..KEPT {
                    quads[quad] = quads[Q - KEPT + quad];
                }
                for quad in KEPT..Q {
                    quads[quad] = transposed_512(x, &taps[quad]);
                }
                let mut sum = bias;
                for quad in 0..Q {
                    sum = _mm512_dpbusd_epi32(sum, quads[quad], w[quad]);
                }
                put_512(target, line * layer.pixels + pixel, 0, 1, sum);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn columns_512(layer: &Columns, target: &Target) {
    // SAFETY: the caller's, see [`Kernels::columns`].
    unsafe {
        by_columns!(layer, target, run_512);
        let bias = load_512(layer.bias);
        for line in 0..layer.lines {
            for pixel in 0..layer.pixels {
                let x = layer.x.add(line * layer.line + pixel * layer.step);
                let mut sum = bias;
                for (taps, w) in layer.taps.iter().zip(layer.weights) {
                    let w = _mm512_load_si512(std::ptr::from_ref(w).cast());
                    sum = _mm512_dpbusd_epi32(sum, transposed_512(x, taps), w);
                }
                put_512(target, line * layer.pixels + pixel, 0, 1, sum);
            }
        }
    }
}
