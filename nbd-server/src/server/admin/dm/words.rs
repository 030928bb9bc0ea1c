//! What is told of mapped devices, in the device-mapper's words.

use nbdsnap_engine::dm::{DeviceInfo, Line, Lower, TableLine, Target};

use crate::control::dm::{DmAnswer, DmInfo, DmName, DmTarget, MAJOR, TextLine};
use crate::dm::{params, text};

/// The version of the interface that these words are of: Linux 6.1's.
const VERSION: &str = "4.47.0";

pub(super) fn version() -> DmAnswer {
    DmAnswer::Version {
        version: VERSION.into(),
    }
}

pub(super) fn targets() -> DmAnswer {
    let targets = params::VERSIONS.iter();
    let targets = targets.map(|&(name, version)| DmTarget {
        name: name.into(),
        version,
    });
    DmAnswer::Targets(targets.collect())
}

/// How a device is doing; `inactive`: lines and writability are those of its inactive
/// table.
pub(super) fn info(info: &DeviceInfo, inactive: bool) -> DmInfo {
    let (read_only, target_count) = if inactive {
        (info.inactive_read_only, info.inactive_target_count)
    } else {
        (info.read_only, info.target_count)
    };
    DmInfo {
        name: info.name.clone(),
        uuid: info.uuid.clone(),
        major: MAJOR,
        minor: info.id.0,
        open_count: info.open_count.try_into().unwrap_or(u32::MAX),
        event_nr: info.event_nr,
        suspended: info.suspended,
        internal_suspend: false,
        live_table: info.live_table,
        inactive_table: info.inactive_table,
        read_only,
        deferred_remove: info.deferred_remove,
        target_count: target_count as u32,
    }
}

pub(super) fn name(info: &DeviceInfo) -> DmName {
    DmName {
        name: info.name.clone(),
        uuid: info.uuid.clone(),
        major: MAJOR,
        minor: info.id.0,
        event_nr: info.event_nr,
    }
}

/// The lines of a table.
pub(super) fn table(lines: &[TableLine], name: &dyn Fn(Lower) -> String) -> Vec<TextLine> {
    let lines = lines.iter().map(|line| Line {
        start: line.start,
        len: line.len,
        target: line.target.clone(),
    });
    let lines: Vec<_> = lines.collect();
    text::print(&lines, name)
}

/// How its targets are doing.
pub(super) fn status(lines: &[TableLine], name: &dyn Fn(Lower) -> String) -> Vec<TextLine> {
    let status = |line: &TableLine| match (&line.target, line.status) {
        (_, Some(status)) => status.to_string(),
        (Target::Striped { stripes, .. }, None) => {
            let names: Vec<_> = stripes.iter().map(|&(lower, _)| name(lower)).collect();
            let well = "A".repeat(stripes.len());
            format!("{} {} 1 {well}", stripes.len(), names.join(" "))
        }
        (_, None) => String::new(),
    };
    let lines = lines.iter().map(|line| TextLine {
        start: line.start,
        len: line.len,
        target: line.target.name().into(),
        params: status(line),
    });
    lines.collect()
}
