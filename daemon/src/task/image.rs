//! Images: PNG or JPEG of any size → pixels of the model's size, scaled and standardised.

use std::io::Cursor;

use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageBuffer, ImageFormat, ImageReader, Luma, Rgb};

use super::standardise;
use crate::engine::package::{InputSpec, Layout, Resize};
use crate::job::Fault;

/// Longest side of an image that is decoded, in pixels.
pub const MAX_SIDE: u32 = 8192;
/// Most memory that decoding may take, in bytes.
const MAX_ALLOC: u64 = 256 << 20;

const FIELD: &str = "input.image";

/// The media type of an encoded image, by its first bytes; none for anything but PNG and JPEG.
pub fn media_type(bytes: &[u8]) -> Option<&'static str> {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => Some("image/png"),
        Ok(ImageFormat::Jpeg) => Some("image/jpeg"),
        _ => None,
    }
}

/// Decodes, resizes and standardises; values in the order of `layout`.
///
/// # Errors
/// `bad_request` for what is not a whole PNG or JPEG, `input_out_of_range` for one that is too large.
pub fn prepare(spec: &InputSpec, bytes: &[u8]) -> Result<Vec<f32>, Fault> {
    let image = decode(bytes)?;
    let [width, height] = spec.size.unwrap_or_default();
    let channels = spec.channels.unwrap_or(3);
    let pixels: Vec<u8> = if channels == 1 {
        resize(luma(image), width, height, spec.resize).into_raw()
    } else {
        resize(image.into_rgb8(), width, height, spec.resize).into_raw()
    };
    let scale = spec.scale.unwrap_or(1.0 / 255.0);
    let value = |channel: usize, pixel: usize| {
        standardise(spec, channel, f32::from(pixels[pixel * channels + channel]) * scale)
    };
    let count = width as usize * height as usize;
    Ok(match spec.layout {
        Layout::Nchw => (0..channels).flat_map(|c| (0..count).map(move |p| (c, p))).map(|(c, p)| value(c, p)).collect(),
        Layout::Nhwc => (0..count).flat_map(|p| (0..channels).map(move |c| (c, p))).map(|(c, p)| value(c, p)).collect(),
    })
}

/// Decodes a PNG or JPEG of a size that can be worked on.
///
/// # Errors
/// As [`prepare`].
pub fn decode(bytes: &[u8]) -> Result<DynamicImage, Fault> {
    let format = match image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => format,
        _ => return Err(Fault::bad(FIELD, "neither a PNG nor a JPEG").limit("image/png or image/jpeg")),
    };
    let broken = |error: image::ImageError| Fault::bad(FIELD, format!("the image cannot be decoded: {error}"));
    let (width, height) = ImageReader::with_format(Cursor::new(bytes), format).into_dimensions().map_err(broken)?;
    if width.max(height) > MAX_SIDE {
        let message = format!("an image of {width}x{height} pixels; a side has at most {MAX_SIDE}");
        return Err(Fault::range(FIELD, message, MAX_SIDE));
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(MAX_ALLOC);
    reader.limits(limits);
    reader.decode().map_err(broken)
}

/// Luma by ITU-R BT.601, 16-bit fixed point.
fn luma(image: DynamicImage) -> ImageBuffer<Luma<u8>, Vec<u8>> {
    if !image.color().has_color() {
        return image.into_luma8();
    }
    let rgb = image.into_rgb8();
    let weigh = |Rgb([r, g, b]): &Rgb<u8>| {
        let sum = u32::from(*r) * 19_595 + u32::from(*g) * 38_470 + u32::from(*b) * 7_471 + 0x8000;
        (sum >> 16) as u8
    };
    ImageBuffer::from_fn(rgb.width(), rgb.height(), |x, y| Luma([weigh(rgb.get_pixel(x, y))]))
}

/// Triangle filter, widened when shrinking so that nothing aliases.
fn resize<P>(image: ImageBuffer<P, Vec<u8>>, width: u32, height: u32, how: Resize) -> ImageBuffer<P, Vec<u8>>
where
    P: image::Pixel<Subpixel = u8> + 'static,
{
    let (w, h) = (f64::from(image.width()), f64::from(image.height()));
    let (sx, sy) = (f64::from(width) / w, f64::from(height) / h);
    let filter = FilterType::Triangle;
    match how {
        Resize::Stretch => imageops::resize(&image, width, height, filter),
        Resize::Fit => {
            let scale = sx.min(sy);
            let inner = |side: f64, most: u32| ((side * scale).round() as u32).clamp(1, most);
            let small = imageops::resize(&image, inner(w, width), inner(h, height), filter);
            let mut whole = ImageBuffer::new(width, height);
            let (x, y) = ((width - small.width()) / 2, (height - small.height()) / 2);
            imageops::overlay(&mut whole, &small, x.into(), y.into());
            whole
        }
        Resize::Crop => {
            let scale = sx.max(sy);
            let inner = |side: u32, most: f64| ((f64::from(side) / scale).round() as u32).clamp(1, most as u32);
            let (cw, ch) = (inner(width, w), inner(height, h));
            let (x, y) = ((image.width() - cw) / 2, (image.height() - ch) / 2);
            let middle = imageops::crop_imm(&image, x, y, cw, ch).to_image();
            imageops::resize(&middle, width, height, filter)
        }
    }
}
