//! The frame of the crash suites: many seeds on two threads until one shows a violation,
//! and the same with each rule of durability broken, which the search must notice.
//!
//! `NBDSNAP_SEED=n` plays one run and prints every step (with `NBDSNAP_MUTANT=OneFlush`,
//! of that mutant); `NBDSNAP_RUNS=n` changes how many are played, `NBDSNAP_FIRST=n` where
//! they begin, and `NBDSNAP_LONG=seconds` lets the search go on. With `NBDSNAP_GO_ON` set
//! it does not stop at the first violation, but lists them all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use nbdsnap_engine::law::Mutant;

use super::tallies::{Ledger, Tallied};
use super::{Checks, Violation};
use crate::harness::random::long_run;

/// What a run found.
#[derive(Clone, Debug)]
pub struct Report<T> {
    /// What went wrong, if something did.
    pub violation: Option<Violation>,
    /// The hash of every device's content after each power cut.
    pub images: Vec<u64>,
    /// What was met.
    pub ledger: Ledger<T>,
}

/// Play something to its end: a panic is a violation too.
pub(super) fn violation_of(play: impl FnOnce() -> Result<(), Violation>) -> Option<Violation> {
    match catch_unwind(AssertUnwindSafe(play)) {
        Ok(ended) => ended.err(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Some(Violation(format!("panic: {}", text.unwrap_or_default())))
        }
    }
}

/// A suite that searches.
#[derive(Clone, Copy, Debug)]
pub struct Search<T: Tallied> {
    /// The suite and its test, as cargo calls them.
    pub name: [&'static str; 2],
    /// Plays the run of a seed.
    pub run: fn(Checks, u64) -> Report<T>,
    /// Runs of the search.
    pub runs: u64,
    /// Distinct crash images that these must have at least.
    pub images: usize,
    /// A mutant must be found in so many.
    pub most: u64,
}

/// What a search found.
struct Found<T> {
    ledger: Ledger<T>,
    images: Vec<u64>,
    violations: Vec<(u64, Violation)>,
}

impl<T: Tallied> Default for Found<T> {
    fn default() -> Self {
        Self {
            ledger: Ledger::default(),
            images: Vec::new(),
            violations: Vec::new(),
        }
    }
}

impl<T: Tallied> Found<T> {
    fn add(&mut self, other: Self) {
        self.ledger.add(&other.ledger);
        self.images.extend(other.images);
        self.images.sort_unstable();
        self.images.dedup();
        self.violations.extend(other.violations);
        self.violations.sort_by_key(|(seed, _)| *seed);
    }
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

impl<T: Tallied + Send> Search<T> {
    /// Nothing that was promised is lost, and everything that is to be met was met.
    pub fn finds_nothing(&self) {
        if let Some(seed) = from_environment("NBDSNAP_SEED") {
            return self.play_told(seed);
        }
        let first = from_environment("NBDSNAP_FIRST").unwrap_or(0);
        let asked = from_environment("NBDSNAP_RUNS");
        let runs = asked.unwrap_or(self.runs);
        let start = Instant::now();
        let limit = long_run().unwrap_or_default();
        let mut all = Found::default();
        let mut next = first;
        while next == first || start.elapsed() < limit {
            let found = self.play(Checks::default(), next, runs);
            self.expect_clean(&found);
            all.add(found);
            next += runs;
            println!(
                "seeds {first} to {}: {} distinct crash images in {:.1?}",
                next - 1,
                all.images.len(),
                start.elapsed(),
            );
        }
        println!("{}", all.ledger);
        if asked.is_none() {
            let (images, least) = (all.images.len(), self.images);
            assert!(images >= least, "{images} distinct images are too few");
            let never = all.ledger.never();
            assert!(never.is_empty(), "the search never met {never:?}");
        }
    }

    /// Break a rule; the search must notice, within a bounded number of runs.
    pub fn must_find(&self, mutant: Mutant) {
        const STEP: u64 = 100;
        let checks = Checks {
            mutant,
            told: false,
        };
        for first in (0..self.most).step_by(STEP as usize) {
            let found = self.play(checks, first, STEP);
            if let Some((seed, Violation(text))) = found.violations.first() {
                println!("{mutant:?}: found after {} runs: {text}", seed + 1);
                return;
            }
        }
        panic!("{mutant:?} was not found in {} runs", self.most);
    }

    /// Play `runs` from `first` on, on two threads, each until a violation.
    fn play(&self, checks: Checks, first: u64, runs: u64) -> Found<T> {
        let go_on = std::env::var_os("NBDSNAP_GO_ON").is_some();
        let half = |k: u64| {
            let mut found = Found::default();
            for seed in (first + k..first + runs).step_by(2) {
                let report = (self.run)(checks, seed);
                found.ledger.add(&report.ledger);
                found.images.extend(report.images);
                found
                    .violations
                    .extend(report.violation.map(|it| (seed, it)));
                if !found.violations.is_empty() && !go_on {
                    break;
                }
            }
            found
        };
        let mut all = Found::default();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| half(1));
            all.add(half(0));
            let other = other.join();
            all.add(other.expect("a run never panics: violations are values"));
        });
        all
    }

    fn expect_clean(&self, found: &Found<T>) {
        for (seed, Violation(text)) in &found.violations {
            println!("seed {seed}: {text}");
        }
        if let Some((seed, Violation(text))) = found.violations.first() {
            let [suite, test] = self.name;
            panic!(
                "{} violations, the first of seed {seed}: {text}\n\
                 play it again: NBDSNAP_SEED={seed} cargo test -p nbdsnap-tests --test {suite} {test} -- --nocapture",
                found.violations.len()
            );
        }
    }

    /// Play one run and print every step.
    fn play_told(&self, seed: u64) {
        let name = std::env::var("NBDSNAP_MUTANT").unwrap_or_else(|_| "None".into());
        let mutant = Mutant::named(&name);
        let mutant = mutant.unwrap_or_else(|| panic!("NBDSNAP_MUTANT={name}: there is none"));
        match (self.run)(Checks { mutant, told: true }, seed).violation {
            None => println!("seed {seed}: nothing wrong"),
            Some(Violation(text)) => panic!("seed {seed}: {text}"),
        }
    }
}

/// A test for each mutant that `SEARCH` must find, and `MUTANTS`, all of them.
#[macro_export]
macro_rules! mutants_found_by {
    ($search:ident: $($name:ident $mutant:ident,)*) => {
        const MUTANTS: &[nbdsnap_engine::law::Mutant] =
            &[$(nbdsnap_engine::law::Mutant::$mutant,)*];
        $(
            #[test]
            fn $name() {
                $search.must_find(nbdsnap_engine::law::Mutant::$mutant);
            }
        )*
    };
}
