//! The connection to the broker: subscribes, hands deliveries on, tells the outbox what was accepted.
//!
//! The poll loop awaits nothing but `poll()`: awaiting a publish, a subscription or an
//! acknowledgement in it can deadlock (rumqtt 263 and 1025).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{
    ConnectReturnCode, Filter, LastWill, LastWillProperties, Packet, Publish, RetainForwardRule, SubscribeReasonCode,
};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions};
use rumqttc::{Outgoing, TlsConfiguration, Transport};
use tokio::sync::{mpsc, watch};

use super::{Delivery, Receipt};
use crate::config::Broker;
use crate::reply::{self, Message, Outbox};
use crate::secret::credential;
use crate::vitals::Pulse;

/// The protocol's largest packet. Outpost takes any and answers what is over its own limit with
/// `too_large`; a smaller maximum would make the broker drop such a job without a word.
const MAX_PACKET: u32 = 268_435_455;
/// Deliveries that the broker may send beyond the admitted jobs: they are answered `overloaded`.
const BEYOND: usize = 128;
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// How the connection stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not yet tried.
    New,
    /// Not (or no longer) connected; the reason, in words.
    Away(String),
    /// Connected and subscribed.
    Online,
}

/// A connection that is not yet polled.
pub struct Link {
    eventloop: EventLoop,
    client: AsyncClient,
    /// Where replies go out.
    pub outbox: Arc<Outbox>,
    filters: Vec<String>,
    max_bytes: usize,
    address: String,
    /// Largest packet that the broker takes on this connection.
    max_packet: Option<u32>,
}

/// Where the broker is: a URL's parts.
struct Address {
    transport: Transport,
    host: String,
    port: u16,
}

fn address(broker: &Broker, url: &url::Url) -> anyhow::Result<Address> {
    let read = |path: &std::path::Path| std::fs::read(path).with_context(|| path.display().to_string());
    let tls = || -> anyhow::Result<TlsConfiguration> {
        let identity = match &broker.identity {
            Some((cert, key)) => Some((read(cert)?, read(key)?)),
            None => None,
        };
        Ok(match &broker.ca_file {
            Some(ca) => TlsConfiguration::Simple { ca: read(ca)?, alpn: None, client_auth: identity },
            None => TlsConfiguration::default(),
        })
    };
    let host = url.host_str().unwrap_or("127.0.0.1").to_owned();
    let (transport, host, port) = match url.scheme() {
        "mqtts" => (Transport::Tls(tls()?), host, url.port().unwrap_or(8883)),
        "ws" => (Transport::Ws, url.to_string(), url.port().unwrap_or(80)),
        "wss" => (Transport::Wss(tls()?), url.to_string(), url.port().unwrap_or(443)),
        _ => (Transport::Tcp, host, url.port().unwrap_or(1883)),
    };
    Ok(Address { transport, host, port })
}

/// Connection options that the daemon and `outpost submit` share.
///
/// # Errors
/// A certificate that cannot be read, or a password credential that is not there.
pub fn options(broker: &Broker, url: &url::Url, client_id: &str) -> anyhow::Result<MqttOptions> {
    let Address { transport, host, port } = address(broker, url)?;
    let mut options = MqttOptions::new(client_id, host, port);
    options.set_transport(transport);
    options.set_keep_alive(broker.keep_alive);
    options.set_max_packet_size(Some(MAX_PACKET));
    options.set_connection_timeout(10);
    // Small packets both ways: Nagle's algorithm and delayed acknowledgements would add 40 ms to each.
    let mut network = options.network_options();
    network.set_tcp_nodelay(true);
    options.set_network_options(network);
    let username = broker.username.clone().or_else(|| Some(url.username().to_owned()).filter(|name| !name.is_empty()));
    if let Some(username) = username {
        let password = match &broker.password_credential {
            Some(name) => credential(name)
                .with_context(|| {
                    format!(
                        "broker.password_credential: `{name}` is in neither $CREDENTIALS_DIRECTORY nor the environment"
                    )
                })?
                .expose()
                .to_owned(),
            None => url.password().unwrap_or_default().to_owned(),
        };
        options.set_credentials(username, password);
    }
    Ok(options)
}

impl Link {
    /// Prepares the connection of `node` to `url`; `will` is its last will, `queue` the number of jobs
    /// that may be admitted.
    ///
    /// # Errors
    /// As [`options`].
    pub fn new(
        broker: &Broker,
        url: &url::Url,
        node: &str,
        filters: Vec<String>,
        will: &Message,
        queue: usize,
        max_bytes: usize,
    ) -> anyhow::Result<Self> {
        let mut options = options(broker, url, &format!("outpost-{node}"))?;
        let window = (queue + BEYOND).min(usize::from(u16::MAX));
        options
            .set_clean_start(false)
            .set_manual_acks(true)
            .set_session_expiry_interval(Some(broker.session_expiry_s))
            .set_receive_maximum(Some(window as u16))
            .set_outgoing_inflight_upper_limit(100)
            .set_pending_throttle(Duration::ZERO)
            .set_last_will(LastWill::new(
                will.topic.clone(),
                will.payload.clone(),
                QoS::AtLeastOnce,
                true,
                Some(LastWillProperties {
                    delay_interval: None,
                    payload_format_indicator: Some(1),
                    message_expiry_interval: None,
                    content_type: Some("application/json".to_owned()),
                    response_topic: None,
                    correlation_data: None,
                    user_properties: Vec::new(),
                }),
            ));
        let (client, eventloop) = AsyncClient::new(options, reply::CHANNEL);
        let outbox = Arc::new(Outbox::new(client.clone(), window + BEYOND));
        Ok(Link { eventloop, client, outbox, filters, max_bytes, address: shown(url), max_packet: None })
    }

