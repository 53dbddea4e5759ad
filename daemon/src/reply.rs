//! Reply out, then acknowledge: a job is acknowledged only after the broker has accepted its reply.
//!
//! The [`Outbox`] is the one place that publishes. It keeps each message until its PUBACK, sends
//! what is left again after a reconnect, and acknowledges a delivery only on the connection that
//! delivered it: the broker sends the others again, and their identity settles them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{PubAckReason, Publish, PublishProperties};
use rumqttc::v5::{AsyncClient, Event, EventLoop};

use crate::admit::Slot;
use crate::hold::Ticket;
use crate::intake::Receipt;
use crate::job::{Code, Fault, Reply, Timing};

/// Messages sent and not yet accepted. A broker that allows less slows the event loop itself.
const WINDOW: usize = 64;
/// Requests that the event loop's channel holds: messages and acknowledgements.
pub const CHANNEL: usize = 1024;

/// Bytes of a packet beside topic, payload and correlation data, with room to spare.
const OVERHEAD: usize = 64;

/// A message to publish, QoS 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Topic.
    pub topic: String,
    /// JSON.
    pub payload: Vec<u8>,
    /// MQTT 5 Correlation Data.
    pub correlation: Option<Vec<u8>>,
    /// Kept by the broker for later subscribers.
    pub retain: bool,
}

impl Message {
    /// A message over the broker's limit would end the connection, and again after every reconnect: the
    /// requester is told instead.
    fn fit(&mut self, max_packet: usize) {
        let beside = OVERHEAD + self.topic.len() + self.correlation.as_ref().map_or(0, Vec::len);
        let bytes = self.payload.len();
        if beside + bytes <= max_packet {
            return;
        }
        let reply: Option<Reply> = serde_json::from_slice(&self.payload).ok();
        let (id, timing) = reply.map_or((None, Timing::default()), |reply| (reply.id, reply.timing_ms));
        let message = format!("the reply has {bytes} bytes, and the broker takes packets of {max_packet}");
        tracing::error!(topic = self.topic, "{message}");
        let fault = Fault::new(Code::TooLarge, message).limit(max_packet);
        self.payload = Reply::error(id, fault, Vec::new(), timing).encode();
    }
}

/// What a reply keeps until the broker has it; dropping it lets it go.
#[derive(Debug)]
pub enum Keep {
    /// The room of an admitted job.
    Room(Slot),
    /// The file of a held one.
    File(Ticket),
}

#[derive(Debug)]
struct Item {
    order: u64,
    message: Message,
    receipts: Vec<Receipt>,
    /// Held, not read: it is free again when the reply is accepted.
    _keep: Option<Keep>,
    /// A status: worthless once the connection is lost.
    passing: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// Counts connections: packet identifiers mean nothing on the next one.
    generation: u64,
    connected: bool,
    /// Largest packet that the broker takes.
    max_packet: usize,
    order: u64,
    unsent: VecDeque<Item>,
    /// Given to the event loop, in order; it has not yet said under which packet identifier.
    handed: VecDeque<Item>,
    flying: HashMap<u16, Item>,
    acks: VecDeque<Receipt>,
}

/// What is to be published and acknowledged. Never blocks; may be used from any thread.
#[derive(Debug)]
pub struct Outbox {
    client: AsyncClient,
    capacity: usize,
    inner: Mutex<Inner>,
}

