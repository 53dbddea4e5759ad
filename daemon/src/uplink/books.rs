//! The books: spent money and the audit file, kept on disk by a thread of their own.
//!
//! Before a request leaves, its cost is reserved and what is being sent is noted in `uplink.json`; what
//! cannot be noted is not sent. When its job is done with the provider, one line goes to `audit.jsonl`.
//! After a crash the notes that are left become lines whose bill is counted in full.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::money::{self, Budgets, JobPurse, Nano, Purse, Short, Tokens};

/// Lines that wait for a disk that takes none; beyond it the oldest are lost, and the log says so.
const LINES: usize = 10_000;
/// Changes that nobody waits for are written together.
const GATHER: Duration = Duration::from_millis(50);
/// End of the audit file that is read at the start, to know which lines are there already, bytes.
const TAIL: u64 = 1 << 20;
const DAY_S: u64 = 24 * 3600;

/// A line of the audit file. Never the content of a job, nor of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// When the first request left: RFC 3339, UTC.
    pub at: String,
    /// Number of the call; no two have the same.
    pub call: u64,
    /// The job's id.
    pub job: Option<String>,
    /// Task.
    pub task: String,
    /// The provider's name in the configuration.
    pub provider: String,
    /// The model that was asked for.
    pub model: String,
    /// Bytes of the request's body.
    pub bytes: u64,
    /// SHA-256 of the request's body, hexadecimal.
    pub sha256: String,
    /// Requests that left; each had the same body.
    pub requests: u32,
    /// Tokens read, by the provider's own count.
    pub input_tokens: u64,
    /// Of these, those of its prompt cache.
    pub cached_tokens: u64,
    /// Tokens written, by the provider's own count.
    pub output_tokens: u64,
    /// Cost, US dollars; where the provider sent no bill, what was reserved.
    pub cost_usd: f64,
    /// What came of it: `answered`, or the kind of failure.
    pub outcome: String,
}

/// A call on its way, as noted before it leaves.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Note {
    line: Line,
    reserved: Nano,
    spent: Nano,
}

/// What is in `uplink.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    purse: Purse,
    next_call: u64,
    open: Vec<Note>,
}

#[derive(Default)]
struct State {
    purse: Purse,
    next_call: u64,
    open: BTreeMap<u64, Note>,
    lines: VecDeque<Line>,
    /// Counts changes.
    version: u64,
    /// Somebody waits for the change to be written.
    urgent: bool,
    dirty: bool,
    closing: bool,
}

struct Shared {
    budgets: Budgets,
    state: Mutex<State>,
    wake: Condvar,
    /// Something was settled: there may be room for a reservation.
    settled: Notify,
    /// The last version written, and whether it could be.
    written: watch::Sender<(u64, bool)>,
    on_disk: bool,
}

impl Shared {
    /// Every change below is made whole before anything that could panic.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, state: &mut State, urgent: bool) -> u64 {
        state.version += 1;
        if self.on_disk {
            state.dirty = true;
            state.urgent |= urgent;
            self.wake.notify_one();
        } else {
            state.lines.clear();
        }
        state.version
    }
}

/// The books of a node.
pub struct Books {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Why a request may not leave.
#[derive(Debug, Clone, PartialEq)]
pub enum Denied {
    /// A budget of the day does not allow it.
    Budget {
        /// `node` or `task`.
        of: &'static str,
        /// The budget, US dollars.
        budget_usd: f64,
        /// What is left of it, US dollars.
        left_usd: f64,
    },
    /// The job may not cost that much.
    Job,
    /// It could not be noted on the disk.
    Unrecorded,
}

/// What was spent today, and what is left.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Account {
    /// Spent today (UTC), US dollars.
    pub spent_usd: f64,
    /// Left of the node's budget; none where there is no budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_usd: Option<f64>,
    /// The same by task, for those that have spent or have a budget.
    pub task: BTreeMap<String, TaskAccount>,
}

/// One task's share.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskAccount {
    /// Spent today (UTC), US dollars.
    pub spent_usd: f64,
    /// Left of its budget; none where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_usd: Option<f64>,
}

impl Books {
    /// Books that are kept in memory alone, without budgets: for tools that send nothing.
    pub fn in_memory() -> Self {
        Books { shared: Arc::new(shared(State::default(), Budgets::default(), false)), thread: None }
    }

