//! Pictures on their way up: no larger than the task needs, for tokens are counted by pixels.

use std::borrow::Cow;
use std::io::Cursor;

use image::{DynamicImage, ImageFormat, ImageReader};

use crate::task::image::{decode, media_type};

/// Quality of a JPEG that was scaled.
const QUALITY: u8 = 85;

fn size(bytes: &[u8]) -> Option<(u32, u32)> {
    ImageReader::new(Cursor::new(bytes)).with_guessed_format().ok()?.into_dimensions().ok()
}

/// Width and height with the longer side at most `side`.
fn fitted((width, height): (u32, u32), side: u32) -> (u32, u32) {
    let longest = width.max(height);
    if longest <= side {
        return (width, height);
    }
    let scale = |length: u32| (u64::from(length) * u64::from(side)).div_ceil(u64::from(longest)).max(1) as u32;
    (scale(width), scale(height))
}

/// Whether [`fit`] would scale the picture.
pub fn is_larger(bytes: &[u8], side: u32) -> bool {
    size(bytes).is_some_and(|(width, height)| width.max(height) > side)
}

/// The picture with its longer side at most `side` pixels, as it came where it is no larger; and its
/// media type.
///
/// # Errors
/// It is neither PNG nor JPEG, or broken.
pub fn fit(bytes: &[u8], side: u32) -> Result<(&'static str, Cow<'_, [u8]>), String> {
    let media_type = media_type(bytes).ok_or("the picture is neither a PNG nor a JPEG")?;
    let Some(size) = size(bytes) else { return Err("the picture cannot be read".to_owned()) };
    let (width, height) = fitted(size, side);
    if (width, height) == size {
        return Ok((media_type, Cow::Borrowed(bytes)));
    }
    let whole = decode(bytes).map_err(|fault| fault.message)?;
    let small = whole.resize_exact(width, height, image::imageops::FilterType::Triangle);
    let mut out = Cursor::new(Vec::new());
    let written = if media_type == "image/png" {
        small.write_to(&mut out, ImageFormat::Png)
    } else {
        DynamicImage::from(small.into_rgb8())
            .write_with_encoder(image::codecs::jpeg::JpegEncoder::new_with_quality(&mut out, QUALITY))
    };
    written.map_err(|error| format!("the picture cannot be scaled: {error}"))?;
    Ok((media_type, Cow::Owned(out.into_inner())))
}

/// Width and height once the picture is fitted.
pub fn fitted_size(bytes: &[u8], side: u32) -> (u32, u32) {
    fitted(size(bytes).unwrap_or((side, side)), side)
}

/// Tokens that a picture of this size takes, from above: OpenAI counts up to 2.46 for each patch
/// of 32 by 32 pixels, or 85 and 170 for each tile of 512; Gemini 258 for each tile of 768; Anthropic
/// one for each 750 pixels.
pub fn tokens((width, height): (u32, u32)) -> u64 {
    let patches = u64::from(width.div_ceil(32)) * u64::from(height.div_ceil(32));
    300 + patches * 5 / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        DynamicImage::new_rgb8(width, height).write_to(&mut out, format).expect("encodes");
        out.into_inner()
    }

    #[test]
    fn scaled_only_where_larger() {
        for (width, height, format, found) in [
            (100, 40, ImageFormat::Png, (100, 40)),
            (1000, 400, ImageFormat::Png, (256, 103)),
            (300, 600, ImageFormat::Jpeg, (128, 256)),
            (5000, 1, ImageFormat::Jpeg, (256, 1)),
        ] {
            let bytes = picture(width, height, format);
            let (media_type, fitted) = fit(&bytes, 256).expect("fits");
            assert_eq!(size(&fitted), Some(found));
            assert_eq!(super::media_type(&fitted), Some(media_type));
            assert_eq!(matches!(fitted, Cow::Borrowed(_)), width.max(height) <= 256);
            assert!(tokens(fitted_size(&bytes, 256)) <= tokens(fitted_size(&bytes, 8192)));
        }
        assert!(fit(b"GIF89a", 256).is_err());
        assert!(fit(&picture(9, 9, ImageFormat::Png)[..20], 256).is_err());
    }

    #[test]
    fn no_provider_counts_more() {
        for (width, height) in [(28, 28), (256, 256), (640, 480), (1024, 1024)] {
            let bytes = picture(width, height, ImageFormat::Png);
            let tiles = |side: u32| u64::from(width.div_ceil(side) * height.div_ceil(side));
            let most = [85 + 170 * tiles(512), 258 * tiles(768), u64::from(width * height / 750)].into_iter().max();
            assert!(Some(tokens(fitted_size(&bytes, 1024))) >= most, "{width}x{height}");
        }
    }
}
