//! The control socket: taken from the start, so that no other server can have
//! it, and private to the user. It takes no orders yet and says so.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use crate::server::setup::Listener;

const ANSWER: &[u8] = b"nbdsnap: no orders are taken yet\n";

/// A control socket that is answered as long as the program runs; its path goes
/// away when this is dropped.
#[derive(Debug)]
pub(super) struct Control {
    path: PathBuf,
}

impl Control {
    /// Answer on a socket that was bound.
    pub(super) fn start(listeners: Vec<Listener>) -> std::io::Result<Option<Self>> {
        let Some(Listener::Unix(listener, path)) = listeners.into_iter().next() else {
            return Ok(None);
        };
        let control = Self { path };
        listener.set_nonblocking(false)?;
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || answer(&listener))?;
        Ok(Some(control))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn answer(listener: &UnixListener) {
    loop {
        match listener.accept() {
            // A line fits into the socket's buffer: no client can hold this up.
            Ok((mut client, _)) => {
                let _ = client.write_all(ANSWER);
            }
            Err(error) => {
                tracing::warn!(%error, "the control socket cannot be answered");
                // Out of descriptors, most likely: trying at once would spin.
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
}
