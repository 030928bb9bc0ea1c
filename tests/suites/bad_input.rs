//! Bad input: refused with one line on stderr that names the path and the cause,
//! exit status 1 (2 for what makes no sense), and not a byte, name or size of any
//! file changed; also where everything but the last argument is good.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nbdsnap_tests::harness::files::{Fingerprint, folder, sparse_file};
use nbdsnap_tests::harness::process::{Finished, run_client};
use nbdsnap_tests::harness::server::Serve;
use nbdsnap_tests::harness::store::StoreBytes;
use nbdsnap_tests::harness::wire::Session;

const MIB: u64 = 1 << 20;

/// One thing that is wrong.
struct Case {
    /// What is wrong.
    what: &'static str,
    /// Files to make first.
    setup: fn(&Path),
    /// Further arguments of `nbdsnap serve`; `{}` stands for the folder.
    args: &'static [&'static str],
    /// The file that the message must name; `{}` as above.
    names: &'static str,
    /// Words of the cause, any case.
    causes: &'static [&'static str],
}

fn nothing(_: &Path) {}

fn disk(folder: &Path) {
    sparse_file(&folder.join("disk.img"), 4 * MIB);
}

fn disk_and_store(folder: &Path, store: &StoreBytes) {
    disk(folder);
    std::fs::write(folder.join("x.cow"), store.encode()).expect("a store");
}

fn with_exceptions(folder: &Path, exceptions: &[(u64, u64)]) {
    disk_and_store(
        folder,
        &StoreBytes {
            exceptions: exceptions.to_vec(),
            ..StoreBytes::default()
        },
    );
}

