//! What the live verbs print, word by word: their help pages, their tables, their
//! JSON, their refusals. Scripts and people rely on it, so a change of it is a
//! change of golden/cli, and is seen.
//!
//! `SNAPSHOTS=overwrite cargo test -p nbdsnap-tests --test live_words` takes what is
//! printed now for right; look at the difference before you commit it. Times, paths
//! and what else chance decides are put in brackets.

use std::path::{Path, PathBuf};
use std::process::Command;

use nbdsnap_tests::harness::files::{folder, sparse_file};
use nbdsnap_tests::harness::live::{attach, done, names};
use nbdsnap_tests::harness::process::{run, wait_until};
use nbdsnap_tests::harness::program::{program, workspace};
use nbdsnap_tests::harness::server::{Serve, Server};
use regex::Regex;
use snapbox::{Assert, Data, Redactions};

/// Verbs that are no orders to a running server: not looked at here.
const OTHERS: [&str; 4] = ["serve", "demo", "cow", "help"];

/// Compare with what is kept under this name.
fn expect(text: &str, name: &str, folder: Option<&Path>) {
    let mut hidden = Redactions::new();
    let mut hide = |what: &'static str, pattern: &str| {
        let pattern = Regex::new(pattern).expect("a pattern");
        hidden.insert(what, pattern).expect("a word in brackets");
    };
    hide("[TIME]", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC");
    hide("[TIME]", r#""(?:taken_at|at|since)": ?(?<redacted>\d+)"#);
    hide("[PROCESS]", r"process \d+");
    // The width of a column that says which process.
    hide("[WIDTH]", r"PEER(?<redacted> +)EXPORT");
    if let Some(folder) = folder {
        hide("[FOLDER]", &regex::escape(&folder.display().to_string()));
    }
    let path = kept().join(format!("{name}.txt"));
    let assert = Assert::new().action_env("SNAPSHOTS").redact_with(hidden);
    assert.eq(text.to_owned(), Data::read_from(&path, None));
}

fn kept() -> PathBuf {
    workspace().join("tests/golden/cli")
}

/// The verbs that a help page lists.
fn verbs(page: &str) -> Vec<String> {
    let lines = page.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = lines.take_while(|line| !line.is_empty());
    // A line that is indented further goes on with the one before it.
    let verbs = listed.filter(|line| !line.starts_with("   "));
    let verbs = verbs.filter_map(|line| line.split_whitespace().next());
    verbs.map(str::to_owned).collect()
}

fn help(words: &[String]) -> String {
    let mut command = Command::new(program());
    let command = command.args(words).arg("--help").env("COLUMNS", "100");
    let done = run(command).ok();
    assert_eq!(done.stderr, "", "help goes to standard output");
    done.text()
}

/// The page of a verb and of those under it; their names.
fn check_pages(words: &[String], seen: &mut Vec<String>) {
    let page = help(words);
    let name = format!("help-{}", words.join("-"));
    expect(&page, &name, None);
    seen.push(name);
    for verb in verbs(&page).into_iter().filter(|verb| verb != "help") {
        let words = [words, &[verb]].concat();
        check_pages(&words, seen);
    }
}

#[test]
fn the_help_pages_are_what_they_were() {
    let mut seen = Vec::new();
    for verb in verbs(&help(&[])) {
        if !OTHERS.contains(&verb.as_str()) {
            check_pages(&[verb], &mut seen);
        }
    }
    for verb in ["snapshot-create", "volume-add", "clients", "events"] {
        let name = format!("help-{verb}");
        assert!(seen.contains(&name), "no {name} among {seen:?}");
    }
    // A verb that is gone takes its page with it.
    for entry in std::fs::read_dir(kept()).expect("the folder of pages") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_string_lossy();
        if let Some(page) = name.strip_suffix(".txt").filter(|n| n.starts_with("help-")) {
            assert!(seen.iter().any(|one| one == page), "there is no {page}");
        }
    }
}

/// The words of a shell's line; those in single quotes are one.
fn words(line: &str) -> Vec<&str> {
    let pieces = line.split('\'').enumerate();
    let words = pieces.flat_map(|(place, piece)| {
        let quoted = (place % 2 == 1).then_some(piece);
        let plain = piece.split_whitespace().filter(move |_| place % 2 == 0);
        quoted.into_iter().chain(plain)
    });
    words.collect()
}

