//! The words of `nbdsnap dm` on the control socket: an order for each call that the
//! device-mapper takes from dmsetup, and what comes of it. dmsetup composes its verbs
//! of them (`create` is create, load and resume), and so does `cli/dm`.
//!
//! A refusal of the device-mapper is an answer ([`DmAnswer::Refused`]) with the
//! kernel's error number, from which dmsetup makes its message, and with the words
//! that the kernel would only log. Sectors have 512 bytes. The rules of
//! [`super::protocol`] hold.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The major number of mapped devices. No block driver of Linux has it, so that
/// numbers in a table can still be those of a block device of the machine.
pub const MAJOR: u32 = 999;

/// What the device-mapper can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DmOrder {
    /// Which version of the interface this is. Answer: [`DmAnswer::Version`].
    Version,
    /// Make a device that has no table yet.
    /// Answer: [`DmAnswer::Device`].
    Create {
        /// What it is called; also the name of its export.
        name: String,
        /// A second name, which stays when the first one changes.
        #[serde(default)]
        uuid: Option<String>,
        /// The minor number; without it, the lowest that is free.
        #[serde(default)]
        minor: Option<u32>,
    },
    /// Give a device an inactive table, in place of the one that it may have.
    /// Answer: [`DmAnswer::Device`].
    Load {
        /// Which.
        device: DeviceName,
        /// Once the table is active, the device refuses writes.
        #[serde(default)]
        read_only: bool,
        /// The table.
        lines: Vec<TextLine>,
    },
    /// Drop a device's inactive table. Answer: [`DmAnswer::Device`].
    Clear {
        /// Which.
        device: DeviceName,
    },
    /// Have a device stand still: what is in flight ends, what comes queues.
    /// Answer: [`DmAnswer::Device`].
    Suspend {
        /// Which.
        device: DeviceName,
        /// What is in flight need not end.
        #[serde(default)]
        noflush: bool,
        /// The file system on it is not to be frozen.
        #[serde(default)]
        nolockfs: bool,
    },
    /// Make a device's inactive table, if it has one, the active one, and have it go on.
    /// Answer: [`DmAnswer::Device`].
    Resume {
        /// Which.
        device: DeviceName,
        /// For the suspension that a swap of tables needs.
        #[serde(default)]
        noflush: bool,
        /// For the suspension that a swap of tables needs.
        #[serde(default)]
        nolockfs: bool,
    },
    /// End a device. Answer: [`DmAnswer::Done`].
    Remove {
        /// Which.
        device: DeviceName,
        /// If it is open, as soon as it is not.
        #[serde(default)]
        deferred: bool,
    },
    /// Give a device another name. Answer: [`DmAnswer::Device`].
    Rename {
        /// Which.
        device: DeviceName,
        /// What it is called from now on.
        new_name: String,
    },
    /// Give a device that has none a uuid. Answer: [`DmAnswer::Device`].
    SetUuid {
        /// Which.
        device: DeviceName,
        /// It.
        uuid: String,
    },
    /// How a device is doing. Answer: [`DmAnswer::Device`].
    Info {
        /// Which.
        device: DeviceName,
        /// Lines and writability are those of its inactive table.
        #[serde(default)]
        inactive: bool,
    },
    /// Which devices there are. Answer: [`DmAnswer::Names`].
    List,
    /// A device's table. Answer: [`DmAnswer::Lines`].
    Table {
        /// Which.
        device: DeviceName,
        /// The inactive one.
        #[serde(default)]
        inactive: bool,
    },
    /// How a device's targets are doing. Answer: [`DmAnswer::Lines`].
    Status {
        /// Which.
        device: DeviceName,
        /// Of the inactive table.
        #[serde(default)]
        inactive: bool,
        /// Without committing anything before.
        #[serde(default)]
        noflush: bool,
    },
    /// What a device stands on. Answer: [`DmAnswer::Deps`].
    Deps {
        /// Which.
        device: DeviceName,
        /// Its inactive table.
        #[serde(default)]
        inactive: bool,
    },
    /// Wait as long as exactly so many events have happened to a device, then as
    /// [`DmOrder::Status`]; so too when the device goes.
    Wait {
        /// Which.
        device: DeviceName,
        /// How many have happened already.
        event_nr: u32,
        /// As with [`DmOrder::Status`].
        #[serde(default)]
        inactive: bool,
    },
    /// Which targets there are. Answer: [`DmAnswer::Targets`].
    Targets,
    /// Say something to the target at a sector of a device. Answer:
    /// [`DmAnswer::Device`].
    Message {
        /// Which.
        device: DeviceName,
        /// A sector of the target.
        sector: u64,
        /// The words.
        message: String,
    },
}

impl DmOrder {
    /// The device that it is about, if it is about one that should be there.
    pub fn device(&self) -> Option<&DeviceName> {
        match self {
            Self::Load { device, .. }
            | Self::Clear { device }
            | Self::Suspend { device, .. }
            | Self::Resume { device, .. }
            | Self::Remove { device, .. }
            | Self::Rename { device, .. }
            | Self::SetUuid { device, .. }
            | Self::Info { device, .. }
            | Self::Table { device, .. }
            | Self::Status { device, .. }
            | Self::Deps { device, .. }
            | Self::Wait { device, .. }
            | Self::Message { device, .. } => Some(device),
            Self::Version | Self::Create { .. } | Self::List | Self::Targets => None,
        }
    }

