//! Who is attached to the volumes of a shard.

use nbdsnap_engine::View;

use super::VolumeId;
use super::shard::Worker;

/// A client in transmission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStatus {
    /// Names it within the server, never used again.
    pub id: u64,
    /// Who it is: an address or a process.
    pub peer: String,
    /// What it is attached to.
    pub volume: VolumeId,
    /// The view of it.
    pub view: View,
    /// Requests that it waits for.
    pub in_flight: u64,
}

impl Worker {
    /// All clients, in no particular order.
    pub(super) fn census(&mut self) -> Vec<ClientStatus> {
        let mut clients = Vec::new();
        for key in self.clients.table.keys() {
            let Some(connection) = self.clients.table.get_mut(key) else {
                continue;
            };
            clients.push(ClientStatus {
                id: connection.id,
                peer: connection.peer.clone(),
                volume: connection.volume,
                view: connection.view,
                in_flight: connection.in_flight() as u64,
            });
        }
        clients
    }
}
