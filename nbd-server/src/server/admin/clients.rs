//! `clients` and `disconnect`.

use std::time::UNIX_EPOCH;

use nbdsnap_engine::View;

use super::refusal::Refused;
use super::turn::Turn;
use crate::control::protocol::{Answer, ClientReport, Disconnect};
use crate::io::{ClientStatus, MAPPED, Shard, view_of};
use crate::names;

impl Turn<'_> {
    pub(super) fn report_clients(&mut self) -> Result<Answer, Refused> {
        let asked: Vec<_> = self.shards.iter().map(Shard::clients).collect();
        let mut clients = Vec::new();
        for (shard, answer) in asked.into_iter().enumerate() {
            let here = self.wait(shard, &answer, None)?;
            clients.extend(here.iter().map(|client| self.client(client)));
        }
        clients.sort_by_key(|client: &ClientReport| client.id);
        Ok(Answer::Clients(clients))
    }

    pub(super) fn disconnect(&mut self, disconnect: &Disconnect) -> Result<Answer, Refused> {
        let Answer::Clients(mut clients) = self.report_clients()? else {
            unreachable!("clients are what was asked for");
        };
        clients.retain(|client| client.id == disconnect.client);
        let mut found = false;
        let asked = self.shards.iter();
        let asked: Vec<_> = asked
            .map(|shard| shard.disconnect(disconnect.client))
            .collect();
        for (shard, answer) in asked.into_iter().enumerate() {
            found |= self.wait(shard, &answer, None)?;
        }
        if found {
            Ok(Answer::Clients(clients))
        } else {
            Err(Refused::NoClient(disconnect.client))
        }
    }

    fn client(&self, client: &ClientStatus) -> ClientReport {
        let since = client.since.duration_since(UNIX_EPOCH);
        ClientReport {
            id: client.id,
            peer: client.peer.clone(),
            export: self.export_of(client),
            since: since.map_or(0, |since| since.as_secs()),
            in_flight: client.in_flight,
            requests: client.traffic.requests,
            read_bytes: client.traffic.read_bytes,
            written_bytes: client.traffic.written_bytes,
            requests_per_second: None,
            read_bytes_per_second: None,
            written_bytes_per_second: None,
        }
    }

    /// What a client is attached to; a snapshot that has left has no name any more.
    fn export_of(&self, client: &ClientStatus) -> String {
        if client.volume == MAPPED {
            let mut devices = self.registry.mapped.devices.iter();
            let device = devices.find(|device| view_of(device.id) == client.view);
            return device.map_or_else(String::new, |device| device.name.clone());
        }
        let mut volumes = self.registry.volumes.iter();
        let Some(volume) = volumes.find(|volume| volume.id == client.volume) else {
            return String::new();
        };
        match client.view {
            View::Origin => volume.name.clone(),
            View::Snapshot(id) => {
                let entry = volume.snapshots.iter().find(|entry| entry.id == id);
                names::export(&volume.name, entry.map_or("", |entry| &entry.name))
            }
        }
    }
}
