//! `cow dump`, and `cow restore` of what it wrote: the same dump comes out again. And
//! the bytes as a dump.
#![no_main]
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use nbdsnap::cow::dump::{self, Format};
use nbdsnap::cow::restore::{self, Place};
use nbdsnap::cow::{CowStore, Reading};

fuzz_target!(|data: &[u8]| {
    let _ = dump::read(data, Path::new("data")).map(|dump| dump.contradiction(1 << 20));
    let Some(case) = nbdsnap_fuzz::case(data) else {
        return;
    };
    let Ok(store) = CowStore::open(&case.cow, Reading::Alone) else {
        return;
    };
    let format = [Format::Text, Format::Json, Format::Xml][data[1] as usize % 3];
    let mut text = Vec::new();
    dump::run(&store, format, &mut text).expect("readable");
    let read = dump::read(&text[..], Path::new("dump")).expect("what is dumped is read");
    let path = nbdsnap_fuzz::output();
    let place = Place::New {
        path: &path,
        force: false,
    };
    // A store that ends before its first area cannot be made again.
    if restore::run(&read, Path::new("dump"), place, None, true).is_ok() {
        let made = CowStore::open(&path, Reading::Alone).expect("a store was made");
        let mut again = Vec::new();
        dump::run(&made, format, &mut again).expect("readable");
        assert!(again == text, "another dump");
    }
});
