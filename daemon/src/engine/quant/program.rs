//! A compiled piece of a graph: steps over buffers of bytes and floats, with every size known.
#![allow(unsafe_code, reason = "kernels are called by pointer; sizes are fixed when a program is built")]

use std::sync::{Mutex, PoisonError};

use super::kernel::{BLOCKS, Block, Kernels, LANES, ROWS, Requant, SLACK, Sums};

/// A buffer, by its number: of bytes or of floats, as the step that uses it says.
pub type Slot = usize;

/// What becomes of the sums of a layer.
#[derive(Debug, Clone)]
pub enum Finish {
    /// Bytes, each block with its scales.
    Bytes(Requant),
    /// Floats: `clamp(sum * scale + shift)`; a shift for each channel.
    Floats {
        /// Added after scaling.
        shift: Vec<f32>,
        /// Least value.
        low: f32,
        /// Greatest value.
        high: f32,
    },
}

/// Which bytes of the source make a row of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Height, width and channels of the source; height 1 for a sequence.
    pub source: [usize; 3],
    /// Height and width of the result.
    pub result: [usize; 2],
    /// Kernel, stride, dilation, and padding before, each by height and width.
    pub kernel: [usize; 2],
    #[expect(missing_docs, reason = "said above")]
    pub stride: [usize; 2],
    #[expect(missing_docs, reason = "said above")]
    pub dilation: [usize; 2],
    #[expect(missing_docs, reason = "said above")]
    pub before: [usize; 2],
}

impl Window {
    /// Position in the source of a kernel's tap, or none in the padding.
    fn at(&self, result: [usize; 2], tap: [usize; 2]) -> Option<[usize; 2]> {
        let one = |axis: usize| {
            let at =
                (result[axis] * self.stride[axis] + tap[axis] * self.dilation[axis]).checked_sub(self.before[axis])?;
            (at < self.source[axis]).then_some(at)
        };
        Some([one(0)?, one(1)?])
    }

    /// Bytes from a window's first tap to another, in rows of `columns` pixels.
    fn offset(&self, tap: [usize; 2], columns: usize) -> usize {
        (tap[0] * self.dilation[0] * columns + tap[1] * self.dilation[1]) * self.source[2]
    }
}

/// A convolution or a product with a constant matrix: every row of the source by every channel.
#[derive(Debug)]
pub struct Layer {
    /// Where from, channels last.
    pub source: Slot,
    /// Where to, channels last.
    pub result: Slot,
    /// Rows of the source.
    pub window: Window,
    /// Independent parts of the channels.
    pub groups: usize,
    /// Channels of the result in a group.
    pub channels: usize,
    /// Runs of bytes that make a row, by the kernel's tap that each starts at.
    pub segments: Vec<[usize; 2]>,
    /// Groups of 4 bytes in a segment.
    pub quads: usize,
    /// For each group and block of channels, one [`Block`] for each quad of each segment.
    pub weights: Vec<Block>,
    /// What is left of weights that do not fit a byte; as long, or empty.
    pub rest: Vec<Block>,
    /// For each group and block.
    pub bias: Vec<Sums>,
    /// For each group and block.
    pub scale: Vec<[f32; LANES]>,
    /// The source's zero point, as stored: it fills the padding.
    pub zero: u8,
    /// Bytes or floats.
    pub finish: Finish,
}

/// A convolution of each channel by itself.
#[derive(Debug)]
pub struct Depthwise {
    #[expect(missing_docs, reason = "as in Layer")]
    pub source: Slot,
    #[expect(missing_docs, reason = "as in Layer")]
    pub result: Slot,
    #[expect(missing_docs, reason = "as in Layer")]
    pub window: Window,
    /// Successive pixels that one block takes: over 1 where channels are few.
    pub pixels: usize,
    /// Taps of the kernel, rounded up to a multiple of 4; for each block of channels, that many quarters of weights.
    pub taps: Vec<[usize; 2]>,
    #[expect(missing_docs, reason = "as in Layer")]
    pub weights: Vec<Block>,
    #[expect(missing_docs, reason = "as in Layer")]
    pub bias: Vec<Sums>,
    #[expect(missing_docs, reason = "as in Layer")]
    pub scale: Vec<[f32; LANES]>,
    #[expect(missing_docs, reason = "as in Layer")]
    pub zero: u8,
    #[expect(missing_docs, reason = "as in Layer")]
    pub finish: Finish,
}

