//! The origin as its clients see it while it is being merged: some of its chunks
//! lie in the store. They are read there and written there in place; flushes go
//! to both devices.

use super::Merge;
use crate::disk::{Action, Device};
use crate::in_flight::RangeId;
use crate::snapshot::resolve;
use crate::table::ExceptionTable;
use crate::volume::active::RequestKey;
use crate::volume::flush::{Next, Waiter};
use crate::volume::task::TaskId;
use crate::volume::{Extent, Purpose, Volume};

impl Merge {
    /// Append where the bytes `start..end` of the origin lie, until there are
    /// `max` extents.
    pub(in crate::volume) fn resolve(
        &self,
        start: u64,
        end: u64,
        max: usize,
        extents: &mut Vec<Extent>,
    ) {
        let device = Device::Cow(self.id);
        let its_end = self.bytes.clamp(start, end);
        resolve(
            &self.table,
            self.chunk_size,
            device,
            start..its_end,
            max,
            extents,
        );
        // Behind the snapshot's end nothing has changed.
        let none = ExceptionTable::default();
        resolve(&none, self.chunk_size, device, its_end..end, max, extents);
    }

    /// Whether a write of `start..end` need not wait for the step that is under
    /// way, and can be made at all.
    pub(in crate::volume) fn is_open(&self, start: u64, end: u64) -> bool {
        !self.window.overlaps(start, end) && !self.doubtful.overlaps(start, end)
    }

    /// Whether `start..end` lies in the origin alone.
    pub(in crate::volume) fn leaves_alone(&self, start: u64, end: u64) -> bool {
        let mut extents = Vec::with_capacity(2);
        self.resolve(start, end, 2, &mut extents);
        extents.iter().all(|extent| extent.device == Device::Origin)
    }

    /// Whether writes to `start..end` have to fail.
    pub(in crate::volume) fn is_doubtful(&self, start: u64, end: u64) -> bool {
        self.doubtful.overlaps(start, end)
    }

    /// A client of the origin writes to the store in place, at this moment.
    pub(in crate::volume) fn written(&mut self) {
        self.dirty = true;
    }
}

impl Volume {
    /// Where the bytes `start..end` of the origin lie; they are not none.
    pub(in crate::volume) fn origin_extents(&self, start: u64, end: u64) -> Vec<Extent> {
        let mut extents = Vec::with_capacity(1);
        self.resolve_origin(start, end, usize::MAX, &mut extents);
        extents
    }

    pub(in crate::volume) fn resolve_origin(
        &self,
        start: u64,
        end: u64,
        max: usize,
        extents: &mut Vec<Extent>,
    ) {
        match &self.merge {
            Some(merge) => merge.resolve(start, end, max, extents),
            None if start < end => extents.push(Extent {
                device: Device::Origin,
                offset: start,
                len: end - start,
            }),
            None => {}
        }
    }

    /// Make `task`, a write of the origin, wait for the chunks of `start..end`
    /// that are being copied.
    pub(in crate::volume) fn wait_for_merge_window(&mut self, start: u64, end: u64, task: TaskId) {
        if !self.law.window_closed() {
            return;
        }
        if let Some(merge) = &mut self.merge {
            self.tasks[task.0].waits += merge.window.wait_for_overlaps(start, end, task);
        }
    }

    /// A piece of the origin's client's read comes from the store.
    pub(in crate::volume) fn begin_merged_read(
        &mut self,
        request: RequestKey,
        index: usize,
        extent: Extent,
    ) {
        let merge = self.merge.as_mut().expect("it gave the extent");
        merge.reads += 1;
        let Extent {
            device,
            offset,
            len,
        } = extent;
        let purpose = Purpose::MergedRead { request, index };
        self.emit(device, Action::Read { offset, len }, purpose);
    }

    pub(in crate::volume) fn merged_read_ended(&mut self) {
        let merge = self.merge.as_mut().expect("it waits for its reads");
        merge.reads -= 1;
    }

    /// Part of an origin write, `at` in the view, goes to its place in the store.
    pub(in crate::volume) fn begin_merged_write(
        &mut self,
        request: RequestKey,
        at: u64,
        extent: Extent,
        action: Action,
    ) {
        let merge = self.merge.as_mut().expect("it gave the extent");
        let range = merge.writes.insert(at, at + extent.len);
        self.emit(
            extent.device,
            action,
            Purpose::MergedWrite { request, range },
        );
    }

    pub(in crate::volume) fn merged_write_ended(&mut self, range: RangeId) {
        let merge = self.merge.as_mut().expect("it waits for its writes");
        merge.dirty = true;
        let waiting = merge.writes.remove(range);
        self.wake(waiting);
    }

    /// A FLUSH of the origin: the store is flushed too if anything was written to
    /// it that no flush, or one that is still running, answers for. Says whether
    /// the waiter waits for that.
    pub(in crate::volume) fn flush_merge_for(&mut self, waiter: Waiter) -> bool {
        let both = self.law.flush_both_devices();
        let Some(merge) = &mut self.merge else {
            return false;
        };
        let wanted = merge.dirty || merge.lane.has_failed() || !merge.lane.is_idle();
        if wanted && both {
            merge.lane.waiting.push(waiter);
        }
        wanted && both
    }

    /// Nothing else is left to hand out: begin the flush of the store that is wanted.
    pub(in crate::volume) fn begin_merge_flush(&mut self) {
        let Some(merge) = &mut self.merge else {
            return;
        };
        match merge.lane.next() {
            Next::Nothing => {}
            Next::Flush => {
                merge.dirty = false;
                let device = Device::Cow(merge.id);
                self.emit(device, Action::Flush, Purpose::MergeFlush);
            }
            Next::Refuse(waiters) => self.flushed(waiters, false),
        }
    }

    pub(in crate::volume) fn merge_flush_ended(&mut self, ok: bool) {
        let merge = self.merge.as_mut().expect("it waits for its flushes");
        let waiters = merge.lane.ended(ok);
        self.flushed(waiters, ok);
    }

    /// What the last flush of the volume has to cover: the store, if it was
    /// written in place, and whether a flush of it has failed.
    pub(in crate::volume) fn last_flush_of_merge(&mut self) -> (Option<Device>, bool) {
        match &mut self.merge {
            None => (None, true),
            Some(merge) if merge.lane.has_failed() => (None, false),
            Some(merge) => (merge.dirty.then_some(Device::Cow(merge.id)), true),
        }
    }
}
