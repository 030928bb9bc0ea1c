//! Plays steps on one side: dmsetup and the kernel's devices inside the virtual
//! machine, or `nbdsnap dm` and clients of its exports. Nobody is attached between
//! two steps.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nbdsnap::client::Client;
use nbdsnap::nbd::uri::NbdUri;

use super::step::{Outcome, Step};
use crate::kernel::play::content;

/// How long a merge may take, and a client of ours may wait.
const PATIENCE: Duration = Duration::from_mins(1);

/// A read is so long, and in smaller pieces where it fails.
const PIECE: u64 = 64 << 10;
const SMALL: u64 = 4 << 10;

const PAGE: usize = 4096;
const O_DIRECT: i32 = 0o40_000;

/// A side of the comparison.
#[derive(Clone, Debug)]
pub struct Side {
    /// The program and the words before dmsetup's.
    pub program: Vec<String>,
    /// The paths of the disks `@a`, `@b`, ...
    pub disks: Vec<String>,
    /// How devices are read and written.
    pub devices: Devices,
}

/// How devices are read and written.
#[derive(Clone, Debug)]
pub enum Devices {
    /// As `/dev/mapper/NAME`, past the page cache.
    Mapper,
    /// As exports of a server on this Unix socket.
    Exports(String),
}

impl Side {
    /// The kernel, with these disks.
    pub fn kernel(disks: Vec<String>) -> Self {
        Self {
            program: vec!["dmsetup".to_owned()],
            disks,
            devices: Devices::Mapper,
        }
    }

    /// Play one step to its end.
    pub fn play(&self, step: &Step) -> Outcome {
        match step {
            Step::Dm { args, input } => self.dm(args, input.as_deref()),
            Step::Merged { device } => self.merged(device),
            Step::Write {
                device,
                offset,
                len,
                fill,
            } => self.write(device, *offset, &content(*fill, *len)),
            Step::Zero { device, len } => self.write(device, 0, &vec![0; *len as usize]),
            Step::Read { device } => {
                let open = self.open(device, false);
                io(open.and_then(|mut open| {
                    let seen = open.read_all();
                    open.close()?;
                    Ok(vec![seen])
                }))
            }
        }
    }

    fn write(&self, device: &str, offset: u64, bytes: &[u8]) -> Outcome {
        let open = self.open(device, true);
        io(open.and_then(|mut open| {
            let written = open.write(offset, bytes);
            open.close()?;
            written.map(|()| Vec::new())
        }))
    }

