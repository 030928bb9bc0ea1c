//! A volume's thread: the loop that turns readiness into work.
//!
//! One turn: wait; take orders and results from the mailbox; read every socket
//! that is ready, once, and start all requests that it brought; let the volumes
//! that were touched do what they want done; send. Each step is bounded, so that
//! no client and no volume starves the others.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbdsnap_engine::{OpId, Outcome, SnapshotId, View};

use super::VolumeId;
use super::census::ClientStatus;
use super::connection::Connection;
use super::helpers::Helpers;
use super::hosted::{Hosted, HostedStatus, NewVolume, Views, VolumeOrder};
use super::mailbox::Mailbox;
use super::mapped::{MAPPED, Mapped, MappedCall};
use super::news::{Herald, Loss};
use super::pace::Sleeps;
use super::poller::{EventFlags, Patience, Poller, Ready};
use super::table::{Key, Table};
use crate::nbd::outbox::Spares;
use crate::nbd::reply::{self, StatusExtent};
use crate::nbd::transmission::{Item, Terms};

/// Bytes that one connection has read in one turn before others have theirs.
const TURN_BYTES: usize = 2 << 20;

/// A connection that has ended its handshake and moves to its volume's thread.
#[derive(Debug)]
pub struct NewConnection {
    /// What it is called from now on, never used again.
    pub id: u64,
    /// The socket, non-blocking.
    pub socket: OwnedFd,
    /// Who it is, for messages.
    pub peer: String,
    /// The volume it has chosen.
    pub volume: VolumeId,
    /// The view of it.
    pub view: View,
    /// What was agreed.
    pub terms: Terms,
    /// What the client sent behind the handshake.
    pub leftover: Vec<u8>,
}

/// Orders and results that reach a shard's thread.
#[derive(Debug)]
pub(super) enum Message {
    /// A volume moves in.
    Host(Box<NewVolume>, std::sync::mpsc::Sender<Views>),
    /// A client of one of its volumes.
    Attach(Box<NewConnection>),
    /// A helper has performed an operation of the engine.
    Completed {
        volume: VolumeId,
        op: OpId,
        outcome: Outcome,
    },
    /// A helper has asked the file system what is allocated.
    Status {
        volume: VolumeId,
        request: Key,
        status: Vec<StatusExtent>,
    },
    /// A helper has read ahead.
    Cached { volume: VolumeId, request: Key },
    /// How are the snapshots doing?
    Ask(std::sync::mpsc::Sender<Vec<HostedStatus>>),
    /// Something that one volume shall do.
    Order(VolumeId, VolumeOrder),
    /// Something that shall be done with the mapped devices.
    Mapped(MappedCall),
    /// Who is there?
    Census(std::sync::mpsc::Sender<Vec<ClientStatus>>),
    /// Part with the client of this id; false: it is not here.
    Disconnect(u64, std::sync::mpsc::Sender<bool>),
    /// Close the volumes, give clients this long to read their replies, end.
    Stop(Duration),
}

/// What a volume finds outside itself: those to whom it hands what may block,
/// and who report back here; and memory.
#[derive(Debug)]
pub(super) struct Outside {
    mail: Arc<Mailbox<Message>>,
    helpers: Helpers,
    /// Buffers for large replies, lent to whoever makes one.
    pub(super) spares: Spares,
    /// Tells a throttled write from an interrupted one.
    pub(super) sleeps: Sleeps,
    /// Who listens to what happens here.
    pub(super) herald: Arc<dyn Herald>,
}

impl Outside {
    /// A snapshot is lost and wants a mark.
    pub(super) fn loss(&self, volume: VolumeId, snapshot: SnapshotId) -> Loss {
        Loss {
            mail: Arc::clone(&self.mail),
            volume,
            snapshot,
            durable: false,
        }
    }

    /// Have `work` of a volume done by a helper; its result comes as a message.
    pub(super) fn submit(&self, volume: VolumeId, work: impl FnOnce() -> Message + Send + 'static) {
        let mail = Arc::clone(&self.mail);
        self.helpers
            .submit(volume, Box::new(move || mail.post(work())));
    }
}

/// The connections of a shard, and which of them need looking after in this turn.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) table: Table<Connection>,
    touched: Vec<Key>,
}

impl Clients {
    /// The connection, unless it has gone.
    pub(super) fn get(&mut self, key: Key) -> Option<&mut Connection> {
        self.table.get_mut(key)
    }

    /// Something was done for it: at the end of the turn it is sent what it is
    /// owed, and looked at again.
    pub(super) fn touch(&mut self, key: Key) {
        if let Some(connection) = self.table.get_mut(key)
            && !connection.is_touched
        {
            connection.is_touched = true;
            self.touched.push(key);
        }
    }
}

