//! What systemd is told: ready, stopping. Nothing without the feature,
//! or where no systemd listens.

#[cfg(feature = "systemd")]
use systemd::daemon;

/// The node takes jobs; `status` is shown by `systemctl status`.
pub fn ready(status: &str) {
    #[cfg(feature = "systemd")]
    notify(&[(daemon::STATE_READY, "1"), (daemon::STATE_STATUS, status)]);
    #[cfg(not(feature = "systemd"))]
    let _ = status;
}

/// The node finishes what it has.
pub fn stopping() {
    #[cfg(feature = "systemd")]
    notify(&[(daemon::STATE_STOPPING, "1"), (daemon::STATE_STATUS, "draining")]);
}

#[cfg(feature = "systemd")]
fn notify(state: &[(&str, &str)]) {
    if let Err(error) = daemon::notify(state.iter()) {
        tracing::warn!("systemd cannot be told: {error}");
    }
}