const DISK: &str = "{}/disk.img";
const X: &[&str] = &["{}/disk.img", "--snapshot", "disk@x={}/x.cow"];
const XCOW: &str = "{}/x.cow";

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    fn case(what: &'static str, setup: fn(&Path), args: &'static [&'static str], names: &'static str, causes: &'static [&'static str]) -> Case {
        Case { what, setup, args, names, causes }
    }
    vec![
        // The disk.
        case("no such disk", nothing, &[DISK], DISK, &["no such file"]),
        case("a directory", |f| std::fs::create_dir(f.join("disk.img")).expect("a folder"), &[DISK], DISK, &["is a directory"]),
        case("a size of 0", |f| sparse_file(&f.join("disk.img"), 0), &[DISK], DISK, &["size of 0"]),
        case("a size of 1000", |f| sparse_file(&f.join("disk.img"), 1000), &[DISK], DISK, &["1000", "multiple of 512"]),
        case("a size of 4 MiB and a byte", |f| sparse_file(&f.join("disk.img"), 4 * MIB + 1), &[DISK], DISK, &["4194305", "multiple of 512"]),
        case("a socket", |f| drop(UnixListener::bind(f.join("disk.img"))), &[DISK], DISK, &["is a socket"]),
        case("a part of the path is a file", disk, &["{}/disk.img/x.img"], "{}/disk.img/x.img", &["not a folder"]),
        case("a disk twice", disk, &["a={}/disk.img", "b={}/disk.img"], DISK, &["same file"]),
        case("a disk and a hard link to it", |f| { disk(f); std::fs::hard_link(f.join("disk.img"), f.join("link.img")).expect("a link"); }, &["a={}/disk.img", "b={}/link.img"], "{}/link.img", &["same file", "disk.img"]),
        // The COW store's path.
        case("the COW is the origin", disk, &[DISK, "--snapshot", "disk@x={}/disk.img"], DISK, &["same file"]),
        case("the COW is a link to the origin", |f| { disk(f); std::os::unix::fs::symlink("disk.img", f.join("x.cow")).expect("a link"); }, X, XCOW, &["same file", "disk.img"]),
        case("the COW is a hard link to the origin", |f| { disk(f); std::fs::hard_link(f.join("disk.img"), f.join("x.cow")).expect("a link"); }, X, XCOW, &["same file", "disk.img"]),
        case("a COW used twice", disk, &[DISK, "--snapshot", "disk@x={}/x.cow", "--snapshot", "disk@y={}/x.cow"], XCOW, &["same file"]),
        case("a COW used twice by another name", disk, &[DISK, "--snapshot", "disk@x={}/x.cow", "--snapshot", "disk@y={}/./x.cow"], XCOW, &["same file"]),
        case("a store used twice", |f| disk_and_store(f, &StoreBytes::default()), &[DISK, "--snapshot", "disk@x={}/x.cow", "--snapshot", "disk@y={}/x.cow"], XCOW, &["same file"]),
        case("the COW is a directory", |f| { disk(f); std::fs::create_dir(f.join("x.cow")).expect("a folder"); }, X, XCOW, &["is a directory"]),
        case("no folder for the COW", disk, &[DISK, "--snapshot", "disk@x={}/none/x.cow"], "{}/none/x.cow", &["does not exist"]),
        // The chunk size.
        case("a chunk of 3K", disk, &[DISK, "--snapshot", "disk@x={}/x.cow,chunk=3K"], XCOW, &["chunk", "power of two"]),
        case("a chunk of 5000", disk, &[DISK, "--snapshot", "disk@x={}/x.cow,chunk=5000"], XCOW, &["chunk", "multiple of 512"]),
        case("a chunk of 256", disk, &[DISK, "--snapshot", "disk@x={}/x.cow,chunk=256"], XCOW, &["chunk", "multiple of 512"]),
        case("a chunk of 2G", disk, &[DISK, "--snapshot", "disk@x={}/x.cow,chunk=2G"], XCOW, &["chunk", "too large", "larger than"]),
        case("no room for three chunks", disk, &[DISK, "--snapshot", "disk@x={}/x.cow,chunk=1M,size=2M"], XCOW, &["room for 2 chunks"]),
        // What lies at the path.
        case("a wrong magic", |f| disk_and_store(f, &StoreBytes { magic: 0x7041_6e54, ..StoreBytes::default() }), X, XCOW, &["something else", "format"]),
        case("a wrong version", |f| disk_and_store(f, &StoreBytes { version: 2, ..StoreBytes::default() }), X, XCOW, &["version 2"]),
        case("a version of 0", |f| disk_and_store(f, &StoreBytes { version: 0, ..StoreBytes::default() }), X, XCOW, &["version 0"]),
        case("a chunk size of 0", |f| disk_and_store(f, &StoreBytes { chunk_sectors: 0, ..StoreBytes::default() }), X, XCOW, &["chunk size of 0"]),
        case("a chunk size of 3 sectors", |f| disk_and_store(f, &StoreBytes { chunk_sectors: 3, ..StoreBytes::default() }), X, XCOW, &["chunk size of 3"]),
        case("a chunk size of 2 GiB", |f| disk_and_store(f, &StoreBytes { chunk_sectors: 1 << 22, ..StoreBytes::default() }), X, XCOW, &["chunk size of 4194304"]),
        case("another file system", |f| { disk(f); run_mkfs(f); }, X, XCOW, &["something else", "format"]),
        case("bytes at its end", |f| { disk(f); let mut b = vec![0; MIB as usize]; b[(MIB - 9) as usize] = 1; std::fs::write(f.join("x.cow"), b).expect("a file"); }, X, XCOW, &["something else", "format"]),
        case("a short text", |f| { disk(f); std::fs::write(f.join("x.cow"), "precious\n").expect("a file"); }, X, XCOW, &["something else", "format"]),
        case("a persistent store for a transient one", |f| disk_and_store(f, &StoreBytes::default()), &[DISK, "--snapshot", "disk@x={}/x.cow,transient"], XCOW, &["persistent store"]),
        // A store that cannot be.
        case("a store cut in its header", |f| { disk(f); std::fs::write(f.join("x.cow"), &StoreBytes::default().encode()[..512]).expect("a store"); }, X, XCOW, &["truncated"]),
        case("a store cut in its first area", |f| { disk(f); std::fs::write(f.join("x.cow"), &StoreBytes::default().encode()[..6000]).expect("a store"); }, X, XCOW, &["truncated"]),
        case("a store cut below its exceptions", |f| { disk(f); let s = StoreBytes { exceptions: vec![(0, 2), (1, 3), (2, 4)], ..StoreBytes::default() }; std::fs::write(f.join("x.cow"), &s.encode()[..4 * 4096]).expect("a store"); }, X, XCOW, &["exception", "truncated"]),
        case("an exception outside the store", |f| with_exceptions(f, &[(0, 2), (1, 64)]), X, XCOW, &["exception 1"]),
        case("an exception far outside the store", |f| with_exceptions(f, &[(0, u64::MAX)]), X, XCOW, &["exception 0"]),
        case("an exception outside the origin", |f| with_exceptions(f, &[(0, 2), (1024, 3)]), X, XCOW, &["exception 1"]),
        case("an exception far outside the origin", |f| with_exceptions(f, &[(u64::MAX, 2)]), X, XCOW, &["exception 0"]),
        case("two exceptions for one origin chunk", |f| with_exceptions(f, &[(7, 2), (8, 3), (7, 4)]), X, XCOW, &["exception 2"]),
        case("two exceptions at one store chunk", |f| with_exceptions(f, &[(7, 2), (8, 3), (9, 2)]), X, XCOW, &["exception 2"]),
        case("an exception in the header", |f| with_exceptions(f, &[(7, 2), (8, 1)]), X, XCOW, &["exception 1"]),
        case("an exception in an area", |f| with_exceptions(f, &[(7, 2), (8, 258)]), X, XCOW, &["exception 1"]),
        case("entries behind the end of the list", |f| with_exceptions(f, &[(7, 2), (0, 0), (9, 3)]), X, XCOW, &["past its end"]),
    ]
}

