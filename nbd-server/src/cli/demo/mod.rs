//! `nbdsnap demo`: what the README promises, shown step by step on a small disk
//! in a temporary folder. It needs no other program and no privilege.
//!
//! [`tell`] is the story. The disks' true contents are kept beside it, and every
//! sentence that begins with "ok" was checked against them; the first that does
//! not hold ends the program with status 1 and its name. `accounts` is what the
//! disk holds, `stage` the server and its client, `page` the printing.

mod accounts;
mod page;
mod stage;

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::time::Instant;

use clap::Args;
use nbdsnap_engine::Status;
use nbdsnap_format::{ChunkSize, Layout};

use super::Failure;
use crate::server;
use page::{Page, grouped};
use stage::Stage;

/// See it work: a live disk, its frozen past, and a copy to play with.
///
/// Makes a small disk in a temporary folder, serves it with snapshots on a Unix
/// socket, and shows with its own NBD client that the disk can be written while a
/// snapshot stays as it was, how a snapshot's store grows, what a writable snapshot
/// is good for, and that a restart loses nothing. Needs no other program and no
/// root, takes about a second, and leaves nothing behind.
///
/// Every line that begins with "ok" is a claim that has just been checked.
#[derive(Debug, Args)]
#[command(after_long_help = MORE)]
pub(super) struct DemoArgs {
    /// Serve on until Ctrl-C, and print commands to try.
    ///
    /// The folder is removed when the server has stopped.
    #[arg(long)]
    keep: bool,
}

const MORE: &str = "\
The folder is made where TMPDIR says, or in /tmp. Colour is used on a terminal
unless NO_COLOR is set; -v shows what the server logs.

Exit status:
  0  every claim holds
  1  one does not (it is named), or the server could not do its work
  2  an argument that makes no sense
";

/// The chunk size of the snapshots.
const CHUNK: &str = "4K";
const MONDAY: &str = "disk@monday";
const WHAT_IF: &str = "disk@what-if";

/// The verb.
pub(super) fn run(args: &DemoArgs) -> Result<(), Failure> {
    let began = Instant::now();
    let folder = tempfile::Builder::new()
        .prefix("nbdsnap-demo-")
        .tempdir()
        .map_err(|error| {
            Failure::Refused(format!(
                "demo: making a temporary folder, where TMPDIR says: {error}"
            ))
        })?;
    let mut out = std::io::stdout();
    let colour =
        out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let mut page = Page::new(&mut out, colour);
    page.headline("nbdsnap demo: a live disk, its frozen past, and a copy to play with")?;
    let path = folder.path().display();
    page.line(format!(
        "Everything happens in {path}, which is removed at the end."
    ))?;
    let mut stage = Stage::new(folder.path());
    tell(&mut stage, &mut page)?;
    let seconds = began.elapsed().as_secs_f32();
    page.line("")?;
    let claims = page.claims();
    page.headline(&format!(
        "{claims} claims checked, all of them hold ({seconds:.1} s)."
    ))?;
    if args.keep {
        keep(&stage, &mut page)?;
    } else {
        page.line(
            "Next: 'nbdsnap demo --keep' to try it yourself, 'nbdsnap serve --help' to use it.",
        )?;
    }
    folder
        .close()
        .map_err(|error| Failure::Refused(format!("demo: removing its folder: {error}")))
}

/// What every view should show, and which chunks each store should have kept.
struct Truth {
    disk: Vec<u8>,
    monday: Vec<u8>,
    what_if: Vec<u8>,
    kept_for_monday: BTreeSet<u64>,
    kept_for_what_if: BTreeSet<u64>,
}

/// The story.
fn tell(stage: &mut Stage, page: &mut Page) -> Result<(), Failure> {
    let image = accounts::image();
    let mut truth = Truth {
        disk: image.clone(),
        monday: image,
        what_if: Vec::new(),
        kept_for_monday: BTreeSet::new(),
        kept_for_what_if: BTreeSet::new(),
    };
    a_disk(stage, page, &truth)?;
    a_snapshot(stage, page, &truth)?;
    the_disk_changes(stage, page, &mut truth)?;
    a_fork(stage, page, &mut truth)?;
    a_restart(stage, page, &truth)
}

