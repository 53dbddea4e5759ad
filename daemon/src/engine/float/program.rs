//! A compiled piece of a graph: steps over buffers, with every size known.
#![allow(unsafe_code, reason = "kernels are called by pointer; sizes are fixed when a program is built")]

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::kernel::{Call, Kernels, LANES, Lanes, ROWS};

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

/// A dimension of a result, in its source.
#[derive(Debug, Clone, Copy)]
pub struct Dim {
    /// Its size.
    pub size: usize,
    /// The source's dimension that it goes along.
    pub along: usize,
    /// The first that is taken.
    pub first: usize,
    /// From one that is taken to the next.
    pub step: usize,
}

impl Dim {
    /// A whole dimension.
    pub fn of(size: usize, along: usize) -> Self {
        Dim { size, along, first: 0, step: 1 }
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
    /// Elements in another order, by the result's dimensions.
    Gather {
        source: Slot,
        result: Slot,
        dims: Vec<Dim>,
    },
    /// Elements to an output, by its dimensions.
    Write {
        source: Slot,
        output: usize,
        dims: Vec<Dim>,
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

impl Step {
    /// Where it writes, if to a buffer.
    pub fn result(&self) -> Option<Slot> {
        match self {
            Step::Layer(layer) => Some(layer.result),
            Step::Write { .. } => None,
            Step::Read { result, .. }
            | Step::Gather { result, .. }
            | Step::Add { result, .. }
            | Step::Clamp { result, .. }
            | Step::MaxPool { result, .. }
            | Step::MeanPool { result, .. }
            | Step::Softmax { result, .. } => Some(*result),
        }
    }

    /// Every slot that it reads or writes.
    fn slots(&mut self) -> Vec<&mut Slot> {
        match self {
            Step::Layer(layer) => [&mut layer.source, &mut layer.result].into_iter().chain(&mut layer.plus).collect(),
            Step::Read { result, .. } => vec![result],
            Step::Write { source, .. } => vec![source],
            Step::Add { a, b, result, .. } => vec![a, b, result],
            Step::Gather { source, result, .. }
            | Step::Clamp { source, result, .. }
            | Step::MaxPool { source, result, .. }
            | Step::MeanPool { source, result, .. }
            | Step::Softmax { source, result } => vec![source, result],
        }
    }
}

/// Gives buffers of one form the same memory where the one's last reader comes before the other's writer. Margins stay
/// zero, for they are alike.
fn shared(steps: &mut [Step], grids: &[Grid]) -> Vec<Grid> {
    let mut last = vec![0; grids.len()];
    for (at, step) in steps.iter_mut().enumerate() {
        step.slots().into_iter().for_each(|slot| last[*slot] = at);
    }
    let mut kept: Vec<Grid> = Vec::new();
    let mut place: Vec<Option<Slot>> = vec![None; grids.len()];
    let mut free: Vec<Slot> = Vec::new();
    for (at, step) in steps.iter_mut().enumerate() {
        let result = step.result();
        let mut ended = Vec::new();
        for slot in step.slots() {
            let old = *slot;
            let new = *place[old].get_or_insert_with(|| {
                if let Some(found) = free.iter().position(|slot| kept[*slot] == grids[old]) {
                    return free.swap_remove(found);
                }
                kept.push(grids[old]);
                kept.len() - 1
            });
            *slot = new;
            // What is written is not read by the same step: its memory may not be one that the step reads.
            if last[old] == at && Some(old) != result && !ended.contains(&new) {
                ended.push(new);
            }
        }
        free.extend(ended);
    }
    kept
}

/// Floats that start where a block may: a register's worth of them lies in one line of the cache.
#[derive(Debug, Default)]
struct Buffer(Vec<Lanes>);

impl Buffer {
    fn zero(floats: usize) -> Self {
        Buffer(vec![Lanes([0.0; LANES]); floats.div_ceil(LANES)])
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a block is so many floats and nothing else.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * LANES) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: a block is so many floats and nothing else.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * LANES) }
    }
}

/// Steps with their buffers.
#[derive(Debug)]
pub struct Program {
    steps: Vec<Step>,
    /// For each step that is a layer.
    tables: Vec<Tables>,
    grids: Vec<Grid>,
    kernels: &'static Kernels,
    /// Shapes of the outputs.
    pub outputs: Vec<Vec<usize>>,
    /// Memory of past runs, one for each thread at most.
    spare: Mutex<Vec<Vec<Buffer>>>,
}