fn run_mkfs(folder: &Path) {
    sparse_file(&folder.join("x.cow"), MIB);
    let _ = run_client(folder, "mkfs.ext4", ["-q", "-F", "x.cow"]).ok();
}

fn filled(text: &str, folder: &Path) -> String {
    text.replace("{}", &folder.display().to_string())
}

/// One line on stderr, nothing on stdout, the status as expected; the line.
fn refusal(what: &str, done: &Finished, status: i32) -> String {
    assert_eq!(done.code, Some(status), "{what}: {done}");
    assert!(done.stdout.is_empty(), "{what}: {done}");
    let lines: Vec<&str> = done.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{what}: not one line: {done}");
    lines[0].to_owned()
}

fn check_named(what: &str, line: &str, path: &str, causes: &[&str]) {
    assert!(
        line.contains(path),
        "{what}: the message does not name {path}: {line}"
    );
    let small = line.to_lowercase();
    let named = causes
        .iter()
        .any(|cause| small.contains(&cause.to_lowercase()));
    assert!(
        named,
        "{what}: the message names none of {causes:?}: {line}"
    );
}

#[test]
fn each_is_refused_in_one_line_and_nothing_is_written() {
    for Case {
        what,
        setup,
        args,
        names,
        causes,
    } in cases()
    {
        let (folder, sockets) = (folder(), folder_for_sockets());
        setup(folder.path());
        let before = Fingerprint::of(folder.path());
        let mut serve = Serve::on_socket_in(sockets.path());
        for arg in args {
            serve.arg(filled(arg, folder.path()));
        }
        let line = refusal(what, &serve.run_to_end(), 1);
        check_named(what, &line, &filled(names, folder.path()), causes);
        println!("{what}: {line}");
        before.assert_unchanged(folder.path(), what);
        assert_empty(&sockets, what);
    }
}

/// The same, with good arguments before the bad ones: a store that would be
/// made, one that would be opened, and sockets.
#[test]
fn good_arguments_before_the_bad_one_do_nothing_either() {
    for Case {
        what,
        setup,
        args,
        names,
        causes,
    } in cases()
    {
        let (folder, sockets) = (folder(), folder_for_sockets());
        setup(folder.path());
        sparse_file(&folder.path().join("good.img"), 2 * MIB);
        let store = StoreBytes {
            exceptions: vec![(3, 2), (5, 3)],
            ..StoreBytes::default()
        };
        std::fs::write(folder.path().join("good.cow"), store.encode()).expect("a store");
        std::fs::write(folder.path().join("zeros.cow"), vec![0; 65536]).expect("a file of zeros");
        let before = Fingerprint::of(folder.path());
        let mut serve = Serve::on_socket_in(sockets.path());
        let good = [
            "good={}/good.img",
            "--snapshot=good@new={}/new.cow,chunk=4K",
            "--snapshot=good@old={}/good.cow",
            "--snapshot=good@zeros={}/zeros.cow,chunk=4K",
            "--snapshot=good@lost={}/lost.cow,transient",
        ];
        for arg in good.iter().chain(args) {
            serve.arg(filled(arg, folder.path()));
        }
        serve
            .arg("--control")
            .arg(sockets.path().join("control.sock"));
        let line = refusal(what, &serve.run_to_end(), 1);
        check_named(what, &line, &filled(names, folder.path()), causes);
        before.assert_unchanged(folder.path(), what);
        assert_empty(&sockets, what);
    }
}

/// Sockets have a folder of their own, which must be empty after a refusal.
fn folder_for_sockets() -> tempfile::TempDir {
    folder()
}

fn assert_empty(sockets: &tempfile::TempDir, what: &str) {
    let left: Vec<_> = std::fs::read_dir(sockets.path())
        .expect("the folder")
        .flatten()
        .collect();
    assert!(left.is_empty(), "{what}: sockets are left behind: {left:?}");
}