fn a_disk(stage: &Stage, page: &mut Page, truth: &Truth) -> Result<(), Failure> {
    page.step("A disk: disk.img, the accounts of a small bank")?;
    stage.make_disk(&truth.disk)?;
    let bytes = super::size::show(truth.disk.len() as u64);
    let (count, each) = (grouped(accounts::ACCOUNTS), accounts::RECORD);
    page.text(format!("{bytes}: {count} accounts of {each} bytes each"))?;
    page.columns()?;
    page.row("disk.img", &truth.disk)
}

fn a_snapshot(stage: &mut Stage, page: &mut Page, truth: &Truth) -> Result<(), Failure> {
    page.step("Serve it over NBD, with a snapshot of this moment: monday")?;
    stage.add_snapshot("disk@monday=monday.cow,chunk=4K");
    show_command(stage, page)?;
    stage.start()?;
    let disk = stage.read("disk")?;
    let monday = stage.read(MONDAY)?;
    page.columns()?;
    page.row("disk", &disk)?;
    page.row(MONDAY, &monday)?;
    page.claim_same("the export disk is the image", &disk, &truth.disk)?;
    page.claim_same("the export disk@monday is the same", &monday, &truth.monday)?;
    page.text("Its store, as 'dmsetup status' prints one (sectors: used/room metadata):")?;
    show_store(stage, page, MONDAY, &truth.kept_for_monday)
}

fn the_disk_changes(stage: &Stage, page: &mut Page, truth: &mut Truth) -> Result<(), Failure> {
    page.step("Payday: 1,000 writes to the disk, the origin of the snapshot")?;
    let payday = accounts::pay(&truth.disk, 1, 1000, 250_000);
    stage.write("disk", &payday)?;
    accounts::apply(&mut truth.disk, &payday);
    truth
        .kept_for_monday
        .extend(payday.iter().map(|(offset, _)| chunk_of(*offset)));
    let disk = stage.read("disk")?;
    let monday = stage.read(MONDAY)?;
    page.columns()?;
    page.row("disk", &disk)?;
    page.row(MONDAY, &monday)?;
    page.claim_same("the disk has the 1,000 payments", &disk, &truth.disk)?;
    page.claim_same("disk@monday has none of them", &monday, &truth.monday)?;
    page.text("Before a chunk is overwritten for the first time, it is copied to the store:")?;
    show_store(stage, page, MONDAY, &truth.kept_for_monday)?;

    let before = stage.status(MONDAY)?;
    let again = accounts::pay(&truth.disk, 1, 1000, 250_000);
    stage.write("disk", &again)?;
    accounts::apply(&mut truth.disk, &again);
    let after = stage.status(MONDAY)?;
    page.claim(
        "the same 1,000 accounts once more: nothing is copied again",
        &after.to_string(),
        &before.to_string(),
    )?;
    page.claim_same(
        "disk@monday is still the same",
        &stage.read(MONDAY)?,
        &truth.monday,
    )
}

