//! `outpost models add`: a package from anywhere into the model directory, whole or not at all.
//!
//! It is copied beside the others under a name that the daemon passes over, proven there, made durable, and renamed
//! to `NAME@VERSION`. A version is never overwritten: a daemon may be running it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Place;
use crate::engine::measure::Effort;
use crate::engine::package::Package;
use crate::engine::registry::{self, version_key};

/// Where a package lies until it is proven.
const STAGE: &str = ".adding";
/// Held by whoever adds.
const LOCK: &str = ".lock";
/// Most files of a package.
const MAX_FILES: usize = 10_000;
/// Most bytes of a package, unpacked.
const MAX_BYTES: u64 = 4 << 30;

/// What became of a package.
enum Outcome {
    Added { package: Package, variant: String, left_out: Vec<String>, newer: Option<String> },
    There(Package),
}

/// Adds each; failure if one was refused.
pub fn run(place: &Place, packages: &[PathBuf], json: bool) -> Result<ExitCode> {
    let dir = &place.dir;
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let lock = File::create(dir.join(LOCK)).with_context(|| dir.display().to_string())?;
    lock.lock().with_context(|| format!("{}: locked", dir.display()))?;
    let mut good = true;
    let mut rows = Vec::new();
    for source in packages {
        let outcome = add(place, source);
        // What a refusal or an earlier crash left behind.
        let _ = fs::remove_dir_all(dir.join(STAGE));
        match outcome {
            Ok(Outcome::Added { package, variant, left_out, newer }) => {
                let shown = package.dir.display();
                let then = match &newer {
                    None => "the daemon uses it from its next start".to_owned(),
                    Some(newer) => format!("the daemon goes on with {newer}, which is newer"),
                };
                if !json {
                    println!("added {} as {shown}: {variant} is the fastest here; {then}", package.id());
                    left_out.iter().for_each(|why| println!("  not used: {why}"));
                }
                rows.push(json!({
                    "source": source, "outcome": "added", "model": package.manifest.name,
                    "version": package.manifest.version, "dir": package.dir, "variant": variant,
                    "left_out": left_out, "newer": newer,
                }));
            }
            Ok(Outcome::There(package)) => {
                if !json {
                    println!("{} is there already, the same, as {}", package.id(), package.dir.display());
                }
                rows.push(json!({
                    "source": source, "outcome": "there", "model": package.manifest.name,
                    "version": package.manifest.version, "dir": package.dir,
                }));
            }
            Err(why) => {
                good = false;
                if !json {
                    eprintln!("outpost: {} is refused: {why:#}", source.display());
                }
                rows.push(json!({"source": source, "outcome": "refused", "why": format!("{why:#}")}));
            }
        }
    }
    if json {
        println!("{}", serde_json::Value::Array(rows));
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn add(place: &Place, source: &Path) -> Result<Outcome> {
    let stage = place.dir.join(STAGE);
    if stage.exists() {
        fs::remove_dir_all(&stage).with_context(|| stage.display().to_string())?;
    }
    fs::create_dir(&stage).with_context(|| stage.display().to_string())?;
    if source.is_dir() {
        copy(source, &stage, &mut Room::default())?;
    } else {
        unpack(source, &stage)?;
    }
    let root = root(&stage)?;
    let package = Package::read(&root).map_err(|refused| anyhow::anyhow!(refused.reason))?;
    let (id, name) = (package.id(), &package.manifest.name);
    // Packages that are there and cannot be read are another's concern.
    let there: Vec<Package> =
        registry::folders(&place.dir)?.iter().filter_map(|folder| Package::read(folder).ok()).collect();
    if let Some(same) = there.iter().find(|other| other.id() == id) {
        ensure!(
            contents(&same.dir)? == contents(&root)?,
            "{id} is there already with other contents, as {}: what is added needs a version of its own",
            same.dir.display()
        );
        return Ok(Outcome::There(same.clone()));
    }
    let (tried, chosen) = registry::attempt(&package, &place.shelf(), Effort::CHOICE);
    let left_out: Vec<String> = tried.iter().filter_map(|tried| tried.fit.clone().err()).collect();
    let Some(chosen) = chosen else { bail!(left_out.join("; ")) };
    let variant = package.variant_name(&package.manifest.variant[chosen]).to_owned();
    drop(tried);

    sync(&root)?;
    let target = place.dir.join(&id);
    fs::rename(&root, &target).with_context(|| target.display().to_string())?;
    File::open(&place.dir).and_then(|dir| dir.sync_all()).with_context(|| place.dir.display().to_string())?;
    let key = |package: &Package| version_key(&package.manifest.version);
    let newer = there.iter().filter(|other| other.manifest.name == *name && key(other) > key(&package));
    let newer = newer.max_by_key(|other| key(other)).map(Package::id);
    Ok(Outcome::Added { package: Package { dir: target, ..package }, variant, left_out, newer })
}

/// Where the `model.toml` is: at the top, or in the one folder there, as archives have it.
fn root(stage: &Path) -> Result<PathBuf> {
    if stage.join("model.toml").is_file() {
        return Ok(stage.to_owned());
    }
    match &registry::folders(stage)?[..] {
        [one] => Ok(one.clone()),
        _ => bail!("it holds no model.toml"),
    }
}

/// What a package may still take.
#[derive(Default)]
struct Room {
    files: usize,
    bytes: u64,
}

impl Room {
    fn take(&mut self, bytes: u64) -> Result<()> {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        ensure!(self.files <= MAX_FILES, "it holds more than {MAX_FILES} files");
        ensure!(self.bytes <= MAX_BYTES, "it holds more than {} MiB", MAX_BYTES >> 20);
        Ok(())
    }
}

fn copy(from: &Path, to: &Path, room: &mut Room) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy(&source, &target, room)?;
        } else if kind.is_file() {
            room.take(entry.metadata()?.len())?;
            fs::copy(&source, &target).with_context(|| source.display().to_string())?;
        } else {
            bail!("{}: neither a file nor a folder", source.display());
        }
    }
    Ok(())
}

