//! Programs that run for the host.

mod common;

use api_spec::agent::Refusal;
use api_spec::agent::Request;
use api_spec::agent::linux::{Exec, Exit, Part, Stream};
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use api_spec::client::linux::{Event, Finished};
use common::{Agent, argv, eventually, is_alive, sh, soon};
use std::fs;

fn run(client: &mut AgentClient, exec: &Exec) -> Finished {
    client.run(exec, b"", soon()).unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs a program that is expected to end by being killed; the process id that it has written to a file first.
fn pid_in(path: &std::path::Path) -> u32 {
    eventually("the process id is written", || fs::read_to_string(path).is_ok_and(|text| text.ends_with('\n')));
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

#[test]
fn output_and_exit_codes_come_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let finished = run(&mut client, &sh("echo out; echo err >&2; exit 7"));
    let expected = Finished { exit: Exit::Code(7), stdout: b"out\n".into(), stderr: b"err\n".into() };
    assert_eq!(finished, expected);
    assert_eq!(run(&mut client, &argv(&["true"])).exit, Exit::Code(0));
    assert_eq!(run(&mut client, &sh("kill -KILL $$")).exit, Exit::Signal(9));
    assert!(client.call(Request::Ping { token: 1 }).is_ok(), "the connection goes on");
}

#[test]
fn input_and_output_larger_than_every_buffer_pass_through() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let input: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let finished = client.run(&Exec { stdin: true, ..argv(&["cat"]) }, &input, soon()).unwrap();
    assert_eq!(finished.exit, Exit::Code(0));
    assert!(finished.stdout == input, "{} bytes came back of {}", finished.stdout.len(), input.len());
    let finished = client.run(&Exec { stdin: true, ..argv(&["wc", "-c"]) }, &input, soon()).unwrap();
    assert_eq!(text(&finished.stdout).trim(), "3000000");
}

#[test]
fn a_program_need_not_read_its_input() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let input = vec![1; 2_000_000];
    for line in ["exit 3", "exec 0<&-; sleep 0.1; exit 3"] {
        let finished = client.run(&Exec { stdin: true, ..sh(line) }, &input, soon()).unwrap();
        assert_eq!(finished.exit, Exit::Code(3), "{line}");
    }
    assert_eq!(run(&mut client, &sh("cat; echo end")).stdout, b"end\n", "no input is an empty one");
}

#[test]
fn everything_that_a_program_wrote_before_it_ended_arrives() {
    let agent = Agent::start();
    let finished = run(&mut agent.connect(), &sh("head -c 65536 /dev/zero; head -c 65536 /dev/zero >&2"));
    assert_eq!((finished.stdout.len(), finished.stderr.len()), (65536, 65536));
}

#[test]
fn directory_environment_and_user_are_as_asked() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let env = vec![("GREETING".to_owned(), "hello world".to_owned()), ("HOME".to_owned(), "/elsewhere".to_owned())];
    let exec = Exec { cwd: Some("/usr".into()), env, ..sh("pwd; echo $GREETING; echo $HOME; echo ${CARGO-none}") };
    assert_eq!(text(&run(&mut client, &exec).stdout), "/usr\nhello world\n/elsewhere\nnone\n");
    assert_eq!(text(&run(&mut client, &argv(&["pwd"])).stdout), "/\n");

    if !rustix::process::geteuid().is_root() {
        return test_skip::skip("only root runs programs as somebody else");
    }
    let ids = |client: &mut AgentClient, user: &str| {
        let exec = Exec { user: Some(user.into()), ..sh("echo $(id -u) $(id -g) $(id -G) $(pwd)") };
        text(&run(client, &exec).stdout).trim().to_owned()
    };
    assert_eq!(ids(&mut client, "4711:4712"), "4711 4712 4712 /");
    assert_eq!(ids(&mut client, "4711"), "4711 4711 4711 /");
    assert_eq!(ids(&mut client, "root:4712"), "0 4712 4712 /");
}

