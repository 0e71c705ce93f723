//! Programs that run for the host.
//!
//! One thread serves a program and its connection: it polls the socket, the program's three pipes and the program itself.
//! Everything it keeps has a limit; whoever is too slow is simply not read from.

use crate::spawn::{Process, command};
use crate::stream::{Broken, Stream, timeout};
use crate::users::Account;
use api_spec::agent::linux::{
    AnyRequest, AnyResponse, CHUNK, Either, Exec, Exit, Failure, Part, Request, Response, Stream as From,
    encode_response,
};
use api_spec::agent::{Refusal, Response as Common};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, ioctl_fionbio, read, write};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::HashMap;
use std::io;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Programs that may run at a time.
pub const MAX_PROGRAMS: usize = 24;
/// Standard input that is kept for a program that does not read, in bytes; one message may go beyond.
const MAX_PENDING: usize = 128 * 1024;
/// Output that is kept for a host that does not read, in bytes; one message of each stream may go beyond.
const MAX_OUTBOX: usize = 128 * 1024;
/// What is still read from the pipes of a program that has ended, in bytes: the most that a pipe holds.
const MAX_LEFTOVER: usize = 2 * 1024 * 1024;
/// When a program has ended, others may hold its pipes open. They are let go after so long a silence.
const SILENCE: Duration = Duration::from_millis(250);

/// The programs that run.
#[derive(Debug, Default)]
pub struct Programs {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    last: u32,
    running: HashMap<u32, Pid>,
}

/// Why a program does not run.
#[derive(Debug)]
enum NotStarted {
    /// Too many do.
    Busy,
    /// It could not be started.
    Failed(Failure),
}

impl NotStarted {
    fn response(self) -> AnyResponse {
        match self {
            NotStarted::Busy => Either::Common(Common::Refused(Refusal::Busy)),
            NotStarted::Failed(failure) => Either::Linux(Response::Failed(failure)),
        }
    }
}

/// A program that runs, and its place in the table.
#[derive(Debug)]
struct Program {
    number: u32,
    process: Option<Process>,
    programs: Arc<Programs>,
}

impl Programs {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal to the process group of a program.
    pub fn signal(&self, number: u32, signal: i32) -> AnyResponse {
        // The lock is held over the call: a program leaves the table before its process id is freed.
        let table = self.table();
        let sent = match (table.running.get(&number), Signal::from_named_raw(signal)) {
            (None, _) => Err(format!("program {number} does not run")),
            (_, None) => Err(format!("there is no signal {signal}")),
            (Some(pid), Some(signal)) => kill_process_group(*pid, signal).map_err(|e| e.to_string()),
        };
        match sent {
            Ok(()) => Either::Linux(Response::Done),
            Err(detail) => Either::Linux(Response::Failed(Failure { part: Part::Exec, detail })),
        }
    }

    fn start(self: &Arc<Self>, exec: &Exec) -> Result<Program, NotStarted> {
        let failed = |detail: String| NotStarted::Failed(Failure { part: Part::Exec, detail });
        let program = exec.argv.first().ok_or_else(|| failed("no program is named".into()))?;
        let account = match &exec.user {
            Some(who) => Account::named(who).map_err(|e| failed(e.to_string()))?,
            None => Account::of_agent(),
        };
        if exec.env.iter().any(|(name, _)| name.is_empty() || name.contains('=')) {
            return Err(failed("a variable's name is empty or has a `=` in it".into()));
        }
        let mut command = command(program, &account, exec.user.is_none());
        command.args(&exec.argv[1..]).envs(exec.env.iter().map(|(name, value)| (name, value)));
        if let Some(cwd) = &exec.cwd {
            command.current_dir(cwd);
        }
        let pipe = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
        command.stdin(pipe(exec.stdin && !exec.detached));
        command.stdout(pipe(!exec.detached)).stderr(pipe(!exec.detached));

        let mut table = self.table();
        if table.running.len() >= MAX_PROGRAMS {
            return Err(NotStarted::Busy);
        }
        let process = Process::start(&mut command).map_err(|e| failed(cannot_run(exec, &e)))?;
        table.last = table.last.wrapping_add(1).max(1);
        let number = table.last;
        table.running.insert(number, process.pid());
        Ok(Program { number, process: Some(process), programs: Arc::clone(self) })
    }
}

