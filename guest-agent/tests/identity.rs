//! A clone becomes itself, and the host is told how ready the guest is. The system is a fake: nothing here changes the
//! host.

mod common;

use api_spec::agent::linux::{Exec, Identity, Part, Readiness};
use api_spec::agent::{Envelope, GuestKind, HEADER_LEN, Level, Refusal, Request, Response, Resumed, body_len, decode};
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use common::{PATIENCE, argv, eventually, script, soon};
use guest_agent::gate::Generation;
use guest_agent::options::{Options, Parsed};
use guest_agent::readiness;
use guest_agent::serve::Agent;
use guest_agent::system::{Power, System};
use std::fs;
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

#[derive(Default)]
struct Machine {
    generation: Option<Generation>,
    done: Vec<String>,
    fails_at: Option<&'static str>,
    /// The generation changes while the clock is set.
    restored_meanwhile: bool,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Machine>>);

impl Fake {
    fn step(&self, what: &str) -> io::Result<()> {
        let mut machine = self.0.lock().unwrap();
        machine.done.push(what.to_owned());
        if machine.fails_at == Some(what) { Err(io::Error::other("as planned")) } else { Ok(()) }
    }
}

impl System for Fake {
    fn generation(&self) -> Option<Generation> {
        self.0.lock().unwrap().generation
    }
    fn add_entropy(&self, _: &[u8; 32]) -> io::Result<()> {
        self.step("entropy")
    }
    fn set_clock(&self, _: u64) -> io::Result<()> {
        let mut machine = self.0.lock().unwrap();
        if machine.restored_meanwhile {
            machine.generation = Some([99; 16]);
        }
        drop(machine);
        self.step("clock")
    }
    fn set_hostname(&self, name: &str) -> io::Result<()> {
        self.step(&format!("hostname {name}"))
    }
    fn set_machine_id(&self, _: [u8; 16]) -> io::Result<()> {
        self.step("machine-id")
    }
    fn configure(&self, interface: &api_spec::agent::linux::Interface) -> io::Result<()> {
        self.step(&interface.name)
    }
    fn sync(&self) {
        self.step("sync").unwrap();
    }
    fn drop_caches(&self) -> io::Result<()> {
        self.step("drop")
    }
    fn free_kib(&self) -> io::Result<u64> {
        Ok(77)
    }
    fn power(&self, power: Power) -> io::Result<()> {
        self.step(&format!("{power:?}"))
    }
    fn reset(&self) -> io::Result<()> {
        self.step("reset")
    }
}

struct Guest {
    fake: Fake,
    agent: Arc<Agent>,
    host: UnixListener,
    dir: TempDir,
}

