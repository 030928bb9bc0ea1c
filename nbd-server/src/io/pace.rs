//! Whether I/O that may block can be risked on a volume's thread: yes, until
//! one has taken long; then not for a while (a writer that the kernel throttles
//! stays throttled for some time).
//! The caller brings the clock.

use std::time::{Duration, Instant};

use super::sys;

/// How a device has been behaving.
#[derive(Debug)]
pub(super) struct Pace {
    /// More than this is slow.
    limit: Duration,
    /// Until then, others do the waiting.
    avoid_until: Option<Instant>,
}

/// A slow call is followed by at least this much caution.
const CAUTION_MIN: Duration = Duration::from_millis(50);
/// And by at most this much.
const CAUTION_MAX: Duration = Duration::from_secs(5);

/// How long a call took, and whether it waited for something meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) began: Instant,
    pub(super) ended: Instant,
    /// Bytes that it moved: they take their time too.
    pub(super) bytes: usize,
}

impl Pace {
    /// Calls of up to `limit` are quick, and a nanosecond more for each byte.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            avoid_until: None,
        }
    }

    /// A call may be made on the volume's thread.
    pub(super) fn is_quick(&mut self, now: impl FnOnce() -> Instant) -> bool {
        let Some(until) = self.avoid_until else {
            return true;
        };
        let is_quick = now() >= until;
        if is_quick {
            self.avoid_until = None;
        }
        is_quick
    }

    /// A call was made on the volume's thread. `has_slept` is asked only if it
    /// took long: another thread may merely have had the processor.
    pub(super) fn record(&mut self, call: Call, has_slept: impl FnOnce() -> bool) {
        let took = call.ended.saturating_duration_since(call.began);
        let limit = self.limit + Duration::from_nanos(call.bytes as u64);
        if took > limit && has_slept() {
            let caution = (took * 10).clamp(CAUTION_MIN, CAUTION_MAX);
            self.avoid_until = Some(call.ended + caution);
        }
    }
}

/// Notices whether this thread has waited inside the kernel, as opposed to
/// having lost the processor: the kernel counts the two apart.
#[derive(Debug, Default)]
pub(super) struct Sleeps {
    /// The kernel's count at some moment since the thread last slept on purpose.
    before: Option<u64>,
}

impl Sleeps {
    /// The thread may have slept on purpose: forget what was counted.
    pub(super) fn forget(&mut self) {
        self.before = None;
    }

    /// Something that may sleep is about to be done.
    pub(super) fn watch(&mut self) {
        if self.before.is_none() {
            self.before = Some(sys::voluntary_switches());
        }
    }

    /// Whether the thread has slept since it was first watched.
    pub(super) fn has_slept(&mut self) -> bool {
        let now = sys::voluntary_switches();
        self.before.replace(now).is_some_and(|before| before < now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_call_is_followed_by_caution_in_proportion() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let at = |millis| move || start + ms(millis);
        let call = |millis, bytes| Call {
            began: start,
            ended: start + ms(millis),
            bytes,
        };
        let mut pace = Pace::new(ms(1));
        pace.record(call(1, 0), || true);
        pace.record(call(2, 1_000_000), || true);
        pace.record(call(20, 0), || false);
        assert!(pace.is_quick(at(1)));
        pace.record(call(20, 0), || true);
        assert!(!pace.is_quick(at(20)));
        assert!(!pace.is_quick(at(219)));
        assert!(pace.is_quick(at(220)));
        pace.record(call(9000, 0), || true);
        assert!(pace.is_quick(at(14_000)));
    }

    #[test]
    fn sleeping_is_noticed() {
        let mut sleeps = Sleeps::default();
        sleeps.watch();
        std::thread::sleep(Duration::from_millis(1));
        assert!(sleeps.has_slept());
    }
}
