//! What happens in a server, in order, for whoever wants to know: the last
//! [`KEPT`] events with ascending numbers. Publishing never waits for a reader;
//! one that falls behind by more than that learns how many it has missed.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::registry::now;
use crate::control::protocol::{EventKind, EventReport};
use crate::io::{News, What};

/// Events that can still be read.
pub const KEPT: usize = 4096;

/// The events of one server.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<Ring>,
    /// For readers that are threads.
    more: Condvar,
    /// For readers that are tasks: the number of the latest event.
    latest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    /// The number of the last event; the first is 1.
    last: u64,
    events: VecDeque<EventReport>,
    is_closed: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            ring: Mutex::default(),
            more: Condvar::new(),
            latest: watch::Sender::new(0),
        }
    }
}

impl Events {
    /// Something has happened. Number and time are put in here.
    pub fn publish(&self, mut event: EventReport) {
        let sequence = {
            let mut ring = self.lock();
            ring.last += 1;
            event.sequence = ring.last;
            event.at = now();
            if ring.events.len() == KEPT {
                ring.events.pop_front();
            }
            ring.events.push_back(event);
            ring.last
        };
        self.more.notify_all();
        self.latest.send_replace(sequence);
    }

    /// The events behind number `after`, as far as they are kept; missing ones
    /// are told of by an event of their own.
    pub fn since(&self, after: u64) -> Vec<EventReport> {
        self.lock().since(after)
    }

    /// Told of every new event.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    /// Wait for events behind number `after`, for so long at most. None: there
    /// will be no more.
    pub fn wait(&self, after: u64, patience: Duration) -> Option<Vec<EventReport>> {
        let ring = self.lock();
        let nothing = |ring: &mut Ring| ring.last <= after && !ring.is_closed;
        let waited = self.more.wait_timeout_while(ring, patience, nothing);
        let (ring, _) = waited.expect("no holder of this lock panics");
        if ring.last <= after && ring.is_closed {
            return None;
        }
        Some(ring.since(after))
    }

    /// There will be no more events.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.more.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().expect("no holder of this lock panics")
    }
}

impl Ring {
    fn since(&self, after: u64) -> Vec<EventReport> {
        let first = self.last + 1 - self.events.len() as u64;
        let mut events = Vec::new();
        if after + 1 < first {
            let mut lost = EventReport::new(EventKind::Lost);
            lost.sequence = first - 1;
            lost.at = self.events.front().map_or(0, |event| event.at);
            lost.message = Some(format!(
                "{} events were not read in time",
                first - 1 - after
            ));
            events.push(lost);
        }
        let skip = (after + 1).saturating_sub(first) as usize;
        events.extend(self.events.iter().skip(skip).cloned());
        events
    }
}

/// What a volume's thread has to tell, in the words of events.
pub(super) fn event_of(news: &News) -> Option<EventReport> {
    let (kind, client, message) = match &news.what {
        What::Invalid(why) => (EventKind::Invalid, None, Some((*why).to_owned())),
        What::Overflow => (EventKind::Overflow, None, None),
        What::Filling(_) => (EventKind::Filling, None, None),
        What::Full => (EventKind::Full, None, None),
        What::Extended(bytes) => {
            let to = format!("to {}", crate::cli::size::show(*bytes));
            (EventKind::Extended, None, Some(to))
        }
        What::MergeBegun => (EventKind::MergeBegun, None, None),
        What::MergeProgress(_) => (EventKind::MergeProgress, None, None),
        What::MergeFailed(why) => (EventKind::MergeFailed, None, Some((*why).to_owned())),
        What::ClientCame { id, peer, .. } => (EventKind::ClientCame, Some(*id), Some(peer.clone())),
        What::ClientWent { id, peer } => (EventKind::ClientWent, Some(*id), Some(peer.clone())),
        // The administrator tells of it when the snapshot has left the lists.
        What::Merged => return None,
    };
    let mut event = EventReport::new(kind).of_volume(&news.volume_name);
    event.snapshot = news.snapshot.as_ref().map(|(_, name)| name.clone());
    event.client = client;
    if let What::Filling(percent) | What::MergeProgress(percent) = news.what {
        event.percent = Some(percent.into());
    }
    event.message = message;
    Some(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_falls_behind_learns_how_much_it_missed() {
        let events = Events::default();
        assert!(events.since(0).is_empty());
        for _ in 0..KEPT + 10 {
            events.publish(EventReport::new(EventKind::Created));
        }
        let all = events.since(0);
        assert_eq!(all.len(), KEPT + 1);
        assert_eq!((all[0].event, all[0].sequence), (EventKind::Lost, 10));
        assert_eq!(
            all[0].message.as_deref(),
            Some("10 events were not read in time")
        );
        assert_eq!(all[1].sequence, 11);
        let last = (KEPT + 10) as u64;
        assert_eq!(events.since(last - 1).len(), 1);
        assert!(events.since(last).is_empty());
    }

    #[test]
    fn a_thread_waits_for_the_next_event_and_for_the_end() {
        let events = std::sync::Arc::new(Events::default());
        let reader = {
            let events = std::sync::Arc::clone(&events);
            std::thread::spawn(move || {
                let mut seen = 0;
                while let Some(new) = events.wait(seen, Duration::from_mins(1)) {
                    seen += new.len() as u64;
                }
                seen
            })
        };
        for _ in 0..3 {
            events.publish(EventReport::new(EventKind::Created));
        }
        events.close();
        assert_eq!(reader.join().unwrap(), 3);
    }
}
