//! What would leave a snapshot without what it stands on is refused, by the names of
//! those that depend on it, by orders and at a start; and changes nothing.

use nbdsnap_tests::harness::files::{Fingerprint, folder, random_file};
use nbdsnap_tests::harness::live::{attach, contents, done, names, one_line, refused};
use nbdsnap_tests::harness::random::{Random, seed};
use nbdsnap_tests::harness::server::Serve;

use super::forest::store_of;

const BYTES: usize = 256 << 10;

#[test]
fn orders_that_would_break_the_tree_are_refused_by_name() {
    let folder = folder();
    let disk = folder.path().join("disk.img");
    random_file(&disk, BYTES, &mut Random::new(seed("trees_refusals")));
    let mut serve = Serve::on_socket_in(folder.path());
    serve.control_in(folder.path()).disk("disk", &disk);
    let server = serve.start();
    for export in ["disk@a", "disk@a@b", "disk@a@b@c", "disk@a@d", "disk@e"] {
        done(&server, &["snapshot", "create", export]);
    }
    let mem = folder.path().join("mem.cow");
    let mem = ["--transient", "--cow", mem.to_str().expect("UTF-8")];
    let create = ["snapshot", "create", "disk@e@mem"];
    done(&server, &[&create[..], &mem].concat());
    let before = Fingerprint::of(folder.path());
    let tree = names(&done(&server, &["snapshot", "list"]));
    let all = [
        "disk@a",
        "disk@a@b",
        "disk@a@b@c",
        "disk@a@d",
        "disk@e",
        "disk@e@mem",
    ];
    assert_eq!(tree, all, "each stands behind what it was taken of");
    let on_a = "depend on it: disk@a@b, disk@a@b@c, disk@a@d";
    let cases: &[(&[&str], &str)] = &[
        (&["snapshot", "remove", "disk@a"], on_a),
        (&["snapshot", "merge", "disk@a"], on_a),
        (&["snapshot", "merge", "disk@a", "--force"], on_a),
        (&["snapshot", "reset", "disk@a"], on_a),
        (
            &["snapshot", "remove", "disk@a@b"],
            "depend on it: disk@a@b@c",
        ),
        (
            &["snapshot", "remove", "disk@a", "disk@a@b", "disk@a@d"],
            "depend on it: disk@a@b@c",
        ),
        (
            &["snapshot", "create", "disk@none@x"],
            "no snapshot disk@none",
        ),
        (
            &["snapshot", "create", "disk@a@b"],
            "a snapshot disk@a@b already",
        ),
        // Neither is there before the other.
        (
            &["snapshot", "create", "disk@x", "disk@x@y"],
            "no snapshot disk@x",
        ),
        (
            &["snapshot", "create", "disk@e@mem@x"],
            "take it with --transient too",
        ),
        (
            &["snapshot", "rename", "disk@a@b", "d"],
            "a snapshot disk@a@d already",
        ),
        (&["snapshot", "merge", "disk@e@mem"], "is transient"),
        (&["snapshot", "status", "disk@a@x"], "no snapshot disk@a@x"),
    ];
    for (words, complaint) in cases {
        let line = refused(&server, words);
        assert!(line.contains(complaint), "{words:?}: {line}");
    }
    assert_eq!(names(&done(&server, &["snapshot", "list"])), all);
    before.assert_unchanged(folder.path(), "refused orders");
    // Clients of what would change are in the way of a merge, others are not.
    let (inner, outer) = (attach(&server, "disk@a"), attach(&server, "disk"));
    let line = refused(&server, &["snapshot", "merge", "disk@a@d"]);
    assert!(line.contains("disk@a has clients attached (1)"), "{line}");
    drop(inner);
    nbdsnap_tests::harness::process::wait_until("the client has gone", || {
        let clients = done(&server, &["clients"]);
        clients.as_array().is_some_and(|all| all.len() == 1)
    });
    done(&server, &["snapshot", "merge", "disk@a@d"]);
    drop(outer);
    server.stop();
}