/// A handle to a volume's thread.
#[derive(Debug)]
pub struct Shard {
    mail: Arc<Mailbox<Message>>,
    thread: JoinHandle<bool>,
}

impl Shard {
    /// Start a thread without volumes.
    pub fn start(number: usize, herald: Arc<dyn Herald>) -> std::io::Result<Self> {
        let mail = Arc::new(Mailbox::new()?);
        let poller = Poller::new(&mail)?;
        let worker = Worker {
            poller,
            outside: Outside {
                mail: Arc::clone(&mail),
                helpers: Helpers::new(),
                spares: Spares::default(),
                sleeps: Sleeps::default(),
                herald,
            },
            clients: Clients {
                table: Table::new(),
                touched: Vec::new(),
            },
            volumes: BTreeMap::new(),
            mapped: Mapped::new(),
            departing: BTreeMap::new(),
            touched_volumes: Vec::new(),
            held: Vec::new(),
            stage: Stage::Serving,
        };
        let builder = std::thread::Builder::new().name(format!("volumes-{number}"));
        let thread = builder.spawn(move || worker.run())?;
        Ok(Self { mail, thread })
    }

    /// Have a volume move in. The answer comes when all its snapshots are there.
    pub fn host(&self, volume: NewVolume) -> Receiver<Views> {
        let (sender, receiver) = channel();
        self.mail.post(Message::Host(Box::new(volume), sender));
        receiver
    }

    /// Hand over a client.
    pub fn attach(&self, connection: NewConnection) {
        self.mail.post(Message::Attach(Box::new(connection)));
    }

    /// Ask how the snapshots of all its volumes are doing.
    pub fn statuses(&self) -> Receiver<Vec<HostedStatus>> {
        let (sender, receiver) = channel();
        self.mail.post(Message::Ask(sender));
        receiver
    }

    /// Give one of its volumes an order. Whom the order names for its answer sees
    /// the channel close if the volume is not there.
    pub fn order(&self, volume: VolumeId, order: VolumeOrder) {
        self.mail.post(Message::Order(volume, order));
    }

    /// Have something done with the mapped devices, on their thread
    /// ([`super::MAPPED_SHARD`]), between two turns of requests.
    pub fn with_mapped(&self, call: impl FnOnce(&mut Mapped) + Send + 'static) {
        self.mail.post(Message::Mapped(MappedCall(Box::new(call))));
    }

    /// Ask who is attached to its volumes.
    pub fn clients(&self) -> Receiver<Vec<ClientStatus>> {
        let (sender, receiver) = channel();
        self.mail.post(Message::Census(sender));
        receiver
    }

    /// Part with a client: what it has sent is answered as far as its socket takes
    /// the answers. False: it is none of this thread's.
    pub fn disconnect(&self, client: u64) -> Receiver<bool> {
        let (sender, receiver) = channel();
        self.mail.post(Message::Disconnect(client, sender));
        receiver
    }

    /// Take no more requests, finish those under way, make everything durable;
    /// then give clients `patience` to read their replies, and end.
    pub fn stop(&self, patience: Duration) {
        self.mail.post(Message::Stop(patience));
    }

    /// The thread has ended, though nobody may have asked it to.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Wait for the end. True if everything is durable.
    pub fn join(self) -> bool {
        self.thread.join().unwrap_or(false)
    }
}

/// Where the thread is in its life.
#[derive(Clone, Copy, Debug)]
enum Stage {
    /// At work.
    Serving,
    /// The volumes are closing.
    Closing { patience: Duration },
    /// They are closed; what clients are owed is being sent.
    Parting { until: Instant },
}

