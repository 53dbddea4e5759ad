//! Labelled sets: a folder with a sub-folder for each label, or a file of JSON lines.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Case;
use crate::engine::Model;
use crate::engine::model::States;
use crate::engine::package::{OutputKind, Package};
use crate::intake::{bare, envelope};
use crate::job::{Code, Input};

/// A labelled set, answered by a model, in an order that is random and always the same.
#[derive(Debug)]
pub struct Set {
    /// The cases.
    pub cases: Vec<Case>,
    /// Cases that were there twice: they count once, for a promise rests on independent cases.
    pub twice: usize,
    /// Cases outside the model's limits.
    pub refused: usize,
}

#[derive(Deserialize)]
struct Line {
    input: Value,
    label: String,
}

struct Reading<'a> {
    model: &'a Model,
    answers: Vec<String>,
    states: States,
    seen: HashSet<[u8; 32]>,
    cases: Vec<([u8; 32], Case)>,
    set: Set,
}

/// Reads the set at `path` and answers it: a folder of label sub-folders whose files' endings say what they are, or a
/// file with an object `{"input": …, "label": …}` on each line, the input as in an envelope.
///
/// # Errors
/// Names the file or line that cannot be read or answered, or the label that the model does not have.
pub fn read(path: &Path, model: &Model) -> Result<Set> {
    let Some(answers) = answers(&model.package) else {
        bail!("answers of {} carry no confidence: there is nothing to calibrate", model.id())
    };
    let set = Set { cases: Vec::new(), twice: 0, refused: 0 };
    let mut reading = Reading { model, answers, states: States::new(), seen: HashSet::new(), cases: Vec::new(), set };
    if path.is_dir() {
        reading.folder(path)?
    } else {
        each_line(path, |line| reading.line(line))?
    }
    let Reading { mut cases, mut set, .. } = reading;
    // The order of hashes is as good as a random one, and does not change with the order of files.
    cases.sort_by_key(|(hash, _)| *hash);
    set.cases = cases.into_iter().map(|(_, case)| case).collect();
    ensure!(!set.cases.is_empty(), "{}: there are no cases", path.display());
    Ok(set)
}

/// The answers that a package's model can give; none where they carry no confidence.
fn answers(package: &Package) -> Option<Vec<String>> {
    match package.manifest.output.kind {
        OutputKind::Classes => Some(package.labels.clone()),
        OutputKind::Reconstruction => Some(vec!["normal".to_owned(), "anomalous".to_owned()]),
        _ => None,
    }
}

/// Those of the packages that have all the labels of the set at `path`.
///
/// # Errors
/// Names the file or line that cannot be read.
pub fn fitting<'a>(path: &Path, packages: &'a [Package]) -> Result<Vec<&'a Package>> {
    let labels: HashSet<String> = if path.is_dir() {
        let folders = list(path)?.into_iter().filter(|folder| folder.is_dir());
        folders.filter_map(|folder| Some(folder.file_name()?.to_string_lossy().into_owned())).collect()
    } else {
        let mut labels = HashSet::new();
        each_line(path, |line| {
            labels.insert(line.label);
            Ok(())
        })?;
        labels
    };
    let has_all =
        |package: &&Package| answers(package).is_some_and(|answers| labels.iter().all(|label| answers.contains(label)));
    Ok(packages.iter().filter(has_all).collect())
}

impl Reading<'_> {
    fn folder(&mut self, path: &Path) -> Result<()> {
        let folders: Vec<PathBuf> = list(path)?.into_iter().filter(|folder| folder.is_dir()).collect();
        ensure!(!folders.is_empty(), "{}: a sub-folder for each label is needed", path.display());
        for folder in folders {
            let label = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for file in list(&folder)?.iter().filter(|file| file.is_file()) {
                let shown = || file.display().to_string();
                let bytes = fs::read(file).with_context(shown)?;
                let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
                let hash = Sha256::digest(&bytes).into();
                let input = bare::by_ending(ending, bytes).with_context(shown)?;
                self.case(hash, &input, &label).with_context(shown)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, Line { input, label }: Line) -> Result<()> {
        let envelope = json!({"input": input}).to_string();
        let hash = Sha256::digest(&envelope).into();
        let (_, input) = envelope::read(envelope.as_bytes()).map_err(|(_, fault)| fault)?;
        self.case(hash, &input, &label)
    }

    fn case(&mut self, hash: [u8; 32], input: &Input, label: &str) -> Result<()> {
        let Some(truth) = self.answers.iter().position(|answer| answer == label) else {
            bail!("`{label}` is not an answer of {}, which are {}", self.model.id(), self.answers.join(", "));
        };
        if !self.seen.insert(hash) {
            self.set.twice += 1;
            return Ok(());
        }
        let scores = match self.model.scores(&mut self.states, input) {
            Ok(scores) => scores,
            // The daemon sends these up without asking the model.
            Err(fault) if fault.code == Code::InputOutOfRange => None,
            Err(fault) => return Err(fault.into()),
        };
        self.set.refused += usize::from(scores.is_none());
        self.cases.push((hash, Case { scores, truth }));
        Ok(())
    }
}

/// Does `work` for each line of a file that is not empty.
fn each_line(path: &Path, mut work: impl FnMut(Line) -> Result<()>) -> Result<()> {
    let file = fs::File::open(path).with_context(|| path.display().to_string())?;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let shown = || format!("{}, line {}", path.display(), number + 1);
        let line = line.with_context(shown)?;
        if !line.trim().is_empty() {
            serde_json::from_str(&line).map_err(anyhow::Error::from).and_then(&mut work).with_context(shown)?;
        }
    }
    Ok(())
}

/// What a folder holds, in order, without hidden files.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let shown = || folder.display().to_string();
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(shown)? {
        let entry = entry.with_context(shown)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}