#[test]
fn what_cannot_run_is_named() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut failure = |exec: Exec| match client.run(&exec, b"", soon()) {
        Err(AgentError::Failed(failure)) => {
            assert_eq!(failure.part, Part::Exec);
            failure.detail
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(
        failure(argv(&["no-such-program"])),
        "cannot run `no-such-program`: No such file or directory (os error 2)"
    );
    assert_eq!(failure(argv(&["/etc"])), "cannot run `/etc`: Permission denied (os error 13)");
    assert_eq!(failure(argv(&[])), "no program is named");
    assert_eq!(
        failure(Exec { user: Some("no-such-user".into()), ..argv(&["true"]) }),
        "there is no user `no-such-user`"
    );
    let elsewhere = Exec { cwd: Some("/no/such/dir".into()), ..argv(&["true"]) };
    assert!(failure(elsewhere).starts_with("cannot run `true` in `/no/such/dir`"));
    assert!(failure(argv(&["a\0b"])).contains("nul byte"));
    assert!(failure(Exec { env: vec![("A=B".into(), "c".into())], ..argv(&["true"]) }).contains("variable"));
}

#[test]
fn a_deadline_ends_the_whole_process_group() {
    let agent = Agent::start();
    let pid = agent.path("pid");
    let line = format!("sleep 1000 & echo $! >{}; echo started; wait", pid.display());
    let finished = run(&mut agent.connect(), &Exec { deadline_ms: Some(300), ..sh(&line) });
    assert_eq!((finished.exit, &finished.stdout[..]), (Exit::Deadline, &b"started\n"[..]));
    let pid = pid_in(&pid);
    eventually("the grandchild is gone", || !is_alive(pid));
    let in_time = Exec { deadline_ms: Some(60_000), ..argv(&["true"]) };
    assert_eq!(run(&mut agent.connect(), &in_time).exit, Exit::Code(0));
}

#[test]
fn signals_reach_a_program_from_another_connection() {
    let agent = Agent::start();
    let mut other = agent.connect();
    let exec = sh("trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done");
    let (mut number, mut output) = (0, Vec::new());
    let exit = agent.connect().exec(&exec, b"", soon(), |event| match event {
        Event::Started(started) => number = started.exec,
        // The shell may say on standard error what became of its children.
        Event::Output(Stream::Stderr, _) => {}
        Event::Output(_, data) => {
            output.extend_from_slice(data);
            if data == b"ready\n" {
                assert!(matches!(other.signal(number, 1000), Err(AgentError::Failed(_))), "there is no such signal");
                other.signal(number, 15).unwrap();
            }
        }
    });
    assert_eq!((exit.unwrap(), text(&output)), (Exit::Code(5), "ready\ncaught\n"));
    let gone = other.signal(number, 15).unwrap_err().to_string();
    assert_eq!(gone, format!("the agent could not: exec: program {number} does not run"));
}

#[test]
fn a_connection_that_breaks_ends_its_program() {
    let agent = Agent::start();
    let pid = agent.path("pid");
    let mut client = agent.connect();
    let result = client.run(&sh(&format!("echo $$ >{}; sleep 1000", pid.display())), b"", {
        std::time::Instant::now() + std::time::Duration::from_millis(400)
    });
    assert!(matches!(result, Err(AgentError::Io(_))));
    let pid = pid_in(&pid);
    assert!(is_alive(pid));
    drop(client);
    eventually("the program is gone", || !is_alive(pid));
}

#[test]
fn a_host_that_reads_nothing_holds_up_only_its_own_program() {
    let agent = Agent::start();
    let mut client = agent.connect();
    // The answer is never read: the connection's buffers fill, and the program waits.
    let mut stuck = agent.raw();
    let exec = api_spec::agent::linux::Request::Exec(argv(&["yes"]));
    let frame = api_spec::agent::linux::encode_request(1, &api_spec::agent::linux::Either::Linux(exec)).unwrap();
    std::io::Write::write_all(&mut stuck, &frame).unwrap();
    eventually("it runs", || agent.children() == 1);
    assert_eq!(run(&mut client, &argv(&["true"])).exit, Exit::Code(0));
    drop(stuck);
    eventually("it is gone", || agent.children() == 0);
}

#[test]
fn what_is_left_in_the_background_does_not_hold_up_the_answer() {
    let agent = Agent::start();
    let pid = agent.path("pid");
    let line = format!("sleep 1000 & echo $! >{}; echo done", pid.display());
    let finished = run(&mut agent.connect(), &sh(&line));
    assert_eq!((finished.exit, &finished.stdout[..]), (Exit::Code(0), &b"done\n"[..]));
    let pid = pid_in(&pid);
    assert!(is_alive(pid), "it was meant to stay");
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
}

#[test]
fn a_detached_program_outlives_its_connection_and_not_its_deadline() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let started = client.exec_detached(&argv(&["sleep", "1000"])).unwrap();
    drop(client);
    let mut client = agent.connect();
    assert_eq!(run(&mut client, &argv(&["true"])).exit, Exit::Code(0));
    assert!(is_alive(started.pid));
    client.signal(started.exec, 9).unwrap();
    eventually("it is reaped", || agent.children() == 0);

    let limited = Exec { deadline_ms: Some(100), ..argv(&["sleep", "1000"]) };
    let started = client.exec_detached(&limited).unwrap();
    eventually("its deadline ends it", || !is_alive(started.pid) && agent.children() == 0);
}