/// Where a client's requests go.
enum Home<'a> {
    Volume(&'a mut Hosted),
    Mapped(&'a mut Mapped),
}

/// The thread's own side.
pub(super) struct Worker {
    poller: Poller,
    pub(super) outside: Outside,
    pub(super) clients: Clients,
    pub(super) volumes: BTreeMap<VolumeId, Hosted>,
    pub(super) mapped: Mapped,
    /// Those that are closing in order to leave, and whom to tell.
    pub(super) departing: BTreeMap<VolumeId, std::sync::mpsc::Sender<bool>>,
    /// Volumes that were given something to do in this turn.
    touched_volumes: Vec<VolumeId>,
    /// Connections that can go on with requests they have already sent.
    held: Vec<Key>,
    stage: Stage,
}

impl Worker {
    fn run(mut self) -> bool {
        let mut ready = Vec::new();
        loop {
            let patience = self.patience();
            self.poller.wait(&self.outside.mail, patience, &mut ready);
            self.outside.sleeps.forget();
            self.handle_mail();
            // Who has gone comes first: what it sent is older than what others send now.
            ready.sort_by_key(|event| !event.flags.intersects(EventFlags::HUP | EventFlags::ERR));
            for event in &ready {
                self.handle_ready(*event);
            }
            for key in std::mem::take(&mut self.held) {
                self.take_requests(key);
            }
            self.pump_volumes();
            self.settle_clients();
            self.end_departures();
            if let Some(durable) = self.advance_stage() {
                return durable;
            }
        }
    }

    fn patience(&self) -> Patience {
        if !self.held.is_empty() || !self.touched_volumes.is_empty() {
            return Patience::None;
        }
        match self.stage {
            Stage::Parting { until } => Patience::Until(Some(until)),
            Stage::Serving | Stage::Closing { .. } => Patience::Until(None),
        }
    }

    fn handle_mail(&mut self) {
        for message in self.outside.mail.take() {
            match message {
                Message::Host(volume, report) => {
                    let id = volume.id;
                    self.volumes.insert(id, Hosted::new(*volume, report));
                    self.touch_volume(id);
                }
                Message::Attach(connection) => self.attach(*connection),
                Message::Completed {
                    volume,
                    op,
                    outcome,
                } => {
                    if volume == MAPPED {
                        self.mapped.handle_completion(op, outcome);
                        self.touch_volume(volume);
                    } else if let Some(hosted) = self.volumes.get_mut(&volume) {
                        hosted.handle_completion(op, outcome);
                        self.touch_volume(volume);
                    }
                }
                Message::Status {
                    volume,
                    request,
                    status,
                } => {
                    if let Some(hosted) = self.volumes.get_mut(&volume) {
                        hosted.handle_status(request, status, &mut self.clients, &self.outside);
                    }
                }
                Message::Cached { volume, request } => {
                    if let Some(hosted) = self.volumes.get_mut(&volume) {
                        hosted.handle_cached(request, &mut self.clients);
                    }
                }
                Message::Ask(report) => {
                    let statuses = self.volumes.values().flat_map(Hosted::statuses).collect();
                    // Whoever asked may have given up.
                    let _ = report.send(statuses);
                }
                Message::Order(volume, order) => self.execute(volume, order),
                Message::Mapped(MappedCall(call)) => {
                    call(&mut self.mapped);
                    self.touch_volume(MAPPED);
                }
                Message::Census(report) => {
                    let _ = report.send(self.census());
                }
                Message::Disconnect(client, report) => {
                    let _ = report.send(self.disconnect(client));
                }
                Message::Stop(patience) => self.begin_closing(patience),
            }
        }
    }

    pub(super) fn touch_volume(&mut self, id: VolumeId) {
        if !self.touched_volumes.contains(&id) {
            self.touched_volumes.push(id);
        }
    }

    fn attach(&mut self, new: NewConnection) {
        let there = |hosted: &Hosted| hosted.has_view(new.view);
        let is_there = match new.volume {
            MAPPED => self.mapped.attach(new.view),
            volume => self.volumes.get(&volume).is_some_and(there),
        };
        if !is_there {
            // The volume or the snapshot has left between the handshake and now.
            return;
        }
        let connection = Connection::new(new);
        self.tell_of(&connection, true);
        let key = self.clients.table.insert(connection);
        self.take_requests(key);
    }

    fn handle_ready(&mut self, event: Ready) {
        let key = Key::from_u64(event.token);
        let Some(connection) = self.clients.get(key) else {
            return;
        };
        if event
            .flags
            .intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR)
        {
            connection.unblock();
        }
        if event.flags != EventFlags::OUT && !connection.is_held {
            connection.receive();
        }
        self.take_requests(key);
        if !event.flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            return;
        }
        // It has gone: hear it to its end, before anybody's newer requests.
        while let Some(connection) = self.clients.get(key)
            && connection.is_heard_on()
            && connection.receive()
        {
            self.take_requests(key);
        }
    }

    /// Start the requests that the connection has sent, as far as its bounds allow.
    fn take_requests(&mut self, key: Key) {
        let Some(connection) = self.clients.table.get_mut(key) else {
            return;
        };
        let volume = connection.volume;
        let mut home = match volume {
            MAPPED => Home::Mapped(&mut self.mapped),
            volume => {
                let hosted = self.volumes.get_mut(&volume);
                Home::Volume(hosted.expect("clients leave before their volume"))
            }
        };
        if connection.is_held && connection.has_gone() {
            // Others may have written the same places since; nobody was told that
            // these requests were done.
            connection.abandon();
        }
        connection.is_held = false;
        let mut budget = TURN_BYTES;
        loop {
            if connection.is_full() || budget == 0 {
                connection.is_held = true;
                break;
            }
            let item = match connection.next_waiting_read() {
                Some(of) => Ok(Some(of.into())),
                None => connection.transmission.poll(),
            };
            match item {
                Ok(Some(Item::Call { cookie, call })) => {
                    budget = budget.saturating_sub(call.reply_bytes());
                    connection.count(&call);
                    match &mut home {
                        Home::Volume(hosted) => {
                            hosted.start(key, connection, cookie, call, &mut self.outside);
                        }
                        Home::Mapped(mapped) => mapped.start(key, connection, cookie, call),
                    }
                }
                Ok(Some(Item::Refused { cookie, refusal })) => {
                    let structured = connection.terms.structured;
                    reply::refused(&mut connection.outbox, structured, cookie, refusal);
                }
                Ok(Some(Item::Disconnect)) => connection.end_input(),
                Ok(None) => break,
                Err(broken) => {
                    tracing::warn!(peer = connection.peer, "connection dropped: {broken}");
                    connection.end_input();
                    connection.lose();
                    break;
                }
            }
            connection.send_batch();
        }
        self.touch_volume(volume);
        self.clients.touch(key);
    }

    fn pump_volumes(&mut self) {
        for id in std::mem::take(&mut self.touched_volumes) {
            if id == MAPPED {
                if self.mapped.pump(&mut self.clients, &mut self.outside) {
                    self.touch_volume(id);
                }
                continue;
            }
            let Some(hosted) = self.volumes.get_mut(&id) else {
                continue;
            };
            if hosted.pump(&mut self.clients, &mut self.outside) {
                self.touch_volume(id);
            }
        }
    }

    /// Send what is owed, and see how it goes on with each client that had a
    /// part in this turn.
    fn settle_clients(&mut self) {
        for key in std::mem::take(&mut self.clients.touched) {
            let Some(connection) = self.clients.table.get_mut(key) else {
                continue;
            };
            connection.is_touched = false;
            connection.send();
            if connection.outbox.is_empty() {
                connection.outbox.give_back(&mut self.outside.spares);
            }
            if connection.is_finished() {
                self.part_with(key);
                continue;
            }
            if (connection.is_held || connection.has_waiting_read()) && !connection.is_full() {
                self.held.push(key);
            }
            let wanted = connection.wanted();
            let set =
                self.poller
                    .set_interest(&*connection, key.to_u64(), connection.interest, wanted);
            connection.interest = wanted;
            if let Err(error) = set {
                tracing::warn!(
                    peer = connection.peer,
                    "connection dropped: epoll refuses it: {error}"
                );
                self.part_with(key);
            }
        }
    }

    /// Forget the connection; its requests run to their end without it.
    pub(super) fn part_with(&mut self, key: Key) {
        if let Some(connection) = self.clients.table.remove(key) {
            if connection.volume == MAPPED {
                self.mapped.detach(connection.view);
                self.touch_volume(MAPPED);
            }
            tracing::debug!(peer = connection.peer, "client has gone");
            self.tell_of(&connection, false);
        }
    }

    fn begin_closing(&mut self, patience: Duration) {
        if matches!(self.stage, Stage::Serving) {
            self.stage = Stage::Closing { patience };
            for (id, hosted) in &mut self.volumes {
                hosted.close();
                self.touched_volumes.push(*id);
            }
            self.mapped.close();
            self.touch_volume(MAPPED);
        }
    }

    /// Go on with closing; at the end, say whether everything is durable.
    fn advance_stage(&mut self) -> Option<bool> {
        if let Stage::Closing { patience } = self.stage
            && self.mapped.closed().is_some()
            && self
                .volumes
                .values()
                .all(|hosted| hosted.closed().is_some())
        {
            let until = Instant::now() + patience;
            self.stage = Stage::Parting { until };
            for key in self.clients.table.keys() {
                if let Some(connection) = self.clients.get(key) {
                    connection.end_input();
                    self.clients.touch(key);
                }
            }
            self.settle_clients();
        }
        let Stage::Parting { until } = self.stage else {
            return None;
        };
        // What was sent but not yet served is refused like what comes later.
        if !self.clients.table.is_empty() && Instant::now() < until {
            return None;
        }
        let volumes = self.volumes.values();
        let all = volumes.map(Hosted::closed).chain([self.mapped.closed()]);
        Some(all.into_iter().all(|closed| closed == Some(true)))
    }
}
