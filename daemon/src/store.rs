//! What must survive a crash: the replies given lately, so that a job seen twice is answered once.
//!
//! Append-only segments of checked records, written by one thread. A record is in the file before its
//! reply is published, so a killed process answers a redelivered job from here; the disk is flushed
//! about once a second, so a power cut can lose that much. Segments older than the window are
//! deleted, and so are the oldest ones beyond [`MAX_ENTRIES`] or [`MAX_BYTES`].

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::vitals::Pulse;

/// What a job is known by: 16 bytes of a SHA-256.
pub type Key = [u8; 16];

/// Most replies that are remembered.
pub const MAX_ENTRIES: usize = 100_000;
/// Most bytes that remembered replies take on disk.
pub const MAX_BYTES: u64 = 128 << 20;

const SEGMENT_BYTES: u64 = 8 << 20;
const SEGMENTS_IN_WINDOW: u32 = 8;
const HEADER: usize = 8;
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// A worn card may take this long for one write.
const SLOWEST_WRITE: Duration = Duration::from_secs(60);
/// Writes waiting for the thread; when it is full, replies wait.
const WRITES: usize = 256;

#[derive(Serialize, Deserialize)]
struct Record {
    key: Key,
    unix_ms: u64,
    payload: Vec<u8>,
}

struct Append {
    record: Record,
    done: oneshot::Sender<()>,
}

#[derive(Clone, Copy)]
struct Place {
    segment: u64,
    at: u64,
    len: u32,
}

struct Segment {
    id: u64,
    file: Arc<File>,
    bytes: u64,
    newest_ms: u64,
    keys: Vec<Key>,
}

#[derive(Default)]
struct Index {
    places: HashMap<Key, Place>,
    segments: VecDeque<Segment>,
}

/// Remembered replies.
pub struct Store {
    window: Duration,
    index: Arc<Mutex<Index>>,
    writes: Option<SyncSender<Append>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens or makes the store in `dir`, remembering replies for `window`.
    ///
    /// # Errors
    /// The folder cannot be made, read or written.
    pub fn open(dir: &Path, window: Duration) -> io::Result<Self> {
        let dir = dir.join("replies");
        fs::create_dir_all(&dir)?;
        let mut index = Index::default();
        let mut ids: Vec<u64> = fs::read_dir(&dir)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".log")?.parse().ok())
            .collect();
        ids.sort_unstable();
        for id in &ids {
            index.read_segment(&dir, *id)?;
        }
        // A new segment each start: what a crash left half written stays behind.
        let next = ids.last().map_or(0, |last| last + 1);
        index.start_segment(&dir, next)?;
        index.expire(&dir, window);

        let index = Arc::new(Mutex::new(index));
        let (writes, queue) = sync_channel(WRITES);
        let writer = Writer { dir, window, index: Arc::clone(&index), failing: false };
        let thread = std::thread::Builder::new().name("outpost-store".to_owned()).spawn(move || writer.work(&queue))?;
        Ok(Store { window, index, writes: Some(writes), thread: Some(thread) })
    }

    /// Remembers a reply; the future ends when it is in the file, or could not be written there, which
    /// is logged: answering goes before remembering.
    pub async fn put(&self, key: Key, payload: Vec<u8>) {
        let Some(writes) = &self.writes else { return };
        let (done, written) = oneshot::channel();
        let mut write = Append { record: Record { key, unix_ms: unix_ms(), payload }, done };
        loop {
            match writes.try_send(write) {
                Ok(()) => break,
                Err(std::sync::mpsc::TrySendError::Full(back)) => {
                    write = back;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(std::sync::mpsc::TrySendError::Disconnected(_)) => return,
            }
        }
        let _ = written.await;
    }

    /// The reply given for `key`, if it is still known. Reads the disk.
    pub fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let (place, file) = {
            let index = lock(&self.index);
            let place = *index.places.get(key)?;
            let segment = index.segments.iter().find(|segment| segment.id == place.segment)?;
            (place, Arc::clone(&segment.file))
        };
        let mut bytes = vec![0; place.len as usize];
        file.read_exact_at(&mut bytes, place.at).ok()?;
        let record = postcard::from_bytes::<Record>(&bytes).ok()?;
        let age_ms = unix_ms().saturating_sub(record.unix_ms);
        (u128::from(age_ms) <= self.window.as_millis()).then_some(record.payload)
    }

    /// Number of replies remembered.
    pub fn len(&self) -> usize {
        lock(&self.index).places.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.writes = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The index is only ever extended record by record, so it is whole even after a panic.
fn lock(index: &Mutex<Index>) -> MutexGuard<'_, Index> {
    index.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn path(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("{id:010}.log"))
}

