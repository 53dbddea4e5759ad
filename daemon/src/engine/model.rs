//! One model, ready to answer: a package with one of its variants and its preparation.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tract_onnx::prelude::TValue;

use super::load::{Plan, State};
use super::meter;
use super::pace::Pace;
use super::package::{Expect, Package, VariantSpec};
use super::shelf::Room;
use crate::intake::bare;
use crate::job::{Code, Fault, Input, Output, TensorOutput};
use crate::task::output::{self, Scores};
use crate::task::{Preparation, Prepared};

/// A variant of a package. Its plan may be put away and brought back; all else stays.
#[derive(Debug)]
pub struct Model {
    /// The package that it comes from.
    pub package: Package,
    /// The variant that runs.
    pub variant: VariantSpec,
    /// What it takes while it is loaded.
    pub footprint: Footprint,
    /// What runs it, as [`Plan::kernels`] says.
    pub kernels: String,
    preparation: Preparation,
    place: Mutex<Option<Arc<Loaded>>>,
    pace: Pace,
    /// Nanoseconds of one inference on prepared input when it was activated; 0: not measured.
    measured_ns: AtomicU64,
}

/// What a model takes while it is loaded, as counted when it first was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Bytes of the plan: weights as they lie packed, and the graph.
    pub plan: u64,
    /// Bytes of one thread's state: buffers and scratch, after a run.
    pub state: u64,
    /// Time from the file to the plan.
    pub load: Duration,
}

/// A plan in memory.
#[derive(Debug)]
pub struct Loaded {
    plan: Plan,
    /// Distinguishes loaded plans, so that a thread finds its state for this one.
    serial: u64,
    /// The room that it takes, where a shelf keeps count.
    room: OnceLock<Room>,
}

impl Loaded {
    fn new(plan: Plan) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        Loaded { plan, serial: SERIAL.fetch_add(1, Ordering::Relaxed), room: OnceLock::new() }
    }

    /// Keeps the room as long as this is in memory.
    pub(super) fn keep(&self, room: Room) {
        // A second room for the same plan goes back at once.
        let _ = self.room.set(room);
    }

    /// Marks it as on its way out; the bytes that come back with it.
    pub(super) fn retire(&self) -> u64 {
        let Some(room) = self.room.get() else { return 0 };
        room.leaving.store(true, Ordering::Release);
        room.bytes
    }

    fn retired(&self) -> bool {
        self.room.get().is_some_and(|room| room.leaving.load(Ordering::Acquire))
    }
}

/// A thread's states of the plans that it has run.
///
/// They stay in their thread: tract keeps scratch memory of a state in the thread that ran it.
#[derive(Debug, Default)]
pub struct States(HashMap<u64, Owned>);

/// Fields drop in this order: the room comes back last.
#[derive(Debug)]
struct Owned {
    state: State,
    loaded: Arc<Loaded>,
}

impl States {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Drops them all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether one of them is of a plan that is on its way out.
    pub fn any_retired(&self) -> bool {
        self.0.values().any(|owned| owned.loaded.retired())
    }

    /// Drops those of plans that are on their way out.
    pub fn drop_retired(&mut self) {
        self.0.retain(|_, owned| !owned.loaded.retired());
    }

    /// The state of `loaded`, made if need be.
    fn of(&mut self, loaded: &Arc<Loaded>) -> anyhow::Result<&mut State> {
        let owned = match self.0.entry(loaded.serial) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Owned { state: loaded.plan.state()?, loaded: Arc::clone(loaded) }),
        };
        Ok(&mut owned.state)
    }
}

/// A prepared input, ready to be timed.
#[derive(Debug, Clone)]
pub struct Sample(TValue);

impl Model {
    /// Loads one variant and measures what it takes.
    ///
    /// # Errors
    /// One sentence that names the file or key.
    pub fn load(package: Package, variant: &VariantSpec) -> Result<Self, String> {
        let spec = &package.manifest.input;
        let wrong = |error: anyhow::Error| format!("{}: {error:#}", variant.file);
        let started = Instant::now();
        let (plan, bytes) = meter::left_by(|| Plan::load(&package.path(&variant.file), &spec.shape));
        let plan = plan.map_err(wrong)?;
        let load = started.elapsed();
        let preparation = Preparation::new(spec, plan.shape.clone(), &plan.dtype())?;
        let footprint = Footprint { plan: bytes, state: plan.state_bytes().map_err(wrong)?, load };
        Ok(Model {
            variant: variant.clone(),
            kernels: plan.kernels(),
            footprint,
            preparation,
            place: Mutex::new(Some(Arc::new(Loaded::new(plan)))),
            package,
            pace: Pace::default(),
            measured_ns: AtomicU64::new(0),
        })
    }