fn cannot_run(exec: &Exec, error: &io::Error) -> String {
    let within = exec.cwd.as_ref().map(|cwd| format!(" in `{cwd}`")).unwrap_or_default();
    let as_whom = exec.user.as_ref().map(|user| format!(" as `{user}`")).unwrap_or_default();
    format!("cannot run `{}`{within}{as_whom}: {error}", exec.argv[0])
}

impl Program {
    /// Its process, which it has until it ends.
    fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Takes it off the table, and then what is left of the process.
    fn take(&mut self) -> Option<Process> {
        self.programs.table().running.remove(&self.number);
        self.process.take()
    }

    fn kill(&mut self) {
        if let Some(process) = self.process() {
            process.kill();
        }
    }

    /// Waits for a program that nobody listens to.
    fn finish(mut self, deadline: Option<Instant>) {
        if let Some(process) = self.process() {
            let _ = process.wait_until(deadline);
        }
    }
}

impl Drop for Program {
    /// Kills it if it still runs.
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// Runs a program for the host and converses with it until the program ends or the connection breaks.
pub fn converse(stream: &mut Stream, id: u32, exec: &Exec, programs: &Arc<Programs>) -> Result<(), Broken> {
    let deadline = exec.deadline_ms.map(|ms| Instant::now() + Duration::from_millis(ms.into()));
    let mut program = match programs.start(exec) {
        Ok(program) => program,
        Err(not_started) => return stream.send(id, &not_started.response()),
    };
    let pid = program.process().map_or(0, |process| process.pid().as_raw_nonzero().get().unsigned_abs());
    let started = Either::Linux(Response::Started { exec: program.number, pid });
    if exec.detached {
        let waiter = std::thread::Builder::new().name("detached".into()).spawn(move || program.finish(deadline));
        let answer = waiter.map(|_| started).unwrap_or_else(|e| {
            Either::Linux(Response::Failed(Failure { part: Part::Exec, detail: format!("no thread for it: {e}") }))
        });
        return stream.send(id, &answer);
    }
    stream.send(id, &started)?;
    let exit = Conversation::new(stream, id, program, deadline)?.run()?;
    stream.send(id, &Either::Linux(Response::Exited(exit)))
}

/// A program and its connection.
struct Conversation<'s> {
    stream: &'s mut Stream,
    id: u32,
    program: Program,
    deadline: Option<Instant>,
    stdin: Option<OwnedFd>,
    /// What the program has not yet read, and whether the host has sent the end of it.
    pending: Vec<u8>,
    ends: bool,
    outputs: [Option<OwnedFd>; 2],
    /// What the host has not yet taken: frames.
    outbox: Vec<u8>,
    ended: Option<Leftover>,
    overdue: bool,
}

/// What may still come out of the pipes of a program that has ended.
struct Leftover {
    bytes: usize,
    until: Instant,
}

/// What a descriptor in the poll set is.
#[derive(Clone, Copy)]
enum Source {
    Stdin,
    Output(usize),
    Program,
}

impl<'s> Conversation<'s> {
    fn new(stream: &'s mut Stream, id: u32, mut program: Program, deadline: Option<Instant>) -> Result<Self, Broken> {
        let (mut stdin, mut outputs) = (None, [None, None]);
        if let Some(process) = program.process() {
            let child = process.child();
            stdin = child.stdin.take().map(OwnedFd::from);
            outputs = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
        }
        for pipe in outputs.iter().chain([&stdin]).flatten() {
            ioctl_fionbio(pipe, true)?;
        }
        let (pending, outbox) = (Vec::new(), Vec::new());
        let (ends, ended, overdue) = (false, None, false);
        Ok(Conversation { stream, id, program, deadline, stdin, pending, ends, outputs, outbox, ended, overdue })
    }

    /// Goes on until the program has ended and the host has everything that it wrote.
    fn run(mut self) -> Result<Exit, Broken> {
        loop {
            while self.listens() {
                let Some(request) = self.stream.next_request()? else { break };
                self.take_in(request.id, request.body)?;
            }
            if self.outbox.is_empty() && self.has_nothing_left() {
                break;
            }
            self.wait()?;
            if self.ended.is_none() && !self.overdue && self.deadline.is_some_and(|at| Instant::now() >= at) {
                self.overdue = true;
                self.program.kill();
            }
        }
        let exit = self.program.take().map_or(Exit::Signal(0), Process::reap);
        Ok(if self.overdue { Exit::Deadline } else { exit })
    }