/// Exports with the places of their stores, further words, and the complaint.
type Case<'a> = (&'a [(&'a str, usize)], &'a [&'a str], &'a str);

#[test]
fn stores_come_back_only_upon_what_they_were_taken_of() {
    let folder = folder();
    let at = folder.path();
    let disk = at.join("disk.img");
    let content = random_file(&disk, BYTES, &mut Random::new(seed("trees_starts")));
    let stores = ["disk@a", "disk@a@b", "disk@a@b@c"].map(|export| (export, store_of(at, export)));
    let serve = |named: &[(&str, usize)], words: &[&str]| {
        let mut serve = Serve::on_socket_in(at);
        serve.control_in(at).disk("disk", &disk);
        for &(export, store) in named {
            serve.snapshot(export, &stores[store].1, ",chunk=4K");
        }
        for word in words {
            serve.arg(*word);
        }
        serve
    };
    let whole = [("disk@a", 0), ("disk@a@b", 1), ("disk@a@b@c", 2)];
    // All of them are new, in whatever order.
    let server = serve(&[whole[2], whole[0], whole[1]], &[]).start();
    let mut models = vec![content.clone()];
    for (n, (export, _)) in stores.iter().enumerate() {
        let mut client = attach(&server, export);
        let data = vec![n as u8 + 1; 5000];
        client
            .write(40_000 * n as u64, &data, false)
            .expect("written");
        // What was taken of it at the start keeps what it had.
        let mut model = content.clone();
        model[40_000 * n..40_000 * n + 5000].copy_from_slice(&data);
        models.push(model);
    }
    let mut client = attach(&server, "disk");
    let data = vec![9; 50_000];
    client.write(100_000, &data, false).expect("written");
    models[0][100_000..150_000].fill(9);
    drop(client);
    server.kill();
    let before = Fingerprint::of(at);
    let [a, b, c] = [0, 1, 2].map(|n| stores[n].1.display().to_string());
    let cases: &[Case<'_>] = &[
        (&whole[..2], &[], "'a@b@c'"),
        (&whole[..1], &[], "'a@b@c'"),
        (&[], &[], "'a@b@c'"),
        (&whole[..1], &["--without", &b], "'a@b@c'"),
        (&[], &["--without", &a], "'a@b@c'"),
        (&[], &["--without", &a, "--without", &c], "'a@b'"),
        (&whole[1..], &[], "is one of disk@a, which is not served"),
        (
            &[whole[0], ("disk@b", 1), ("disk@b@c", 2)],
            &[],
            "of a snapshot of disk@a,",
        ),
        (
            &[whole[0], ("disk@a@b", 2), ("disk@a@c", 1)],
            &[],
            "and not of disk@a:",
        ),
    ];
    for (named, words, complaint) in cases {
        let line = one_line(&serve(named, words).run_to_end(), 1);
        assert!(line.contains(complaint), "{named:?} {words:?}: {line}");
    }
    // One whose own origin would be made anew.
    std::fs::rename(&stores[1].1, at.join("aside")).expect("renamed");
    let line = one_line(&serve(&whole, &[]).run_to_end(), 1);
    assert!(
        line.contains("disk@a@b") && line.contains("missing"),
        "{line}"
    );
    std::fs::rename(at.join("aside"), &stores[1].1).expect("renamed");
    before.assert_unchanged(at, "refused starts");
    // As they were, by other names.
    let other = [("disk@x", 0), ("disk@x@y", 1), ("disk@x@y@z", 2)];
    let server = serve(&other, &[]).start();
    for (export, model) in ["disk", "disk@x", "disk@x@y", "disk@x@y@z"]
        .iter()
        .zip(&models)
    {
        assert!(contents(&server, export) == *model, "{export}");
    }
    server.stop();
    // Given up from the top.
    let server = serve(&whole[..1], &["--without", &b, "--without", &c]).start();
    assert!(contents(&server, "disk@a") == models[1]);
    assert_eq!(names(&done(&server, &["snapshot", "list"])), ["disk@a"]);
    server.stop();
}