/// One pass over the data.
#[derive(Debug)]
#[expect(missing_docs, reason = "the fields are sources, a result and the numbers of the kernel named")]
pub enum Step {
    /// Floats to bytes.
    Quantize {
        source: Slot,
        result: Slot,
        scale: f32,
        to: Requant,
    },
    /// Bytes that are always the same.
    Constant {
        result: Slot,
        bytes: Vec<u8>,
    },
    /// Byte by byte through a table.
    Map {
        source: Slot,
        result: Slot,
        table: Box<[u8; 256]>,
    },
    /// Bytes to floats through a table.
    Expand {
        source: Slot,
        result: Slot,
        table: Box<[f32; 256]>,
    },
    /// Bytes in another order, or repeated: `dims` of the result with the source's strides.
    Gather {
        source: Slot,
        result: Slot,
        dims: Vec<usize>,
        strides: Vec<usize>,
    },
    /// The same of floats.
    GatherFloats {
        source: Slot,
        result: Slot,
        dims: Vec<usize>,
        strides: Vec<usize>,
    },
    Layer(Box<Layer>),
    Depthwise(Box<Depthwise>),
    Add {
        a: Slot,
        b: Slot,
        result: Slot,
        by: (f32, f32, f32),
        range: (f32, f32),
    },
    /// `clamp(round((a - zero.0) (b - zero.1) scale) + zero)`, zero points as stored.
    Multiply {
        a: Slot,
        b: Slot,
        result: Slot,
        zeros: (i32, i32),
        scale: f32,
        to: Requant,
    },
    /// The greatest byte under each window, in stored order.
    MaxPool {
        source: Slot,
        result: Slot,
        window: Window,
    },
    /// `clamp(round((Σ x - n · zero) scale / n))`; `all`: padding counts in n.
    MeanPool {
        source: Slot,
        result: Slot,
        window: Window,
        zero: i32,
        scale: f32,
        all: bool,
        to: Requant,
    },
    /// `rows` runs of `length` bytes, put at `offset` of rows `stride` apart.
    Place {
        source: Slot,
        result: Slot,
        length: usize,
        stride: usize,
        offset: usize,
    },
    /// Softmax over runs of `length` floats.
    Softmax {
        source: Slot,
        result: Slot,
        length: usize,
    },
}

/// Steps with their buffers.
#[derive(Debug)]
pub struct Program {
    /// In order.
    pub steps: Vec<Step>,
    /// Bytes of each slot used for bytes.
    pub bytes: Vec<usize>,
    /// Floats of each slot used for floats.
    pub floats: Vec<usize>,
    /// Instruction set.
    pub kernels: &'static Kernels,
    /// Memory of past runs, one for each thread at most.
    spare: Mutex<Vec<Memory>>,
}

/// Buffers of one run.
#[derive(Debug)]
pub struct Memory {
    /// Each with [`SLACK`] bytes behind.
    pub bytes: Vec<Vec<u8>>,
    /// Exact.
    pub floats: Vec<Vec<f32>>,
    padded: Vec<u8>,
    sums: Vec<Sums>,
}

impl Program {
    /// Puts a program together.
    pub fn new(steps: Vec<Step>, bytes: Vec<usize>, floats: Vec<usize>, kernels: &'static Kernels) -> Self {
        Program { steps, bytes, floats, kernels, spare: Mutex::default() }
    }