    /// Opens the books in `dir`, which is made if need be.
    ///
    /// # Errors
    /// The folder or its files cannot be read or written. A file that is not whole is an error, too: a
    /// budget that is forgotten does not bind.
    pub fn open(dir: &Path, budgets: Budgets) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let paths = (dir.join("uplink.json"), dir.join("audit.jsonl"));
        let saved: Saved = match fs::read(&paths.0) {
            Ok(bytes) => serde_json::from_slice(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Saved::default(),
            Err(error) => return Err(error),
        };
        let mut state = State { purse: saved.purse, next_call: saved.next_call, ..State::default() };
        let mut lines = Vec::new();
        let known = if saved.open.is_empty() { HashSet::new() } else { calls_in(&paths.1)? };
        for Note { mut line, reserved, spent } in saved.open {
            // The bill is unknown, so it is counted in full.
            state.purse.settle(&line.task, 0, reserved);
            line.cost_usd = money::usd(spent + reserved);
            line.outcome = "interrupted".to_owned();
            if !known.contains(&line.call) {
                lines.push(line);
            }
        }
        let shared = Arc::new(shared(state, budgets, true));
        let writer = Writer { shared: Arc::clone(&shared), paths, failing: false };
        // The lines first: a crash in between finds them known. And both find out whether the folder
        // can be written.
        writer.append(&lines)?;
        writer.save(&shared.lock().saved())?;
        let thread = std::thread::Builder::new().name("outpost-books".to_owned()).spawn(move || writer.work())?;
        Ok(Books { shared, thread: Some(thread) })
    }

    /// Begins a call: what is going to leave, and to whom.
    pub fn call<'a>(&self, purse: &'a JobPurse, mut line: Line) -> Call<'a> {
        let call = {
            let mut state = self.shared.lock();
            state.next_call += 1;
            state.next_call
        };
        line.call = call;
        let note = Note { line, reserved: 0, spent: 0 };
        Call { shared: Arc::clone(&self.shared), purse, note, left: false, outcome: "abandoned" }
    }

    /// Ends when all changes so far are on the disk, or could not be written.
    pub async fn written(&self) {
        if self.shared.on_disk {
            let version = self.shared.change(&mut self.shared.lock(), true);
            let mut written = self.shared.written.subscribe();
            // The sender lives in what this borrows.
            let _ = written.wait_for(|(done, _)| *done >= version).await;
        }
    }

    /// What may still be spent on `task` today, US dollars; none where there is no budget.
    pub fn left_usd(&self, task: &str) -> Option<f64> {
        let mut state = self.shared.lock();
        state.purse.turn(today());
        state.purse.left(&self.shared.budgets, task).map(money::usd)
    }

    /// Of the budget that is nearest to its end: what is not yet spent, and the whole, US dollars. What is
    /// reserved for jobs on their way may come back, so it is not taken off.
    pub fn unspent_usd(&self, task: &str) -> Option<(f64, f64)> {
        let mut state = self.shared.lock();
        state.purse.turn(today());
        let (budgets, spent) = (&self.shared.budgets, state.purse.spent());
        let node = budgets.node.map(|budget| (budget, spent.values().sum::<Nano>()));
        let own = budgets.task.get(task).map(|budget| (*budget, spent.get(task).copied().unwrap_or(0)));
        let left = node.into_iter().chain(own).map(|(budget, spent)| (budget.saturating_sub(spent), budget));
        left.min().map(|(left, budget)| (money::usd(left), money::usd(budget)))
    }

    /// Spent and left.
    pub fn account(&self) -> Account {
        let mut state = self.shared.lock();
        state.purse.turn(today());
        let budgets = &self.shared.budgets;
        let spent = state.purse.spent();
        let names: std::collections::BTreeSet<&String> = spent.keys().chain(budgets.task.keys()).collect();
        let left = |budget: Option<Nano>, spent: Nano| budget.map(|budget| money::usd(budget.saturating_sub(spent)));
        let all = spent.values().sum();
        let task = names.into_iter().map(|name| {
            let spent = spent.get(name).copied().unwrap_or(0);
            let left_usd = left(budgets.task.get(name).copied(), spent);
            (name.clone(), TaskAccount { spent_usd: money::usd(spent), left_usd })
        });
        Account { spent_usd: money::usd(all), left_usd: left(budgets.node, all), task: task.collect() }
    }
}

