//! The fault model does what its text says, no more and no less.

use std::collections::BTreeSet;

use super::*;

fn write(sector: u64, sectors: u64, byte: u8) -> Action {
    let data = vec![Bytes::from(vec![byte; sectors as usize * SECTOR])];
    Action::Write {
        offset: sector * SECTOR as u64,
        data,
    }
}

/// The first byte of each sector, after a power cut of each of many seeds.
fn outcomes(disk: &SimDisk, loss: Loss) -> BTreeSet<Vec<u8>> {
    let after = |seed| {
        let mut disk = disk.clone();
        disk.power_cut(loss, &mut Rng::new(seed));
        disk.content().iter().step_by(SECTOR).copied().collect()
    };
    (0..400).map(after).collect()
}

fn bytes(of: &[&[u8]]) -> BTreeSet<Vec<u8>> {
    of.iter().map(|o| o.to_vec()).collect()
}

#[test]
fn a_power_cut_keeps_any_subset_of_unflushed_sectors() {
    let mut rng = Rng::new(1);
    let mut disk = SimDisk::new(vec![0; 2 * SECTOR]);
    disk.perform(write(0, 2, 1), &mut rng).unwrap();
    disk.perform(write(1, 1, 2), &mut rng).unwrap();
    let all = bytes(&[&[0, 0], &[0, 1], &[0, 2], &[1, 0], &[1, 1], &[1, 2]]);
    assert_eq!(outcomes(&disk, Loss::Any), all);
    assert_eq!(outcomes(&disk, Loss::All), bytes(&[&[0, 0]]));
    assert_eq!(outcomes(&disk, Loss::Nothing), bytes(&[&[1, 2]]));
}

#[test]
fn what_is_in_flight_may_have_happened() {
    let mut rng = Rng::new(1);
    let mut disk = SimDisk::new(vec![0; 2 * SECTOR]);
    disk.issue(7, write(0, 2, 1), &mut rng);
    assert_eq!(disk.content(), vec![0; 2 * SECTOR]);
    let all = bytes(&[&[0, 0], &[0, 1], &[1, 0], &[1, 1]]);
    assert_eq!(outcomes(&disk, Loss::Any), all);
}

#[test]
fn a_flush_covers_what_had_ended_when_it_was_issued() {
    let mut rng = Rng::new(1);
    let mut disk = SimDisk::new(vec![0; 3 * SECTOR]);
    disk.perform(write(0, 1, 1), &mut rng).unwrap();
    disk.issue(7, write(1, 1, 1), &mut rng);
    disk.issue(8, Action::Flush, &mut rng);
    // The write of sector 1 ends during the flush, that of sector 2 begins and ends.
    assert_eq!(disk.end(0, &mut rng).0, 7);
    disk.perform(write(2, 1, 1), &mut rng).unwrap();
    assert_eq!(disk.end(0, &mut rng).0, 8);
    assert_eq!(outcomes(&disk, Loss::All), bytes(&[&[1, 0, 0]]));
    assert_eq!(outcomes(&disk, Loss::Any).len(), 4);
    disk.perform(Action::Flush, &mut rng).unwrap();
    assert!(disk.is_clean());
}

#[test]
fn a_version_that_was_replaced_before_a_flush_is_gone() {
    let mut rng = Rng::new(1);
    let mut disk = SimDisk::new(vec![0; SECTOR]);
    disk.perform(write(0, 1, 1), &mut rng).unwrap();
    disk.perform(write(0, 1, 2), &mut rng).unwrap();
    disk.perform(Action::Flush, &mut rng).unwrap();
    disk.perform(write(0, 1, 3), &mut rng).unwrap();
    assert_eq!(outcomes(&disk, Loss::Any), bytes(&[&[2], &[3]]));
}

#[test]
fn a_kill_loses_nothing_and_makes_nothing_durable() {
    let mut rng = Rng::new(1);
    let mut disk = SimDisk::new(vec![0; SECTOR]);
    disk.perform(write(0, 1, 1), &mut rng).unwrap();
    disk.kill(&mut rng);
    assert_eq!(disk.content()[0], 1);
    assert_eq!(outcomes(&disk, Loss::Any), bytes(&[&[0], &[1]]));
    disk.perform(Action::Flush, &mut rng).unwrap();
    assert_eq!(outcomes(&disk, Loss::Any), bytes(&[&[1]]));
}

#[test]
fn a_failed_flush_forgets() {
    let mut lost = false;
    for seed in 0..50 {
        let mut rng = Rng::new(seed);
        let mut disk = SimDisk::new(vec![0; SECTOR]);
        disk.perform(write(0, 1, 1), &mut rng).unwrap();
        disk.set_faults(Faults {
            flush: 1024,
            ..Faults::default()
        });
        disk.perform(Action::Flush, &mut rng).unwrap_err();
        disk.set_faults(Faults::default());
        disk.perform(Action::Flush, &mut rng).unwrap();
        assert_eq!(disk.content()[0], 1, "the cache shows what was written");
        lost |= outcomes(&disk, Loss::Any).contains(&vec![0]);
    }
    assert!(lost, "the next flush succeeds with the data gone");
}

#[test]
fn growth_is_durable_when_it_ends() {
    let mut rng = Rng::new(1);
    let mut disk = SimDisk::new(vec![5; SECTOR]);
    let to = 3 * SECTOR as u64;
    disk.issue(7, Action::Grow { to }, &mut rng);
    let lengths: BTreeSet<usize> = outcomes(&disk, Loss::Any).iter().map(Vec::len).collect();
    assert_eq!(lengths, BTreeSet::from([1, 2, 3]));
    disk.end(0, &mut rng).1.unwrap();
    assert_eq!(outcomes(&disk, Loss::Any), bytes(&[&[5, 0, 0]]));
}

#[test]
fn a_trim_may_act_late_but_not_after_a_flush() {
    let (mut zeroed, mut kept, mut late) = (false, false, false);
    for seed in 0..50 {
        let mut rng = Rng::new(seed);
        let mut disk = SimDisk::new(vec![5; SECTOR]);
        let len = SECTOR as u64;
        disk.perform(Action::Trim { offset: 0, len }, &mut rng)
            .unwrap();
        let shown = disk.content()[0];
        zeroed |= shown == 0;
        kept |= shown == 5;
        late |= shown == 5 && outcomes(&disk, Loss::Any).contains(&vec![0]);
        disk.perform(Action::Flush, &mut rng).unwrap();
        assert_eq!(outcomes(&disk, Loss::Any), bytes(&[&[shown]]));
    }
    assert!(zeroed && kept && late);
}

/// A page is dirty or it is not: what a failed flush has forgotten of a sector does
/// not come back older than it was, and what is shown after a kill can be flushed.
#[test]
fn a_failed_flush_forgets_all_that_a_sector_has_held() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut disk = SimDisk::new(vec![0; SECTOR]);
        disk.perform(write(0, 1, 1), &mut rng).unwrap();
        disk.perform(write(0, 1, 2), &mut rng).unwrap();
        disk.set_faults(Faults {
            flush: 1024,
            ..Faults::default()
        });
        disk.perform(Action::Flush, &mut rng).unwrap_err();
        disk.kill(&mut rng);
        let shown = disk.content()[0];
        disk.perform(Action::Flush, &mut rng).unwrap();
        disk.power_cut(Loss::All, &mut rng);
        assert_eq!(disk.content()[0], shown, "seed {seed}");
    }
}