#[test]
fn arguments_that_make_no_sense_end_with_status_2() {
    let cases: [(&str, &[&str]); 15] = [
        ("an unknown option", &["{}/disk.img", "--wrong"]),
        (
            "a snapshot of no volume",
            &["{}/disk.img", "--snapshot", "other@x={}/x.cow"],
        ),
        (
            "a snapshot without a path",
            &["{}/disk.img", "--snapshot", "disk@x="],
        ),
        (
            "a snapshot without a name",
            &["{}/disk.img", "--snapshot", "disk={}/x.cow"],
        ),
        (
            "an unknown snapshot option",
            &["{}/disk.img", "--snapshot", "disk@x={}/x.cow,fast"],
        ),
        (
            "a chunk size that is no size",
            &["{}/disk.img", "--snapshot", "disk@x={}/x.cow,chunk=big"],
        ),
        (
            "a chunk size with a wrong unit",
            &["{}/disk.img", "--snapshot", "disk@x={}/x.cow,chunk=4X"],
        ),
        (
            "a size that overflows",
            &[
                "{}/disk.img",
                "--snapshot",
                "disk@x={}/x.cow,size=99999999999T",
            ],
        ),
        (
            "transient and overflow",
            &[
                "{}/disk.img",
                "--snapshot",
                "disk@x={}/x.cow,transient,overflow",
            ],
        ),
        (
            "two volumes of one name",
            &["disk={}/disk.img", "disk={}/other.img"],
        ),
        (
            "two snapshots of one name",
            &[
                "{}/disk.img",
                "--snapshot=disk@x={}/x.cow",
                "--snapshot=disk@x={}/y.cow",
            ],
        ),
        (
            "an address without a port",
            &["{}/disk.img", "--listen", "localhost"],
        ),
        (
            "a port that is none",
            &["{}/disk.img", "--listen", "127.0.0.1:99999"],
        ),
        (
            "a URI of another kind",
            &["{}/disk.img", "--listen", "http://127.0.0.1:1"],
        ),
        (
            "a name with a slash",
            &["{}/disk.img", "--snapshot", "disk@a/b={}/x.cow"],
        ),
    ];
    for (what, args) in cases {
        let folder = folder();
        disk(folder.path());
        sparse_file(&folder.path().join("other.img"), MIB);
        let before = Fingerprint::of(folder.path());
        let mut serve = Serve::default();
        for arg in args {
            serve.arg(filled(arg, folder.path()));
        }
        let line = refusal(what, &serve.run_to_end(), 2);
        println!("{what}: {line}");
        before.assert_unchanged(folder.path(), what);
    }
}

#[test]
fn a_disk_or_store_that_another_server_has_is_refused() {
    let (folder, sockets) = (folder(), folder());
    disk(folder.path());
    sparse_file(&folder.path().join("other.img"), 4 * MIB);
    let mut first = Serve::on_socket_in(sockets.path());
    first
        .disk("disk", &folder.path().join("disk.img"))
        .snapshot("disk@x", &folder.path().join("x.cow"), "");
    let server = first.start();
    std::fs::hard_link(folder.path().join("x.cow"), folder.path().join("link.cow"))
        .expect("a link");
    let before = Fingerprint::of(folder.path());
    let cases: [(&[&str], &str); 5] = [
        (
            &["{}/other.img", "--snapshot", "other@x={}/x.cow"],
            "{}/x.cow",
        ),
        (
            &["{}/other.img", "--snapshot", "other@x={}/link.cow"],
            "{}/link.cow",
        ),
        (
            &[
                "{}/other.img",
                "--snapshot",
                "other@new={}/new.cow",
                "--snapshot",
                "other@x={}/x.cow",
            ],
            "{}/x.cow",
        ),
        (&["{}/disk.img"], "{}/disk.img"),
        (&["--read-only", "{}/disk.img"], "{}/disk.img"),
    ];
    for (args, names) in cases {
        let elsewhere = folder_for_sockets();
        let mut serve = Serve::on_socket_in(elsewhere.path());
        for arg in args {
            serve.arg(filled(arg, folder.path()));
        }
        let line = refusal("locked", &serve.run_to_end(), 1);
        check_named(
            "locked",
            &line,
            &filled(names, folder.path()),
            &["already open", "locked"],
        );
        before.assert_unchanged(folder.path(), "locked");
        assert_empty(&elsewhere, "locked");
    }
    // The first one never noticed.
    let mut session = Session::open(&server.address(), "disk@x").expect("a connection");
    assert_eq!(session.read(0, 512).expect("a reply"), Ok(vec![0; 512]));
    server.stop();
    // Two that only read do not hurt each other.
    let again = first.clone().read_only().start();
    let elsewhere = folder_for_sockets();
    let mut second = Serve::on_socket_in(elsewhere.path());
    second
        .disk("disk", &folder.path().join("disk.img"))
        .snapshot("disk@x", &folder.path().join("x.cow"), "");
    let second = second.read_only().start();
    second.stop();
    again.stop();
}

