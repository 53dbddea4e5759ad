//! A compiled piece of a graph: steps over buffers of bytes and floats, with every size known.
#![allow(unsafe_code, reason = "kernels are called by pointer; sizes are fixed when a program is built")]

use std::sync::{Arc, Mutex, PoisonError};

use super::kernel::{Block, Columns, Kernels, LANES, Product, Requant, SLACK, Scales, Sums, Target};
use super::plain::range;

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

    /// Height and width of the source with its padding, so that no tap has to ask where it is.
    pub fn frame(&self) -> [usize; 2] {
        std::array::from_fn(|axis| {
            let reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1;
            ((self.result[axis] - 1) * self.stride[axis] + reach).max(self.source[axis] + self.before[axis])
        })
    }

    /// Bytes from a window's first tap to another, in the frame.
    pub fn tap(&self, [tall, wide]: [usize; 2]) -> usize {
        (tall * self.dilation[0] * self.frame()[1] + wide * self.dilation[1]) * self.source[2]
    }

    /// Where the window of each pixel of the result starts, in the frame.
    pub fn starts(&self) -> impl Iterator<Item = usize> {
        let [_, columns] = self.frame();
        let (stride, channels, wide) = (self.stride, self.source[2], self.result[1]);
        (0..self.result[0] * wide).map(move |at| ((at / wide * stride[0]) * columns + at % wide * stride[1]) * channels)
    }

    /// Bytes of the frame.
    fn size(&self) -> usize {
        let [rows, columns] = self.frame();
        rows * columns * self.source[2]
    }
}

/// A convolution or a product with a constant matrix: every row of the source by every channel.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Where from, channels last.
    pub source: Slot,
    /// Where to, channels last.
    pub result: Slot,
    /// The source and its padding.
    pub window: Window,
    /// Independent parts of the channels.
    pub groups: usize,
    /// Channels of the result in a group.
    pub channels: usize,
    /// Where each row starts in the frame, and in the result.
    pub rows: Vec<u32>,
    #[expect(missing_docs, reason = "said above")]
    pub to: Vec<u32>,
    /// See [`Product::segments`].
    pub segments: Vec<u32>,
    /// See [`Product::quads`].
    pub quads: usize,
    /// For each group and block of channels, one [`Block`] for each quad of each segment.
    pub weights: Arc<[Block]>,
    /// Whether no weight is -128.
    pub small: bool,
    /// For each group and block.
    pub bias: Vec<Sums>,
    /// For each group and block.
    pub scale: Vec<Scales>,
    /// The source's zero point, as stored: it fills the padding.
    pub zero: u8,
    /// Bytes or floats.
    pub finish: Finish,
}

impl Layer {
    /// What the kernels rely on.
    fn check(&self) {
        let blocks = self.channels.div_ceil(LANES);
        let inputs = self.window.source[2] / self.groups;
        let last = |offsets: &[u32]| offsets.iter().max().map_or(0, |last| *last as usize);
        let end = last(&self.rows) + last(&self.segments) + self.quads * 4 + (self.groups - 1) * inputs;
        assert!(end <= self.window.size() + SLACK);
        assert!(self.weights.len() == self.groups * blocks * self.segments.len() * self.quads);
        assert!(self.bias.len() == self.groups * blocks && self.scale.len() == self.bias.len());
        assert!(self.to.len() == self.rows.len());
    }
}

/// A convolution of each channel by itself.
#[derive(Debug, Clone)]
pub struct Depthwise {
    #[expect(missing_docs, reason = "as in Layer")]
    pub source: Slot,
    #[expect(missing_docs, reason = "as in Layer")]
    pub result: Slot,
    #[expect(missing_docs, reason = "as in Layer")]
    pub window: Window,
    /// Successive pixels that one block takes: over 1 where channels are few.
    pub pixels: usize,
    /// Where each block's pixels go.
    pub to: Vec<u32>,
    /// See [`Columns::taps`].
    pub taps: Vec<[u32; 4]>,
    /// See [`Columns::shift`].
    pub shift: usize,
    /// For each block of channels, one for each four taps.
    pub weights: Arc<[Block]>,
    /// Whether no weight is -128.
    pub small: bool,
    #[expect(missing_docs, reason = "as in Layer")]
    pub bias: Vec<Sums>,
    #[expect(missing_docs, reason = "as in Layer")]
    pub scale: Vec<Scales>,
    #[expect(missing_docs, reason = "as in Layer")]
    pub zero: u8,
    #[expect(missing_docs, reason = "as in Layer")]
    pub finish: Finish,
}

