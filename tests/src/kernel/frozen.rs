//! The machine as it stands after its boot, kept in a file: under emulation a
//! boot costs ten seconds of processor time, and waking up a machine that has
//! booted costs one or two.
//!
//! The machine is stopped before its kernel has looked at any disk. Every one has
//! the same slots for disks, so that the disks of a test take their places when
//! it is woken up, and the kernel finds them then.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::machine::Machine;

/// How long a boot, or a wake-up, may take on a busy machine.
const PATIENCE: Duration = Duration::from_mins(5);

/// Disks that a machine can have: a test's, and the one with its files.
pub(super) const SLOTS: usize = 5;

/// What a slot holds where a machine has no disk for it.
const NO_DISK: &str = "driver=null-co,size=1048576,read-zeroes=on";

/// The arguments for the disk in a slot; `drive` without `id` and `if`.
pub(super) fn slot(n: usize, drive: &str, block: u32) -> [OsString; 4] {
    let address = n + 0x10;
    let device = format!(
        "virtio-blk-pci,drive=disk{n},addr=0x{address:x},logical_block_size={block},physical_block_size={block}"
    );
    let drive = format!("if=none,id=disk{n},{drive}");
    [
        "-drive".into(),
        drive.into(),
        "-device".into(),
        device.into(),
    ]
}

/// The arguments for a slot without a disk.
pub(super) fn empty_slot(n: usize) -> [OsString; 4] {
    slot(n, NO_DISK, 512)
}

