//! The guests that are measured: ordinary `vmm` processes in a directory of their own, and what is asked of them.

use super::{BenchError, io_error};
use crate::children::{Child, Children};
use api_spec::agent::{Pages, Request, Response};
use api_spec::client::agent::AgentError;
use api_spec::client::{AgentClient, RestClient, VmClient};
use api_spec::snapshot::{SnapshotCreate, SnapshotStatus};
use api_spec::vm::{BootSource, InstanceInfo, MachineConfig, VmConfig, Vsock};
use serde::Serialize;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use uffd_handler::process::Signals;

/// How long anything may take that takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How often to look whether somebody listens.
const AGAIN: Duration = Duration::from_micros(500);

/// Where a benchmark works: a temporary directory, and the processes that are started in it.
pub struct Workplace {
    dir: TempDir,
    /// Starts this program, and others.
    pub children: Children,
    /// What ends the benchmark early: it is looked for at each step, so that processes and files are cleared away.
    signals: Signals,
    /// How long a guest may take to answer.
    patience: Duration,
}

/// How the agent of a guest is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Channel {
    /// Over the socket of the vsock device.
    Vsock,
    /// Over COM1, which is a process's standard input and output.
    Serial,
}

/// A guest that answers.
pub struct Guest {
    /// Its process.
    pub child: Child,
    /// The API of its vmm.
    pub api: Api,
    agent: Option<AgentClient>,
}

/// A vmm that waits for a guest, with everything built for it.
pub struct Shell {
    /// Its process.
    _child: Child,
    /// Its API.
    pub api: PathBuf,
    /// A connection to that.
    pub client: RestClient,
    /// Where the guest will be called.
    vsock: PathBuf,
    /// The other end of its COM1, if that is how it will be called.
    line: Option<UnixStream>,
}

/// The API of a vmm that runs.
#[derive(Clone)]
pub struct Api {
    path: PathBuf,
    patience: Duration,
}

/// A snapshot that was taken.
#[derive(Clone, Debug)]
pub struct Taken {
    /// What the vmm says of it.
    pub status: SnapshotStatus,
    /// How long whoever asked for it waited.
    pub call: Duration,
}