impl Depthwise {
    /// What the kernels rely on.
    fn check(&self) {
        let last = self.taps.iter().flatten().max().map_or(0, |last| *last as usize);
        let blocks = (self.window.source[2] * self.pixels).div_ceil(LANES);
        let start = self.window.starts().last().unwrap_or(0);
        assert!(start + last + blocks * LANES <= self.window.size() + SLACK);
        assert!(self.weights.len() == blocks * self.taps.len());
        assert!(self.bias.len() == blocks && self.scale.len() == blocks);
        assert!(self.to.len() * self.pixels == self.window.result.iter().product::<usize>());
    }
}

/// A product of two matrices of which neither is constant, for each pair of a batch.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Rows beside each other.
    pub a: Slot,
    /// By `strides`.
    pub b: Slot,
    /// Rows beside each other, product after product.
    pub result: Slot,
    /// Where both matrices of each product start.
    pub starts: Vec<[usize; 2]>,
    /// Rows of `a`.
    pub rows: usize,
    /// Columns of `a`, rows of `b`.
    pub depth: usize,
    /// Columns of `b`.
    pub columns: usize,
    /// From one row of `b` to the next, and from one column to the next.
    pub strides: [usize; 2],
    /// Zero points, as stored.
    pub zeros: [i32; 2],
    /// Where scale and zero point of either are at run time, if they are not known.
    pub dynamic: [Option<Slot>; 2],
    /// Of the sums.
    pub scale: f32,
    /// Bytes or floats.
    pub finish: Finish,
}

/// One pass over the data.
#[derive(Debug, Clone)]
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
    /// Means of what the bytes stand for, from one scale to another; `all`: padding counts.
    MeanPool {
        source: Slot,
        result: Slot,
        window: Window,
        zero: i32,
        scales: [f32; 2],
        all: bool,
        /// Sums are of floats, which decides what a half is rounded to.
        floats: bool,
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
    /// Bytes by their places; `u32::MAX`: `fill`.
    Pick {
        source: Slot,
        result: Slot,
        index: Vec<u32>,
        fill: u8,
    },
    /// Floats to bytes by their own range; `numbers` are the scale and the zero point as stored.
    Range {
        source: Slot,
        result: Slot,
        numbers: Slot,
    },
    /// A layer whose source has the scale and the zero point in `numbers`; its bias are the sums of its weights.
    Scaled {
        numbers: Slot,
        layer: Box<Step>,
    },
    Matrix(Box<Matrix>),
    /// `steps` for each image of a batch: from `part`, of `n` bytes, to `made`, of `m` bytes or floats.
    Images {
        images: usize,
        source: Slot,
        part: Slot,
        n: usize,
        steps: Vec<Step>,
        made: Slot,
        result: Slot,
        m: usize,
        floats: bool,
    },
    /// Softmax over runs of `length` floats.
    Softmax {
        source: Slot,
        result: Slot,
        length: usize,
    },
}

