//! The files, and one measurement from an empty store to its checks.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbdsnap_benches::BenchError;
use nbdsnap_benches::content::Content;
use nbdsnap_benches::cpu::wait_until_quiet;
use nbdsnap_benches::load::{Limit, Load, Measured};
use nbdsnap_benches::plan::{Order, Rng};
use nbdsnap_benches::replies::Command;
use tempfile::TempDir;

use crate::Options;
use crate::cases::Case;
use crate::contender::{Contender, Site};
use crate::server::{Programs, Server};

/// What all turns share: two disks of random bytes without holes, one that is
/// only read and one that cases write to, and the place for everything else.
pub(crate) struct Bench<'a> {
    /// Removed at the end.
    folder: TempDir,
    /// What is in the disk that is only read.
    pristine: Content,
    bytes: u64,
    measure: Duration,
    structured: bool,
    wait_quiet: Duration,
    programs: &'a Programs,
}

impl<'a> Bench<'a> {
    /// Makes the disks.
    pub(crate) fn set_up(
        options: &Options,
        measure: Duration,
        programs: &'a Programs,
    ) -> Result<Self, BenchError> {
        if options.size == 0 || !options.size.is_multiple_of(1 << 20) {
            return Err(BenchError::Unsuitable(
                "--size: a disk of whole MiB is needed".into(),
            ));
        }
        let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
        let folder = tempfile::Builder::new()
            .prefix("nbdsnap-peers-")
            .tempdir_in(&parent)
            .map_err(at(&parent))?;
        let mut image = vec![0; options.size as usize];
        Rng::new(1).fill(&mut image);
        let bench = Self {
            folder,
            bytes: options.size,
            pristine: Content::Image(image),
            measure,
            structured: options.structured,
            wait_quiet: Duration::from_secs(options.wait_quiet),
            programs,
        };
        let Content::Image(image) = &bench.pristine else {
            unreachable!("it was made above")
        };
        for disk in [bench.disk(false), bench.disk(true)] {
            fs::create_dir(disk.parent().expect("it lies in a folder")).map_err(at(&disk))?;
            let mut file = File::create_new(&disk).map_err(at(&disk))?;
            fill(&mut file, image).map_err(at(&disk))?;
        }
        Ok(bench)
    }

    /// A disk lies in a folder of its own, with whatever a server puts beside it.
    fn disk(&self, written: bool) -> PathBuf {
        self.folder
            .path()
            .join(if written { "written" } else { "read" })
            .join("disk.raw")
    }

    /// One measurement.
    pub(crate) fn turn(
        &self,
        case: &Case,
        contender: Contender,
        turn: u32,
    ) -> Result<Measured, BenchError> {
        self.turn_of(case, contender, turn).map_err(|error| {
            BenchError::Unsuitable(format!(
                "{}, {}, turn {}: {error}",
                case.name,
                contender.label(),
                turn + 1
            ))
        })
    }

    fn turn_of(
        &self,
        case: &Case,
        contender: Contender,
        turn: u32,
    ) -> Result<Measured, BenchError> {
        let disk = self.disk(case.writes());
        let stores = self.empty_store_folder(&disk)?;
        let before = if case.writes() {
            Some(Content::load(&disk)?)
        } else {
            None
        };
        let before = before.as_ref().unwrap_or(&self.pristine);
        let site = Site {
            disk: &disk,
            store: &stores.join("store"),
            socket: &stores.join("socket"),
            bytes: self.bytes,
        };
        let server = Server::start(contender, self.programs, &site, &stores.join("log"))?;
        // The same seed for all servers of a turn, and new bytes each turn.
        let seed = u64::from(turn) + 1;
        if case.copied_before {
            self.overwrite_origin(&server, contender, seed)?;
        }
        let mut connection = server.connect(contender.export(), self.structured)?;
        let load = case.load(self.measure, seed, server.pid());
        wait_until_quiet(self.wait_quiet);
        let (measured, written) = load.run(&mut connection, before)?;
        if let Some(written) = written {
            written.verify(&mut connection)?;
        }
        connection.close()?;
        if let (Some(other), Command::Write) = (contender.other_export(), load.command) {
            read_whole(&server, other, before)?;
        }
        server.stop()?;
        settle(&disk)?;
        Ok(measured)
    }

    /// Removes what earlier turns left: no server finds another's state.
    fn empty_store_folder(&self, disk: &Path) -> Result<PathBuf, BenchError> {
        let stores = self.folder.path().join("stores");
        match fs::remove_dir_all(&stores) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(at(&stores)(cause));
            }
            _ => fs::create_dir(&stores).map_err(at(&stores))?,
        }
        let beside = disk.parent().expect("it lies in a folder");
        for entry in fs::read_dir(beside).map_err(at(beside))? {
            let path = entry.map_err(at(beside))?.path();
            if path != disk {
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        Ok(stores)
    }

    /// Writes the whole origin behind a snapshot. A server without a snapshot
    /// is left alone: its reads are the yardstick.
    fn overwrite_origin(
        &self,
        server: &Server,
        contender: Contender,
        seed: u64,
    ) -> Result<(), BenchError> {
        let Some(origin) = contender.other_export() else {
            return Ok(());
        };
        let mut connection = server.connect(origin, self.structured)?;
        let load = Load {
            command: Command::Write,
            ..whole_disk(seed)
        };
        let _ = load.run(&mut connection, &Content::Unchecked)?;
        connection.close()?;
        Ok(())
    }
}

/// Writes page by page: a large write would leave large folios in the page
/// cache, and then ext4 walks through up to 512 blocks in each small write
/// (measured: 5 us become 30).
fn fill(file: &mut File, image: &[u8]) -> io::Result<()> {
    for page in image.chunks(4096) {
        file.write_all(page)?;
    }
    file.sync_all()
}

/// Compares an export as a whole.
fn read_whole(server: &Server, export: &str, content: &Content) -> Result<(), BenchError> {
    let mut connection = server.connect(export, false)?;
    let _ = whole_disk(0).run(&mut connection, content)?;
    connection.close()?;
    Ok(())
}

/// Reads every block once.
fn whole_disk(seed: u64) -> Load {
    Load {
        command: Command::Read,
        order: Order::Once,
        block: 64 << 10,
        stride: 64 << 10,
        depth: 16,
        batch: 1,
        limit: Limit::WholePlan,
        seed,
        server_pid: None,
    }
}

/// Lets the disk come to rest, so that one turn's writes do not slow down the next.
fn settle(disk: &Path) -> Result<(), BenchError> {
    File::open(disk)
        .and_then(|file| file.sync_all())
        .map_err(at(disk))
}

fn at(path: &Path) -> impl Fn(io::Error) -> BenchError {
    let path = path.display().to_string();
    move |cause| BenchError::File {
        path: path.clone(),
        cause,
    }
}
