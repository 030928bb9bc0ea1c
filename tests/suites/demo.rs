//! `nbdsnap demo`: a stranger's first command. It must succeed without root or
//! any other program, show its steps, and leave nothing behind.

use std::process::Command;

use nbdsnap_tests::harness::files::{Fingerprint, folder};
use nbdsnap_tests::harness::process::run;
use nbdsnap_tests::harness::program::program;

#[test]
fn the_demo_shows_what_the_readme_promises() {
    let temporary = folder();
    let before = Fingerprint::of(temporary.path());
    let mut demo = Command::new(program());
    // No other program may be needed.
    demo.arg("demo")
        .env("TMPDIR", temporary.path())
        .env("PATH", "/nonexistent")
        .current_dir(temporary.path());
    let done = run(&mut demo).ok();
    let text = done.text();
    println!("{text}");
    for promise in ["snapshot", "origin", "restart", "fork", "chunk"] {
        assert!(
            text.to_lowercase().contains(promise),
            "the demo says nothing of '{promise}': {done}"
        );
    }
    // The store's status as dmsetup prints it: start, length, target, sectors.
    let status = text.split_whitespace().any(|word| {
        word.split_once('/').is_some_and(|(allocated, total)| {
            let number = |text: &str| text.parse::<u64>().is_ok_and(|n| n > 0);
            number(allocated) && number(total)
        })
    });
    assert!(status, "no status of the store: {done}");
    before.assert_unchanged(temporary.path(), "the demo left something behind");
}
