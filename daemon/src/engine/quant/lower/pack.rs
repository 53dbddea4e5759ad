//! Weights in the order in which kernels read them.

use super::Lowered;
use crate::engine::quant::kernel::{Block, LANES, Scales, Sums, small};
use crate::engine::quant::program::{Depthwise, Finish, Layer, Slot, Step, Window};

/// A layer whose numbers are known, not yet packed.
pub struct Numbers {
    pub source: Slot,
    pub result: Slot,
    pub window: Window,
    pub groups: usize,
    /// `[output channel][tap][input channel]`, with the zero point taken off.
    pub weights: Vec<i32>,
    /// For each output channel; the source's zero point is in it.
    pub bias: Vec<i32>,
    /// For each output channel.
    pub factor: Vec<f32>,
    /// The source's zero point, as stored.
    pub zero: u8,
    pub finish: Finish,
}

/// The step that runs a layer.
///
/// # Errors
/// A layer whose offsets are over 32 bits.
pub fn step(numbers: Numbers) -> Lowered<Step> {
    let single = numbers.factor.len() == numbers.groups && numbers.window.source[2] == numbers.groups;
    Ok(if single && numbers.groups > 1 {
        Step::Depthwise(Box::new(depthwise(numbers)?))
    } else {
        Step::Layer(Box::new(layer(numbers)?))
    })
}

fn layer(numbers: Numbers) -> Lowered<Layer> {
    let Numbers { source, result, window, groups, weights, bias, factor, zero, finish } = numbers;
    let (all, per) = (factor.len(), weights.len() / factor.len());
    let (channels, [tall, wide]) = (all / groups, window.kernel);
    let blocks = channels.div_ceil(LANES);
    // Taps beside each other lie beside each other where all channels are taken.
    let run = if groups == 1 && window.dilation[1] == 1 { wide } else { 1 };
    let segments = offsets((0..tall * wide).step_by(run).map(|tap| window.tap([tap / wide, tap % wide])))?;
    let long = per / segments.len();
    let quads = long.div_ceil(4);
    let parts = split(&weights);
    let mut packed = vec![Block([0; 64]); groups * blocks * parts.len() * segments.len() * quads];
    for c in 0..all {
        let (group, lane) = (c / channels, c % channels);
        let block = group * blocks + lane / LANES;
        for (at, part) in parts.iter().enumerate() {
            let at = (block * parts.len() + at) * segments.len();
            for (k, w) in part[c * per..][..per].iter().enumerate() {
                let (segment, k) = (k / long, k % long);
                packed[(at + segment) * quads + k / 4].0[lane % LANES * 4 + k % 4] = *w;
            }
        }
    }
    let each = |at: usize| {
        let (group, block) = (at / blocks, at % blocks);
        move |lane: usize| {
            let c = block * LANES + lane;
            (c < channels).then_some(group * channels + c)
        }
    };
    Ok(Layer {
        source,
        result,
        rows: offsets(window.starts())?,
        to: offsets((0..window.result.iter().product()).map(|row: usize| row * all))?,
        segments: segments.repeat(parts.len()),
        quads,
        small: small(&packed),
        weights: packed.into(),
        bias: (0..groups * blocks).map(each).map(|c| sums(|lane| c(lane).map(|c| bias[c]))).collect(),
        scale: (0..groups * blocks).map(each).map(|c| scales(|lane| c(lane).map(|c| factor[c]))).collect(),
        window,
        groups,
        channels,
        zero,
        finish,
    })
}

/// Taps that are read together: a part of the weights and a place in the kernel, or none.
type Four = [Option<(usize, [usize; 2])>; 4];

