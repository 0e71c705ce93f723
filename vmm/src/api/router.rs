//! Which request a message is. Pure.

use super::http::Message;
use super::{Request, Response};
use crate::machine::config::{self, ConfigError};
use api_spec::devices::{Drive, DriveUpdate, NetworkInterface, NetworkUpdate};
use api_spec::operations::{self, OPERATIONS, Operation, When};
use api_spec::stats::MemoryMapQuery;
use api_spec::strict;
use serde::de::DeserializeOwned;

/// How many runs a map of memory may have.
const MAX_RUNS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// The request that `message` is, or the answer that it gets at once.
pub fn route(message: &Message) -> Result<Request, Response> {
    let (method, path) = (message.method.as_str(), message.path.as_str());
    let (operation, name) = operations::find(method, path).ok_or_else(|| unknown(method, path))?;
    if operation.when == When::Never {
        return Ok(Request::Declined(operation));
    }
    if let Some(query) = message.query.as_deref().filter(|query| operation.query.is_none() && !query.is_empty()) {
        return Err(Response::fault(400, &format!("{method} {path} takes no query; there is `?{query}`")));
    }
    match operation.id {
        "getInfo" => Ok(Request::Info),
        "getVersion" => Ok(Request::Version),
        "getVmConfig" => Ok(Request::Config),
        "getMachineConfig" => Ok(Request::GetMachineConfig),
        "putMachineConfig" => body(message).map(Request::PutMachineConfig),
        "patchMachineConfig" => body(message).map(Request::PatchMachineConfig),
        "putBootSource" => body(message).map(Request::PutBootSource),
        "putDrive" => named(operation, message, name, |drive: &Drive| &drive.drive_id).map(Request::PutDrive),
        "patchDrive" => {
            named(operation, message, name, |update: &DriveUpdate| &update.drive_id).map(Request::PatchDrive)
        }
        "putNetworkInterface" => named(operation, message, name, |interface: &NetworkInterface| &interface.iface_id)
            .map(Request::PutNetworkInterface),
        "patchNetworkInterface" => named(operation, message, name, |update: &NetworkUpdate| &update.iface_id)
            .map(Request::PatchNetworkInterface),
        "putVsock" => body(message).map(Request::PutVsock),
        "putEntropy" => body(message).map(Request::PutEntropy),
        "putSerial" => body(message).map(Request::PutSerial),
        "putSavedState" => body(message).map(Request::PutSavedState),
        "getBalloon" => Ok(Request::GetBalloon),
        "putBalloon" => body(message).map(Request::PutBalloon),
        "patchBalloon" => body(message).map(Request::PatchBalloon),
        "getBalloonStatistics" => Ok(Request::GetBalloonStatistics),
        "patchBalloonStatistics" => body(message).map(Request::PatchBalloonStatistics),
        "putAction" => body(message).map(Request::Action),
        "patchVm" => body(message).map(Request::PatchVm),
        "putVmSave" => body(message).map(Request::SaveVm),
        "putVmStop" => body(message).map(Request::StopVm),
        "putVmFork" => body(message).map(Request::ForkVm),
        "putForkLoad" => body(message).map(Request::ForkLoad),
        "putVmCheckpoint" => body_if_any(message).map(Request::CheckpointVm),
        "putVmReset" => body_if_any(message).map(Request::ResetVm),
        "getVmStats" => Ok(Request::GetStats),
        "getMemoryMap" => query(message).map(Request::GetMemoryMap),
        "putSnapshotCreate" => body(message).map(Request::SnapshotCreate),
        "putSnapshotCancel" => body_if_any(message).map(Request::SnapshotCancel),
        "putSnapshotLoad" => body(message).map(Request::SnapshotLoad),
        "getSnapshotStatus" => Ok(Request::SnapshotStatus),
        "putLogger" => body(message).map(Request::PutLogger),
        "putMetrics" => body(message).map(Request::PutMetrics),
        "getMetrics" => Ok(Request::GetMetrics),
        // A test holds this list and the table of calls together.
        other => Err(Response::fault(500, &format!("the call {other} is in the document and has no meaning here"))),
    }
}

