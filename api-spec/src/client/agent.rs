//! A client of the agent in a guest, through the vsock device's Unix socket.

use super::unix;
use crate::agent::linux::{AnyRequest, AnyResponse, Either, Failure, decode_response, encode_request};
use crate::agent::{AGENT_PORT, Envelope, FrameError, HEADER_LEN, MAX_BODY, Refusal, Request, Response, body_len};
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
    /// The agent of a Linux guest tried and could not.
    #[error("the agent could not: {0}")]
    Failed(Failure),
    /// The answer belongs to another request.
    #[error("the agent answered {0:?}, which is no answer to what was asked")]
    Unexpected(AnyResponse),
}

/// A request that is not yet answered.
#[derive(Debug)]
#[must_use]
pub struct Asked {
    id: u32,
    deadline: Instant,
}

/// A connection to an agent.
#[derive(Debug)]
pub struct AgentClient {
    pub(super) stream: UnixStream,
    /// What the vmm still has to say about the connection itself.
    greeting_due: bool,
    next_id: u32,
    pub(super) patience: Duration,
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

    /// Takes over a stream that leads straight to an agent, with no vsock device in between.
    pub fn over(stream: UnixStream, patience: Duration) -> Self {
        AgentClient { stream, greeting_due: false, next_id: 1, patience }
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

    /// Waits until a guest that has no vsock device says over its serial port that it is ready.
    pub fn ready(&mut self) -> Result<(), AgentError> {
        match self.receive(Instant::now() + self.patience)?.body {
            Either::Common(Response::Ready { .. }) => Ok(()),
            other => Err(AgentError::Unexpected(other)),
        }
    }

    /// Asks and waits for the answer.
    pub fn call(&mut self, request: Request) -> Result<Response, AgentError> {
        let asked = self.begin(request)?;
        self.finish(asked)
    }

    /// Asks. Others can be asked before the answer is waited for.
    pub fn begin(&mut self, request: Request) -> Result<Asked, AgentError> {
        let deadline = Instant::now() + self.patience;
        let id = self.number(&Either::Common(request), deadline)?;
        Ok(Asked { id, deadline })
    }

    /// Waits for the answer to the first of what was asked and is not answered.
    pub fn finish(&mut self, Asked { id, deadline }: Asked) -> Result<Response, AgentError> {
        let answer = self.greet(deadline).and_then(|()| self.answer_to(id, deadline)).map_err(|e| match e {
            AgentError::Io(e) if e.kind() == io::ErrorKind::TimedOut => AgentError::Slow(self.patience),
            other => other,
        })?;
        match answer.body {
            Either::Common(response) => Ok(response),
            other => Err(AgentError::Unexpected(other)),
        }
    }

    /// Asks and waits for the first answer; a refusal or a failure is an error.
    pub(super) fn ask(&mut self, request: &AnyRequest, deadline: Instant) -> Result<Envelope<AnyResponse>, AgentError> {
        let id = self.post(request, deadline)?;
        self.answer_to(id, deadline)
    }

    /// Asks, and waits for the connection if there is none yet; the number of the request.
    fn post(&mut self, request: &AnyRequest, deadline: Instant) -> Result<u32, AgentError> {
        let id = self.number(request, deadline)?;
        self.greet(deadline)?;
        Ok(id)
    }

    /// Sends a request with the next number.
    fn number(&mut self, request: &AnyRequest, deadline: Instant) -> Result<u32, AgentError> {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        self.send(id, request, deadline)?;
        Ok(id)
    }

    /// Reads what the vmm says of the connection itself, if it has not yet.
    fn greet(&mut self, deadline: Instant) -> Result<(), AgentError> {
        if std::mem::take(&mut self.greeting_due) { self.receive_greeting(deadline) } else { Ok(()) }
    }

    /// Waits for the next answer to the request `id`; a refusal or a failure is an error.
    pub(super) fn answer_to(&mut self, id: u32, deadline: Instant) -> Result<Envelope<AnyResponse>, AgentError> {
        let answer = self.receive(deadline)?;
        match answer.body {
            // An agent that is too busy for a connection says so before it has read anything: number 0.
            Either::Common(Response::Refused(refusal)) if [0, id].contains(&answer.id) => {
                Err(AgentError::Refused(refusal))
            }
            body if answer.id != id => Err(AgentError::Unexpected(body)),
            Either::Linux(crate::agent::linux::Response::Failed(failure)) => Err(AgentError::Failed(failure)),
            body => Ok(Envelope { id, body }),
        }
    }

    pub(super) fn send(&mut self, id: u32, message: &AnyRequest, deadline: Instant) -> Result<(), AgentError> {
        let frame = encode_request(id, message)?;
        unix::limit(&self.stream, deadline)?;
        Ok(self.stream.write_all(&frame)?)
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

    fn receive(&mut self, deadline: Instant) -> Result<Envelope<AnyResponse>, AgentError> {
        let mut header = [0; HEADER_LEN];
        self.read_exact(&mut header, deadline)?;
        let len = body_len(&header)?;
        debug_assert!(len <= MAX_BODY);
        let mut body = vec![0; len];
        self.read_exact(&mut body, deadline)?;
        Ok(decode_response(&body)?)
    }

    fn read_exact(&mut self, buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        let mut rest = buf;
        while !rest.is_empty() {
            // Each time anew: a guest that sends a byte now and then has no longer than another.
            unix::limit(&self.stream, deadline)?;
            match self.stream.read(rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => rest = &mut rest[len..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Whether an error is one that a guest or a vmm gives that is still starting.
fn is_not_yet(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | UnexpectedEof | BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that sends a byte of its answer now and then has no longer than one that sends nothing.
    #[test]
    fn a_slow_answer_is_no_answer() {
        const BYTES: u16 = 2000;
        let (near, mut far) = UnixStream::pair().unwrap();
        let drip = std::thread::spawn(move || {
            let header = [BYTES.to_le_bytes(), [0, 0], 1u16.to_le_bytes(), [0, 0]].concat();
            for byte in header.into_iter().chain((0..BYTES).map(|_| 0)) {
                if far.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let mut client = AgentClient::over(near, Duration::from_millis(300));
        let answer = client.trim();
        assert!(matches!(answer, Err(AgentError::Slow(_))), "{answer:?}");
        drop(client);
        drip.join().unwrap();
    }
}
