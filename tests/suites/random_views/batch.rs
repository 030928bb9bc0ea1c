//! A batch of random requests, sent over all connections at once and then
//! compared. Within one view, what is written in a batch is touched by no other
//! request of it, byte for byte; between views everything may meet, in the same
//! chunk too: that is what copying on write has to get right.

use std::ops::Range;

use nbdsnap_tests::harness::random::Random;
use nbdsnap_tests::harness::wire::{Outcome, cmd, errno, flag};

use super::view::{Expect, View};

/// Requests that one connection has in flight, so that neither side fills the
/// other's socket.
const PER_CONNECTION: usize = 6;
const LONGEST: u64 = 40_000;

#[derive(Debug)]
struct Planned {
    view: usize,
    session: usize,
    command: u16,
    flags: u16,
    range: Range<u64>,
    data: Vec<u8>,
}

impl Planned {
    fn writes(&self) -> bool {
        matches!(self.command, cmd::WRITE | cmd::WRITE_ZEROES)
    }

    /// What the range holds afterwards.
    fn written(&self) -> Vec<u8> {
        if self.command == cmd::WRITE {
            self.data.clone()
        } else {
            vec![0; self.len()]
        }
    }

    fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }
}

/// What was done to a view and compared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Performed {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

/// Make a batch within the first `span` bytes, perform it, compare, and count for
/// each view what was performed. The origin is the first view.
pub(crate) fn perform(
    views: &mut [View],
    random: &mut Random,
    requests: usize,
    span: u64,
    performed: &mut [Performed],
) {
    let plan = plan(views, random, requests, span);
    let mut origin_written = false;
    for planned in plan.iter().filter(|planned| planned.writes()) {
        if planned.view == 0 {
            origin_written = true;
            for view in views.iter_mut() {
                view.touch(&planned.range, true);
            }
        } else {
            views[planned.view].touch(&planned.range, false);
        }
    }
    send(views, &plan);
    let outcomes = receive(views, &plan);
    // Reads are of what was there before the batch: compare first, apply then.
    let mut unsettled = Vec::new();
    for (planned, outcome) in plan.iter().zip(&outcomes) {
        check(&mut views[planned.view], planned, outcome);
        let performed = &mut performed[planned.view];
        performed.reads += u64::from(planned.command == cmd::READ && outcome.is_ok());
        performed.writes += u64::from(planned.writes() && outcome.is_ok());
    }
    for (planned, outcome) in plan.iter().zip(&outcomes) {
        if planned.command == cmd::TRIM || planned.writes() && outcome.is_err() {
            unsettled.push(planned);
        } else if planned.writes() {
            let range = planned.range.start as usize..planned.range.end as usize;
            views[planned.view].model[range].copy_from_slice(&planned.written());
        }
    }
    for view in views.iter_mut() {
        view.settle_state(origin_written);
    }
    for planned in unsettled {
        settle(&mut views[planned.view], planned);
    }
}

fn plan(views: &[View], random: &mut Random, requests: usize, span: u64) -> Vec<Planned> {
    let mut plan: Vec<Planned> = Vec::new();
    for _ in 0..requests {
        let view = if random.one_in(3) {
            0
        } else {
            random.below(views.len() as u64) as usize
        };
        let session = random.below(views[view].sessions.len() as u64) as usize;
        let (command, flags) = command(random);
        let len = match random.below(10) {
            0..=3 => random.between(1, 700),
            4..=6 => 512 * random.between(1, 16),
            7 => 4096 * random.between(1, 4),
            _ => random.between(1, LONGEST),
        };
        let mut start = random.below(span);
        if random.one_in(3) {
            start -= start % 4096;
        }
        // The tail is a fraction of a chunk: come by often.
        if random.one_in(12) {
            start = views[view].model.len() as u64 - random.between(1, 3000);
        }
        let end = (start + len).min(views[view].model.len() as u64);
        let planned = Planned {
            view,
            session,
            command,
            flags,
            range: start..end,
            data: Vec::new(),
        };
        if fits(&plan, &planned) {
            let data = if command == cmd::WRITE {
                random.bytes(planned.len())
            } else {
                Vec::new()
            };
            plan.push(Planned { data, ..planned });
        }
    }
    plan
}

fn command(random: &mut Random) -> (u16, u16) {
    match random.below(20) {
        0..=6 => (cmd::READ, 0),
        7..=14 => (cmd::WRITE, if random.one_in(6) { flag::FUA } else { 0 }),
        15 | 16 => {
            let no_hole = if random.one_in(2) { flag::NO_HOLE } else { 0 };
            (
                cmd::WRITE_ZEROES,
                no_hole | if random.one_in(6) { flag::FUA } else { 0 },
            )
        }
        17 => (cmd::TRIM, if random.one_in(3) { flag::FUA } else { 0 }),
        18 => (cmd::FLUSH, 0),
        _ => (cmd::CACHE, 0),
    }
}