fn body<T: DeserializeOwned>(message: &Message) -> Result<T, Response> {
    read(&message.body, message)
}

/// A body that need not be there.
fn body_if_any<T: DeserializeOwned>(message: &Message) -> Result<T, Response> {
    read(if message.body.is_empty() { b"{}" } else { &message.body }, message)
}

fn read<T: DeserializeOwned>(body: &[u8], message: &Message) -> Result<T, Response> {
    strict::from_slice(body).map_err(|e| {
        Response::fault(400, &format!("{} {}: the body is not what it should be: {e}", message.method, message.path))
    })
}

/// A body that names itself as the end of its path does.
fn named<T: DeserializeOwned>(
    operation: &Operation,
    message: &Message,
    name: &str,
    own: impl Fn(&T) -> &String,
) -> Result<T, Response> {
    let document = body(message)?;
    if own(&document) == name {
        return Ok(document);
    }
    let field = operation.name_field().unwrap_or_default();
    let text = format!("{field} is {:?} in the body of {} {}", own(&document), message.method, message.path);
    Err(Response::fault(400, &text))
}

fn query(message: &Message) -> Result<MemoryMapQuery, Response> {
    memory_map_query(message.query.as_deref().unwrap_or_default())
        .map_err(|reason| Response::fault(400, &format!("{} {}: {reason}", message.method, message.path)))
}

/// What a query says of a map of memory: `start` and `max_runs`, each once at most, as decimal numbers.
fn memory_map_query(query: &str) -> Result<MemoryMapQuery, String> {
    let mut said = [("start", None), ("max_runs", None)];
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let Some((_, number)) = said.iter_mut().find(|(known, _)| *known == name) else {
            return Err(format!("unknown parameter `{name}`, expected `start` or `max_runs`"));
        };
        // Not `+5`, which `parse` would take.
        let parsed = value.parse::<u64>().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()));
        let parsed = parsed.ok_or_else(|| format!("{name} is `{value}`; it must be a decimal number below 2^64"))?;
        if number.replace(parsed).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    let [(_, start), (_, max_runs)] = said;
    let default = MemoryMapQuery::default();
    let max_runs = match max_runs {
        None => default.max_runs,
        Some(runs) => u32::try_from(runs)
            .ok()
            .filter(|runs| MAX_RUNS.contains(runs))
            .ok_or_else(|| format!("max_runs is {runs}; it may be {} to {}", MAX_RUNS.start(), MAX_RUNS.end()))?,
    };
    Ok(MemoryMapQuery { start: start.unwrap_or(default.start), max_runs })
}

fn unknown(method: &str, path: &str) -> Response {
    let methods = operations::methods(path);
    if methods.is_empty() {
        if let Some(error) = bad_name(method, path) {
            return Response::fault(404, &error.to_string());
        }
        return Response::fault(404, &format!("there is no {path} here"));
    }
    let methods = methods.join(", ");
    Response::fault(405, &format!("{path} does not take {method}; it takes {methods}")).with_header("Allow", methods)
}

