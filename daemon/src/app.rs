//! The daemon, wired: the one file that knows every part.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::admit::Gate;
use crate::config::{self, BrokerAt, Config};
use crate::dispatch::Dispatch;
use crate::engine::{Pool, Registry, Shelf, meter};
use crate::hold::Hold;
use crate::intake::Reader;
use crate::intake::link::{self, Link};
use crate::status::{self, Report, State};
use crate::store::Store;
use crate::topic::Topics;
use crate::uplink::{self, Books, Budgets, Uplink};

/// How often a changed load is told.
const STATUS_EVERY: Duration = Duration::from_secs(15);
/// How long a stop waits for the jobs in hand.
pub const DRAIN: Duration = Duration::from_secs(20);
/// How long a stop waits for the last messages.
const GOODBYE: Duration = Duration::from_secs(2);

/// A running daemon.
pub struct App {
    config: Config,
    topics: Topics,
    dispatch: Arc<Dispatch>,
    connection: watch::Receiver<link::State>,
    client: rumqttc::v5::AsyncClient,
    tasks: Vec<JoinHandle<()>>,
    url: url::Url,
    #[cfg(feature = "broker")]
    _broker: Option<crate::broker::Broker>,
}

impl App {
    /// Starts everything; `uplink` stands in for the configured one where given. Comes back before the
    /// broker is reached: see [`App::online`].
    ///
    /// # Errors
    /// What keeps the daemon from ever working: the store, a credential file, the embedded broker. A
    /// broker that is away or a package that is refused is no error.
    pub async fn start(config: Config, uplink: Option<Uplink>) -> Result<Self> {
        for note in &config.notes {
            tracing::warn!("{note}");
        }
        let (store_dir, window) = (config.store.clone(), config.jobs.remember);
        let store = tokio::task::spawn_blocking(move || Store::open(&store_dir, window))
            .await?
            .with_context(|| format!("store.dir {}", config.store.display()))?;
        let store = Arc::new(store);
        let models = config.models.clone();
        let registry = tokio::task::spawn_blocking(move || load(&models)).await?;
        let (store_dir, window) = (config.store.clone(), config.uplink.hold_offline);
        let budgets = budgets(&config);
        let opened = tokio::task::spawn_blocking(move || {
            let hold = Hold::open(&store_dir, window)?;
            Ok::<_, std::io::Error>((hold, Books::open(&store_dir, budgets)?))
        });
        let (hold, books) = opened.await?.with_context(|| format!("store.dir {}", config.store.display()))?;
        let uplink = match uplink {
            Some(uplink) => uplink,
            None => Uplink::new(&config.uplink.providers)?,
        };
        let uplink = uplink.with_books(books).with_hedge(config.uplink.hedge);

        #[cfg(feature = "broker")]
        let mut broker = None;
        let url = match &config.broker.at {
            BrokerAt::Url(url) => url.clone(),
            #[cfg(feature = "broker")]
            BrokerAt::Embedded(listen) => {
                let address = broker.insert(crate::broker::Broker::start(*listen, &config.store).await?).address();
                let port = address.port();
                let host =
                    if address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { address.ip().to_string() };
                tracing::info!(%address, "the embedded broker listens");
                format!("mqtt://{host}:{port}").parse()?
            }
            #[cfg(not(feature = "broker"))]
            BrokerAt::Embedded(_) => anyhow::bail!("broker.url: this build has no embedded broker"),
        };

        let topics = Topics::new(&config.broker.prefix, &config.node.name);
        let link = Link::new(
            &config.broker,
            &url,
            &config.node.name,
            topics.subscriptions(&config.node.groups),
            &status::offline(topics.status(), &config.node.name),
            config.jobs.queue,
            config.jobs.max_bytes,
        )?;
        let client = link.client();
        let dispatch = Arc::new(Dispatch {
            reader: Reader {
                topics: topics.clone(),
                reply_to: config.jobs.reply_to.clone(),
                max_bytes: config.jobs.max_bytes,
            },
            gate: Gate::new(config.jobs.queue, config.jobs.max_bytes, Arc::clone(&store)),
            pool: Pool::start(config.models.threads, config.jobs.queue, &registry.shelf)?,
            registry,
            uplink,
            routing: config.routing.clone(),
            store,
            outbox: Arc::clone(&link.outbox),
            hold: Arc::new(hold),
            // The other half of the room stays for jobs that can be answered now.
            patient: Semaphore::new((config.jobs.queue / 2).max(1)),
        });
        dispatch.resume_held();

        let (deliver, arrived) = Link::channel(config.jobs.queue);
        let (told, connection) = watch::channel(link::State::Away("not yet connected".to_owned()));
        let reader = Arc::clone(&dispatch);
        let runtime = tokio::runtime::Handle::current();
        // Ends by itself when the link, which holds the sender, is gone.
        std::thread::Builder::new().name("outpost-intake".to_owned()).spawn(move || reader.work(arrived, &runtime))?;
        let mut app = App {
            topics,
            dispatch,
            connection: connection.clone(),
            client,
            tasks: vec![tokio::spawn(link.run(deliver, told))],
            url,
            config,
            #[cfg(feature = "broker")]
            _broker: broker,
        };
        app.tasks.push(tokio::spawn(Arc::clone(&app.dispatch).send_held()));
        app.tasks.push(tokio::spawn(keep_status(app.reporter(), connection)));
        Ok(app)
    }