    /// Whether more requests may be taken in.
    fn listens(&self) -> bool {
        self.pending.len() < MAX_PENDING && self.outbox.len() < MAX_OUTBOX
    }

    fn has_nothing_left(&self) -> bool {
        let Some(leftover) = &self.ended else { return false };
        let silent = leftover.bytes == 0 || Instant::now() >= leftover.until;
        self.outputs.iter().all(Option::is_none) || silent
    }

    fn take_in(&mut self, id: u32, request: AnyRequest) -> Result<(), Broken> {
        let answer = match request {
            Either::Linux(Request::Data(data)) => {
                if id == self.id && self.stdin.is_some() && !self.ends {
                    self.ends = data.is_empty();
                    self.pending.extend_from_slice(&data);
                    self.feed();
                }
                return Ok(());
            }
            Either::Linux(Request::Signal { exec, signal }) => self.program.programs.signal(exec, signal),
            _ => Either::Common(Common::Refused(Refusal::Busy)),
        };
        self.outbox.extend(encode_response(id, &answer)?);
        Ok(())
    }

    /// Waits until something can be done, and does it.
    fn wait(&mut self) -> Result<(), Broken> {
        let listening = if self.listens() { PollFlags::IN } else { PollFlags::empty() };
        let sending = if self.outbox.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        let reads = self.outbox.len() < MAX_OUTBOX;
        let mut until = if self.ended.is_some() || self.overdue { None } else { self.deadline };
        if let (Some(leftover), true) = (&self.ended, reads) {
            until = Some(leftover.until);
        }
        let mut sources = Vec::with_capacity(4);
        let mut fds = vec![PollFd::new(&*self.stream, listening | sending | PollFlags::RDHUP)];
        if let (Some(stdin), false) = (&self.stdin, self.pending.is_empty()) {
            fds.push(PollFd::new(stdin, PollFlags::OUT));
            sources.push(Source::Stdin);
        }
        for (index, output) in self.outputs.iter().enumerate() {
            if let (Some(output), true) = (output, reads) {
                fds.push(PollFd::new(output, PollFlags::IN));
                sources.push(Source::Output(index));
            }
        }
        if let (Some(process), None) = (&self.program.process, &self.ended) {
            fds.push(PollFd::from_borrowed_fd(process.ended_fd(), PollFlags::IN));
            sources.push(Source::Program);
        }
        match poll(&mut fds, timeout(until).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let of_stream = fds[0].revents();
        let ready: Vec<Source> =
            fds[1..].iter().zip(sources).filter(|(fd, _)| !fd.revents().is_empty()).map(|(_, s)| s).collect();
        drop(fds);
        if of_stream.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR) {
            return Err(Broken::Closed);
        }
        if of_stream.contains(PollFlags::IN) {
            self.stream.fill()?;
        }
        for source in ready {
            match source {
                Source::Stdin => self.feed(),
                Source::Output(index) => self.read(index)?,
                Source::Program => {
                    self.stdin = None;
                    self.pending = Vec::new();
                    self.ended = Some(Leftover { bytes: MAX_LEFTOVER, until: Instant::now() + SILENCE });
                }
            }
        }
        let sent = self.stream.push(&self.outbox)?;
        self.outbox.drain(..sent);
        Ok(())
    }

    /// Gives the program what its pipe takes.
    fn feed(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        while !self.pending.is_empty() {
            match write(stdin, &self.pending) {
                Ok(len) => drop(self.pending.drain(..len)),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => {
                    // It reads no more.
                    self.pending = Vec::new();
                    self.stdin = None;
                    return;
                }
            }
        }
        if self.ends {
            self.stdin = None;
        }
    }

    fn read(&mut self, index: usize) -> Result<(), Broken> {
        let Some(output) = &self.outputs[index] else { return Ok(()) };
        let mut data = vec![0; CHUNK];
        let len = match read(output, &mut data) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => 0,
        };
        if len == 0 {
            self.outputs[index] = None;
            return Ok(());
        }
        data.truncate(len);
        if let Some(leftover) = &mut self.ended {
            leftover.bytes = leftover.bytes.saturating_sub(len);
            leftover.until = Instant::now() + SILENCE;
        }
        let stream = if index == 0 { From::Stdout } else { From::Stderr };
        self.outbox.extend(encode_response(self.id, &Either::Linux(Response::Output { stream, data }))?);
        Ok(())
    }
}