impl Workplace {
    /// A new one, whose guests may take so long to answer. To be called before there are other threads.
    pub fn new(patience: Duration) -> Result<Self, BenchError> {
        let signals = Signals::catch().map_err(io_error("cannot block signals"))?;
        let dir = TempDir::new().map_err(io_error("cannot make a temporary directory"))?;
        Ok(Workplace { dir, children: Children::new()?, signals, patience })
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A directory for what is needed for a while only.
    pub fn room(&self) -> Result<TempDir, BenchError> {
        TempDir::new_in(self.dir.path()).map_err(io_error("cannot make a temporary directory"))
    }

    /// Starts a page server that serves a snapshot, with more arguments, and waits until it listens.
    pub fn start_page_server(&self, snapshot: &Path, socket: &Path, more: &[&str]) -> Result<Child, BenchError> {
        let _ = std::fs::remove_file(socket);
        let mut server = self.children.start("page server", &socket.with_extension("log"), |vmm| {
            vmm.arg("uffd-handler").arg("--socket").arg(socket).arg("--snapshot").arg(snapshot).args(more);
        })?;
        wait_for_listener(&mut server, socket)?;
        Ok(server)
    }

    /// Has a page server learn what a clone of a snapshot uses that does something, so that it is got ready for later ones.
    pub fn learn(
        &self,
        snapshot: &Path,
        something: impl FnOnce(&mut Guest) -> Result<(), BenchError>,
    ) -> Result<(), BenchError> {
        let (socket, learnt) = (self.path("learn.sock"), snapshot.join(::snapshot::file::WORKING_SET));
        let mut server = self.start_page_server(snapshot, &socket, &["--record", "1"])?;
        let mut clone = self.restore(snapshot, |vmm| {
            vmm.arg("--uffd").arg(&socket);
        })?;
        something(&mut clone)?;
        let deadline = Instant::now() + PATIENCE;
        while !learnt.exists() {
            clone.child.check_alive()?;
            server.check_alive()?;
            if Instant::now() > deadline {
                return Err(BenchError::Late("the page server has not learnt what a clone uses", PATIENCE));
            }
            std::thread::sleep(AGAIN);
        }
        Ok(())
    }

    /// Boots the embedded guest.
    pub fn boot(&self, machine_config: MachineConfig) -> Result<Guest, BenchError> {
        self.boot_as("guest", machine_config)
    }

    /// The same of one that is called by a name.
    pub fn boot_as(&self, name: &str, machine_config: MachineConfig) -> Result<Guest, BenchError> {
        let (config, vsock) = (self.path(&format!("{name}.json")), self.path(&format!("{name}.vsock")));
        let document = VmConfig {
            boot_source: Some(BootSource { embedded_guest: true, ..Default::default() }),
            machine_config,
            vsock: Some(Vsock { guest_cid: 3, uds_path: vsock.clone(), vsock_id: None }),
            ..Default::default()
        };
        write_config(&config, &document)?;
        self.start((name, Channel::Vsock), &vsock, &[], |vmm| {
            vmm.arg("--config").arg(&config);
        })
    }

    /// Restores a clone, with the options that `more` adds.
    pub fn restore(&self, snapshot: &Path, more: impl FnOnce(&mut Command)) -> Result<Guest, BenchError> {
        self.restore_as("clone", snapshot, more)
    }

    /// The same of one that is called by a name.
    pub fn restore_as(
        &self,
        name: &str,
        snapshot: &Path,
        more: impl FnOnce(&mut Command),
    ) -> Result<Guest, BenchError> {
        self.restore_and_ask((name, Channel::Vsock), snapshot, &[], more)
    }

    /// The same of one that is asked something first, in this way.
    pub fn restore_and_ask(
        &self,
        (name, channel): (&str, Channel),
        snapshot: &Path,
        requests: &[Request],
        more: impl FnOnce(&mut Command),
    ) -> Result<Guest, BenchError> {
        let vsock = self.path(&format!("{name}.vsock"));
        self.start((name, channel), &vsock, requests, |vmm| {
            vmm.arg("--restore").arg(snapshot).arg("--vsock").arg(&vsock);
            // Nobody uses the clones for anything, so they need not become themselves first.
            vmm.arg("--same-generation");
            more(vmm);
        })
    }

    /// Starts a shell for guests of this size, which will be called in this way, and waits until it is ready.
    pub fn shell(&self, name: &str, machine_config: MachineConfig, channel: Channel) -> Result<Shell, BenchError> {
        let path = |kind: &str| self.path(&format!("{name}.{kind}"));
        let (config, api, vsock) = (path("json"), path("sock"), path("vsock"));
        let document = VmConfig {
            machine_config,
            vsock: Some(Vsock { guest_cid: 3, uds_path: vsock.clone(), vsock_id: None }),
            ..Default::default()
        };
        write_config(&config, &document)?;
        let (line, theirs) = line(channel)?;
        let mut child = self.children.start(name, &path("log"), |vmm| {
            vmm.arg("--shell").arg(&config).arg("--api-sock").arg(&api);
            lead(vmm, theirs);
        })?;
        wait_for_listener(&mut child, &vsock)?;
        let failed = |source| BenchError::Api { what: "a shell is not ready", source };
        let mut client = RestClient::connect(&api, PATIENCE).map_err(failed)?;
        // It answers once all of it is ready.
        client.get::<InstanceInfo>("/").map_err(failed)?;
        Ok(Shell { _child: child, api, client, vsock, line })
    }

    /// Calls the agent of a guest that listens as soon as it runs.
    fn call(&self, child: &mut Child, vsock: &Path) -> Result<AgentClient, BenchError> {
        self.keep_trying(child, || AgentClient::connect(vsock, self.patience).map_err(BenchError::Agent))
    }

    /// Tries until the API of a process takes a connection.
    pub fn connect(&self, child: &mut Child, api: &Path) -> Result<RestClient, BenchError> {
        let failed = |source| BenchError::Api { what: "a VMM cannot be called", source };
        self.keep_trying(child, || RestClient::connect(api, PATIENCE).map_err(failed))
    }

    /// Tries until it works, as long as a process lives.
    pub fn keep_trying<T>(
        &self,
        child: &mut Child,
        mut attempt: impl FnMut() -> Result<T, BenchError>,
    ) -> Result<T, BenchError> {
        // Oftener would take the processor from the process that is waited for.
        const SOON: Duration = Duration::from_micros(100);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt() {
                Err(_) if Instant::now() < deadline => std::thread::sleep(SOON),
                done => return done,
            }
            self.go_on()?;
            child.check_alive()?;
        }
    }

    /// Starts a vmm, asks its guest these, or else whether it is there, and waits for its replies.
    fn start(
        &self,
        (name, channel): (&str, Channel),
        vsock: &Path,
        requests: &[Request],
        arguments: impl FnOnce(&mut Command),
    ) -> Result<Guest, BenchError> {
        let api = Api { path: self.path(&format!("{name}.sock")), patience: self.patience };
        for socket in [vsock, &api.path] {
            let _ = std::fs::remove_file(socket);
        }
        let (line, theirs) = line(channel)?;
        let mut child = self.children.start(name, &self.path(&format!("{name}.log")), |vmm| {
            arguments(vmm);
            vmm.arg("--api-sock").arg(&api.path);
            lead(vmm, theirs);
        })?;
        let agent = match (requests, line) {
            ([], None) => {
                let (times, ping) = ((self.patience, Instant::now() + PATIENCE), Request::Ping { token: 0 });
                child.first_reply(vsock, times, ping, || self.go_on(), BenchError::Agent)?
            }
            // What takes its time is asked once only.
            (requests, line) => {
                let mut agent = match line {
                    Some(line) => AgentClient::over(line, self.patience),
                    None => self.call(&mut child, vsock)?,
                };
                for request in requests {
                    agent.call(*request).map_err(BenchError::Agent)?;
                }
                agent
            }
        };
        Ok(Guest { child, api, agent: Some(agent) })
    }

