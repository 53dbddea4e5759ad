//! The daemon, wired: the one file that knows every part.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;

use crate::admit::Gate;
use crate::config::{self, BrokerAt, Config};
use crate::dispatch::{Dispatch, InForce};
use crate::engine::{Pool, Registry, Shelf, meter};
use crate::hold::Hold;
use crate::intake::Reader;
use crate::intake::link::{self, Link};
use crate::status::{self, Report, State};
use crate::store::Store;
use crate::systemd;
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
    in_force: Arc<InForce>,
    changed: Arc<Notify>,
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
        systemd::status("loading models");
        let models = config.models.clone();
        let registry = tokio::task::spawn_blocking(move || load(&models, None)).await?;
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
        let uplink = Arc::new(uplink.with_books(books).with_hedge(config.uplink.hedge));

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
        let in_force = Arc::new(InForce::new(Dispatch {
            reader: Reader {
                topics: topics.clone(),
                reply_to: config.jobs.reply_to.clone(),
                max_bytes: config.jobs.max_bytes,
            },
            gate: Arc::new(Gate::new(config.jobs.queue, config.jobs.max_bytes, Arc::clone(&store))),
            pool: Arc::new(Pool::start(config.models.threads, config.jobs.queue, &registry.shelf)?),
            registry,
            uplink,
            routing: config.routing.clone(),
            store,
            outbox: Arc::clone(&link.outbox),
            hold: Arc::new(hold),
            // The other half of the room stays for jobs that can be answered now.
            patient: Arc::new(Semaphore::new((config.jobs.queue / 2).max(1))),
        }));
        in_force.get().resume_held();

        let (deliver, arrived) = Link::channel(config.jobs.queue);
        let (told, connection) = watch::channel(link::State::New);
        let reader = Arc::clone(&in_force);
        let runtime = tokio::runtime::Handle::current();
        // Ends by itself when the link, which holds the sender, is gone.
        std::thread::Builder::new().name("outpost-intake".to_owned()).spawn(move || reader.work(arrived, &runtime))?;
        let mut app = App {
            topics,
            in_force,
            changed: Arc::default(),
            connection: connection.clone(),
            client,
            tasks: vec![tokio::spawn(link.run(deliver, told))],
            url,
            config,
            #[cfg(feature = "broker")]
            _broker: broker,
        };
        let held = Arc::clone(&app.in_force);
        app.tasks.push(tokio::spawn(async move { held.send_held().await }));
        app.tasks.push(tokio::spawn(keep_status(app.reporter(), connection, Arc::clone(&app.changed))));
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

    /// What jobs meet on their way from now on.
    pub fn dispatch(&self) -> Arc<Dispatch> {
        self.in_force.get()
    }

    /// Waits until there is nothing to wait for: the node is online, or nobody has said where its
    /// broker is and the default place has none.
    pub async fn settled(&mut self) {
        let chosen = self.config.broker.chosen;
        let settled = |state: &link::State| match state {
            link::State::New => false,
            link::State::Away(_) => !chosen,
            link::State::Online => true,
        };
        // As in `online`.
        let _ = self.connection.wait_for(settled).await;
    }

    /// One line about how it goes.
    pub fn summary(&self) -> String {
        self.reporter().summary(&self.connection.borrow())
    }

    /// Puts what can be changed of `config` into force, reads the models again, and says what needs a
    /// restart. What cannot be used is logged and leaves what was there.
    pub async fn reload(&mut self, config: Config) {
        for note in &config.notes {
            tracing::warn!("{note}");
        }
        let fixed = fixed(&self.config, &config);
        if !fixed.is_empty() {
            tracing::warn!(settings = fixed.join(", "), "changed, and need a restart: they stay as they were");
        }
        let before = self.in_force.get();
        let (models, known) = (config.models.clone(), Arc::clone(&before.registry));
        let registry = tokio::task::spawn_blocking(move || load(&models, Some(&known))).await;
        let registry = registry.unwrap_or_else(|_| Arc::clone(&before.registry));
        let mut routing = config.routing;
        for (task, rule) in &mut routing.task {
            rule.budget_usd_per_day = self.config.routing.task.get(task).and_then(|rule| rule.budget_usd_per_day);
        }
        self.in_force.set(Dispatch {
            reader: Reader { reply_to: config.jobs.reply_to.clone(), ..before.reader.clone() },
            gate: Arc::clone(&before.gate),
            registry,
            pool: Arc::clone(&before.pool),
            // With its books, its memory of providers and the jobs that wait for it.
            uplink: Arc::clone(&before.uplink),
            routing: routing.clone(),
            store: Arc::clone(&before.store),
            outbox: Arc::clone(&before.outbox),
            hold: Arc::clone(&before.hold),
            patient: Arc::clone(&before.patient),
        });
        self.in_force.get().registry.let_go(&before.registry);
        self.config.routing = routing;
        self.config.models.dir = config.models.dir;
        self.config.jobs.reply_to = config.jobs.reply_to;
        self.changed.notify_one();
        tracing::info!("reloaded");
    }

    fn reporter(&self) -> Reporter {
        Reporter {
            broker: self.broker_shown(),
            chosen: self.config.broker.chosen,
            topic: self.topics.status(),
            name: self.config.node.name.clone(),
            groups: self.config.node.groups.clone(),
            in_force: Arc::clone(&self.in_force),
        }
    }

    /// Stops: takes no more jobs, answers those in hand within `limit`, says goodbye. What is not
    /// answered by then stays unacknowledged and comes again after the next start.
    pub async fn stop(self, limit: Duration) {
        let dispatch = self.in_force.get();
        let Dispatch { gate, outbox, .. } = &*dispatch;
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
        if tokio::time::timeout(GOODBYE, dispatch.uplink.recorded()).await.is_err() {
            tracing::warn!("the last calls to providers are not recorded: they count in full after the next start");
        }
    }
}

