//! What of a view is allocated, for BLOCK_STATUS in base:allocation.
//!
//! The engine says on which device each part of a view lies. What lies in a COW
//! store is data. What lies on the origin is what the origin's file system says
//! of it, asked by SEEK_DATA and SEEK_HOLE on a helper thread, since those may
//! wait for a writer. By then a hole may have been punched that the snapshot
//! does not share: the caller asks the engine again afterwards, and trusts the
//! answer only if the view still lies where it lay.

use std::fs::File;

use nbdsnap_engine::{Device, Extent};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::nbd::reply::StatusExtent;
use crate::nbd::wire::{NBD_STATE_HOLE, NBD_STATE_ZERO};

/// Extents that one reply tells at most, and extents of the engine's map that
/// are looked at for it. The client asks again for the rest.
pub(super) const EXTENTS_MAX: usize = 1024;

const HOLE: u32 = NBD_STATE_HOLE | NBD_STATE_ZERO;
const DATA: u32 = 0;

/// Extents in the making: neighbours of one kind are one.
#[derive(Debug, Default)]
struct Status {
    extents: Vec<StatusExtent>,
}

impl Status {
    fn push(&mut self, len: u64, flags: u32) {
        let len = u32::try_from(len).expect("a request is shorter than 4 GiB");
        match self.extents.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ if len > 0 => self.extents.push(StatusExtent { len, flags }),
            _ => {}
        }
    }

    fn is_full(&self) -> bool {
        self.extents.len() > EXTENTS_MAX
    }

    fn finish(mut self) -> Vec<StatusExtent> {
        // The last one pushed may be about to grow: tell only what is certain.
        self.extents.truncate(EXTENTS_MAX);
        self.extents
    }
}

/// All data, which is always a true answer.
pub(super) fn all_data(extents: &[Extent]) -> Vec<StatusExtent> {
    let mut status = Status::default();
    for extent in extents {
        status.push(extent.len, DATA);
    }
    status.finish()
}

/// Ask the file system about the parts that lie on the origin, whose file is
/// `origin`. May wait. The answer covers a beginning of `extents`, at least one byte.
pub(super) fn look_up(origin: &File, extents: &[Extent]) -> Vec<StatusExtent> {
    let mut status = Status::default();
    for extent in extents {
        match extent.device {
            Device::Cow(_) => status.push(extent.len, DATA),
            Device::Origin => look_up_extent(origin, extent, &mut status),
        }
        if status.is_full() {
            break;
        }
    }
    status.finish()
}

fn look_up_extent(origin: &File, extent: &Extent, status: &mut Status) {
    let end = extent.offset + extent.len;
    let mut at = extent.offset;
    while at < end && !status.is_full() {
        let data = match rustix::fs::seek(origin, SeekFrom::Data(at)) {
            Ok(data) => data.clamp(at, end),
            // No data behind this point.
            Err(Errno::NXIO) => end,
            // A file system that cannot say.
            Err(_) => {
                status.push(end - at, DATA);
                return;
            }
        };
        status.push(data - at, HOLE);
        at = data;
        if at < end {
            let hole = rustix::fs::seek(origin, SeekFrom::Hole(at));
            let hole = hole.unwrap_or(end).clamp(at + 1, end);
            status.push(hole - at, DATA);
            at = hole;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nbdsnap_engine::SnapshotId;

    use super::*;

    fn extent(device: Device, offset: u64, len: u64) -> Extent {
        Extent {
            device,
            offset,
            len,
        }
    }

    fn pairs(status: &[StatusExtent]) -> Vec<(u32, u32)> {
        status
            .iter()
            .map(|extent| (extent.len, extent.flags))
            .collect()
    }

    #[test]
    fn holes_of_the_origin_show_and_stores_are_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![1; 65536], 131_072).unwrap();
        let origin = |offset, len| extent(Device::Origin, offset, len);
        let cow = |len| extent(Device::Cow(SnapshotId(0)), 0, len);

        let whole = look_up(&file, &[origin(0, 1 << 20)]);
        let expected = vec![(131_072, HOLE), (65536, DATA), ((1 << 20) - 196_608, HOLE)];
        assert_eq!(pairs(&whole), expected);

        let mixed = look_up(
            &file,
            &[
                origin(0, 1000),
                cow(500),
                origin(131_072, 100),
                cow(1),
                origin(200_000, 5),
            ],
        );
        assert_eq!(pairs(&mixed), vec![(1000, HOLE), (601, DATA), (5, HOLE)]);
        assert_eq!(
            pairs(&all_data(&[origin(0, 1000), cow(500)])),
            vec![(1500, DATA)]
        );
    }

    #[test]
    fn an_answer_is_bounded_and_still_true() {
        let file = tempfile::tempfile().unwrap();
        for block in 0..2000u64 {
            file.write_all_at(&[1; 4096], block * 8192).unwrap();
        }
        let status = look_up(&file, &[extent(Device::Origin, 0, 2000 * 8192)]);
        assert_eq!(status.len(), EXTENTS_MAX);
        for (i, extent) in status.iter().enumerate() {
            let flags = if i % 2 == 0 { DATA } else { HOLE };
            assert_eq!((extent.len, extent.flags), (4096, flags));
        }
    }
}
