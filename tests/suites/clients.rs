//! Real clients against an origin and its snapshot, over a Unix socket and over
//! TCP: nbdinfo, nbdcopy, qemu-img, qemu-io, nbdsh and fio see what the
//! protocol promises them.

use std::path::{Path, PathBuf};

use nbdsnap_tests::harness::files::{assert_same, folder, random_file, sparse_file};
use nbdsnap_tests::harness::fio::Job;
use nbdsnap_tests::harness::process::{Finished, run_client};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const EXPORTS: [&str; 2] = ["vm", "vm@monday"];

/// A served disk with one snapshot of 64 KiB chunks, and the disk as it was.
struct Served {
    folder: tempfile::TempDir,
    before: PathBuf,
    server: Server,
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    Unix,
    Tcp,
}

const TRANSPORTS: [Transport; 2] = [Transport::Unix, Transport::Tcp];

impl Served {
    /// Serve a disk that `make` makes.
    fn new(transport: Transport, options: &str, make: impl FnOnce(&Path)) -> Self {
        let folder = folder();
        let (disk, before) = (
            folder.path().join("disk.img"),
            folder.path().join("before.img"),
        );
        make(&disk);
        std::fs::copy(&disk, &before).expect("the disk can be copied");
        let mut serve = match transport {
            Transport::Unix => Serve::on_socket_in(folder.path()),
            Transport::Tcp => Serve::on_free_port(),
        };
        let cow = folder.path().join("monday.cow");
        serve
            .disk("vm", &disk)
            .snapshot("vm@monday", &cow, &format!(",chunk=64K{options}"));
        let server = serve.start();
        Self {
            folder,
            before,
            server,
        }
    }

    /// Serve random bytes, without holes.
    fn random(transport: Transport) -> Self {
        let mut random = Random::new(seed("clients"));
        Self::new(transport, "", |disk| {
            drop(random_file(disk, SIZE as usize, &mut random));
        })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn run(&self, name: &str, args: &[&str]) -> Finished {
        run_client(self.path(), name, args)
    }

    fn info(&self, export: &str) -> Value {
        let all = self
            .run("nbdinfo", &["--json", &self.server.uri(export)])
            .ok()
            .json();
        all["exports"][0].clone()
    }

    /// The snapshot still is the disk as it was.
    fn check_snapshot(&self) {
        let copy = self.path().join("snapshot.img");
        let _ = self
            .run("nbdcopy", &[&self.server.uri("vm@monday"), "snapshot.img"])
            .ok();
        assert_same(&copy, &self.before);
        std::fs::remove_file(copy).expect("the copy can be removed");
    }
}

#[test]
fn nbdinfo_sees_all_that_is_offered() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        for export in EXPORTS {
            let info = served.info(export);
            assert_eq!(info["export-size"], SIZE, "{info:#}");
            for can in [
                "can_flush",
                "can_fua",
                "can_trim",
                "can_zero",
                "can_fast_zero",
                "can_df",
            ] {
                assert_eq!(info[can], true, "{can}: {info:#}");
            }
            for can in ["can_cache", "can_multi_conn"] {
                assert_eq!(info[can], true, "{can}: {info:#}");
            }
            assert_eq!(info["is_read_only"], false, "{info:#}");
            assert_eq!(
                info["contexts"],
                serde_json::json!(["base:allocation"]),
                "{info:#}"
            );
            assert_eq!(info["block_size_minimum"], 1, "{info:#}");
            assert_eq!(info["block_size_preferred"], 64 << 10, "{info:#}");
            assert_eq!(info["block_size_maximum"], 32 << 20, "{info:#}");
            let description = info["description"]
                .as_str()
                .unwrap_or_else(|| panic!("no description: {info:#}"));
            let kind = if export == "vm" {
                "origin"
            } else {
                "snapshot of vm"
            };
            assert!(
                description.contains(kind),
                "the description of {export} does not say '{kind}': {description}"
            );
        }
        served.server.stop();
    }
}