    /// Waits until the node is connected and subscribed.
    pub async fn online(&mut self) {
        // The sender lives as long as the link's task, which this app holds.
        let _ = self.connection.wait_for(|state| *state == link::State::Online).await;
    }

    /// Where the broker is.
    pub fn broker_url(&self) -> &url::Url {
        &self.url
    }

    /// Where the broker is, for people: without a password.
    pub fn broker_shown(&self) -> String {
        link::shown(&self.url)
    }

    /// What jobs meet on their way.
    pub fn dispatch(&self) -> &Arc<Dispatch> {
        &self.dispatch
    }

    fn reporter(&self) -> Reporter {
        Reporter {
            topic: self.topics.status(),
            name: self.config.node.name.clone(),
            groups: self.config.node.groups.clone(),
            dispatch: Arc::clone(&self.dispatch),
        }
    }

    /// Stops: takes no more jobs, answers those in hand within `limit`, says goodbye. What is not
    /// answered by then stays unacknowledged and comes again after the next start.
    pub async fn stop(self, limit: Duration) {
        let Dispatch { gate, outbox, .. } = &*self.dispatch;
        let reporter = self.reporter();
        gate.drain();
        reporter.tell(State::Draining);
        let idle = async {
            while gate.jobs() > 0 || outbox.pending() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(limit, idle).await.is_err() {
            tracing::warn!(jobs = gate.jobs(), "stopped with jobs in hand: they come again after the next start");
        }
        let mut connection = self.connection.clone();
        let online = *connection.borrow() == link::State::Online;
        if online {
            outbox.send_status(status::offline(self.topics.status(), &self.config.node.name));
            let goodbye = async {
                while outbox.pending() > 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                let _ = self.client.disconnect().await;
                let _ = connection.wait_for(|state| *state != link::State::Online).await;
            };
            let _ = tokio::time::timeout(GOODBYE, goodbye).await;
        }
        for task in &self.tasks {
            task.abort();
        }
        if tokio::time::timeout(GOODBYE, self.dispatch.uplink.recorded()).await.is_err() {
            tracing::warn!("the last calls to providers are not recorded: they count in full after the next start");
        }
    }
}

/// Tells the status.
struct Reporter {
    topic: String,
    name: String,
    groups: Vec<String>,
    dispatch: Arc<Dispatch>,
}

impl Reporter {
    fn report(&self) -> Report {
        let state = if self.dispatch.gate.draining() { State::Draining } else { State::Online };
        Report::new(state, &self.name, &self.groups, &self.dispatch)
    }

    fn publish(&self, report: &Report) {
        match serde_json::to_vec(report) {
            Ok(json) => self.dispatch.outbox.send_status(status::message(self.topic.clone(), json)),
            Err(error) => tracing::error!("the status cannot be told: {error}"),
        }
    }

    fn tell(&self, state: State) {
        self.publish(&Report { state, ..self.report() });
    }
}

/// Tells the status at every connection, and now and then where it changed.
async fn keep_status(reporter: Reporter, mut connection: watch::Receiver<link::State>) {
    let mut every = tokio::time::interval(STATUS_EVERY);
    let mut told: Option<Report> = None;
    loop {
        let fresh = tokio::select! {
            changed = connection.changed() => {
                if changed.is_err() {
                    return;
                }
                true
            }
            _ = every.tick() => false,
        };
        if *connection.borrow_and_update() != link::State::Online {
            continue;
        }
        let report = reporter.report();
        if fresh || told.as_ref() != Some(&report) {
            if fresh {
                tracing::info!(models = report.models.len(), tasks = ?report.tasks, "online");
            }
            reporter.publish(&report);
            told = Some(report);
        }
    }
}

/// The budgets of node and tasks.
fn budgets(config: &Config) -> Budgets {
    let task = config.routing.task.iter();
    Budgets {
        node: config.uplink.budget_usd_per_day.map(uplink::nano),
        task: task.filter_map(|(task, rule)| Some((task.clone(), uplink::nano(rule.budget_usd_per_day?)))).collect(),
    }
}

/// Loads the models and logs what became of each package.
fn load(models: &config::Models) -> Registry {
    let shelf = Shelf::new(models.memory, models.threads);
    let registry = Registry::load_within(&models.dir, Arc::clone(&shelf)).unwrap_or_else(|error| {
        tracing::warn!("models.dir {}: {error}; no job is answered on this device", models.dir.display());
        Registry::empty(shelf)
    });
    for model in registry.models() {
        tracing::info!(
            model = model.id(),
            task = model.package.manifest.task,
            variant = model.variant_name(),
            kernels = model.kernels,
            mib = meter::mib(registry.shelf.need(model)),
            us = model.measured_us(),
            "active"
        );
    }
    for refused in &registry.refused {
        tracing::error!("package refused: {refused}");
    }
    registry
}
