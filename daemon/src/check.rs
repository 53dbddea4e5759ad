//! `outpost check`: one line for each part, and what to do about it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event};
use serde::Serialize;

use crate::config::{BrokerAt, Config, DEFAULT_PATH};
use crate::engine::{Registry, Shelf, meter};
use crate::intake::link;
use crate::uplink::Uplink;

/// Arguments of `outpost check`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Configuration
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a part fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mark {
    Ok,
    Warn,
    Fail,
}

/// One line.
#[derive(Debug, Serialize)]
struct Finding {
    part: String,
    mark: Mark,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    todo: Option<String>,
}

fn finding(part: &str, mark: Mark, what: impl Into<String>, todo: Option<&str>) -> Finding {
    Finding { part: part.to_owned(), mark, what: what.into(), todo: todo.map(str::to_owned) }
}

/// Checks and prints; failure if anything would keep the daemon from its work.
///
/// # Errors
/// Only where the findings cannot be printed.
pub async fn run(args: Args) -> Result<ExitCode> {
    let findings = match Config::load(&args.config) {
        Err(error) => error
            .mistakes
            .iter()
            .map(|mistake| {
                finding("configuration", Mark::Fail, mistake, Some(&format!("edit {}", args.config.display())))
            })
            .collect(),
        Ok(config) => {
            let mut findings = vec![finding("configuration", Mark::Ok, args.config.display().to_string(), None)];
            findings.extend(config.notes.iter().map(|note| finding("configuration", Mark::Warn, note, None)));
            findings.push(store(&config));
            findings.extend(models(&config).await?);
            findings.push(broker(&config).await);
            findings.extend(uplink(&config).await);
            findings
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for Finding { part, mark, what, todo } in &findings {
            let mark = match mark {
                Mark::Ok => "ok  ",
                Mark::Warn => "warn",
                Mark::Fail => "FAIL",
            };
            println!(
                "{mark}  {part:<14} {what}{}",
                todo.as_ref().map_or(String::new(), |todo| format!("\n      {:<14} → {todo}", ""))
            );
        }
    }
    let failed = findings.iter().any(|finding| finding.mark == Mark::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn store(config: &Config) -> Finding {
    let dir = &config.store;
    let probe = dir.join(".check");
    match std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::write(&probe, b""))
        .and_then(|()| std::fs::remove_file(&probe))
    {
        Ok(()) => finding("store", Mark::Ok, dir.display().to_string(), None),
        Err(error) => {
            let todo = "make the folder writable for the user that runs the daemon, or set store.dir";
            finding("store", Mark::Fail, format!("{}: {error}", dir.display()), Some(todo))
        }
    }
}

async fn models(config: &Config) -> Result<Vec<Finding>> {
    let dir = config.models.dir.clone();
    let shown = dir.display().to_string();
    let shelf = Shelf::new(config.models.memory, config.models.threads);
    let registry = match tokio::task::spawn_blocking(move || Registry::load_within(&dir, shelf)).await? {
        Ok(registry) => registry,
        Err(error) => {
            let todo = "put model packages there, or set models.dir";
            return Ok(vec![finding("models", Mark::Fail, format!("{shown}: {error}"), Some(todo))]);
        }
    };
    let mut findings: Vec<Finding> = registry
        .models()
        .iter()
        .map(|model| {
            let task = &model.package.manifest.task;
            finding(
                "model",
                Mark::Ok,
                format!(
                    "{} answers {task} as {}, by {}, in {} MiB",
                    model.id(),
                    model.variant_name(),
                    model.kernels,
                    meter::mib(registry.shelf.need(model))
                ),
                None,
            )
        })
        .collect();
    findings.extend(registry.refused.iter().map(|refused| {
        finding(
            "model",
            Mark::Fail,
            refused.to_string(),
            Some("repair or remove the package; the others are not affected"),
        )
    }));
    if findings.is_empty() {
        let todo = "put model packages there; until then every job is above the device";
        findings.push(finding("models", Mark::Warn, format!("{shown} holds no package"), Some(todo)));
    }
    Ok(findings)
}

async fn broker(config: &Config) -> Finding {
    let url = match &config.broker.at {
        BrokerAt::Url(url) => url,
        BrokerAt::Embedded(address) => {
            return match tokio::net::TcpListener::bind(address).await {
                Ok(_) => finding("broker", Mark::Ok, format!("embedded, {address} is free"), None),
                Err(error) => {
                    let todo = "stop what listens there, or set broker.listen";
                    finding("broker", Mark::Fail, format!("embedded, {address}: {error}"), Some(todo))
                }
            };
        }
    };
    let shown = link::shown(url);
    let connect = async {
        // Another client id than the daemon's, whose connection stays.
        let options = link::options(&config.broker, url, &format!("outpost-{}-check", config.node.name))?;
        let (client, mut eventloop) = AsyncClient::new(options, 4);
        loop {
            match eventloop.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    let _ = client.try_disconnect();
                    let _ = tokio::time::timeout(Duration::from_millis(200), eventloop.poll()).await;
                    return anyhow::Ok(());
                }
                Ok(_) => {}
                Err(error) => anyhow::bail!(link::describe(&error)),
            }
        }
    };
    match tokio::time::timeout(Duration::from_secs(10), connect).await {
        Ok(Ok(())) => finding("broker", Mark::Ok, format!("{shown} accepts this node"), None),
        Ok(Err(error)) if !config.broker.chosen => {
            let todo = "say in broker.url where the broker is (\"embedded\" needs no other), then restart outpost";
            finding("broker", Mark::Fail, format!("none is configured, and at {shown}: {error:#}"), Some(todo))
        }
        Ok(Err(error)) => {
            let todo = "start the broker, or set broker.url (\"embedded\" needs no other) and its credentials";
            finding("broker", Mark::Fail, format!("{shown}: {error:#}"), Some(todo))
        }
        Err(_) => finding(
            "broker",
            Mark::Fail,
            format!("{shown}: no answer in 10 s"),
            Some("check the address and the firewall"),
        ),
    }
}

async fn uplink(config: &Config) -> Vec<Finding> {
    let providers = &config.uplink.providers;
    if providers.is_empty() {
        let todo = "add an [uplink.provider.NAME] to have uncertain jobs answered by a closed model";
        return vec![finding("uplink", Mark::Ok, "no provider: every job stays on the device", Some(todo))];
    }
    let uplink = match Uplink::new(providers) {
        Ok(uplink) => uplink,
        Err(error) => return vec![finding("uplink", Mark::Fail, format!("{error:#}"), None)],
    };
    let mut findings = Vec::new();
    for provider in providers {
        let part = format!("uplink {}", provider.name);
        if let Err(why) = uplink.usable(&provider.name) {
            let todo = "put the key in the credential (systemd LoadCredential=, or the environment)";
            findings.push(finding(&part, Mark::Warn, why, Some(todo)));
            continue;
        }
        findings.push(match uplink.probe(&provider.name).await {
            Ok(what) => finding(&part, Mark::Ok, what, None),
            Err(why) => finding(
                &part,
                Mark::Warn,
                why,
                Some("check the network, base_url and the key; jobs wait for nothing meanwhile"),
            ),
        });
    }
    findings
}