fn depthwise(numbers: Numbers) -> Lowered<Depthwise> {
    let Numbers { source, result, window, groups, weights, bias, factor, zero, mut finish } = numbers;
    let [tall, wide] = window.kernel;
    let parts = split(&weights);
    // Few channels: a block takes some successive pixels at once.
    let pixels = if window.stride[1] == 1 && LANES.is_multiple_of(groups) {
        let pixels = LANES / groups;
        if window.result[1].is_multiple_of(pixels) { pixels } else { 1 }
    } else {
        1
    };
    if let Finish::Floats { shift, .. } = &mut finish {
        *shift = shift.repeat(pixels);
    }
    // As columns, neighbouring pixels share them.
    let columns = parts.len() == 1 && matches!(tall, 3 | 4);
    let fours: Vec<Four> = if columns {
        (0..wide).map(|x| std::array::from_fn(|y| (y < tall).then_some((0, [y, x])))).collect()
    } else {
        let taps = (0..parts.len() * tall * wide).map(|at| {
            let (part, tap) = (at / (tall * wide), at % (tall * wide));
            (part, [tap / wide, tap % wide])
        });
        let taps: Vec<_> = taps.collect();
        taps.chunks(4).map(|four| std::array::from_fn(|i| four.get(i).copied())).collect()
    };
    let width = groups * pixels;
    let blocks = width.div_ceil(LANES);
    let mut packed = vec![Block([0; 64]); blocks * fours.len()];
    for to in 0..width {
        let (c, block, lane) = (to % groups, to / LANES, to % LANES);
        for (at, four) in fours.iter().enumerate() {
            for (i, (part, [y, x])) in four.iter().enumerate().filter_map(|(i, tap)| Some((i, (*tap)?))) {
                packed[block * fours.len() + at].0[lane * 4 + i] = parts[part][(c * tall + y) * wide + x];
            }
        }
    }
    let tap = |four: &Four| -> Lowered<[u32; 4]> {
        // A tap that is not there has no weight: the first one is read again.
        let first = four[0].map_or([0, 0], |(_, tap)| tap);
        let taps = offsets(four.iter().map(|tap| window.tap(tap.map_or(first, |(_, tap)| tap))))?;
        taps.try_into().map_err(|_| "taps".to_owned())
    };
    let each =
        |block: usize| move |lane: usize| (block * LANES + lane < width).then_some((block * LANES + lane) % groups);
    Ok(Depthwise {
        source,
        result,
        pixels,
        to: offsets((0..window.result.iter().product::<usize>() / pixels).map(|pixel| pixel * width))?,
        taps: fours.iter().map(tap).collect::<Lowered<_>>()?,
        shift: if columns { window.dilation[1] * window.source[2] } else { 0 },
        small: small(&packed),
        weights: packed.into(),
        bias: (0..blocks).map(each).map(|c| sums(|lane| c(lane).map(|c| bias[c]))).collect(),
        scale: (0..blocks).map(each).map(|c| scales(|lane| c(lane).map(|c| factor[c]))).collect(),
        window,
        zero,
        finish,
    })
}

/// Weights as bytes. One that is over a byte once its zero point is off is the sum of some that are not.
fn split(weights: &[i32]) -> Vec<Vec<i8>> {
    let mut left = weights.to_vec();
    let mut parts = Vec::new();
    while parts.is_empty() || left.iter().any(|w| *w != 0) {
        let part: Vec<i8> = left.iter().map(|w| (*w).clamp(-128, 127) as i8).collect();
        left.iter_mut().zip(&part).for_each(|(left, part)| *left -= i32::from(*part));
        parts.push(part);
    }
    parts
}

fn offsets(of: impl Iterator<Item = usize>) -> Lowered<Vec<u32>> {
    of.map(|at| u32::try_from(at).map_err(|_| "a tensor of over 4 GiB".to_owned())).collect()
}

fn sums(of: impl Fn(usize) -> Option<i32>) -> Sums {
    Sums(std::array::from_fn(|lane| of(lane).unwrap_or(0)))
}

fn scales(of: impl Fn(usize) -> Option<f32>) -> Scales {
    Scales(std::array::from_fn(|lane| of(lane).unwrap_or(0.0)))
}