#[test]
fn the_printed_uris_lead_to_the_exports() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        let uris = served.server.printed_uris();
        assert_eq!(uris.len(), EXPORTS.len(), "{uris:?}");
        for uri in &uris {
            let size = served.run("nbdinfo", &["--size", uri]).ok().text();
            assert_eq!(size.trim(), SIZE.to_string(), "{uri}");
        }
        served.server.stop();
    }
}

#[test]
fn nbdinfo_lists_every_export_once() {
    let served = Served::random(Transport::Unix);
    let list = served
        .run("nbdinfo", &["--list", "--json", &served.server.uri("")])
        .ok()
        .json();
    let exports = list["exports"].as_array().expect("exports").clone();
    for name in EXPORTS {
        let times = exports
            .iter()
            .filter(|export| export["export-name"] == name)
            .count();
        assert_eq!(times, 1, "{name}: {list:#}");
    }
    served.server.stop();
}

#[test]
fn a_lone_origin_is_the_default_export_and_two_have_none() {
    let served = Served::random(Transport::Unix);
    let info = served.info("");
    assert_eq!(info["export-size"], SIZE);
    served.server.stop();

    let folder = folder();
    let mut serve = Serve::on_socket_in(folder.path());
    for name in ["a", "b"] {
        let disk = folder.path().join(name);
        sparse_file(&disk, MIB);
        serve.disk(name, &disk);
    }
    let server = serve.start();
    let _ = run_client(folder.path(), "nbdinfo", [server.uri("")]).failed();
    let _ = run_client(folder.path(), "nbdinfo", [server.uri("b")]).ok();
    let _ = run_client(folder.path(), "nbdinfo", [server.uri("c")]).failed();
    server.stop();
}

/// The ranges of `nbdinfo --map`: they must follow on one another and cover the
/// export; as offset, length and type.
fn map(served: &Served, export: &str) -> Vec<(u64, u64, u64)> {
    let json = served
        .run("nbdinfo", &["--map", "--json", &served.server.uri(export)])
        .ok()
        .json();
    let number = |entry: &Value, key: &str| {
        entry[key]
            .as_u64()
            .unwrap_or_else(|| panic!("no {key}: {entry}"))
    };
    let entries = json.as_array().expect("a list").iter();
    let ranges: Vec<_> = entries
        .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type")))
        .collect();
    let mut end = 0;
    for (offset, length, _) in &ranges {
        assert_eq!(
            *offset, end,
            "a gap or overlap in the map of {export}: {ranges:?}"
        );
        end += length;
    }
    assert_eq!(
        end, SIZE,
        "the map of {export} does not end at its end: {ranges:?}"
    );
    ranges
}

/// Bytes in ranges of a type.
fn total(ranges: &[(u64, u64, u64)], kind: u64) -> u64 {
    ranges
        .iter()
        .filter(|range| range.2 == kind)
        .map(|range| range.1)
        .sum()
}

