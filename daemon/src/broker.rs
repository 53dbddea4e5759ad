//! The embedded MQTT broker: for the demo, tests and a box that stands alone.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use mqtt5::broker::MqttBroker;
use mqtt5::broker::config::{AuthConfig, BrokerConfig, StorageConfig};

/// Largest packet that it takes, in bytes; a larger one ends its sender's connection.
pub const MAX_PACKET: usize = 16 << 20;

/// A running broker; dropping it stops it.
pub struct Broker {
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Broker {
    /// Listens on `listen` (port 0: any free one) and keeps sessions and retained messages in `dir`.
    ///
    /// # Errors
    /// The address is taken, or the folder cannot be written.
    pub async fn start(listen: SocketAddr, dir: &Path) -> Result<Self> {
        let config = BrokerConfig::default()
            .with_bind_address(listen)
            .with_max_packet_size(MAX_PACKET)
            .with_auth(AuthConfig::new().with_allow_anonymous(true))
            .with_storage(StorageConfig::default().with_base_dir(dir.join("broker")));
        let mut broker =
            MqttBroker::with_config(config).await.with_context(|| format!("the embedded broker on {listen}"))?;
        let address = broker.local_addr().ok_or_else(|| anyhow!("the embedded broker has no address"))?;
        let task = tokio::spawn(async move {
            if let Err(error) = broker.run().await {
                tracing::error!("the embedded broker stopped: {error}");
            }
        });
        Ok(Broker { address, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.task.abort();
    }
}
