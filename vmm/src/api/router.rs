//! Which request a message is. Pure.

use super::http::Message;
use super::{Request, Response};
use api_spec::devices::{Drive, DriveUpdate, NetworkInterface};
use serde::de::DeserializeOwned;

/// Every path with its methods, in the order in which they are documented. A last part in braces stands for any name.
const ROUTES: &[(&str, &[&str])] = &[
    ("/", &["GET"]),
    ("/version", &["GET"]),
    ("/vm/config", &["GET"]),
    ("/machine-config", &["GET", "PUT", "PATCH"]),
    ("/boot-source", &["PUT"]),
    ("/vsock", &["PUT"]),
    ("/serial", &["PUT"]),
    ("/drives/{drive_id}", &["PUT", "PATCH"]),
    ("/network-interfaces/{iface_id}", &["PUT"]),
    ("/entropy", &["PUT"]),
    ("/balloon", &["GET", "PUT", "PATCH"]),
    ("/balloon/statistics", &["GET", "PATCH"]),
    ("/actions", &["PUT"]),
    ("/vm", &["PATCH"]),
    ("/snapshot/create", &["PUT"]),
    ("/snapshot/load", &["PUT"]),
    ("/snapshot/status", &["GET"]),
];

/// What paths that name a disk or a network interface begin with.
const DRIVES: &str = "/drives/";
const INTERFACES: &str = "/network-interfaces/";

/// The request that `message` is, or the answer that it gets at once.
pub fn route(message: &Message) -> Result<Request, Response> {
    let (method, path) = (message.method.as_str(), message.path.as_str());
    match (method, path) {
        ("GET", "/") => Ok(Request::Info),
        ("GET", "/version") => Ok(Request::Version),
        ("GET", "/vm/config") => Ok(Request::Config),
        ("GET", "/machine-config") => Ok(Request::GetMachineConfig),
        ("GET", "/snapshot/status") => Ok(Request::SnapshotStatus),
        ("PUT", "/machine-config") => body(message).map(Request::PutMachineConfig),
        ("PATCH", "/machine-config") => body(message).map(Request::PatchMachineConfig),
        ("PUT", "/boot-source") => body(message).map(Request::PutBootSource),
        ("PUT", "/vsock") => body(message).map(Request::PutVsock),
        ("PUT", "/serial") => body(message).map(Request::PutSerial),
        ("PUT", _) if name_in(DRIVES, path).is_some() => {
            named(message, DRIVES, |drive: &Drive| &drive.drive_id).map(Request::PutDrive)
        }
        ("PATCH", _) if name_in(DRIVES, path).is_some() => {
            named(message, DRIVES, |update: &DriveUpdate| &update.drive_id).map(Request::PatchDrive)
        }
        ("PUT", _) if name_in(INTERFACES, path).is_some() => {
            named(message, INTERFACES, |interface: &NetworkInterface| &interface.iface_id)
                .map(Request::PutNetworkInterface)
        }
        ("PUT", "/entropy") => body(message).map(Request::PutEntropy),
        ("GET", "/balloon") => Ok(Request::GetBalloon),
        ("PUT", "/balloon") => body(message).map(Request::PutBalloon),
        ("PATCH", "/balloon") => body(message).map(Request::PatchBalloon),
        ("GET", "/balloon/statistics") => Ok(Request::GetBalloonStatistics),
        ("PATCH", "/balloon/statistics") => body(message).map(Request::PatchBalloonStatistics),
        ("PUT", "/actions") => body(message).map(Request::Action),
        ("PATCH", "/vm") => body(message).map(Request::PatchVm),
        ("PUT", "/snapshot/create") => body(message).map(Request::SnapshotCreate),
        ("PUT", "/snapshot/load") => body(message).map(Request::SnapshotLoad),
        _ => Err(unknown(method, path)),
    }
}

/// The name at the end of a path that begins so, if there is one.
fn name_in<'a>(start: &str, path: &'a str) -> Option<&'a str> {
    path.strip_prefix(start).filter(|name| !name.is_empty() && !name.contains('/'))
}

/// Whether a path is one of those that `known` stands for.
fn is(known: &str, path: &str) -> bool {
    match known.split_once('{') {
        Some((start, _)) => name_in(start, path).is_some(),
        None => known == path,
    }
}

fn body<T: DeserializeOwned>(message: &Message) -> Result<T, Response> {
    serde_json::from_slice(&message.body).map_err(|e| {
        Response::fault(400, &format!("{} {}: the body is not what it should be: {e}", message.method, message.path))
    })
}

/// A body that names itself as the end of its path does, which begins with `start`.
fn named<T: DeserializeOwned>(message: &Message, start: &str, name: impl Fn(&T) -> &String) -> Result<T, Response> {
    let document = body(message)?;
    match name_in(start, &message.path) {
        Some(id) if id == name(&document) => Ok(document),
        _ => {
            let text = format!("{} {}: the body is of {}", message.method, message.path, name(&document));
            Err(Response::fault(400, &text))
        }
    }
}

fn unknown(method: &str, path: &str) -> Response {
    match ROUTES.iter().find(|(known, _)| is(known, path)) {
        Some((_, methods)) => {
            Response::fault(405, &format!("{path} does not take {method}; it takes {}", methods.join(", ")))
        }
        None => Response::fault(404, &format!("there is no {path} here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(method: &str, path: &str, body: &str) -> Message {
        Message { method: method.into(), path: path.into(), body: body.into(), ..Message::default() }
    }

    #[test]
    fn every_listed_route_is_routed() {
        for &(path, methods) in ROUTES {
            for &method in methods {
                let routed = route(&message(method, path, ""));
                assert!(!matches!(routed, Err(Response { status: 404 | 405, .. })), "{method} {path}");
            }
            assert!(matches!(route(&message("DELETE", path, "")), Err(Response { status: 405, .. })), "{path}");
        }
        assert!(matches!(route(&message("GET", "/nothing", "")), Err(Response { status: 404, .. })));
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
            assert!(String::from_utf8_lossy(&refused.body).contains("the body is of a"));
            for nameless in ["", "/", "/a/x"] {
                let path = format!("{start}{nameless}");
                assert!(matches!(put(&path, body), Err(Response { status: 404, .. })), "{path}");
            }
        }
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let refused = route(&message("PATCH", "/vm", r#"{"state":"Paused","speed":9}"#)).unwrap_err();
        assert_eq!(refused.status, 400);
        assert!(String::from_utf8_lossy(&refused.body).contains("speed"));
    }
}