#[test]
fn maps_show_the_holes_of_the_origin_and_of_the_snapshot() {
    const DATA: u64 = 0;
    const HOLE_ZERO: u64 = 3;
    for transport in TRANSPORTS {
        let served = Served::new(transport, "", |disk| {
            sparse_file(disk, SIZE);
            let file = std::fs::File::options()
                .write(true)
                .open(disk)
                .expect("the disk");
            std::os::unix::fs::FileExt::write_all_at(&file, &vec![0x5a; MIB as usize], 4 * MIB)
                .expect("data");
        });
        for export in EXPORTS {
            let ranges = map(&served, export);
            assert_eq!(total(&ranges, DATA), MIB, "{export}: {ranges:?}");
            assert_eq!(
                total(&ranges, HOLE_ZERO),
                SIZE - MIB,
                "{export}: {ranges:?}"
            );
        }
        let uri = served.server.uri("vm");
        let _ = served
            .run(
                "qemu-io",
                &["-f", "raw", "-c", "write -P 7 8M 1M", "-c", "flush", &uri],
            )
            .ok();
        let ranges = map(&served, "vm");
        assert_eq!(total(&ranges, DATA), 2 * MIB, "{ranges:?}");
        // What the snapshot copied may show as data; what it did not must still
        // be a hole, and the data must still be there.
        let ranges = map(&served, "vm@monday");
        let data = total(&ranges, DATA);
        assert!((MIB..=2 * MIB).contains(&data), "{ranges:?}");
        for export in EXPORTS {
            let json = served
                .run(
                    "qemu-img",
                    &["map", "--output=json", &served.server.uri(export)],
                )
                .ok()
                .json();
            let entries = json.as_array().expect("a list").clone();
            let sum: u64 = entries
                .iter()
                .filter_map(|entry| entry["length"].as_u64())
                .sum();
            assert_eq!(sum, SIZE, "{json:#}");
            let at = |offset: u64| {
                entries
                    .iter()
                    .find(|entry| {
                        let start = entry["start"].as_u64().unwrap_or(u64::MAX);
                        start <= offset && offset < start + entry["length"].as_u64().unwrap_or(0)
                    })
                    .unwrap_or_else(|| panic!("{offset} is nowhere: {json:#}"))
            };
            assert_eq!(at(4 * MIB)["data"], true, "{export}: {json:#}");
            assert_eq!(at(14 * MIB)["zero"], true, "{export}: {json:#}");
        }
        served.check_snapshot();
        served.server.stop();
    }
}

#[test]
fn qemu_img_compares_both_views() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        let before = served.before.to_str().expect("a plain path");
        let compare = |export: &str| {
            let uri = served.server.uri(export);
            served.run(
                "qemu-img",
                &["compare", "-f", "raw", "-F", "raw", before, &uri],
            )
        };
        for export in EXPORTS {
            let _ = compare(export).ok();
        }
        let uri = served.server.uri("vm");
        let _ = served
            .run(
                "qemu-io",
                &["-f", "raw", "-c", "write -P 9 12345 70001", &uri],
            )
            .ok();
        assert_eq!(compare("vm").code, Some(1), "the origin has changed");
        let _ = compare("vm@monday").ok();
        served.server.stop();
    }
}

#[test]
fn qemu_io_writes_reads_zeroes_discards_and_flushes_both_views() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        let origin = served.server.uri("vm");
        let script = |uri: &str, base: u64| {
            let mut args = vec!["-f".to_owned(), "raw".to_owned()];
            let commands = [
                format!("write -P 0x11 {base} 64k"),
                format!("read -P 0x11 {base} 64k"),
                format!("write -P 0x22 {} 513", base + 100),
                format!("read -P 0x11 {base} 100"),
                format!("read -P 0x22 {} 513", base + 100),
                format!("read -P 0x11 {} 64923", base + 613),
                format!("write -f -P 0x33 {} 4k", base + 65536),
                format!("read -P 0x33 {} 4k", base + 65536),
                format!("write -z {} 200001", base + 7),
                format!("read -P 0 {} 200001", base + 7),
                format!("read -P 0x11 {base} 7"),
                format!("write -z -u {} 128k", base + 524_288),
                format!("read -P 0 {} 128k", base + 524_288),
                format!("discard {base} 256k"),
                "flush".to_owned(),
                format!("write -P 0x44 {base} 256k"),
                format!("read -P 0x44 {base} 256k"),
                "write -P 0x55 16777215 1".to_owned(),
                "read -P 0x55 16777215 1".to_owned(),
            ];
            for command in commands {
                args.extend(["-c".to_owned(), command]);
            }
            args.push(uri.to_owned());
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let done = served.run("qemu-io", &args).ok();
            assert!(!done.text().contains("failed"), "{done}");
        };
        script(&origin, MIB);
        script(&origin, 3 * MIB + 333);
        served.check_snapshot();
        // The same on the snapshot leaves the origin alone.
        let kept = served.path().join("origin.img");
        let _ = served.run("nbdcopy", &[&origin, "origin.img"]).ok();
        let snapshot = served.server.uri("vm@monday");
        script(&snapshot, MIB);
        script(&snapshot, 5 * MIB + 777);
        let after = served.path().join("after.img");
        let _ = served.run("nbdcopy", &[&origin, "after.img"]).ok();
        assert_same(&kept, &after);
        served.server.stop();
    }
}