impl Guest {
    fn start(generation: Option<Generation>) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), generation)
    }

    fn start_in(dir: TempDir, generation: Option<Generation>) -> Self {
        let _ = fs::remove_file(dir.path().join("ready"));
        let host = UnixListener::bind(dir.path().join("ready")).unwrap();
        let args = common::arguments(dir.path()).into_iter().map(Into::into);
        let Ok(Parsed::Run(options)) = Options::parse(args) else { panic!("no options") };
        let options = Options { hook_deadline: std::time::Duration::from_secs(5), ..*options };
        let fake = Fake::default();
        fake.0.lock().unwrap().generation = generation;
        let listener = options.listen.listen().unwrap();
        let agent = Agent::new(options, Box::new(fake.clone()));
        let (serving, announcing) = (agent.clone(), agent.clone());
        std::thread::spawn(move || serving.serve(&listener));
        std::thread::spawn(move || announcing.keep_announcing());
        Guest { fake, agent, host, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn connect(&self) -> AgentClient {
        AgentClient::over(UnixStream::connect(self.path("agent")).unwrap(), PATIENCE)
    }

    fn restore(&self, generation: Generation) {
        self.fake.0.lock().unwrap().generation = Some(generation);
    }

    fn done(&self) -> Vec<String> {
        std::mem::take(&mut self.fake.0.lock().unwrap().done)
    }

    /// The connection by which the guest announces.
    fn accept(&self) -> UnixStream {
        let stream = self.host.accept().unwrap().0;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn announcement(stream: &mut UnixStream) -> Level {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).unwrap();
    let mut body = vec![0; body_len(&header).unwrap()];
    stream.read_exact(&mut body).unwrap();
    match decode::<Response>(&body).unwrap() {
        Envelope { id: 0, body: Response::Ready { level, kind: GuestKind::Linux } } => level,
        other => panic!("{other:?}"),
    }
}

fn resumed(generation: Generation) -> Resumed {
    Resumed { generation, time_ns: 1, entropy: [7; 32] }
}

fn is_refused(client: &mut AgentClient) -> bool {
    match client.run(&argv(&["true"]), b"", soon()) {
        Ok(_) => false,
        Err(AgentError::Refused(Refusal::NotResumed)) => true,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn readiness_is_announced_as_it_comes_and_the_failed_are_named() {
    let guest = Guest::start(None);
    let mut host = guest.accept();
    assert_eq!(announcement(&mut host), Level::Agent);
    assert_eq!(guest.connect().readiness().unwrap(), readiness::starting());
    guest.agent.set_readiness(readiness::started(["db.service".to_owned()]));
    assert_eq!(announcement(&mut host), Level::Degraded);
    let expected = Readiness { level: Level::Degraded, failed: vec!["db.service".into()] };
    assert_eq!(guest.connect().readiness().unwrap(), expected);
}

#[test]
fn a_host_that_comes_late_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::start_in(dir, None);
    let mut host = guest.accept();
    assert_eq!(announcement(&mut host), Level::Agent);
    guest.agent.set_readiness(readiness::started([]));
    assert_eq!(announcement(&mut host), Level::Full);
}

#[test]
fn a_booted_guest_serves_before_it_is_resumed() {
    let guest = Guest::start(Some([1; 16]));
    assert!(!is_refused(&mut guest.connect()));
    assert_eq!(guest.connect().call(Request::Generation).unwrap(), Response::Generation([1; 16]));
}

#[test]
fn a_clone_serves_nobody_before_it_is_itself() {
    let guest = Guest::start(Some([1; 16]));
    guest.agent.set_readiness(readiness::started([]));
    let mut host = guest.accept();
    while announcement(&mut host) != Level::Full {}
    let mut client = guest.connect();
    guest.restore([2; 16]);
    assert!(is_refused(&mut client));
    assert!(matches!(client.call(Request::Random), Err(AgentError::Refused(Refusal::NotResumed))));
    assert!(client.call(Request::Ping { token: 1 }).is_ok());
    assert!(client.call(Request::Info).is_ok());

    assert_eq!(client.call(Request::Resumed(resumed([2; 16]))).unwrap(), Response::Resumed { generation: [2; 16] });
    assert_eq!(guest.done(), ["entropy", "clock", "machine-id"]);
    assert!(!is_refused(&mut client));
    assert_eq!(announcement(&mut guest.accept()), Level::Full, "the clone's host is told anew");

    guest.restore([3; 16]);
    assert!(is_refused(&mut client), "a clone of the clone");
}

#[test]
fn an_identity_in_full_is_taken_before_it_is_acknowledged() {
    let guest = Guest::start(Some([1; 16]));
    let log = guest.path("log");
    let say = format!("echo $(basename $0) $COPPICE_GENERATION $COPPICE_HOSTNAME >>{}", log.display());
    script(&guest.path("hooks.d/resumed/20-second"), &say);
    script(&guest.path("hooks.d/resumed/10-first"), &say);
    script(&guest.path("hooks.d/pre-snapshot/10-other"), &say);
    guest.restore([2; 16]);
    let identity = Identity { hostname: Some("clone".into()), ..Identity::new(resumed([2; 16])) };
    assert_eq!(guest.connect().identity(&identity).unwrap(), [2; 16]);
    assert_eq!(guest.done(), ["entropy", "clock", "machine-id", "hostname clone"]);
    let generation = "02".repeat(16);
    assert_eq!(
        fs::read_to_string(log).unwrap(),
        format!("10-first {generation} clone\n20-second {generation} clone\n")
    );
}

#[test]
fn a_clone_that_could_not_become_itself_serves_nobody_and_may_try_again() {
    let guest = Guest::start(Some([1; 16]));
    let hook = guest.path("hooks.d/resumed/10-keys");
    script(&hook, "exit 4");
    guest.restore([2; 16]);
    let mut client = guest.connect();
    let failed = client.call(Request::Resumed(resumed([2; 16]))).unwrap_err();
    assert_eq!(failed.to_string(), "the agent could not: hook: `10-keys` ended with code 4");
    assert!(is_refused(&mut client));
    guest.fake.0.lock().unwrap().fails_at = Some("entropy");
    match client.call(Request::Resumed(resumed([2; 16]))) {
        Err(AgentError::Failed(failure)) => assert_eq!(failure.part, Part::Entropy),
        other => panic!("{other:?}"),
    }
    assert!(is_refused(&mut client));
    guest.fake.0.lock().unwrap().fails_at = None;
    script(&hook, "exit 0");
    assert!(client.call(Request::Resumed(resumed([2; 16]))).is_ok());
    assert!(!is_refused(&mut client));
}

#[test]
fn a_hook_that_hangs_is_ended_by_its_deadline() {
    let guest = Guest::start(Some([1; 16]));
    script(&guest.path("hooks.d/resumed/10-hangs"), "sleep 1000");
    guest.restore([2; 16]);
    let failed = guest.connect().call(Request::Resumed(resumed([2; 16]))).unwrap_err();
    assert_eq!(failed.to_string(), "the agent could not: hook: `10-hangs` did not end in time");
}

#[test]
fn a_clone_made_while_its_parent_was_resumed_is_not_itself() {
    let guest = Guest::start(Some([1; 16]));
    guest.restore([2; 16]);
    guest.fake.0.lock().unwrap().restored_meanwhile = true;
    let mut client = guest.connect();
    let failed = client.call(Request::Resumed(resumed([2; 16]))).unwrap_err();
    assert_eq!(failed.to_string(), "the agent could not: identity: the guest was restored again meanwhile");
    assert!(is_refused(&mut client));
}

#[test]
fn without_a_generation_a_reset_of_the_ready_connection_tells_of_a_restore() {
    let guest = Guest::start(None);
    guest.agent.set_readiness(readiness::started([]));
    let mut client = guest.connect();
    let host = guest.accept();
    eventually("it was announced", || {
        let mut peeked = [0; 1];
        rustix::net::recv(&host, &mut peeked, rustix::net::RecvFlags::PEEK).is_ok_and(|(len, _)| len == 1)
    });
    assert!(!is_refused(&mut client));
    drop(host); // With a frame unread, which makes it a reset.
    eventually("it notices", || is_refused(&mut client));
    client.call(Request::Resumed(resumed([2; 16]))).unwrap();
    assert!(!is_refused(&mut client));
    assert_eq!(client.call(Request::Generation).unwrap(), Response::Generation([2; 16]));
    assert_eq!(announcement(&mut guest.accept()), Level::Full);
}

#[test]
fn an_agent_that_starts_again_in_a_clone_still_knows_that_it_is_one() {
    let guest = Guest::start(Some([1; 16]));
    let Guest { dir, .. } = guest;
    let again = Guest::start_in(dir, Some([2; 16]));
    let mut client = again.connect();
    assert!(is_refused(&mut client));
    client.call(Request::Resumed(resumed([2; 16]))).unwrap();
    let Guest { dir, .. } = again;
    assert!(!is_refused(&mut Guest::start_in(dir, Some([2; 16])).connect()));
}

#[test]
fn a_snapshot_is_prepared_by_hooks_and_a_sync() {
    let guest = Guest::start(Some([1; 16]));
    let mark = guest.path("mark");
    script(&guest.path("hooks.d/pre-snapshot/10-mark"), &format!("touch {}", mark.display()));
    guest.connect().pre_snapshot().unwrap();
    assert!(mark.exists());
    assert_eq!(guest.done(), ["sync"]);
    script(&guest.path("hooks.d/pre-snapshot/20-no"), "exit 1");
    let failed = guest.connect().pre_snapshot().unwrap_err();
    assert_eq!(failed.to_string(), "the agent could not: hook: `20-no` ended with code 1");
    assert!(guest.done().is_empty());
}

#[test]
fn a_guest_lets_go_of_its_caches_once_they_are_on_the_disk() {
    let guest = Guest::start(Some([1; 16]));
    assert_eq!(guest.connect().trim().unwrap(), 77);
    assert_eq!(guest.done(), ["sync", "drop"]);
    guest.fake.0.lock().unwrap().fails_at = Some("drop");
    let failed = guest.connect().trim().unwrap_err();
    assert_eq!(failed.to_string(), "the agent could not: memory: as planned");
}

#[test]
fn power_is_the_systems_affair() {
    let guest = Guest::start(None);
    guest.connect().power_off().unwrap();
    eventually("it is switched off", || guest.done() == ["Off"]);
    guest.connect().reboot().unwrap();
    eventually("it starts again", || guest.done() == ["Reboot"]);
}

#[test]
fn an_exec_in_flight_does_not_keep_a_clone_from_being_resumed() {
    let guest = Guest::start(Some([1; 16]));
    let started = guest.connect().exec_detached(&Exec { deadline_ms: Some(20_000), ..argv(&["sleep", "10"]) }).unwrap();
    guest.restore([2; 16]);
    let mut client = guest.connect();
    client.call(Request::Resumed(resumed([2; 16]))).unwrap();
    client.signal(started.exec, 9).unwrap();
}