    /// It asks for what there is to tell of a device's inactive table.
    pub fn asks_inactive(&self) -> bool {
        match self {
            Self::Info { inactive, .. }
            | Self::Table { inactive, .. }
            | Self::Status { inactive, .. }
            | Self::Deps { inactive, .. }
            | Self::Wait { inactive, .. } => *inactive,
            _ => false,
        }
    }
}

/// What a device is named by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DeviceName {
    /// Its name.
    Name(String),
    /// Its uuid.
    Uuid(String),
    /// Its numbers.
    Number {
        /// [`MAJOR`], if there is such a device.
        major: u32,
        /// The minor number.
        minor: u32,
    },
}

/// A line of a table, or of a status, as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextLine {
    /// First sector.
    pub start: u64,
    /// How many.
    pub len: u64,
    /// The target's name.
    pub target: String,
    /// Its arguments, or its status.
    pub params: String,
}

/// What an order brought.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DmAnswer {
    /// It was done.
    Done,
    /// The version of the interface.
    Version {
        /// `4.47.0`.
        version: String,
    },
    /// It was done to this device.
    Device(DmInfo),
    /// The devices there are; dmsetup lists them in the order of their names, byte
    /// by byte.
    Names(Vec<DmName>),
    /// A device, and the lines of a table or of its status: none, if it has no such
    /// table.
    Lines {
        /// The device.
        device: DmInfo,
        /// The lines.
        lines: Vec<TextLine>,
    },
    /// A device, and what it stands on.
    Deps {
        /// The device.
        device: DmInfo,
        /// Each once, in the kernel's order.
        deps: Vec<DmDep>,
    },
    /// The targets there are, in the kernel's order.
    Targets(Vec<DmTarget>),
    /// It was refused, with nothing changed.
    Refused {
        /// The kernel's error number, positive.
        errno: i32,
        /// What the kernel would write to its log, without the `device-mapper: ` in
        /// front: one line.
        why: Option<String>,
    },
}

/// A device, and how it is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmInfo {
    /// Its name.
    pub name: String,
    /// Its uuid; empty: it has none.
    pub uuid: String,
    /// [`MAJOR`].
    pub major: u32,
    /// Its own number.
    pub minor: u32,
    /// Clients that are attached to it, and tables that stand on it.
    pub open_count: u32,
    /// Events that have happened to it.
    pub event_nr: u32,
    /// It stands still.
    pub suspended: bool,
    /// It stands still because of another device.
    pub internal_suspend: bool,
    /// It has an active table.
    pub live_table: bool,
    /// It has an inactive table.
    pub inactive_table: bool,
    /// The table that was asked about, else the active one, refuses writes.
    pub read_only: bool,
    /// It goes as soon as it is no longer open.
    pub deferred_remove: bool,
    /// Lines of the table that was asked about, else of the active one.
    pub target_count: u32,
}

/// A device in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmName {
    /// Its name.
    pub name: String,
    /// Its uuid; empty: it has none.
    pub uuid: String,
    /// [`MAJOR`].
    pub major: u32,
    /// Its own number.
    pub minor: u32,
    /// Events that have happened to it.
    pub event_nr: u32,
}

/// What a device stands on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DmDep {
    /// Another mapped device.
    Mapped {
        /// Its name.
        name: String,
        /// [`MAJOR`].
        major: u32,
        /// Its own number.
        minor: u32,
    },
    /// A block device of the machine.
    Block {
        /// As it was named.
        path: PathBuf,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A file, which has no numbers.
    File {
        /// As it was named.
        path: PathBuf,
    },
}

/// A target that tables can have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmTarget {
    /// Its name in tables.
    pub name: String,
    /// Its version in the kernel whose words it speaks.
    pub version: [u32; 3],
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{Answer, Order, Request, VERSION};

    #[test]
    fn orders_are_readable_and_strict() {
        let line = r#"{"version":1,"order":{"dm":{"suspend":{"device":{"name":"vm"}}}}}"#;
        let request: Request = serde_json::from_str(line).unwrap();
        let suspend = DmOrder::Suspend {
            device: DeviceName::Name("vm".into()),
            noflush: false,
            nolockfs: false,
        };
        assert_eq!(request.order, Order::Dm(suspend));
        let line = r#"{"version":1,"order":{"dm":{"suspend":{"device":{"name":"vm"},"x":1}}}}"#;
        assert!(serde_json::from_str::<Request>(line).is_err());
        let order = Order::Dm(DmOrder::List);
        let version = VERSION;
        let text = serde_json::to_string(&Request { version, order }).unwrap();
        assert_eq!(text, r#"{"version":1,"order":{"dm":"list"}}"#);
    }

    #[test]
    fn answers_come_back_as_they_were() {
        let device = DmInfo {
            name: "vm".into(),
            major: MAJOR,
            minor: 3,
            ..DmInfo::default()
        };
        let file = DmDep::File {
            path: "/disk.img".into(),
        };
        for answer in [
            DmAnswer::Done,
            DmAnswer::Deps {
                device,
                deps: vec![file],
            },
            DmAnswer::Refused {
                errno: 22,
                why: None,
            },
        ] {
            let answer = Answer::Dm(answer);
            let text = serde_json::to_string(&answer).unwrap();
            assert_eq!(serde_json::from_str::<Answer>(&text).unwrap(), answer);
        }
    }
}