/// What nbdsh is to find; `SIZE` and `WRITABLE` are set before it runs. Every
/// failed expectation is an exception, and so an exit status that is not 0.
const NBDSH: &str = r#"
import errno
h.set_strict_mode(0)

def error(call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        return e.errnum
    return 0

def expect(what, found, *wanted):
    assert found in wanted, "%s: %r, expected %r" % (what, found, wanted)

# FUA: the effect is there, and every command takes the flag.
h.pwrite(b"f" * 1000, 777, nbd.CMD_FLAG_FUA)
expect("fua write", bytes(h.pread(1002, 776))[1:1001], b"f" * 1000)
h.zero(4096, 8192, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
expect("fua zero", bytes(h.pread(4096, 8192)), bytes(4096))
h.trim(4096, 65536, nbd.CMD_FLAG_FUA)
h.flush()
h.cache(1 << 20, 0)

# FAST_ZERO: done, or refused with ENOTSUP and nothing changed.
h.pwrite(b"z" * 65536, 1 << 20)
fast = error(h.zero, 65536, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
expect("fast zero", fast, 0, errno.ENOTSUP)
expect("after fast zero", bytes(h.pread(65536, 1 << 20)), (b"z" if fast else b"\0") * 65536)

# DF: one chunk, whatever lies in the range.
for offset, length in ((0, 65536), (3, 32), ((1 << 20) - 5, 1 << 20), (777, 65537)):
    pieces = []
    def piece(data, at, status, err):
        pieces.append((at, len(data)))
    data = bytes(h.pread_structured(length, offset, piece, nbd.CMD_FLAG_DF))
    expect("chunks with DF", pieces, [(offset, length)])
    expect("the same without DF", bytes(h.pread(length, offset)), data)
    pieces.clear()
    expect("the same in any chunks", bytes(h.pread_structured(length, offset, piece)), data)
    expect("all of it", sum(length for _, length in pieces), length)

# Unaligned requests, down to single bytes.
for offset, length in ((1, 1), (511, 2), (513, 4095), (65535, 2), (131071, 65538), (SIZE - 1, 1), (SIZE - 513, 513)):
    data = bytes((offset + i) % 251 for i in range(length))
    around = bytes(h.pread(1, offset - 1))
    h.pwrite(data, offset)
    expect("unaligned write", bytes(h.pread(length, offset)), data)
    expect("its neighbour", bytes(h.pread(1, offset - 1)), around)
    h.zero(length, offset)
    expect("unaligned zero", bytes(h.pread(length, offset)), bytes(length))
    expect("its neighbour", bytes(h.pread(1, offset - 1)), around)
    h.trim(length, offset)

# Zero lengths change nothing, whatever they are answered.
before = bytes(h.pread(65536, 0))
for call in (lambda: h.pread(0, 0), lambda: h.pwrite(b"", 0), lambda: h.zero(0, 0), lambda: h.trim(0, 0), lambda: h.cache(0, 0)):
    expect("zero length", error(call), 0, errno.EINVAL)
expect("after zero lengths", bytes(h.pread(65536, 0)), before)

# Past the end: ENOSPC for what would write there, EINVAL for anything else.
tail = bytes(h.pread(512, SIZE - 512))
for at in (SIZE - 511, SIZE, SIZE + 4096, 1 << 40, (1 << 63) - 1, (1 << 63), (1 << 64) - 512, (1 << 64) - 1):
    expect("read at %d" % at, error(h.pread, 512, at), errno.EINVAL)
    expect("write at %d" % at, error(h.pwrite, b"x" * 512, at), errno.ENOSPC)
    expect("zero at %d" % at, error(h.zero, 512, at), errno.ENOSPC)
    expect("trim at %d" % at, error(h.trim, 512, at), errno.EINVAL)
    expect("cache at %d" % at, error(h.cache, 512, at), errno.EINVAL)
    expect("status at %d" % at, error(h.block_status, 512, at, lambda *a: 0), errno.EINVAL)
expect("the tail", bytes(h.pread(512, SIZE - 512)), tail)

# Many at once, out of order or not: each comes back with its own data.
block = 1 << 14
expected = [bytes([n % 256]) * block for n in range(64)]
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), n * block) for n, data in enumerate(expected)]
for c in cookies:
    while not h.aio_command_completed(c):
        h.poll(-1)