impl Step {
    /// What the kernels rely on.
    fn check(&self) {
        match self {
            Step::Layer(layer) => layer.check(),
            Step::Depthwise(layer) => layer.check(),
            Step::Scaled { layer, .. } => layer.check(),
            Step::Images { steps, .. } => steps.iter().for_each(Step::check),
            _ => {}
        }
    }
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
        steps.iter().for_each(Step::check);
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
            Step::MeanPool { source, result, window, zero, scales: [from, by], all, floats, to } => {
                let mut out = std::mem::take(&mut bytes[*result]);
                let taps = window.kernel[0] * window.kernel[1];
                let count = |n: usize| if *all { taps } else { n.max(1) } as f32;
                let (mut sums, mut sizes) = (vec![0_i32; window.source[2]], vec![0.0_f32; window.source[2]]);
                pool(window, |at, channels, taps| {
                    let mut n = 0;
                    sums.fill(0);
                    sizes.fill(0.0);
                    for at in taps {
                        let x = &bytes[*source][at * channels..][..channels];
                        if *floats {
                            sizes.iter_mut().zip(x).for_each(|(sum, x)| *sum += (value(*x) - zero) as f32 * from);
                        } else {
                            sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += value(*x) - zero);
                        }
                        n += 1;
                    }
                    let out = &mut out[at * channels..][..channels];
                    if *floats {
                        // Halves become even with the zero point added, so it is added first: as an unsigned byte's,
                        // however bytes are stored, because its size decides what the sum can hold.
                        let shift = if super::kernel::SIGNED { 128 } else { 0 };
                        let zero = (to.zero + shift) as f32;
                        let ends = Requant { zero: -shift, low: to.low + zero, high: to.high + zero };
                        out.iter_mut().zip(&sizes).for_each(|(out, x)| *out = round(x / count(n) / by + zero, ends));
                    } else {
                        let scale = from / (by * count(n));
                        out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = round(*sum as f32 * scale, *to));
                    }
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
            Step::Pick { source, result, index, fill } => {
                let mut out = std::mem::take(&mut bytes[*result]);
                let source = &bytes[*source];
                out.iter_mut().zip(index).for_each(|(out, at)| *out = *source.get(*at as usize).unwrap_or(fill));
                bytes[*result] = out;
            }
            Step::Range { source, result, numbers } => {
                let n = self.bytes[*result];
                let (scale, zero) = range(&floats[*source][..n]);
                let least = if super::kernel::SIGNED { -128 } else { 0 };
                let to = Requant { zero: zero as i32 + least, low: -zero, high: 255.0 - zero };
                // SAFETY: as for Quantize.
                unsafe { (self.kernels.quantize)(&floats[*source][..n], scale, to, &mut bytes[*result][..n]) };
                floats[*numbers].copy_from_slice(&[scale, to.zero as f32]);
            }
            Step::Scaled { numbers, layer } => {
                let (by, zero) = (floats[*numbers][0], floats[*numbers][1] as i32);
                let scaled = |bias: &mut [Sums], scale: &mut [Scales]| {
                    bias.iter_mut().flat_map(|of| &mut of.0).for_each(|sum| *sum = sum.wrapping_mul(-zero));
                    scale.iter_mut().flat_map(|of| &mut of.0).for_each(|scale| *scale *= by);
                };
                match &**layer {
                    Step::Layer(layer) => {
                        let mut layer = Layer { zero: zero as u8, ..(**layer).clone() };
                        scaled(&mut layer.bias, &mut layer.scale);
                        self.layer(&layer, memory);
                    }
                    Step::Depthwise(layer) => {
                        let mut layer = Depthwise { zero: zero as u8, ..(**layer).clone() };
                        scaled(&mut layer.bias, &mut layer.scale);
                        self.depthwise(&layer, memory);
                    }
                    other => self.step(other, memory),
                }
            }
            Step::Matrix(matrix) => self.matrix(matrix, memory),
            Step::Images { images, source, part, n, steps, made, result, m, floats } => {
                for image in 0..*images {
                    let mut own = std::mem::take(&mut memory.bytes[*part]);
                    own[..*n].copy_from_slice(&memory.bytes[*source][image * n..][..*n]);
                    memory.bytes[*part] = own;
                    steps.iter().for_each(|step| self.step(step, memory));
                    if *floats {
                        let mut out = std::mem::take(&mut memory.floats[*result]);
                        out[image * m..][..*m].copy_from_slice(&memory.floats[*made][..*m]);
                        memory.floats[*result] = out;
                    } else {
                        let mut out = std::mem::take(&mut memory.bytes[*result]);
                        out[image * m..][..*m].copy_from_slice(&memory.bytes[*made][..*m]);
                        memory.bytes[*result] = out;
                    }
                }
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
        let Memory { bytes, floats, padded, sums } = memory;
        let mut out = Output::take(&layer.finish, layer.result, bytes, floats);
        let source = framed(&layer.window, layer.zero, &bytes[layer.source], padded);
        let inputs = layer.window.source[2] / layer.groups;
        let blocks = layer.channels.div_ceil(LANES);
        let size = layer.segments.len() * layer.quads;
        for group in 0..layer.groups {
            let of_group = group * blocks..(group + 1) * blocks;
            let product = Product {
                x: source[group * inputs..].as_ptr(),
                rows: &layer.rows,
                segments: &layer.segments,
                quads: layer.quads,
                weights: &layer.weights[of_group.start * size..of_group.end * size],
                small: layer.small,
                bias: &layer.bias[of_group.clone()],
            };
            let channels = group * layer.channels..(group + 1) * layer.channels;
            let run = |target: &Target| {
                // SAFETY: checked when the program was built.
                unsafe { (self.kernels.product)(&product, target) };
            };
            out.finish(&layer.finish, run, sums, &layer.scale[of_group], &layer.to, 0, channels);
        }
        out.give_back(layer.result, bytes, floats);
    }

    /// The second matrix takes the place of weights, with its zero point taken off.
    fn matrix(&self, matrix: &Matrix, memory: &mut Memory) {
        let Memory { bytes, floats, sums, .. } = memory;
        let Matrix { rows, depth, columns, strides, .. } = *matrix;
        let numbers = |at: usize| {
            matrix.dynamic[at].map_or((1.0, matrix.zeros[at]), |slot| (floats[slot][0], floats[slot][1] as i32))
        };
        let ((left, a_zero), (right, b_zero)) = (numbers(0), numbers(1));
        let mut out = Output::take(&matrix.finish, matrix.result, bytes, floats);
        let (blocks, quads) = (columns.div_ceil(LANES), depth.div_ceil(4));
        // A difference of two bytes may be over a byte: some weights for each, on the same inputs.
        let least = if super::kernel::SIGNED { -128 } else { 0 } - b_zero;
        let parts = match (least, least + 255) {
            (-128, 127) => 1,
            (_, ..=254) => 2,
            _ => 3,
        };
        let segments = vec![0; parts];
        let mut weights = vec![Block([0; 64]); blocks * parts * quads];
        let scale = vec![Scales([matrix.scale * (left * right); LANES]); blocks];
        let starts: Vec<u32> = (0..rows).map(|row| (row * depth) as u32).collect();
        let to: Vec<u32> = (0..rows).map(|row| (row * columns) as u32).collect();
        for (product, start) in matrix.starts.iter().enumerate() {
            let mut bias = vec![Sums([0; LANES]); blocks];
            let b = &bytes[matrix.b][start[1]..];
            for column in 0..columns {
                let (block, lane) = (column / LANES, column % LANES);
                let mut total = 0;
                for k in 0..depth {
                    let w = value(b[k * strides[0] + column * strides[1]]) - b_zero;
                    total += w;
                    let mut left = w;
                    for part in 0..parts {
                        let own = left.clamp(-128, 127);
                        weights[(block * parts + part) * quads + k / 4].0[lane * 4 + k % 4] = own as i8;
                        left -= own;
                    }
                }
                bias[block].0[lane] = -total * a_zero;
            }
            let x = &bytes[matrix.a][start[0]..];
            assert!(rows * depth + quads * 4 - depth <= x.len());
            let of = Product {
                x: x.as_ptr(),
                rows: &starts,
                segments: &segments,
                quads,
                weights: &weights,
                small: false,
                bias: &bias,
            };
            let run = |target: &Target| {
                // SAFETY: asserted; there are as many blocks of weights as the segments take.
                unsafe { (self.kernels.product)(&of, target) };
            };
            out.finish(&matrix.finish, run, sums, &scale, &to, product * rows * columns, 0..columns);
        }
        out.give_back(matrix.result, bytes, floats);
    }

    fn depthwise(&self, layer: &Depthwise, memory: &mut Memory) {
        let Memory { bytes, floats, padded, sums } = memory;
        let window = &layer.window;
        let mut out = Output::take(&layer.finish, layer.result, bytes, floats);
        let source = framed(window, layer.zero, &bytes[layer.source], padded);
        // Few channels: a block takes some successive pixels at once.
        let width = window.source[2] * layer.pixels;
        let quads = layer.taps.len();
        for block in 0..layer.bias.len() {
            let first = block * LANES;
            let columns = Columns {
                x: source[first..].as_ptr(),
                step: window.stride[1] * width,
                pixels: window.result[1] / layer.pixels,
                line: window.frame()[1] * window.source[2] * window.stride[0],
                lines: window.result[0],
                taps: &layer.taps,
                shift: layer.shift,
                weights: &layer.weights[block * quads..][..quads],
                small: layer.small,
                bias: &layer.bias[block],
            };
            let run = |target: &Target| {
                // SAFETY: checked when the program was built.
                unsafe { (self.kernels.columns)(&columns, target) };
            };
            let scale = std::slice::from_ref(&layer.scale[block]);
            out.finish(&layer.finish, run, sums, scale, &layer.to, 0, first..width.min(first + LANES));
        }
        out.give_back(layer.result, bytes, floats);
    }
}

/// Where a layer's results go, taken out of the memory while it runs.
enum Output {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
}

impl Output {
    fn take(finish: &Finish, slot: Slot, bytes: &mut [Vec<u8>], floats: &mut [Vec<f32>]) -> Self {
        match finish {
            Finish::Bytes(_) => Output::Bytes(std::mem::take(&mut bytes[slot])),
            Finish::Floats { .. } => Output::Floats(std::mem::take(&mut floats[slot])),
        }
    }