/// Orders and what came of them, as on a terminal.
struct Transcript<'a> {
    server: &'a Server,
    text: String,
}

impl Transcript<'_> {
    fn order(&mut self, line: &str) {
        let done = self.server.order(words(line));
        let (out, code) = (done.text(), done.code);
        let said = &mut self.text;
        said.extend(["$ nbdsnap ", line, "\n", &out, &done.stderr]);
        if code != Some(0) {
            let code = code.expect("an exit status").to_string();
            said.extend(["(status ", &code, ")\n"]);
        }
        said.push('\n');
    }

    fn orders(&mut self, lines: &[&str]) {
        for line in lines {
            self.order(line);
        }
    }
}

fn serve(folder: &Path) -> Server {
    let mut serve = Serve::on_socket_in(folder);
    serve.control_in(folder);
    for disk in ["vm", "data"] {
        let image = folder.join(format!("{disk}.img"));
        sparse_file(&image, 4 << 20);
        serve.disk(disk, &image);
    }
    serve.start()
}

fn snapshots(server: &Server) -> Vec<String> {
    names(&done(server, &["snapshot", "list"]))
}

#[test]
fn the_tables_and_the_json_are_what_they_were() {
    let folder = folder();
    let server = serve(folder.path());
    let text = String::new();
    let mut told = Transcript {
        server: &server,
        text,
    };
    told.orders(&[
        "snapshot list",
        "snapshot list --json",
        "snapshot create vm@one data@one --chunk 4K",
        "snapshot create vm@small --size 1M --overflow --on-full pause --json",
        "snapshot create vm@scratch --transient --read-only",
        "snapshot list",
        "snapshot status",
        "snapshot status vm@one --json",
        "volume list",
        "volume list --json",
        "clients --interval 0",
    ]);
    let mut client = attach(&server, "vm");
    client.write(0, &[1; 4096], false).expect("a write");
    told.orders(&[
        "clients --interval 0",
        "clients --interval 0 --json",
        "snapshot status vm",
        "disconnect 1",
    ]);
    drop(client);
    wait_until("the client is seen to go", || {
        let events = server.order(["events"]).ok().text();
        events.contains("client-went")
    });
    told.orders(&[
        "suspend vm",
        "volume list",
        "resume vm --json",
        "snapshot rename vm@one two",
        "snapshot extend vm@small --size 2M",
        "snapshot reset vm@two",
        "snapshot merge data@one",
        "snapshot remove vm@two --delete-cow",
        "snapshot remove vm@scratch --json",
        "volume remove data",
        "volume resize vm",
        "events",
        "events --json",
    ]);
    expect(&told.text, "orders", Some(folder.path()));
    server.stop();
}

#[test]
fn the_words_about_snapshots_of_snapshots_are_what_they_were() {
    let folder = folder();
    let server = serve(folder.path());
    let text = String::new();
    let mut told = Transcript {
        server: &server,
        text,
    };
    told.orders(&[
        "snapshot create vm@one vm@two",
        "snapshot create vm@one@try vm@two@try data@one",
        "snapshot create vm@one@try@again --json",
        "snapshot create vm@none@try",
        "snapshot create vm@two@try@",
        "snapshot create vm@two@mem --transient",
        "snapshot create vm@two@mem@try",
        "snapshot list",
        "volume list --json",
        "snapshot remove vm@one",
        "snapshot merge vm@one --force",
        "snapshot reset vm@one@try",
        "snapshot rename vm@one first",
        "snapshot list vm",
        "snapshot merge vm@first@try@again",
        "snapshot remove vm@first vm@first@try --delete-cow",
        "snapshot list",
        "events",
    ]);
    expect(&told.text, "trees", Some(folder.path()));
    server.stop();
}