#[test]
fn an_address_in_use_is_refused_and_left_alone() {
    let (folder, sockets) = (folder(), folder());
    disk(folder.path());
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let tcp = taken.local_addr().expect("an address").to_string();
    let path = sockets.path().join("taken.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let file = sockets.path().join("precious");
    std::fs::write(&file, "precious").expect("a file");
    let unix = format!("unix:{}", path.display());
    let wrong = format!("unix:{}", file.display());
    let cases = [
        (vec!["--listen", &tcp], tcp.as_str(), "in use"),
        (
            vec!["--listen", &unix],
            path.to_str().expect("a plain path"),
            "in use",
        ),
        (
            vec!["--listen", "127.0.0.1:0", "--listen", &tcp],
            tcp.as_str(),
            "in use",
        ),
        (
            vec![
                "--listen",
                "127.0.0.1:0",
                "--control",
                path.to_str().expect("a plain path"),
            ],
            path.to_str().expect("a plain path"),
            "in use",
        ),
        (
            vec!["--listen", &wrong],
            file.to_str().expect("a plain path"),
            "not a socket",
        ),
    ];
    let before = (
        Fingerprint::of(folder.path()),
        Fingerprint::of(sockets.path()),
    );
    for (args, names, cause) in cases {
        let mut serve = Serve::default();
        serve
            .disk("disk", &folder.path().join("disk.img"))
            .snapshot("disk@x", &folder.path().join("x.cow"), "");
        for arg in args {
            serve.arg(arg);
        }
        let line = refusal("an address in use", &serve.run_to_end(), 1);
        check_named("an address in use", &line, names, &[cause]);
        before
            .0
            .assert_unchanged(folder.path(), "an address in use");
        before
            .1
            .assert_unchanged(sockets.path(), "an address in use");
    }
    drop((taken, listener));
}

/// Refusing is not all: what is forced is done, and what is empty is made.
#[test]
fn format_makes_a_store_where_something_else_lay() {
    let folder = folder();
    disk(folder.path());
    run_mkfs(folder.path());
    let (image, cow) = (folder.path().join("disk.img"), folder.path().join("x.cow"));
    let mut serve = Serve::on_socket_in(folder.path());
    serve
        .disk("disk", &image)
        .snapshot("disk@x", &cow, ",format,chunk=4K");
    let server = serve.start();
    let mut origin = Session::open(&server.address(), "disk").expect("a connection");
    assert_eq!(
        origin.write(0, &[1; 8192]).expect("a reply"),
        Ok(Vec::new())
    );
    let mut snapshot = Session::open(&server.address(), "disk@x").expect("a connection");
    assert_eq!(snapshot.read(0, 8192).expect("a reply"), Ok(vec![0; 8192]));
    server.stop();
    // The same command line again opens the store and does not make a new one.
    let server = serve.start();
    let mut snapshot = Session::open(&server.address(), "disk@x").expect("a connection");
    assert_eq!(snapshot.read(0, 8192).expect("a reply"), Ok(vec![0; 8192]));
    server.stop();
}

#[test]
fn a_chunk_size_that_the_store_does_not_have_is_a_warning() {
    let folder = folder();
    disk_and_store(folder.path(), &StoreBytes::default());
    let mut serve = Serve::on_socket_in(folder.path());
    let (image, cow) = (folder.path().join("disk.img"), folder.path().join("x.cow"));
    serve
        .disk("disk", &image)
        .snapshot("disk@x", &cow, ",adopt,chunk=64K,size=1T");
    let server = serve.start();
    let session = Session::open(&server.address(), "disk@x").expect("a connection");
    assert_eq!(
        session.block_sizes,
        Some([1, 4096, 32 << 20]),
        "the header's chunk size counts"
    );
    drop(session);
    let stderr = server.stop();
    let warned = stderr
        .lines()
        .any(|line| line.contains("WARN") && line.contains("x.cow") && line.contains("4 KiB"));
    assert!(warned, "no warning that chunk=64K was not obeyed: {stderr}");
    let said = stderr
        .lines()
        .any(|line| line.contains("x.cow") && line.contains("size"));
    assert!(said, "size=1T was cut without a word: {stderr}");
}