    /// Memory for a run.
    pub fn memory(&self) -> Memory {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| Memory {
            bytes: self.bytes.iter().map(|n| vec![0; n + SLACK]).collect(),
            floats: self.floats.iter().map(|n| vec![0.0; *n]).collect(),
            padded: Vec::new(),
            sums: Vec::new(),
        })
    }

    /// Keeps memory for the next run.
    pub fn give_back(&self, memory: Memory) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }

    /// Runs every step.
    pub fn run(&self, memory: &mut Memory) {
        for step in &self.steps {
            self.step(step, memory);
        }
    }

    fn step(&self, step: &Step, memory: &mut Memory) {
        let Memory { bytes, floats, .. } = memory;
        match step {
            Step::Quantize { source, result, scale, to } => {
                let n = self.bytes[*result];
                // SAFETY: as long by construction, and the table is one that the processor has.
                unsafe { (self.kernels.quantize)(&floats[*source][..n], *scale, *to, &mut bytes[*result][..n]) };
            }
            Step::Constant { result, bytes: constant } => bytes[*result][..constant.len()].copy_from_slice(constant),
            Step::Map { source, result, table } => {
                let n = self.bytes[*result];
                let mut out = std::mem::take(&mut bytes[*result]);
                out[..n].iter_mut().zip(&bytes[*source]).for_each(|(out, x)| *out = table[usize::from(*x)]);
                bytes[*result] = out;
            }
            Step::Expand { source, result, table } => {
                floats[*result].iter_mut().zip(&bytes[*source]).for_each(|(out, x)| *out = table[usize::from(*x)]);
            }
            Step::Gather { source, result, dims, strides } => {
                let mut out = std::mem::take(&mut bytes[*result]);
                gather(&bytes[*source], &mut out, dims, strides);
                bytes[*result] = out;
            }
            Step::GatherFloats { source, result, dims, strides } => {
                let mut out = std::mem::take(&mut floats[*result]);
                gather(&floats[*source], &mut out, dims, strides);
                floats[*result] = out;
            }
            Step::Layer(layer) => self.layer(layer, memory),
            Step::Depthwise(layer) => self.depthwise(layer, memory),
            Step::Add { a, b, result, by, range } => {
                let n = self.bytes[*result];
                let mut out = std::mem::take(&mut bytes[*result]);
                // SAFETY: as for Quantize.
                unsafe { (self.kernels.add)(&bytes[*a][..n], &bytes[*b][..n], *by, *range, &mut out[..n]) };
                bytes[*result] = out;
            }
            Step::Multiply { a, b, result, zeros, scale, to } => {
                let n = self.bytes[*result];
                let mut out = std::mem::take(&mut bytes[*result]);
                for ((out, a), b) in out[..n].iter_mut().zip(&bytes[*a]).zip(&bytes[*b]) {
                    *out = round(((value(*a) - zeros.0) * (value(*b) - zeros.1)) as f32 * scale, *to);
                }
                bytes[*result] = out;
            }
            Step::MaxPool { source, result, window } => {
                let mut out = std::mem::take(&mut bytes[*result]);
                pool(window, |to, channels, from| {
                    let out = &mut out[to * channels..][..channels];
                    for (n, at) in from.enumerate() {
                        let x = &bytes[*source][at * channels..][..channels];
                        if n == 0 {
                            out.copy_from_slice(x);
                        } else {
                            out.iter_mut()
                                .zip(x)
                                .for_each(|(out, x)| *out = if value(*x) > value(*out) { *x } else { *out });
                        }
                    }
                });
                bytes[*result] = out;
            }
            Step::MeanPool { source, result, window, zero, scale, all, to } => {
                let mut out = std::mem::take(&mut bytes[*result]);
                let taps = window.kernel[0] * window.kernel[1];
                let mut sums = vec![0_i32; window.source[2]];
                pool(window, |at, channels, from| {
                    sums.fill(0);
                    let mut n = 0;
                    for at in from {
                        let x = &bytes[*source][at * channels..][..channels];
                        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += value(*x) - zero);
                        n += 1;
                    }
                    let n = if *all { taps } else { n.max(1) };
                    let scale = scale / n as f32;
                    let out = &mut out[at * channels..][..channels];
                    out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = round(*sum as f32 * scale, *to));
                });
                bytes[*result] = out;
            }
            Step::Place { source, result, length, stride, offset } => {
                let n = self.bytes[*source];
                let mut out = std::mem::take(&mut bytes[*result]);
                for (row, x) in bytes[*source][..n].chunks_exact(*length).enumerate() {
                    out[row * stride + offset..][..*length].copy_from_slice(x);
                }
                bytes[*result] = out;
            }
            Step::Softmax { source, result, length } => {
                let mut out = std::mem::take(&mut floats[*result]);
                for (x, out) in floats[*source].chunks_exact(*length).zip(out.chunks_exact_mut(*length)) {
                    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    out.iter_mut().zip(x).for_each(|(out, x)| *out = (x - most).exp());
                    let sum: f32 = out.iter().sum();
                    out.iter_mut().for_each(|out| *out /= sum);
                }
                floats[*result] = out;
            }
        }
    }

    fn layer(&self, layer: &Layer, memory: &mut Memory) {
        let Memory { bytes, floats, padded, sums, .. } = memory;
        let window = &layer.window;
        let mut result = Target::take(&layer.finish, layer.result, bytes, floats);
        let (source, columns) = padded_source(window, layer.zero, &bytes[layer.source], padded);
        let [_, _, depth] = window.source;
        let rows = window.result[0] * window.result[1];
        let inputs = depth / layer.groups;
        let blocks = layer.channels.div_ceil(LANES);
        let width = layer.channels * layer.groups;
        let segments: Vec<usize> = layer.segments.iter().map(|tap| window.offset(*tap, columns)).collect();
        let size = segments.len() * layer.quads;
        sums.resize(ROWS * BLOCKS * 2, Sums([0; LANES]));
        let (sums, more) = sums.split_at_mut(ROWS * BLOCKS);
        for group in 0..layer.groups {
            for row in (0..rows).step_by(ROWS) {
                let n = ROWS.min(rows - row);
                let x = std::array::from_fn(|i| {
                    let row = row + i.min(n - 1);
                    let pixel = [row / window.result[1] * window.stride[0], row % window.result[1] * window.stride[1]];
                    source[(pixel[0] * columns + pixel[1]) * depth + group * inputs..].as_ptr()
                });
                for block in (0..blocks).step_by(BLOCKS) {
                    let wide = BLOCKS.min(blocks - block);
                    let at = group * blocks + block;
                    // SAFETY: every row with its segments is in the source and its slack; the weights have as many
                    // blocks as the segments quads; sums have room for the most rows and blocks.
                    unsafe {
                        let weights = layer.weights.as_ptr().add(at * size);
                        (self.kernels.dot)(&x, n, &segments, layer.quads, weights, wide, sums.as_mut_ptr());
                        if !layer.rest.is_empty() {
                            let rest = layer.rest.as_ptr().add(at * size);
                            (self.kernels.dot)(&x, n, &segments, layer.quads, rest, wide, more.as_mut_ptr());
                            for (sum, more) in sums.iter_mut().zip(&*more) {
                                sum.0.iter_mut().zip(more.0).for_each(|(sum, more)| *sum = sum.wrapping_add(more));
                            }
                        }
                    }
                    for b in 0..wide {
                        let first = (block + b) * LANES;
                        let lanes = LANES.min(layer.channels - first);
                        let channel = group * layer.channels + first;
                        let (bias, scale) = (&layer.bias[at + b], &layer.scale[at + b]);
                        let to = row * width + channel;
                        result.finish(
                            self.kernels,
                            &layer.finish,
                            channel,
                            &sums[b * n..][..n],
                            bias,
                            scale,
                            to,
                            lanes,
                            width,
                        );
                    }
                }
            }
        }
        result.give_back(layer.result, bytes, floats);
    }

    fn depthwise(&self, layer: &Depthwise, memory: &mut Memory) {
        let Memory { bytes, floats, padded, sums, .. } = memory;
        let window = &layer.window;
        let mut result = Target::take(&layer.finish, layer.result, bytes, floats);
        let (source, columns) = padded_source(window, layer.zero, &bytes[layer.source], padded);
        let [_, _, channels] = window.source;
        let [tall, wide] = window.result;
        let taps: Vec<usize> = layer.taps.iter().map(|tap| window.offset(*tap, columns)).collect();
        let quads = taps.len() / 4;
        // Few channels: a block takes some successive pixels at once.
        let channels = channels * layer.pixels;
        let (wide, step) = (wide / layer.pixels, window.stride[1] * channels);
        sums.resize(wide.max(ROWS * BLOCKS * 2), Sums([0; LANES]));
        for row in 0..tall {
            for block in 0..channels.div_ceil(LANES) {
                let first = block * LANES;
                let lanes = LANES.min(channels - first);
                let x = &source[row * window.stride[0] * columns * window.source[2] + first..];
                // SAFETY: the last tap of the last pixel ends within the source and its slack.
                unsafe {
                    let weights = layer.weights.as_ptr().add(block * quads);
                    (self.kernels.depthwise)(x.as_ptr(), step, wide, &taps, weights, sums.as_mut_ptr());
                }
                let (bias, scale) = (&layer.bias[block], &layer.scale[block]);
                let to = row * wide * channels + first;
                result.finish(self.kernels, &layer.finish, first, &sums[..wide], bias, scale, to, lanes, channels);
            }
        }
        result.give_back(layer.result, bytes, floats);
    }
}

