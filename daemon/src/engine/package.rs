//! A model package: a folder with a `model.toml`, its variants, labels and golden cases.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::keys::strict;

/// The shape of `model.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name, the same rule as a node's.
    pub name: String,
    /// Version, free text without `@`.
    pub version: String,
    /// Task that it serves.
    pub task: String,
    /// SPDX expression.
    pub license: Option<String>,
    /// Where the weights come from.
    pub source: Option<String>,
    /// At least one.
    #[serde(default)]
    pub variant: Vec<VariantSpec>,
    /// What is done to an input before the model.
    pub input: InputSpec,
    /// What is done to the model's output.
    pub output: OutputSpec,
    /// When an answer counts as certain.
    #[serde(default)]
    pub confidence: ConfidenceSpec,
    /// How a closed model is asked for the same thing; none: never.
    pub uplink: Option<UplinkSpec>,
    /// Inputs with their expected outputs.
    #[serde(default)]
    pub golden: Vec<Golden>,
}

/// One file of weights.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantSpec {
    /// File in the package.
    pub file: String,
    /// `fp32`, `fp16`, `int8` or `int4`.
    pub precision: Precision,
    /// Hex SHA-256 of the file.
    pub sha256: String,
}

/// Precision of a variant's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Precision {
    Fp32,
    Fp16,
    Int8,
    Int4,
}

impl Precision {
    /// The word used in packages and replies.
    pub fn as_str(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
            Precision::Int8 => "int8",
            Precision::Int4 => "int4",
        }
    }
}

/// A dimension of the model's input, by number or by name where it is dynamic.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// Fixed.
    Fixed(usize),
    /// Named.
    Named(String),
}

/// What is done to an input before the model.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputSpec {
    /// Kind of input.
    pub kind: InputKind,
    /// Shape of the tensor that the model takes.
    pub shape: Vec<Dim>,
    /// Image: width and height in pixels.
    pub size: Option<[u32; 2]>,
    /// Image: 1 (luma) or 3 (RGB). Series: columns.
    pub channels: Option<usize>,
    /// Image: order of the dimensions; `nchw` where absent.
    #[serde(default)]
    pub layout: Layout,
    /// Image: how another aspect ratio is made to fit; `stretch` where absent.
    #[serde(default)]
    pub resize: Resize,
    /// Image: factor for a pixel's 0 to 255; 1/255 where absent.
    pub scale: Option<f32>,
    /// Subtracted after scaling: one value, or one for each channel or band.
    #[serde(default)]
    pub mean: Vec<f32>,
    /// Divided by after `mean`: likewise.
    #[serde(default)]
    pub std: Vec<f32>,
    /// Series: samples of one run of the model.
    pub window: Option<usize>,
    /// Series: samples between the starts of two windows; `window` where absent.
    pub hop: Option<usize>,
    /// Series: what is done to each window first; `none` where absent.
    #[serde(default)]
    pub normalise: Normalise,
    /// Series: `raw` or `log-spectrum`. Text: `hashed-ngrams`.
    pub features: Option<Features>,
    /// Series with `log-spectrum`: number of bands.
    pub bands: Option<usize>,
    /// Series: samples in a second that the model was trained on.
    pub rate: Option<f64>,
    /// Series: longest that the model should be asked about, in samples.
    pub max_samples: Option<usize>,
    /// Text: shortest and longest n-gram, in characters.
    pub ngrams: Option<[usize; 2]>,
    /// Text: longest that the model should be asked about, in characters.
    pub max_chars: Option<usize>,
    /// Where the model's own input is an integer.
    pub quantize: Option<Quantization>,
}

/// Kind of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum InputKind {
    Tensor,
    Image,
    Audio,
    Series,
    Text,
}

impl InputKind {
    /// The same word as [`crate::job::Input::kind`].
    pub fn as_str(self) -> &'static str {
        match self {
            InputKind::Tensor => "tensor",
            InputKind::Image => "image",
            InputKind::Audio => "audio",
            InputKind::Series => "series",
            InputKind::Text => "text",
        }
    }
}

