//! Boots the machine with disks, programs and a script. The script's output
//! comes back line by line; the kernel's own console is kept apart, and shown
//! when something fails.
//!
//! Its disks are files here, seen there as `/dev/vda`, `/dev/vdb` and so on in
//! the order in which they were given. The machine is not booted each time, but
//! goes on from where it stood after a boot (`frozen.rs`). [`Running::cut_power`] ends the machine
//! as a power cut does: what its kernel had not sent to the disks is lost.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::frozen::{self, Monitor, SLOTS, empty_slot, slot};
use super::machine::Machine;

/// How long a script may run. Emulation on a busy machine is slow.
const PATIENCE: Duration = Duration::from_mins(15);

/// A disk of a machine.
#[derive(Debug)]
struct Disk {
    path: PathBuf,
    block: u32,
    /// Writes a second at most; 0: as many as it can.
    iops: u32,
}

/// A machine to be booted.
#[derive(Debug)]
pub struct Vm<'a> {
    machine: &'a Machine,
    processors: u32,
    disks: Vec<Disk>,
    files: Vec<(String, Vec<u8>)>,
}

impl<'a> Vm<'a> {
    /// Without disks.
    pub fn new(machine: &'a Machine) -> Self {
        Self {
            machine,
            processors: 2,
            disks: Vec::new(),
            files: Vec::new(),
        }
    }

    /// With so many processors instead of two.
    pub fn processors(&mut self, processors: u32) -> &mut Self {
        self.processors = processors;
        self
    }

    /// The next disk.
    pub fn disk(&mut self, path: &Path) -> &mut Self {
        self.disk_with_blocks(path, 512)
    }

    /// The next disk, with logical blocks of so many bytes.
    pub fn disk_with_blocks(&mut self, path: &Path, block: u32) -> &mut Self {
        self.disks.push(Disk {
            path: path.to_owned(),
            block,
            iops: 0,
        });
        self
    }

    /// The last disk is slow: so many writes a second. What waits for
    /// its turn when the power is cut does not reach the disk.
    pub fn slow(&mut self, iops: u32) -> &mut Self {
        self.disks.last_mut().expect("a disk").iops = iops;
        self
    }

    /// A program, in the path of the script by its name.
    pub fn program(&mut self, path: &Path) -> &mut Self {
        let name = path.file_name().expect("a program has a name");
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.file(&name.to_string_lossy(), bytes)
    }

    /// A file (executable) in the folder `/test`.
    pub fn file(&mut self, name: &str, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.files.push((name.to_owned(), bytes.into()));
        self
    }

    /// Boot, run the script to its end, which must be a good one.
    pub fn run(&self, script: &str) -> Output {
        self.start(script).finish()
    }

    /// Boot and begin to run the script.
    pub fn start(&self, script: &str) -> Running {
        let folder = tempfile::Builder::new()
            .prefix("nbdsnap-vm-")
            .tempdir()
            .expect("a temporary folder");
        let files = folder.path().join("files");
        self.write_files(&files, script)
            .expect("a temporary file can be written");
        let console = folder.path().join("console");
        let state = frozen::booted(self.machine, self.processors).unwrap_or_else(|e| panic!("{e}"));
        let mut qemu = self.command(&files, &console);
        let monitor = Monitor::listen(folder.path(), &mut qemu).unwrap_or_else(|e| panic!("{e}"));
        let child = qemu.spawn().expect("qemu starts");
        let mut running = Running {
            child,
            lines: channel().1,
            seen: Vec::new(),
            until: Instant::now() + PATIENCE,
            console,
            _folder: folder,
        };
        frozen::wake(monitor, &mut running.child, &state).unwrap_or_else(|e| panic!("{e}"));
        running.lines = lines_of(running.child.stdout.take().expect("piped"));
        self.begin(&mut running.child);
        running
    }