    /// Fails if a signal has come.
    pub fn go_on(&self) -> Result<(), BenchError> {
        if self.signals.have_come() { Err(BenchError::Interrupted) } else { Ok(()) }
    }
}

/// Our end of a guest's COM1, if that is how it is called, and those of its process: standard input and output.
fn line(channel: Channel) -> Result<(Option<UnixStream>, Option<[OwnedFd; 2]>), BenchError> {
    if channel != Channel::Serial {
        return Ok((None, None));
    }
    let failed = io_error("cannot make a pair of sockets");
    let ends = UnixStream::pair().and_then(|(ours, theirs)| Ok((ours, [theirs.try_clone()?.into(), theirs.into()])));
    ends.map(|(ours, theirs)| (Some(ours), Some(theirs))).map_err(failed)
}

/// Has the console of a vmm lead there.
fn lead(vmm: &mut Command, line: Option<[OwnedFd; 2]>) {
    if let Some([input, output]) = line {
        vmm.stdin(input).stdout(output);
    }
}

impl Shell {
    /// Calls the agent of the guest that runs in it.
    pub fn agent(&self) -> Result<AgentClient, AgentError> {
        match &self.line {
            Some(line) => Ok(AgentClient::over(line.try_clone()?, PATIENCE)),
            None => AgentClient::connect(&self.vsock, PATIENCE),
        }
    }
}

impl Guest {
    /// Asks, and waits for the answer.
    pub fn ask(&mut self, request: Request) -> Result<Response, BenchError> {
        let hung_up = || BenchError::Late("nobody has called the guest's agent", self.api.patience);
        self.agent.as_mut().ok_or_else(hung_up)?.call(request).map_err(BenchError::Agent)
    }

    /// Closes the stream to its agent.
    pub fn hang_up(&mut self) {
        self.agent = None;
    }

    /// Asks over this stream from now on.
    pub fn call_again(&mut self, agent: AgentClient) {
        self.agent = Some(agent);
    }

    /// Has the guest write every word of these pages.
    pub fn fill(&mut self, pages: Pages, seed: u64) -> Result<(), BenchError> {
        self.ask(Request::Fill { pages, seed }).map(drop)
    }

    /// Whether every word of these pages is as it was filled.
    pub fn holds(&mut self, pages: Pages, seed: u64) -> Result<bool, BenchError> {
        Ok(self.ask(Request::Verify { pages, seed })? == Response::Mismatches(0))
    }
}

impl Api {
    /// Its socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A connection.
    pub fn client(&self) -> Result<VmClient, BenchError> {
        let failed = |source| BenchError::Api { what: "the vmm cannot be called", source };
        VmClient::connect(&self.path, self.patience).map_err(failed)
    }

    /// Takes a snapshot, and asks how it went.
    pub fn snapshot(&self, create: &SnapshotCreate) -> Result<Taken, BenchError> {
        let failed = |source| BenchError::Api { what: "cannot take a snapshot", source };
        let mut client = RestClient::connect(&self.path, self.patience).map_err(failed)?;
        let before = Instant::now();
        client.put("/snapshot/create", create).map_err(failed)?;
        let call = before.elapsed();
        Ok(Taken { status: client.get("/snapshot/status").map_err(failed)?, call })
    }
}

/// Writes what a vmm is to be started with.
pub fn write_config(path: &Path, config: &VmConfig) -> Result<(), BenchError> {
    let text = serde_json::to_vec(config).map_err(io::Error::from);
    text.and_then(|text| std::fs::write(path, text)).map_err(io_error("cannot write a configuration"))
}

/// Waits until somebody listens, without connecting: some page servers serve the first who does, and nobody else.
pub fn wait_for_listener(server: &mut Child, socket: &Path) -> Result<(), BenchError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let table = std::fs::read("/proc/net/unix").map_err(io_error("cannot read /proc/net/unix"))?;
        if listens(&String::from_utf8_lossy(&table), socket) {
            return Ok(());
        }
        server.check_alive()?;
        if Instant::now() > deadline {
            return Err(BenchError::Late("nobody listens where a benchmark connects", PATIENCE));
        }
        std::thread::sleep(AGAIN);
    }
}

/// Whether a socket at this path listens, as /proc/net/unix has it.
fn listens(table: &str, socket: &Path) -> bool {
    /// The flag of a socket that listens, as the kernel writes it.
    const ACCEPTS: &str = "00010000";
    let path = socket.to_string_lossy();
    table.lines().any(|line| {
        let facts = line.strip_suffix(&*path).and_then(|facts| facts.strip_suffix(' '));
        facts.and_then(|facts| facts.split_whitespace().nth(3)) == Some(ACCEPTS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_listener_is_known_without_a_connection() {
        let place = TempDir::new().unwrap();
        let path = place.path().join("a socket");
        let table = || String::from_utf8_lossy(&std::fs::read("/proc/net/unix").unwrap()).into_owned();
        assert!(!listens(&table(), &path));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(listens(&table(), &path));
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "nobody has connected");
    }
}