impl Index {
    fn start_segment(&mut self, dir: &Path, id: u64) -> io::Result<()> {
        let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path(dir, id))?;
        self.segments.push_back(Segment { id, file: Arc::new(file), bytes: 0, newest_ms: unix_ms(), keys: Vec::new() });
        Ok(())
    }

    /// Reads records up to the first that is not whole.
    fn read_segment(&mut self, dir: &Path, id: u64) -> io::Result<()> {
        let mut file = File::open(path(dir, id))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut segment = Segment { id, file: Arc::new(file), bytes: 0, newest_ms: 0, keys: Vec::new() };
        let mut at = 0;
        while let Some((record, len)) = next_record(&bytes[at..]) {
            self.places.insert(record.key, Place { segment: id, at: (at + HEADER) as u64, len: len as u32 });
            segment.keys.push(record.key);
            segment.newest_ms = segment.newest_ms.max(record.unix_ms);
            at += HEADER + len;
        }
        if at < bytes.len() {
            tracing::warn!(segment = id, "the last record was cut short and is passed over");
        }
        segment.bytes = bytes.len() as u64;
        self.segments.push_back(segment);
        Ok(())
    }

    /// Drops segments that are older than the window or beyond the limits; never the newest.
    fn expire(&mut self, dir: &Path, window: Duration) {
        let oldest_ms = unix_ms().saturating_sub(window.as_millis() as u64);
        while self.segments.len() > 1 {
            let bytes: u64 = self.segments.iter().map(|segment| segment.bytes).sum();
            let first = &self.segments[0];
            if first.newest_ms >= oldest_ms && self.places.len() <= MAX_ENTRIES && bytes <= MAX_BYTES {
                break;
            }
            let Some(first) = self.segments.pop_front() else { break };
            for key in &first.keys {
                if self.places.get(key).is_some_and(|place| place.segment == first.id) {
                    self.places.remove(key);
                }
            }
            if let Err(error) = fs::remove_file(path(dir, first.id)) {
                tracing::warn!(segment = first.id, "cannot delete an old segment: {error}");
            }
        }
    }
}

/// A record and the length of its body, if `bytes` start with a whole one.
fn next_record(bytes: &[u8]) -> Option<(Record, usize)> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let body = rest.get(..u32::from_le_bytes(*len) as usize)?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    postcard::from_bytes(body).ok().map(|record| (record, body.len()))
}

struct Writer {
    dir: PathBuf,
    window: Duration,
    index: Arc<Mutex<Index>>,
    failing: bool,
}