    /// The plan, if it is in memory.
    pub fn loaded(&self) -> Option<Arc<Loaded>> {
        self.place().clone()
    }

    /// Takes the plan out; whoever still runs it keeps it until done.
    pub(super) fn put_away(&self) -> Option<Arc<Loaded>> {
        self.place().take()
    }

    /// Loads the plan again, into `room`. The file must still be what was proven.
    ///
    /// # Errors
    /// One sentence that names the file.
    pub(super) fn bring(&self, room: Room) -> Result<Arc<Loaded>, String> {
        self.package.whole(&self.variant)?;
        let plan = Plan::load(&self.package.path(&self.variant.file), &self.package.manifest.input.shape)
            .map_err(|error| format!("{}: {error:#}", self.variant.file))?;
        let loaded = Arc::new(Loaded::new(plan));
        loaded.keep(room);
        *self.place() = Some(Arc::clone(&loaded));
        Ok(loaded)
    }

    fn place(&self) -> MutexGuard<'_, Option<Arc<Loaded>>> {
        // Nothing that can panic happens under this lock.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The variant's name: its precision, or its file's where the package has two of that precision.
    pub fn variant_name(&self) -> &str {
        self.package.variant_name(&self.variant)
    }

    /// Microseconds of one inference on prepared input, as measured when the model was activated.
    pub fn measured_us(&self) -> Option<f64> {
        let ns = self.measured_ns.load(Ordering::Relaxed);
        (ns > 0).then(|| ns as f64 / 1e3)
    }

    /// Notes what one inference took when it was measured.
    pub(super) fn note_us(&self, us: f64) {
        self.measured_ns.store((us * 1e3) as u64, Ordering::Relaxed);
    }

    /// `name@version`.
    pub fn id(&self) -> String {
        self.package.id()
    }

    /// Whether the input is one that this model can be asked about.
    ///
    /// # Errors
    /// As [`Preparation::check`].
    pub fn check(&self, input: &Input) -> Result<(), Fault> {
        self.preparation.check(input)
    }

    /// How long an answer for `input` will take, by what was measured; with the load, if it has to be loaded.
    pub fn estimate(&self, input: &Input) -> Duration {
        let run = self.pace.estimate(input.bytes(), self.preparation.runs(input));
        if self.place().is_some() { run } else { run + self.footprint.load }
    }

    /// Answers `input` in the calling thread, with the plan that is in memory.
    ///
    /// # Errors
    /// As [`Model::answer_with`]; `internal` where the plan has been put away: see [`super::Shelf::take`].
    pub fn answer(&self, states: &mut States, input: &Input, top_k: Option<usize>) -> Result<Output, Fault> {
        let loaded = self.loaded().ok_or_else(|| Fault::new(Code::Internal, format!("{} is not loaded", self.id())))?;
        self.answer_with(&loaded, states, input, top_k)
    }

    /// Answers `input` in the calling thread, with one of this model's own plans.
    ///
    /// # Errors
    /// As [`Preparation::prepare`]; `internal` where the model fails.
    pub fn answer_with(
        &self,
        loaded: &Arc<Loaded>,
        states: &mut States,
        input: &Input,
        top_k: Option<usize>,
    ) -> Result<Output, Fault> {
        let (prepared, runs) = self.run(loaded, states, input)?;
        output::read(&self.package, &prepared, &runs, top_k)
    }

    /// The numbers behind the answer to `input`; none where its kind of output has no confidence.
    ///
    /// # Errors
    /// As [`Model::answer`].
    pub fn scores(&self, states: &mut States, input: &Input) -> Result<Option<Scores>, Fault> {
        let loaded = self.loaded().ok_or_else(|| Fault::new(Code::Internal, format!("{} is not loaded", self.id())))?;
        let (prepared, runs) = self.run(&loaded, states, input)?;
        output::scores(&self.package, &prepared, &runs)
    }

