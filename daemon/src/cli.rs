//! The command line. Exit status: 0 success, 1 failure, 2 bad usage; 78 where systemd started the daemon
//! and its configuration cannot be used.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tokio::signal::unix::{SignalKind, signal};
#[cfg(feature = "systemd")]
use tracing_subscriber::{layer::SubscriberExt, util::SubscriberInitExt};

use crate::app::{self, App};
use crate::config::{Config, DEFAULT_PATH};
use crate::{check, demo, models, submit, systemd};

/// Answers inference jobs on the device, and sends up what is above it
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the whole way of a job, with nothing else installed
    Demo(demo::Args),
    /// Run the daemon
    Run {
        /// Configuration
        #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Check configuration, models, credentials, broker and uplink
    Check(check::Args),
    /// Send one job and print its reply
    Submit(submit::Args),
    /// Work on model packages
    #[command(subcommand)]
    Models(models::Command),
    /// Write the manual pages and shell completions into a folder
    #[command(hide = true)]
    Assets {
        /// Folder, made where it is missing
        dir: PathBuf,
    },
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let quiet = !matches!(cli.command, Command::Run { .. });
    log(if quiet { "error" } else { "info" });
    // Fails only where a provider is installed already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure(&anyhow::Error::new(error).context("the runtime cannot start")),
    };
    let done = runtime.block_on(async {
        match cli.command {
            Command::Demo(args) => demo::run(args).await,
            Command::Run { config } => run(&config).await,
            Command::Check(args) => check::run(args).await,
            Command::Submit(args) => submit::run(args).await,
            Command::Models(command) => models::run(command),
            Command::Assets { dir } => assets(&dir).map(|()| ExitCode::SUCCESS),
        }
    });
    runtime.shutdown_background();
    done.unwrap_or_else(|error| failure(&error))
}

fn failure(error: &anyhow::Error) -> ExitCode {
    eprintln!("outpost: {error:#}");
    ExitCode::FAILURE
}

/// Logs go to stderr, or with their fields to the journal where stderr would end there; `OUTPOST_LOG` says
/// how much, as `tracing-subscriber` reads it.
fn log(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("OUTPOST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(format!("{level},tract=warn,mqtt5=warn")));
    #[cfg(feature = "systemd")]
    if crate::journal::is_stderr() {
        tracing_subscriber::registry().with(filter).with(crate::journal::Journal).init();
        return;
    }
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

async fn run(path: &Path) -> Result<ExitCode> {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) if systemd::listens() => {
            systemd::status(&format!("{error}; `outpost check` tells more"));
            tracing::error!("{error}");
            return Ok(ExitCode::from(systemd::EXIT_CONFIG));
        }
        Err(error) => return Err(error.into()),
    };
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut reload = signal(SignalKind::hangup()).context("SIGHUP")?;
    let mut stop = pin!(async {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
        }
    });
    let mut app = tokio::select! {
        app = App::start(config, None) => app.inspect_err(|error| systemd::status(&format!("{error:#}")))?,
        () = &mut stop => return Ok(ExitCode::SUCCESS),
    };
    let watchdog = tokio::spawn(systemd::feed_watchdog());
    let mut ready = false;
    loop {
        tokio::select! {
            () = app.settled(), if !ready => {
                ready = true;
                systemd::ready(&app.summary());
            }
            Some(()) = reload.recv() => tokio::select! {
                () = again(&mut app, path, ready) => {}
                () = &mut stop => break,
            },
            () = &mut stop => break,
        }
    }
    systemd::stopping();
    app.stop(app::DRAIN).await;
    watchdog.abort();
    Ok(ExitCode::SUCCESS)
}

/// Reloads what can be; a configuration that cannot be used changes nothing.
async fn again(app: &mut App, path: &Path, ready: bool) {
    tracing::info!("SIGHUP: reloading");
    if ready {
        systemd::reloading();
    }
    match Config::load(path) {
        Ok(config) => app.reload(config).await,
        Err(error) => tracing::error!("not reloaded: {error}"),
    }
    if ready {
        systemd::ready(&app.summary());
    }
}

/// Writes `outpost.1`, a page for each command, and completions for bash, zsh and fish.
fn assets(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let command = Cli::command().name("outpost");
    clap_mangen::generate_to(command.clone(), dir).context("manual pages")?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command.clone(), "outpost", dir).context("completions")?;
    }
    Ok(())
}
