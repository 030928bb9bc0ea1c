//! `cow repair`: what it makes is sound.
#![no_main]
use libfuzzer_sys::fuzz_target;
use nbdsnap::cow::repair::{self, Wanted};
use nbdsnap::cow::{Reading, check};

fuzz_target!(|data: &[u8]| {
    let Some(case) = nbdsnap_fuzz::case(data) else {
        return;
    };
    let output = nbdsnap_fuzz::output();
    let wanted = Wanted {
        cow: &case.cow,
        origin: case.origin.as_deref(),
        output: Some(&output),
        force: false,
        chunk_size: None,
        // Not a bit of the flags: with a good header and without one.
        beyond_holes: data.get(1).is_some_and(|length| length & 1 != 0),
    };
    if repair::run(wanted, &mut |_| {}).is_ok() {
        let report = check::run(&output, case.origin.as_deref(), Reading::Alone, None);
        assert!(
            report.expect("readable").is_fine(),
            "repaired, and not sound"
        );
    }
});
