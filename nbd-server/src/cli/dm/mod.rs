//! `nbdsnap dm`: dmsetup's own command line, output and messages, for the mapped
//! devices of a running server.
//!
//! - [`line`]: the command line; every switch may stand anywhere on it.
//! - [`session`]: what is asked of the server, how its refusals are worded, and how
//!   devices are named.
//! - [`perform`]: device by device; [`change`]: the verbs that change something; [`show`]: those that tell.
//! - [`report`]: the columns of `info -c`; [`tree`]: `ls --tree`.
//! - [`text`]: tables as they are written; [`name`]: names as the kernel keeps them.
//!
//! All of it is a function of the command line and of what the server and the files
//! say ([`session::World`]); only this file and [`usage`] read and print. What dmsetup
//! would refuse ends with status 1, as dmsetup does, and so does what makes no sense
//! ([`usage`]).

mod change;
mod line;
mod name;
mod perform;
mod report;
mod session;
mod show;
mod text;
mod tree;
pub(super) mod usage;

use std::io::{self, Read, Write};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

pub(super) use line::DmArgs;

use super::Failure;
use super::orders::{ServerAt, beside_the_point, print};
use crate::control::dm::{DmAnswer, DmOrder};
use crate::control::protocol::{Answer, Order};
use crate::dm::plain;
use line::Line;
use session::{Located, World};

/// The verb.
pub(super) fn run(args: DmArgs, verbose: u8) -> Result<(), Failure> {
    let (line, server) = args.split(verbose);
    let mut world = Outside { server };
    let done = execute(line, &mut world);
    // Both may be closed.
    let _ = io::stderr().write_all(done.err.as_bytes());
    print(&done.out)?;
    done.ended
}

/// What a command line came to.
#[derive(Debug)]
struct Done {
    out: String,
    err: String,
    ended: Result<(), Failure>,
}

fn execute(line: Line, world: &mut dyn World) -> Done {
    let mut session = session::Session::new(line, world);
    let ended = perform::perform(&mut session);
    Done {
        out: session.out,
        err: session.err,
        ended,
    }
}

/// The server, and the files of this machine.
struct Outside {
    server: ServerAt,
}

impl World for Outside {
    fn ask(&mut self, order: DmOrder) -> Result<DmAnswer, Failure> {
        // A connection each: a table on standard input can take longer to come than the
        // server has patience.
        let connected = self.server.connect();
        let answer = connected.and_then(|mut client| {
            let answer = client.order(Order::Dm(order));
            answer.map_err(Failure::refused)
        });
        match answer {
            Ok(Answer::Dm(answer)) => Ok(answer),
            Ok(_) => Err(beside_the_point()),
            // There is one status for whatever goes wrong.
            Err(Failure::Usage(why) | Failure::Refused(why)) => Err(Failure::Refused(plain(&why))),
            Err(Failure::Found) => Err(Failure::Found),
        }
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }

    fn read(&mut self, file: Option<&str>) -> io::Result<String> {
        let Some(file) = file else {
            let mut text = String::new();
            io::stdin().lock().read_to_string(&mut text)?;
            return Ok(text);
        };
        std::fs::read_to_string(file)
    }

    fn absolute(&self, path: &str) -> String {
        let path = std::path::absolute(path).ok();
        let path = path.and_then(|path| path.to_str().map(str::to_owned));
        path.unwrap_or_default()
    }

    fn locate(&self, path: &str) -> Located {
        let Ok(real) = std::fs::canonicalize(path) else {
            return Located::Nowhere;
        };
        if let Some(name) = real.to_str().and_then(|path| path.strip_prefix(FOLDER)) {
            return Located::Name(name.to_owned());
        }
        let number = |path: &Path| {
            let about = std::fs::metadata(path).ok()?;
            about.file_type().is_block_device().then(|| about.st_rdev())
        };
        let Some(wanted) = number(&real) else {
            return Located::NotMapped;
        };
        // A link of that name to a device that the export is attached as.
        let mut entries = std::fs::read_dir(FOLDER).into_iter().flatten().flatten();
        let found = entries.find(|entry| number(&entry.path()) == Some(wanted));
        match found.and_then(|entry| entry.file_name().into_string().ok()) {
            Some(name) => Located::Name(name),
            None => Located::NotMapped,
        }
    }

    fn width(&self) -> Option<usize> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
        Some(usize::from(size.ws_col))
    }

    fn speaks_utf8(&self) -> bool {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let locale = set("LC_ALL")
            .or_else(|| set("LC_CTYPE"))
            .or_else(|| set("LANG"));
        let locale = locale.unwrap_or_default().to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    }
}

/// Where Linux has the nodes of mapped devices.
const FOLDER: &str = "/dev/mapper/";

#[cfg(test)]
mod tests;
