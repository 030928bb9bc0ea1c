//! A server as a process: it runs until a signal, or a failure of its own, ends it.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::setup::Setup;
use super::{RunningServer, ServerError, system};

/// How often the server's own threads are looked after.
const LOOK_AFTER: Duration = Duration::from_millis(500);

/// Serve until SIGTERM or SIGINT. `ready` is called once clients are accepted. A
/// second signal while the server is stopping ends the process at once, with
/// status 1.
pub fn run(setup: Setup, ready: impl FnOnce(&RunningServer)) -> Result<(), ServerError> {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("wait for signals"))?;
    let mut ends = {
        let _context = runtime.enter();
        EndSignals::listen().map_err(system("wait for signals"))?
    };
    let server = RunningServer::start(setup)?;
    ready(&server);
    runtime.block_on(async {
        let mut interval = tokio::time::interval(LOOK_AFTER);
        loop {
            tokio::select! {
                name = ends.next() => {
                    tracing::info!("{name}: finishing what is in flight, then flushing");
                    return;
                }
                _ = interval.tick() => {
                    if server.has_failed() {
                        tracing::error!("a volume's thread has ended unexpectedly: stopping");
                        return;
                    }
                }
            }
        }
    });
    let stopping = std::thread::spawn(move || server.stop());
    runtime.block_on(async {
        let mut interval = tokio::time::interval(Duration::from_millis(5));
        while !stopping.is_finished() {
            tokio::select! {
                name = ends.next() => {
                    tracing::warn!("{name} again: ending without waiting");
                    std::process::exit(1);
                }
                _ = interval.tick() => {}
            }
        }
    });
    stopping.join().unwrap_or(Err(ServerError::ThreadEnded))
}

/// The signals that end a server.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Every client is a file descriptor, and so is every disk: take all that the
/// system allows.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays as it is: {errno}");
    }
}
