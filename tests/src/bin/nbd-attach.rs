//! Attaches an export as `/dev/nbdN` inside the virtual machine, and holds on to
//! it while the server is away:
//!
//! `nbd-attach connect N ADDRESS EXPORT CONNECTIONS TIMEOUT HOLD` prints
//! `attached`, stays, and prints `again` whenever it gave the kernel a new
//! connection for one that died. A request without a reply is sent again after
//! TIMEOUT seconds; requests are held for HOLD seconds without a server.
//! `nbd-attach disconnect N` ends it.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use nbdsnap::client::{Client, ClientError, Connect, Stream};
use nbdsnap::nbd::uri::{ListenAddr, NbdUri};
use nbdsnap_tests::kernel::netlink::{Attachment, Nbd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Between two looks at a server that is away, or a link that the kernel has
/// not yet noticed to be dead.
const PAUSE: Duration = Duration::from_millis(20);
const BLOCK_SIZE: u64 = 512;

type Fault = Box<dyn Error>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        [
            "connect",
            index,
            address,
            export,
            connections,
            timeout,
            hold,
        ] => attach(index, address, export, connections, timeout, hold),
        ["disconnect", index] => disconnect(index),
        _ => Err(
            "usage: nbd-attach connect N ADDRESS EXPORT CONNECTIONS TIMEOUT HOLD, or disconnect N"
                .into(),
        ),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("nbd-attach: {why}");
            ExitCode::FAILURE
        }
    }
}

fn disconnect(index: &str) -> Result<(), Fault> {
    Ok(Nbd::open()?.disconnect(index.parse()?)?)
}

fn attach(
    index: &str,
    address: &str,
    export: &str,
    connections: &str,
    timeout: &str,
    hold: &str,
) -> Result<(), Fault> {
    let (host, port) = address.split_once(':').ok_or("ADDRESS is HOST:PORT")?;
    let address = ListenAddr::Tcp {
        host: host.to_owned(),
        port: port.parse()?,
    };
    let uri = address.uri(export);
    let connections: usize = connections.parse()?;
    // The kernel knows simple replies only.
    let mut links: Vec<Client> = (0..connections)
        .map(|_| Connect::simple().to(&uri))
        .collect::<Result<_, ClientError>>()?;
    let info = links.first().ok_or("no connections")?.info().clone();
    let attachment = Attachment {
        index: index.parse()?,
        size: info.size,
        block_size: BLOCK_SIZE,
        server_flags: info.flags,
        timeout: Duration::from_secs(timeout.parse()?),
        dead_conn_timeout: Duration::from_secs(hold.parse()?),
    };
    let mut nbd = Nbd::open()?;
    let sockets: Vec<BorrowedFd<'_>> = links.iter_mut().map(|link| fd(link)).collect();
    nbd.connect(&attachment, &sockets)?;
    println!("attached");
    loop {
        let dead = wait_for_a_dead_link(&mut links)?;
        links[dead] = match reconnect(&mut nbd, attachment.index, &uri)? {
            Some(link) => link,
            None => return Ok(()),
        };
        println!("again");
    }
}

/// The kernel reads and writes these sockets; here only their end is looked for.
fn wait_for_a_dead_link(links: &mut [Client]) -> io::Result<usize> {
    let mut ends: Vec<PollFd<'_>> = links
        .iter_mut()
        .map(|link| PollFd::from_borrowed_fd(fd(link), PollFlags::RDHUP))
        .collect();
    loop {
        match poll(&mut ends, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(dead) = ends.iter().position(|end| !end.revents().is_empty()) {
            return Ok(dead);
        }
    }
}

/// A new connection, as soon as there is a server, in the place of one that
/// died; `None` if the device has been disconnected.
fn reconnect(nbd: &mut Nbd, index: u32, uri: &NbdUri) -> io::Result<Option<Client>> {
    loop {
        if let Ok(mut link) = Connect::simple().to(uri) {
            match nbd.reconfigure(index, fd(&mut link)) {
                Ok(()) => return Ok(Some(link)),
                Err(e) => match Errno::from_io_error(&e) {
                    Some(Errno::INVAL) => return Ok(None),
                    Some(Errno::NOSPC) => {}
                    _ => return Err(e),
                },
            }
        }
        sleep(PAUSE);
    }
}

fn fd(link: &mut Client) -> BorrowedFd<'_> {
    let stream: &Stream = link.stream();
    stream.as_fd()
}
