//! `cow inspect`, with its pictures.
#![no_main]
use libfuzzer_sys::fuzz_target;
use nbdsnap::cow::{Reading, inspect};

fuzz_target!(|data: &[u8]| {
    if let Some(case) = nbdsnap_fuzz::case(data)
        && let Ok(found) = inspect::run(&case.cow, case.origin.as_deref(), Reading::Alone)
    {
        let label = |offset: u64| offset.to_string();
        let _ = found.small.text(label);
        let _ = found.large.svg("", "", label);
    }
});
