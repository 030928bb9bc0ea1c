//! The command line against what dmsetup printed: transcripts of it on Linux
//! (tests/*.txt) are gone through with a small device-mapper of tables without data.

mod kernel;

use clap::Parser;

use super::super::{Cli, Verb};
use super::*;
use crate::control::dm::{DeviceName, TextLine};
use kernel::Kernel;

/// What a command line came to: what it printed, and whether that was well.
struct Said {
    out: String,
    err: String,
    is_well: bool,
}

fn dm(kernel: &mut Kernel, words: &[&str]) -> Said {
    let words = ["nbdsnap", "dm"].iter().chain(words);
    let cli = Cli::try_parse_from(words).expect("a command line");
    let Verb::Dm(args) = cli.verb else {
        panic!("another verb");
    };
    let done = execute(args.split(cli.verbosity.verbose).0, kernel);
    Said {
        out: done.out,
        err: done.err,
        is_well: done.ended.is_ok(),
    }
}

/// The words of a shell's line: with quotes, without anything else.
fn shell_words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for letter in line.chars() {
        match quote {
            Some(mark) if mark == letter => quote = None,
            None if letter == '"' || letter == '\'' => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            None if letter == ' ' => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// The commands of a line, between semicolons that are not quoted.
fn commands(line: &str) -> Vec<String> {
    let mut commands = vec![String::new()];
    let mut quote = None;
    for letter in line.chars() {
        match quote {
            Some(mark) if mark == letter => quote = None,
            None if letter == '"' || letter == '\'' => quote = Some(letter),
            None if letter == ';' => {
                commands.push(String::new());
                continue;
            }
            _ => {}
        }
        commands.last_mut().expect("one").push(letter);
    }
    commands
}

/// Do what a line of a transcript says.
fn play(kernel: &mut Kernel, line: &str) -> (String, String) {
    let (mut out, mut err) = (String::new(), String::new());
    for command in commands(&line.replace("\\n", "\n").replace("\\t", "\t")) {
        let command = command.trim();
        let (said, command) = match command.split_once(" | dmsetup") {
            Some((said, _)) => (said, &command[said.len() + 3..]),
            None => ("", command),
        };
        let said = shell_words(said);
        kernel.input = match said.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["echo", text] => format!("{text}\n"),
            ["printf", text] => text.to_owned(),
            _ => String::new(),
        };
        let words = shell_words(command.trim_end_matches("</dev/null"));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(words[0], "dmsetup", "{command}");
        let said = dm(kernel, &words[1..]);
        assert_eq!(
            said.is_well,
            said.err.is_empty() || is_mild(&said.err),
            "{command}"
        );
        out.push_str(&said.out);
        err.push_str(&said.err);
    }
    (out, err)
}

/// Errors that dmsetup reports, and ends well: of 'remove --force', what comes before
/// the removal too.
fn is_mild(err: &str) -> bool {
    let mut lines = err.lines();
    err.starts_with("Unable to remove") || lines.all(|line| line.starts_with("device-mapper: "))
}

/// A line that says why: on Linux it is in the kernel's log.
fn is_reason(line: &str) -> bool {
    line.starts_with("device-mapper: ") && !line.contains(" ioctl on ")
}

/// Go through a transcript, and compare.
fn check(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/dm/tests");
    let path = folder.join(name).with_extension("txt");
    let transcript = std::fs::read_to_string(path).expect("a transcript");
    let mut kernel = Kernel::default();
    let mut differences = Vec::new();
    let entries: Vec<&str> = transcript.split("\n$ ").skip(1).collect();
    assert!(!entries.is_empty(), "an empty transcript");
    for entry in entries {
        differences.extend(compare(&mut kernel, entry));
        if entry.ends_with("--- from the beginning") {
            kernel = Kernel::default();
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Do what one entry of a transcript says; how it went otherwise than there.
fn compare(kernel: &mut Kernel, entry: &str) -> Option<String> {
    let (command, told) = entry.split_once('\n').unwrap_or((entry, ""));
    let of = |mark: &str| -> Vec<String> {
        let marked = told.lines().filter_map(|line| line.strip_prefix(mark));
        let text = marked.map(|line| line.strip_prefix(' ').unwrap_or(line));
        text.map(str::to_owned).collect()
    };
    let (out, err) = play(kernel, command);
    // Whoever recorded it went on without this one.
    if command.ends_with("dmsetup create bad") {
        kernel.devices.retain(|_, device| device.name != "bad");
    }
    let printed: Vec<String> = out.lines().map(str::to_owned).collect();
    // The transcripts leave the pages out that dmsetup adds.
    let said = err.lines().filter(|line| !line.starts_with("Usage: "));
    let said = said.map(str::to_owned);
    let (reasons, said): (Vec<_>, Vec<_>) = said.partition(|line| is_reason(line));
    let (wanted, regretted, logged) = (of("out|"), of("err|"), of("log|"));
    let is_logged = reasons.iter().all(|reason| logged.contains(reason));
    let is_so = printed == wanted && said == regretted && is_logged;
    (!is_so).then(|| {
        format!("$ {command}\nprinted {printed:#?}\ninstead of {wanted:#?}\nsaid {said:#?}\ninstead of {regretted:#?}\nfor {reasons:#?}")
    })
}

#[test]
fn create_is_as_dmsetup_has_it() {
    check("create");
}

#[test]
fn load_and_clear_are_as_dmsetup_has_them() {
    check("load");
}

#[test]
fn suspend_and_resume_are_as_dmsetup_has_them() {
    check("suspend");
}

#[test]
fn remove_is_as_dmsetup_has_it() {
    check("remove");
}

#[test]
fn rename_is_as_dmsetup_has_it() {
    check("rename");
}

#[test]
fn what_tells_is_as_dmsetup_has_it() {
    check("tell");
}

fn zero(kernel: &mut Kernel, names: &[&str]) {
    for name in names {
        let said = dm(kernel, &["create", name, "--table", "0 8 zero"]);
        assert!(said.is_well, "{}", said.err);
    }
}

#[test]
fn switches_stand_anywhere_and_the_last_one_counts() {
    let mut kernel = Kernel::default();
    let line = [
        "-y",
        "-r",
        "--noudevsync",
        "create",
        "--uuid",
        "A",
        "a",
        "-u",
        "B",
    ];
    let said = dm(&mut kernel, &[&line[..], &["--tab", "0 8 zero"]].concat());
    assert_eq!((said.out.as_str(), said.err.as_str()), ("", ""));
    let said = dm(
        &mut kernel,
        &["--noh", "info", "a", "-c", "-o", "uuid,attr"],
    );
    assert_eq!(said.out, "B:L--r\n");
}

#[test]
fn the_orders_of_create_are_create_load_and_resume_and_remove_if_that_fails() {
    let mut kernel = Kernel::default();
    dm(
        &mut kernel,
        &[
            "create", "a b", "-u", "U", "-j", "9", "-m", "7", "-r", "--table", "0 8 zero",
        ],
    );
    let device = DeviceName::Name("a b".into());
    let line = TextLine {
        start: 0,
        len: 8,
        target: "zero".into(),
        params: String::new(),
    };
    let create = DmOrder::Create {
        name: "a b".into(),
        uuid: Some("U".into()),
        minor: Some(7),
    };
    let load = DmOrder::Load {
        device: device.clone(),
        read_only: true,
        lines: vec![line],
    };
    let resume = DmOrder::Resume {
        device,
        noflush: false,
        nolockfs: false,
    };
    assert_eq!(kernel.orders, [create, load, resume]);
    kernel.orders.clear();
    let said = dm(
        &mut kernel,
        &["create", "b", "--table", "0 8 linear /dev/nosuch 0"],
    );
    assert_eq!(
        said.err,
        "device-mapper: table: 254:0: linear: Device lookup failed (-ENODEV)\n\
         device-mapper: reload ioctl on b (254:0) failed: No such device\n\
         Command failed.\n"
    );
    let remove = DmOrder::Remove {
        device: DeviceName::Name("b".into()),
        deferred: false,
    };
    assert_eq!(kernel.orders.last(), Some(&remove));
    assert_eq!(kernel.devices.len(), 1);
}

#[test]
fn devices_are_named_by_paths_and_numbers_too() {
    let mut kernel = Kernel::default();
    zero(&mut kernel, &["a", "q$x"]);
    kernel
        .nodes
        .insert("/dev/nbd3".into(), Located::Name("q\\x24x".into()));
    kernel.nodes.insert("/dev/vda".into(), Located::NotMapped);
    for (word, out, err) in [
        ("/dev/mapper/a", "a\n", ""),
        ("/dev/mapper/../mapper/./a", "a\n", ""),
        ("/dev/mapper/q\\x24x", "q$x\n", ""),
        ("q\\x24x", "q$x\n", ""),
        ("/dev/nbd3", "q$x\n", ""),
        ("/dev/vda", "", "Device vda not found\nCommand failed.\n"),
        (
            "/dev/mapper/b",
            "",
            "Device /dev/mapper/b not found\nCommand failed.\n",
        ),
        ("sub/b", "", "Device sub/b not found\nCommand failed.\n"),
    ] {
        let said = dm(
            &mut kernel,
            &["info", "-c", "--noheadings", "-o", "name", word],
        );
        assert_eq!((said.out.as_str(), said.err.as_str()), (out, err), "{word}");
    }
    kernel.orders.clear();
    dm(&mut kernel, &["table", "999:1"]);
    let number = DeviceName::Number {
        major: 999,
        minor: 1,
    };
    let table = DmOrder::Table {
        device: number,
        inactive: false,
    };
    assert_eq!(kernel.orders, [table]);
}

#[test]
fn tables_come_from_files_and_their_paths_from_the_root() {
    let mut kernel = Kernel::default();
    let table = "0 8 linear ./a\\ b/disk 5 # here\n\n# a line\n  8 8 error x\\#y # z\n";
    kernel.files.insert("table".into(), table.into());
    dm(&mut kernel, &["create", "a", "table"]);
    let Some(DmOrder::Load { lines, .. }) = kernel.orders.get(1) else {
        panic!("no table: {:?}", kernel.orders);
    };
    let params: Vec<&str> = lines.iter().map(|line| line.params.as_str()).collect();
    assert_eq!(params, [r"/here/./a\ b/disk 5", r"x\#y "]);
    let said = dm(&mut kernel, &["load", "a", "nowhere"]);
    assert_eq!(
        said.err,
        "Couldn't open 'nowhere' for reading.\nCommand failed.\n"
    );
}

#[test]
fn remove_all_goes_round_until_what_is_open_is_left() {
    let mut kernel = Kernel::default();
    zero(&mut kernel, &["a"]);
    for (name, below) in [("b", "a"), ("c", "b"), ("d", "a")] {
        let table = format!("0 8 linear /dev/mapper/{below} 0");
        dm(&mut kernel, &["create", name, "--table", &table]);
    }
    kernel.clients.insert("d".into());
    let said = dm(&mut kernel, &["remove_all"]);
    assert!(said.is_well && said.err.is_empty(), "{}", said.err);
    assert_eq!(dm(&mut kernel, &["ls"]).out, "a\t(254:0)\nd\t(254:3)\n");
    let said = dm(&mut kernel, &["remove_all", "--force"]);
    assert!(said.is_well, "{}", said.err);
    assert_eq!(said.err, "Unable to remove 1 device(s).\n");
    assert_eq!(dm(&mut kernel, &["table"]).out, "d: 0 8 error \n");
}

#[test]
fn wait_targets_version_and_message() {
    let mut kernel = Kernel::default();
    zero(&mut kernel, &["a"]);
    kernel.orders.clear();
    for words in [&["wait", "a"][..], &["wait", "a", "5x"]] {
        let said = dm(&mut kernel, words);
        assert_eq!((said.out.as_str(), said.err.as_str()), ("", ""));
    }
    let waited: Vec<u32> = kernel
        .orders
        .iter()
        .filter_map(|order| match order {
            DmOrder::Wait { event_nr, .. } => Some(*event_nr),
            _ => None,
        })
        .collect();
    assert_eq!(waited, [0, 5]);
    let said = dm(&mut kernel, &["wait"]);
    assert_eq!(said.err, "No device specified.\nCommand failed.\n");
    let said = dm(&mut kernel, &["targets"]);
    assert!(
        said.out
            .ends_with("linear           v1.4.0\nerror            v1.5.0\n")
    );
    let said = dm(&mut kernel, &["target-version", "snapshot", "nosuch"]);
    assert_eq!(said.out, "snapshot         v1.16.0\n");
    assert_eq!(
        said.err,
        "device-mapper: target-version ioctl on nosuch  failed: Invalid argument\nCommand failed.\n"
    );
    let said = dm(&mut kernel, &["version"]);
    assert!(
        said.out.ends_with("Driver version:    4.47.0\n"),
        "{}",
        said.out
    );
    let said = dm(&mut kernel, &["message", "a", "0"]);
    assert_eq!(
        said.err,
        "No message supplied.\n\
         device-mapper: ioctl: Target type does not support messages\n\
         device-mapper: message ioctl on a  failed: Invalid argument\nCommand failed.\n"
    );
    let said = dm(&mut kernel, &["message", "a"]);
    assert_eq!(
        said.err,
        "Incorrect number of arguments.\n\
         Usage: nbdsnap dm message [OPTIONS] [DEVICE] [SECTOR] [MESSAGE]\n"
    );
    let said = dm(&mut kernel, &["message", "a", "x", "y"]);
    assert_eq!(said.err, "Invalid sector.\nCommand failed.\n");
    let said = dm(&mut kernel, &["mangle"]);
    assert_eq!(said.out, "a: [no UUID]: name already in correct form\n");
    let said = dm(&mut kernel, &["mknodes", "nosuch"]);
    assert!(said.is_well && said.out.is_empty());
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_asked() {
    let mut kernel = Kernel::default();
    for (words, line) in [
        (
            &["create", "a", "-m", "3"][..],
            "Please specify both major number and minor number.",
        ),
        (
            &["create", "a", "-n", "--table", "0 8 zero"],
            "--table and --notable are incompatible.",
        ),
        (
            &["ls", "--manglename", "foo"],
            "Unknown name mangling mode.",
        ),
        (
            &["create", "a", "-n", "-M", "999"],
            "Invalid argument for --mode: 999.",
        ),
        (
            &["ls", "--exec", "echo"],
            "--exec is not offered: use the output of 'ls' in a loop.",
        ),
        (
            &["info", "-c", "-S", "name=a"],
            "--select is not offered: use --options and --sort.",
        ),
        (
            &["ls", "--tree", "-o", "bad"],
            "Tree options not recognised: bad.",
        ),
    ] {
        let said = dm(&mut kernel, words);
        assert_eq!(
            said.err,
            format!("{line}\nCouldn't process command line.\n")
        );
        assert!(!said.is_well);
    }
    let said = dm(&mut kernel, &["info", "-c", "-o", "nosuchfield"]);
    assert!(
        said.err
            .starts_with("Mapped Device Name Fields\n-------------------------\n")
    );
    assert!(
        said.err.ends_with(" \nUnrecognised field: nosuchfield\n"),
        "{}",
        said.err
    );
    assert_eq!(kernel.orders, []);
}

/// What dmsetup said of such lines (behind its own name): it ended with 1.
#[test]
fn senseless_lines_are_refused_in_dmsetups_words() {
    for (words, what) in [
        (&["ls", "--nosuch"][..], "unrecognized option '--nosuch'"),
        (&["--nosuch", "ls"], "unrecognized option '--nosuch'"),
        (&["nosuch", "--nosuch"], "Unknown command."),
        (&["ls", "-Z"], "invalid option -- 'Z'"),
        (&["ls", "-yZ"], "invalid option -- 'Z'"),
        (&["info", "-cx"], "invalid option -- 'x'"),
        (
            &["create", "x", "--table"],
            "option '--table' requires an argument",
        ),
        (
            &["info", "-c", "--separator"],
            "option '--separator' requires an argument",
        ),
        (
            &["info", "--force=1", "x"],
            "option '--force' doesn't allow an argument",
        ),
        (&["LS"], "Unknown command.\nUsage: nbdsnap dm COMMAND "),
        (&[], "Usage: nbdsnap dm COMMAND "),
        (
            &["info", "-m", "x"],
            "invalid value 'x' for '--minor <MINOR>'",
        ),
    ] {
        let line = ["nbdsnap", "dm"].iter().chain(words);
        let error = Cli::try_parse_from(line).expect_err("a senseless line");
        let said = usage::said(&error, "nbdsnap dm --help");
        let said = said.strip_prefix("nbdsnap dm: ").unwrap_or(&said);
        assert!(said.starts_with(what), "{words:?}: {said}");
        assert!(said.contains("(see 'nbdsnap dm --help')"), "{said}");
        let is_usage = said.contains("Usage: ");
        let ends = said.ends_with("\nCouldn't process command line.\n");
        assert!(is_usage != ends, "{words:?}: {said}");
    }
    let mut args = ["nbdsnap", "dm", "--version"].map(Into::into);
    usage::spell_out(&mut args);
    assert_eq!(args[2], "version");
}

#[test]
fn what_is_told_of_inactive_tables_is_as_dmsetup_has_it() {
    check("inactive");
}

#[test]
fn long_lines_of_a_tree_are_cut() {
    let mut kernel = Kernel::default();
    let names = ["x".repeat(72), "y".repeat(73), "z".repeat(74)];
    zero(&mut kernel, &names.each_ref().map(String::as_str));
    let said = dm(&mut kernel, &["ls", "--tree"]);
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines[0], format!("{} (254:0)", names[0]));
    let cut = |line: String| format!("{}...", &line[..79]);
    assert_eq!(lines[1], cut(format!("{} (254:1)", names[1])));
    assert_eq!(lines[2], cut(format!("{} (254:2)", names[2])));
    let said = dm(&mut kernel, &["ls", "--tree", "-o", "notrunc"]);
    assert!(said.out.ends_with(&format!("{} (254:2)\n", names[2])));
}
