//! Random requests to a disk and its snapshots, over several connections at once:
//! chunks of 1 sector to 1 MiB, persistent and transient stores, stores that grow
//! and stores that fill; ended and killed and started again in between. Every view
//! always is what its byte-array model says.
//!
//! Eight snapshots for a long time, with all that can happen to a store; and sixteen
//! at once, all of them written, none of them full.

#[path = "random_views/batch.rs"]
mod batch;
#[path = "random_views/view.rs"]
mod view;

use std::time::{Duration, Instant};

use nbdsnap_format::ChunkSize;
use nbdsnap_tests::harness::files::{folder, random_file};
use nbdsnap_tests::harness::random::{Random, long_run, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

use batch::Performed;
use nbdsnap_tests::harness::wire::{Session, errno};
use view::{Kind, Store, View};

/// Not a multiple of any chunk but the smallest.
const SIZE: u64 = 3 * 1024 * 1024 + 5 * 512;

/// What is played.
struct Play {
    snapshots: &'static [Snapshot],
    batches: u64,
    /// Requests in a batch.
    requests: usize,
    /// After so many batches the server ends and starts again: by kill -9, and every
    /// other time, and at the end, by SIGTERM.
    until_restart: u64,
}

const ALL_THAT_CAN_HAPPEN: Play = Play {
    snapshots: &SNAPSHOTS,
    batches: 240,
    requests: 40,
    until_restart: 60,
};

const SIXTEEN_AT_ONCE: Play = Play {
    snapshots: &SIXTEEN,
    batches: 60,
    requests: 120,
    until_restart: 30,
};

/// Name, options, kind, chunk in bytes, size of a store that is to fill.
type Snapshot = (&'static str, &'static str, Kind, u64, Option<u64>);

const SNAPSHOTS: [Snapshot; 8] = [
    ("sector", "chunk=512", Kind::P, 512, None),
    ("small", "chunk=4K,overflow", Kind::PO, 4 << 10, None),
    ("middle", "chunk=16K", Kind::P, 16 << 10, None),
    (
        "passing",
        "chunk=64K,transient,format",
        Kind::N,
        64 << 10,
        None,
    ),
    ("large", "chunk=1M", Kind::P, 1 << 20, None),
    (
        "fills",
        "chunk=4K,size=1400K",
        Kind::P,
        4 << 10,
        Some(1400 << 10),
    ),
    (
        "overflows",
        "chunk=8K,size=2M,overflow",
        Kind::PO,
        8 << 10,
        Some(2 << 20),
    ),
    (
        "passing-fills",
        "chunk=16K,size=2M,transient,format",
        Kind::N,
        16 << 10,
        Some(2 << 20),
    ),
];

/// Two of each chunk size, of different kinds.
const SIXTEEN: [Snapshot; 16] = [
    ("p512", "chunk=512", Kind::P, 512, None),
    ("o1k", "chunk=1K,overflow", Kind::PO, 1 << 10, None),
    ("n512", "chunk=512,transient,format", Kind::N, 512, None),
    ("p1k", "chunk=1K", Kind::P, 1 << 10, None),
    ("p4k", "chunk=4K", Kind::P, 4 << 10, None),
    ("o4k", "chunk=4K,overflow", Kind::PO, 4 << 10, None),
    ("n4k", "chunk=4K,transient,format", Kind::N, 4 << 10, None),
    ("p8k", "chunk=8K", Kind::P, 8 << 10, None),
    ("n8k", "chunk=8K,transient,format", Kind::N, 8 << 10, None),
    ("p16k", "chunk=16K", Kind::P, 16 << 10, None),
    ("o16k", "chunk=16K,overflow", Kind::PO, 16 << 10, None),
    ("p64k", "chunk=64K", Kind::P, 64 << 10, None),
    (
        "n64k",
        "chunk=64K,transient,format",
        Kind::N,
        64 << 10,
        None,
    ),
    ("o256k", "chunk=256K,overflow", Kind::PO, 256 << 10, None),
    ("p256k", "chunk=256K", Kind::P, 256 << 10, None),
    ("p1m", "chunk=1M", Kind::P, 1 << 20, None),
];

#[test]
fn every_view_is_what_its_model_says() {
    play_for_a_while("random_views", &ALL_THAT_CAN_HAPPEN);
}

#[test]
fn sixteen_snapshots_and_the_origin_are_written_at_once() {
    play_for_a_while("sixteen_at_once", &SIXTEEN_AT_ONCE);
}

/// A long run takes new seeds until its time is over.
fn play_for_a_while(test: &str, play: &Play) {
    let seed = seed(test);
    let begun = Instant::now();
    run(play, seed);
    let mut more = Random::new(seed);
    while begun.elapsed() < long_run().unwrap_or(Duration::ZERO) {
        let seed = more.bits();
        println!("{test}: seed {seed} (again with NBDSNAP_SEED={seed})");
        run(play, seed);
    }
}

fn run(play: &Play, seed: u64) {
    let mut random = Random::new(seed);
    let folder = folder();
    let disk = folder.path().join("disk.img");
    let content = random_file(&disk, SIZE as usize, &mut random);
    let mut serve = Serve::on_socket_in(folder.path());
    serve.disk("disk", &disk);
    let mut views = vec![View::new("disk", None, content.clone())];
    for &(name, options, kind, chunk, size) in play.snapshots {
        let export = format!("disk@{name}");
        serve.snapshot(
            &export,
            &folder.path().join(format!("{name}.cow")),
            &format!(",{options}"),
        );
        let chunk = ChunkSize::from_bytes(chunk).expect("a chunk size");
        views.push(View::new(
            &export,
            Some(Store { kind, chunk, size }),
            content.clone(),
        ));
    }

    let mut server = start(&serve, &mut views);
    let mut performed = vec![Performed::default(); views.len()];
    for batch in 0..play.batches {
        // Begin in a small part, where requests meet, and widen.
        let more = play.batches / 12;
        let span = (SIZE * (batch + more) / (play.batches + more)).max(1 << 16);
        batch::perform(&mut views, &mut random, play.requests, span, &mut performed);
        if (batch + 1) % play.until_restart == 0 {
            let kill = (batch + 1) / play.until_restart % 2 == 1;
            server = restart(server, &serve, &mut views, kill);
        }
    }
    for (view, performed) in views.iter_mut().zip(&performed) {
        view.check_all();
        view.sessions.clear();
        let Performed { reads, writes } = performed;
        assert!(
            *reads > 0 && *writes > 0,
            "{}: {reads} reads, {writes} writes",
            view.export
        );
    }
    server.stop();
    for (name, _, _, _, size) in play.snapshots {
        let length = length_of(&folder.path().join(format!("{name}.cow")));
        let most = size.unwrap_or(u64::MAX);
        assert!(length <= most, "{name} grew past its size");
    }
}

/// A store's file grows with what is copied into it, to its `size=` and no
/// further, and goes on growing after a restart.
#[test]
fn a_store_grows_as_it_needs() {
    const MIB: u64 = 1 << 20;
    let folder = folder();
    let (disk, free, limited) = (
        folder.path().join("disk.img"),
        folder.path().join("free.cow"),
        folder.path().join("limited.cow"),
    );
    let before = random_file(&disk, 48 * MIB as usize, &mut Random::new(3));
    let mut serve = Serve::on_socket_in(folder.path());
    serve
        .disk("disk", &disk)
        .snapshot("disk@free", &free, ",chunk=16K")
        .snapshot("disk@limited", &limited, ",chunk=16K,size=20M");
    let mut server = serve.start();
    let mut lengths = vec![length_of(&free)];
    for piece in 0..48 {
        let mut origin = Session::open(&server.address(), "disk").expect("a connection");
        let data = vec![piece as u8; MIB as usize];
        assert_eq!(
            origin.write(piece * MIB, &data).expect("a reply"),
            Ok(Vec::new())
        );
        lengths.push(length_of(&free));
        assert!(length_of(&limited) <= 20 * MIB, "size=20M was not kept");
        if piece % 16 == 15 {
            drop(origin);
            server.stop();
            server = serve.start();
        }
    }
    let mut snapshot = Session::open(&server.address(), "disk@free").expect("a connection");
    assert!(
        snapshot.read_all().expect("replies") == Ok(before),
        "the snapshot"
    );
    let mut lost = Session::open(&server.address(), "disk@limited").expect("a connection");
    assert_eq!(
        lost.read(0, 512).expect("a reply"),
        Err(errno::EIO),
        "48 MiB do not fit into 20"
    );
    server.stop();
    assert!(lengths.is_sorted(), "the store shrank: {lengths:?}");
    lengths.dedup();
    assert!(
        lengths.len() > 2,
        "the store did not grow in steps: {lengths:?}"
    );
    let last = lengths.last().copied().unwrap_or(0);
    assert!(
        (48 * MIB..56 * MIB).contains(&last),
        "the store of 48 MiB of chunks has {last} bytes"
    );
}

fn length_of(path: &std::path::Path) -> u64 {
    path.metadata().expect("a store").len()
}

fn start(serve: &Serve, views: &mut [View]) -> Server {
    let server = serve.start();
    for view in views {
        let connections = if view.store.is_none() { 3 } else { 2 };
        view.connect(&server.address(), connections);
    }
    server
}

fn disconnect(views: &mut [View]) {
    for view in views {
        view.sessions.clear();
    }
}

/// End the server, one way or the other, start it again and look at everything.
fn restart(server: Server, serve: &Serve, views: &mut [View], kill: bool) -> Server {
    if kill {
        server.kill();
    } else {
        disconnect(views);
        server.stop();
    }
    let server = start(serve, views);
    let origin = views[0].model.clone();
    for view in views {
        view.reopened(&origin);
        view.check_all();
    }
    server
}
