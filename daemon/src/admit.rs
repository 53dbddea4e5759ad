//! Admit: size, deadline, duplicate and room. A job gets a [`Slot`], or the reason why not.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::intake::Receipt;
use crate::job::{Code, Fault, Job, ReplyTo};
use crate::store::{Key, Store};

/// Admitted jobs may hold this many times the largest payload, all together.
const PAYLOADS: usize = 32;

/// What becomes of a job.
#[derive(Debug)]
pub enum Verdict {
    /// It runs.
    Run(Admitted),
    /// The same job is running: it is acknowledged with that one.
    Joined,
    /// The same job is held on disk: there is nothing to wait for before it is acknowledged.
    Held,
    /// The same job was answered: this is the reply.
    Again(Vec<u8>),
    /// It does not run.
    Refused(Fault),
    /// It is left to the broker's session and runs after the restart.
    Left,
}

/// A job that may run, with the room that it takes.
#[derive(Debug)]
pub struct Admitted {
    /// The job.
    pub job: Job,
    /// Where its reply goes.
    pub reply_to: ReplyTo,
    /// What it is known by; none where the requester gave neither id nor correlation.
    pub key: Option<Key>,
    /// Its delivery, to be acknowledged with its reply.
    pub receipt: Option<Receipt>,
    /// Its room, held until the broker has accepted the reply.
    pub slot: Slot,
}

#[derive(Debug, Default)]
struct State {
    jobs: usize,
    bytes: usize,
    running: HashMap<Key, Course>,
}

/// Where a job that is not yet answered is.
#[derive(Debug)]
enum Course {
    /// In hand: further deliveries are acknowledged with its reply.
    Runs(Vec<Receipt>),
    /// On disk, for hours perhaps: a delivery that waited for its reply would take one of the places that the broker
    /// has for what is not yet acknowledged.
    Held,
}

impl Course {
    /// Deliveries that are not yet acknowledged.
    fn receipts(self) -> Vec<Receipt> {
        match self {
            Course::Runs(receipts) => receipts,
            Course::Held => Vec::new(),
        }
    }
}

#[derive(Debug)]
struct Room {
    queue: usize,
    bytes: usize,
    state: Mutex<State>,
}

impl Room {
    /// Counters and map are changed by single statements: whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room of an admitted job; dropping it frees the room.
#[derive(Debug)]
pub struct Slot {
    room: Arc<Room>,
    bytes: usize,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.room.lock();
        state.jobs -= 1;
        state.bytes -= self.bytes;
    }
}

/// The gate.
pub struct Gate {
    room: Arc<Room>,
    store: Arc<Store>,
    draining: AtomicBool,
}

impl Gate {
    /// A gate for `queue` jobs of at most `max_bytes`; `store` knows the replies given.
    pub fn new(queue: usize, max_bytes: usize, store: Arc<Store>) -> Self {
        let room = Room { queue, bytes: max_bytes.saturating_mul(PAYLOADS), state: Mutex::default() };
        Gate { room: Arc::new(room), store, draining: AtomicBool::new(false) }
    }