/// Tells the status.
struct Reporter {
    topic: String,
    name: String,
    groups: Vec<String>,
    broker: String,
    /// Whether anyone said where the broker is.
    chosen: bool,
    in_force: Arc<InForce>,
}

impl Reporter {
    fn report(&self) -> Report {
        let dispatch = self.in_force.get();
        let state = if dispatch.gate.draining() { State::Draining } else { State::Online };
        Report::new(state, &self.name, &self.groups, &dispatch)
    }

    /// How it goes, in one line.
    fn summary(&self, connection: &link::State) -> String {
        let report = self.report();
        let (models, jobs) = (report.models.len(), report.load.jobs);
        let refused = match report.refused.len() {
            0 => String::new(),
            n => format!(" ({n} refused)"),
        };
        let here = format!("{models} models{refused}, {jobs} jobs in hand");
        match connection {
            _ if report.state == State::Draining => format!("draining; {here}"),
            link::State::Online => format!("online at {}; {here}", self.broker),
            link::State::New => format!("connecting to {}; {here}", self.broker),
            link::State::Away(why) if self.chosen => format!("no connection to {}: {why}; {here}", self.broker),
            link::State::Away(_) => format!("{UNCHOSEN}; {here}"),
        }
    }

    fn publish(&self, report: &Report) {
        match serde_json::to_vec(report) {
            Ok(json) => self.in_force.get().outbox.send_status(status::message(self.topic.clone(), json)),
            Err(error) => tracing::error!("the status cannot be told: {error}"),
        }
    }

    fn tell(&self, state: State) {
        self.publish(&Report { state, ..self.report() });
    }
}

/// Tells the status at every connection, and now and then where it changed.
async fn keep_status(reporter: Reporter, mut connection: watch::Receiver<link::State>, reloaded: Arc<Notify>) {
    let mut every = tokio::time::interval(STATUS_EVERY);
    let mut told: Option<Report> = None;
    let mut advised = reporter.chosen;
    loop {
        let fresh = tokio::select! {
            changed = connection.changed() => {
                if changed.is_err() {
                    return;
                }
                true
            }
            () = reloaded.notified() => false,
            _ = every.tick() => false,
        };
        let state = connection.borrow_and_update().clone();
        systemd::status(&reporter.summary(&state));
        if !advised && matches!(state, link::State::Away(_)) {
            tracing::warn!("{UNCHOSEN}");
            advised = true;
        }
        if state != link::State::Online {
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

/// What to do where nobody has said where the broker is.
const UNCHOSEN: &str = "no broker is configured: set broker.url in the configuration (\"embedded\" needs no other \
                        broker) and restart; `outpost check` says what else is missing";

/// Settings that differ and that only a restart puts into force.
fn fixed(old: &Config, new: &Config) -> Vec<&'static str> {
    let rows = [
        ("node", old.node != new.node),
        ("broker", old.broker != new.broker),
        ("models.memory_mib", old.models.memory != new.models.memory),
        ("models.threads", old.models.threads != new.models.threads),
        ("jobs.queue", old.jobs.queue != new.jobs.queue),
        ("jobs.max_bytes", old.jobs.max_bytes != new.jobs.max_bytes),
        ("jobs.remember_s", old.jobs.remember != new.jobs.remember),
        ("uplink", old.uplink != new.uplink),
        ("routing.task budgets", budgets(old).task != budgets(new).task),
        ("store.dir", old.store != new.store),
    ];
    rows.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
}

/// Loads the models and logs what became of each package. At a reload, what was active `before` and is
/// refused now stays.
fn load(models: &config::Models, before: Option<&Arc<Registry>>) -> Arc<Registry> {
    let shelf = before.map_or_else(|| Shelf::new(models.memory, models.threads), |before| Arc::clone(&before.shelf));
    let registry = match (Registry::load_within(&models.dir, Arc::clone(&shelf)), before) {
        (Ok(mut registry), Some(before)) => {
            registry.keep(before);
            registry
        }
        (Ok(registry), None) => registry,
        (Err(error), Some(before)) => {
            tracing::error!("models.dir {}: {error}; the models stay as they were", models.dir.display());
            return Arc::clone(before);
        }
        (Err(error), None) => {
            tracing::warn!("models.dir {}: {error}; no job is answered on this device", models.dir.display());
            Registry::empty(shelf)
        }
    };
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
    meter::trim();
    Arc::new(registry)
}
