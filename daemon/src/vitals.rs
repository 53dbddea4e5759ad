//! Signs of life: each part of the daemon beats while it waits and says when it works. What stands
//! still is found by how long it has been silent; systemd's watchdog is fed only while nothing does.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a part beats while it waits.
pub const BEAT: Duration = Duration::from_secs(1);

/// The process's parts: threads that begin deep inside the daemon enlist by themselves.
static PARTS: LazyLock<Parts> = LazyLock::new(|| Parts { start: Instant::now(), list: Mutex::default() });

struct Parts {
    start: Instant,
    list: Mutex<Vec<Arc<Part>>>,
}

#[derive(Debug)]
struct Part {
    name: String,
    /// Milliseconds since the start.
    beat_ms: AtomicU64,
    /// Silence that was announced at the last beat.
    allowed_ms: AtomicU64,
}

impl Parts {
    /// The list is only ever extended or shortened by whole parts.
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Part>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

/// A part's own pulse. A part that ends takes it away; one that panics leaves it behind, silent.
#[derive(Debug)]
pub struct Pulse(Arc<Part>);

impl Pulse {
    /// Enlists a part under `name`.
    pub fn of(name: &str) -> Self {
        let (beat_ms, allowed_ms) = (AtomicU64::new(PARTS.now_ms()), AtomicU64::new(0));
        let part = Arc::new(Part { name: name.to_owned(), beat_ms, allowed_ms });
        PARTS.lock().push(Arc::clone(&part));
        Pulse(part)
    }

    /// It moves, and will again within [`BEAT`].
    pub fn beat(&self) {
        self.busy(Duration::ZERO);
    }

    /// It moves, and begins something that may take it this much longer.
    pub fn busy(&self, longer: Duration) {
        self.0.allowed_ms.store(longer.as_millis() as u64, Ordering::Relaxed);
        self.0.beat_ms.store(PARTS.now_ms(), Ordering::Relaxed);
    }

    /// Beats for as long as `future` is awaited.
    pub async fn during<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        loop {
            self.beat();
            tokio::select! {
                biased;
                out = &mut future => return out,
                () = tokio::time::sleep(BEAT) => {}
            }
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            PARTS.lock().retain(|part| !Arc::ptr_eq(part, &self.0));
        }
    }
}

/// A part as it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its name.
    pub name: String,
    /// Time since it last moved.
    pub silent: Duration,
    /// What it had said it may take.
    pub allowed: Duration,
}

/// All parts, as they are now.
pub fn seen() -> Vec<Seen> {
    let now = PARTS.now_ms();
    let seen = |part: &Arc<Part>| Seen {
        name: part.name.clone(),
        silent: Duration::from_millis(now.saturating_sub(part.beat_ms.load(Ordering::Relaxed))),
        allowed: Duration::from_millis(part.allowed_ms.load(Ordering::Relaxed)),
    };
    PARTS.lock().iter().map(seen).collect()
}

/// The part that stands still for longest, if any does: silent for longer than it had said and
/// `patience` together.
pub fn stuck(parts: &[Seen], patience: Duration) -> Option<&Seen> {
    let over = |part: &Seen| part.silent.saturating_sub(part.allowed.saturating_add(patience));
    parts.iter().filter(|part| !over(part).is_zero()).max_by_key(|part| over(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_silent_for_too_long_is_stuck() {
        let part = |name: &str, silent, allowed| Seen {
            name: name.to_owned(),
            silent: Duration::from_secs(silent),
            allowed: Duration::from_secs(allowed),
        };
        let patience = Duration::from_secs(10);
        let rows: [(&[Seen], Option<&str>); 6] = [
            (&[], None),
            (&[part("link", 1, 0), part("store", 9, 0)], None),
            (&[part("link", 10, 0)], None),
            (&[part("link", 1, 0), part("run-0", 11, 0)], Some("run-0")),
            (&[part("run-0", 25, 20)], None),
            (&[part("run-0", 31, 20), part("store", 40, 0)], Some("store")),
        ];
        for (parts, wanted) in rows {
            assert_eq!(stuck(parts, patience).map(|part| part.name.as_str()), wanted, "{parts:?}");
        }
    }

    fn found(name: &str) -> Option<Seen> {
        seen().into_iter().find(|part| part.name == name)
    }

    #[test]
    fn a_part_is_seen_until_it_ends_and_stays_when_it_panics() {
        let pulse = Pulse::of("test-ends");
        pulse.busy(Duration::from_secs(7));
        assert_eq!(found("test-ends").map(|part| part.allowed), Some(Duration::from_secs(7)));
        drop(pulse);
        assert_eq!(found("test-ends"), None);
        let panics = std::thread::spawn(|| {
            let _pulse = Pulse::of("test-panics");
            panic!("on purpose");
        });
        assert!(panics.join().is_err());
        assert!(found("test-panics").is_some());
    }

    #[tokio::test]
    async fn waiting_beats() {
        let pulse = Pulse::of("test-waits");
        let wait = async {
            pulse.busy(Duration::from_secs(60));
            tokio::time::sleep(BEAT * 3 / 2).await;
            found("test-waits").expect("enlisted")
        };
        let part = pulse.during(wait).await;
        assert_eq!(part.allowed, Duration::ZERO, "a beat takes the permission back");
        assert!(part.silent < BEAT, "{part:?}");
    }
}