    fn give_back(self, slot: Slot, bytes: &mut [Vec<u8>], floats: &mut [Vec<f32>]) {
        match self {
            Output::Bytes(taken) => bytes[slot] = taken,
            Output::Floats(taken) => floats[slot] = taken,
        }
    }

    /// Runs a kernel for some of the result's `channels`: each of `rows` starts there, counted from `at`.
    #[allow(clippy::too_many_arguments, reason = "one call's worth of state")]
    fn finish(
        &mut self,
        finish: &Finish,
        run: impl Fn(&Target),
        sums: &mut Vec<Sums>,
        scale: &[Scales],
        rows: &[u32],
        at: usize,
        channels: std::ops::Range<usize>,
    ) {
        let first = at + channels.start;
        let end = rows.last().map_or(0, |last| first + *last as usize + channels.len());
        match (self, finish) {
            (Output::Bytes(out), Finish::Bytes(to)) => {
                assert!(end <= out.len());
                let out = out[first..].as_mut_ptr();
                run(&Target::Bytes { scale, to: *to, out, rows, channels: channels.len() });
            }
            (Output::Floats(out), Finish::Floats { shift, low, high }) => {
                sums.resize(sums.len().max(rows.len() * scale.len()), Sums([0; LANES]));
                run(&Target::Sums(sums.as_mut_ptr()));
                for (row, sums) in rows.iter().zip(sums.chunks_exact(scale.len())) {
                    let out = &mut out[first + *row as usize..][..channels.len()];
                    let shift = shift[channels.clone()].chunks(LANES);
                    for (((out, shift), sums), scale) in out.chunks_mut(LANES).zip(shift).zip(sums).zip(scale) {
                        for (lane, (out, shift)) in out.iter_mut().zip(shift).enumerate() {
                            *out = (sums.0[lane] as f32 * scale.0[lane] + shift).max(*low).min(*high);
                        }
                    }
                }
            }
            _ => unreachable!("taken by the same finish"),
        }
    }
}

/// The source with its padding.
fn framed<'a>(window: &Window, zero: u8, source: &'a [u8], padded: &'a mut Vec<u8>) -> &'a [u8] {
    let [height, width, channels] = window.source;
    let [rows, columns] = window.frame();
    if [rows, columns] == [height, width] {
        return source;
    }
    let (line, inner) = (columns * channels, width * channels);
    padded.resize(padded.len().max(rows * line + SLACK), 0);
    let left = window.before[1] * channels;
    for (row, out) in padded[..rows * line].chunks_exact_mut(line).enumerate() {
        match row.checked_sub(window.before[0]).filter(|row| *row < height) {
            Some(row) => {
                out[..left].fill(zero);
                out[left..left + inner].copy_from_slice(&source[row * inner..][..inner]);
                out[left + inner..].fill(zero);
            }
            None => out.fill(zero),
        }
    }
    padded
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
    // Axes that lie one in the other are one axis.
    let mut axes: Vec<(usize, usize)> = Vec::with_capacity(dims.len());
    for (dim, stride) in dims.iter().copied().zip(strides.iter().copied()).filter(|(dim, _)| *dim != 1) {
        match axes.last_mut() {
            Some((before, over)) if *over == dim * stride => (*before, *over) = (*before * dim, stride),
            _ => axes.push((dim, stride)),
        }
    }
    let (dims, strides): (Vec<usize>, Vec<usize>) = axes.into_iter().unzip();
    let Some((last, outer)) = dims.split_last() else {
        result[0] = source[0];
        return;
    };
    let stride = strides[outer.len()];
    if let ([runs], [1, _]) = (outer, &strides[..])
        && *last < 16
    {
        // Planes to pixels: each plane is read in one go.
        if *last == 3 {
            let [red, green, blue] = [0, 1, 2].map(|i| &source[i * stride..][..*runs]);
            let pixels = result.as_chunks_mut::<3>().0.iter_mut();
            pixels.zip(red).zip(green).zip(blue).for_each(|(((out, red), green), blue)| *out = [*red, *green, *blue]);
            return;
        }
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