/// Where a layer's results go, taken out of the memory while it runs.
enum Target {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
}

impl Target {
    fn take(finish: &Finish, slot: Slot, bytes: &mut [Vec<u8>], floats: &mut [Vec<f32>]) -> Self {
        match finish {
            Finish::Bytes(_) => Target::Bytes(std::mem::take(&mut bytes[slot])),
            Finish::Floats { .. } => Target::Floats(std::mem::take(&mut floats[slot])),
        }
    }

    fn give_back(self, slot: Slot, bytes: &mut [Vec<u8>], floats: &mut [Vec<f32>]) {
        match self {
            Target::Bytes(taken) => bytes[slot] = taken,
            Target::Floats(taken) => floats[slot] = taken,
        }
    }

    /// Rounds the sums of one block and puts them at `to`, rows `width` apart; `channel` is the block's first.
    #[allow(clippy::too_many_arguments, reason = "one loop's worth of state")]
    fn finish(
        &mut self,
        kernels: &Kernels,
        finish: &Finish,
        channel: usize,
        sums: &[Sums],
        bias: &Sums,
        scale: &[f32; LANES],
        to: usize,
        lanes: usize,
        width: usize,
    ) {
        match (self, finish) {
            (Target::Bytes(out), Finish::Bytes(requant)) => {
                let out = &mut out[to..];
                assert!((sums.len() - 1) * width + lanes <= out.len());
                // SAFETY: asserted; the table is one that the processor has.
                unsafe { (kernels.requant)(sums, bias, scale, *requant, out.as_mut_ptr(), width, lanes) };
            }
            (Target::Floats(out), Finish::Floats { shift, low, high }) => {
                for (row, sums) in sums.iter().enumerate() {
                    for lane in 0..lanes {
                        let sum = sums.0[lane].wrapping_add(bias.0[lane]) as f32 * scale[lane];
                        out[to + row * width + lane] = (sum + shift[channel + lane]).max(*low).min(*high);
                    }
                }
            }
            _ => unreachable!("taken by the same finish"),
        }
    }
}

