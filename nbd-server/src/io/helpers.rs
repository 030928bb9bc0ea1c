//! The threads that wait for disks, so that the volumes' threads need not:
//! flushes, growth, zeroing, trimming, cold reads, large or throttled writes,
//! and questions to the file system.
//!
//! The volumes of a shard share one pool. It promises:
//!
//! - threads are started as they are needed, up to a bound, and end when idle
//!   for long: a thousand volumes at rest have none;
//! - volumes take turns, and one has so many operations under way at most: the
//!   long queue of one holds up another's short one no longer than a turn;
//! - a disk that hangs holds up nobody else's (durability.md, rule 13). Whatever
//!   has been under way for long does not count against the bound: somebody else
//!   gets a thread in its place, and its own volume none as long as others wait.
//!   So there are never more threads than the bound, those of volumes whose disks
//!   hang, and one that looks after them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::VolumeId;

/// Something that may wait for a disk.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// How many threads a pool has, and for how long.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Jobs under way, those that hang not counted.
    threads: usize,
    /// Of these, jobs of one volume.
    of_one: usize,
    /// A job that takes longer hangs.
    hangs_after: Duration,
    /// A helper without work for this long ends.
    idle: Duration,
}

const BOUNDS: Bounds = Bounds {
    threads: 32,
    of_one: 8,
    hangs_after: Duration::from_secs(1),
    idle: Duration::from_secs(10),
};

/// A handle to the pool. The threads end some time after the last handle is gone.
#[derive(Clone)]
pub(super) struct Helpers {
    pool: Arc<Pool>,
}

struct Pool {
    bounds: Bounds,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    volumes: BTreeMap<VolumeId, Queue>,
    /// Volumes that have jobs and may have one more under way, in their turns.
    turns: VecDeque<VolumeId>,
    /// Jobs of these and of all others.
    waiting: usize,
    /// What is under way, by numbers in the order in which it was begun.
    running: BTreeMap<u64, Running>,
    begun: u64,
    /// These threads, and those that have nothing under way.
    threads: usize,
}

/// What one volume has in the pool; forgotten when that is nothing.
#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    running: usize,
    has_turn: bool,
}

struct Running {
    volume: VolumeId,
    since: Instant,
}

/// A job that was begun.
struct Begun {
    number: u64,
    job: Job,
}

impl std::fmt::Debug for Helpers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Helpers").finish_non_exhaustive()
    }
}

impl Helpers {
    /// A pool without threads.
    pub(super) fn new() -> Self {
        Self::with(BOUNDS)
    }

    fn with(bounds: Bounds) -> Self {
        assert!(
            bounds.threads > 0 && bounds.of_one > 0,
            "a pool without helpers never does anything"
        );
        Self {
            pool: Arc::new(Pool {
                bounds,
                state: Mutex::default(),
                work: Condvar::new(),
            }),
        }
    }

    /// Have `job` of `volume` done; those of one volume are begun in the order of
    /// submission.
    pub(super) fn submit(&self, volume: VolumeId, job: Job) {
        let mut state = self.pool.lock();
        state.push(volume, job, self.pool.bounds.of_one);
        self.pool.see_to_threads(&mut state);
    }
}

impl State {
    fn push(&mut self, volume: VolumeId, job: Job, of_one: usize) {
        self.waiting += 1;
        let queue = self.volumes.entry(volume).or_default();
        queue.jobs.push_back(job);
        if !queue.has_turn && queue.running < of_one {
            queue.has_turn = true;
            self.turns.push_back(volume);
        }
    }

    /// The next job, of the volume whose turn it is; none of those in `passed_over`.
    fn begin(&mut self, of_one: usize, passed_over: &BTreeSet<VolumeId>) -> Option<Begun> {
        let place = self.turns.iter().position(|one| !passed_over.contains(one));
        let volume = self.turns.remove(place?).expect("it was found there");
        let queue = self.volumes.get_mut(&volume).expect("it has a turn");
        let job = queue.jobs.pop_front().expect("it has a turn");
        queue.running += 1;
        queue.has_turn = !queue.jobs.is_empty() && queue.running < of_one;
        if queue.has_turn {
            self.turns.push_back(volume);
        }
        self.waiting -= 1;
        let number = self.begun;
        self.begun += 1;
        let since = Instant::now();
        self.running.insert(number, Running { volume, since });
        Some(Begun { number, job })
    }

