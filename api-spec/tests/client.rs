//! Every call of the table has a method of the client, which sends what the table's example says and takes its answer.

use api_spec::client::VmClient;
use api_spec::client::rest::RestError;
use api_spec::operations::{Answer, OPERATIONS, Operation, When};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);

/// Makes a call with the body, or the query, of its example; the answer.
type Method = fn(&mut VmClient, Value) -> Result<Value, RestError>;

fn of<T: DeserializeOwned>(example: Value) -> T {
    serde_json::from_value(example).expect("an example is of its type")
}

fn document(answer: Result<impl Serialize, RestError>) -> Result<Value, RestError> {
    answer.map(|answer| serde_json::to_value(answer).expect("an answer has a JSON form"))
}

/// The methods, by the calls' names. One call may have several.
const METHODS: &[(&str, Method)] = &[
    ("getInfo", |vm, _| document(vm.info())),
    ("getVersion", |vm, _| document(vm.version())),
    ("getVmConfig", |vm, _| document(vm.config())),
    ("getMachineConfig", |vm, _| document(vm.machine_config())),
    ("putMachineConfig", |vm, body| document(vm.put_machine_config(&of(body)))),
    ("patchMachineConfig", |vm, body| document(vm.patch_machine_config(&of(body)))),
    ("putBootSource", |vm, body| document(vm.put_boot_source(&of(body)))),
    ("putDrive", |vm, body| document(vm.put_drive(&of(body)))),
    ("patchDrive", |vm, body| document(vm.patch_drive(&of(body)))),
    ("putNetworkInterface", |vm, body| document(vm.put_network_interface(&of(body)))),
    ("patchNetworkInterface", |vm, body| document(vm.patch_network_interface(&of(body)))),
    ("putVsock", |vm, body| document(vm.put_vsock(&of(body)))),
    ("putEntropy", |vm, body| document(vm.put_entropy(&of(body)))),
    ("putSerial", |vm, body| document(vm.put_serial(&of(body)))),
    ("putSavedState", |vm, body| document(vm.put_saved_state(&of(body)))),
    ("getBalloon", |vm, _| document(vm.balloon())),
    ("putBalloon", |vm, body| document(vm.put_balloon(&of(body)))),
    ("patchBalloon", |vm, body| document(vm.patch_balloon(&of(body)))),
    ("getBalloonStatistics", |vm, _| document(vm.balloon_statistics())),
    ("patchBalloonStatistics", |vm, body| document(vm.patch_balloon_statistics(&of(body)))),
    ("putAction", |vm, _| document(vm.start())),
    ("patchVm", |vm, _| document(vm.pause())),
    ("putVmSave", |vm, body| document(vm.save(&of(body)))),
    ("putVmStop", |vm, body| document(vm.stop(of(body)))),
    ("putVmCheckpoint", |vm, body| document(vm.checkpoint(&of(body)))),
    ("putVmReset", |vm, body| document(vm.reset(&of(body)))),
    ("putVmFork", |vm, body| document(vm.fork(&of(body)))),
    ("putForkLoad", |vm, body| document(vm.fork_load(&of(body)))),
    ("getVmStats", |vm, _| document(vm.stats())),
    ("getMemoryMap", |vm, query| document(vm.memory_map(of(query)))),
    ("putSnapshotCreate", |vm, body| document(vm.snapshot_create(&of(body)))),
    ("putSnapshotCancel", |vm, body| document(vm.snapshot_cancel(&of(body)))),
    ("putSnapshotLoad", |vm, body| document(vm.snapshot_load(&of(body)))),
    ("getSnapshotStatus", |vm, _| document(vm.snapshot_status())),
    ("putLogger", |vm, body| document(vm.put_logger(&of(body)))),
    ("putMetrics", |vm, body| document(vm.put_metrics(&of(body)))),
    ("getMetrics", |vm, _| document(vm.metrics())),
];

/// The next request: its first line, and its body.
fn hear(stream: &mut BufReader<UnixStream>) -> (String, Value) {
    let (mut line, mut length) = (String::new(), 0);
    stream.read_line(&mut line).expect("a request comes");
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).expect("headers come");
        if header == "\r\n" {
            break;
        }
        if let Some(value) = header.strip_prefix("Content-Length: ") {
            length = value.trim().parse().expect("a length is a number");
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("a body comes");
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).expect("a body is JSON") };
    (line.trim_end().to_owned(), body)
}