/// Puts a copy in the place of a package that is a link: one that the system's package manager installed is not to be
/// changed there, and an upgrade would take the change back. Says whether it was a link.
///
/// # Errors
/// It cannot be copied.
pub fn own(dir: &Path) -> Result<bool> {
    let shown = || dir.display().to_string();
    if !fs::symlink_metadata(dir).with_context(shown)?.is_symlink() {
        return Ok(false);
    }
    let stage = dir.with_file_name(format!(".{}.own", dir.file_name().unwrap_or_default().to_string_lossy()));
    let _ = fs::remove_dir_all(&stage);
    fs::create_dir(&stage).with_context(|| stage.display().to_string())?;
    copy(dir, &stage, &mut Room::default())?;
    fs::remove_file(dir).with_context(shown)?;
    fs::rename(&stage, dir).with_context(shown)?;
    Ok(true)
}

fn unpack(archive: &Path, to: &Path) -> Result<()> {
    let file = File::open(archive)?;
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(io::BufReader::new(file)));
    let wrong = "it is neither a folder nor a .tar.gz archive";
    let mut room = Room::default();
    for entry in archive.entries().context(wrong)? {
        let mut entry = entry.context(wrong)?;
        let path = entry.path()?.into_owned();
        let kind = entry.header().entry_type();
        if kind == tar::EntryType::XGlobalHeader {
            continue;
        }
        ensure!(kind.is_file() || kind.is_dir(), "{}: neither a file nor a folder", path.display());
        room.take(entry.size())?;
        ensure!(entry.unpack_in(to)?, "{}: outside the archive", path.display());
    }
    Ok(())
}

/// Each file's hash, by its path.
fn contents(dir: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for path in files(dir)? {
        let mut hasher = Sha256::new();
        io::copy(&mut File::open(&path)?, &mut hasher)?;
        found.insert(path.strip_prefix(dir)?.to_owned(), hasher.finalize().to_vec());
    }
    Ok(found)
}

fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// Has every file and folder on the disk.
fn sync(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sync(&path)?;
        } else {
            File::open(&path)?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}