/// Order of an image's dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Layout {
    #[default]
    Nchw,
    Nhwc,
}

/// How an image of another aspect ratio is made to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resize {
    /// Each side by itself.
    #[default]
    Stretch,
    /// The whole image, with black bars.
    Fit,
    /// The middle of the image, filling the frame.
    Crop,
}

/// What is done to each window of a series first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// Nothing.
    #[default]
    None,
    /// The window's mean is subtracted, channel by channel.
    Mean,
    /// The mean is subtracted and the result divided by the standard deviation.
    Zscore,
}

/// How an input becomes numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Features {
    /// As it came.
    Raw,
    /// Logarithm of the power in equal bands of frequency.
    LogSpectrum,
    /// Counts of character n-grams in hashed buckets.
    HashedNgrams,
}

/// Affine quantization: `real = scale * (integer - zero_point)`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantization {
    /// Size of a step.
    pub scale: f32,
    /// The integer that stands for zero.
    #[serde(default)]
    pub zero_point: i32,
}

/// What is done to the model's output.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputSpec {
    /// Kind of output.
    pub kind: OutputKind,
    /// Classes: file of labels, one a line.
    pub labels: Option<String>,
    /// Classes: what makes probabilities of the outputs.
    #[serde(default)]
    pub activation: Activation,
    /// Reconstruction: the score above which a series is anomalous.
    pub threshold: Option<f64>,
    /// Where the model's own output is an integer.
    pub dequantize: Option<Quantization>,
}

/// Kind of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum OutputKind {
    Classes,
    Boxes,
    Reconstruction,
    Embedding,
    Tokens,
    Tensor,
}

/// What makes probabilities of the outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Activation {
    Softmax,
    Sigmoid,
    #[default]
    None,
}

/// When an answer counts as certain.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfidenceSpec {
    /// Below it the answer is uncertain.
    pub threshold: f64,
    /// Divides the logits before the activation.
    pub temperature: f64,
}

impl Default for ConfidenceSpec {
    fn default() -> Self {
        ConfidenceSpec { threshold: 0.0, temperature: 1.0 }
    }
}

/// How a closed model is asked for the same thing.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UplinkSpec {
    /// What to answer and what the labels mean.
    pub instruction: String,
    /// How a series is sent; absent: as a table, and one that is too long for it as a plot.
    pub series: Option<SeriesForm>,
}

/// How a series is sent to a closed model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum SeriesForm {
    Table,
    Plot,
}

/// An input with its expected output.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// File in the package; its ending says what it is.
    pub input: String,
    /// Label, `normal` or `anomalous`, or the numbers of the first output.
    pub expect: Expect,
    /// For numbers: the largest difference allowed; 0.001 of the largest where absent.
    pub tolerance: Option<f64>,
}

/// What a golden case expects.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Expect {
    /// A label, or `normal` or `anomalous`.
    Label(String),
    /// The first output tensor, row by row.
    Numbers(Vec<f64>),
}

/// A package whose manifest is consistent and whose files are there and whole.
#[derive(Debug, Clone)]
pub struct Package {
    /// Its folder.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Labels of a classifier.
    pub labels: Vec<String>,
}

/// Why a package is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", dir.display())]
pub struct PackageError {
    /// The package's folder.
    pub dir: PathBuf,
    /// One sentence that names the key, file or case.
    pub reason: String,
    /// Its task, as far as its manifest can be read, where it has no `[uplink]`.
    pub local_task: Option<String>,
}

/// The task of a package without `[uplink]`, of whatever can be read.
fn local_task(dir: &Path) -> Option<String> {
    let manifest: toml::Table = fs::read_to_string(dir.join("model.toml")).ok()?.parse().ok()?;
    let task = manifest.get("task")?.as_str()?;
    (!manifest.contains_key("uplink")).then(|| task.to_owned())
}

