//! The published document against a live vmm: schemathesis makes requests from it, good ones and bad ones, alone and in
//! sequences, and judges the answers by it. `./test` installs it (`tests/schemathesis/prepare`).
//!
//! Requests name paths at random, and the vmm does as it is told; so it runs where nothing can be written but in the test's
//! own directory.

use serde_json::json;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::scope;
use tests::{PATIENCE, Place, Process, binaries, require, skip_test};

/// Cases for each call and phase.
const EXAMPLES: &str = "25";
/// Changes the root of the file system to one that is only read, but for a directory, and runs a program there.
const CONFINED: &str = r#"mount --bind "$0" "$0" && mount -o remount,bind,ro / && cd "$0" && exec "$@""#;

/// A vmm that is started again whenever it has ended in good order, as `PUT /vm/save` asks it to.
struct Server<'a> {
    place: &'a Place,
    arguments: &'a [&'a str],
    vmm: Mutex<Process>,
    starts: AtomicU32,
}

impl<'a> Server<'a> {
    fn new(place: &'a Place, arguments: &'a [&'a str]) -> Self {
        Server { place, arguments, vmm: Mutex::new(start(place, "vmm-0", arguments)), starts: AtomicU32::new(1) }
    }

    /// A connection to the API of the vmm that runs.
    fn connect(&self) -> UnixStream {
        let mut vmm = self.vmm.lock().unwrap_or_else(PoisonError::into_inner);
        let api = self.place.join("api.sock");
        let mut stream = None;
        tests::until("the vmm's API takes connections", || {
            if !vmm.is_alive() {
                let name = format!("vmm-{}", self.starts.fetch_add(1, Ordering::Relaxed));
                let ended = std::mem::replace(&mut *vmm, start(self.place, &name, self.arguments)).finish();
                check(&ended);
            }
            stream = UnixStream::connect(&api).ok();
            stream.is_some()
        });
        stream.expect("just found")
    }
}

fn start(place: &Place, name: &str, arguments: &[&str]) -> Process {
    Process::start(place, name, "unshare".as_ref(), |command| {
        command.args(["--mount", "--propagation", "private", "sh", "-c", CONFINED]).arg(place.path());
        command.arg(binaries::vmm()).args(["--api-sock", "api.sock"]).args(arguments).env("TMPDIR", place.path());
    })
}

#[track_caller]
fn check(ended: &tests::process::Finished) {
    assert!(ended.code() == 0 && !ended.stderr.contains("panicked"), "{ended:?}");
}

/// Passes on what comes over TCP, which is all that schemathesis speaks, until `over`.
fn pass_on(listener: &TcpListener, server: &Server<'_>, over: &AtomicBool) {
    scope(|threads| {
        while let Ok((client, _)) = listener.accept() {
            if over.load(Ordering::Relaxed) {
                break;
            }
            let api = server.connect();
            let (to, from) = (api.try_clone(), client.try_clone());
            let (Ok(mut to), Ok(mut from)) = (to, from) else { break };
            threads.spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut api, mut client) = (api, client);
            threads.spawn(move || {
                let _ = std::io::copy(&mut api, &mut client);
                let _ = client.shutdown(Shutdown::Both);
            });
        }
    });
}

/// Ends [`pass_on`] when it goes.
struct End<'a> {
    over: &'a AtomicBool,
    address: SocketAddr,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

/// Why schemathesis cannot run here, or its program.
fn program() -> Result<PathBuf, String> {
    let absent = || std::env::var("COPPICE_NO_SCHEMATHESIS").unwrap_or("run tests/schemathesis/prepare".into());
    let program = std::env::var_os("COPPICE_SCHEMATHESIS").ok_or_else(absent)?;
    let unshared = Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
    if !unshared.is_ok_and(|status| status.success()) {
        return Err("only root can confine the vmm (unshare --mount)".into());
    }
    Ok(program.into())
}

/// Holds a vmm that was started with these arguments to the document.
fn hold_to_the_document(test: &str, place: &Place, arguments: &[&str]) {
    let program = match program() {
        Ok(program) => program,
        Err(reason) => return skip_test(test, format!("no schemathesis: {reason}")),
    };
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    let (server, over) = (Server::new(place, arguments), AtomicBool::new(false));
    let report = scope(|threads| {
        threads.spawn(|| pass_on(&listener, &server, &over));
        // Also if what follows fails: the thread would wait for ever.
        let _end = End { over: &over, address };
        Process::start(place, "schemathesis", &program, |command| {
            command.arg("--config-file").arg(sources.join("schemathesis/schemathesis.toml"));
            command
                .arg("run")
                .arg(sources.join("../api-spec/openapi.yaml"))
                .args(["--url", &format!("http://{address}")]);
            command.args(["--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"]);
            command.args(["--max-examples", EXAMPLES, "--seed", "1", "--continue-on-failure", "--no-color"]);
            // Its cache of examples is of no use to the next run, whose seed is the same.
            command.current_dir(place.path()).env("HYPOTHESIS_STORAGE_DIRECTORY", place.join("examples"));
        })
        .finish_within(10 * PATIENCE)
    });
    assert!(report.status.success(), "{}\n{}", report.stdout, report.stderr);
    for phase in ["Examples", "Coverage", "Fuzzing", "Stateful"] {
        assert!(report.stdout.contains(&format!("✅ {phase}")), "{phase} did not run: {}", report.stdout);
    }
    let vmm = server.vmm.into_inner().unwrap_or_else(PoisonError::into_inner);
    check(&vmm.stop());
}

#[test]
fn a_vmm_that_waits_keeps_to_the_document() {
    require!(Kvm);
    hold_to_the_document("a_vmm_that_waits_keeps_to_the_document", &Place::new(), &[]);
}

#[test]
fn a_vmm_that_runs_a_guest_keeps_to_the_document() {
    require!(Kvm);
    let place = Place::new();
    let disk = std::fs::File::create(place.join("disk.img")).and_then(|file| file.set_len(4 << 20));
    disk.expect("a file can be made in the test's directory");
    let config = json!({
        "boot-source": { "embedded_guest": true },
        "machine-config": { "mem_size_mib": 32 },
        "vsock": { "guest_cid": 3, "uds_path": "guest.vsock" },
        "drives": [{ "drive_id": "root", "path_on_host": "disk.img", "overlay": true }],
        "balloon": { "amount_mib": 0, "stats_polling_interval_s": 1 },
        "entropy": {},
    });
    std::fs::write(place.join("vm.json"), config.to_string()).expect("a file can be made in the test's directory");
    hold_to_the_document("a_vmm_that_runs_a_guest_keeps_to_the_document", &place, &["--config", "vm.json"]);
}