/// qemu, but for its disks and where its console goes.
pub(super) fn qemu(machine: &Machine, processors: u32) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi"])
        .args(["-cpu", "max", "-smp", &processors.to_string()])
        .args(["-m", "1024"])
        .args(["-display", "none", "-monitor", "none", "-net", "none"])
        .args(["-no-reboot", "-nodefaults"])
        .arg("-kernel")
        .arg(machine.kernel())
        .arg("-initrd")
        .arg(machine.ram_disk())
        // Whether the timer ticks in time cannot be told where others take
        // the processor away: the kernel would panic.
        .args(["-append", "console=ttyS0 panic=-1 no_timer_check"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    qemu
}

/// Where the console goes, and the script's line.
pub(super) fn serial_lines(qemu: &mut Command, console: &Path) {
    qemu.arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio"]);
}

/// The file with a machine of so many processors that has booted; made when the
/// RAM disk is newer. One process at a time makes one.
pub(super) fn booted(machine: &Machine, processors: u32) -> Result<PathBuf, String> {
    let state = machine.folder().join(format!("booted-{processors}"));
    let failed = |e: std::io::Error| format!("{}: {e}", state.display());
    let lock = File::create(state.with_extension("lock")).map_err(failed)?;
    lock.lock().map_err(failed)?;
    let stamp = stamp(machine).map_err(failed)?;
    let stamped = state.with_extension("stamp");
    if !state.exists() || std::fs::read_to_string(&stamped).ok().as_ref() != Some(&stamp) {
        let _ = std::fs::remove_file(&stamped);
        freeze(machine, processors, &state)?;
        std::fs::write(&stamped, stamp).map_err(failed)?;
    }
    Ok(state)
}

/// What a state is made of: the RAM disk's stamp, qemu's version and this file.
fn stamp(machine: &Machine) -> std::io::Result<String> {
    let image = std::fs::read_to_string(machine.folder().join("stamp"))?;
    let version = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    Ok(image + &version + include_str!("frozen.rs"))
}

/// Boot, stop, and write the machine to `state`.
fn freeze(machine: &Machine, processors: u32, state: &Path) -> Result<(), String> {
    let folder = tempfile::Builder::new()
        .prefix("nbdsnap-vm-")
        .tempdir()
        .map_err(|e| e.to_string())?;
    let mut qemu = qemu(machine, processors);
    let console = folder.path().join("console");
    serial_lines(&mut qemu, &console);
    for n in 0..SLOTS {
        qemu.args(empty_slot(n));
    }
    let monitor = Monitor::listen(folder.path(), &mut qemu)?;
    let mut child = Ended(qemu.spawn().map_err(|e| format!("qemu: {e}"))?);
    let mut monitor = monitor.accept(&mut child.0)?;
    let mut lines = BufReader::new(child.0.stdout.take().expect("piped"));
    let mut line = String::new();
    while !line.starts_with("VM-READY") {
        line.clear();
        let read = lines.read_line(&mut line).map_err(|e| e.to_string())?;
        if read == 0 {
            let console = std::fs::read(&console).unwrap_or_default();
            return Err(format!("no boot: {}", String::from_utf8_lossy(&console)));
        }
    }
    monitor.order("stop", &json!({}))?;
    let unlimited = json!({ "max-bandwidth": 1_u64 << 40 });
    monitor.order("migrate-set-parameters", &unlimited)?;
    let uri = format!("exec:cat >{}", quoted(state));
    monitor.order("migrate", &json!({ "uri": uri }))?;
    monitor.wait_for_migration()
}

/// Let a machine that was started with `-incoming defer` go on from `state`.
pub(super) fn wake(monitor: Monitor, child: &mut Child, state: &Path) -> Result<(), String> {
    let mut monitor = monitor.accept(child)?;
    let uri = format!("exec:cat {}", quoted(state));
    monitor.order("migrate-incoming", &json!({ "uri": uri }))?;
    monitor.wait_for_migration()?;
    monitor.order("cont", &json!({}))
}

/// A path as one word of a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

/// A child that does not outlive this value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where qemu will ask for orders.
pub(super) struct Monitor {
    listener: UnixListener,
}

impl Monitor {
    /// A socket in a folder, and qemu's argument for it.
    pub(super) fn listen(folder: &Path, qemu: &mut Command) -> Result<Self, String> {
        let path = folder.join("monitor");
        let listener = UnixListener::bind(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        qemu.arg("-qmp").arg(format!("unix:{}", path.display()));
        Ok(Self { listener })
    }

    fn accept(self, child: &mut Child) -> Result<Orders, String> {
        let failed = |e: std::io::Error| format!("qemu's monitor: {e}");
        self.listener.set_nonblocking(true).map_err(failed)?;
        let until = Instant::now() + PATIENCE;
        let stream = loop {
            match self.listener.accept() {
                Ok((stream, _)) => break stream,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if let Some(status) = child.try_wait().map_err(failed)? {
                        return Err(format!("qemu ended at its start: {status}"));
                    }
                    if Instant::now() > until {
                        return Err("qemu does not come to its monitor".to_owned());
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(failed(e)),
            }
        };
        stream.set_nonblocking(false).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut orders = Orders {
            lines: BufReader::new(stream.try_clone().map_err(failed)?),
            stream,
        };
        orders.line()?; // its greeting
        orders.order("qmp_capabilities", &json!({}))?;
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        orders.order("migrate-set-capabilities", &events)?;
        Ok(orders)
    }
}

/// Orders to qemu, in the words of its machine protocol.
struct Orders {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Orders {
    fn line(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        if read.map_err(|e| format!("qemu's monitor: {e}"))? == 0 {
            return Err("qemu ended".to_owned());
        }
        serde_json::from_str(&line).map_err(|e| format!("qemu said {line:?}: {e}"))
    }

    fn order(&mut self, verb: &str, arguments: &Value) -> Result<(), String> {
        let order = json!({ "execute": verb, "arguments": arguments });
        writeln!(self.stream, "{order}").map_err(|e| format!("qemu's monitor: {e}"))?;
        loop {
            let said = self.line()?;
            if said.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = said.get("error") {
                return Err(format!("qemu: {verb}: {error}"));
            }
        }
    }

    fn wait_for_migration(&mut self) -> Result<(), String> {
        loop {
            let said = self.line()?;
            match said["data"]["status"].as_str() {
                _ if said["event"] != "MIGRATION" => {}
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(format!("qemu: {said}")),
                _ => {}
            }
        }
    }
}
