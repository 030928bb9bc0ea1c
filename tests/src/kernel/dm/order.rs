//! What is a matter of order, on the kernel as well: where in a store a chunk comes to
//! lie while a merge goes on beside requests, and what becomes of a request for which a
//! store has room only in part. Such requests are cut, or not made, or the bytes of the
//! store are not compared; what the store shows always is.

use super::generate::Generator;
use super::model::Device;
use super::table::{On, Target};

const SECTOR: u64 = 512;

impl Generator {
    /// A write to an origin that a store has not enough room for loses the snapshot;
    /// whether the chunks before the one that found no room are copied all the same is a
    /// matter of order, and nobody can ever see them but in the store's own bytes. So
    /// either it is so short that there are none, or these bytes are not compared.
    pub(super) fn copied(&mut self, device: &str, offset: u64, mut len: u64) -> u64 {
        let mut next = self.model.device(device);
        let mut small = Vec::new();
        while let Some(line) = next.and_then(Device::only_line) {
            let on = match line {
                Target::Origin { on } => *on,
                Target::Snapshot(line) if line.merge => line.origin,
                _ => break,
            };
            small.extend(self.model.stores_of(on));
            next = self.beneath(on);
        }
        small.retain(|(cow, _)| !self.is_large(*cow));
        for (cow, chunk) in small {
            let left = chunk * SECTOR - offset % (chunk * SECTOR);
            if self.is_careful {
                len = len.min(left);
            } else if len > left {
                self.uneven.extend(self.name_of(cow));
            }
        }
        len
    }

    fn name_of(&self, on: On) -> Option<String> {
        match on {
            On::Disk(_) => None,
            On::Device(number) => self.model.name_of(number).map(str::to_owned),
        }
    }

    /// If a request to a device can fill the store that it goes to: the smallest chunk
    /// that it is copied by.
    pub(super) fn small_store(&self, device: &str) -> Option<u64> {
        let mut chunk = u64::MAX;
        let mut next = self.model.device(device);
        loop {
            match next?.only_line()? {
                Target::Origin { on } => {
                    chunk = chunk.min(self.model.smallest_chunk(*on));
                    next = self.beneath(*on);
                }
                Target::Snapshot(line) if !line.merge && !self.is_large(line.cow) => {
                    return Some(chunk.min(line.chunk));
                }
                _ => return None,
            }
        }
    }

    /// Whether it is a matter of how far a merge has come what becomes of a request:
    /// beneath the device is a store that the merge can fill.
    pub(super) fn is_a_matter_of_order(&self, device: &str) -> bool {
        let mut next = self.model.device(device);
        while let Some(line) = next.and_then(Device::only_line) {
            next = match line {
                Target::Origin { on } => self.beneath(*on),
                Target::Snapshot(line) if !line.merge => {
                    if self.merging().is_some() && !self.is_large(line.cow) {
                        return true;
                    }
                    self.beneath(line.origin)
                }
                _ => None,
            };
        }
        false
    }

    fn beneath(&self, on: On) -> Option<&Device> {
        match on {
            On::Disk(_) => None,
            On::Device(number) => self.model.device(self.model.name_of(number)?),
        }
    }

    /// Whether a store has room for everything.
    fn is_large(&self, cow: On) -> bool {
        let On::Device(number) = cow else {
            return false;
        };
        let name = self.model.name_of(number);
        let mut cows = self.layout.stacks.iter().flat_map(|stack| &stack.cows);
        cows.any(|cow| cow.is_large && Some(cow.name.as_str()) == name)
    }

    /// While a merge is under way, chance decides where in the stores a chunk lies;
    /// what they show is the same.
    pub fn note_order(&mut self) {
        if self.merging().is_none() {
            return;
        }
        let lines = self
            .model
            .devices
            .values()
            .filter_map(|device| device.only_line());
        let stores = lines.filter_map(|line| match line {
            Target::Snapshot(line) => self.name_of(line.cow),
            _ => None,
        });
        let stores: Vec<String> = stores.collect();
        self.uneven.extend(stores);
    }
}