    /// A handle to say goodbye with.
    pub fn client(&self) -> AsyncClient {
        self.client.clone()
    }

    /// A channel wide enough for all that the broker may send at once, over a reconnect too.
    pub fn channel(queue: usize) -> (mpsc::Sender<Arrived>, mpsc::Receiver<Arrived>) {
        mpsc::channel(2 * (queue + BEYOND))
    }

    /// Polls for as long as it is awaited; reconnects by itself.
    pub async fn run(mut self, deliver: mpsc::Sender<Arrived>, state: watch::Sender<State>) {
        let mut backoff = BACKOFF.0;
        let pulse = Pulse::of("outpost-link");
        loop {
            match pulse.during(self.eventloop.poll()).await {
                Ok(Event::Incoming(Packet::ConnAck(ack))) => {
                    tracing::info!(broker = self.address, resumed = ack.session_present, "connected");
                    self.max_packet = ack.properties.and_then(|properties| properties.max_packet_size);
                    self.subscribe();
                }
                Ok(Event::Incoming(Packet::SubAck(ack))) => {
                    backoff = BACKOFF.0;
                    self.outbox.connected(self.max_packet);
                    let refused = ack.return_codes.iter().any(|code| !matches!(code, SubscribeReasonCode::Success(_)));
                    if refused {
                        tracing::error!(codes = ?ack.return_codes, filters = ?self.filters, "a subscription was refused");
                        state.send_replace(State::Away("the broker refused a subscription".to_owned()));
                    } else {
                        state.send_replace(State::Online);
                    }
                }
                Ok(event) => self.handle(event, &deliver),
                Err(ConnectionError::RequestsDone) => return,
                Err(error) => {
                    for event in self.outbox.lost(&mut self.eventloop) {
                        self.handle(event, &deliver);
                    }
                    let why = describe(&error);
                    if state.send_replace(State::Away(why.clone())) != State::Away(why.clone()) {
                        tracing::warn!(broker = self.address, "not connected: {why}");
                    }
                    pulse.during(tokio::time::sleep(backoff.mul_f64(jitter()))).await;
                    backoff = (backoff * 2).min(BACKOFF.1);
                }
            }
        }
    }

    fn handle(&self, event: Event, deliver: &mpsc::Sender<Arrived>) {
        match event {
            Event::Incoming(Packet::Publish(publish)) => {
                let receipt = self.outbox.receipt(&publish);
                let arrived = Arrived { receipt, delivery: delivery(publish, self.max_bytes) };
                if deliver.try_send(arrived).is_err() {
                    // With acknowledgements the broker stays within the channel; without, nothing was promised.
                    tracing::warn!("a job was dropped: more came at once than can be read");
                }
            }
            Event::Incoming(Packet::PubAck(ack)) => self.outbox.accepted(ack.pkid, ack.reason),
            Event::Outgoing(Outgoing::Publish(pkid)) => self.outbox.sent(pkid),
            _ => {}
        }
    }

    /// Subscribes again at every connection: harmless where the session was kept.
    fn subscribe(&self) {
        let filters = self.filters.iter().map(|path| {
            let mut filter = Filter::new(path.clone(), QoS::AtLeastOnce);
            // A retained job would run again at every start.
            filter.retain_forward_rule = RetainForwardRule::Never;
            filter
        });
        if self.client.try_subscribe_many(filters).is_err() {
            tracing::error!("the subscription could not be queued");
        }
    }
}

/// A delivery and what acknowledges it.
#[derive(Debug)]
pub struct Arrived {
    /// What came.
    pub delivery: Delivery,
    /// None for QoS 0.
    pub receipt: Option<Receipt>,
}

fn delivery(publish: Publish, max_bytes: usize) -> Delivery {
    let properties = publish.properties.unwrap_or_default();
    let oversize = (publish.payload.len() > max_bytes).then_some(publish.payload.len());
    let kept = if oversize.is_some() { super::HEAD } else { publish.payload.len() };
    Delivery {
        topic: String::from_utf8_lossy(&publish.topic).into_owned(),
        payload: publish.payload[..kept.min(publish.payload.len())].to_vec(),
        oversize,
        content_type: properties.content_type,
        response_topic: properties.response_topic,
        correlation: properties.correlation_data.map(|data| data.to_vec()),
        expiry: properties.message_expiry_interval.map(|s| Duration::from_secs(s.into())),
        properties: properties.user_properties,
        received: Some(Instant::now()),
    }
}

/// A broker's URL without its password.
pub fn shown(url: &url::Url) -> String {
    let mut url = url.clone();
    // Fails for a URL that cannot have one.
    let _ = url.set_password(None);
    url.to_string()
}

/// Between a half and one, so that a fleet does not come back all at once.
fn jitter() -> f64 {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    0.5 + f64::from(nanos % 1_000_003) / 2_000_006.0
}

/// A connection error as a user would say it.
pub fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized,
        ) => "the broker refused the user name or password".to_owned(),
        ConnectionError::ConnectionRefused(code) => format!("the broker refused the connection: {code:?}"),
        ConnectionError::Timeout(_) => "the broker did not answer in time".to_owned(),
        other => other.to_string(),
    }
}
