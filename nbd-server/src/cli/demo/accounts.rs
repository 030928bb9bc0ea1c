//! What the demonstration's disk holds: the accounts of a small bank, one line
//! of text each, so that a change can be told by a sum as well as by a checksum.
//! The same on every run.

use std::fmt::Write;

/// Accounts on the disk.
pub(super) const ACCOUNTS: u64 = 32_768;
/// Bytes that each of them has.
pub(super) const RECORD: usize = 256;

const FIRST: [&str; 8] = [
    "Ada", "Boris", "Chidi", "Dana", "Emeka", "Farah", "Goran", "Hana",
];
const LAST: [&str; 8] = [
    "Abel", "Brandt", "Castillo", "Duarte", "Eriksen", "Fournier", "Green", "Horvat",
];
/// Where the balance stands in a record: right-aligned, in cents.
const BALANCE: std::ops::Range<usize> = 40..52;

/// An account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Account {
    number: u64,
    cents: u64,
}

impl Account {
    /// The account that a new disk has at `number`.
    fn new(number: u64) -> Self {
        let cents = mix(number) % 1_000_000;
        Self { number, cents }
    }

    /// Its line.
    pub(super) fn record(self) -> [u8; RECORD] {
        let chance = mix(self.number ^ 0x5eed);
        let (first, last) = (chance % 8, chance / 8 % 8);
        let name = format!("{} {}", FIRST[first as usize], LAST[last as usize]);
        let mut line = format!("{:08}  {name:<28}  {:>12}", self.number, self.cents);
        let (year, branch) = (1970 + chance / 64 % 55, chance / 4096 % 100);
        let _ = write!(line, "  opened {year}, branch {branch:02}");
        let mut record = [b' '; RECORD];
        record[..line.len()].copy_from_slice(line.as_bytes());
        record[RECORD - 1] = b'\n';
        record
    }

    /// The account whose line this is; `None` where it was wiped out.
    fn read(record: &[u8]) -> Option<Self> {
        let number = |range| {
            std::str::from_utf8(&record[range])
                .ok()?
                .trim()
                .parse()
                .ok()
        };
        Some(Self {
            number: number(0..8)?,
            cents: number(BALANCE)?,
        })
    }
}

/// A new disk.
pub(super) fn image() -> Vec<u8> {
    (0..ACCOUNTS)
        .flat_map(|number| Account::new(number).record())
        .collect()
}

/// The sum of all balances, in cents.
pub(super) fn total(image: &[u8]) -> u64 {
    let accounts = image.chunks_exact(RECORD).filter_map(Account::read);
    accounts.map(|account| account.cents).sum()
}

/// Pay `cents` into `count` accounts, scattered over `image` as `seed` has it:
/// the writes that do it, each an offset and a record.
pub(super) fn pay(image: &[u8], seed: u64, count: u64, cents: u64) -> Vec<(u64, Vec<u8>)> {
    // An odd factor visits every account once before it comes back.
    let factor = mix(seed) | 1;
    let numbers = (0..count).map(|step| step.wrapping_mul(factor).wrapping_add(seed) % ACCOUNTS);
    numbers
        .filter_map(|number| {
            let offset = number as usize * RECORD;
            let mut account = Account::read(&image[offset..offset + RECORD])?;
            account.cents += cents;
            Some((offset as u64, account.record().to_vec()))
        })
        .collect()
}

/// What the writes make of `image`.
pub(super) fn apply(image: &mut [u8], writes: &[(u64, Vec<u8>)]) {
    for (offset, bytes) in writes {
        image[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// A number that looks like chance (splitmix64).
fn mix(number: u64) -> u64 {
    let mut bits = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_as_it_was_written() {
        for number in [0, 1, 4711, ACCOUNTS - 1] {
            let account = Account::new(number);
            assert_eq!(Account::read(&account.record()), Some(account));
        }
        assert_eq!(Account::read(&[0; RECORD]), None);
    }

    #[test]
    fn a_payment_adds_up_and_visits_no_account_twice() {
        let mut image = image();
        let before = total(&image);
        let writes = pay(&image, 7, 1000, 250_000);
        apply(&mut image, &writes);
        assert_eq!(total(&image), before + 1000 * 250_000);
    }
}
