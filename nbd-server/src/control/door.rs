//! The server's end of the control socket: a thread that accepts clients, reads
//! their lines and hands orders to the administrator, who executes them one
//! after the other. Nothing that a client does here reaches further than its own
//! connection.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::protocol::{Answer, Order, Outcome, Request, Response, VERSION};
use super::{CLIENTS_MAX, LINE_MAX, SILENCE};
use crate::server::events::Events;

/// After a failed accept (no file descriptor left, mostly) the next one waits.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client that does not take its answer for so long is dropped.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Who executes orders.
pub trait Office: Send + Sync + 'static {
    /// Have `order` executed; the outcome is sent to `answer`. Does not wait.
    fn submit(&self, order: Order, answer: oneshot::Sender<Outcome>);

    /// What happens, for those who follow it.
    fn events(&self) -> &Events;
}

/// A handle to the thread. [`Door::close`] ends it and takes the socket away.
#[derive(Debug)]
pub struct Door {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    path: PathBuf,
}

impl Door {
    /// Begin to take orders at a socket that listens.
    pub fn open(listener: StdListener, path: PathBuf, office: Arc<dyn Office>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        listener.set_nonblocking(true)?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let builder = std::thread::Builder::new().name("control".into());
        let thread = builder.spawn(move || {
            let end = async {
                tokio::select! {
                    () = accept(&listener, office) => {}
                    // A dropped handle is an end too.
                    _ = stopped => {}
                }
            };
            runtime.block_on(end);
        })?;
        Ok(Self { stop, thread, path })
    }

    /// Take no more orders, drop those who wait, remove the socket.
    pub fn close(self) {
        let _ = self.stop.send(());
        let _ = self.thread.join();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

async fn accept(listener: &UnixListener, office: Arc<dyn Office>) {
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => {
                    let office = Arc::clone(&office);
                    tokio::spawn(async move {
                        serve(stream, office.as_ref()).await;
                        drop(place);
                    });
                }
                Err(_) => refuse_at_the_door(&stream),
            },
            Err(error) => {
                tracing::warn!("the control socket cannot be answered: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One line for whoever finds the room full, as far as the socket takes it at once.
fn refuse_at_the_door(stream: &UnixStream) {
    let full = format!("{CLIENTS_MAX} clients give orders already: try again in a moment");
    let _ = stream.try_write(&line_of(Outcome::Refused(full)));
}

async fn serve(stream: UnixStream, office: &dyn Office) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let (outcome, go_on) = match next_order(&mut reader).await {
            Heard::Order(Order::Events(wanted)) if wanted.follow => {
                return follow(&mut reader, &mut writer, office.events(), wanted.after).await;
            }
            Heard::Order(Order::Events(wanted)) => {
                let events = office.events().since(wanted.after.unwrap_or(0));
                (Outcome::Done(Answer::Events(events)), true)
            }
            Heard::Order(order) => {
                let (answer, outcome) = oneshot::channel();
                office.submit(order, answer);
                let stopping = || Outcome::Refused("the server is stopping".into());
                (outcome.await.unwrap_or_else(|_| stopping()), true)
            }
            Heard::Nonsense(why) => (Outcome::Refused(why), false),
            Heard::Nothing => return,
        };
        if say(&mut writer, outcome).await.is_err() || !go_on {
            return;
        }
    }
}

/// Tell of every event until the client has gone or takes no more.
async fn follow(
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    events: &Events,
    after: Option<u64>,
) {
    let mut more = events.subscribe();
    let mut told = after.unwrap_or(*more.borrow_and_update());
    let mut byte = [0];
    loop {
        let new = events.since(told);
        if let Some(last) = new.last() {
            told = last.sequence;
            if say(writer, Outcome::Done(Answer::Events(new)))
                .await
                .is_err()
            {
                return;
            }
        }
        tokio::select! {
            changed = more.changed() => if changed.is_err() { return },
            // Whatever it is, a follower has nothing to say: it has gone.
            _ = reader.read(&mut byte) => return,
        }
    }
}

async fn say(writer: &mut OwnedWriteHalf, outcome: Outcome) -> io::Result<()> {
    let line = line_of(outcome);
    timeout(ANSWER_TIME, writer.write_all(&line))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn line_of(outcome: Outcome) -> Vec<u8> {
    let response = Response {
        version: VERSION,
        outcome,
    };
    let mut line = serde_json::to_vec(&response).expect("answers can be written");
    line.push(b'\n');
    line
}

/// What a client has said.
enum Heard {
    Order(Order),
    /// Something that is no order, and why.
    Nonsense(String),
    /// It has gone, or said nothing for too long.
    Nothing,
}

async fn next_order(reader: &mut BufReader<OwnedReadHalf>) -> Heard {
    let mut line = Vec::new();
    let most = LINE_MAX as u64;
    let read = async { reader.take(most).read_until(b'\n', &mut line).await };
    match timeout(SILENCE, read).await {
        Ok(Ok(0) | Err(_)) => return Heard::Nothing,
        Err(_) if line.is_empty() => return Heard::Nothing,
        Err(_) => {
            let waited = SILENCE.as_secs();
            return Heard::Nonsense(format!("no end of the line within {waited} seconds"));
        }
        Ok(Ok(_)) if line.len() as u64 == most && !line.ends_with(b"\n") => {
            return Heard::Nonsense(format!("a line of more than {LINE_MAX} bytes"));
        }
        Ok(Ok(_)) => {}
    }
    understand(&line)
}

fn understand(line: &[u8]) -> Heard {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    // The version first: what else is in the line depends on it.
    match serde_json::from_slice::<Versioned>(line) {
        Ok(Versioned { version }) if version != VERSION => Heard::Nonsense(format!(
            "version {version} of the control protocol is not spoken here, only {VERSION}"
        )),
        Ok(_) => match serde_json::from_slice::<Request>(line) {
            Ok(request) => Heard::Order(request.order),
            Err(error) => Heard::Nonsense(format!("not an order: {error}")),
        },
        Err(error) => Heard::Nonsense(format!(
            "not a line of the control protocol, which has one JSON object a line: {error}"
        )),
    }
}