fn fits(plan: &[Planned], new: &Planned) -> bool {
    let changes = |planned: &Planned| planned.writes() || planned.command == cmd::TRIM;
    let mut in_flight = 0;
    for old in plan.iter().filter(|old| old.view == new.view) {
        in_flight += usize::from(old.session == new.session);
        let meets = old.range.start < new.range.end && new.range.start < old.range.end;
        if meets && (changes(old) || changes(new)) {
            return false;
        }
    }
    in_flight < PER_CONNECTION
}

fn send(views: &mut [View], plan: &[Planned]) {
    for (cookie, planned) in plan.iter().enumerate() {
        let (offset, len) = match planned.command {
            cmd::FLUSH => (0, 0),
            _ => (planned.range.start, planned.len() as u32),
        };
        let session = &mut views[planned.view].sessions[planned.session];
        session
            .send(
                planned.flags,
                planned.command,
                cookie as u64,
                offset,
                len,
                &planned.data,
            )
            .expect("sent");
    }
}

fn receive(views: &mut [View], plan: &[Planned]) -> Vec<Outcome> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; plan.len()];
    for planned in plan {
        let session = &mut views[planned.view].sessions[planned.session];
        let carries = |cookie: u64| {
            let planned = &plan[cookie as usize];
            if planned.command == cmd::READ {
                planned.len()
            } else {
                0
            }
        };
        let reply = session.reply(carries).expect("a reply");
        let asked = &plan[reply.cookie as usize];
        assert_eq!(
            (asked.view, asked.session),
            (planned.view, planned.session),
            "a reply on another connection"
        );
        let before = outcomes[reply.cookie as usize].replace(reply.outcome);
        assert!(
            before.is_none(),
            "request {} was answered twice",
            reply.cookie
        );
    }
    outcomes
        .into_iter()
        .map(|outcome| outcome.expect("every request was answered"))
        .collect()
}

fn check(view: &mut View, planned: &Planned, outcome: &Outcome) {
    let expected = match planned.command {
        cmd::READ => view.expect_of_read(),
        cmd::WRITE | cmd::WRITE_ZEROES => view.expect_of_write(),
        // With nothing to lose, either answer will do.
        _ if view.expect_of_write() == Expect::Success => Expect::Success,
        _ => Expect::Either,
    };
    let what = || {
        let Planned {
            command,
            flags,
            range,
            ..
        } = planned;
        format!(
            "{} ({:?}): command {command} flags {flags} at {range:?}",
            view.export, view.state
        )
    };
    match outcome {
        Ok(data) => {
            assert_ne!(expected, Expect::Eio, "{} succeeded", what());
            if planned.command == cmd::READ {
                let model = &view.model[planned.range.start as usize..planned.range.end as usize];
                if data != model {
                    let at = data
                        .iter()
                        .zip(model)
                        .position(|(a, b)| a != b)
                        .unwrap_or(0);
                    panic!(
                        "{}: wrong from byte {} on",
                        what(),
                        planned.range.start + at as u64
                    );
                }
            }
        }
        Err(error) => {
            assert!(
                *error == errno::EIO && expected != Expect::Success,
                "{}: error {error}",
                what()
            );
            if planned.command == cmd::READ {
                view.found_invalid();
            }
        }
    }
}

/// After a trim, or a write that failed in the middle: every byte is the old or
/// the new one. From now on it is what it is.
fn settle(view: &mut View, planned: &Planned) {
    let expected = view.expect_of_read();
    match view.sessions[0]
        .read(planned.range.start, planned.len() as u32)
        .expect("a reply")
    {
        Ok(data) => {
            assert_ne!(
                expected,
                Expect::Eio,
                "{} is {:?} and can be read",
                view.export,
                view.state
            );
            let new = planned.written();
            let model = &mut view.model[planned.range.start as usize..planned.range.end as usize];
            for (n, byte) in data.iter().enumerate() {
                assert!(
                    *byte == model[n] || *byte == new[n],
                    "{}: neither old nor new: {planned:?}",
                    view.export
                );
            }
            model.copy_from_slice(&data);
        }
        Err(error) => {
            assert!(
                error == errno::EIO && expected != Expect::Success,
                "{}: error {error}",
                view.export
            );
            view.found_invalid();
        }
    }
}
