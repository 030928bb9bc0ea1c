//! Waiting for sockets and messages, without sleeping where that pays: while
//! traffic comes in quick succession the thread polls for a short time before
//! it sleeps, because being woken costs more than most requests; when polling
//! has brought nothing it is given up until traffic is quick again.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::mailbox::Mailbox;

pub(super) use rustix::event::epoll::EventFlags;

/// Polls at most this long.
const POLL_FOR: Duration = Duration::from_micros(50);
/// A sleep shorter than this would have been found by polling: most of it was
/// the waking up.
const SHORT_SLEEP: Duration = Duration::from_micros(120);
/// Trust in polling, gained by short waits, lost by long ones.
const TRUST_MAX: u32 = 8;
/// Events taken at once.
const BATCH: usize = 64;
/// The token of the mailbox's bell.
const BELL: u64 = u64::MAX;

/// How long [`Poller::wait`] may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// There is other work: only look.
    None,
    /// Until something comes, or this moment.
    Until(Option<Instant>),
}

/// What a socket is ready for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    /// The token it was registered with.
    pub(super) token: u64,
    pub(super) flags: EventFlags,
}

/// An epoll instance with a policy.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: OwnedFd,
    trust: u32,
}

impl Poller {
    /// A poller that listens to the bell of `mail`.
    pub(super) fn new<T>(mail: &Mailbox<T>) -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(BELL);
        epoll::add(&epoll, mail, data, EventFlags::IN)?;
        Ok(Self { epoll, trust: 0 })
    }

    /// Change what is asked about a socket. Asking for nothing hears of nothing,
    /// not even of errors.
    pub(super) fn set_interest(
        &self,
        socket: impl AsFd,
        token: u64,
        before: EventFlags,
        after: EventFlags,
    ) -> std::io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        match (before.is_empty(), after.is_empty()) {
            _ if before == after => {}
            (true, _) => epoll::add(&self.epoll, socket, data, after)?,
            (_, true) => epoll::delete(&self.epoll, socket)?,
            (false, false) => epoll::modify(&self.epoll, socket, data, after)?,
        }
        Ok(())
    }

    /// Wait for sockets and mail; `ready` gets the sockets.
    pub(super) fn wait<T>(
        &mut self,
        mail: &Mailbox<T>,
        patience: Patience,
        ready: &mut Vec<Ready>,
    ) {
        ready.clear();
        self.look(mail, ready);
        let Patience::Until(deadline) = patience else {
            return;
        };
        if !ready.is_empty() || mail.has_mail() {
            return;
        }
        let began = Instant::now();
        if self.trust > 0 {
            while began.elapsed() < POLL_FOR {
                std::thread::yield_now();
                self.look(mail, ready);
                if !ready.is_empty() || mail.has_mail() {
                    self.trust = (self.trust + 1).min(TRUST_MAX);
                    return;
                }
            }
            self.trust /= 2;
        }
        self.sleep(mail, deadline, ready);
        if began.elapsed() < SHORT_SLEEP {
            self.trust = (self.trust + 1).min(TRUST_MAX);
        }
    }

    fn look<T>(&self, mail: &Mailbox<T>, ready: &mut Vec<Ready>) {
        let now = Timespec::default();
        self.epoll_wait(mail, Some(&now), ready);
    }

    fn sleep<T>(&self, mail: &Mailbox<T>, deadline: Option<Instant>, ready: &mut Vec<Ready>) {
        if !mail.prepare_to_sleep() {
            return;
        }
        let timeout = deadline.map(|deadline| {
            // Whole milliseconds, rounded up: older kernels count in nothing finer.
            let left = deadline.saturating_duration_since(Instant::now());
            let millis = left.as_millis() as i64 + 1;
            Timespec {
                tv_sec: millis / 1000,
                tv_nsec: millis % 1000 * 1_000_000,
            }
        });
        self.epoll_wait(mail, timeout.as_ref(), ready);
        mail.wake_up();
    }

    fn epoll_wait<T>(&self, mail: &Mailbox<T>, timeout: Option<&Timespec>, ready: &mut Vec<Ready>) {
        let mut events = [const { MaybeUninit::uninit() }; BATCH];
        let events = match epoll::wait(&self.epoll, &mut events, timeout) {
            Ok((events, _)) => &*events,
            Err(Errno::INTR) => return,
            Err(errno) => panic!("epoll_wait on an epoll instance of our own failed: {errno}"),
        };
        for event in events {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == BELL {
                mail.silence();
            } else {
                ready.push(Ready { token, flags });
            }
        }
    }
}