impl Writer {
    fn work(mut self, queue: &Receiver<Append>) {
        let mut dirty_since: Option<Instant> = None;
        let mut segment_started = Instant::now();
        let pulse = Pulse::of("outpost-store");
        loop {
            pulse.beat();
            let first = match queue.recv_timeout(FLUSH_EVERY) {
                Ok(write) => Some(write),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            pulse.busy(SLOWEST_WRITE);
            // All that wait are written at once.
            let batch: Vec<Append> = first.into_iter().chain(queue.try_iter().take(WRITES)).collect();
            if !batch.is_empty() {
                self.append(&batch);
                dirty_since.get_or_insert_with(Instant::now);
            }
            for write in batch {
                let _ = write.done.send(());
            }
            if dirty_since.is_some_and(|since| since.elapsed() >= FLUSH_EVERY) {
                self.flush();
                dirty_since = None;
            }
            self.rotate(&mut segment_started);
        }
        self.flush();
    }

    fn append(&mut self, batch: &[Append]) {
        let mut bytes = Vec::new();
        let mut lengths = Vec::new();
        for write in batch {
            let Ok(body) = postcard::to_stdvec(&write.record) else { continue };
            bytes.extend((body.len() as u32).to_le_bytes());
            bytes.extend(crc32fast::hash(&body).to_le_bytes());
            bytes.extend(&body);
            lengths.push((write.record.key, body.len()));
        }
        let last = lock(&self.index).segments.back().map(|last| (last.id, last.bytes, Arc::clone(&last.file)));
        let Some((id, start, file)) = last else { return };
        // Only this thread appends, so the place found is still the end. What a failure left there is
        // written over by the next batch, or passed over at the next start.
        let written = file.write_all_at(&bytes, start);
        let mut index = lock(&self.index);
        match &written {
            Ok(()) if self.failing => tracing::info!("replies are remembered again"),
            Err(error) if !self.failing => {
                tracing::error!("replies are not remembered, a job seen twice may run twice: {error}");
            }
            _ => {}
        }
        self.failing = written.is_err();
        if written.is_err() {
            return;
        }
        let mut at = start;
        for (key, len) in lengths {
            index.places.insert(key, Place { segment: id, at: at + HEADER as u64, len: len as u32 });
            if let Some(segment) = index.segments.back_mut() {
                segment.keys.push(key);
                segment.newest_ms = unix_ms();
            }
            at += (HEADER + len) as u64;
        }
        if let Some(segment) = index.segments.back_mut() {
            segment.bytes = at;
        }
    }

    fn flush(&self) {
        let file = lock(&self.index).segments.back().map(|segment| Arc::clone(&segment.file));
        if let Some(Err(error)) = file.map(|file| file.sync_data()) {
            tracing::warn!("replies are not flushed to the disk: {error}");
        }
    }

    fn rotate(&mut self, started: &mut Instant) {
        let mut index = lock(&self.index);
        index.expire(&self.dir, self.window);
        let Some(last) = index.segments.back() else { return };
        let old = started.elapsed() > self.window / SEGMENTS_IN_WINDOW;
        let full = last.bytes >= SEGMENT_BYTES || last.keys.len() >= MAX_ENTRIES / SEGMENTS_IN_WINDOW as usize;
        if full || (old && last.bytes > 0) {
            let next = last.id + 1;
            match index.start_segment(&self.dir, next) {
                Ok(()) => *started = Instant::now(),
                Err(error) if !self.failing => tracing::warn!("no new segment: {error}"),
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Key {
        let mut key = [0; 16];
        key[..4].copy_from_slice(&n.to_le_bytes());
        key
    }

    #[tokio::test]
    async fn survives_reopening_and_a_cut_tail() {
        let dir = tempfile::tempdir().expect("a folder");
        let window = Duration::from_secs(60);
        let store = Store::open(dir.path(), window).expect("opens");
        for n in 0..100 {
            store.put(key(n), format!("reply {n}").into_bytes()).await;
        }
        assert_eq!(store.get(&key(42)), Some(b"reply 42".to_vec()));
        drop(store);

        let file = fs::read_dir(dir.path().join("replies")).expect("folder").flatten().next().expect("a file").path();
        let whole = fs::read(&file).expect("read");
        fs::write(&file, &whole[..whole.len() - 3]).expect("write");
        let store = Store::open(dir.path(), window).expect("opens");
        assert_eq!(store.len(), 99);
        assert_eq!(store.get(&key(98)), Some(b"reply 98".to_vec()));
        assert_eq!(store.get(&key(99)), None);
        store.put(key(99), b"again".to_vec()).await;
        assert_eq!(store.get(&key(99)), Some(b"again".to_vec()));
    }

    #[tokio::test]
    async fn forgets_after_the_window() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = Store::open(dir.path(), Duration::from_millis(1)).expect("opens");
        store.put(key(1), b"x".to_vec()).await;
        drop(store);
        std::thread::sleep(Duration::from_millis(20));
        let store = Store::open(dir.path(), Duration::from_millis(1)).expect("opens");
        assert_eq!(store.get(&key(1)), None);
        let files = fs::read_dir(dir.path().join("replies")).expect("folder").count();
        assert!(files <= 3, "{files} segments are left");
    }
}
