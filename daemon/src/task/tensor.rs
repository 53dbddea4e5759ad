//! Tensors: elements as they are, in the model's own type and shape.

use crate::job::{Fault, TensorData, TensorInput};

/// Elements in the model's own type, row by row.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Elements {
    F32(Vec<f32>),
    I8(Vec<i8>),
    U8(Vec<u8>),
    I32(Vec<i32>),
    I64(Vec<i64>),
}

/// Bytes of one element of `dtype`, if it is one that jobs can carry.
pub fn width(dtype: &str) -> Option<usize> {
    match dtype {
        "i8" | "u8" => Some(1),
        "f32" | "i32" => Some(4),
        "i64" => Some(8),
        _ => None,
    }
}

/// Type, shape and length against the model's.
///
/// # Errors
/// `input_out_of_range` where the model wants something else, `bad_request` where the parts disagree.
pub fn check(input: &TensorInput, dtype: &str, shape: &[usize]) -> Result<(), Fault> {
    if let Some(found) = input.dtype.as_deref().filter(|found| *found != dtype) {
        let message = format!("elements of type `{found}`; this model takes `{dtype}`");
        return Err(Fault::range("input.tensor.dtype", message, dtype));
    }
    if let Some(found) = input.shape.as_deref().filter(|found| *found != shape) {
        let message = format!("a shape of {found:?}; this model takes {shape:?}");
        return Err(Fault::range("input.tensor.shape", message, shape.to_vec()));
    }
    let wanted: usize = shape.iter().product();
    let (found, wanted, unit) = match &input.data {
        TensorData::Numbers(numbers) => (numbers.len(), wanted, "elements"),
        TensorData::Bytes(bytes) => (bytes.len(), wanted * width(dtype).unwrap_or(1), "bytes"),
    };
    if found != wanted {
        let message = format!("{found} {unit}; {dtype} of shape {shape:?} has {wanted}");
        return Err(Fault::range("input.tensor.data", message, wanted));
    }
    Ok(())
}

/// Reads the elements; [`check`] has passed.
///
/// # Errors
/// `bad_request` for a number that is not finite or that the type cannot hold.
pub fn prepare(input: &TensorInput, dtype: &str, _shape: &[usize]) -> Result<Elements, Fault> {
    let elements = match &input.data {
        TensorData::Bytes(bytes) => match dtype {
            "f32" => Elements::F32(read(bytes, f32::from_le_bytes)),
            "i8" => Elements::I8(read(bytes, i8::from_le_bytes)),
            "u8" => Elements::U8(bytes.clone()),
            "i32" => Elements::I32(read(bytes, i32::from_le_bytes)),
            "i64" => Elements::I64(read(bytes, i64::from_le_bytes)),
            _ => return Err(unsupported(dtype)),
        },
        TensorData::Numbers(numbers) => match dtype {
            "f32" => Elements::F32(numbers.iter().map(|n| *n as f32).collect()),
            "i8" => Elements::I8(whole(numbers, dtype, f64::from(i8::MIN), f64::from(i8::MAX), |n| n as i8)?),
            "u8" => Elements::U8(whole(numbers, dtype, 0.0, f64::from(u8::MAX), |n| n as u8)?),
            "i32" => Elements::I32(whole(numbers, dtype, f64::from(i32::MIN), f64::from(i32::MAX), |n| n as i32)?),
            // Beyond 2^53 a JSON number is no longer exact.
            "i64" => {
                Elements::I64(whole(numbers, dtype, -9_007_199_254_740_992.0, 9_007_199_254_740_992.0, |n| n as i64)?)
            }
            _ => return Err(unsupported(dtype)),
        },
    };
    if let Elements::F32(values) = &elements
        && let Some(at) = values.iter().position(|value| !value.is_finite())
    {
        let field = format!("input.tensor.data[{at}]");
        return Err(Fault::bad(&field, format!("element {at} is not a finite number")));
    }
    Ok(elements)
}

fn read<T, const N: usize>(bytes: &[u8], parse: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| parse(*chunk)).collect()
}

fn whole<T>(numbers: &[f64], dtype: &str, least: f64, most: f64, cast: fn(f64) -> T) -> Result<Vec<T>, Fault> {
    let fits = |n: f64| n.fract() == 0.0 && (least..=most).contains(&n);
    match numbers.iter().position(|n| !fits(*n)) {
        None => Ok(numbers.iter().map(|n| cast(*n)).collect()),
        Some(at) => {
            let message = format!("{} is not a whole number that `{dtype}` can hold", numbers[at]);
            Err(Fault::bad(&format!("input.tensor.data[{at}]"), message))
        }
    }
}

fn unsupported(dtype: &str) -> Fault {
    Fault::bad("input.tensor.dtype", format!("a job cannot carry elements of type `{dtype}`"))
        .limit("f32, i8, u8, i32 or i64")
}