/// What is wrong with the name at the end of a path that would be a call's if its name were one.
fn bad_name(method: &str, path: &str) -> Option<ConfigError> {
    OPERATIONS.iter().filter(|operation| operation.method == method && operation.when != When::Never).find_map(
        |operation| {
            let name = path.strip_prefix(operation.named()?.0)?;
            config::check_id(&operation.name_field()?, name).err()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::operations::MAY_SAY_NOTHING;
    use api_spec::reset::VmReset;
    use proptest::prelude::*;

    fn message(method: &str, path: &str, body: &str) -> Message {
        Message { method: method.into(), path: path.into(), body: body.into(), ..Message::default() }
    }

    /// A call as its example says.
    fn example(operation: &Operation) -> Message {
        let body = operation.body.as_ref().map_or("", |body| body.example);
        let path = match operation.named() {
            Some((start, name)) => {
                let body: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
                format!("{start}{}", body[name].as_str().unwrap_or("a"))
            }
            None => operation.path.to_owned(),
        };
        message(operation.method, &path, body)
    }

    #[test]
    fn what_has_nothing_to_say_need_not_be_said() {
        for operation in OPERATIONS.iter().filter(|operation| operation.when != When::Never && operation.body.is_some())
        {
            let without = Message { body: Vec::new(), ..example(operation) };
            assert_eq!(route(&without).is_ok(), MAY_SAY_NOTHING.contains(&operation.id), "{}", operation.id);
        }
        let reset = route(&message("PUT", "/vm/reset", ""));
        assert!(matches!(reset, Ok(Request::ResetVm(reset)) if reset == VmReset::default()));
    }

    #[test]
    fn every_call_is_routed_and_its_example_is_taken() {
        for operation in OPERATIONS {
            let message = example(operation);
            let routed = route(&message);
            let is_declined = matches!(routed, Ok(Request::Declined(_)));
            assert!(routed.is_ok(), "{}: {routed:?}", operation.id);
            assert_eq!(is_declined, operation.when == When::Never, "{}", operation.id);
            assert_eq!(
                route(&Message { method: "POST".into(), ..message }).unwrap_err().status,
                405,
                "{}",
                operation.path
            );
        }
        assert_eq!(route(&message("GET", "/nothing", "")).unwrap_err().status, 404);
    }

    #[test]
    fn every_field_in_the_document_is_known_and_no_other() {
        for operation in OPERATIONS.iter().filter(|operation| operation.body.is_some()) {
            let shape = operation.body.as_ref().unwrap();
            let example: serde_json::Map<String, serde_json::Value> = serde_json::from_str(shape.example).unwrap();
            let schema = api_spec::openapi::schema(shape);
            let with = |field: &str, value: serde_json::Value| {
                let mut body = example.clone();
                body.insert(field.to_owned(), value);
                let message = self::example(operation);
                let refused = route(&Message { body: serde_json::to_vec(&body).unwrap(), ..message }).err();
                refused.map(|refused| String::from_utf8_lossy(&refused.body).into_owned())
            };
            for field in schema["schema"]["properties"].as_object().into_iter().flat_map(|fields| fields.keys()) {
                // A value that no field takes: if the field is known, that is what is said.
                let refused = with(field, serde_json::json!([[[[]]]])).unwrap_or_default();
                assert!(!refused.contains("unknown field"), "{}: {field}: {refused}", operation.id);
            }
            assert!(with("speed", 9.into()).unwrap().contains("unknown field `speed`"), "{}", operation.id);
            for required in schema["schema"]["required"].as_array().into_iter().flatten() {
                let mut body = example.clone();
                body.remove(required.as_str().unwrap());
                let message = self::example(operation);
                let refused = route(&Message { body: serde_json::to_vec(&body).unwrap(), ..message }).unwrap_err();
                let text = String::from_utf8_lossy(&refused.body).into_owned();
                assert!(text.contains("missing field"), "{}: {required}: {text}", operation.id);
            }
        }
    }

    #[test]
    fn the_path_and_the_body_name_the_same_device() {
        let put = |path: &str, body: &str| route(&message("PUT", path, body));
        let (drive, interface) = (r#"{"drive_id":"a","path_on_host":"d"}"#, r#"{"iface_id":"a","host_dev_name":"t"}"#);
        assert!(matches!(put("/drives/a", drive), Ok(Request::PutDrive(_))));
        assert!(matches!(put("/network-interfaces/a", interface), Ok(Request::PutNetworkInterface(_))));
        let update = r#"{"drive_id":"a","max_overlay_mib":9}"#;
        assert!(matches!(route(&message("PATCH", "/drives/a", update)), Ok(Request::PatchDrive(_))));
        for (start, body) in [("/drives", drive), ("/network-interfaces", interface)] {
            let refused = put(&format!("{start}/b"), body).unwrap_err();
            assert_eq!(refused.status, 400);
            let words = String::from_utf8_lossy(&refused.body).into_owned();
            assert!(words.contains("_id is \\\"a\\\" in the body"), "{words}");
            assert!(put(&format!("{start}/a/"), body).is_ok(), "a slash at the end");
            for nameless in ["", "/", "/a/x"] {
                let path = format!("{start}{nameless}");
                assert!(matches!(put(&path, body), Err(Response { status: 404, .. })), "{path}");
                let says_what_a_name_is =
                    String::from_utf8_lossy(&put(&path, body).unwrap_err().body).contains("_id is");
                assert_eq!(says_what_a_name_is, !nameless.is_empty(), "{path}");
            }
        }
    }

    #[test]
    fn a_query_is_taken_where_there_is_one() {
        let with = |path: &str, query: &str| {
            route(&Message { query: Some(query.into()), ..message("GET", path, "") })
                .map_err(|refused| (refused.status, String::from_utf8_lossy(&refused.body).into_owned()))
        };
        let Ok(Request::GetMemoryMap(query)) = with("/vm/memory-map", "max_runs=7&start=4096") else { panic!() };
        assert_eq!(query, MemoryMapQuery { start: 4096, max_runs: 7 });
        for (path, query, words) in [
            ("/vm/memory-map", "stop=1", "`stop`"),
            ("/vm/memory-map", "start", "start is ``"),
            ("/vm/memory-map", "start=0x1000", "start is `0x1000`"),
            ("/vm/memory-map", "start=%31", "start is `%31`"),
            ("/vm/memory-map", "max_runs=0", "max_runs is 0; it may be 1 to 10000"),
            ("/vm/memory-map", "max_runs=4294967297", "max_runs is 4294967297"),
            ("/vm/memory-map", "start=1&start=1", "start is there twice"),
            ("/vm/stats", "start=1", "takes no query"),
            ("/", "a", "`?a`"),
        ] {
            let (status, text) = with(path, query).unwrap_err();
            assert!(status == 400 && text.contains(words) && text.contains(path), "{path}?{query}: {text}");
        }
    }

    #[test]
    fn the_document_says_what_the_query_may_be() {
        let (operation, _) = operations::find("GET", "/vm/memory-map").unwrap();
        let schema = api_spec::openapi::schema(operation.query.as_ref().unwrap());
        let runs = &schema["schema"]["properties"]["max_runs"];
        assert_eq!((&runs["minimum"], &runs["maximum"]), (&(*MAX_RUNS.start()).into(), &(*MAX_RUNS.end()).into()));
    }

    proptest! {
        #[test]
        fn no_query_makes_parsing_panic(query in "[a-z_=&0-9+%-]{0,40}|\\PC*") {
            let _ = memory_map_query(&query);
        }

        #[test]
        fn a_query_is_what_was_said(start in prop::option::of(any::<u64>()), runs in prop::option::of(MAX_RUNS), swap: bool) {
            let mut parts: Vec<String> = start.map(|n| format!("start={n}")).into_iter().collect();
            parts.extend(runs.map(|n| format!("max_runs={n}")));
            if swap {
                parts.reverse();
            }
            let query = memory_map_query(&parts.join("&"));
            prop_assert_eq!(query, Ok(MemoryMapQuery { start: start.unwrap_or(0), max_runs: runs.unwrap_or(1000) }));
        }
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let refused = route(&message("PATCH", "/vm", r#"{"state":"Paused","speed":9}"#)).unwrap_err();
        assert_eq!(refused.status, 400);
        assert!(String::from_utf8_lossy(&refused.body).contains("speed"));
    }
}
