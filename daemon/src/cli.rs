//! The command line. Exit status: 0 success, 1 failure, 2 bad usage.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

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
            Command::Run { config } => run(&config).await.map(|()| ExitCode::SUCCESS),
            Command::Check(args) => check::run(args).await,
            Command::Submit(args) => submit::run(args).await,
            Command::Models(command) => models::run(command),
        }
    });
    runtime.shutdown_background();
    done.unwrap_or_else(|error| failure(&error))
}

fn failure(error: &anyhow::Error) -> ExitCode {
    eprintln!("outpost: {error:#}");
    ExitCode::FAILURE
}

/// Logs go to stderr; `OUTPOST_LOG` says how much, as `tracing-subscriber` reads it.
fn log(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("OUTPOST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(format!("{level},tract=warn,mqtt5=warn")));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

async fn run(path: &std::path::Path) -> Result<()> {
    let config = Config::load(path)?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut reload = signal(SignalKind::hangup()).context("SIGHUP")?;
    let mut app = App::start(config, None).await?;
    let ready = async {
        app.online().await;
        systemd::ready(&format!("online at {}", app.broker_shown()));
        std::future::pending::<()>().await;
    };
    let reload = async {
        while reload.recv().await.is_some() {
            tracing::warn!("SIGHUP: this version reloads nothing; restart the daemon to apply a change");
        }
    };
    tokio::select! {
        () = ready => {}
        () = reload => {}
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    systemd::stopping();
    app.stop(app::DRAIN).await;
    Ok(())
}
