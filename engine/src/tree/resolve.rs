//! Where the bytes of a view lie on the physical disks, through all levels in one
//! go: for I/O that is done at once, around the queues, and for BLOCK_STATUS.

use super::{Level, LevelKey, Tree};
use crate::disk::Device;
use crate::request::{Failure, View};
use crate::volume::{Extent, Now};

impl Tree {
    /// See [`crate::Volume::read_now`]: the extents lie on physical disks.
    pub fn read_now(&self, view: View, offset: u64, len: u64, extents: &mut Vec<Extent>) -> Now {
        let Some(key) = self.level_of(view).filter(|_| self.course.is_open()) else {
            return Now::Queue;
        };
        let range = self.levels[key]
            .volume
            .check_range(View::Origin, offset, len);
        if range.is_err() {
            return Now::Queue;
        }
        let before = extents.len();
        let resolved = self.resolve(key, offset, offset + len, usize::MAX, extents);
        if resolved.is_err() {
            extents.truncate(before);
            return Now::Queue;
        }
        Now::Go
    }

    /// See [`crate::Volume::write_now`]: the extents lie on physical disks. A write
    /// to a snapshot has to suit the snapshot's own snapshots, and its store.
    pub fn write_now(
        &mut self,
        view: View,
        offset: u64,
        len: u64,
        extents: &mut Vec<Extent>,
    ) -> Now {
        let Some(key) = self.level_of(view).filter(|_| self.course.is_open()) else {
            return Now::Queue;
        };
        let before = extents.len();
        let volume = &mut self.levels[key].volume;
        if volume.write_now(View::Origin, offset, len, extents) == Now::Queue {
            return Now::Queue;
        }
        let Some(below) = self.levels[key].below else {
            return Now::Go;
        };
        let under = &mut self.levels[below.level].volume;
        let snapshot = View::Snapshot(below.snapshot);
        for extent in extents.split_off(before) {
            if extent.device != Device::Origin {
                extents.push(extent);
            } else if under.write_now(snapshot, extent.offset, extent.len, extents) == Now::Queue {
                extents.truncate(before);
                return Now::Queue;
            }
        }
        Now::Go
    }

    /// See [`crate::Volume::map`]: the extents lie on physical disks.
    pub fn map(
        &self,
        view: View,
        offset: u64,
        len: u64,
        max_extents: usize,
    ) -> Result<Vec<Extent>, Failure> {
        let key = self.level_of(view).ok_or(Failure::NoSuchView)?;
        (self.levels[key].volume).check_range(View::Origin, offset, len)?;
        let mut extents = Vec::new();
        self.resolve(key, offset, offset + len, max_extents, &mut extents)?;
        Ok(extents)
    }

    /// Append where the bytes `start..end` of a level's view lie, until there are
    /// `max` extents. Downwards from level to level: what a level says is in its
    /// origin is asked of the next one.
    fn resolve(
        &self,
        key: LevelKey,
        start: u64,
        end: u64,
        max: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), Failure> {
        let before = extents.len();
        let mut level = &self.levels[key];
        (level.volume).resolve(View::Origin, start, end, max, extents)?;
        // Nothing is put together as long as all of it goes down: the common case. (A
        // merge into a level further down is none of its snapshots' concern.)
        while let Some(below) = level.below.filter(|_| start < end) {
            let under = &self.levels[below.level];
            let has_copies = !under.volume.has_no_copy_of(below.snapshot, start, end);
            if has_copies || self.levels[key].volume.is_merging() {
                break;
            }
            level = under;
        }
        while let Some(below) = level.below {
            let under = &self.levels[below.level];
            let view = View::Snapshot(below.snapshot);
            match extents[before..] {
                [one] if one.device == Device::Origin => {
                    extents.truncate(before);
                    let end = one.offset + one.len;
                    under.volume.resolve(view, one.offset, end, max, extents)?;
                }
                ref all if all.iter().any(|e| e.device == Device::Origin) => {
                    let all = extents.split_off(before);
                    put_together(under, view, all, max, extents)?;
                }
                _ => break,
            }
            level = under;
        }
        Ok(())
    }
}

/// Append `all`, with what lies in the origin replaced by where `view` of the
/// level `under` has it.
fn put_together(
    under: &Level,
    view: View,
    all: Vec<Extent>,
    max: usize,
    extents: &mut Vec<Extent>,
) -> Result<(), Failure> {
    for extent in all {
        if extents.len() == max {
            break;
        }
        if extent.device == Device::Origin {
            let end = extent.offset + extent.len;
            (under.volume).resolve(view, extent.offset, end, max, extents)?;
        } else {
            extents.push(extent);
        }
    }
    Ok(())
}
