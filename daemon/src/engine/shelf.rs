//! Which models are in memory: under one limit, the least recently used go first.
//!
//! A model counts with its plan and one state for each worker, as measured when it was first loaded. It counts until
//! the last thread has dropped its state, so the limit holds at every moment, not only between two jobs.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use super::meter::mib;
use super::model::{Loaded, Model, States};
use crate::job::{Code, Fault};

/// Why a model is never loaded: it takes more than all models together may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLarge {
    /// Bytes of the plan.
    pub plan: u64,
    /// Bytes of a worker's state.
    pub state: u64,
    /// Workers.
    pub threads: usize,
    /// Bytes that all models together may take.
    pub limit: u64,
}

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { plan, state, threads, limit } = *self;
        write!(
            f,
            "{} MiB are needed ({} for the plan, {} for each worker, of which there are {threads})",
            mib(self.need()),
            mib(plan),
            mib(state)
        )?;
        write!(f, ", and models.memory_mib is {}", mib(limit))
    }
}

impl TooLarge {
    /// Bytes of the plan and of every worker's state.
    pub fn need(&self) -> u64 {
        self.plan + self.state * self.threads as u64
    }
}

#[derive(Default)]
struct Held {
    /// Bytes of all loaded models, those on their way out included.
    used: u64,
    /// Bytes of those on their way out.
    leaving: u64,
    /// Those that want to load, first come first: the first makes room and loads while the others wait. So nobody
    /// starves, and at most one model's passing needs come on top.
    turns: VecDeque<u64>,
    next_turn: u64,
    /// Least recently used first.
    order: Vec<Arc<Model>>,
}

impl Held {
    /// A turn at the end of the line.
    fn join(&mut self) -> u64 {
        let turn = self.next_turn;
        self.next_turn += 1;
        self.turns.push_back(turn);
        turn
    }
}

type Wake = Box<dyn Fn() + Send + Sync>;

/// The loaded models and their limit.
pub struct Shelf {
    /// Itself, for what has to give room back.
    this: Weak<Shelf>,
    limit: u64,
    threads: usize,
    held: Mutex<Held>,
    /// Room was given back, or a load has ended.
    changed: Condvar,
    /// Asks idle threads to drop the states of models that have gone.
    wake: Mutex<Option<Wake>>,
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shelf({} of {} MiB)", mib(self.used()), mib(self.limit))
    }
}

impl Shelf {
    /// Room for `limit` bytes of models that `threads` threads run; at least one.
    pub fn new(limit: u64, threads: usize) -> Arc<Self> {
        Arc::new_cyclic(|this| Shelf {
            this: Weak::clone(this),
            limit,
            threads: threads.max(1),
            held: Mutex::default(),
            changed: Condvar::new(),
            wake: Mutex::default(),
        })
    }

    /// Room for everything.
    pub fn unlimited() -> Arc<Self> {
        Self::new(u64::MAX, 1)
    }

    /// Bytes that all models together may take; [`u64::MAX`]: any.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that the loaded models take now; never over the limit.
    pub fn used(&self) -> u64 {
        self.lock().used
    }

    /// Bytes that `model` takes while it is loaded.
    pub fn need(&self, model: &Model) -> u64 {
        model.footprint.plan + model.footprint.state * self.threads as u64
    }

    /// Has `wake` called when a model has gone, so that idle threads drop their states of it.
    pub fn on_retired(&self, wake: impl Fn() + Send + Sync + 'static) {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(wake));
    }

    /// The plan of `model`, loaded if it is not; it stays while the caller holds it. Waits until others have
    /// gone where there is no room: for worker threads, not for the runtime.
    ///
    /// # Errors
    /// `above_capability` for one that can never fit, `internal` where it cannot be loaded again.
    pub fn take(&self, model: &Arc<Model>, states: &mut States) -> Result<Arc<Loaded>, Fault> {
        let need = self.need(model);
        self.fits(model).map_err(|why| {
            Fault::new(Code::AboveCapability, format!("{}: {why}", model.id()))
                .field("models.memory_mib")
                .limit(mib(self.limit))
        })?;
        let loading = match self.begin(need, Some(model), states) {
            Turn::Found(loaded) => return Ok(loaded),
            Turn::Load(loading) => loading,
        };
        let loaded = model.bring(loading.room()).map_err(|why| {
            tracing::error!(model = model.id(), "cannot be loaded again: {why}");
            Fault::new(Code::Internal, format!("model {} cannot be loaded again", model.id()))
        })?;
        self.lock().order.push(Arc::clone(model));
        tracing::debug!(model = model.id(), mib = mib(need), "loaded");
        Ok(loaded)
    }

    /// Takes in a model that has been loaded to be measured; others go if need be.
    ///
    /// # Errors
    /// It can never fit.
    pub fn adopt(&self, model: &Arc<Model>, states: &mut States) -> Result<(), TooLarge> {
        self.fits(model)?;
        let need = self.need(model);
        if let Turn::Load(loading) = self.begin(need, None, states)
            && let Some(loaded) = model.loaded()
        {
            loaded.keep(loading.room());
            self.lock().order.push(Arc::clone(model));
        }
        Ok(())
    }