impl Drop for Books {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn shared(state: State, budgets: Budgets, on_disk: bool) -> Shared {
    Shared {
        budgets,
        state: Mutex::new(state),
        wake: Condvar::new(),
        settled: Notify::new(),
        written: watch::channel((0, true)).0,
        on_disk,
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn today() -> u64 {
    since_1970().as_secs() / DAY_S
}

/// Now, as RFC 3339 in UTC with milliseconds.
pub fn now() -> String {
    let since = since_1970();
    let (days, second) = (since.as_secs() / DAY_S, since.as_secs() % DAY_S);
    // Days to a date, by Howard Hinnant's "chrono-compatible low-level date algorithms".
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{:03}Z", second % 60, since.subsec_millis())
}

/// The calls whose lines are at the end of the audit file.
fn calls_in(path: &Path) -> io::Result<HashSet<u64>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashSet::new()),
        Err(error) => return Err(error),
    };
    let start = file.metadata()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let call = |line: &[u8]| serde_json::from_slice::<Line>(line).ok().map(|line| line.call);
    Ok(bytes.split(|byte| *byte == b'\n').filter_map(call).collect())
}

impl State {
    fn saved(&self) -> Saved {
        Saved { purse: self.purse.clone(), next_call: self.next_call, open: self.open.values().cloned().collect() }
    }
}

/// A job with a provider: reserves, settles, and leaves one line when dropped, if anything left.
pub struct Call<'a> {
    shared: Arc<Shared>,
    purse: &'a JobPurse,
    note: Note,
    /// A request has left whose bill is open.
    left: bool,
    outcome: &'static str,
}

impl Call<'_> {
    /// Reserves what a request costs at most and notes it; the request may leave after this.
    ///
    /// Waits while other requests hold reservations that may turn out cheaper.
    ///
    /// # Errors
    /// See [`Denied`]; nothing is reserved then.
    pub async fn reserve(&mut self, amount: Nano) -> Result<(), Denied> {
        if !self.purse.reserve(amount) {
            return Err(Denied::Job);
        }
        // From here on the drop gives back what is reserved.
        self.note.reserved = amount;
        let shared = Arc::clone(&self.shared);
        let version = loop {
            let settled = shared.settled.notified();
            tokio::pin!(settled);
            // Before the look at the purse: a settlement in between is not missed.
            settled.as_mut().enable();
            match self.try_reserve(amount) {
                Ok(version) => break version,
                Err(Short::Reserved) => settled.await,
                Err(Short::Spent { of, budget, left }) => {
                    self.note.reserved = 0;
                    self.purse.settle(amount, 0);
                    return Err(Denied::Budget { of, budget_usd: money::usd(budget), left_usd: money::usd(left) });
                }
            }
        };
        if self.shared.on_disk {
            let mut written = self.shared.written.subscribe();
            let ok = written.wait_for(|(done, _)| *done >= version).await.is_ok_and(|done| done.1);
            if !ok {
                self.settle(0, Tokens::default());
                return Err(Denied::Unrecorded);
            }
        }
        self.note.line.requests += 1;
        self.left = true;
        Ok(())
    }

    fn try_reserve(&mut self, amount: Nano) -> Result<u64, Short> {
        let mut state = self.shared.lock();
        state.purse.turn(today());
        state.purse.reserve(&self.shared.budgets, &self.note.line.task, amount)?;
        let mut note = self.note.clone();
        note.line.requests += 1;
        state.open.insert(note.line.call, note);
        Ok(self.shared.change(&mut state, true))
    }

    /// The request's bill is known.
    pub fn settle(&mut self, spent: Nano, tokens: Tokens) {
        let line = &mut self.note.line;
        line.input_tokens += tokens.input;
        line.cached_tokens += tokens.cached;
        line.output_tokens += tokens.output;
        self.close(spent);
    }

    /// The request's bill is not known: it is counted in full.
    pub fn in_doubt(&mut self) {
        self.close(self.note.reserved);
    }

    /// Nothing left: no connection was made.
    pub fn not_sent(&mut self) {
        self.note.line.requests = self.note.line.requests.saturating_sub(1);
        self.close(0);
    }

    /// What came of the call.
    pub fn ends(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }

    fn close(&mut self, spent: Nano) {
        self.left = false;
        let reserved = std::mem::take(&mut self.note.reserved);
        self.note.spent += spent;
        self.purse.settle(reserved, spent);
        let mut state = self.shared.lock();
        // A reservation that never came through is in no note.
        if state.open.remove(&self.note.line.call).is_some() {
            state.purse.turn(today());
            state.purse.settle(&self.note.line.task, reserved, spent);
            self.shared.change(&mut state, false);
        }
        drop(state);
        self.shared.settled.notify_waiters();
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        // Dropped on its way, at the deadline or by a faster provider: what has left may be billed.
        let spent = if self.left { self.note.reserved } else { 0 };
        self.close(spent);
        if self.note.line.requests == 0 {
            return;
        }
        let mut line = self.note.line.clone();
        line.cost_usd = money::usd(self.note.spent);
        line.outcome = self.outcome.to_owned();
        let mut state = self.shared.lock();
        state.lines.push_back(line);
        if state.lines.len() > LINES {
            tracing::error!("a line of the audit file is lost: the disk has taken none for {LINES} calls");
            state.lines.pop_front();
        }
        self.shared.change(&mut state, false);
    }
}

