//! How much of the heap a piece of work leaves taken: an allocator that counts, thread by thread.
//!
//! A plan's weights lie packed in places that no walk over the graph finds, so what a model takes is not added up
//! but counted while it is loaded. The figure is the same on every run that loads the same models in the same order.
#![allow(unsafe_code, reason = "an allocator is an unsafe trait; every call goes on to the system's")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static TAKEN: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting what each thread takes and gives back.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

/// What a block takes in most allocators: a header, and whole steps of 16 bytes.
fn block(bytes: usize) -> isize {
    (bytes.saturating_add(8 + 15) & !15).max(32) as isize
}

fn count(bytes: isize) {
    // A thread that ends may free after its own storage is gone.
    let _ = TAKEN.try_with(|taken| taken.set(taken.get().wrapping_add(bytes)));
}

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(block(layout.size()));
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(block(layout.size()));
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-block(layout.size()));
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(block(size) - block(layout.size()));
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Gives memory that was freed back to the system, where the allocator would keep it for later: loading a model takes
/// and frees many times what it leaves.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Does `work` and says how many bytes of the heap it left taken, by the calling thread.
pub fn left_by<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = TAKEN.get();
    let done = work();
    (done, TAKEN.get().wrapping_sub(before).max(0) as u64)
}

/// Bytes as MiB, to a thousandth.
pub fn mib(bytes: u64) -> f64 {
    (bytes as f64 / f64::from(1 << 20) * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_counted_and_what_goes_is_not() {
        let (kept, bytes) = left_by(|| {
            drop(vec![0_u8; 5 << 20]);
            let mut grown = vec![1_u8; 1 << 20];
            grown.reserve_exact(1 << 20);
            grown
        });
        assert_eq!(bytes, (2 << 20) + 16);
        let ((), bytes) = left_by(|| drop(kept));
        assert_eq!(bytes, 0);
    }

    #[test]
    fn other_threads_do_not_count() {
        let ((), bytes) = left_by(|| {
            std::thread::spawn(|| std::mem::forget(vec![0_u8; 1 << 20])).join().expect("ends");
        });
        assert!(bytes < 1 << 16, "{bytes}");
    }
}