    fn end(&mut self, number: u64) {
        let Running { volume, .. } = self.running.remove(&number).expect("it was begun");
        let queue = self.volumes.get_mut(&volume).expect("it has one running");
        queue.running -= 1;
        if queue.jobs.is_empty() {
            if queue.running == 0 {
                self.volumes.remove(&volume);
            }
        } else if !queue.has_turn {
            queue.has_turn = true;
            self.turns.push_back(volume);
        }
    }

    /// What hangs, as far as it is known by `now`: the first that were begun.
    fn hanging(&self, after: Duration, now: Instant) -> impl Iterator<Item = &Running> {
        let hangs = move |one: &&Running| now.saturating_duration_since(one.since) >= after;
        self.running.values().take_while(hangs)
    }
}

/// What a helper does next.
enum Next {
    Work(Begun),
    /// Nothing for so long; then it may end, if there is nothing at all.
    Wait(Duration),
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Wake or start whoever is needed for what waits: a helper where there is room
    /// for one, else, once, somebody who notices when something hangs.
    fn see_to_threads(self: &Arc<Self>, state: &mut State) {
        if state.turns.is_empty() {
            return;
        }
        let room = self.bounds.threads.saturating_sub(state.running.len());
        let wanted = state.waiting.min(room.max(1));
        // Those that were started just now are not idle yet.
        if state.threads - state.running.len() < wanted {
            self.start_one(state);
        }
        if room > 0 {
            self.work.notify_one();
        }
    }

    fn start_one(self: &Arc<Self>, state: &mut State) {
        let pool = Arc::clone(self);
        let builder = thread::Builder::new().name("disk-helper".into());
        match builder.spawn(move || pool.help()) {
            Ok(_) => state.threads += 1,
            Err(_) => assert!(
                state.threads > 0,
                "not one helper thread can be started: raise the limit of threads"
            ),
        }
    }

    fn next(&self, state: &mut State) -> Next {
        let Bounds {
            threads,
            of_one,
            hangs_after,
            idle,
        } = self.bounds;
        if state.turns.is_empty() {
            return Next::Wait(idle);
        }
        let mut passed_over = BTreeSet::new();
        let mut patience = idle;
        if state.running.len() >= threads {
            let now = Instant::now();
            let mut hanging = 0;
            for one in state.hanging(hangs_after, now) {
                hanging += 1;
                passed_over.insert(one.volume);
            }
            if let Some(next) = state.running.values().nth(hanging) {
                let since = now.saturating_duration_since(next.since);
                patience = patience.min(hangs_after.saturating_sub(since));
            }
            if state.running.len() >= threads + hanging {
                return Next::Wait(patience);
            }
        }
        match state.begin(of_one, &passed_over) {
            Some(begun) => Next::Work(begun),
            None => Next::Wait(patience),
        }
    }