struct Writer {
    shared: Arc<Shared>,
    /// The saved state, and the audit file.
    paths: (PathBuf, PathBuf),
    failing: bool,
}

impl Writer {
    fn work(mut self) {
        loop {
            let (version, saved, lines, closing) = {
                let state = self.shared.lock();
                let idle = |state: &mut State| !state.dirty && !state.closing;
                let state = self.shared.wake.wait_while(state, idle).unwrap_or_else(PoisonError::into_inner);
                let calm = |state: &mut State| !state.urgent && !state.closing;
                let waited = self.shared.wake.wait_timeout_while(state, GATHER, calm);
                let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
                state.dirty = false;
                state.urgent = false;
                let lines: Vec<Line> = state.lines.iter().cloned().collect();
                (state.version, state.saved(), lines, state.closing)
            };
            let result = self.append(&lines).and_then(|()| self.save(&saved));
            if let Err(error) = &result
                && !self.failing
            {
                tracing::error!("nothing is sent up until it can be recorded: {}: {error}", self.paths.0.display());
            }
            if self.failing && result.is_ok() {
                tracing::info!("what is sent up is recorded again");
            }
            self.failing = result.is_err();
            let mut state = self.shared.lock();
            // What could not be written is tried again with the next change.
            if result.is_ok() {
                state.lines.drain(..lines.len());
            }
            drop(state);
            self.shared.written.send_replace((version, result.is_ok()));
            if closing {
                return;
            }
        }
    }