/// Has the client of `make` talk to a server that says this; what the server heard, and what `make` gave back.
fn conversation<T>(answer: &str, make: impl FnOnce(&mut VmClient) -> T) -> ((String, Value), T) {
    let place = tempfile::tempdir().expect("a directory can be made");
    let path = place.path().join("api");
    let listener = UnixListener::bind(&path).expect("a socket can be made");
    let answer = answer.to_owned();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("the client connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("reading can have a limit");
        let mut stream = BufReader::new(stream);
        let heard = hear(&mut stream);
        stream.get_mut().write_all(answer.as_bytes()).expect("the client takes the answer");
        heard
    });
    let mut client = VmClient::connect(&path, PATIENCE).expect("somebody listens");
    let made = make(&mut client);
    (server.join().expect("the server heard a request"), made)
}

fn answer_of(operation: &Operation) -> String {
    match operation.answer {
        Answer::Done => "HTTP/1.1 204 No Content\r\n\r\n".into(),
        Answer::Document(shape) => ok(shape.example),
        Answer::Text(example) => ok(example),
    }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// That `whole` says all that `part` says, and perhaps more, such as defaults.
fn contains(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(name, value)| whole.get(name).is_some_and(|other| contains(other, value)))
        }
        _ => whole == part,
    }
}

#[test]
fn every_call_has_a_method_that_makes_it() {
    for operation in OPERATIONS.iter().filter(|operation| operation.when != When::Never) {
        let (_, method) = METHODS
            .iter()
            .find(|(id, _)| *id == operation.id)
            .unwrap_or_else(|| panic!("VmClient has no method for {} (or METHODS does not name it)", operation.id));
        let example = operation.body.or(operation.query).map_or("null", |shape| shape.example);
        let example: Value = serde_json::from_str(example).expect("an example is JSON");
        let ((line, body), answer) = conversation(&answer_of(operation), |client| method(client, example.clone()));

        let mut path = operation.path.to_owned();
        if let Some((start, name)) = operation.named() {
            path = format!("{start}{}", example[name].as_str().expect("the example names the device"));
        }
        if operation.query.is_some() {
            let pairs: Vec<String> =
                example.as_object().expect("a query").iter().map(|(name, value)| format!("{name}={value}")).collect();
            path += &format!("?{}", pairs.join("&"));
        }
        assert_eq!(line, format!("{} {path} HTTP/1.1", operation.method), "{}", operation.id);
        let expected = if operation.body.is_some() { example } else { Value::Null };
        assert!(contains(&body, &expected), "{}: {body} is not {expected}", operation.id);
        let answer = answer.unwrap_or_else(|e| panic!("{}: {e}", operation.id));
        let expected = match operation.answer {
            Answer::Done => Value::Null,
            Answer::Document(shape) => serde_json::from_str(shape.example).expect("an example is JSON"),
            Answer::Text(example) => example.into(),
        };
        assert!(contains(&answer, &expected), "{}: {answer} is not {expected}", operation.id);
    }
}

#[test]
fn methods_for_the_second_thing_that_a_call_can_say() {
    let done = "HTTP/1.1 204 No Content\r\n\r\n";
    let (heard, answer) = conversation(done, VmClient::resume);
    assert_eq!(heard, ("PATCH /vm HTTP/1.1".to_owned(), json!({"state": "Resumed"})));
    answer.expect("it was done");
    let (heard, answer) = conversation(done, VmClient::flush_metrics);
    assert_eq!(heard, ("PUT /actions HTTP/1.1".to_owned(), json!({"action_type": "FlushMetrics"})));
    answer.expect("it was done");
}

#[test]
fn a_refusal_is_told_in_the_vmms_words() {
    let body = r#"{"fault_message":"machine-config.vcpu_count is 9; it may be 1 to 8"}"#;
    let answer = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    let (_, refused) = conversation(&answer, VmClient::start);
    let refused = refused.expect_err("it was refused");
    assert!(matches!(refused, RestError::Refused { status: 400, .. }), "{refused:?}");
    assert_eq!(refused.to_string(), "machine-config.vcpu_count is 9; it may be 1 to 8");
}
