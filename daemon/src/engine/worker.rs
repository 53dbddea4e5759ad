//! The threads that run models, behind a bounded queue: higher priority first, then first come.

use std::collections::BinaryHeap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::model::{Model, States};
use super::shelf::Shelf;
use crate::job::{Code, Fault, Job, Output};
use crate::vitals::{BEAT, Pulse};

/// A run may take this many times what it was estimated to before its worker counts as stuck.
const SLOWEST: u32 = 20;

/// What a worker gives back.
#[derive(Debug)]
pub struct Done {
    /// The answer, or why there is none.
    pub result: Result<Output, Fault>,
    /// Time in the queue.
    pub queued: Duration,
    /// Time in the worker.
    pub took: Duration,
}

struct Ticket {
    priority: u8,
    order: u64,
    entered: Instant,
    estimate: Duration,
    job: Arc<Job>,
    model: Arc<Model>,
    reply: oneshot::Sender<Done>,
}

impl Ord for Ticket {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.priority.cmp(&other.priority).then(other.order.cmp(&self.order))
    }
}
impl PartialOrd for Ticket {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Ticket {}

#[derive(Default)]
struct Queue {
    waiting: BinaryHeap<Ticket>,
    order: u64,
    /// Sum of the estimates of what waits.
    work: Duration,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    busy: AtomicUsize,
}

impl Shared {
    /// A worker that panics does so outside the lock, so the queue behind a poisoned one is whole.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Worker threads and their queue.
pub struct Pool {
    shared: Arc<Shared>,
    capacity: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `threads` workers behind a queue of `capacity` jobs; models come from the `shelf`.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub fn start(threads: usize, capacity: usize, shelf: &Arc<Shelf>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), ready: Condvar::new(), busy: AtomicUsize::new(0) });
        let spawn = |i: usize| {
            let (shared, shelf) = (Arc::clone(&shared), Arc::clone(shelf));
            let name = format!("outpost-run-{i}");
            let pulse = Pulse::of(&name);
            std::thread::Builder::new().name(name).spawn(move || work(&shared, &shelf, &pulse))
        };
        let idle = Arc::downgrade(&shared);
        shelf.on_retired(move || {
            let Some(shared) = idle.upgrade() else { return };
            // Whoever looked before this lock sleeps by now, and wakes; whoever looks after it sees the change.
            drop(shared.lock());
            shared.ready.notify_all();
        });
        let threads = (0..threads.max(1)).map(spawn).collect::<std::io::Result<_>>()?;
        Ok(Pool { shared, capacity, threads })
    }

    /// Queues a job for a model. Dropping the receiver before its turn takes the job out.
    ///
    /// # Errors
    /// `overloaded` when the queue is full.
    pub fn submit(&self, job: Arc<Job>, model: Arc<Model>) -> Result<oneshot::Receiver<Done>, Fault> {
        let (reply, receiver) = oneshot::channel();
        let mut queue = self.shared.lock();
        if queue.waiting.len() >= self.capacity {
            let message = format!("{} jobs are waiting for a worker already", self.capacity);
            return Err(Fault::new(Code::Overloaded, message).limit(self.capacity));
        }
        let (order, estimate) = (queue.order, model.estimate(&job.input));
        queue.order += 1;
        queue.work += estimate;
        let priority = job.wishes.priority;
        queue.waiting.push(Ticket { priority, order, entered: Instant::now(), estimate, job, model, reply });
        drop(queue);
        self.shared.ready.notify_one();
        Ok(receiver)
    }

    /// How long a job that came now would wait, by the estimates of those before it.
    pub fn wait(&self) -> Duration {
        let threads = self.threads.len().max(1) as u32;
        self.shared.lock().work / threads
    }

    /// Jobs waiting, and workers running one.
    pub fn load(&self) -> (usize, usize) {
        let waiting = self.shared.lock().waiting.len();
        (waiting, self.shared.busy.load(Ordering::Relaxed))
    }
}

impl Drop for Pool {
    /// Workers finish what they run; what waits is dropped.
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        queue.waiting.clear();
        drop(queue);
        self.shared.ready.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches panics of models; one of its own has been reported by the hook.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared, shelf: &Shelf, pulse: &Pulse) {
    let mut states = States::new();
    while let Some(ticket) = next(shared, &mut states, pulse) {
        let Ticket { entered, estimate, job, model, reply, .. } = ticket;
        // Its requester has gone: the deadline has passed.
        if reply.is_closed() {
            continue;
        }
        pulse.busy(estimate.saturating_mul(SLOWEST));
        shared.busy.fetch_add(1, Ordering::Relaxed);
        let started = Instant::now();
        let top_k = job.wishes.top_k();
        let answer = || {
            let loaded = shelf.take(&model, &mut states)?;
            model.answer_with(&loaded, &mut states, &job.input, top_k)
        };
        let result = catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|_| {
            // What a panic left behind is not to be trusted.
            states.clear();
            Err(Fault::new(Code::Internal, format!("model {} failed on this input", model.id())))
        });
        shared.busy.fetch_sub(1, Ordering::Relaxed);
        let _ = reply.send(Done { result, queued: started - entered, took: started.elapsed() });
    }
}

/// The next job; none when the pool closes. Meanwhile it beats, and states of models that have gone are dropped.
fn next(shared: &Shared, states: &mut States, pulse: &Pulse) -> Option<Ticket> {
    let mut queue = shared.lock();
    loop {
        if states.any_retired() {
            drop(queue);
            states.drop_retired();
            queue = shared.lock();
            continue;
        }
        if let Some(ticket) = queue.waiting.pop() {
            queue.work = queue.work.saturating_sub(ticket.estimate);
            return Some(ticket);
        }
        if queue.closed {
            return None;
        }
        pulse.beat();
        queue = shared.ready.wait_timeout(queue, BEAT).unwrap_or_else(std::sync::PoisonError::into_inner).0;
    }
}