    fn command(&self, files: &Path, console: &Path) -> Command {
        assert!(self.disks.len() < SLOTS, "too many disks");
        let mut qemu = frozen::qemu(self.machine, self.processors);
        frozen::serial_lines(&mut qemu, console);
        qemu.args(["-incoming", "defer"]);
        for n in 0..SLOTS - 1 {
            match self.disks.get(n) {
                None => qemu.args(empty_slot(n)),
                Some(Disk { path, block, iops }) => {
                    let file = format!(
                        "file={},format=raw,cache=writeback,discard=unmap,throttling.iops-write={iops}",
                        path.display()
                    );
                    qemu.args(slot(n, &file, *block))
                }
            };
        }
        let files = format!("file={},format=raw,readonly=on", files.display());
        qemu.args(slot(SLOTS - 1, &files, 512));
        qemu
    }

    /// Tell the machine, which waits for it, how many disks it has and the time.
    fn begin(&self, child: &mut Child) {
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed();
        let now = since.expect("a clock").as_secs();
        let mut stdin = child.stdin.take().expect("piped");
        writeln!(stdin, "{} {now}", self.disks.len()).expect("the machine listens");
    }

    /// This run's files, as an archive on a disk of its own.
    fn write_files(&self, path: &Path, script: &str) -> std::io::Result<()> {
        let mut archive = Archive::default();
        archive.add("test/script", script.as_bytes());
        for (name, bytes) in &self.files {
            archive.add(&format!("test/{name}"), bytes);
        }
        let mut bytes = archive.end();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        std::fs::write(path, bytes)
    }
}

/// A machine that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    until: Instant,
    console: PathBuf,
    _folder: tempfile::TempDir,
}

impl Running {
    /// Wait until the script says this line.
    pub fn wait_for(&mut self, line: &str) {
        while !self.seen.iter().any(|seen| seen == line) {
            assert!(self.read_line(), "{}", self.story(line));
        }
    }

    /// Take in one more line; false at the end.
    fn read_line(&mut self) -> bool {
        let left = self.until.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.seen.push(line);
                true
            }
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => {
                panic!("{}", self.story("its end within the time"));
            }
        }
    }

    /// Wait for the script's end, which must be a good one.
    pub fn finish(mut self) -> Output {
        while self.read_line() {}
        let _ = self.child.wait();
        let status = self.seen.last().and_then(|l| l.strip_prefix("VM-EXIT "));
        assert!(status == Some("0"), "{}", self.story("VM-EXIT 0"));
        Output {
            lines: std::mem::take(&mut self.seen),
        }
    }

    /// Cut the machine off; the lines that it had said until then.
    pub fn cut_power(mut self) -> Output {
        let _ = self.child.kill();
        let _ = self.child.wait();
        while self.read_line() {}
        Output {
            lines: std::mem::take(&mut self.seen),
        }
    }

    fn story(&self, wanted: &str) -> String {
        let console = std::fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let tail: Vec<_> = console.lines().rev().take(30).collect();
        let tail: Vec<_> = tail.into_iter().rev().collect();
        format!(
            "the virtual machine did not come to `{wanted}`\n--- said:\n{}\n--- its console ends:\n{}",
            self.seen.join("\n"),
            tail.join("\n")
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a script said.
#[derive(Clone, Debug)]
pub struct Output {
    /// Line by line.
    pub lines: Vec<String>,
}

impl Output {
    /// What follows `key` and a space, on the last line that begins so.
    pub fn value(&self, key: &str) -> &str {
        self.find(key)
            .unwrap_or_else(|| panic!("no line `{key} ...` in\n{}", self.lines.join("\n")))
    }

    /// The same, if there is such a line.
    pub fn find(&self, key: &str) -> Option<&str> {
        let mut lines = self.lines.iter().rev();
        lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(' ').map(str::trim_end))
    }
}

fn lines_of(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line);
            if sender.send(text.trim_end().to_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

/// A `newc` archive, as the kernel unpacks it.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, content: &[u8]) {
        self.entries += 1;
        let executable_file = 0o100_755;
        self.entry(self.entries, executable_file, name, content);
    }

    fn entry(&mut self, inode: u32, mode: u32, name: &str, content: &[u8]) {
        let name_len = name.len() as u32 + 1;
        let fields = [
            inode,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            name_len,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry(0, 0, "TRAILER!!!", &[]);
        self.bytes
    }
}
