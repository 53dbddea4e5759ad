//! What systemd is told: ready, reloading, stopping, how it goes, and that every part moves. Nothing
//! without the feature, or where no systemd listens.

use std::time::Duration;

use crate::vitals;

/// Exit status for a configuration that cannot be used, where systemd started the daemon: its unit says
/// `RestartPreventExitStatus=78`, so nothing is tried again until someone has changed the file.
pub const EXIT_CONFIG: u8 = 78;

/// Whether systemd started this process and awaits its word.
pub fn listens() -> bool {
    cfg!(feature = "systemd") && std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// The node takes jobs, or says in `status` why it cannot yet.
pub fn ready(status: &str) {
    notify(&[("READY", "1"), ("STATUS", status)]);
}

/// How it goes, for `systemctl status`.
pub fn status(status: &str) {
    notify(&[("STATUS", status)]);
}

/// Settings and models are being read again; [`ready`] ends it.
pub fn reloading() {
    // systemd 253 and later want to know which of several reloads has ended.
    notify(&[("RELOADING", "1"), ("MONOTONIC_USEC", &monotonic_us().to_string()), ("STATUS", "reloading")]);
}

/// The node finishes what it has.
pub fn stopping() {
    notify(&[("STOPPING", "1"), ("STATUS", "draining: jobs in hand are answered, no more are taken")]);
}

/// Feeds the watchdog while every part moves; comes back at once where systemd asked for none.
pub async fn feed_watchdog() {
    let Some(period) = watchdog() else { return };
    let mut every = tokio::time::interval(period / 4);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        every.tick().await;
        let parts = vitals::seen();
        match vitals::stuck(&parts, period / 2) {
            None => {
                told = None;
                notify(&[("WATCHDOG", "1")]);
            }
            Some(part) => {
                let silent_s = part.silent.as_secs();
                status(&format!("stuck: {} has not moved for {silent_s} s", part.name));
                if told.as_ref() != Some(&part.name) {
                    tracing::error!(part = part.name, silent_s, "stuck: the watchdog is not fed");
                    told = Some(part.name.clone());
                }
            }
        }
    }
}

#[cfg(feature = "systemd")]
fn notify(state: &[(&str, &str)]) {
    if let Err(error) = systemd::daemon::notify(state.iter()) {
        tracing::warn!("systemd cannot be told: {error}");
    }
}

#[cfg(not(feature = "systemd"))]
fn notify(_state: &[(&str, &str)]) {}

/// How long systemd waits for a sign of life, if it does.
fn watchdog() -> Option<Duration> {
    #[cfg(feature = "systemd")]
    return systemd::daemon::watchdog_enabled().ok().filter(|us| *us > 0).map(Duration::from_micros);
    #[cfg(not(feature = "systemd"))]
    None
}

fn monotonic_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    #[allow(unsafe_code, reason = "std does not tell the clock that systemd compares with")]
    // SAFETY: the pointer is to a timespec of this frame, which the call fills in.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    if done == 0 { now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000 } else { 0 }
}
