//! Bare inputs: the payload is the input, options come as MQTT 5 user properties.

use super::Options;
use crate::job::{Fault, Input, TensorData, TensorInput};
use crate::task::image;

/// By the MQTT 5 Content Type, in lower case; plain text for a task about series is CSV.
///
/// # Errors
/// `bad_request` for a type that is not known, or a payload that is not of it.
pub fn by_content_type(content_type: &str, task: &str, payload: Vec<u8>) -> Result<Input, Fault> {
    match content_type {
        "text/plain" if task.starts_with("series.") => csv(&payload),
        "text/plain" => text(payload),
        "text/csv" => csv(&payload),
        "image/png" | "image/jpeg" => picture(payload),
        "audio/wav" | "audio/x-wav" | "audio/wave" => Ok(Input::Audio(payload)),
        "application/octet-stream" => Ok(tensor(payload)),
        "application/vnd.outpost+postcard" => {
            Err(Fault::bad("content_type", "postcard is not read by this version; send application/json"))
        }
        other => Err(Fault::bad("content_type", format!("`{other}` is not a type of job")).limit(
            "application/json, text/plain, text/csv, image/png, image/jpeg, audio/wav or application/octet-stream",
        )),
    }
}

/// By what the task takes, where no type is given.
///
/// # Errors
/// `bad_request` for a payload that is not of the task's kind.
pub fn by_task(task: &str, payload: Vec<u8>) -> Result<Input, Fault> {
    match task.split('.').next() {
        Some("image") => picture(payload),
        Some("series") => csv(&payload),
        Some("text") => text(payload),
        Some("audio") => Ok(Input::Audio(payload)),
        _ => Ok(tensor(payload)),
    }
}

/// By a file's ending, without its dot.
///
/// # Errors
/// `bad_request` for content that is not what the ending says.
pub fn by_ending(ending: &str, payload: Vec<u8>) -> Result<Input, Fault> {
    match ending {
        "txt" => text(payload),
        "csv" => csv(&payload),
        "png" | "jpg" | "jpeg" => picture(payload),
        "wav" => Ok(Input::Audio(payload)),
        "json" => super::envelope::read(&payload).map(|(_, input)| input).map_err(|(_, fault)| fault),
        _ => Ok(tensor(payload)),
    }
}

/// The content type that a file's ending stands for.
pub fn content_type(ending: &str) -> Option<&'static str> {
    match ending {
        "json" => Some("application/json"),
        "txt" => Some("text/plain"),
        "csv" => Some("text/csv"),
        "png" => Some("image/png"),
        "jpg" | "jpeg" => Some("image/jpeg"),
        "wav" => Some("audio/wav"),
        "bin" => Some("application/octet-stream"),
        _ => None,
    }
}

fn text(payload: Vec<u8>) -> Result<Input, Fault> {
    String::from_utf8(payload).map(Input::Text).map_err(|error| {
        Fault::bad("input.text", format!("not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
    })
}

fn picture(payload: Vec<u8>) -> Result<Input, Fault> {
    match image::media_type(&payload) {
        Some(_) => Ok(Input::Image(payload)),
        None => Err(Fault::bad("input.image", "neither a PNG nor a JPEG").limit("image/png or image/jpeg")),
    }
}

fn tensor(payload: Vec<u8>) -> Input {
    Input::Tensor(TensorInput { dtype: None, shape: None, data: TensorData::Bytes(payload) })
}

/// Rows of numbers separated by `,`, `;` or tabs; a first row of names is passed over.
fn csv(payload: &[u8]) -> Result<Input, Fault> {
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

/// Options from user properties: the envelope's names with `-` for `_`. Others are left alone:
/// brokers and tracing add their own.
///
/// # Errors
/// `bad_request` naming the property.
pub fn options(properties: &[(String, String)]) -> Result<Options, Fault> {
    fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<Option<T>, Fault> {
        let wrong = |_| Fault::bad(&key.replace('-', "_"), format!("`{value}` is not a number that fits"));
        value.trim().parse().map(Some).map_err(wrong)
    }
    let mut options = Options::default();
    for (key, value) in properties {
        match key.as_str() {
            "id" => options.id = Some(value.clone()),
            "reply-to" => options.reply_to = Some(value.clone()),
            "model" => options.model = Some(value.clone()),
            "deadline-ms" => options.deadline_ms = number(key, value)?,
            "priority" => options.priority = number(key, value)?,
            "privacy" => options.privacy = Some(super::envelope::privacy(value)?),
            "min-confidence" => options.min_confidence = number(key, value)?,
            "max-cost-usd" => options.max_cost_usd = number(key, value)?,
            "params" => {
                let wrong = |error| Fault::bad("params", format!("not a JSON object: {error}"));
                options.params = serde_json::from_str(value).map_err(wrong)?;
            }
            _ => {}
        }
    }
    Ok(options)
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
