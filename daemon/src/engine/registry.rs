//! The models that are active: found in a folder, proven, and the fastest variant of each chosen.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::measure::{Effort, Figures, choose, measure};
use super::model::{Model, States};
use super::package::{Package, PackageError, VariantSpec};
use super::shelf::{Shelf, TooLarge};

/// Active models and the packages that were refused.
#[derive(Debug)]
pub struct Registry {
    models: Vec<Arc<Model>>,
    /// Packages that are not active, with the reason.
    pub refused: Vec<PackageError>,
    /// Those of them that are only too large for this device.
    pub too_large: Vec<(Package, TooLarge)>,
    /// Which models are in memory.
    pub shelf: Arc<Shelf>,
}

impl Registry {
    /// A registry of nothing.
    pub fn empty(shelf: Arc<Shelf>) -> Self {
        Registry { models: Vec::new(), refused: Vec::new(), too_large: Vec::new(), shelf }
    }

    /// Loads every package in `dir` and keeps all of them in memory; see [`Registry::load_within`].
    ///
    /// # Errors
    /// As there.
    pub fn load(dir: &Path) -> std::io::Result<Self> {
        Self::load_within(dir, Shelf::unlimited())
    }

    /// Loads every package in `dir`: each of its folders that holds a `model.toml`; not those whose names start
    /// with a dot. What fits on the `shelf` stays in memory.
    ///
    /// A package is active only if at least one variant passes its golden cases here; of those that
    /// do, the fastest runs. Slow: loads and runs every variant.
    ///
    /// # Errors
    /// The folder cannot be listed. A package that is refused is no error: see [`Registry::refused`].
    pub fn load_within(dir: &Path, shelf: Arc<Shelf>) -> std::io::Result<Self> {
        let mut registry = Registry::empty(shelf);
        for folder in folders(dir)? {
            let package = match Package::read(&folder) {
                Ok(package) => package,
                Err(refused) => {
                    registry.refused.push(refused);
                    continue;
                }
            };
            if registry.models.iter().any(|known| known.id() == package.id()) {
                let reason = format!("{} is there already", package.id());
                registry.refused.push(package.refuse(reason));
                continue;
            }
            match activate(&package, &registry.shelf) {
                Ok(model) => registry.models.push(model),
                Err(Inactive { reason, too_large }) => {
                    registry.refused.push(package.refuse(reason));
                    registry.too_large.extend(too_large.map(|figures| (package, figures)));
                }
            }
        }
        registry.sort();
        Ok(registry)
    }

    /// After a reload: what is refused now and was active `before` stays active as it was.
    pub fn keep(&mut self, before: &Registry) {
        for refused in &self.refused {
            let was = before.models.iter().find(|model| model.package.dir == refused.dir);
            if let Some(model) = was.filter(|was| !self.models.iter().any(|model| model.id() == was.id())) {
                self.models.push(Arc::clone(model));
            }
        }
        self.sort();
    }

    /// After a reload: models of `before` that are not in it any more leave the shelf.
    pub fn let_go(&self, before: &Registry) {
        let gone = |was: &&Arc<Model>| !self.models.iter().any(|model| Arc::ptr_eq(model, was));
        before.models.iter().filter(gone).for_each(|model| self.shelf.remove(model));
    }

    /// Of two versions of one model the newer is asked first.
    fn sort(&mut self) {
        self.models.sort_by_cached_key(|model| {
            let manifest = &model.package.manifest;
            (manifest.name.clone(), std::cmp::Reverse(version_key(&manifest.version)))
        });
    }

    /// Active models, by name.
    pub fn models(&self) -> &[Arc<Model>] {
        &self.models
    }

    /// The model that serves `task`: the one asked for by `name` or `name@version`, else the first.
    pub fn find(&self, task: &str, wanted: Option<&str>) -> Option<&Arc<Model>> {
        self.models.iter().find(|model| serves(&model.package, task, wanted))
    }

    /// The refused package by whose own rule this task would stay on the device, if it were active: that it is not
    /// does not open the way up.
    pub fn refused_local(&self, task: &str) -> Option<&Path> {
        let refused = self.refused.iter().filter(|refused| refused.local_task.as_deref() == Some(task));
        refused.map(|refused| refused.dir.as_path()).next()
    }

    /// The package that would serve `task` if it were not too large for this device.
    pub fn find_too_large(&self, task: &str, wanted: Option<&str>) -> Option<&(Package, TooLarge)> {
        self.too_large.iter().find(|(package, _)| serves(package, task, wanted))
    }

    /// Tasks that are served.
    pub fn tasks(&self) -> Vec<String> {
        let mut tasks: Vec<String> = self.models.iter().map(|model| model.package.manifest.task.clone()).collect();
        tasks.sort();
        tasks.dedup();
        tasks
    }
}