fn a_fork(stage: &mut Stage, page: &mut Page, truth: &mut Truth) -> Result<(), Failure> {
    page.step("A fork: a second snapshot, to be written to: what-if")?;
    page.text("A snapshot is taken when the server starts, so it is started anew:")?;
    stage.stop()?;
    stage.add_snapshot("disk@what-if=what-if.cow,chunk=4K");
    show_command(stage, page)?;
    stage.start()?;
    truth.what_if.clone_from(&truth.disk);

    page.text("In the fork: wipe out 4,096 accounts, pay 100. On the disk: pay 300.")?;
    let wiped = 4096 * accounts::RECORD;
    stage.wipe(WHAT_IF, wiped as u32)?;
    truth.what_if[..wiped].fill(0);
    truth.kept_for_what_if.extend(0..chunk_of(wiped as u64));
    let forked = accounts::pay(&truth.what_if, 2, 100, 1_000_000);
    stage.write(WHAT_IF, &forked)?;
    accounts::apply(&mut truth.what_if, &forked);
    truth
        .kept_for_what_if
        .extend(forked.iter().map(|(offset, _)| chunk_of(*offset)));
    let live = accounts::pay(&truth.disk, 3, 300, 250_000);
    stage.write("disk", &live)?;
    accounts::apply(&mut truth.disk, &live);
    for kept in [&mut truth.kept_for_monday, &mut truth.kept_for_what_if] {
        kept.extend(live.iter().map(|(offset, _)| chunk_of(*offset)));
    }

    let disk = stage.read("disk")?;
    let monday = stage.read(MONDAY)?;
    let what_if = stage.read(WHAT_IF)?;
    page.columns()?;
    page.row("disk", &disk)?;
    page.row(MONDAY, &monday)?;
    page.row(WHAT_IF, &what_if)?;
    page.claim_same(
        "disk@what-if has its own writes, and no others",
        &what_if,
        &truth.what_if,
    )?;
    page.claim_same(
        "the disk has nothing of them, only its own",
        &disk,
        &truth.disk,
    )?;
    page.claim_same("disk@monday has neither", &monday, &truth.monday)?;
    show_store(stage, page, MONDAY, &truth.kept_for_monday)?;
    show_store(stage, page, WHAT_IF, &truth.kept_for_what_if)
}

fn a_restart(stage: &mut Stage, page: &mut Page, truth: &Truth) -> Result<(), Failure> {
    page.step("Restart: stop the server, look at the files, start it again")?;
    let before = [stage.status(MONDAY)?, stage.status(WHAT_IF)?];
    stage.stop()?;
    page.claim_same(
        "disk.img is the disk, a plain image as before",
        &stage.file("disk.img")?,
        &truth.disk,
    )?;
    let magic = String::from_utf8_lossy(&stage.file("monday.cow")?[..4]).into_owned();
    page.claim(
        "monday.cow begins as every dm-snapshot store does, with \"SnAp\"",
        magic.as_str(),
        "SnAp",
    )?;
    stage.start()?;
    let (disk, monday, what_if) = (
        stage.read("disk")?,
        stage.read(MONDAY)?,
        stage.read(WHAT_IF)?,
    );
    page.columns()?;
    page.row("disk", &disk)?;
    page.row(MONDAY, &monday)?;
    page.row(WHAT_IF, &what_if)?;
    page.claim_same("the disk has lost nothing", &disk, &truth.disk)?;
    page.claim_same("disk@monday has lost nothing", &monday, &truth.monday)?;
    page.claim_same("disk@what-if has lost nothing", &what_if, &truth.what_if)?;
    let after = [stage.status(MONDAY)?, stage.status(WHAT_IF)?];
    for (after, before) in after.iter().zip(&before) {
        let what = format!("the status of {} is what it was", after.export);
        page.claim(&what, &after.to_string(), &before.to_string())?;
    }
    stage.stop()
}

/// The command that a start stands for.
fn show_command(stage: &Stage, page: &mut Page) -> Result<(), Failure> {
    for (number, line) in stage.command().into_iter().enumerate() {
        if number == 0 {
            page.command(&line)?;
        } else {
            page.text(format!("      {line}"))?;
        }
    }
    Ok(())
}

/// Print a store's status as dmsetup would, and check that it has `kept`.
fn show_store(
    stage: &Stage,
    page: &mut Page,
    export: &str,
    kept: &BTreeSet<u64>,
) -> Result<(), Failure> {
    let status = stage.status(export)?;
    page.text(format!("{export:<14}  {status}"))?;
    let layout = Layout::new(chunk_size());
    let count = kept.len() as u64;
    let Status::Active {
        allocated,
        metadata,
        ..
    } = status.status
    else {
        return page.claim(
            &format!("{export} is active"),
            status.to_string().as_str(),
            "active",
        );
    };
    let each = chunk_size().sectors();
    let what = format!(
        "{} chunks of {each} sectors kept, {metadata} sectors of metadata: no more than needed",
        grouped(count)
    );
    let found = format!(
        "{} sectors of data and {metadata} of metadata",
        allocated - metadata
    );
    let needed = layout.sectors_for(count);
    let needed = format!(
        "{} sectors of data and {} of metadata",
        count * each,
        needed - count * each
    );
    page.claim(&what, &found, &needed)
}