impl Package {
    /// Why this package, which is consistent, is refused all the same.
    pub fn refuse(&self, reason: String) -> PackageError {
        let local_task = self.manifest.uplink.is_none().then(|| self.manifest.task.clone());
        PackageError { dir: self.dir.clone(), reason, local_task }
    }

    /// Reads and checks the package in `dir`, file hashes included.
    ///
    /// # Errors
    /// A missing file, an unknown key, a wrong hash or settings that do not fit each other.
    pub fn read(dir: &Path) -> Result<Self, PackageError> {
        let refused = |reason| PackageError { dir: dir.to_owned(), reason, local_task: local_task(dir) };
        Self::read_inner(dir).map_err(refused)
    }

    fn read_inner(dir: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(dir.join("model.toml")).map_err(|error| format!("model.toml: {error}"))?;
        let table = text.parse::<toml::Table>().map_err(|error| format!("model.toml: {error}"))?;
        let manifest: Manifest = strict(table).map_err(|mistake| format!("model.toml: {mistake}"))?;
        check(&manifest)?;
        for variant in &manifest.variant {
            whole(dir, variant)?;
        }
        let labels = match &manifest.output.labels {
            None => Vec::new(),
            Some(file) => fs::read_to_string(inside(dir, file)?)
                .map_err(|error| format!("{file}: {error}"))?
                .lines()
                .map(|line| line.trim().to_owned())
                .filter(|line| !line.is_empty())
                .collect(),
        };
        for case in &manifest.golden {
            let path = inside(dir, &case.input)?;
            if !path.is_file() {
                return Err(format!("golden {}: no such file", case.input));
            }
            if let Expect::Label(label) = &case.expect {
                let known = match manifest.output.kind {
                    OutputKind::Reconstruction => matches!(label.as_str(), "normal" | "anomalous"),
                    _ => labels.contains(label),
                };
                if !known {
                    return Err(format!("golden {}: `{label}` is not an answer of this model", case.input));
                }
            }
        }
        Ok(Package { dir: dir.to_owned(), manifest, labels })
    }

    /// `name@version`.
    pub fn id(&self) -> String {
        format!("{}@{}", self.manifest.name, self.manifest.version)
    }

    /// Whether `wanted` means this package: its name, or `name@version`.
    pub fn is(&self, wanted: &str) -> bool {
        wanted == self.manifest.name || wanted == self.id()
    }

    /// Whether a variant's file still is what its hash says.
    ///
    /// # Errors
    /// One sentence that names the file.
    pub fn whole(&self, variant: &VariantSpec) -> Result<(), String> {
        whole(&self.dir, variant)
    }

    /// A variant's name: its precision, or its file's where the package has two of that precision.
    pub fn variant_name<'a>(&self, variant: &'a VariantSpec) -> &'a str {
        let alike = self.manifest.variant.iter().filter(|other| other.precision == variant.precision);
        match alike.count() {
            0 | 1 => variant.precision.as_str(),
            _ => variant.file.strip_suffix(".onnx").unwrap_or(&variant.file),
        }
    }

    /// The variant of that name, file or, where only one has it, precision.
    pub fn variant(&self, wanted: &str) -> Option<&VariantSpec> {
        self.manifest.variant.iter().find(|variant| self.variant_name(variant) == wanted || variant.file == wanted)
    }

    /// A file of the package, by its name in the manifest.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }
}

/// A package names only files of its own.
fn inside(dir: &Path, file: &str) -> Result<PathBuf, String> {
    let plain = Path::new(file).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if plain && !file.is_empty() { Ok(dir.join(file)) } else { Err(format!("{file}: not a file of the package")) }
}

fn whole(dir: &Path, variant: &VariantSpec) -> Result<(), String> {
    let found = hash(&inside(dir, &variant.file)?).map_err(|error| format!("{}: {error}", variant.file))?;
    if found.eq_ignore_ascii_case(&variant.sha256) {
        Ok(())
    } else {
        Err(format!("{}: its SHA-256 is {found}, not {}", variant.file, variant.sha256))
    }
}

