//! Orders as a shard's thread executes them, as far as they concern clients: who
//! is attached to its volumes, and who has to go.

use nbdsnap_engine::View;

use super::VolumeId;
use super::hosted::VolumeOrder;
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
    /// Give a volume its order. If the volume has gone, so has whoever would answer.
    pub(super) fn execute(&mut self, volume: VolumeId, order: VolumeOrder) {
        let Some(hosted) = self.volumes.get_mut(&volume) else {
            return;
        };
        let leaving = match &order {
            VolumeOrder::Remove { snapshot, .. } => Some(View::Snapshot(*snapshot)),
            VolumeOrder::Hold { .. } | VolumeOrder::Take { .. } | VolumeOrder::Abandon { .. } => {
                None
            }
        };
        hosted.handle_order(order);
        self.touch_volume(volume);
        if let Some(view) = leaving {
            self.dismiss(volume, view);
        }
    }

    /// Hear no more from the clients of a view: what they have sent is answered,
    /// then they are disconnected.
    fn dismiss(&mut self, volume: VolumeId, view: View) {
        for key in self.clients.table.keys() {
            if let Some(connection) = self.clients.table.get_mut(key)
                && connection.volume == volume
                && connection.view == view
            {
                connection.end_input();
                self.clients.touch(key);
            }
        }
    }

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