#[test]
fn the_words_of_dm_are_what_they_were() {
    let folder = folder();
    let mut serve = Serve::on_socket_in(folder.path());
    let server = serve.control_in(folder.path()).start();
    for file in ["a", "cow"] {
        sparse_file(&folder.path().join(file), 4 << 20);
    }
    let text = String::new();
    let mut told = Transcript {
        server: &server,
        text,
    };
    let (a, cow) = (folder.path().join("a"), folder.path().join("cow"));
    let (a, cow) = (a.display(), cow.display());
    told.order(&format!("dm create low --table '0 4096 linear {a} 0'"));
    told.order(&format!(
        "dm create snap --uuid SNAP-1 --table '0 4096 snapshot /dev/mapper/low {cow} p 8'"
    ));
    told.order(&format!(
        "dm create bad --table '0 4096 snapshot {cow} {cow} p 8'"
    ));
    told.order("dm create bad --table '0 8 linear /nowhere 0'");
    told.order(&format!(
        "dm create bad --table '0 4096 snapshot-merge /dev/mapper/low {a} n 8'"
    ));
    told.orders(&[
        "dm create low --notable",
        "dm create a/b --notable",
        "dm create top --notable",
        "dm load top --table '0 4096 snapshot-origin /dev/mapper/low'",
        "dm load top --table '0 4096 nosuch'",
        "dm load nosuch --table '0 8 zero'",
        "dm load top --table '0 8'",
        "dm info top",
        "dm info top --inactive",
        "dm table top --inactive",
        "dm resume top",
        "dm resume nosuch",
        "dm suspend top",
        "dm suspend nosuch top",
        "dm info",
        "dm info nosuch",
        "dm info -c",
        "dm info -c -o name,nosuch",
        "dm resume top",
        "dm table",
        "dm table nosuch",
        "dm status",
        "dm status nosuch",
        "dm status --target snapshot",
        "dm ls",
        "dm ls --target snapshot",
        "dm ls -o nosuch",
        "dm deps",
        "dm deps nosuch",
        "dm rename snap past",
        "dm rename past top",
        "dm rename past",
        "dm rename nosuch x",
        "dm rename past --setuuid SNAP-2",
        "dm load past --table '0 8 zero'",
        "dm clear past",
        "dm clear nosuch",
        "dm wait past 7",
        "dm wait nosuch",
        "dm remove low",
        "dm remove nosuch",
        "dm remove past top",
        "dm wipe_table low",
        "dm wipe_table nosuch",
        "dm targets",
        "dm target-version snapshot nosuch",
        "dm version",
        "dm message low 0 hello",
        "dm mknodes",
        "dm mangle low",
        "dm remove_all",
        "dm ls",
        "dm nosuch",
        "dm ls --nosuch",
        "dm ls -Z",
        "dm info --force=1",
        "dm info -j 999 -m x",
        "dm info -j 999",
        "dm targets x",
    ]);
    expect(&told.text, "dm", Some(folder.path()));
    server.stop();
}

#[test]
fn the_refusals_are_what_they_were() {
    let folder = folder();
    let server = serve(folder.path());
    let text = String::new();
    let mut told = Transcript {
        server: &server,
        text,
    };
    done(&server, &["snapshot", "create", "vm@one"]);
    let kept = snapshots(&server);
    let in_use = folder.path().join("vm.img.one.cow");
    told.order(&format!(
        "snapshot create vm@two --cow {}",
        in_use.display()
    ));
    told.orders(&[
        "snapshot create vm@one",
        "snapshot create vm@two vm@two",
        "snapshot create other@one",
        "snapshot create vm",
        "snapshot create vm@a/b",
        "snapshot create vm@two data@two --cow here",
        "snapshot create vm@two --chunk 5K",
        "snapshot create vm@two --size 0%ORIGIN",
        "snapshot create vm@two --overflow --transient",
        "snapshot create vm@two --freeze true",
        "snapshot list other",
        "snapshot remove vm@two",
        "snapshot rename vm@one one",
        "snapshot extend vm@one --size 4K",
        "snapshot reset vm@two",
        "snapshot merge vm@two",
        "snapshot cancel vm@one",
        "volume add vm",
        "volume remove other",
        "volume resize other",
        "suspend other",
        "resume vm",
        "disconnect 99",
        "events --nonsense",
    ]);
    expect(&told.text, "refusals", Some(folder.path()));
    assert_eq!(snapshots(&server), kept, "a refusal has changed something");
    server.stop();
}
