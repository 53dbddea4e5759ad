//! The unit files and the program hold together; with the feature `systemd`, what systemd is told.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The settings of a unit file's section `[Service]`; of several of one name the last.
fn service(name: &str) -> BTreeMap<String, String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd").join(name);
    let text = std::fs::read_to_string(&file).expect(name);
    let section = text.split("[Service]").nth(1).expect("a section").split("\n[").next().expect("its lines");
    let setting =
        |line: &str| line.split_once('=').map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
    section.lines().filter(|line| !line.starts_with('#')).filter_map(setting).collect()
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs(text.trim_end_matches('s').parse().expect("seconds"))
}

#[test]
fn units_agree_with_the_program() {
    for name in ["outpost.service", "outpost@.service"] {
        let service = service(name);
        let get = |key: &str| service.get(key).unwrap_or_else(|| panic!("{name} has no {key}")).as_str();
        let prevented: Vec<u8> =
            get("RestartPreventExitStatus").split(' ').map(|n| n.parse().expect("a number")).collect();
        assert!(prevented.contains(&outpost::systemd::EXIT_CONFIG), "{name}: {prevented:?}");
        // 1 is also what passes by itself, such as a full disk.
        assert!(!prevented.contains(&1), "{name}: {prevented:?}");
        // Killed in the middle of its farewell, the node would leave jobs undecided until the next start.
        assert!(seconds(get("TimeoutStopSec")) > outpost::app::DRAIN + Duration::from_secs(5), "{name}");
        // A part beats every second, and counts as stuck after half of this.
        assert!(seconds(get("WatchdogSec")) >= outpost::vitals::BEAT * 10, "{name}");
        assert_eq!(get("StateDirectory").split(' ').next(), Some("outpost"), "{name}");
    }
}

#[test]
fn the_configuration_that_packages_install_is_all_defaults() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd/outpost.toml");
    let text = std::fs::read_to_string(file).expect("outpost.toml");
    let config = outpost::config::Config::parse(&text, []).expect("valid");
    assert!(!config.broker.chosen);
    assert_eq!(config.notes, Vec::<String>::new());
    // What it shows as examples is valid as well.
    let examples: String = text
        .lines()
        .map(|line| line.strip_prefix("# ").filter(|rest| is_setting(rest)).unwrap_or(line))
        .map(|line| format!("{line}\n"))
        .collect();
    let examples = examples.replace("listen = \"127.0.0.1:1883\"", "");
    let config = outpost::config::Config::parse(&examples, []).unwrap_or_else(|wrong| panic!("{wrong:?}"));
    assert_eq!(config.uplink.providers.len(), 1);
}

fn is_setting(line: &str) -> bool {
    line.starts_with('[')
        || line.split_once(" = ").is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
}

#[cfg(feature = "systemd")]
mod notified {
    use std::os::unix::net::UnixDatagram;
    use std::time::Instant;

    use super::Duration;
    use crate::common::*;

    /// Stands where systemd listens.
    struct Systemd {
        socket: UnixDatagram,
        dir: tempfile::TempDir,
        heard: Vec<String>,
    }

    impl Systemd {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            let socket = UnixDatagram::bind(dir.path().join("notify")).expect("a socket");
            socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
            Systemd { socket, dir, heard: Vec::new() }
        }

        fn env(&self) -> Vec<(String, String)> {
            let path = self.dir.path().join("notify").display().to_string();
            vec![("NOTIFY_SOCKET".to_owned(), path), ("WATCHDOG_USEC".to_owned(), "2000000".to_owned())]
        }

        /// What is said within `limit`, or until `done`.
        fn listen(&mut self, limit: Duration, done: impl Fn(&str) -> bool) -> bool {
            let until = Instant::now() + limit;
            let mut bytes = [0; 4096];
            while Instant::now() < until {
                let Ok(len) = self.socket.recv(&mut bytes) else { continue };
                let text = String::from_utf8_lossy(&bytes[..len]).into_owned();
                let found = done(&text);
                self.heard.push(text);
                if found {
                    return true;
                }
            }
            false
        }

        fn hears(&mut self, part: &str) {
            let found = self.listen(PATIENCE, |text| text.lines().any(|line| line.starts_with(part)));
            assert!(found, "{part}: {:#?}", self.heard);
        }

        fn is_silent_about(&mut self, part: &str, limit: Duration) {
            let found = self.listen(limit, |text| text.contains(part));
            assert!(!found, "{:#?}", self.heard);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn systemd_is_told_the_truth() {
        let mut broker = Mosquitto::start();
        broker.stop();
        let mut systemd = Systemd::new();
        let env = systemd.env();
        let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let mut daemon = Daemon::prepare("n", &broker.url(), "", &models_dir(), &env);
        daemon.spawn();
        systemd.hears("STATUS=no connection to");
        systemd.is_silent_about("READY=1", Duration::from_secs(2));
        broker.restart();
        systemd.hears("READY=1");
        systemd.hears("STATUS=online at");
        systemd.hears("WATCHDOG=1");
        systemd.hears("WATCHDOG=1");

        daemon.signal("HUP");
        systemd.hears("RELOADING=1");
        let reloading = systemd.heard.last().expect("a message");
        assert!(reloading.contains("\nMONOTONIC_USEC="), "{reloading}");
        systemd.hears("READY=1");

        daemon.signal("STOP");
        // What was on its way comes first.
        systemd.listen(Duration::from_millis(200), |_| false);
        systemd.is_silent_about("WATCHDOG=1", Duration::from_secs(2));
        daemon.signal("CONT");
        systemd.hears("WATCHDOG=1");

        let stopped = daemon.terminate().await;
        systemd.hears("STOPPING=1");
        assert_eq!(stopped, Some(0), "{}", daemon.log());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_wrong_configuration_is_not_to_be_tried_again() {
        let mut systemd = Systemd::new();
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("outpost.toml");
        std::fs::write(&file, "[broker]\nurll = \"mqtt://x\"\n").expect("written");
        let mut command = std::process::Command::new(binary());
        command.args(["run", "--config"]).arg(&file).envs(systemd.env()).stderr(std::process::Stdio::null());
        let status = command.status().expect("runs");
        assert_eq!(status.code(), Some(outpost::systemd::EXIT_CONFIG.into()));
        systemd.hears("STATUS=");
        assert!(systemd.heard.iter().any(|text| text.contains("did you mean `url`")), "{:#?}", systemd.heard);
    }
}
