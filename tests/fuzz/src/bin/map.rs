//! `cow map`, in every order, and the changed ranges.
#![no_main]
use libfuzzer_sys::fuzz_target;
use nbdsnap::cow::open::disk_bytes;
use nbdsnap::cow::ranges::{self, Order};
use nbdsnap::cow::{CowStore, Reading};

fuzz_target!(|data: &[u8]| {
    let Some(case) = nbdsnap_fuzz::case(data) else {
        return;
    };
    let Ok(store) = CowStore::open(&case.cow, Reading::Alone) else {
        return;
    };
    let bytes = case
        .origin
        .map(|path| disk_bytes(&path).expect("it is there"));
    for order in [Order::Origin, Order::Store, Order::List] {
        let exceptions = ranges::exceptions(&store, order).expect("readable");
        if order == Order::Origin {
            let mut end = 0;
            for range in ranges::changed(&store, &exceptions, bytes) {
                assert!(range.start >= end && range.end > range.start);
                assert!(bytes.is_none_or(|bytes| range.end <= bytes));
                end = range.end;
            }
        }
    }
});