    /// Opened for each batch, so that it may be moved away meanwhile.
    fn append(&self, lines: &[Line]) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.paths.1)?;
        let mut bytes = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut bytes, line)?;
            bytes.push(b'\n');
        }
        let before = file.metadata()?.len();
        if let Err(error) = file.write_all(&bytes) {
            // Half a line would spoil the next one.
            file.set_len(before)?;
            return Err(error);
        }
        file.sync_data()
    }

    /// In one piece or not at all.
    fn save(&self, saved: &Saved) -> io::Result<()> {
        let new = self.paths.0.with_extension("json.new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        serde_json::to_writer(&mut file, saved)?;
        file.sync_data()?;
        fs::rename(&new, &self.paths.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(job: &str) -> Line {
        Line {
            at: now(),
            call: 0,
            job: Some(job.to_owned()),
            task: "t".to_owned(),
            provider: "p".to_owned(),
            model: "m".to_owned(),
            bytes: 3,
            sha256: "00".to_owned(),
            requests: 0,
            input_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            cost_usd: 0.0,
            outcome: String::new(),
        }
    }

    fn budget(usd: f64) -> Budgets {
        Budgets { node: Some(money::nano(usd)), ..Budgets::default() }
    }

    fn audit(dir: &Path) -> Vec<Line> {
        let text = fs::read_to_string(dir.join("audit.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a line")).collect()
    }

    #[tokio::test]
    async fn a_call_leaves_one_line_and_its_cost() {
        let dir = tempfile::tempdir().expect("a folder");
        let books = Books::open(dir.path(), budget(1.0)).expect("opens");
        let job = JobPurse::new(None);
        let mut call = books.call(&job, line("a\nb"));
        call.reserve(money::nano(0.5)).await.expect("room");
        call.in_doubt();
        call.reserve(money::nano(0.5)).await.expect("room");
        call.settle(money::nano(0.1), Tokens { input: 10, output: 2, ..Tokens::default() });
        call.ends("answered");
        drop(call);
        let unsent = books.call(&job, line("never left"));
        drop(unsent);
        assert_eq!(job.cost_usd(), 0.6);
        drop(books);
        let lines = audit(dir.path());
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!((lines[0].requests, lines[0].input_tokens, lines[0].cost_usd), (2, 10, 0.6));
        assert_eq!(lines[0].outcome, "answered");
        let books = Books::open(dir.path(), budget(1.0)).expect("opens");
        assert_eq!(books.left_usd("t"), Some(0.4));
        assert_eq!(books.account().task["t"].spent_usd, 0.6);
    }

    #[tokio::test]
    async fn a_crash_counts_what_was_on_its_way() {
        let dir = tempfile::tempdir().expect("a folder");
        let books = Books::open(dir.path(), budget(1.0)).expect("opens");
        let job = JobPurse::new(None);
        let mut call = books.call(&job, line("lost"));
        call.reserve(money::nano(0.3)).await.expect("room");
        // What is on the disk now is what a killed process would leave.
        let left = tempfile::tempdir().expect("a folder");
        fs::copy(dir.path().join("uplink.json"), left.path().join("uplink.json")).expect("copied");
        for _ in 0..2 {
            let books = Books::open(left.path(), budget(1.0)).expect("opens");
            assert_eq!(books.left_usd("t"), Some(0.7));
            drop(books);
            let lines = audit(left.path());
            assert_eq!(lines.len(), 1, "{lines:?}");
            assert_eq!((lines[0].outcome.as_str(), lines[0].cost_usd), ("interrupted", 0.3));
        }
    }

    #[tokio::test]
    async fn what_cannot_be_noted_does_not_leave() {
        let dir = tempfile::tempdir().expect("a folder");
        let books = Books::open(dir.path(), budget(1.0)).expect("opens");
        let job = JobPurse::new(None);
        fs::remove_file(dir.path().join("uplink.json")).expect("removed");
        fs::create_dir(dir.path().join("uplink.json")).expect("in the way");
        let mut call = books.call(&job, line("x"));
        assert_eq!(call.reserve(5).await, Err(Denied::Unrecorded));
        fs::remove_dir(dir.path().join("uplink.json")).expect("removed");
        assert_eq!(call.reserve(5).await, Ok(()));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn sixty_four_at_once_never_overspend() {
        let dir = tempfile::tempdir().expect("a folder");
        let books = Arc::new(Books::open(dir.path(), budget(1.0)).expect("opens"));
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..64_u64 {
            let books = Arc::clone(&books);
            tasks.spawn(async move {
                let mut answered = 0;
                for round in 0..4 {
                    let job = JobPurse::new(None);
                    let mut call = books.call(&job, line(&format!("{n}-{round}")));
                    if call.reserve(money::nano(0.05)).await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(n % 7)).await;
                        call.settle(money::nano(0.009), Tokens::default());
                        answered += 1;
                    }
                }
                answered
            });
        }
        let answered: u64 = tasks.join_all().await.into_iter().sum();
        let spent = books.account().spent_usd;
        assert!(spent <= 1.0, "{spent}");
        // All but the last reservation's width is used: none is denied while it might still fit.
        assert!(spent > 1.0 - 0.05 - 0.009, "{spent} after {answered}");
        assert_eq!(money::nano(spent), answered * money::nano(0.009));
    }

    #[test]
    fn dates() {
        let text = now();
        assert_eq!(text.len(), "2026-01-01T00:00:00.000Z".len(), "{text}");
        let then = httpdate::fmt_http_date(SystemTime::now());
        assert!(then.contains(&text[..4]) && then.contains(&text[8..10]), "{text} is not {then}");
    }
}