#[test]
fn programs_beyond_the_limit_are_refused_and_those_that_end_make_room() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let started: Vec<_> = (0..guest_agent::exec::MAX_PROGRAMS)
        .map(|_| client.exec_detached(&argv(&["sleep", "1000"])).unwrap())
        .collect();
    let refused = client.run(&argv(&["true"]), b"", soon());
    assert!(matches!(refused, Err(AgentError::Refused(Refusal::Busy))), "{refused:?}");
    client.signal(started[0].exec, 9).unwrap();
    eventually("there is room again", || client.run(&argv(&["true"]), b"", soon()).is_ok());
    for started in &started[1..] {
        client.signal(started.exec, 9).unwrap();
    }
    eventually("all are reaped", || agent.children() == 0);
}

#[test]
fn nothing_is_left_of_programs_that_ran() {
    let agent = Agent::start();
    run(&mut agent.connect(), &argv(&["true"]));
    eventually("the connection is closed", || agent.children() == 0);
    let before = agent.descriptors();
    for round in 0..20 {
        let mut client = agent.connect();
        run(&mut client, &sh("echo a; cat; exit 1"));
        run(&mut client, &Exec { deadline_ms: Some(20), ..argv(&["sleep", "1000"]) });
        let _ = client.run(&argv(&["no-such-program"]), b"", soon());
        client.exec_detached(&argv(&["true"])).unwrap();
        if round % 2 == 0 {
            let _ = client.run(
                &argv(&["sleep", "1000"]),
                b"",
                std::time::Instant::now() + std::time::Duration::from_millis(20),
            );
        }
    }
    eventually("no process is left", || agent.children() == 0);
    eventually("no descriptor is left", || agent.descriptors() <= before);
}

#[test]
fn a_program_has_no_descriptors_of_the_agent() {
    let agent = Agent::start();
    let list = "ls /proc/self/fd";
    let finished = run(&mut agent.connect(), &sh(list));
    // What whoever started the tests has left open is not the agent's.
    let here = std::process::Command::new("sh").args(["-c", list]).stdin(std::process::Stdio::null()).output().unwrap();
    assert_eq!(text(&finished.stdout), text(&here.stdout));
}

#[test]
fn other_requests_on_a_busy_connection_are_refused() {
    use api_spec::agent::linux::{Either, Request as Linux, Response, decode_response, encode_request};
    use api_spec::agent::{HEADER_LEN, Response as Common, body_len};
    use std::io::{Read, Write};
    let agent = Agent::start();
    let mut stream = agent.raw();
    let mut ask = |id, request| stream.write_all(&encode_request(id, &request).unwrap()).unwrap();
    ask(1, Either::Linux(Linux::Exec(Exec { stdin: true, ..argv(&["cat"]) })));
    ask(2, Either::Common(Request::Ping { token: 1 }));
    ask(1, Either::Linux(Linux::Data(Vec::new())));
    ask(3, Either::Common(Request::Ping { token: 1 }));
    let mut answers = std::collections::HashMap::new();
    while answers.len() < 3 || !matches!(answers[&1], Either::Linux(Response::Exited(_))) {
        let mut header = [0; HEADER_LEN];
        stream.read_exact(&mut header).unwrap();
        let mut body = vec![0; body_len(&header).unwrap()];
        stream.read_exact(&mut body).unwrap();
        let answer = decode_response(&body).unwrap();
        answers.insert(answer.id, answer.body);
    }
    assert_eq!(answers[&1], Either::Linux(Response::Exited(Exit::Code(0))));
    assert_eq!(answers[&2], Either::Common(Common::Refused(Refusal::Busy)));
    // Whether it came while the program ran or after is a matter of time.
    assert!(matches!(&answers[&3], Either::Common(Common::Pong { .. } | Common::Refused(Refusal::Busy))));
}
