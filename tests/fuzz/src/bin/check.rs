//! `cow check`.
#![no_main]
use libfuzzer_sys::fuzz_target;
use nbdsnap::cow::{Reading, check};

fuzz_target!(|data: &[u8]| {
    if let Some(case) = nbdsnap_fuzz::case(data) {
        let mut compared = |_| {};
        let contents: Option<&mut dyn FnMut(u64)> = match case.origin {
            Some(_) => Some(&mut compared),
            None => None,
        };
        let _ = check::run(&case.cow, case.origin.as_deref(), Reading::Alone, contents);
    }
});
