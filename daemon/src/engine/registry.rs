//! The models that are active: found in a folder, proven, and the fastest variant of each chosen.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::model::{Model, States};
use super::package::{Package, PackageError};

/// Active models and the packages that were refused.
#[derive(Debug, Default)]
pub struct Registry {
    models: Vec<Arc<Model>>,
    /// Packages that are not active, with the reason.
    pub refused: Vec<PackageError>,
}

impl Registry {
    /// Loads every package in `dir`: each of its folders that holds a `model.toml`.
    ///
    /// A package is active only if at least one variant passes its golden cases here; of those that
    /// do, the fastest runs. Slow: loads and runs every variant.
    ///
    /// # Errors
    /// The folder cannot be listed. A package that is refused is no error: see [`Registry::refused`].
    pub fn load(dir: &Path) -> std::io::Result<Self> {
        let mut folders: Vec<_> = fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        folders.retain(|folder| folder.join("model.toml").is_file());
        folders.sort();
        let mut registry = Registry::default();
        for folder in folders {
            match Package::read(&folder).and_then(activate) {
                Ok(model) if registry.models.iter().any(|known| known.id() == model.id()) => {
                    let reason = format!("{} is there already", model.id());
                    registry.refused.push(PackageError { dir: folder, reason });
                }
                Ok(model) => registry.models.push(Arc::new(model)),
                Err(refused) => registry.refused.push(refused),
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
        self.models.iter().filter(|model| model.package.manifest.task == task).find(|model| match wanted {
            None => true,
            Some(wanted) => wanted == model.package.manifest.name || wanted == model.id(),
        })
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
fn version_key(version: &str) -> Vec<(u64, String)> {
    version.split(['.', '-', '+']).map(|part| (part.parse().unwrap_or(0), part.to_owned())).collect()
}

/// Loads and proves each variant; the fastest of those that pass.
fn activate(package: Package) -> Result<Model, PackageError> {
    let mut best: Option<(Duration, Model)> = None;
    let mut reasons = Vec::new();
    for variant in &package.manifest.variant {
        let proven = Model::load(package.clone(), variant).and_then(|model| {
            let mut states = States::new();
            model.prove(&mut states)?;
            Ok((measure(&model, &mut states), model))
        });
        match proven {
            Ok((took, model)) if best.as_ref().is_none_or(|(least, _)| took < *least) => best = Some((took, model)),
            Ok(_) => {}
            Err(reason) => {
                tracing::warn!(model = package.id(), "variant not used: {reason}");
                reasons.push(reason);
            }
        }
    }
    best.map(|(_, model)| model).ok_or_else(|| PackageError { dir: package.dir.clone(), reason: reasons.join("; ") })
}

/// The shortest of a few rounds over the golden cases; a package without any is not measured.
fn measure(model: &Model, states: &mut States) -> Duration {
    let round = || {
        let started = Instant::now();
        model.prove(states).map(|()| started.elapsed())
    };
    std::iter::repeat_with(round).take(5).flatten().min().unwrap_or_default()
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