    /// Prepares `input` and runs the plan.
    fn run(
        &self,
        loaded: &Arc<Loaded>,
        states: &mut States,
        input: &Input,
    ) -> Result<(Prepared, Vec<Vec<TensorOutput>>), Fault> {
        let started = Instant::now();
        let failed = |error: anyhow::Error| {
            tracing::error!(model = self.id(), "run failed: {error:#}");
            Fault::new(Code::Internal, format!("model {} failed on this input", self.id()))
        };
        let prepared = self.preparation.prepare(input)?;
        let preparing = started.elapsed();
        let state = states.of(loaded).map_err(failed)?;
        let runs = loaded.plan.run(state, &prepared, self.package.manifest.input.quantize).map_err(failed)?;
        self.pace.note(input.bytes(), preparing, runs.len(), started.elapsed() - preparing);
        Ok((prepared, runs))
    }

    /// A prepared input to measure with: of the first golden case, else zeros.
    ///
    /// # Errors
    /// The case cannot be read.
    pub fn sample(&self, loaded: &Loaded) -> Result<Sample, String> {
        let Some(case) = self.package.manifest.golden.first() else {
            return loaded.plan.zeros().map(Sample).map_err(|error| format!("{error:#}"));
        };
        let wrong = |what: String| format!("golden {}: {what}", case.input);
        let input = sample(&self.package.path(&case.input)).map_err(wrong)?;
        let prepared = self.preparation.prepare(&input).map_err(|fault| wrong(fault.message))?;
        let tensors = loaded.plan.tensors(&prepared, self.package.manifest.input.quantize);
        let first = tensors.map_err(|error| wrong(format!("{error:#}")))?.into_iter().next();
        first.map(Sample).ok_or_else(|| wrong("it prepares to nothing".to_owned()))
    }

    /// The time of one inference.
    ///
    /// # Errors
    /// tract's own.
    pub fn time(&self, loaded: &Arc<Loaded>, states: &mut States, sample: &Sample) -> Result<Duration, String> {
        let wrong = |error: anyhow::Error| format!("{}: {error:#}", self.variant.file);
        let state = states.of(loaded).map_err(wrong)?;
        let input = sample.0.clone();
        let started = Instant::now();
        let outputs = loaded.plan.infer(state, input).map_err(wrong)?;
        let took = started.elapsed();
        drop(outputs);
        Ok(took)
    }

    /// Runs the package's golden cases.
    ///
    /// # Errors
    /// Names the case, what was expected and what came.
    pub fn prove(&self, states: &mut States) -> Result<(), String> {
        for case in &self.package.manifest.golden {
            let wrong = |what: String| format!("golden {} ({}): {what}", case.input, self.variant.file);
            let input = sample(&self.package.path(&case.input)).map_err(wrong)?;
            let found = self.answer(states, &input, None).map_err(|fault| wrong(fault.message))?;
            match (&case.expect, &found) {
                (Expect::Label(expected), _) => {
                    let found = verdict(&found).unwrap_or("no label");
                    if found != expected {
                        return Err(wrong(format!("expected {expected}, found {found}")));
                    }
                }
                (Expect::Numbers(expected), Output::Tensors { tensors }) => {
                    close(expected, &tensors[0].data, case.tolerance).map_err(wrong)?;
                }
                (Expect::Numbers(expected), Output::Embedding { embedding }) => {
                    let found: Vec<f64> = embedding.iter().map(|value| f64::from(*value)).collect();
                    close(expected, &found, case.tolerance).map_err(wrong)?;
                }
                (Expect::Numbers(_), _) => return Err(wrong("numbers are expected of a label".to_owned())),
            }
        }
        Ok(())
    }
}

/// The word that an answer comes down to: its label, or `normal` or `anomalous`.
pub fn verdict(output: &Output) -> Option<&str> {
    match output {
        Output::Classes { label, .. } => Some(label),
        Output::Anomaly { anomalous, .. } => Some(if *anomalous { "anomalous" } else { "normal" }),
        _ => None,
    }
}

/// A golden case's input, by its file's ending.
fn sample(path: &Path) -> Result<Input, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    bare::by_ending(ending, bytes).map_err(|fault| fault.message)
}

fn close(expected: &[f64], found: &[f64], tolerance: Option<f64>) -> Result<(), String> {
    if expected.len() != found.len() {
        return Err(format!("{} numbers were expected, {} found", expected.len(), found.len()));
    }
    let most = expected.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    let tolerance = tolerance.unwrap_or(most * 1e-3);
    match expected.iter().zip(found).position(|(a, b)| (a - b).abs() > tolerance) {
        None => Ok(()),
        Some(at) => Err(format!("number {at}: expected {}, found {}", expected[at], found[at])),
    }
}