for n, data in enumerate(expected):
    expect("parallel write", bytes(h.pread(block, n * block)), data)
"#;

#[test]
fn nbdsh_finds_flags_edges_and_errors_as_the_protocol_says() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        // The snapshot last: its own writes change it.
        for export in EXPORTS {
            if export == "vm@monday" {
                served.check_snapshot();
            }
            let script = format!("SIZE = {SIZE}\n{NBDSH}");
            let _ = served
                .run(
                    "nbdsh",
                    &[
                        "--base-allocation",
                        "-u",
                        &served.server.uri(export),
                        "-c",
                        &script,
                    ],
                )
                .ok();
        }
        served.server.stop();
    }
}

#[test]
fn a_read_only_snapshot_says_so_and_refuses_to_be_written() {
    let served = {
        let mut random = Random::new(seed("clients"));
        Served::new(Transport::Unix, ",ro", |disk| {
            drop(random_file(disk, SIZE as usize, &mut random));
        })
    };
    assert_eq!(served.info("vm@monday")["is_read_only"], true);
    assert_eq!(served.info("vm")["is_read_only"], false);
    let script = r#"
h.set_strict_mode(0)
for call in (lambda: h.pwrite(b"x" * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        call()
        assert False, "a write to a read-only export succeeded"
    except nbd.Error as e:
        assert e.errnum == 1, e
h.flush()
"#;
    let _ = served
        .run(
            "nbdsh",
            &["-u", &served.server.uri("vm@monday"), "-c", script],
        )
        .ok();
    let _ = served
        .run(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "write -P 1 0 4M",
                &served.server.uri("vm"),
            ],
        )
        .ok();
    served.check_snapshot();
    served.server.stop();
}

#[test]
fn fio_verifies_small_and_odd_blocks_on_both_views() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        for export in EXPORTS {
            let uri = served.server.uri(export);
            let mut sectors = Job::new(&uri, MIB, 2 * MIB);
            sectors.block = "512";
            assert_eq!(
                sectors.write_and_verify(served.path()),
                (2 * MIB, 2 * MIB),
                "{export}"
            );
            let mut odd = Job::new(&uri, 4 * MIB, 4 * MIB);
            odd.block = "";
            odd.more = ["--bsrange=512-70000", "--bs_unaligned"]
                .map(str::to_owned)
                .to_vec();
            let (written, read) = odd.write_and_verify(served.path());
            assert!(
                written > 3 * MIB,
                "{export}: fio wrote {written} bytes only"
            );
            assert_eq!(written, read, "{export}: fio verified less than it wrote");
            if export == "vm" {
                served.check_snapshot();
            }
        }
        served.server.stop();
    }
}

#[test]
fn nbdcopy_fills_an_origin_under_its_snapshot() {
    for transport in TRANSPORTS {
        let served = Served::random(transport);
        let fresh = served.path().join("fresh.img");
        random_file(&fresh, SIZE as usize, &mut Random::new(seed("nbdcopy")));
        let uri = served.server.uri("vm");
        let _ = served.run("nbdcopy", &["--flush", "fresh.img", &uri]).ok();
        let _ = served.run("nbdcopy", &[&uri, "back.img"]).ok();
        assert_same(&fresh, &served.path().join("back.img"));
        served.check_snapshot();
        served.server.stop();
    }
}