impl Program {
    /// Puts a program together.
    pub fn new(mut steps: Vec<Step>, grids: &[Grid], outputs: Vec<Vec<usize>>, kernels: &'static Kernels) -> Self {
        let grids = shared(&mut steps, grids);
        let tables = steps
            .iter()
            .map(|step| match step {
                Step::Layer(layer) => Tables::of(layer, &grids),
                _ => Tables::default(),
            })
            .collect();
        Program { steps, tables, grids, kernels, outputs, spare: Mutex::default() }
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
        let mut memory = spare.unwrap_or_else(|| self.grids.iter().map(|grid| Buffer::zero(size(grid))).collect());
        for (step, tables) in self.steps.iter().zip(&self.tables) {
            self.step(step, tables, &mut memory, inputs, outputs);
        }
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }

    fn step(&self, step: &Step, tables: &Tables, memory: &mut [Buffer], inputs: &[&[f32]], outputs: &mut [&mut [f32]]) {
        let grids = &self.grids;
        let Some(to) = step.result() else {
            if let Step::Write { source, output, dims } = step {
                gather(&memory[*source], grids[*source], outputs[*output], dims);
            }
            return;
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
            Step::Layer(layer) => self.layer(layer, tables, memory, &mut out),
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

    fn layer(&self, layer: &Layer, tables: &Tables, memory: &[Buffer], out: &mut [f32]) {
        let each = layer.length == 0;
        let inputs = self.grids[layer.source].depth / layer.groups;
        let blocks = layer.channels.div_ceil(LANES);
        let size = tables.segments.len() * layer.length.max(1);
        for group in 0..layer.groups {
            let channel = group * layer.channels;
            let call = Call {
                source: memory[layer.source][group * inputs..].as_ptr(),
                plus: layer.plus.map_or(std::ptr::null(), |slot| memory[slot][channel..].as_ptr()),
                out: out[channel..].as_mut_ptr(),
                count: tables.count,
                rows: &tables.rows,
                plus_rows: &tables.plus,
                out_rows: &tables.out,
                segments: &tables.segments,
                length: layer.length,
                weights: layer.weights[group * blocks * size..].as_ptr(),
                bias: layer.bias[group * blocks..].as_ptr(),
                channels: layer.channels,
                low: layer.range.0,
                high: layer.range.1,
            };
            // SAFETY: a row's runs are in the source and its margin, whose buffer has a block more; the weights have
            // `size` for each block and the bias one; the result has all its pixels; the table is one that the
            // processor has.
            unsafe { (if each { self.kernels.each } else { self.kernels.dense })(&call) };
        }
    }
}

/// Where a layer's rows lie.
#[derive(Debug, Default)]
struct Tables {
    count: usize,
    segments: Vec<usize>,
    rows: Vec<usize>,
    plus: Vec<usize>,
    out: Vec<usize>,
}

impl Tables {
    fn of(layer: &Layer, grids: &[Grid]) -> Self {
        let (from, to) = (grids[layer.source], grids[layer.result]);
        let plus = layer.plus.map(|slot| grids[slot]);
        let [line, pixel, _] = from.strides();
        let [down, right] = layer.window.dilation;
        let mut tables = Tables {
            count: to.size[0] * to.size[1],
            segments: layer.taps.iter().map(|[y, x]| y * down * line + x * right * pixel).collect(),
            ..Tables::default()
        };
        // Where the window of the first pixel starts, in the margin.
        let [top, left] = [0, 1].map(|axis| from.before[axis] - layer.window.before[axis]);
        for row in 0..tables.count.next_multiple_of(ROWS) {
            let row = row.min(tables.count - 1);
            let [y, x] = [row / to.size[1], row % to.size[1]];
            let [down, right] = layer.window.stride;
            tables.rows.push((y * down + top) * line + (x * right + left) * pixel);
            tables.out.push(to.at(y, x));
            if let Some(plus) = plus {
                tables.plus.push(plus.at(y, x));
            }
        }
        tables
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

/// Elements of `x` by `dims`.
fn gather(x: &[f32], from: Grid, out: &mut [f32], dims: &[Dim]) {
    let strides = from.strides();
    let first: usize = dims.iter().map(|dim| dim.first * strides[dim.along]).sum();
    let x = &x[from.at(0, 0) + first..];
    let Some((last, outer)) = dims.split_last() else {
        out[0] = x[0];
        return;
    };
    let step = strides[last.along] * last.step;
    let mut index = vec![0; outer.len()];
    for run in out.chunks_exact_mut(last.size) {
        let start: usize = index.iter().zip(outer).map(|(i, dim)| i * strides[dim.along] * dim.step).sum();
        if step == 1 {
            run.copy_from_slice(&x[start..][..last.size]);
        } else {
            run.iter_mut().enumerate().for_each(|(at, out)| *out = x[start + at * step]);
        }
        for axis in (0..outer.len()).rev() {
            index[axis] += 1;
            if index[axis] < outer[axis].size {
                break;
            }
            index[axis] = 0;
        }
    }
}