impl Outbox {
    /// An outbox that publishes through `client` and holds at most `capacity` messages.
    pub fn new(client: AsyncClient, capacity: usize) -> Self {
        Outbox { client, capacity, inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is made whole before anything that could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receipt for a delivery on this connection; none where QoS 0 needs no acknowledgement.
    pub fn receipt(&self, publish: &Publish) -> Option<Receipt> {
        let generation = self.lock().generation;
        (publish.qos != QoS::AtMostOnce).then_some(Receipt { pkid: publish.pkid, generation })
    }

    /// Publishes a reply, then acknowledges `receipts`; `keep` is let go when both are done.
    ///
    /// When the outbox is full, because the broker accepts nothing while jobs without
    /// acknowledgement keep coming, the reply is dropped and logged.
    pub fn send(&self, message: Message, receipts: Vec<Receipt>, keep: Option<Keep>) {
        self.push(message, receipts, keep, false);
    }

    /// Acknowledges deliveries whose jobs are held: their replies come later.
    pub fn acknowledge(&self, receipts: Vec<Receipt>) {
        let mut inner = self.lock();
        inner.acks.extend(receipts);
        self.pump(&mut inner);
    }

    /// Publishes a status; only the newest is kept while the connection is away.
    pub fn send_status(&self, message: Message) {
        self.push(message, Vec::new(), None, true);
    }

    fn push(&self, message: Message, receipts: Vec<Receipt>, keep: Option<Keep>, passing: bool) {
        let mut inner = self.lock();
        if passing {
            inner.unsent.retain(|item| !item.passing);
        } else if inner.len() >= self.capacity && receipts.is_empty() && !matches!(keep, Some(Keep::File(_))) {
            tracing::warn!(topic = message.topic, "reply dropped: {} are waiting for the broker", self.capacity);
            return;
        }
        let order = inner.order;
        inner.order += 1;
        inner.unsent.push_back(Item { order, message, receipts, _keep: keep, passing });
        self.pump(&mut inner);
    }

    /// Hands on what the event loop has room for.
    fn pump(&self, inner: &mut Inner) {
        if !inner.connected {
            return;
        }
        while let Some(receipt) = inner.acks.pop_front() {
            // Of a publish, an acknowledgement needs the identifier and the QoS.
            let mut publish = Publish::new("", QoS::AtLeastOnce, Vec::new(), None);
            publish.pkid = receipt.pkid;
            if receipt.generation == inner.generation && self.client.try_ack(&publish).is_err() {
                inner.acks.push_front(receipt);
                return;
            }
        }
        while inner.handed.len() + inner.flying.len() < WINDOW {
            let Some(mut item) = inner.unsent.pop_front() else { return };
            item.message.fit(inner.max_packet);
            let Message { topic, payload, correlation, retain } = item.message.clone();
            let properties = PublishProperties {
                payload_format_indicator: Some(1),
                content_type: Some("application/json".to_owned()),
                correlation_data: correlation.map(Into::into),
                ..PublishProperties::default()
            };
            match self.client.try_publish_with_properties(topic, QoS::AtLeastOnce, retain, payload, properties) {
                Ok(()) => inner.handed.push_back(item),
                Err(_) => {
                    inner.unsent.push_front(item);
                    return;
                }
            }
        }
    }

    /// The connection stands, and its broker takes packets of up to `max_packet` bytes: what is left is
    /// sent.
    pub fn connected(&self, max_packet: Option<u32>) {
        let mut inner = self.lock();
        inner.connected = true;
        inner.max_packet = max_packet.map_or(usize::MAX, |bytes| bytes as usize);
        self.pump(&mut inner);
    }

    /// The event loop has sent the oldest message handed to it, as `pkid`.
    pub fn sent(&self, pkid: u16) {
        let mut inner = self.lock();
        if let Some(item) = inner.handed.pop_front() {
            inner.flying.insert(pkid, item);
        }
    }

    /// The broker has taken `pkid`: its job is acknowledged.
    pub fn accepted(&self, pkid: u16, reason: PubAckReason) {
        let mut inner = self.lock();
        let Some(item) = inner.flying.remove(&pkid) else { return };
        if !matches!(reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers) {
            // Sending it again would be refused again.
            tracing::error!(topic = item.message.topic, ?reason, "the broker refused a message");
        }
        inner.acks.extend(item.receipts);
        self.pump(&mut inner);
    }

    /// The connection is lost: what was not accepted is sent again on the next one, and what the event
    /// loop still holds of the old one is taken out of it. Returns the events that it had not yet given.
    pub fn lost(&self, eventloop: &mut EventLoop) -> Vec<Event> {
        let mut inner = self.lock();
        // Under the lock nothing new is handed to the event loop, so this empties it.
        eventloop.clean();
        eventloop.pending.clear();
        eventloop.state.collision = None;
        inner.connected = false;
        inner.generation += 1;
        inner.acks.clear();
        let mut back: Vec<Item> = inner.flying.drain().map(|(_, item)| item).collect();
        back.extend(inner.handed.drain(..));
        back.retain(|item| !item.passing);
        back.sort_by_key(|item| std::cmp::Reverse(item.order));
        for item in back {
            inner.unsent.push_front(item);
        }
        eventloop.state.events.drain(..).collect()
    }

    /// Messages not yet accepted by the broker, and acknowledgements not yet handed on.
    pub fn pending(&self) -> usize {
        let inner = self.lock();
        inner.len() + inner.acks.len()
    }
}

impl Inner {
    fn len(&self) -> usize {
        self.unsent.len() + self.handed.len() + self.flying.len()
    }
}
