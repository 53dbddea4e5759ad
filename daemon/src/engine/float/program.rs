//! A compiled piece of a graph: steps over buffers, with every size known.
#![allow(unsafe_code, reason = "kernels are called by pointer; sizes are fixed when a program is built")]

use std::sync::{Mutex, PoisonError};

use super::kernel::{Kernels, LANES, Lanes, ROWS, Tile, WIDE};

/// A buffer, by its number.
pub type Slot = usize;

/// How a buffer lies: pixels, channels last, in a margin of zeros that stands for the padding of what reads it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grid {
    /// Height and width.
    pub size: [usize; 2],
    /// Channels.
    pub depth: usize,
    /// Margin before and after, each by height and width.
    pub before: [usize; 2],
    #[expect(missing_docs, reason = "said above")]
    pub after: [usize; 2],
}

impl Grid {
    /// Pixels of a line, margin included.
    fn columns(&self) -> usize {
        self.before[1] + self.size[1] + self.after[1]
    }

    fn lines(&self) -> usize {
        self.before[0] + self.size[0] + self.after[0]
    }

    /// Offset of a pixel.
    fn at(&self, y: usize, x: usize) -> usize {
        ((y + self.before[0]) * self.columns() + x + self.before[1]) * self.depth
    }

    /// Offset of each line's first pixel.
    fn each_line(self) -> impl Iterator<Item = usize> {
        (0..self.size[0]).map(move |y| self.at(y, 0))
    }

    /// Floats of a line.
    fn width(&self) -> usize {
        self.size[1] * self.depth
    }

    /// Steps of height, width and channel.
    pub fn strides(&self) -> [usize; 3] {
        [self.columns() * self.depth, self.depth, 1]
    }
}

