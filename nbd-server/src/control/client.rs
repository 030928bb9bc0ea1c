//! A blocking client of the control socket: one order, one answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::LINE_MAX;
use super::protocol::{Answer, Order, Outcome, Request, Response, VERSION};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error(
        "{}: no server takes orders there: start one with 'nbdsnap serve --control', or name its socket with --control ({error})", .path.display()
    )]
    NoServer {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// The connection broke.
    #[error("the server's control socket: {0}")]
    Socket(#[from] io::Error),
    /// It ended before an answer came.
    #[error("the server ended the connection without an answer: look at its log")]
    NoAnswer,
    /// An answer that cannot be read.
    #[error("the server's answer cannot be understood ({0}): is it of another version?")]
    Garbled(serde_json::Error),
    /// The server's own words.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a server's control socket.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connect to the control socket at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| ClientError::NoServer {
            path: path.to_owned(),
            error,
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Give an order, and wait for what comes of it.
    pub fn order(&mut self, order: Order) -> Result<Answer, ClientError> {
        let request = Request {
            version: VERSION,
            order,
        };
        let mut line = serde_json::to_vec(&request).expect("orders can be written");
        line.push(b'\n');
        // A server that refuses the connection says so before it reads anything.
        let sent = self.stream.get_mut().write_all(&line);
        match self.next_line() {
            Ok(Some(line)) => read_response(&line),
            Ok(None) => Err(sent.err().map_or(ClientError::NoAnswer, ClientError::from)),
            Err(error) => Err(error.into()),
        }
    }

    /// The next answer to an order that brings several; `None`: there are no more.
    pub fn next_answer(&mut self) -> Result<Option<Answer>, ClientError> {
        match self.next_line()? {
            Some(line) => read_response(&line).map(Some),
            None => Ok(None),
        }
    }

    fn next_line(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        // Answers may be longer than orders: a thousand snapshots, each with its state.
        let most = (LINE_MAX as u64) << 8;
        self.stream.by_ref().take(most).read_line(&mut line)?;
        Ok(line.ends_with('\n').then_some(line))
    }
}

fn read_response(line: &str) -> Result<Answer, ClientError> {
    let response: Response = serde_json::from_str(line).map_err(ClientError::Garbled)?;
    match response.outcome {
        Outcome::Done(answer) => Ok(answer),
        Outcome::Refused(why) => Err(ClientError::Refused(why)),
    }
}
