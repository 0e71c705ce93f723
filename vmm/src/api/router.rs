//! Which request a message is. Pure.

use super::http::Message;
use super::{Request, Response};
use api_spec::devices::{Drive, DriveUpdate, NetworkInterface};
use serde::de::DeserializeOwned;

/// Every path with its methods, in the order in which they are documented.
const ROUTES: &[(&str, &[&str])] = &[
    ("/", &["GET"]),
    ("/version", &["GET"]),
    ("/vm/config", &["GET"]),
    ("/machine-config", &["GET", "PUT", "PATCH"]),
    ("/boot-source", &["PUT"]),
    ("/vsock", &["PUT"]),
    ("/serial", &["PUT"]),
    (DRIVES, &["PUT", "PATCH"]),
    (INTERFACES, &["PUT"]),
    ("/entropy", &["PUT"]),
    ("/balloon", &["GET", "PUT", "PATCH"]),
    ("/balloon/statistics", &["GET", "PATCH"]),
    ("/actions", &["PUT"]),
    ("/vm", &["PATCH"]),
    ("/snapshot/create", &["PUT"]),
    ("/snapshot/load", &["PUT"]),
    ("/snapshot/status", &["GET"]),
];

/// The path of a disk; its last part stands for any name.
const DRIVES: &str = "/drives/{drive_id}";
/// The path of a network interface, likewise.
const INTERFACES: &str = "/network-interfaces/{iface_id}";

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

/// The name in a path of this form, if it is one: `known` ends with what the name is called, in braces.
fn name_in<'a>(known: &str, path: &'a str) -> Option<&'a str> {
    let (start, _) = known.split_once('{')?;
    path.strip_prefix(start).filter(|name| !name.is_empty() && !name.contains('/'))
}

fn body<T: DeserializeOwned>(message: &Message) -> Result<T, Response> {
    serde_json::from_slice(&message.body).map_err(|e| {
        Response::fault(400, &format!("{} {}: the body is not what it should be: {e}", message.method, message.path))
    })
}

/// A body that names what the path of this form names.
fn named<T: DeserializeOwned>(message: &Message, known: &str, name: impl Fn(&T) -> &String) -> Result<T, Response> {
    let document = body(message)?;
    match name_in(known, &message.path) {
        Some(id) if id == name(&document) => Ok(document),
        _ => {
            let field = known.trim_end_matches('}').rsplit('{').next().unwrap_or_default();
            let text = format!("{} {}: the body's {field} is {}", message.method, message.path, name(&document));
            Err(Response::fault(400, &text))
        }
    }
}

fn unknown(method: &str, path: &str) -> Response {
    match ROUTES.iter().find(|(known, _)| *known == path || name_in(known, path).is_some()) {
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
        Message { method: method.into(), path: path.into(), body: body.into(), keep_alive: true }
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
    fn the_path_and_the_body_name_the_same_disk() {
        let body = r#"{"drive_id":"root","path_on_host":"d"}"#;
        assert!(matches!(route(&message("PUT", "/drives/root", body)), Ok(Request::PutDrive(_))));
        let refused = route(&message("PUT", "/drives/other", body)).unwrap_err();
        assert_eq!(refused.status, 400);
        assert!(String::from_utf8_lossy(&refused.body).contains("drive_id is root"));
        for path in ["/drives", "/drives/", "/drives/root/x"] {
            assert!(matches!(route(&message("PUT", path, body)), Err(Response { status: 404, .. })), "{path}");
        }
        let body = r#"{"drive_id":"root","max_overlay_mib":9}"#;
        assert!(matches!(route(&message("PATCH", "/drives/root", body)), Ok(Request::PatchDrive(_))));
        let body = r#"{"iface_id":"eth0","host_dev_name":"tap0"}"#;
        let put = |path| route(&message("PUT", path, body));
        assert!(matches!(put("/network-interfaces/eth0"), Ok(Request::PutNetworkInterface(_))));
        let refused = put("/network-interfaces/eth1").unwrap_err();
        assert!(String::from_utf8_lossy(&refused.body).contains("iface_id is eth0"));
        assert!(matches!(put("/network-interfaces/"), Err(Response { status: 404, .. })));
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let refused = route(&message("PATCH", "/vm", r#"{"state":"Paused","speed":9}"#)).unwrap_err();
        assert_eq!(refused.status, 400);
        assert!(String::from_utf8_lossy(&refused.body).contains("speed"));
    }
}
