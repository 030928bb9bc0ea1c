//! The threads that wait for disks, so that the volumes' threads need not:
//! flushes, growth, zeroing, trimming, cold reads, large or throttled writes,
//! and questions to the file system. Each volume has a pool; it starts
//! threads as they are needed, up to a bound, and they end when idle for long.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// Something that may wait for a disk.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// A helper without work for this long ends.
const IDLE: Duration = Duration::from_secs(10);

/// A handle to the pool. The threads end some time after the last handle is gone.
#[derive(Clone)]
pub(super) struct Helpers {
    pool: Arc<Pool>,
}

struct Pool {
    most: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl std::fmt::Debug for Helpers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Helpers").finish_non_exhaustive()
    }
}

impl Helpers {
    /// A pool of at most `most` threads.
    pub(super) fn new(most: usize) -> Self {
        assert!(most > 0, "a pool without helpers never does anything");
        Self {
            pool: Arc::new(Pool {
                most,
                state: Mutex::default(),
                work: Condvar::new(),
            }),
        }
    }

    /// Have `job` done, in order of submission as far as there are threads.
    pub(super) fn submit(&self, job: Job) {
        let mut state = self
            .pool
            .state
            .lock()
            .expect("no holder of this lock panics");
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.pool.work.notify_one();
            return;
        }
        if state.threads < self.pool.most {
            state.threads += 1;
            let pool = Arc::clone(&self.pool);
            let builder = thread::Builder::new().name("disk-helper".into());
            if builder.spawn(move || pool.help()).is_err() {
                state.threads -= 1;
                assert!(
                    state.threads > 0,
                    "not one helper thread can be started: raise the limit of threads"
                );
            }
        }
        self.pool.work.notify_one();
    }
}

impl Pool {
    fn help(&self) {
        let mut state = self.state.lock().expect("no holder of this lock panics");
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    // Its volume would wait for ever. What was flushed is safe, and
                    // a server that is gone is noticed.
                    std::process::abort();
                }
                state = self.state.lock().expect("no holder of this lock panics");
                continue;
            }
            state.idle += 1;
            let waited = self.work.wait_timeout(state, IDLE);
            let (next, timeout) = waited.expect("no holder of this lock panics");
            state = next;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn every_job_is_done_though_some_block_each_other() {
        let helpers = Helpers::new(3);
        let (sender, receiver) = mpsc::channel();
        // Two jobs that can only end together need two threads at once.
        let barrier = Arc::new(std::sync::Barrier::new(2));
        for number in 0..2 {
            let (sender, barrier) = (sender.clone(), Arc::clone(&barrier));
            helpers.submit(Box::new(move || {
                barrier.wait();
                sender.send(number).unwrap();
            }));
        }
        for number in 2..100 {
            let sender = sender.clone();
            helpers.submit(Box::new(move || sender.send(number).unwrap()));
        }
        let mut done: Vec<i32> = receiver.iter().take(100).collect();
        done.sort_unstable();
        assert_eq!(done, (0..100).collect::<Vec<_>>());
    }
}
