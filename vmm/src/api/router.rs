//! Which request a message is. Pure.

use super::http::Message;
use super::{Request, Response};
use serde::de::DeserializeOwned;

/// Every path with its methods, in the order in which they are documented. A last part in braces stands for any name.
const ROUTES: [(&str, &[&str]); 14] = [
    ("/", &["GET"]),
    ("/version", &["GET"]),
    ("/vm/config", &["GET"]),
    ("/machine-config", &["GET", "PUT"]),
    ("/boot-source", &["PUT"]),
    ("/vsock", &["PUT"]),
    ("/serial", &["PUT"]),
    ("/network-interfaces/{iface_id}", &["PUT"]),
    ("/entropy", &["PUT"]),
    ("/actions", &["PUT"]),
    ("/vm", &["PATCH"]),
    ("/snapshot/create", &["PUT"]),
    ("/snapshot/load", &["PUT"]),
    ("/snapshot/status", &["GET"]),
];

/// The request that `message` is, or the answer that it gets at once.
pub fn route(message: &Message) -> Result<Request, Response> {
    let (method, path) = (message.method.as_str(), message.path.as_str());
    if let ("PUT", Some(id)) = (method, name_in("/network-interfaces/", path)) {
        return body(message).map(|interface| Request::PutNetworkInterface(id.to_owned(), interface));
    }
    match (method, path) {
        ("GET", "/") => Ok(Request::Info),
        ("GET", "/version") => Ok(Request::Version),
        ("GET", "/vm/config") => Ok(Request::Config),
        ("GET", "/machine-config") => Ok(Request::GetMachineConfig),
        ("GET", "/snapshot/status") => Ok(Request::SnapshotStatus),
        ("PUT", "/machine-config") => body(message).map(Request::PutMachineConfig),
        ("PUT", "/boot-source") => body(message).map(Request::PutBootSource),
        ("PUT", "/vsock") => body(message).map(Request::PutVsock),
        ("PUT", "/serial") => body(message).map(Request::PutSerial),
        ("PUT", "/entropy") => body(message).map(Request::PutEntropy),
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
        Message { method: method.into(), path: path.into(), body: body.into(), keep_alive: true }
    }

    #[test]
    fn every_listed_route_is_routed() {
        for (path, methods) in ROUTES {
            for method in methods {
                let routed = route(&message(method, path, ""));
                assert!(!matches!(routed, Err(Response { status: 404 | 405, .. })), "{method} {path}");
            }
            assert!(matches!(route(&message("DELETE", path, "")), Err(Response { status: 405, .. })), "{path}");
        }
        assert!(matches!(route(&message("GET", "/nothing", "")), Err(Response { status: 404, .. })));
    }

    #[test]
    fn a_name_in_the_path_goes_with_the_body() {
        let put = |path| route(&message("PUT", path, r#"{"iface_id":"a","host_dev_name":"tap0"}"#));
        assert!(
            matches!(put("/network-interfaces/b"), Ok(Request::PutNetworkInterface(id, body)) if id == "b" && body.iface_id == "a")
        );
        for nameless in ["/network-interfaces", "/network-interfaces/", "/network-interfaces/a/b"] {
            assert!(matches!(put(nameless), Err(Response { status: 404, .. })), "{nameless}");
        }
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let refused = route(&message("PATCH", "/vm", r#"{"state":"Paused","speed":9}"#)).unwrap_err();
        assert_eq!(refused.status, 400);
        assert!(String::from_utf8_lossy(&refused.body).contains("speed"));
    }
}
