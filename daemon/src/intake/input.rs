//! Raw values → inputs and options, whatever they travelled in.

use crate::job::{Fault, Input, Privacy, TensorData, TensorInput};
use crate::task::image;

/// UTF-8 text.
///
/// # Errors
/// `bad_request` naming the first byte that is not.
pub fn text(payload: Vec<u8>) -> Result<Input, Fault> {
    String::from_utf8(payload).map(Input::Text).map_err(|error| {
        Fault::bad("input.text", format!("not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
    })
}

/// A PNG or JPEG, by its first bytes.
///
/// # Errors
/// `bad_request` for anything else.
pub fn picture(payload: Vec<u8>) -> Result<Input, Fault> {
    match image::media_type(&payload) {
        Some(_) => Ok(Input::Image(payload)),
        None => Err(Fault::bad("input.image", "neither a PNG nor a JPEG").limit("image/png or image/jpeg")),
    }
}

/// Little-endian elements in the model's own type and shape.
pub fn tensor(payload: Vec<u8>) -> Input {
    Input::Tensor(TensorInput { dtype: None, shape: None, data: TensorData::Bytes(payload) })
}

/// Rows of numbers separated by `,`, `;` or tabs; a first row of names is passed over.
///
/// # Errors
/// `bad_request` naming the row.
pub fn csv(payload: &[u8]) -> Result<Input, Fault> {
    let first = payload.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let delimiter = [b';', b'\t'].into_iter().find(|mark| first.contains(mark)).unwrap_or(b',');
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(delimiter)
        .trim(csv::Trim::All)
        .from_reader(payload);
    let mut rows: Vec<Vec<f32>> = Vec::new();
    for (line, record) in reader.byte_records().enumerate() {
        let record = record.map_err(|error| Fault::bad("input.series", format!("not CSV: {error}")))?;
        let cells = record.iter().map(|cell| std::str::from_utf8(cell).ok()?.parse::<f32>().ok());
        match cells.collect::<Option<Vec<f32>>>() {
            Some(row) => rows.push(row),
            None if line == 0 => {}
            None => {
                let text = String::from_utf8_lossy(record.as_slice()).chars().take(40).collect::<String>();
                let field = format!("input.series[{}]", rows.len());
                return Err(Fault::bad(&field, format!("line {}: `{text}` is not numbers", line + 1)));
            }
        }
    }
    series(rows)
}

/// Checks that rows are equally long and numbers finite.
///
/// # Errors
/// `bad_request` naming the row or number.
pub fn series(rows: Vec<Vec<f32>>) -> Result<Input, Fault> {
    let columns = rows.first().map_or(0, Vec::len);
    if columns == 0 {
        return Err(Fault::bad("input.series", "there are no samples"));
    }
    for (at, row) in rows.iter().enumerate() {
        if row.len() != columns {
            let message = format!("row {at} has {} channels, the first has {columns}", row.len());
            return Err(Fault::bad(&format!("input.series[{at}]"), message));
        }
        if let Some(column) = row.iter().position(|value| !value.is_finite()) {
            let field = format!("input.series[{at}][{column}]");
            return Err(Fault::bad(&field, format!("sample {at} is not a finite number")));
        }
    }
    Ok(Input::Series(rows))
}

/// Reads the word of a privacy rule.
///
/// # Errors
/// `bad_request` for another word.
pub fn privacy(word: &str) -> Result<Privacy, Fault> {
    match word {
        "device" => Ok(Privacy::Device),
        "cloud" => Ok(Privacy::Cloud),
        _ => Err(Fault::bad("privacy", format!("`{word}` is neither `device` nor `cloud`")).limit("device or cloud")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_as_devices_write_it() {
        for (text, rows) in [
            ("1\n2\n", vec![vec![1.0], vec![2.0]]),
            ("x,y\r\n1, 2\r\n3,4", vec![vec![1.0, 2.0], vec![3.0, 4.0]]),
            ("1;2\n3;4\n", vec![vec![1.0, 2.0], vec![3.0, 4.0]]),
            ("-1e-3\t5\n", vec![vec![-0.001, 5.0]]),
        ] {
            assert_eq!(csv(text.as_bytes()), Ok(Input::Series(rows)), "{text:?}");
        }
    }

    #[test]
    fn csv_faults_name_the_sample() {
        for (text, field) in [
            ("1\nNaN\n", "input.series[1][0]"),
            ("1\ninf\n", "input.series[1][0]"),
            ("1,2\n3\n", "input.series[1]"),
            ("1\nx\n", "input.series[1]"),
            ("", "input.series"),
        ] {
            assert_eq!(csv(text.as_bytes()).expect_err(text).field.as_deref(), Some(field), "{text:?}");
        }
    }
}