    fn help(self: &Arc<Self>) {
        let mut state = self.lock();
        loop {
            match self.next(&mut state) {
                Next::Work(Begun { number, job }) => {
                    self.see_to_threads(&mut state);
                    drop(state);
                    if catch_unwind(AssertUnwindSafe(job)).is_err() {
                        // Its volume would wait for ever. What was flushed is safe,
                        // and a server that is gone is noticed.
                        std::process::abort();
                    }
                    state = self.lock();
                    state.end(number);
                }
                Next::Wait(patience) => {
                    let waited = self.work.wait_timeout(state, patience);
                    let (next, timeout) = waited.expect("no holder of this lock panics");
                    state = next;
                    if timeout.timed_out() && state.turns.is_empty() {
                        state.threads -= 1;
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};

    use super::*;

    const PATIENCE: Duration = Duration::from_mins(1);

    fn helpers(threads: usize, of_one: usize, hangs_after: Duration) -> Helpers {
        Helpers::with(Bounds {
            threads,
            of_one,
            hangs_after,
            idle: Duration::from_millis(50),
        })
    }

    /// Jobs that do not end until the sender is gone.
    fn hang(helpers: &Helpers, volume: u32, jobs: usize) -> mpsc::Sender<()> {
        let (release, held) = mpsc::channel();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..jobs {
            let held: Arc<Mutex<mpsc::Receiver<()>>> = Arc::clone(&held);
            let job = move || while held.lock().unwrap().recv().is_ok() {};
            helpers.submit(VolumeId(volume), Box::new(job));
        }
        release
    }

    fn threads(helpers: &Helpers) -> usize {
        helpers.pool.lock().threads
    }

    fn wait_until(mut condition: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < until, "it never came");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn every_job_is_done_though_some_block_each_other() {
        let helpers = helpers(3, 3, PATIENCE);
        let (sender, receiver) = mpsc::channel();
        // Two jobs that can only end together need two threads at once.
        let barrier = Arc::new(Barrier::new(2));
        for number in 0..2 {
            let (sender, barrier) = (sender.clone(), Arc::clone(&barrier));
            let job = move || {
                barrier.wait();
                sender.send(number).unwrap();
            };
            helpers.submit(VolumeId(0), Box::new(job));
        }
        for number in 2..100 {
            let sender = sender.clone();
            let job = move || sender.send(number).unwrap();
            helpers.submit(VolumeId(number as u32 % 7), Box::new(job));
        }
        let mut done: Vec<i32> = receiver.iter().take(100).collect();
        done.sort_unstable();
        assert_eq!(done, (0..100).collect::<Vec<_>>());
        // Without work they end.
        wait_until(|| threads(&helpers) == 0);
        assert!(helpers.pool.lock().volumes.is_empty());
    }

    #[test]
    fn one_volume_has_only_so_many_under_way_and_the_others_have_their_turn() {
        let helpers = helpers(4, 2, PATIENCE);
        let release = hang(&helpers, 1, 50);
        let (sender, receiver) = mpsc::channel();
        helpers.submit(VolumeId(2), Box::new(move || sender.send(()).unwrap()));
        receiver.recv_timeout(PATIENCE).expect("it has its turn");
        assert_eq!(helpers.pool.lock().volumes[&VolumeId(1)].running, 2);
        drop(release);
        wait_until(|| helpers.pool.lock().volumes.is_empty());
    }

    #[test]
    fn there_are_never_more_under_way_than_the_bound() {
        let helpers = helpers(4, 3, PATIENCE);
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (sender, receiver) = mpsc::channel();
        for number in 0..400 {
            let (now, most, sender) = (Arc::clone(&now), Arc::clone(&most), sender.clone());
            let job = move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::yield_now();
                now.fetch_sub(1, Ordering::SeqCst);
                sender.send(()).unwrap();
            };
            helpers.submit(VolumeId(number % 50), Box::new(job));
        }
        assert_eq!(receiver.iter().take(400).count(), 400);
        assert!(most.load(Ordering::SeqCst) <= 4);
        assert!(threads(&helpers) <= 5);
    }

    #[test]
    fn disks_that_hang_hold_up_nobody_else() {
        let helpers = helpers(4, 2, Duration::from_millis(20));
        // Far more of them than there are threads, and each has more to do.
        let releases: Vec<_> = (0..10).map(|one| hang(&helpers, one, 5)).collect();
        let (sender, receiver) = mpsc::channel();
        for number in 0..30 {
            let sender = sender.clone();
            let job = move || sender.send(()).unwrap();
            helpers.submit(VolumeId(100 + number), Box::new(job));
        }
        for _ in 0..30 {
            receiver.recv_timeout(PATIENCE).expect("its turn comes");
        }
        // None of those that hang has more than it may, and nobody else has a thread.
        assert!(threads(&helpers) <= 10 * 2 + 1, "{}", threads(&helpers));
        drop(releases);
        wait_until(|| threads(&helpers) == 0);
        assert!(helpers.pool.lock().volumes.is_empty());
    }
}
