//! Messages to a volume's thread from other threads, and the bell that wakes
//! it: an eventfd, rung only while the thread sleeps.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::event::EventfdFlags;

/// A queue with one reader.
#[derive(Debug)]
pub(super) struct Mailbox<T> {
    queue: Mutex<VecDeque<T>>,
    /// How many are in `queue`, to be read without its lock.
    waiting: AtomicUsize,
    /// The reader sleeps, or is about to: the next message has to ring.
    asleep: AtomicBool,
    bell: OwnedFd,
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> std::io::Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(Self {
            queue: Mutex::new(VecDeque::new()),
            waiting: AtomicUsize::new(0),
            asleep: AtomicBool::new(false),
            bell: rustix::event::eventfd(0, flags)?,
        })
    }

    /// Deliver `message`.
    pub(super) fn post(&self, message: T) {
        {
            let mut queue = self.queue.lock().expect("no holder of this lock panics");
            queue.push_back(message);
            self.waiting.store(queue.len(), Ordering::SeqCst);
        }
        // The order against `prepare_to_sleep`: one of the two sees the other.
        if self.asleep.swap(false, Ordering::SeqCst) {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Messages wait.
    pub(super) fn has_mail(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// The reader is about to wait for the bell. False: do not, there is mail.
    pub(super) fn prepare_to_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.has_mail() {
            self.wake_up();
            return false;
        }
        true
    }

    /// The reader is awake: no need to ring.
    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Stop the bell after it has rung.
    pub(super) fn silence(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
    }

    /// Take all messages, in order of delivery.
    pub(super) fn take(&self) -> VecDeque<T> {
        if !self.has_mail() {
            return VecDeque::new();
        }
        let mut queue = self.queue.lock().expect("no holder of this lock panics");
        self.waiting.store(0, Ordering::SeqCst);
        std::mem::take(&mut *queue)
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