/// Numbers compare as numbers: 1.10 is newer than 1.9.
pub fn version_key(version: &str) -> Vec<(u64, String)> {
    version.split(['.', '-', '+']).map(|part| (part.parse().unwrap_or(0), part.to_owned())).collect()
}

fn serves(package: &Package, task: &str, wanted: Option<&str>) -> bool {
    package.manifest.task == task && wanted.is_none_or(|wanted| package.is(wanted))
}

/// The folders of packages in `dir`, in order.
///
/// # Errors
/// It cannot be listed.
pub fn folders(dir: &Path) -> std::io::Result<Vec<std::path::PathBuf>> {
    let mut folders: Vec<_> = fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let hidden = |folder: &Path| folder.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    folders.retain(|folder| !hidden(folder) && folder.join("model.toml").is_file());
    folders.sort();
    Ok(folders)
}

/// What became of a variant.
#[derive(Debug)]
pub struct Tried {
    /// It, where it could be loaded.
    pub model: Option<Arc<Model>>,
    /// How fast it is, where it runs.
    pub figures: Option<Figures>,
    /// Why it is not fit to be used: it cannot be loaded or run, or a golden case fails.
    pub fit: Result<(), String>,
    /// It is not fit because it is too large for the shelf.
    pub too_large: Option<TooLarge>,
}

/// Loads, proves and measures each variant of a package, in the manifest's order; which of them is to be used.
pub fn attempt(package: &Package, shelf: &Shelf, effort: Effort) -> (Vec<Tried>, Option<usize>) {
    let mut states = States::new();
    let mut load = |variant: &VariantSpec| {
        let mut tried = Tried { model: None, figures: None, fit: Ok(()), too_large: None };
        match Model::load(package.clone(), variant).map(Arc::new) {
            Err(why) => tried.fit = Err(why),
            Ok(model) => {
                match shelf.adopt(&model, &mut states) {
                    Ok(()) => tried.fit = model.prove(&mut states),
                    Err(figures) => {
                        tried.fit = Err(format!("{}: {figures}", variant.file));
                        tried.too_large = Some(figures);
                        model.put_away();
                    }
                }
                tried.model = Some(model);
            }
        }
        tried
    };
    let mut all: Vec<Tried> = package.manifest.variant.iter().map(&mut load).collect();
    let mut runs: Vec<&mut Tried> = all.iter_mut().filter(|tried| tried.too_large.is_none()).collect();
    runs.retain(|tried| tried.model.is_some());
    let models: Vec<Arc<Model>> = runs.iter().filter_map(|tried| tried.model.clone()).collect();
    for (tried, measured) in runs.iter_mut().zip(measure(&models, shelf, &mut states, effort)) {
        match measured {
            Ok(figures) => tried.figures = Some(figures),
            Err(why) if tried.fit.is_ok() => tried.fit = Err(why),
            Err(_) => {}
        }
    }
    let chosen = choose(&all.iter().map(|tried| tried.figures.filter(|_| tried.fit.is_ok())).collect::<Vec<_>>());
    (all, chosen)
}

struct Inactive {
    reason: String,
    too_large: Option<TooLarge>,
}

/// The variant to be used; the others leave the shelf.
fn activate(package: &Package, shelf: &Shelf) -> Result<Arc<Model>, Inactive> {
    let (tried, chosen) = attempt(package, shelf, Effort::CHOICE);
    let mut best = None;
    let mut reasons = Vec::new();
    for (at, (tried, variant)) in tried.iter().zip(&package.manifest.variant).enumerate() {
        if let Err(why) = &tried.fit {
            tracing::warn!(model = package.id(), variant = package.variant_name(variant), "not used: {why}");
            reasons.push(why.as_str());
        }
        match (&tried.model, tried.figures) {
            (Some(model), Some(figures)) if chosen == Some(at) => {
                model.note_us(figures.us_min);
                best = Some(Arc::clone(model));
            }
            (Some(model), _) => shelf.remove(model),
            (None, _) => {}
        }
    }
    let too_large = || tried.iter().filter_map(|tried| tried.too_large).min_by_key(TooLarge::need);
    best.ok_or_else(|| Inactive { reason: reasons.join("; "), too_large: too_large() })
}

#[cfg(test)]
mod tests {
    use super::version_key;

    #[test]
    fn shipped_models_are_active() {
        let registry =
            super::Registry::load(concat!(env!("CARGO_MANIFEST_DIR"), "/../models").as_ref()).expect("a folder");
        assert_eq!(registry.refused, []);
        assert!(!registry.models().is_empty());
    }

    #[test]
    fn versions_compare_by_number() {
        for (older, newer) in [("1.9.0", "1.10.0"), ("1.0", "1.0.1"), ("0.9", "1.0")] {
            assert!(version_key(older) < version_key(newer), "{older} {newer}");
        }
    }
}
