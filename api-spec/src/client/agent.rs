//! A client of the agent in a guest, through the vsock device's Unix socket.

use super::unix;
use crate::agent::{
    AGENT_PORT, Envelope, FrameError, HEADER_LEN, MAX_BODY, Refusal, Request, Response, body_len, decode, encode,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Why an agent did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The connection could not be made or broke.
    #[error("no connection to the agent: {0}")]
    Io(#[from] io::Error),
    /// It took too long.
    #[error("the agent did not answer within {} s", .0.as_secs())]
    Slow(Duration),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The agent said no.
    #[error("the agent refused: {0}")]
    Refused(Refusal),
    /// The answer belongs to another request.
    #[error("the agent answered {0:?}, which is no answer to what was asked")]
    Unexpected(Response),
}

/// A connection to an agent.
#[derive(Debug)]
pub struct AgentClient {
    stream: UnixStream,
    /// What the vmm still has to say about the connection itself.
    greeting_due: bool,
    next_id: u32,
    patience: Duration,
}

impl AgentClient {
    /// Connects to the agent behind the vsock device at `uds_path`. Each later call may take `patience`.
    ///
    /// The vmm's answer to the connection is read with the first reply, so that a first request costs one round trip.
    pub fn connect(uds_path: &Path, patience: Duration) -> Result<Self, AgentError> {
        let mut stream = unix::connect(uds_path, patience)?;
        unix::limit(&stream, Instant::now() + patience)?;
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
        Ok(AgentClient { stream, greeting_due: true, next_id: 1, patience })
    }

    /// Connects and asks, again and again until an answer comes or `deadline` has passed: for a guest that is starting.
    pub fn first_reply(
        uds_path: &Path,
        patience: Duration,
        deadline: Instant,
        request: Request,
    ) -> Result<(Self, Response), AgentError> {
        const PAUSE: Duration = Duration::from_micros(100);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let tried = Self::connect(uds_path, patience.min(left.max(PAUSE))).and_then(|mut client| {
                let response = client.call(request)?;
                client.set_patience(patience);
                Ok((client, response))
            });
            match tried {
                Err(AgentError::Io(e)) if Instant::now() < deadline && is_not_yet(&e) => std::thread::sleep(PAUSE),
                other => return other.map(|(client, answer)| (AgentClient { patience, ..client }, answer)),
            }
        }
    }

    /// Changes how long each later call may take.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Asks and waits for the answer.
    pub fn call(&mut self, request: Request) -> Result<Response, AgentError> {
        let deadline = Instant::now() + self.patience;
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        self.send(&Envelope { id, body: request }, deadline)?;
        if std::mem::take(&mut self.greeting_due) {
            self.receive_greeting(deadline)?;
        }
        let answer = self.receive(deadline).map_err(|e| match e {
            AgentError::Io(e) if e.kind() == io::ErrorKind::TimedOut => AgentError::Slow(self.patience),
            other => other,
        })?;
        match answer.body {
            _ if answer.id != id => Err(AgentError::Unexpected(answer.body)),
            Response::Refused(refusal) => Err(AgentError::Refused(refusal)),
            body => Ok(body),
        }
    }

    fn send(&mut self, message: &Envelope<Request>, deadline: Instant) -> Result<(), AgentError> {
        let mut buf = [0; 256];
        let frame = encode(message, &mut buf)?;
        unix::limit(&self.stream, deadline)?;
        Ok(self.stream.write_all(frame)?)
    }

    /// Reads `OK <port>\n`, a byte at a time so that nothing of the stream behind it is taken.
    fn receive_greeting(&mut self, deadline: Instant) -> Result<(), AgentError> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            self.read_exact(&mut byte, deadline)?;
            line.push(byte[0]);
            if line.len() > 32 {
                break;
            }
        }
        if line.starts_with(b"OK ") {
            return Ok(());
        }
        let what = format!("the vsock socket answered `{}` instead of `OK`", String::from_utf8_lossy(&line).trim_end());
        Err(io::Error::new(io::ErrorKind::InvalidData, what).into())
    }

    fn receive(&mut self, deadline: Instant) -> Result<Envelope<Response>, AgentError> {
        let mut header = [0; HEADER_LEN];
        self.read_exact(&mut header, deadline)?;
        let len = body_len(&header)?;
        debug_assert!(len <= MAX_BODY);
        let mut body = vec![0; len];
        self.read_exact(&mut body, deadline)?;
        Ok(decode(&body)?)
    }

    fn read_exact(&mut self, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        unix::limit(&self.stream, deadline)?;
        self.stream.read_exact(buf).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => e,
        })
    }
}

/// Whether an error is one that a guest or a vmm gives that is still starting.
fn is_not_yet(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | UnexpectedEof | BrokenPipe)
}
