//! Attributes of convolutions and pools.

use tract_onnx::pb::NodeProto;

use super::{Lowered, attribute};
use crate::engine::quant::program::Window;

/// Channels last, for a tensor of rank 3 or 4.
pub(super) fn last(rank: usize) -> Vec<usize> {
    std::iter::once(0).chain(2..rank).chain([1]).collect()
}

pub(super) fn attribute_list(node: &NodeProto, name: &str) -> Option<Vec<i64>> {
    node.attribute.iter().find(|a| a.name == name).map(|a| a.ints.clone())
}

pub(super) fn text(node: &NodeProto, name: &str) -> String {
    node.attribute.iter().find(|a| a.name == name).map_or(String::new(), |a| String::from_utf8_lossy(&a.s).into_owned())
}

/// Two numbers of an attribute; for a sequence the first is `or`.
fn two(node: &NodeProto, name: &str, spatial: usize, or: usize) -> Lowered<[usize; 2]> {
    let Some(list) = attribute_list(node, name).filter(|list| !list.is_empty()) else { return Ok([or; 2]) };
    let list: Vec<usize> =
        list.iter().map(|x| usize::try_from(*x).map_err(|_| format!("{name} under 0"))).collect::<Lowered<_>>()?;
    match (&list[..], spatial) {
        ([one], 1) => Ok([or, *one]),
        ([a, b], 2) => Ok([*a, *b]),
        _ => Err(format!("{name} of {} numbers", list.len())),
    }
}

/// Height, width and channels of one image of a batch.
pub(super) fn image(shape: &[usize]) -> Lowered<[usize; 3]> {
    match shape {
        [_, c, w] => Ok([1, *w, *c]),
        [_, c, h, w] => Ok([*h, *w, *c]),
        _ => Err(format!("an input of shape {shape:?}")),
    }
}

/// The windows of a convolution or pool over each image of `shape`, by the node's attributes.
pub(super) fn window(node: &NodeProto, shape: &[usize], kernel: Option<&[usize]>) -> Lowered<Window> {
    let spatial = shape.len().saturating_sub(2);
    let source = image(shape)?;
    let kernel = match kernel {
        Some([k]) if spatial == 1 => [1, *k],
        Some([a, b]) if spatial == 2 => [*a, *b],
        Some(_) => return Err("a kernel of another rank".to_owned()),
        None => two(node, "kernel_shape", spatial, 1)?,
    };
    let (stride, dilation) = (two(node, "strides", spatial, 1)?, two(node, "dilations", spatial, 1)?);
    if stride.contains(&0) || kernel.contains(&0) || source.contains(&0) {
        return Err("a stride or a size of 0".to_owned());
    }
    let up = attribute(node, "ceil_mode", 0) != 0;
    let reach: [usize; 2] = std::array::from_fn(|i| (kernel[i] - 1) * dilation[i] + 1);
    let (mut before, mut after) = ([0; 2], [0; 2]);
    match text(node, "auto_pad").as_str() {
        "" | "NOTSET" => {
            if let Some(pads) = attribute_list(node, "pads").filter(|pads| !pads.is_empty()) {
                let pads: Vec<usize> =
                    pads.iter().map(|x| usize::try_from(*x).map_err(|_| "pads under 0")).collect::<Result<_, _>>()?;
                match (&pads[..], spatial) {
                    ([a, b], 1) => (before, after) = ([0, *a], [0, *b]),
                    ([a, b, c, d], 2) => (before, after) = ([*a, *b], [*c, *d]),
                    _ => return Err("pads of another rank".to_owned()),
                }
            }
        }
        "VALID" => {}
        same @ ("SAME_UPPER" | "SAME_LOWER") => {
            for i in 0..2 {
                let result = source[i].div_ceil(stride[i]);
                let total = ((result - 1) * stride[i] + reach[i]).saturating_sub(source[i]);
                before[i] = if same == "SAME_UPPER" { total / 2 } else { total.div_ceil(2) };
                after[i] = total - before[i];
            }
        }
        other => return Err(format!("auto_pad {other}")),
    }
    let mut result = [0; 2];
    for i in 0..2 {
        let room = source[i] + before[i] + after[i];
        let rest = room.checked_sub(reach[i]).ok_or("a kernel larger than its input")?;
        result[i] = rest / stride[i] + 1;
        // One more for what is left, where it starts before the padding behind does.
        if up && !rest.is_multiple_of(stride[i]) && result[i] * stride[i] < source[i] + before[i] {
            result[i] += 1;
        }
    }
    Ok(Window { source, result, kernel, stride, dilation, before })
}

/// Shape of a result: as many images as `shape` has.
pub(super) fn spatial_shape(shape: &[usize], channels: usize, result: [usize; 2]) -> Vec<usize> {
    let mut of = vec![shape[0], channels];
    of.extend(&result[4 - shape.len()..]);
    of
}

/// One window over everything.
pub(super) fn whole(source: [usize; 3]) -> Window {
    let kernel = [source[0], source[1]];
    Window { source, result: [1, 1], kernel, stride: [1, 1], dilation: [1, 1], before: [0, 0] }
}

/// Rows and columns of a matrix that is multiplied.
pub(super) fn flat(rows: usize, inputs: usize) -> Window {
    Window {
        source: [1, rows, inputs],
        result: [1, rows],
        kernel: [1, 1],
        stride: [1, 1],
        dilation: [1, 1],
        before: [0, 0],
    }
}

/// The index of an axis that may count from the end.
pub(super) fn axis_of(axis: i64, rank: usize) -> Lowered<usize> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|axis| *axis < rank).ok_or_else(|| format!("axis {axis}"))
}
