//! Held jobs: those without a deadline that need a closed model while none can be reached.
//!
//! Each is a file of its own, written before its delivery is acknowledged and removed when the broker
//! has accepted its reply, so that neither a crash nor a restart loses one. They are sent oldest first.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::job::{Input, Job, ReplyTo, Wishes};
use crate::store::Key;

/// Most jobs that are held.
pub const MAX_JOBS: usize = 10_000;
/// Most bytes that they take on disk.
pub const MAX_BYTES: u64 = 128 << 20;
/// Rounds in which the oldest job is tried before the next one is.
const ROUNDS: u32 = 3;

/// A job on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    id: Option<String>,
    task: String,
    input: Input,
    wishes: Wishes,
    reply_to: ReplyTo,
    key: Option<Key>,
    /// When it came, milliseconds since 1970.
    since_ms: u64,
    /// What it has cost so far, US dollars.
    spent_usd: f64,
}

/// A job that was held, and is to be sent.
#[derive(Debug)]
pub struct Held {
    /// The job, as if it had come just so long ago.
    pub job: Job,
    /// Where its reply goes.
    pub reply_to: ReplyTo,
    /// What it is known by.
    pub key: Option<Key>,
    /// Time left until it is answered as it stands.
    pub left: Duration,
    /// What it has cost so far, US dollars.
    pub spent_usd: f64,
    /// To be kept with the reply: dropping it means that the broker has it.
    pub ticket: Ticket,
}

#[derive(Debug)]
struct Place {
    bytes: u64,
    key: Option<Key>,
    /// Taken out to be sent, and not yet given back.
    out: bool,
    /// Whether others were let go before it: it, and not the way up, may be what fails.
    suspect: bool,
}

/// When a job came, in milliseconds since 1970, and a number of its own: the order in which they go.
type Number = (u64, u64);

#[derive(Debug, Default)]
struct Index {
    places: BTreeMap<Number, Place>,
    next: u64,
    /// Failures in a row of the job that is tried.
    failures: u32,
    /// Jobs up to here are passed over until one behind them has been sent or has failed as well.
    passed: Option<Number>,
    /// Files whose replies were accepted.
    done: Vec<Number>,
}

/// Jobs held on disk.
#[derive(Debug)]
pub struct Hold {
    dir: PathBuf,
    window: Duration,
    index: Mutex<Index>,
    changed: Notify,
}

/// Stands for a held job on its way: when it is dropped its file may go.
#[derive(Debug)]
pub struct Ticket {
    hold: Arc<Hold>,
    number: Number,
}

impl Ticket {
    /// The job stays held: it was not sent, or, if it `failed`, it was tried in vain. Then it stays the next for some
    /// rounds, for it most often is the way up that failed; after that the others are tried, lest one job that no
    /// provider can answer keeps them all.
    pub fn give_back(self, failed: bool) {
        let mut index = self.hold.lock();
        let index = &mut *index;
        let Some(place) = index.places.get_mut(&self.number) else { return };
        place.out = false;
        if failed {
            index.failures += 1;
            if place.suspect || index.failures >= ROUNDS {
                place.suspect = true;
                index.failures = 0;
                index.passed = Some(self.number);
            }
        }
    }

    /// Writes down what the job has cost so far: its bound holds over all rounds. Blocks.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn spent(&self, usd: f64) -> io::Result<()> {
        let bytes = fs::read(path(&self.hold.dir, self.number))?;
        let record: Record = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
        let bytes = postcard::to_stdvec(&Record { spent_usd: usd, ..record }).map_err(io::Error::other)?;
        self.hold.write(self.number, &bytes)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut index = self.hold.lock();
        // Given back: it stays.
        if index.places.get(&self.number).is_some_and(|place| place.out) {
            index.places.remove(&self.number);
            index.done.push(self.number);
            (index.failures, index.passed) = (0, None);
            drop(index);
            self.hold.changed.notify_one();
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn path(dir: &Path, (since_ms, number): Number) -> PathBuf {
    dir.join(format!("{since_ms:014}-{number:06}.job"))
}

/// The inverse of [`path`].
fn number(path: &Path) -> Option<Number> {
    let (since_ms, number) = path.file_name()?.to_str()?.strip_suffix(".job")?.split_once('-')?;
    Some((since_ms.parse().ok()?, number.parse().ok()?))
}

impl Hold {
    /// Opens or makes the folder `held` in `dir`; jobs are held for `window`, none where it is zero.
    /// Those of an earlier run are there again.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn open(dir: &Path, window: Duration) -> io::Result<Self> {
        let dir = dir.join("held");
        fs::create_dir_all(&dir)?;
        let mut index = Index::default();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let Some(number) = number(&path) else {
                // What a crash left half written.
                if path.extension().is_some_and(|ending| ending == "new") {
                    fs::remove_file(&path)?;
                }
                continue;
            };
            let bytes = fs::read(&path)?;
            let key = postcard::from_bytes::<Record>(&bytes).ok().and_then(|record| record.key);
            index.places.insert(number, Place { bytes: bytes.len() as u64, key, out: false, suspect: false });
            index.next = index.next.max(number.1 + 1);
        }
        Ok(Hold { dir, window, index: Mutex::new(index), changed: Notify::new() })
    }

