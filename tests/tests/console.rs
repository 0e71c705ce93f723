//! Where the guest's COM1 leads. The embedded guest answers the agent protocol there as well as over vsock.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{Envelope, HEADER_LEN, Request, Response, body_len, decode, encode};
use api_spec::vm::VmConfig;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use tests::{Boot, PATIENCE, Place, Vm, require};

/// Asks the guest for a sign of life at its COM1.
fn ping(terminal: &Path, token: u64) {
    let mut terminal = OpenOptions::new().read(true).write(true).open(terminal).expect("the terminal opens");
    let mut frame = [0; 64];
    let frame = encode(&Envelope { id: 7, body: Request::Ping { token } }, &mut frame).expect("a ping is short");
    terminal.write_all(frame).expect("the terminal takes input");
    let (sender, answers) = mpsc::channel();
    // Reading a terminal has no deadline of its own; the thread ends with the test's process.
    std::thread::spawn(move || sender.send(answer(&mut terminal)));
    let answer = answers.recv_timeout(PATIENCE).expect("the guest answers at its COM1");
    assert_eq!(answer, Response::Pong { token });
}

/// The next answer; announcements, which have the number 0, are passed over.
fn answer(terminal: &mut File) -> Response {
    loop {
        let mut header = [0; HEADER_LEN];
        terminal.read_exact(&mut header).expect("the terminal can be read");
        let mut body = vec![0; body_len(&header).expect("a frame begins here")];
        terminal.read_exact(&mut body).expect("the terminal can be read");
        let Envelope { id, body } = decode::<Response>(&body).expect("it is an answer");
        if id != 0 {
            return body;
        }
    }
}

fn terminal_of(vm: &mut Vm) -> PathBuf {
    vm.info().console.expect("GET / tells the pseudo-terminal")
}

#[test]
fn a_pty_is_the_guests_console_and_each_clone_has_its_own() {
    require!(Kvm);
    let place = Place::new();
    // What was said before the snapshot is not said again: the first answer at each terminal is the one to its own ping.
    let (mut vm, _agent) = Boot::new(&place).console("pty").ready("original");
    let terminal = terminal_of(&mut vm);
    ping(&terminal, 1);
    let config: VmConfig = vm.api().get("/vm/config").unwrap();
    assert!(config.serial.is_some_and(|serial| serial.pty));

    let path = place.join("snapshot");
    vm.snapshot(&path);
    let (mut clone, _agent) = tests::Restore::new(&place, &path).console("pty").ready("clone");
    let other = terminal_of(&mut clone);
    assert_ne!(other, terminal);
    ping(&other, 2);
    ping(&terminal, 3);
}

#[test]
fn a_console_that_cannot_be_had_is_an_error_before_the_guest_starts() {
    require!(Kvm);
    let place = Place::new();
    let (file, missing) = (place.join("console"), place.join("none/console"));
    let (vm, _agent) = Boot::new(&place).console(file.to_str().expect("the path is text")).ready("file");
    assert!(file.exists());
    assert_eq!(vm.stop().stdout, "", "the console is the file");
    let refused = Boot::new(&place).console(missing.to_str().expect("the path is text")).start("missing");
    let done = refused.process.finish_within(PATIENCE);
    assert_eq!(done.code(), 1);
    assert!(done.one_line().contains("none/console for the guest's console: No such file"), "{}", done.stderr);
}