fn hash(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut fs::File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn check(m: &Manifest) -> Result<(), String> {
    let wrong = |what: String| Err(format!("model.toml: {what}"));
    if !crate::topic::is_name(&m.name) {
        return wrong(format!("name: `{}` is not [a-z0-9][a-z0-9-]{{0,62}}", m.name));
    }
    if m.version.is_empty() || m.version.contains(['@', '/', ' ']) {
        return wrong(format!("version: `{}` is not a version", m.version));
    }
    if m.task.is_empty() || m.task.contains(['/', '+', '#']) {
        return wrong(format!("task: `{}` cannot be part of a topic", m.task));
    }
    if m.variant.is_empty() {
        return wrong("variant: at least one is needed".into());
    }
    let files: Vec<&str> = m.variant.iter().map(|variant| variant.file.as_str()).collect();
    if let Some(twice) = files.iter().enumerate().find(|(at, file)| files[..*at].contains(file)) {
        return wrong(format!("variant: `{}` is named twice", twice.1));
    }
    let i = &m.input;
    if i.shape.is_empty() || i.shape.iter().any(|dim| matches!(dim, Dim::Fixed(0))) {
        return wrong("input.shape: at least one dimension, none of them 0".into());
    }
    match i.kind {
        InputKind::Image => {
            if i.size.is_none_or(|size| size.contains(&0) || size.iter().any(|side| *side > 8192)) {
                return wrong("input.size: [width, height] in pixels, 1 to 8192, is needed for an image".into());
            }
            if !matches!(i.channels, None | Some(1 | 3)) {
                return wrong("input.channels: 1 or 3".into());
            }
        }
        InputKind::Series => {
            if i.window.is_none_or(|window| !(2..=1 << 20).contains(&window)) {
                return wrong("input.window: 2 to 1048576 samples are needed for a series".into());
            }
            if i.hop == Some(0) {
                return wrong("input.hop: at least 1".into());
            }
            if i.features == Some(Features::LogSpectrum)
                && i.bands.is_none_or(|bands| bands == 0 || !(i.window.unwrap_or(0) / 2).is_multiple_of(bands))
            {
                return wrong("input.bands: a divisor of window/2 is needed for log-spectrum".into());
            }
        }
        InputKind::Text => {
            if i.features != Some(Features::HashedNgrams) {
                return wrong("input.features: `hashed-ngrams` is the one that text has in this version".into());
            }
            if i.ngrams.is_none_or(|[low, high]| low == 0 || high < low || high > 16) {
                return wrong("input.ngrams: [shortest, longest], 1 to 16, is needed for text".into());
            }
        }
        InputKind::Audio => return wrong("input.kind: `audio` is not supported by this version".into()),
        InputKind::Tensor => {}
    }
    if i.std.contains(&0.0) {
        return wrong("input.std: 0 cannot be divided by".into());
    }
    for q in [i.quantize, m.output.dequantize].into_iter().flatten() {
        if !(q.scale.is_finite() && q.scale > 0.0) {
            return wrong(format!("a quantization scale of {} is not positive", q.scale));
        }
    }
    match m.output.kind {
        OutputKind::Classes if m.output.labels.is_none() => return wrong("output.labels: needed for classes".into()),
        OutputKind::Reconstruction if !m.output.threshold.is_some_and(|t| t.is_finite() && t > 0.0) => {
            return wrong("output.threshold: a positive score is needed for a reconstruction".into());
        }
        OutputKind::Boxes | OutputKind::Tokens => {
            return wrong("output.kind: `boxes` and `tokens` are not supported by this version".into());
        }
        _ => {}
    }
    if !(0.0..=1.0).contains(&m.confidence.threshold) {
        return wrong(format!("confidence.threshold: {} is not within 0 to 1", m.confidence.threshold));
    }
    if !(m.confidence.temperature.is_finite() && m.confidence.temperature > 0.0) {
        return wrong(format!("confidence.temperature: {} is not positive", m.confidence.temperature));
    }
    Ok(())
}