    /// The index is changed by single statements: whole even after a panic.
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether jobs are held at all.
    pub fn is_on(&self) -> bool {
        !self.window.is_zero()
    }

    /// Number of jobs held.
    pub fn len(&self) -> usize {
        self.lock().places.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the jobs held are known by.
    pub fn keys(&self) -> Vec<Key> {
        self.lock().places.values().filter_map(|place| place.key).collect()
    }

    /// Writes a job that has cost `spent_usd` so far; it is on the disk afterwards. Blocks.
    ///
    /// # Errors
    /// There is no room for it, or it cannot be written.
    pub fn keep(&self, job: &Job, reply_to: &ReplyTo, key: Option<Key>, spent_usd: f64) -> io::Result<()> {
        let record = Record {
            id: job.id.clone(),
            task: job.task.clone(),
            input: Input::clone(&job.input),
            wishes: job.wishes.clone(),
            reply_to: reply_to.clone(),
            key,
            since_ms: unix_ms().saturating_sub(job.received.elapsed().as_millis() as u64),
            spent_usd,
        };
        let bytes = postcard::to_stdvec(&record).map_err(io::Error::other)?;
        let number = {
            let mut index = self.lock();
            let held: u64 = index.places.values().map(|place| place.bytes).sum();
            if index.places.len() >= MAX_JOBS || held + bytes.len() as u64 > MAX_BYTES {
                return Err(io::Error::other(format!("{} jobs of {held} bytes are held already", index.places.len())));
            }
            let number = (record.since_ms, index.next);
            index.next += 1;
            // Its room is taken, and nobody takes it out before it is written.
            index.places.insert(number, Place { bytes: bytes.len() as u64, key, out: true, suspect: false });
            number
        };
        let written = self.write(number, &bytes);
        let mut index = self.lock();
        match &written {
            Ok(()) => {
                if let Some(place) = index.places.get_mut(&number) {
                    place.out = false;
                }
            }
            Err(_) => {
                index.places.remove(&number);
            }
        }
        drop(index);
        self.changed.notify_one();
        written
    }

    fn write(&self, number: Number, bytes: &[u8]) -> io::Result<()> {
        let place = path(&self.dir, number);
        let new = place.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_data()?;
        fs::rename(&new, &place)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Ends when a job was held or a reply accepted since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Jobs taken out whose replies are not yet accepted.
    pub fn out(&self) -> usize {
        self.lock().places.values().filter(|place| place.out).count()
    }

    /// Removes what is done and takes the oldest job out; none is left where there is none. Blocks.
    pub fn oldest(self: &Arc<Self>) -> Option<Held> {
        loop {
            let (done, oldest) = {
                let mut index = self.lock();
                let free = |place: &Place| !place.out;
                // After the last the first is the next again.
                if !index.places.iter().any(|(number, place)| Some(*number) > index.passed && free(place)) {
                    index.passed = None;
                }
                let passed = index.passed;
                let oldest = index.places.iter_mut().find(|(number, place)| Some(**number) > passed && free(place));
                let oldest = oldest.map(|(number, place)| {
                    place.out = true;
                    *number
                });
                (std::mem::take(&mut index.done), oldest)
            };
            for number in done {
                if let Err(error) = fs::remove_file(path(&self.dir, number)) {
                    tracing::warn!(?number, "a held job that was answered cannot be removed: {error}");
                }
            }
            let number = oldest?;
            let ticket = Ticket { hold: Arc::clone(self), number };
            let read = fs::read(path(&self.dir, number)).map_err(|error| error.to_string());
            match read.and_then(|bytes| postcard::from_bytes::<Record>(&bytes).map_err(|error| error.to_string())) {
                Ok(record) => {
                    let age = Duration::from_millis(unix_ms().saturating_sub(record.since_ms));
                    let received = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
                    let Record { id, task, input, wishes, reply_to, key, spent_usd, .. } = record;
                    let job = Job { id, task, input: Arc::new(input), wishes, received };
                    let left = self.window.saturating_sub(age);
                    return Some(Held { job, reply_to, key, left, spent_usd, ticket });
                }
                // The next look removes it.
                Err(error) => tracing::error!(?number, "a held job cannot be read and is given up: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str) -> Job {
        let mut wishes = Wishes { max_cost_usd: Some(0.5), ..Wishes::default() };
        wishes.params.insert("labels".to_owned(), serde_json::json!(["a", "b"]));
        Job {
            id: Some(id.to_owned()),
            task: "text.classify".to_owned(),
            input: Arc::new(Input::Text("x".to_owned())),
            wishes,
            received: Instant::now(),
        }
    }

    fn to() -> ReplyTo {
        ReplyTo { topic: "answers".to_owned(), correlation: Some(vec![1, 2]) }
    }

    #[test]
    fn the_oldest_comes_first_even_after_a_restart() {
        let dir = tempfile::tempdir().expect("a folder");
        let window = Duration::from_secs(60);
        let hold = Arc::new(Hold::open(dir.path(), window).expect("opens"));
        // In the order in which they came, not in that in which they were given up.
        let came = |id, ago_ms| Job { received: Instant::now() - Duration::from_millis(ago_ms), ..job(id) };
        for job in [came("two", 2000), came("one", 3000), came("three", 1000)] {
            hold.keep(&job, &to(), Some([7; 16]), 0.25).expect("kept");
        }
        let one = hold.oldest().expect("a job");
        assert_eq!((one.job.id.as_deref(), one.reply_to, one.key), (Some("one"), to(), Some([7; 16])));
        assert_eq!(one.job.wishes, job("one").wishes);
        assert!(one.left > window / 2);
        one.ticket.spent(0.375).expect("written");
        one.ticket.give_back(false);
        let one = hold.oldest().expect("a job");
        assert_eq!((one.job.id.as_deref(), one.spent_usd), (Some("one"), 0.375));
        let two = hold.oldest().expect("a job");
        assert_eq!((two.job.id.as_deref(), hold.out()), (Some("two"), 2));
        // The reply to the first is accepted; the second is still on its way when the process ends.
        drop(one.ticket);
        assert_eq!(hold.oldest().expect("a job").job.id.as_deref(), Some("three"));
        let left = tempfile::tempdir().expect("a folder");
        fs::create_dir(left.path().join("held")).expect("made");
        for entry in fs::read_dir(dir.path().join("held")).expect("a folder") {
            let path = entry.expect("an entry").path();
            fs::copy(&path, left.path().join("held").join(path.file_name().expect("a name"))).expect("copied");
        }
        let hold = Arc::new(Hold::open(left.path(), window).expect("opens"));
        assert_eq!((hold.len(), hold.keys().len()), (2, 2));
        assert_eq!(hold.oldest().expect("a job").job.id.as_deref(), Some("two"));
    }

    #[test]
    fn one_job_that_always_fails_does_not_keep_the_others() {
        let dir = tempfile::tempdir().expect("a folder");
        let hold = Arc::new(Hold::open(dir.path(), Duration::from_secs(60)).expect("opens"));
        let came = |id, ago_ms| Job { received: Instant::now() - Duration::from_millis(ago_ms), ..job(id) };
        for job in [came("bad", 4000), came("two", 3000), came("three", 2000)] {
            hold.keep(&job, &to(), None, 0.0).expect("kept");
        }
        let mut tried = Vec::new();
        for _ in 0..8 {
            let Some(held) = hold.oldest() else { break };
            let id = held.job.id.expect("an id");
            if id == "bad" {
                held.ticket.give_back(true)
            } else {
                drop(held.ticket)
            }
            tried.push(id);
        }
        assert_eq!(tried, ["bad", "bad", "bad", "two", "bad", "three", "bad", "bad"]);
        // While nothing gets through the order stays, but for the probe.
        hold.keep(&came("four", 1000), &to(), None, 0.0).expect("kept");
        let next = || hold.oldest().expect("a job");
        for id in ["four", "four", "four", "bad", "four"] {
            let held = next();
            assert_eq!(held.job.id.as_deref(), Some(id));
            held.ticket.give_back(true);
        }
    }

    #[test]
    fn what_cannot_be_read_is_given_up() {
        let dir = tempfile::tempdir().expect("a folder");
        fs::create_dir(dir.path().join("held")).expect("made");
        fs::write(path(&dir.path().join("held"), (5, 3)), b"\xff\xff").expect("written");
        fs::write(dir.path().join("held/00000000000005-000004.new"), b"half").expect("written");
        let hold = Arc::new(Hold::open(dir.path(), Duration::from_secs(1)).expect("opens"));
        hold.keep(&job("good"), &to(), None, 0.0).expect("kept");
        assert_eq!(hold.oldest().expect("a job").job.id.as_deref(), Some("good"));
        assert!(hold.oldest().is_none());
        assert_eq!(fs::read_dir(dir.path().join("held")).expect("a folder").count(), 0);
    }

    #[test]
    fn it_is_bounded() {
        let dir = tempfile::tempdir().expect("a folder");
        let hold = Hold::open(dir.path(), Duration::from_secs(1)).expect("opens");
        let large = Job { input: Arc::new(Input::Image(vec![0; 50 << 20])), ..job("large") };
        hold.keep(&large, &to(), None, 0.0).expect("kept");
        hold.keep(&large, &to(), None, 0.0).expect("kept");
        assert!(hold.keep(&large, &to(), None, 0.0).is_err());
        assert_eq!(hold.len(), 2);
    }
}