/// The source with its padding, so that no tap has to ask where it is, and the width of its rows.
fn padded_source<'a>(window: &Window, zero: u8, source: &'a [u8], padded: &'a mut Vec<u8>) -> (&'a [u8], usize) {
    let [height, width, channels] = window.source;
    let span = |axis: usize| {
        (window.result[axis] - 1) * window.stride[axis] + (window.kernel[axis] - 1) * window.dilation[axis] + 1
    };
    let (rows, columns) = (span(0).max(height + window.before[0]), span(1).max(width + window.before[1]));
    if rows == height && columns == width {
        return (source, columns);
    }
    padded.clear();
    padded.resize(rows * columns * channels + SLACK, zero);
    for row in 0..height {
        let to = ((row + window.before[0]) * columns + window.before[1]) * channels;
        padded[to..to + width * channels].copy_from_slice(&source[row * width * channels..][..width * channels]);
    }
    (padded, columns)
}

/// Calls `each` with a result's pixel, the channels, and the source's pixels under it.
fn pool(window: &Window, mut each: impl FnMut(usize, usize, &mut dyn Iterator<Item = usize>)) {
    for tall in 0..window.result[0] {
        for wide in 0..window.result[1] {
            let taps = (0..window.kernel[0]).flat_map(|y| (0..window.kernel[1]).map(move |x| [y, x]));
            let mut from = taps.filter_map(|tap| window.at([tall, wide], tap)).map(|[y, x]| y * window.source[1] + x);
            each(tall * window.result[1] + wide, window.source[2], &mut from);
        }
    }
}

/// The value of a stored byte.
pub fn value(byte: u8) -> i32 {
    if super::kernel::SIGNED { i32::from(byte as i8) } else { i32::from(byte) }
}

/// As the kernels do.
pub fn round(x: f32, to: Requant) -> u8 {
    let x = if x > to.low { x } else { to.low };
    let x = if x < to.high { x } else { to.high };
    (x.round_ties_even() as i32 + to.zero) as u8
}

fn gather<T: Copy>(source: &[T], result: &mut [T], dims: &[usize], strides: &[usize]) {
    let Some((last, outer)) = dims.split_last() else {
        result[0] = source[0];
        return;
    };
    let stride = strides[outer.len()];
    if let Some((runs, before)) = outer.split_last()
        && before.iter().all(|dim| *dim == 1)
        && strides[before.len()] == 1
        && *last < 16
    {
        // Planes to pixels: each plane is read in one go.
        for i in 0..*last {
            let plane = &source[i * stride..][..*runs];
            result[i..].iter_mut().step_by(*last).zip(plane).for_each(|(out, x)| *out = *x);
        }
        return;
    }
    let mut index = vec![0; outer.len()];
    let (mut from, mut to) = (0, 0);
    loop {
        for (i, out) in result[to..to + last].iter_mut().enumerate() {
            *out = source[from + i * stride];
        }
        to += last;
        let mut axis = outer.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            from += strides[axis];
            if index[axis] < outer[axis] {
                break;
            }
            from -= strides[axis] * outer[axis];
            index[axis] = 0;
        }
    }
}