    /// Lets `model` go.
    pub fn remove(&self, model: &Arc<Model>) {
        let mut held = self.lock();
        held.order.retain(|other| !Arc::ptr_eq(other, model));
        self.retire(held, model);
    }

    fn fits(&self, model: &Model) -> Result<(), TooLarge> {
        let footprint = model.footprint;
        let figures =
            TooLarge { plan: footprint.plan, state: footprint.state, threads: self.threads, limit: self.limit };
        if figures.need() > self.limit { Err(figures) } else { Ok(()) }
    }

    /// Waits for its turn and for room, letting others go, unless `wanted` is loaded meanwhile.
    fn begin(&self, need: u64, wanted: Option<&Arc<Model>>, states: &mut States) -> Turn<'_> {
        let mut turn = None;
        loop {
            // A thread that waits must not itself hold what it waits for.
            states.drop_retired();
            let mut held = self.lock();
            if let Some(wanted) = wanted
                && let Some(loaded) = wanted.loaded()
            {
                if let Some(at) = held.order.iter().position(|model| Arc::ptr_eq(model, wanted)) {
                    held.order[at..].rotate_left(1);
                }
                if turn.is_some() {
                    held.turns.retain(|other| Some(*other) != turn);
                    self.changed.notify_all();
                }
                return Turn::Found(loaded);
            }
            let turn = *turn.get_or_insert_with(|| held.join());
            let first = held.turns.front() == Some(&turn);
            if first && held.used.saturating_add(need) <= self.limit {
                held.used = held.used.saturating_add(need);
                return Turn::Load(Loading { shelf: self, turn, bytes: need, reserved: Cell::new(true) });
            }
            let remaining = held.used - held.leaving;
            if first && remaining.saturating_add(need) > self.limit && !held.order.is_empty() {
                let oldest = held.order.remove(0);
                tracing::debug!(model = oldest.id(), "unloaded: the least recently used");
                self.retire(held, &oldest);
            } else {
                drop(self.changed.wait(held).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// Takes a model's plan from it; its room comes back with the last state.
    fn retire(&self, mut held: MutexGuard<'_, Held>, model: &Model) {
        let Some(loaded) = model.put_away() else { return };
        held.leaving += loaded.retire();
        drop(held);
        // Gives the room back, so not under the lock.
        drop(loaded);
        self.changed.notify_all();
        if let Some(wake) = &*self.wake.lock().unwrap_or_else(PoisonError::into_inner) {
            wake();
        }
    }

    /// A panic under this lock is not possible between two changes that belong together.
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Turn<'a> {
    Found(Arc<Loaded>),
    Load(Loading<'a>),
}

/// A turn to load, with the room for it.
struct Loading<'a> {
    shelf: &'a Shelf,
    turn: u64,
    bytes: u64,
    /// The room is still this turn's own.
    reserved: Cell<bool>,
}

impl Loading<'_> {
    /// The room, to be kept with what is loaded.
    fn room(&self) -> Room {
        self.reserved.set(false);
        Room { shelf: Weak::clone(&self.shelf.this), bytes: self.bytes, leaving: AtomicBool::new(false) }
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut held = self.shelf.lock();
        held.turns.retain(|turn| *turn != self.turn);
        if self.reserved.get() {
            held.used -= self.bytes;
        }
        drop(held);
        self.shelf.changed.notify_all();
    }
}

/// Room taken on a shelf, given back when dropped.
#[derive(Debug)]
pub struct Room {
    shelf: Weak<Shelf>,
    /// Bytes.
    pub bytes: u64,
    /// What is in it has been let go, and is held by those that still run it.
    pub leaving: AtomicBool,
}

impl Drop for Room {
    fn drop(&mut self) {
        let Some(shelf) = self.shelf.upgrade() else { return };
        let mut held = shelf.lock();
        held.used -= self.bytes;
        if *self.leaving.get_mut() {
            held.leaving -= self.bytes;
        }
        drop(held);
        shelf.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::engine::package::Package;
    use crate::intake::bare;
    use crate::job::{Input, Output};

    /// A shipped model in one precision with an input for it; loaded, and on no shelf.
    fn model(name: &str, precision: &str) -> (Arc<Model>, Input) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name);
        let package = Package::read(&dir).expect("a package");
        let variant = package.variant(precision).expect("a variant").clone();
        let case = package.path(&package.manifest.golden[0].input);
        let ending = case.extension().and_then(|ending| ending.to_str()).expect("an ending").to_owned();
        let input = bare::by_ending(&ending, std::fs::read(case).expect("read")).expect("an input");
        (Arc::new(Model::load(package, &variant).expect("it loads")), input)
    }

    fn answer(shelf: &Shelf, states: &mut States, (model, input): &(Arc<Model>, Input)) -> Output {
        let loaded = shelf.take(model, states).expect("there");
        model.answer_with(&loaded, states, input, None).expect("an answer")
    }

    #[test]
    fn the_least_recently_used_goes_and_comes_back_with_the_same_answers() {
        let [a, b, c] = [("digits", "int8"), ("notes", "fp32"), ("bearing", "int8")].map(|(n, p)| model(n, p));
        let probe = Shelf::new(u64::MAX, 2);
        let needs = [&a, &b, &c].map(|(model, _)| probe.need(model));
        // Room for the large one and one of the small ones.
        assert!(needs[1] >= needs[0].max(needs[2]));
        let limit = needs[0].max(needs[2]) + needs[1];
        let (shelf, mut states) = (Shelf::new(limit, 2), States::new());
        let first: Vec<Output> = [&a, &b, &c].map(|m| m.0.answer(&mut States::new(), &m.1, None).expect("yes")).into();
        for (model, _) in [&a, &b, &c] {
            shelf.adopt(model, &mut states).expect("fits");
            assert!(shelf.used() <= limit);
        }
        let there = || [&a, &b, &c].map(|(model, _)| model.loaded().is_some());
        assert_eq!(there(), [false, true, true]);
        assert_eq!(answer(&shelf, &mut states, &b), first[1]);
        // The bearing is the least recently used, and after it the notes.
        assert_eq!(answer(&shelf, &mut states, &a), first[0]);
        assert_eq!(there(), [true, true, false]);
        assert!(c.0.estimate(&c.1) >= c.0.footprint.load, "a load is part of the estimate");
        assert_eq!(answer(&shelf, &mut states, &c), first[2]);
        assert_eq!(there(), [true, false, true]);
        assert_eq!(shelf.used(), needs[0] + needs[2]);
        shelf.remove(&a.0);
        shelf.remove(&c.0);
        states.drop_retired();
        assert_eq!(shelf.used(), 0);
    }

    #[test]
    fn one_that_can_never_fit_is_refused_with_the_figures() {
        let (notes, _) = model("notes", "fp32");
        let shelf = Shelf::new(100_000, 3);
        let why = shelf.adopt(&notes, &mut States::new()).expect_err("too large");
        assert_eq!(why.need(), shelf.need(&notes));
        assert!(why.need() > 100_000 && why.to_string().contains("models.memory_mib is 0.095"), "{why}");
        let fault = shelf.take(&notes, &mut States::new()).expect_err("too large");
        assert_eq!((fault.code, fault.limit), (Code::AboveCapability, Some(0.095.into())));
    }

    #[test]
    fn room_counts_until_the_last_holder_is_done() {
        let (a, b) = (model("digits", "int8"), model("notes", "int8"));
        let shelf = Shelf::new(Shelf::unlimited().need(&a.0).max(Shelf::unlimited().need(&b.0)), 1);
        let mut states = States::new();
        shelf.adopt(&a.0, &mut states).expect("fits");
        let running = shelf.take(&a.0, &mut states).expect("there");
        shelf.remove(&a.0);
        assert_eq!(shelf.used(), shelf.need(&a.0));
        a.0.answer_with(&running, &mut states, &a.1, None).expect("it is not pulled from under its user");
        drop(running);
        assert_eq!(shelf.used(), shelf.need(&a.0), "the state holds it");
        states.drop_retired();
        assert_eq!(shelf.used(), 0);
    }

    /// Threads that want different models, of which one fits at a time.
    #[test]
    fn the_limit_holds_while_threads_compete_and_nobody_waits_for_ever() {
        let models = [("digits", "int8"), ("notes", "int8"), ("bearing", "int8")].map(|(n, p)| model(n, p));
        let probe = Shelf::new(u64::MAX, 3);
        let limit = models.iter().map(|(model, _)| probe.need(model)).max().expect("some");
        let shelf = Shelf::new(limit, 3);
        for (model, _) in &models {
            shelf.adopt(model, &mut States::new()).expect("fits");
        }
        let first: Vec<Output> = models.iter().map(|m| answer(&shelf, &mut States::new(), m)).collect();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (models, first, shelf) = (&models, &first, &shelf);
                scope.spawn(move || {
                    let mut states = States::new();
                    for round in 0..12 {
                        let at = (thread + round) % models.len();
                        assert_eq!(answer(shelf, &mut states, &models[at]), first[at]);
                        assert!(shelf.used() <= limit);
                    }
                });
            }
        });
        assert!(shelf.used() <= limit && shelf.used() > 0);
    }

    #[test]
    fn a_file_that_has_changed_is_not_loaded_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let (notes, _) = model("notes", "int8");
        let mut package = notes.package.clone();
        let file = dir.path().join(&notes.variant.file);
        std::fs::copy(package.path(&notes.variant.file), &file).expect("copied");
        package.dir = dir.path().to_owned();
        let moved = Arc::new(Model::load(package, &notes.variant).expect("it loads"));
        let (shelf, mut states) = (Shelf::unlimited(), States::new());
        shelf.adopt(&moved, &mut states).expect("fits");
        shelf.remove(&moved);
        std::fs::copy(notes.package.path("notes.fp32.onnx"), &file).expect("copied");
        assert_eq!(shelf.take(&moved, &mut states).expect_err("changed").code, Code::Internal);
        assert_eq!(shelf.used(), 0);
        std::fs::copy(notes.package.path(&notes.variant.file), &file).expect("copied");
        assert!(shelf.take(&moved, &mut states).is_ok());
    }
}