fn chunk_size() -> ChunkSize {
    let bytes = super::size::parse(CHUNK).expect("a size");
    ChunkSize::from_bytes(bytes).expect("a chunk size")
}

fn chunk_of(offset: u64) -> u64 {
    offset / chunk_size().bytes()
}

/// Serve until a signal, with commands to try.
fn keep(stage: &Stage, page: &mut Page) -> Result<(), Failure> {
    let setup = stage.setup()?;
    let uri = stage.uri("").to_string();
    let (_, in_uri) = uri.split_once("socket=").expect("a Unix socket's URI");
    let socket = stage.socket();
    let socket = socket.display();
    let groups = [
        (
            "Look at it from outside (libnbd):",
            vec![
                format!("S='{in_uri}'"),
                "nbdinfo --list \"nbd+unix:///?socket=$S\"".to_owned(),
                "nbdcopy \"nbd+unix:///disk@monday?socket=$S\" monday.img".to_owned(),
                "head -n 3 monday.img".to_owned(),
            ],
        ),
        (
            "Write to the disk, and see that Monday stays (qemu-utils):",
            vec![
                "qemu-io -f raw -c 'write -P 88 0 1M' \"nbd+unix:///disk?socket=$S\"".to_owned(),
                "qemu-img compare -f raw -F raw monday.img \"nbd+unix:///disk?socket=$S\""
                    .to_owned(),
                "qemu-img compare -f raw -F raw monday.img \"nbd+unix:///disk@monday?socket=$S\""
                    .to_owned(),
            ],
        ),
        (
            "Attach the fork and put a file system on it (nbd-client, as root):",
            vec![
                format!("modprobe nbd && nbd-client -unix '{socket}' /dev/nbd0 -N {WHAT_IF}"),
                "mkfs.ext4 /dev/nbd0 && mount /dev/nbd0 /mnt".to_owned(),
                "umount /mnt && nbd-client -d /dev/nbd0".to_owned(),
            ],
        ),
    ];
    let mut printed = Ok(());
    let served = server::run(setup, |_| {
        printed = print_commands(page, &groups);
    });
    served.map_err(Failure::refused)?;
    printed
}

fn print_commands(page: &mut Page, groups: &[(&str, Vec<String>)]) -> Result<(), Failure> {
    page.line("Serving on until Ctrl-C. In another terminal:")?;
    for (title, commands) in groups {
        page.line("")?;
        page.text(title)?;
        for command in commands {
            page.command(command)?;
        }
    }
    page.line("")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that is printed, but for the folder and the time.
    #[test]
    fn the_story_is_the_same_every_time() {
        let folder = tempfile::tempdir().unwrap();
        let mut out = Vec::new();
        tell(
            &mut Stage::new(folder.path()),
            &mut Page::new(&mut out, false),
        )
        .unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out, include_str!("story.txt"), "\n{out}");
    }

    #[test]
    fn a_disk_that_lies_is_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let mut stage = Stage::new(folder.path());
        let image = accounts::image();
        let mut truth = Truth {
            disk: image.clone(),
            monday: image,
            what_if: Vec::new(),
            kept_for_monday: BTreeSet::new(),
            kept_for_what_if: BTreeSet::new(),
        };
        stage.make_disk(&truth.disk).unwrap();
        truth.monday[4711] ^= 1;
        let mut out = Vec::new();
        let ended = a_snapshot(&mut stage, &mut Page::new(&mut out, false), &truth);
        let Err(Failure::Refused(text)) = ended else {
            panic!("{ended:?}");
        };
        assert!(
            text.contains("disk@monday is the same: found another byte at 4711"),
            "{text}"
        );
    }
}