    /// Decides about a job of `bytes` payload. Reads the disk where the job was seen before; called from
    /// one thread alone.
    pub fn admit(&self, job: Job, reply_to: ReplyTo, bytes: usize, receipt: Option<Receipt>, now: Instant) -> Verdict {
        let key = key(&reply_to, job.id.as_deref());
        let refused = |code, message: String| Fault::new(code, message);
        if let Some(key) = key {
            match self.room.lock().running.get_mut(&key) {
                Some(Course::Runs(receipts)) => {
                    receipts.extend(receipt);
                    return Verdict::Joined;
                }
                Some(Course::Held) => return Verdict::Held,
                None => {}
            }
            // A reply is remembered before its job stops running, so nothing slips between the two.
            if let Some(reply) = self.store.get(&key) {
                return Verdict::Again(reply);
            }
        }
        if self.draining.load(Ordering::Relaxed) {
            // A job with a deadline can still be asked elsewhere; one without waits for the restart.
            if receipt.is_some() && job.wishes.deadline.is_none() {
                return Verdict::Left;
            }
            return Verdict::Refused(refused(Code::ShuttingDown, "this node is shutting down".to_owned()));
        }
        if job.wishes.deadline.is_some_and(|deadline| deadline <= now) {
            let fault = refused(Code::DeadlineExceeded, "the deadline had passed when the job came".to_owned());
            return Verdict::Refused(fault.field("deadline_ms").limit(0));
        }
        let mut state = self.room.lock();
        if state.jobs >= self.room.queue {
            let message = format!("{} jobs are being worked on already", self.room.queue);
            return Verdict::Refused(refused(Code::Overloaded, message).limit(self.room.queue));
        }
        if state.bytes + bytes > self.room.bytes {
            let message = format!("the jobs being worked on hold {} bytes already", state.bytes);
            return Verdict::Refused(refused(Code::Overloaded, message).limit(self.room.bytes));
        }
        state.jobs += 1;
        state.bytes += bytes;
        if let Some(key) = key {
            state.running.insert(key, Course::Runs(Vec::new()));
        }
        drop(state);
        let slot = Slot { room: Arc::clone(&self.room), bytes };
        Verdict::Run(Admitted { job, reply_to, key, receipt, slot })
    }

    /// The job is answered and remembered: the further deliveries to acknowledge with its reply.
    pub fn answered(&self, key: &Key) -> Vec<Receipt> {
        self.room.lock().running.remove(key).map(Course::receipts).unwrap_or_default()
    }

    /// The job is held on disk, now or since an earlier run, and the same one is not run beside it: the further
    /// deliveries to acknowledge.
    pub fn held(&self, key: Key) -> Vec<Receipt> {
        self.room.lock().running.insert(key, Course::Held).map(Course::receipts).unwrap_or_default()
    }

    /// From now on no job is admitted.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether [`Gate::drain`] was called.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Jobs admitted whose reply the broker has not yet accepted.
    pub fn jobs(&self) -> usize {
        self.room.lock().jobs
    }
}

/// Reply address, correlation and id; a job that has neither of the last two cannot be told from another.
fn key(reply_to: &ReplyTo, id: Option<&str>) -> Option<Key> {
    if id.is_none() && reply_to.correlation.as_ref().is_none_or(Vec::is_empty) {
        return None;
    }
    let mut hasher = Sha256::new();
    for part in [reply_to.topic.as_bytes(), reply_to.correlation.as_deref().unwrap_or_default()] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(id.unwrap_or_default());
    hasher.finalize().first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Input, Wishes};

    /// Deliveries of a job that is held would each take one of the broker's places, for hours.
    #[test]
    fn a_held_job_keeps_no_delivery_waiting() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Arc::new(Store::open(dir.path(), std::time::Duration::from_secs(60)).expect("opens"));
        let gate = Gate::new(8, 1000, store);
        let receipt = |pkid| Some(Receipt { pkid, generation: 1 });
        let admit = |receipt| {
            let (task, received) = ("text.classify".to_owned(), Instant::now());
            let input = Input::Text("x".to_owned()).into();
            let job = Job { id: Some("a".to_owned()), task, input, wishes: Wishes::default(), received };
            let reply_to = ReplyTo { topic: "answers".to_owned(), correlation: None };
            gate.admit(job, reply_to, 1, receipt, received)
        };
        let Verdict::Run(Admitted { key: Some(key), slot, .. }) = admit(receipt(1)) else { panic!("not admitted") };
        assert!(matches!(admit(receipt(2)), Verdict::Joined));
        assert_eq!(gate.held(key), [receipt(2).expect("a receipt")], "what joined is acknowledged when it is held");
        drop(slot);
        assert!(matches!(admit(receipt(3)), Verdict::Held));
        assert_eq!((gate.answered(&key), gate.jobs()), (Vec::new(), 0));
        assert!(matches!(admit(receipt(4)), Verdict::Run(_)));
    }
}