    fn dm(&self, args: &[String], input: Option<&str>) -> Outcome {
        let mut command = Command::new(&self.program[0]);
        command
            .args(&self.program[1..])
            .args(args.iter().map(|arg| self.with_disks(arg)))
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program[0]));
        let mut stdin = child.stdin.take().expect("piped");
        if let Some(text) = input {
            // Who does not read it to the end has its reasons.
            let _ = stdin.write_all(self.with_disks(text).as_bytes());
        }
        drop(stdin);
        let done = child.wait_with_output().expect("a child can be waited for");
        let lines = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            text.lines().map(str::to_owned).collect()
        };
        Outcome {
            code: done.status.code().unwrap_or(-1),
            out: lines(&done.stdout),
            err: lines(&done.stderr),
        }
    }

    fn with_disks(&self, text: &str) -> String {
        let disks = ('a'..).zip(&self.disks);
        disks.fold(text.to_owned(), |text, (letter, path)| {
            text.replace(&format!("@{letter}"), path)
        })
    }

    /// Ask for the status again and again; its last line.
    fn merged(&self, device: &str) -> Outcome {
        let until = Instant::now() + PATIENCE;
        loop {
            let outcome = self.dm(&["status".to_owned(), device.to_owned()], None);
            if outcome.code != 0 || outcome.out.iter().all(|line| merge_has_ended(line)) {
                return outcome;
            }
            if Instant::now() > until {
                return Outcome {
                    code: 1,
                    out: vec!["the merge does not end".to_owned()],
                    ..outcome
                };
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn open(&self, device: &str, write: bool) -> Result<Open, String> {
        match &self.devices {
            Devices::Mapper => Open::device(&format!("/dev/mapper/{device}"), write),
            Devices::Exports(socket) => Open::export(socket, device),
        }
    }
}

/// Whether a status line is one of a merge that goes on no more.
fn merge_has_ended(status: &str) -> bool {
    let words: Vec<&str> = status.split_whitespace().collect();
    match words[..] {
        [_, _, "snapshot-merge", used, metadata] => used
            .split_once('/')
            .is_some_and(|(used, _)| used == metadata),
        _ => true,
    }
}

fn io(result: Result<Vec<String>, String>) -> Outcome {
    match result {
        Ok(out) => Outcome {
            out,
            ..Outcome::default()
        },
        Err(why) => Outcome {
            code: 1,
            err: vec![why],
            ..Outcome::default()
        },
    }
}

/// A device in use.
enum Open {
    Device { file: File, size: u64 },
    Export(Box<Client>),
}

impl Open {
    fn device(path: &str, write: bool) -> Result<Self, String> {
        let mut options = File::options();
        options.read(true).write(write).custom_flags(O_DIRECT);
        let opened = options.open(path).and_then(|mut file| {
            let size = file.seek(SeekFrom::End(0))?;
            Ok(Self::Device { file, size })
        });
        opened.map_err(|e| format!("open {path}: {e}"))
    }

    fn export(socket: &str, name: &str) -> Result<Self, String> {
        let uri = format!("nbd+unix:///{name}?socket={socket}");
        let uri: NbdUri = uri.parse().map_err(|e| format!("{uri}: {e}"))?;
        let client = Client::connect(&uri).map_err(|e| format!("attach {name}: {e}"))?;
        client
            .set_timeout(Some(PATIENCE))
            .map_err(|e| e.to_string())?;
        Ok(Self::Export(Box::new(client)))
    }

    fn size(&self) -> u64 {
        match self {
            Self::Device { size, .. } => *size,
            Self::Export(client) => client.size(),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        match self {
            Self::Device { file, .. } => {
                let mut buffer = vec![0; bytes.len() + PAGE];
                let skip = buffer.as_ptr().align_offset(PAGE);
                let aligned = &mut buffer[skip..skip + bytes.len()];
                aligned.copy_from_slice(bytes);
                file.write_all_at(aligned, offset)
                    .map_err(|e| e.to_string())
            }
            Self::Export(client) => client
                .write(offset, bytes, false)
                .map_err(|e| e.to_string()),
        }
    }

    /// Nobody is attached any more when this returns.
    fn close(self) -> Result<(), String> {
        match self {
            Self::Device { .. } => Ok(()),
            Self::Export(client) => client.disconnect().map_err(|e| format!("a farewell: {e}")),
        }
    }

    /// What it holds: its size, a sum of its bytes, and which pieces cannot be read.
    fn read_all(&mut self) -> String {
        let size = self.size();
        let mut buffer = vec![0; PIECE as usize + PAGE];
        let skip = buffer.as_ptr().align_offset(PAGE);
        let buffer = &mut buffer[skip..skip + PIECE as usize];
        let mut sum = Sum::default();
        let mut unreadable = 0;
        let mut at = 0;
        while at < size {
            let len = PIECE.min(size - at);
            let piece = &mut buffer[..len as usize];
            if self.read(at, piece).is_ok() {
                sum.add(piece);
            } else {
                for small in piece.chunks_mut(SMALL as usize) {
                    if self.read(at, small).is_ok() {
                        sum.add(small);
                    } else {
                        unreadable += 1;
                        sum.add(&at.to_le_bytes());
                    }
                    at += small.len() as u64;
                }
                continue;
            }
            at += len;
        }
        let sum = sum.0;
        format!("{size} bytes, sum {sum:016x}, {unreadable} pieces of {SMALL} unreadable")
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Device { file, .. } => file
                .read_exact_at(buffer, offset)
                .map_err(|e| e.to_string()),
            Self::Export(client) => {
                let bytes = client
                    .read(offset, buffer.len() as u32)
                    .map_err(|e| e.to_string())?;
                buffer.copy_from_slice(&bytes);
                Ok(())
            }
        }
    }
}

/// A sum of bytes that is cheap under emulation: FNV over words of eight.
struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut eight = [0; 8];
            eight[..word.len()].copy_from_slice(word);
            self.0 = (self.0 ^ u64::from_le_bytes(eight)).wrapping_mul(0x0100_0000_01b3);
            self.0 ^= self.0 >> 29;
        }
    }
}
