//! Wrong orders get clear refusals and change nothing; wrong clients of the
//! control socket harm nobody.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nbdsnap_tests::harness::PATIENCE;
use nbdsnap_tests::harness::files::{Fingerprint, folder, random_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names, one_line, refused};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::{Serve, Server};

const MIB: usize = 1 << 20;

/// Two disks, one with a snapshot, and files that are none of the server's.
struct Scene {
    folder: tempfile::TempDir,
    serve: Serve,
    server: Server,
}

impl Scene {
    fn new(test: &str) -> Self {
        let folder = folder();
        let mut random = Random::new(seed(test));
        let mut serve = Serve::on_socket_in(folder.path());
        serve.control_in(folder.path());
        for disk in ["disk", "other"] {
            let path = folder.path().join(format!("{disk}.img"));
            random_file(&path, MIB, &mut random);
            serve.disk(disk, &path);
        }
        let foreign = folder.path().join("foreign");
        random_file(&foreign, MIB, &mut random);
        serve.snapshot("disk@old", &folder.path().join("old.cow"), "");
        Self {
            server: serve.start(),
            folder,
            serve,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A connection to the control socket that sends bytes as they are.
    fn stranger(&self) -> UnixStream {
        let stream = UnixStream::connect(self.server.control()).expect("the socket is there");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }
}

#[test]
fn wrong_orders_are_refused_and_change_nothing() {
    let scene = Scene::new("wrong_orders");
    let server = &scene.server;
    let transient = scene.path("transient.cow");
    let named = transient.to_str().unwrap();
    done(
        server,
        &[
            "snapshot",
            "create",
            "other@mem",
            "--transient",
            "--cow",
            named,
        ],
    );
    let before = Fingerprint::of(scene.folder.path());
    let snapshots = names(&done(server, &["snapshot", "list"]));
    let foreign = scene.path("foreign");
    let (disk, other) = (scene.path("disk.img"), scene.path("other.img"));
    let old = scene.path("old.cow");
    let [foreign, disk, other, old] = [&foreign, &disk, &other, &old].map(|p| p.to_str().unwrap());
    let cases: &[(&[&str], &str)] = &[
        (
            &["snapshot", "create", "none@a"],
            "no volume is named \"none\"",
        ),
        (
            &["snapshot", "create", "disk@old"],
            "a snapshot disk@old already",
        ),
        (&["snapshot", "create", "disk@a", "disk@a"], "named twice"),
        (
            &["snapshot", "create", "disk@a", "none@a"],
            "no volume is named \"none\"",
        ),
        (
            &["snapshot", "create", "disk@a", "other@a", "--cow", "x"],
            "one path",
        ),
        (
            &["snapshot", "create", "disk@a", "--cow", foreign],
            "holds something else",
        ),
        (
            &["snapshot", "create", "disk@a", "--cow", disk],
            "the origin of disk",
        ),
        (
            &["snapshot", "create", "disk@a", "--cow", old],
            "the COW store of disk@old",
        ),
        (
            &["snapshot", "create", "disk@a", "--cow", "/gone/x"],
            "does not exist",
        ),
        (
            &["snapshot", "create", "disk@a", "--cow", "/tmp"],
            "is a directory",
        ),
        (
            &["snapshot", "create", "disk@a", "--chunk", "3K"],
            "power of two",
        ),
        (
            &["snapshot", "create", "disk@a", "--size", "1s"],
            "has room for",
        ),
        (
            &["snapshot", "remove", "disk@none"],
            "no snapshot disk@none",
        ),
        (
            &["snapshot", "remove", "disk@old", "disk@none"],
            "no snapshot disk@none",
        ),
        (
            &["snapshot", "remove", "disk@old", "disk@old"],
            "named twice",
        ),
        (
            &["snapshot", "status", "none"],
            "no volume is named \"none\"",
        ),
        (
            &["snapshot", "status", "disk@none"],
            "no snapshot disk@none",
        ),
        (
            &["snapshot", "rename", "disk@none", "a"],
            "no snapshot disk@none",
        ),
        (
            &["snapshot", "rename", "disk@old", "old"],
            "disk@old already",
        ),
        (&["snapshot", "merge", "disk@none"], "no snapshot disk@none"),
        (&["snapshot", "merge", "other@mem"], "transient"),
        (
            &["snapshot", "cancel", "disk@old"],
            "no merge of disk@old waits",
        ),
        (&["volume", "add", disk], "a volume \"disk\" already"),
        (
            &["volume", "add", &format!("new={other}")],
            "the origin of other",
        ),
        (
            &["volume", "add", &format!("new={old}")],
            "the COW store of disk@old",
        ),
        (&["volume", "add", "new=/gone"], "no such file"),
        (&["volume", "remove", "none"], "no volume is named \"none\""),
        (&["disconnect", "77"], "no client has the id 77"),
    ];
    for (words, named) in cases {
        let line = refused(server, words);
        assert!(line.contains(named), "{words:?}: {line}");
        before.assert_unchanged(scene.folder.path(), &format!("{words:?}"));
        let now = names(&done(server, &["snapshot", "list"]));
        assert_eq!(now, snapshots, "{words:?}");
    }
    // What was refused can still be done.
    done(server, &["snapshot", "create", "disk@a", "other@a"]);
    scene.server.stop();
}

#[test]
fn words_that_make_no_sense_end_with_status_2() {
    let scene = Scene::new("no_sense");
    let cases: &[&[&str]] = &[
        &["snapshot", "create"],
        &["snapshot", "create", "disk"],
        &["snapshot", "create", "disk@"],
        &["snapshot", "create", "disk@a/b"],
        &["snapshot", "create", "disk@a@b@"],
        &["snapshot", "create", "disk@a\nb"],
        &["snapshot", "create", "disk@a", "--size", "20%disk"],
        &["snapshot", "create", "disk@a", "--size", "0%ORIGIN"],
        &["snapshot", "create", "disk@a", "--chunk", "big"],
        &["snapshot", "create", "disk@a", "--transient", "--overflow"],
        &["snapshot", "create", "disk@a", "--freeze", "true"],
        &["snapshot", "rename", "disk@old", "a@b"],
        &["snapshot", "merge", "disk@old", "--force", "--when-idle"],
        &["disconnect", "everybody"],
        &["volume", "add", "a/b@c"],
        &[
            "volume",
            "add",
            "new=disk.img",
            "--snapshot",
            "disk@x=x.cow",
        ],
        &["completions", "csh"],
    ];
    for words in cases {
        let line = one_line(&scene.server.order(*words), 2);
        assert!(line.contains("--help'"), "{words:?}: {line}");
    }
    scene.server.stop();
}

#[test]
fn names_that_cannot_be_are_refused_by_the_server_itself() {
    let scene = Scene::new("bad_names");
    let long = "x".repeat(256);
    for name in ["", "a/b", "a@b", "a=b", "a\\nb", "a\\u0000", &long] {
        let order = format!(
            r#"{{"version":1,"order":{{"snapshot-create":{{"snapshots":[{{"volume":"disk","snapshot":"{name}"}}]}}}}}}"#
        );
        let rename = format!(
            r#"{{"version":1,"order":{{"snapshot-rename":{{"snapshot":{{"volume":"disk","snapshot":"old"}},"name":"{name}"}}}}}}"#
        );
        let add = format!(
            r#"{{"version":1,"order":{{"volume-add":{{"name":"{name}","disk":"/tmp/x"}}}}}}"#
        );
        // Where it is two names, the second is one of a snapshot that is not there.
        let lines = match name {
            "a@b" => vec![rename, add],
            _ => vec![order, rename, add],
        };
        for line in lines {
            let mut stranger = scene.stranger();
            stranger.write_all(format!("{line}\n").as_bytes()).unwrap();
            let mut answer = String::new();
            BufReader::new(stranger).read_line(&mut answer).unwrap();
            assert!(
                answer.contains("refused") && answer.contains("the name"),
                "{answer}"
            );
        }
    }
    scene.server.stop();
}

#[test]
fn rubbish_is_answered_with_a_line_and_silence_with_nothing() {
    let scene = Scene::new("rubbish");
    let mode = std::fs::metadata(scene.server.control())
        .unwrap()
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let silent = scene.stranger();
    let too_long = vec![b'x'; nbdsnap::control::LINE_MAX + 1];
    for (rubbish, why) in [
        (&b"rubbish\n"[..], "not a line of the control protocol"),
        (b"\xff\xfe\x00\n", "not a line of the control protocol"),
        (b"\n", "not a line of the control protocol"),
        (b"[]\n", "not a line of the control protocol"),
        (b"{\"version\":2,\"order\":{}}\n", "version 2"),
        (
            b"{\"version\":1,\"order\":\"dance\"}\n",
            "not an order: unknown variant",
        ),
        (
            b"{\"version\":1,\"order\":{\"snapshot-list\":{\"x\":1}}}\n",
            "unknown field",
        ),
        (&too_long, "a line of more than"),
    ] {
        let mut stranger = scene.stranger();
        // The server may hang up on a line that is too long before all is sent.
        let _ = stranger.write_all(rubbish);
        let mut answer = String::new();
        let _ = stranger.read_to_string(&mut answer);
        let shown = String::from_utf8_lossy(&rubbish[..rubbish.len().min(60)]);
        assert_eq!(answer.lines().count(), 1, "{shown}: {answer}");
        assert!(
            answer.contains("refused") && answer.contains(why),
            "{shown}: {answer}"
        );
    }
    // Several orders may come on one connection, and the silent one still can.
    let mut silent = BufReader::new(silent);
    for _ in 0..3 {
        let order = b"{\"version\":1,\"order\":\"volume-list\"}\n";
        silent.get_mut().write_all(order).unwrap();
        let mut answer = String::new();
        silent.read_line(&mut answer).unwrap();
        assert!(
            answer.contains("done") && answer.contains("other"),
            "{answer}"
        );
    }
    scene.server.stop();
}

#[test]
fn a_thousand_strangers_keep_nobody_from_the_disk() {
    let scene = Scene::new("a_thousand");
    let mut client = attach(&scene.server, "disk");
    let before = contents(&scene.server, "disk");
    let mut strangers: Vec<UnixStream> = (0..1000).map(|_| scene.stranger()).collect();
    client.write(0, &[1; 4096], true).unwrap();
    assert_eq!(client.read(4096, 4096).unwrap(), before[4096..8192]);
    // Those beyond the bound are told so, and nobody else notices them.
    let mut told = 0;
    for stranger in &mut strangers {
        let mut byte = [0];
        stranger.set_nonblocking(true).unwrap();
        if stranger.read(&mut byte).is_ok_and(|read| read == 1) {
            told += 1;
        }
    }
    assert!(told <= 1000 - 64, "{told} of a thousand were sent away");
    let last = scene.stranger();
    let mut answer = String::new();
    BufReader::new(last).read_line(&mut answer).unwrap();
    assert!(answer.contains("clients give orders already"), "{answer}");
    let line = refused(&scene.server, &["snapshot", "list"]);
    assert!(line.contains("clients give orders already"), "{line}");
    drop(strangers);
    nbdsnap_tests::harness::process::wait_until("orders are taken again", || {
        scene.server.order(["snapshot", "list"]).code == Some(0)
    });
    scene.server.stop();
}

#[test]
fn a_control_socket_has_one_server() {
    let scene = Scene::new("one_server");
    let other = folder();
    let image = other.path().join("new.img");
    random_file(&image, MIB, &mut Random::new(1));
    let mut second = Serve::on_socket_in(other.path());
    second.disk("new", &image);
    second.arg("--control").arg(scene.server.control());
    let line = one_line(&second.run_to_end(), 1);
    assert!(
        line.contains("control.sock") && line.contains("in use"),
        "{line}"
    );
    assert_eq!(
        names(&done(&scene.server, &["volume", "list"])),
        ["disk", "other"]
    );
    let control = scene.server.control().to_owned();
    scene.server.kill();
    // The socket of a server that was killed is nobody's.
    let server = scene.serve.start();
    assert!(control.exists());
    assert_eq!(
        names(&done(&server, &["volume", "list"])),
        ["disk", "other"]
    );
    server.stop();
    assert!(!control.exists());
}

#[test]
fn a_read_only_server_takes_no_snapshot() {
    let folder = folder();
    let image = folder.path().join("disk.img");
    random_file(&image, MIB, &mut Random::new(seed("read_only")));
    let mut serve = Serve::on_socket_in(folder.path());
    serve
        .control_in(folder.path())
        .read_only()
        .disk("disk", &image);
    let server = serve.start();
    let before = Fingerprint::of(folder.path());
    let line = refused(&server, &["snapshot", "create", "disk@a"]);
    assert!(line.contains("--read-only"), "{line}");
    before.assert_unchanged(folder.path(), "a read-only server");
    server.stop();
}