/// Which pixels make one of the result's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
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
    /// Margin that the source needs behind its `size` for a `result`.
    pub fn after(&self, size: [usize; 2], result: [usize; 2]) -> [usize; 2] {
        std::array::from_fn(|axis| {
            let reach = (result[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1;
            reach.saturating_sub(self.before[axis] + size[axis])
        })
    }
}

/// A convolution or a product with a constant matrix.
#[derive(Debug)]
pub struct Layer {
    /// Where from.
    pub source: Slot,
    /// Where to.
    pub result: Slot,
    /// What is added.
    pub plus: Option<Slot>,
    /// Which pixels.
    pub window: Window,
    /// Independent parts of the channels.
    pub groups: usize,
    /// Channels of the result in a group.
    pub channels: usize,
    /// Runs of floats that make a row, by the kernel's tap that each starts at.
    pub taps: Vec<[usize; 2]>,
    /// Floats of a run; 0 where each channel is by itself.
    pub length: usize,
    /// For each group and block of channels, one for each float of each run.
    pub weights: Vec<Lanes>,
    /// For each group and block.
    pub bias: Vec<Lanes>,
    /// Least and greatest value.
    pub range: (f32, f32),
}

/// One pass over the data.
#[derive(Debug)]
#[expect(missing_docs, reason = "the fields are sources, a result and what the pass's name says")]
pub enum Step {
    /// An input's elements, `strides` apart by height, width and channel.
    Read {
        input: usize,
        result: Slot,
        strides: [usize; 3],
    },
    /// Elements in another order: for each dimension of the result its size, and the source's dimension.
    Gather {
        source: Slot,
        result: Slot,
        dims: Vec<(usize, usize)>,
    },
    /// Elements to an output, by its dimensions as for `Gather`.
    Write {
        source: Slot,
        output: usize,
        dims: Vec<(usize, usize)>,
    },
    Layer(Box<Layer>),
    Add {
        a: Slot,
        b: Slot,
        result: Slot,
        range: (f32, f32),
    },
    Clamp {
        source: Slot,
        result: Slot,
        range: (f32, f32),
    },
    MaxPool {
        source: Slot,
        result: Slot,
        window: Window,
        range: (f32, f32),
    },
    /// Means times `scale`; `all`: padding counts.
    MeanPool {
        source: Slot,
        result: Slot,
        window: Window,
        all: bool,
        scale: f32,
        range: (f32, f32),
    },
    /// Over the channels.
    Softmax {
        source: Slot,
        result: Slot,
    },
}

/// Steps with their buffers.
#[derive(Debug)]
pub struct Program {
    steps: Vec<Step>,
    /// For each step that is a layer, where its runs start.
    offsets: Vec<Vec<usize>>,
    grids: Vec<Grid>,
    kernels: &'static Kernels,
    /// Shapes of the outputs.
    pub outputs: Vec<Vec<usize>>,
    /// Memory of past runs, one for each thread at most.
    spare: Mutex<Vec<Vec<Vec<f32>>>>,
}

impl Program {
    /// Puts a program together.
    pub fn new(steps: Vec<Step>, grids: Vec<Grid>, outputs: Vec<Vec<usize>>, kernels: &'static Kernels) -> Self {
        let offsets = steps
            .iter()
            .map(|step| match step {
                Step::Layer(layer) => {
                    let [line, pixel, _] = grids[layer.source].strides();
                    let [down, right] = layer.window.dilation;
                    layer.taps.iter().map(|[y, x]| y * down * line + x * right * pixel).collect()
                }
                _ => Vec::new(),
            })
            .collect();
        Program { steps, offsets, grids, kernels, outputs, spare: Mutex::default() }
    }

    /// Instruction set that it runs on.
    pub fn kernels(&self) -> &'static str {
        self.kernels.name
    }

    /// Runs every step.
    pub fn run(&self, inputs: &[&[f32]], outputs: &mut [&mut [f32]]) {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // Margins stay zero: nothing writes to them. Kernels may read a block past the last pixel.
        let size = |grid: &Grid| grid.lines() * grid.columns() * grid.depth + LANES;
        let mut memory = spare.unwrap_or_else(|| self.grids.iter().map(|grid| vec![0.0; size(grid)]).collect());
        for (step, offsets) in self.steps.iter().zip(&self.offsets) {
            self.step(step, offsets, &mut memory, inputs, outputs);
        }
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }

    fn step(
        &self,
        step: &Step,
        offsets: &[usize],
        memory: &mut [Vec<f32>],
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
    ) {
        let grids = &self.grids;
        let to = match step {
            Step::Write { source, output, dims } => {
                gather(&memory[*source], grids[*source], outputs[*output], dims);
                return;
            }
            Step::Layer(layer) => layer.result,
            Step::Read { result, .. }
            | Step::Gather { result, .. }
            | Step::Add { result, .. }
            | Step::Clamp { result, .. }
            | Step::MaxPool { result, .. }
            | Step::MeanPool { result, .. }
            | Step::Softmax { result, .. } => *result,
        };
        let grid = grids[to];
        let width = grid.width();
        let mut out = std::mem::take(&mut memory[to]);
        match step {
            Step::Write { .. } => {}
            Step::Read { input, strides, .. } => {
                let [down, right, deep] = *strides;
                for (y, line) in grid.each_line().enumerate() {
                    let x = &inputs[*input][y * down..];
                    if deep == 1 && right == grid.depth {
                        out[line..][..width].copy_from_slice(&x[..width]);
                        continue;
                    }
                    for (at, out) in out[line..][..width].chunks_exact_mut(grid.depth).enumerate() {
                        out.iter_mut().enumerate().for_each(|(c, out)| *out = x[at * right + c * deep]);
                    }
                }
            }
            Step::Gather { source, dims, .. } => {
                let mut flat = vec![0.0; grid.size[0] * width];
                gather(&memory[*source], grids[*source], &mut flat, dims);
                for (line, flat) in grid.each_line().zip(flat.chunks_exact(width)) {
                    out[line..][..width].copy_from_slice(flat);
                }
            }
            Step::Layer(layer) => self.layer(layer, offsets, memory, &mut out),
            Step::Add { a, b, range, .. } => {
                for ((line, a_line), b_line) in grid.each_line().zip(grids[*a].each_line()).zip(grids[*b].each_line()) {
                    let (a, b) = (&memory[*a][a_line..][..width], &memory[*b][b_line..][..width]);
                    for ((out, a), b) in out[line..][..width].iter_mut().zip(a).zip(b) {
                        *out = (a + b).max(range.0).min(range.1);
                    }
                }
            }
            Step::Clamp { source, range, .. } => {
                for (line, from) in grid.each_line().zip(grids[*source].each_line()) {
                    let x = &memory[*source][from..][..width];
                    out[line..][..width].iter_mut().zip(x).for_each(|(out, x)| *out = x.max(range.0).min(range.1));
                }
            }
            Step::MaxPool { source, window, range, .. } => {
                pool(window, grids[*source], grid, |to, from, _| {
                    let out = &mut out[to..][..grid.depth];
                    out.fill(f32::NEG_INFINITY);
                    for from in from {
                        let x = &memory[*source][*from..][..grid.depth];
                        out.iter_mut().zip(x).for_each(|(out, x)| *out = out.max(*x));
                    }
                    out.iter_mut().for_each(|out| *out = out.max(range.0).min(range.1));
                });
            }
            Step::MeanPool { source, window, all, scale, range, .. } => {
                pool(window, grids[*source], grid, |to, from, taps| {
                    let out = &mut out[to..][..grid.depth];
                    out.fill(0.0);
                    for from in from {
                        let x = &memory[*source][*from..][..grid.depth];
                        out.iter_mut().zip(x).for_each(|(out, x)| *out += x);
                    }
                    let n = if *all { taps } else { from.len().max(1) } as f32;
                    out.iter_mut().for_each(|out| *out = (*out / n * scale).max(range.0).min(range.1));
                });
            }
            Step::Softmax { source, .. } => {
                for (line, from) in grid.each_line().zip(grids[*source].each_line()) {
                    let x = memory[*source][from..][..width].chunks_exact(grid.depth);
                    for (out, x) in out[line..][..width].chunks_exact_mut(grid.depth).zip(x) {
                        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        out.iter_mut().zip(x).for_each(|(out, x)| *out = (x - most).exp());
                        let sum: f32 = out.iter().sum();
                        out.iter_mut().for_each(|out| *out /= sum);
                    }
                }
            }
        }
        memory[to] = out;
    }

    fn layer(&self, layer: &Layer, offsets: &[usize], memory: &[Vec<f32>], out: &mut [f32]) {
        let (from, to) = (self.grids[layer.source], self.grids[layer.result]);
        let source = &memory[layer.source];
        let plus = layer.plus.map(|slot| (&memory[slot], self.grids[slot]));
        let each = layer.length == 0;
        let size = offsets.len() * layer.length.max(1);
        let inputs = from.depth / layer.groups;
        let blocks = layer.channels.div_ceil(LANES);
        let pixels = to.size[0] * to.size[1];
        let [down, right] = layer.window.stride;
        // Where the window of the first pixel starts, in the margin.
        let [top, left] = [0, 1].map(|axis| from.before[axis] - layer.window.before[axis]);
        let mut scratch = [0.0_f32; ROWS * LANES];
        let mut scratch_plus = [0.0_f32; ROWS * LANES];
        for first in (0..pixels).step_by(ROWS) {
            let n = ROWS.min(pixels - first);
            let place: [[usize; 2]; ROWS] = std::array::from_fn(|row| {
                let pixel = first + row.min(n - 1);
                [pixel / to.size[1], pixel % to.size[1]]
            });
            let starts =
                place.map(|[y, x]| ((y * down + top) * from.columns() + x * right + left) * from.depth);
            let ends = place.map(|[y, x]| to.at(y, x));
            for group in 0..layer.groups {
                let mut block = 0;
                while block < blocks {
                    let full = (layer.channels - block * LANES) / LANES;
                    let (run, wide) = match full {
                        _ if each => (self.kernels.each, 1),
                        WIDE.. if pixels == 1 => (self.kernels.single, WIDE),
                        2.. => (self.kernels.two, 2),
                        _ => (self.kernels.one, 1),
                    };
                    let channel = group * layer.channels + block * LANES;
                    let inner = group * inputs + if each { block * LANES } else { 0 };
                    let part = (full == 0).then_some(layer.channels - block * LANES);
                    let mut tile = Tile {
                        x: starts.map(|start| source[start + inner..].as_ptr()),
                        plus: [std::ptr::null(); ROWS],
                        out: ends.map(|end| out[end + channel..].as_mut_ptr()),
                        segments: offsets,
                        length: layer.length,
                        weights: layer.weights[(group * blocks + block) * size..].as_ptr(),
                        bias: layer.bias[group * blocks + block..].as_ptr(),
                        low: layer.range.0,
                        high: layer.range.1,
                    };
                    if let Some((plus, grid)) = &plus {
                        tile.plus = place.map(|[y, x]| plus[grid.at(y, x) + channel..].as_ptr());
                    }
                    if let Some(part) = part {
                        // A block that is not full would write over the next pixel.
                        if let Some((plus, grid)) = &plus {
                            for (row, [y, x]) in place.iter().enumerate() {
                                let from = grid.at(*y, *x) + channel;
                                scratch_plus[row * LANES..][..part].copy_from_slice(&plus[from..][..part]);
                            }
                            tile.plus = std::array::from_fn(|row| scratch_plus[row * LANES..].as_ptr());
                        }
                        tile.out = std::array::from_fn(|row| scratch[row * LANES..].as_mut_ptr());
                    }
                    // SAFETY: a row's runs are in the source, its margin and the floats behind it; the weights have
                    // `size` for each block and the bias one; `wide` blocks are full or in the scratch; the table is
                    // one that the processor has.
                    unsafe { run(&tile) };
                    if let Some(part) = part {
                        for (row, end) in ends.iter().enumerate() {
                            out[end + channel..][..part].copy_from_slice(&scratch[row * LANES..][..part]);
                        }
                    }
                    block += wide;
                }
            }
        }
    }
}

