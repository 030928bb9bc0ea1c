//! What the volume is asked about rather than to do: BLOCK_STATUS and CACHE,
//! which begin with the engine's map and go on at a helper's, since the file
//! system may keep them waiting; and how its snapshots are doing.

use std::sync::Arc;

use nbdsnap_engine::{Device, Extent};

use super::{Hosted, HostedStatus, Kind, Waiting, answer, local_disk, refuse};
use crate::io::block_status::{self, EXTENTS_MAX};
use crate::io::connection::Connection;
use crate::io::file::Medium;
use crate::io::shard::{Clients, Message, Outside};
use crate::io::table::Key;
use crate::nbd::reply::{self, Refusal, StatusExtent};

/// A BLOCK_STATUS that finds the volume changed under it is tried again this often.
const STATUS_TRIES: u32 = 3;

impl Hosted {
    /// How its snapshots are doing, in the order in which the engine got them.
    pub(in crate::io) fn statuses(&self) -> impl Iterator<Item = HostedStatus> {
        self.stores.keys().filter_map(|&id| {
            Some(HostedStatus {
                volume: self.id,
                snapshot: id,
                export: self.export(id),
                status: self.tree.status(id)?,
                info: self.tree.snapshot_info(id),
                merge: self.tree.merge_of(id),
            })
        })
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one request and whom to ask"
    )]
    pub(super) fn start_status(
        &mut self,
        key: Key,
        connection: &mut Connection,
        cookie: u64,
        offset: u64,
        len: u32,
        one_extent: bool,
        outside: &Outside,
    ) {
        let len = u64::from(len);
        let extents = match self.tree.map(connection.view, offset, len, EXTENTS_MAX) {
            Ok(extents) => extents,
            Err(failure) => return refuse(connection, cookie, Refusal::Failed(failure)),
        };
        let asks_origin = extents.iter().any(|extent| extent.device == Device::Origin);
        if !asks_origin || self.origin.disk.medium == Medium::OriginBlockDevice {
            let status = block_status::all_data(&extents);
            answer_status(connection, cookie, one_extent, &status);
            return;
        }
        connection.begin(0);
        let id = self.waiting.insert(Waiting {
            connection: key,
            cookie,
            bytes: 0,
            kind: Kind::Status {
                offset,
                len,
                one_extent,
                extents: extents.clone(),
                tries: 1,
            },
        });
        self.ask_file_system(id, extents, outside);
    }

    fn ask_file_system(&self, request: Key, extents: Vec<Extent>, outside: &Outside) {
        let disk = Arc::clone(&self.origin.disk);
        let volume = self.id;
        outside.submit(volume, move || Message::Status {
            volume,
            request,
            status: block_status::look_up(&disk.file, &extents),
        });
    }

    /// A helper has an answer to [`Hosted::ask_file_system`].
    pub(in crate::io) fn handle_status(
        &mut self,
        request: Key,
        status: Vec<StatusExtent>,
        clients: &mut Clients,
        outside: &Outside,
    ) {
        let Some(waiting) = self.waiting.get_mut(request) else {
            return;
        };
        let Kind::Status {
            offset,
            len,
            one_extent,
            extents,
            tries,
        } = &mut waiting.kind
        else {
            panic!("a status for a request that asked for none");
        };
        let Some(connection) = clients.get(waiting.connection) else {
            self.waiting.remove(request);
            return;
        };
        // Only if the view lies where it lay was the file system asked about its
        // bytes: see `block_status`.
        let now = self.tree.map(connection.view, *offset, *len, EXTENTS_MAX);
        let status = match now {
            Err(failure) => Err(failure),
            Ok(now) if now == *extents => Ok(status),
            Ok(now) if *tries < STATUS_TRIES => {
                *tries += 1;
                extents.clone_from(&now);
                self.ask_file_system(request, now, outside);
                return;
            }
            Ok(now) => Ok(block_status::all_data(&now)),
        };
        let (cookie, one_extent) = (waiting.cookie, *one_extent);
        match status {
            Ok(status) => answer_status(connection, cookie, one_extent, &status),
            Err(failure) => refuse(connection, cookie, Refusal::Failed(failure)),
        }
        connection.finish(0);
        clients.touch(waiting.connection);
        self.waiting.remove(request);
    }

    /// Reading ahead is advice: the reply does not wait for it.
    pub(super) fn start_cache(
        &mut self,
        key: Key,
        connection: &mut Connection,
        cookie: u64,
        offset: u64,
        len: u32,
        outside: &Outside,
    ) {
        let extents = match self
            .tree
            .map(connection.view, offset, u64::from(len), EXTENTS_MAX)
        {
            Ok(extents) => extents,
            Err(failure) => return refuse(connection, cookie, Refusal::Failed(failure)),
        };
        let ranges: Vec<_> = extents
            .iter()
            .map(|extent| {
                let local = local_disk(&mut self.origin, &mut self.stores, extent.device);
                (Arc::clone(&local.disk), extent.offset, extent.len)
            })
            .collect();
        connection.begin(0);
        let request = self.waiting.insert(Waiting {
            connection: key,
            cookie,
            bytes: 0,
            kind: Kind::Word,
        });
        let volume = self.id;
        outside.submit(volume, move || {
            for (disk, offset, len) in ranges {
                let len = std::num::NonZeroU64::new(len);
                // It is a hint to the kernel: what it cannot do is not missed.
                let _ = rustix::fs::fadvise(&disk.file, offset, len, rustix::fs::Advice::WillNeed);
            }
            Message::Cached { volume, request }
        });
    }

    /// A helper has read ahead.
    pub(in crate::io) fn handle_cached(&mut self, request: Key, clients: &mut Clients) {
        if let Some(waiting) = self.waiting.remove(request) {
            answer(clients, &waiting, Ok(Vec::new()));
        }
    }
}

pub(in crate::io) fn answer_status(
    connection: &mut Connection,
    cookie: u64,
    one_extent: bool,
    status: &[StatusExtent],
) {
    let context = connection
        .terms
        .base_allocation
        .expect("checked when the request came in");
    let told = if one_extent { &status[..1] } else { status };
    reply::block_status(&mut connection.outbox, cookie, context, told);
}
