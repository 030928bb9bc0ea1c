//! Snapshots of several levels that are taken by one order are of one instant, under
//! a writer who never stops.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nbdsnap_tests::harness::blocks::{BLOCK, block_of, numbers_of};
use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::live::{attach, contents, done};
use nbdsnap_tests::harness::process::wait_until;
use nbdsnap_tests::harness::server::Serve;

const BLOCKS: u64 = 64;

/// Orders; each takes a snapshot of each of three levels.
const GROUPS: u64 = 5;

#[test]
fn a_group_over_several_levels_is_one_instant() {
    let folder = folder();
    let disk = folder.path().join("disk.img");
    sparse_file(&disk, BLOCKS * BLOCK as u64);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("disk", &disk);
    let server = serve.start();
    for export in ["disk@a", "disk@a@b"] {
        done(&server, &["snapshot", "create", export, "--chunk", "4K"]);
    }
    let levels = ["disk@a@b", "disk", "disk@a"];
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut clients = levels.map(|export| attach(&server, export));
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                for client in &mut clients {
                    // One level after the other: what the first shows last is never
                    // behind the others.
                    let offset = number % BLOCKS * BLOCK as u64;
                    client
                        .write(offset, &block_of(number), false)
                        .expect("written");
                }
                written.store(number, Ordering::Relaxed);
            }
        });
        for group in 0..GROUPS {
            let before = written.load(Ordering::Relaxed);
            wait_until("the writer is at work", || {
                assert!(!writer.is_finished(), "the writer has failed");
                written.load(Ordering::Relaxed) > before + 50
            });
            let taken = levels.map(|level| format!("{level}@g{group}"));
            let mut order = vec!["snapshot", "create", "--chunk", "4K"];
            order.extend(taken.iter().map(String::as_str));
            done(&server, &order);
            // The last write that each shows.
            let last = taken.map(|export| {
                let numbers = numbers_of(&contents(&server, &export)).expect("whole blocks");
                numbers.into_iter().max().unwrap_or(0)
            });
            assert!(
                last[0] > before,
                "{last:?}, and {before} were written before"
            );
            assert!(
                last.is_sorted_by(|a, b| a >= b) && last[0] - last[2] <= 1,
                "group {group} is not of one instant: {last:?}"
            );
        }
        stop.store(true, Ordering::Relaxed);
    });
    server.stop();
}