/// Calls `one` with the offset of each pixel of the result, those of the source's pixels under its window that are no
/// padding, and how many there would be with it.
fn pool(window: &Window, from: Grid, to: Grid, mut one: impl FnMut(usize, &[usize], usize)) {
    let mut under = Vec::with_capacity(window.kernel[0] * window.kernel[1]);
    for y in 0..to.size[0] {
        for x in 0..to.size[1] {
            under.clear();
            for down in 0..window.kernel[0] {
                for right in 0..window.kernel[1] {
                    let at = |axis: usize, pixel: usize, tap: usize| {
                        let at = pixel * window.stride[axis] + tap * window.dilation[axis];
                        at.checked_sub(window.before[axis]).filter(|at| *at < from.size[axis])
                    };
                    if let (Some(y), Some(x)) = (at(0, y, down), at(1, x, right)) {
                        under.push(from.at(y, x));
                    }
                }
            }
            one(to.at(y, x), &under, window.kernel[0] * window.kernel[1]);
        }
    }
}

/// Elements of `x` in the order of `dims`, each with the dimension of the source that it goes along.
fn gather(x: &[f32], from: Grid, out: &mut [f32], dims: &[(usize, usize)]) {
    let x = &x[from.at(0, 0)..];
    let Some(((last, along), outer)) = dims.split_last() else {
        out[0] = x[0];
        return;
    };
    let strides = from.strides();
    let step = strides[*along];
    let mut index = vec![0; outer.len()];
    for run in out.chunks_exact_mut(*last) {
        let start: usize = index.iter().zip(outer).map(|(i, (_, along))| i * strides[*along]).sum();
        run.iter_mut().enumerate().for_each(|(at, out)| *out = x[start + at * step]);
        for axis in (0..outer.len()).rev() {
            index[axis] += 1;
            if index[axis] < outer[axis].0 {
                break;
            }
            index[axis] = 0;
        }
    }
}
