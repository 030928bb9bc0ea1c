//! Orders as a shard's thread executes them, as far as they concern clients and
//! the coming and going of volumes: who is attached, who has to go.

use std::time::SystemTime;

use nbdsnap_engine::View;

use super::VolumeId;
use super::connection::{Connection, Traffic};
use super::hosted::{NotMerged, VolumeOrder};
use super::mapped::MAPPED;
use super::news::{News, What};
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
    /// When it attached.
    pub since: SystemTime,
    /// Requests that it waits for.
    pub in_flight: u64,
    /// What it has asked for.
    pub traffic: Traffic,
}

impl Worker {
    /// Give a volume its order. If the volume has gone, so has whoever would answer.
    pub(super) fn execute(&mut self, volume: VolumeId, order: VolumeOrder) {
        if !self.volumes.contains_key(&volume) {
            return;
        }
        let mut leaving = None;
        match &order {
            VolumeOrder::Remove { snapshot, .. } => leaving = Some(View::Snapshot(*snapshot)),
            VolumeOrder::Merge {
                snapshot,
                only_idle,
                begun,
            } => {
                let of = self.volumes[&volume].origin_of(*snapshot);
                let count = self.attached(volume, of);
                if *only_idle && count > 0 {
                    let _ = begun.send(Err(NotMerged::InUse(count)));
                    return;
                }
                leaving = Some(View::Snapshot(*snapshot));
            }
            VolumeOrder::Leave { left } => {
                self.departing.insert(volume, left.clone());
            }
            _ => {}
        }
        let hosted = self.volumes.get_mut(&volume);
        hosted.expect("looked for above").handle_order(order);
        self.touch_volume(volume);
        if let Some(view) = leaving {
            self.hear_no_more(volume, view);
        }
    }

    /// Clients of a view.
    fn attached(&mut self, volume: VolumeId, view: View) -> u64 {
        let mut count = 0;
        for key in self.clients.table.keys() {
            let client = self.clients.table.get_mut(key);
            count += u64::from(client.is_some_and(|one| one.volume == volume && one.view == view));
        }
        count
    }

    /// Hear no more from the clients of a view: what they have sent is answered,
    /// then they are disconnected.
    fn hear_no_more(&mut self, volume: VolumeId, view: View) {
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

    /// Part with one client; false: it is not here.
    pub(super) fn disconnect(&mut self, client: u64) -> bool {
        for key in self.clients.table.keys() {
            if let Some(connection) = self.clients.table.get_mut(key)
                && connection.id == client
            {
                connection.dismiss();
                self.clients.touch(key);
                return true;
            }
        }
        false
    }

    /// Volumes that have closed leave, and what is left of their clients with them.
    pub(super) fn end_departures(&mut self) {
        if self.departing.is_empty() {
            return;
        }
        let closed = |id: &VolumeId| {
            let hosted = self.volumes.get(id)?;
            Some((*id, hosted.closed()?))
        };
        let closed: Vec<(VolumeId, bool)> = self.departing.keys().filter_map(closed).collect();
        for (id, durable) in closed {
            for key in self.clients.table.keys() {
                if let Some(connection) = self.clients.table.get_mut(key)
                    && connection.volume == id
                {
                    connection.dismiss();
                    connection.send();
                    self.part_with(key);
                }
            }
            self.volumes.remove(&id);
            if let Some(left) = self.departing.remove(&id) {
                let _ = left.send(durable);
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
                since: connection.since,
                in_flight: connection.in_flight() as u64,
                traffic: connection.traffic,
            });
        }
        clients
    }

    /// Tell that a client has come, or gone.
    pub(super) fn tell_of(&self, connection: &Connection, came: bool) {
        let (volume_name, snapshot) = match connection.volume {
            MAPPED => (self.mapped.name_of(connection.view), None),
            volume => match self.volumes.get(&volume) {
                Some(hosted) => hosted.names(connection.view),
                None => return,
            },
        };
        let (id, peer) = (connection.id, connection.peer.clone());
        let what = if came {
            let view = connection.view;
            What::ClientCame { id, peer, view }
        } else {
            What::ClientWent { id, peer }
        };
        self.outside.herald.tell(News {
            volume: connection.volume,
            volume_name,
            snapshot,
            what,
        });
    }
}
