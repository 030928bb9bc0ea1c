//! Stores that the Linux kernel wrote: each view must read as the kernel read
//! it. Read-only, not a byte of any file may change; writable, writes through
//! the origin must leave the snapshot as it is.

use std::path::Path;

use nbdsnap_tests::harness::files::{Fingerprint, folder, sha256};
use nbdsnap_tests::harness::golden::{Golden, golden_names, unpack_golden};
use nbdsnap_tests::harness::process::run_client;
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};
use nbdsnap_tests::harness::wire::{Session, errno};

/// The hash of an export, read by nbdcopy.
fn export_sha(server: &Server, folder: &Path, export: &str) -> String {
    let copy = folder.join("export.img");
    let _ = run_client(
        folder,
        "nbdcopy",
        [server.uri(export).as_str(), "export.img"],
    )
    .ok();
    let sha = sha256(&copy);
    std::fs::remove_file(copy).expect("the copy can be removed");
    sha
}

/// The command line for an archive. The stores are full where the kernel filled
/// them: they may not grow past what the kernel had.
fn serve(golden: &Golden, folder: &Path) -> Serve {
    let policy = if golden.kind == "PO" { ",overflow" } else { "" };
    let len = golden.cow.metadata().expect("the store").len();
    let options = format!("{policy},adopt,size={len}");
    let mut serve = Serve::on_socket_in(folder);
    serve
        .disk("disk", &golden.origin)
        .snapshot("disk@snap", &golden.cow, &options);
    serve
}

fn is_merge(golden: &Golden) -> bool {
    golden.name.starts_with("merge_")
}

fn check_views(golden: &Golden, server: &Server, folder: &Path) {
    let name = &golden.name;
    match &golden.snapshot_sha {
        Some(sha) => assert_eq!(
            &export_sha(server, folder, "disk@snap"),
            sha,
            "{name}: the snapshot"
        ),
        None => check_invalid(server),
    }
    if !is_merge(golden) {
        // The origin's hash in a merge archive is from before the merge.
        assert_eq!(
            export_sha(server, folder, "disk"),
            golden.origin_sha,
            "{name}: the origin"
        );
    }
}

/// Every read and write of an Invalid snapshot is EIO.
fn check_invalid(server: &Server) {
    let mut session = Session::open(&server.address(), "disk@snap").expect("a connection");
    for offset in [0, 4096, session.size - 512] {
        assert_eq!(
            session.read(offset, 512).expect("a reply"),
            Err(errno::EIO),
            "read at {offset}"
        );
    }
}

#[test]
fn every_archive_reads_as_the_kernel_read_it_and_nothing_changes() {
    let names = golden_names();
    assert!(names.len() >= 13, "archives are missing: {names:?}");
    for name in names {
        let (stores, scratch) = (folder(), folder());
        let golden = unpack_golden(&name, stores.path());
        let before = Fingerprint::of(stores.path());
        let mut serve = serve(&golden, scratch.path());
        let server = serve.read_only().start();
        check_views(&golden, &server, scratch.path());
        for export in ["disk", "disk@snap"] {
            let mut session = Session::open(&server.address(), export).expect("a connection");
            let written = session.write(0, &[0xaa; 512]).expect("a reply");
            assert_eq!(
                written,
                Err(errno::EPERM),
                "{name}: a write to {export}, which is read-only"
            );
        }
        server.stop();
        before.assert_unchanged(stores.path(), &name);
        println!("{name}: as the kernel read it, not a byte changed");
    }
}

#[test]
fn every_archive_stays_what_it_is_under_writes_to_its_origin() {
    let mut random = Random::new(seed("golden"));
    for name in golden_names() {
        let folder = folder();
        let golden = unpack_golden(&name, folder.path());
        let serve = serve(&golden, folder.path());
        let server = serve.start();
        check_views(&golden, &server, folder.path());
        let (Some(sha), Some((allocated, total))) = (&golden.snapshot_sha, golden.allocated) else {
            server.stop();
            continue;
        };
        let chunk_sectors = golden.chunk_sectors.expect("a table");
        // Half of the room that is left, lest the store fill up.
        let chunks = ((total - allocated) / chunk_sectors / 2).min(200);
        assert!(chunks > 0, "{name}: no room in the store");
        let model = overwrite(&server, &mut random, chunks, chunk_sectors * 512);
        assert_eq!(
            &export_sha(&server, folder.path(), "disk@snap"),
            sha,
            "{name}: after writes to the origin"
        );
        server.stop();

        let server = serve.start();
        assert_eq!(
            &export_sha(&server, folder.path(), "disk@snap"),
            sha,
            "{name}: after a restart"
        );
        let mut origin = Session::open(&server.address(), "disk").expect("a connection");
        assert!(
            origin.read_all().expect("replies") == Ok(model),
            "{name}: the origin lost writes"
        );
        server.stop();
        println!("{name}: {chunks} chunks of the origin overwritten, the snapshot is the same");
    }
}

/// Write something into `chunks` random chunks of the origin; what it holds then.
fn overwrite(server: &Server, random: &mut Random, chunks: u64, chunk_bytes: u64) -> Vec<u8> {
    let mut origin = Session::open(&server.address(), "disk").expect("a connection");
    let mut model = origin
        .read_all()
        .expect("replies")
        .expect("the origin can be read");
    for _ in 0..chunks {
        let start = random.below(origin.size.div_ceil(chunk_bytes)) * chunk_bytes;
        let offset = start + random.below(chunk_bytes.min(origin.size - start));
        let room = (start + chunk_bytes).min(origin.size) - offset;
        let len = random.between(1, room.min(64 << 10)) as usize;
        let data = random.bytes(len);
        model[offset as usize..offset as usize + len].copy_from_slice(&data);
        assert_eq!(
            origin.write(offset, &data).expect("a reply"),
            Ok(Vec::new()),
            "write of {len} at {offset}"
        );
    }
    model
}

#[test]
fn a_full_store_made_by_the_kernel_goes_invalid_and_the_origin_write_succeeds() {
    let folder = folder();
    let golden = unpack_golden("overflow_po", folder.path());
    let serve = serve(&golden, folder.path());
    let server = serve.start();
    let mut snapshot = Session::open(&server.address(), "disk@snap").expect("a connection");
    let mut origin = Session::open(&server.address(), "disk").expect("a connection");
    let mut refused = false;
    // Somewhere is a chunk that the snapshot has no exception for: the kernel's
    // run found one when it overflowed.
    for chunk in 0..snapshot.size / 4096 {
        match snapshot
            .write(chunk * 4096, &[0x55; 4096])
            .expect("a reply")
        {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, errno::EIO, "a snapshot write that finds no space");
                refused = true;
            }
        }
    }
    assert!(refused, "the store was not full");
    assert!(
        snapshot.read(0, 4096).expect("a reply").is_ok(),
        "an overflowed snapshot can be read"
    );
    for chunk in 0..origin.size / 4096 {
        assert_eq!(
            origin.write(chunk * 4096, &[0x66; 4096]).expect("a reply"),
            Ok(Vec::new())
        );
    }
    check_invalid(&server);
    drop((snapshot, origin));
    server.stop();

    let server = serve.start();
    check_invalid(&server);
    let mut origin = Session::open(&server.address(), "disk").expect("a connection");
    assert!(
        origin
            .read_all()
            .expect("replies")
            .expect("readable")
            .iter()
            .all(|byte| *byte == 0x66)
    );
    server.stop();
}
