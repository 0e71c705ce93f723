//! URLs of snapshots: what may be given to `--snapshot` besides a path. Pure.

use std::fmt;
use url::Url;

/// A URL that no snapshot can have. What it shows of the URL holds no credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// A scheme that is not spoken here.
    #[error("{0}: snapshots are read from s3://, http:// and https:// URLs, and from local paths")]
    Scheme(String),
    /// A bucket that cannot be.
    #[error("{0}: names no bucket; write s3://BUCKET/PATH/OF/SNAPSHOT")]
    Bucket(String),
    /// A path that is empty, or has parts that object stores and web servers take for something else.
    #[error("{0}: the path must name the snapshot, without `.`, `..`, empty parts or control characters")]
    Path(String),
    /// A user, a password or a query.
    #[error(
        "{0}: a URL may hold no user, password, query or fragment: it is logged; give credentials in the environment"
    )]
    Secrets(String),
    /// No URL at all.
    #[error("{0}: {1}")]
    Malformed(String, url::ParseError),
}

/// Where a snapshot lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In an object store that speaks S3.
    S3 {
        /// The bucket.
        bucket: String,
        /// What the names of the snapshot's objects begin with, without the last `/`.
        prefix: String,
    },
    /// Behind a web server.
    Web(
        /// The snapshot's directory, without a `/` at the end.
        Url,
    ),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Location::Web(url) => write!(f, "{url}"),
        }
    }
}

impl Location {
    /// Understands the URL of a snapshot's directory, or of the `snap.json` in it.
    pub fn parse(text: &str) -> Result<Location, LocationError> {
        let shown = || without_secrets(text);
        let (scheme, rest) = text.split_once("://").ok_or_else(|| LocationError::Scheme(shown()))?;
        let rest = rest.strip_suffix("/snap.json").unwrap_or(rest);
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        match scheme {
            "s3" => parse_s3(rest, shown),
            "http" | "https" => parse_web(&format!("{scheme}://{rest}"), shown),
            _ => Err(LocationError::Scheme(shown())),
        }
    }

    /// How messages call one of the snapshot's files.
    pub fn name_of(&self, file: &str) -> String {
        format!("{self}/{file}")
    }
}

fn parse_s3(rest: &str, shown: impl Fn() -> String) -> Result<Location, LocationError> {
    if rest.contains(['@', '?', '#']) {
        return Err(LocationError::Secrets(shown()));
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
    if !(1..=255).contains(&bucket.len()) || !bucket.chars().all(plain) {
        return Err(LocationError::Bucket(shown()));
    }
    if prefix.split('/').any(|part| matches!(part, "" | "." | "..")) || prefix.chars().any(char::is_control) {
        return Err(LocationError::Path(shown()));
    }
    Ok(Location::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

fn parse_web(text: &str, shown: impl Fn() -> String) -> Result<Location, LocationError> {
    let url = Url::parse(text).map_err(|error| LocationError::Malformed(shown(), error))?;
    let secrets = !url.username().is_empty() || url.password().is_some();
    if secrets || url.query().is_some() || url.fragment().is_some() {
        return Err(LocationError::Secrets(shown()));
    }
    let mut parts = url.path_segments().into_iter().flatten();
    if url.path() == "/" || parts.any(str::is_empty) || text.chars().any(char::is_control) {
        return Err(LocationError::Path(shown()));
    }
    Ok(Location::Web(url))
}

/// The text without what may be secret in a URL: what comes before an `@`, and what follows `?` or `#`.
fn without_secrets(text: &str) -> String {
    let text = text.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    match rest.rsplit_once('@') {
        Some((_, rest)) => format!("{scheme}://...@{rest}"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(text: &str) -> String {
        Location::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn urls_of_snapshots_are_understood() {
        let s3 = |bucket: &str, prefix: &str| Location::S3 { bucket: bucket.into(), prefix: prefix.into() };
        assert_eq!(Location::parse("s3://images/web/v 7%/"), Ok(s3("images", "web/v 7%")));
        assert_eq!(Location::parse("s3://images/web/snap.json"), Ok(s3("images", "web")));
        for text in ["https://host:8443/a/b", "https://host:8443/a/b/", "https://host:8443/a/b/snap.json"] {
            let location = Location::parse(text).unwrap();
            assert_eq!(location.to_string(), "https://host:8443/a/b");
            assert_eq!(location.name_of("mem.bin"), "https://host:8443/a/b/mem.bin");
        }
    }

    #[test]
    fn other_urls_are_refused_by_name() {
        for (text, part) in [
            ("file:///x/y", "local paths"),
            ("S3://a/b", "local paths"),
            ("no url", "local paths"),
            ("s3:///b", "names no bucket"),
            ("s3://Bad/b", "names no bucket"),
            ("s3://bucket", "must name the snapshot"),
            ("s3://bucket/a//b", "must name the snapshot"),
            ("s3://bucket/../b", "must name the snapshot"),
            ("http://host", "must name the snapshot"),
            ("http://host/a//b", "must name the snapshot"),
            ("http:///", "host"),
            ("http://host:x/a", "port"),
        ] {
            let error = refused(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn secrets_in_a_url_are_refused_and_not_repeated() {
        for text in [
            "https://me:hush@host/a",
            "https://hush@host/a",
            "https://host/a?sig=hush",
            "s3://hush@b/c",
            "s3://b/c?hush",
            "ftp://me:hush@host/x",
        ] {
            let error = refused(text);
            assert!(!error.contains("hush"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in ".{0,40}", scheme in prop::sample::select(vec!["s3://", "http://", "https://", "x://", ""])) {
            if let Ok(location) = Location::parse(&format!("{scheme}{text}")) {
                prop_assert_eq!(Location::parse(&location.to_string()), Ok(location));
            }
        }
    }
}
