//! What an [`AgentClient`] can ask of a Linux guest.

use super::AgentClient;
use super::agent::AgentError;
use crate::agent::Response as Common;
use crate::agent::linux::{CHUNK, Either, Exec, Exit, Identity, Readiness, Request, Response, Stream, encode_request};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::io::{self, Read, Write};
use std::time::Instant;

/// What happens while a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// It has started.
    Started(Started),
    /// It has written something.
    Output(Stream, &'a [u8]),
}

/// A program that has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its number, for signals.
    pub exec: u32,
    /// Its process id in the guest.
    pub pid: u32,
}

/// How a program ended, and everything that it wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// How it ended.
    pub exit: Exit,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl AgentClient {
    /// Runs a program to its end, gives it `stdin` if it is to have one, and tells `event` what happens. If that takes
    /// longer than `until` the connection is of no further use, and dropping it kills the program.
    pub fn exec(
        &mut self,
        exec: &Exec,
        stdin: &[u8],
        until: Instant,
        mut event: impl FnMut(Event<'_>),
    ) -> Result<Exit, AgentError> {
        let (id, started) = self.start(exec, until)?;
        event(Event::Started(started));
        let mut input = Input { id, rest: stdin, ends: !exec.stdin, frame: Vec::new(), sent: 0 };
        loop {
            self.feed_until_readable(&mut input, until)?;
            match self.answer_to(id, until)?.body {
                Either::Linux(Response::Output { stream, data }) => event(Event::Output(stream, &data)),
                Either::Linux(Response::Exited(exit)) => {
                    // A frame that is half sent has to become whole before the next request.
                    self.stream.write_all(&input.frame[input.sent..])?;
                    return Ok(exit);
                }
                other => return Err(AgentError::Unexpected(other)),
            }
        }
    }

    /// Runs a program to its end and gathers what it writes.
    pub fn run(&mut self, exec: &Exec, stdin: &[u8], until: Instant) -> Result<Finished, AgentError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = self.exec(exec, stdin, until, |event| match event {
            Event::Output(Stream::Stderr, data) => stderr.extend_from_slice(data),
            Event::Output(_, data) => stdout.extend_from_slice(data),
            Event::Started(_) => {}
        })?;
        Ok(Finished { exit, stdout, stderr })
    }

    /// Starts a program that goes on by itself.
    pub fn exec_detached(&mut self, exec: &Exec) -> Result<Started, AgentError> {
        let exec = Exec { detached: true, ..exec.clone() };
        Ok(self.start(&exec, Instant::now() + self.patience)?.1)
    }

    fn start(&mut self, exec: &Exec, until: Instant) -> Result<(u32, Started), AgentError> {
        let answer = self.ask(&Either::Linux(Request::Exec(exec.clone())), until)?;
        match answer.body {
            Either::Linux(Response::Started { exec, pid }) => Ok((answer.id, Started { exec, pid })),
            other => Err(AgentError::Unexpected(other)),
        }
    }

    /// Sends input as the agent takes it, until there is an answer to read: a program may write before it has read.
    fn feed_until_readable(&mut self, input: &mut Input<'_>, until: Instant) -> Result<(), AgentError> {
        loop {
            input.next_frame()?;
            let sending = input.sent < input.frame.len();
            let events = if sending { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut fds = [PollFd::new(&self.stream, events)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) if left.is_zero() => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
            if fds[0].revents() != PollFlags::OUT {
                return Ok(());
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, &input.frame[input.sent..], flags) {
                Ok(len) => input.sent += len,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
    }

    /// Sends a signal to the process group of a program that runs.
    pub fn signal(&mut self, exec: u32, signal: i32) -> Result<(), AgentError> {
        self.done(Request::Signal { exec, signal })
    }

    /// Writes a file of `size` bytes in the guest: whole or not at all.
    pub fn put(&mut self, path: &str, mode: u32, size: u64, content: &mut dyn Read) -> Result<(), AgentError> {
        let until = Instant::now() + self.patience;
        let put = Request::Put { path: path.to_owned(), mode, size };
        let answer = self.ask(&Either::Linux(put), until)?;
        let id = answer.id;
        is_done(answer.body)?;
        let mut chunk = vec![0; CHUNK];
        loop {
            let len = content.read(&mut chunk)?;
            let data = Request::Data(chunk[..len].to_vec());
            self.send(id, &Either::Linux(data), Instant::now() + self.patience)?;
            if len == 0 {
                break;
            }
        }
        is_done(self.answer_to(id, Instant::now() + self.patience)?.body)
    }

    /// Reads a regular file of the guest; its permission bits.
    pub fn get(&mut self, path: &str, content: &mut dyn Write) -> Result<u32, AgentError> {
        let answer =
            self.ask(&Either::Linux(Request::Get { path: path.to_owned() }), Instant::now() + self.patience)?;
        let mode = match answer.body {
            Either::Linux(Response::File { mode, .. }) => mode,
            other => return Err(AgentError::Unexpected(other)),
        };
        loop {
            match self.answer_to(answer.id, Instant::now() + self.patience)?.body {
                Either::Linux(Response::Output { stream: Stream::File, data }) => content.write_all(&data)?,
                other => return is_done(other).map(|()| mode),
            }
        }
    }

    /// Tells a clone who it is; the generation that it took.
    pub fn identity(&mut self, identity: &Identity) -> Result<[u8; 16], AgentError> {
        let until = Instant::now() + self.patience;
        match self.ask(&Either::Linux(Request::Identity(identity.clone())), until)?.body {
            Either::Common(Common::Resumed { generation }) => Ok(generation),
            other => Err(AgentError::Unexpected(other)),
        }
    }

    /// How ready the guest is, and which units failed.
    pub fn readiness(&mut self) -> Result<Readiness, AgentError> {
        match self.ask_patiently(Request::Readiness)? {
            Either::Linux(Response::Readiness(readiness)) => Ok(readiness),
            other => Err(AgentError::Unexpected(other)),
        }
    }

    /// Has the guest run its hooks for a snapshot and write back its disks.
    pub fn pre_snapshot(&mut self) -> Result<(), AgentError> {
        self.done(Request::PreSnapshot)
    }

    /// Has the guest let go of what it remembers of files; how much memory nothing uses then, in KiB.
    pub fn trim(&mut self) -> Result<u64, AgentError> {
        match self.ask_patiently(Request::Trim)? {
            Either::Linux(Response::Trimmed { free_kib }) => Ok(free_kib),
            other => Err(AgentError::Unexpected(other)),
        }
    }

    /// Switches the guest off in order.
    pub fn power_off(&mut self) -> Result<(), AgentError> {
        self.done(Request::PowerOff)
    }

    /// Starts the guest again in order.
    pub fn reboot(&mut self) -> Result<(), AgentError> {
        self.done(Request::Reboot)
    }

    fn done(&mut self, request: Request) -> Result<(), AgentError> {
        is_done(self.ask_patiently(request)?)
    }

    /// Asks what is answered at once or by one message, within the patience there is.
    fn ask_patiently(&mut self, request: Request) -> Result<Either<Common, Response>, AgentError> {
        match self.ask(&Either::Linux(request), Instant::now() + self.patience) {
            Ok(answer) => Ok(answer.body),
            Err(AgentError::Io(e)) if e.kind() == io::ErrorKind::TimedOut => Err(AgentError::Slow(self.patience)),
            Err(other) => Err(other),
        }
    }
}

fn is_done(answer: Either<Common, Response>) -> Result<(), AgentError> {
    match answer {
        Either::Linux(Response::Done) => Ok(()),
        other => Err(AgentError::Unexpected(other)),
    }
}

/// Standard input that is still to be sent.
struct Input<'a> {
    id: u32,
    rest: &'a [u8],
    /// The end of it is in the frame, or was sent, or never will be.
    ends: bool,
    frame: Vec<u8>,
    sent: usize,
}

impl Input<'_> {
    /// Makes the next frame if the last one was sent.
    fn next_frame(&mut self) -> Result<(), AgentError> {
        if self.sent < self.frame.len() || self.ends {
            return Ok(());
        }
        let (chunk, rest) = self.rest.split_at(self.rest.len().min(CHUNK));
        // An empty chunk is the end.
        self.ends = chunk.is_empty();
        self.frame = encode_request(self.id, &Either::Linux(Request::Data(chunk.to_vec())))?;
        (self.rest, self.sent) = (rest, 0);
        Ok(())
    }
}
