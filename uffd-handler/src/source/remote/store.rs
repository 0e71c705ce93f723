//! A snapshot in an object store or behind a web server: reading its files, whole or in parts, within deadlines.

use super::bounded::Connector;
use super::location::Location;
use super::plain;
use super::runner::Runner;
use super::settings::Settings;
use futures_util::StreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::http::HttpBuilder;
use object_store::limit::LimitStore;
use object_store::path::Path;
use object_store::{ClientConfigKey, Error, GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, RetryConfig};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Longest that making a connection may take.
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Longest that an answer of up to a MiB may take, with all that it needs: attempts, connection and transfer. Larger ones have a
/// second more for each further MiB.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Pauses before further attempts at one request. Few: whoever waits for it tries again, and wants to know why.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(400)];
/// Requests that are on their way at the same time, for one snapshot.
const MOST_REQUESTS: usize = 8;

/// Why a file of a remote snapshot cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The settings make no sense.
    #[error("{0}: cannot be reached with these settings: {1}")]
    Setup(String, String),
    /// It is not there.
    #[error("{0} is not there: check the URL, or upload the snapshot again")]
    Missing(String),
    /// The other side wants to know who asks.
    #[error("{url}: access is refused: {reason}; {remedy}")]
    Refused {
        /// The object.
        url: String,
        /// What the other side said.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// It is another object than it was.
    #[error(
        "{0} was replaced since it was opened: nothing may write to a snapshot; put the old object back, or start the page server anew"
    )]
    Changed(String),
    /// The server knows no ranges.
    #[error("{0}: the server does not answer requests for a range of bytes (HTTP `Range`): use one that does")]
    NoRanges(String),
    /// It is longer than it can be.
    #[error("{url} has {found} bytes, more than the {limit} that it can have: it belongs to no snapshot")]
    TooLong {
        /// The object.
        url: String,
        /// Its length.
        found: u64,
        /// The longest accepted.
        limit: u64,
    },
    /// The answer ended early, or did not end.
    #[error("{url}: the answer has {found} bytes instead of {expected}")]
    WrongLength {
        /// The object.
        url: String,
        /// So many came, at least.
        found: u64,
        /// So many should have.
        expected: u64,
    },
    /// Any other failure, no answer in time among them.
    #[error("{0}: {1}")]
    Failed(String, String),
}

impl StoreError {
    /// Whether another attempt at once may do better.
    fn may_pass(&self) -> bool {
        matches!(self, StoreError::WrongLength { .. } | StoreError::Failed(..))
    }
}

/// An object as it was when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Its length, in bytes.
    pub size: u64,
    etag: Option<String>,
    modified_s: i64,
}

impl Pin {
    fn of(meta: &ObjectMeta) -> Pin {
        Pin { size: meta.size, etag: meta.e_tag.clone(), modified_s: meta.last_modified.timestamp() }
    }

    /// What makes the other side refuse if the object was replaced. A weak tag would never match.
    fn condition(&self) -> Option<String> {
        self.etag.clone().filter(|etag| !etag.starts_with("W/"))
    }
}

/// The files of one remote snapshot.
#[derive(Debug)]
pub struct Store {
    objects: LimitStore<Box<dyn ObjectStore>>,
    location: Location,
    settings: Settings,
    runner: Arc<Runner>,
}

impl Store {
    /// Prepares to talk; says nothing yet.
    pub fn new(location: Location, settings: Settings, runner: Arc<Runner>) -> Result<Store, StoreError> {
        let objects = match &location {
            Location::S3 { bucket, .. } => s3(bucket, &settings),
            Location::Web(url) => web(url.as_str(), url.scheme() == "http"),
        };
        let objects = objects.map_err(|why| StoreError::Setup(location.to_string(), settings.hide_secrets(&why)))?;
        Ok(Store { objects: LimitStore::new(objects, MOST_REQUESTS), location, settings, runner })
    }

    /// Where the snapshot is.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Reads a whole file of at most `limit` bytes.
    pub fn read_whole(&self, file: &str, limit: u64) -> Result<Vec<u8>, StoreError> {
        let url = self.location.name_of(file);
        self.wait(file, deadline(limit), async || {
            let answer = self.get(file, GetOptions::default()).await?;
            match answer.meta.size {
                found if found > limit => Err(StoreError::TooLong { url: url.clone(), found, limit }),
                expected => self.collect(file, answer, expected).await,
            }
        })
    }

    /// Finds out what identifies a file, and that parts of it can be read.
    pub fn pin(&self, file: &str) -> Result<Pin, StoreError> {
        let options = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
        self.wait(file, REQUEST_DEADLINE, async || Ok(Pin::of(&self.get(file, options.clone()).await?.meta)))
    }

    /// Reads a part of a file, if it still is the one that was pinned.
    pub fn read_range(&self, file: &str, pin: &Pin, range: Range<u64>) -> Result<Vec<u8>, StoreError> {
        let expected = range.end - range.start;
        let options =
            GetOptions { range: Some(GetRange::Bounded(range)), if_match: pin.condition(), ..GetOptions::default() };
        self.wait(file, deadline(expected), async || {
            let answer = self.get(file, options.clone()).await?;
            if Pin::of(&answer.meta) != *pin {
                return Err(StoreError::Changed(self.location.name_of(file)));
            }
            self.collect(file, answer, expected).await
        })
    }

    /// Makes attempts at something until one succeeds, fails for good, or was the last.
    fn wait<T>(
        &self,
        file: &str,
        deadline: Duration,
        attempt: impl AsyncFn() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let attempts = async {
            for pause in PAUSES {
                match attempt().await {
                    Err(error) if error.may_pass() => tokio::time::sleep(pause).await,
                    other => return other,
                }
            }
            attempt().await
        };
        let late = |late| self.failure(self.location.name_of(file), format!("{late}"));
        self.runner.wait(deadline, attempts).map_err(late)?
    }

    async fn get(&self, file: &str, options: GetOptions) -> Result<GetResult, StoreError> {
        let path = match &self.location {
            Location::S3 { prefix, .. } => format!("{prefix}/{file}"),
            Location::Web(_) => file.to_owned(),
        };
        let path =
            Path::parse(path).map_err(|error| StoreError::Setup(self.location.name_of(file), plain::reason(&error)))?;
        self.objects.get_opts(&path, options).await.map_err(|error| self.failed(file, &error))
    }

    /// Takes in the body of an answer, which must have this length.
    async fn collect(&self, file: &str, answer: GetResult, expected: u64) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::with_capacity(expected as usize);
        let mut stream = answer.into_stream();
        while let Some(part) = stream.next().await {
            bytes.extend_from_slice(&part.map_err(|error| self.failed(file, &error))?);
            if bytes.len() as u64 > expected {
                break;
            }
        }
        match bytes.len() as u64 {
            found if found == expected => Ok(bytes),
            found => Err(StoreError::WrongLength { url: self.location.name_of(file), found, expected }),
        }
    }

    fn failed(&self, file: &str, error: &Error) -> StoreError {
        let url = self.location.name_of(file);
        let reason = || self.settings.hide_secrets(&plain::reason(error));
        match error {
            Error::NotFound { .. } => StoreError::Missing(url),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                StoreError::Refused { url, reason: reason(), remedy: self.remedy() }
            }
            Error::Precondition { .. } => StoreError::Changed(url),
            Error::NotSupported { .. } => StoreError::NoRanges(url),
            _ => self.failure(url, reason()),
        }
    }

    /// A failure, which may be for want of credentials if there are none.
    fn failure(&self, url: String, reason: String) -> StoreError {
        match self.location {
            Location::S3 { .. } if !self.settings.have_credentials() => {
                StoreError::Failed(url, format!("{reason}; there are no credentials: {}", self.remedy()))
            }
            _ => StoreError::Failed(url, reason),
        }
    }

    fn remedy(&self) -> &'static str {
        match self.location {
            Location::S3 { .. } => {
                "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, AWS_REGION) for an account that may read it, or AWS_SKIP_SIGNATURE=true if everybody may"
            }
            Location::Web(_) => "let the server give it to this host without a login, or use s3://",
        }
    }
}

fn deadline(bytes: u64) -> Duration {
    REQUEST_DEADLINE + Duration::from_secs(bytes >> 20)
}

/// The client itself tries once: it would write a line for each further attempt, for as long as a store is away.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, retry_timeout: REQUEST_DEADLINE, ..RetryConfig::default() }
}

/// Of every connection. How long a whole answer may take is seen to here, as it depends on its length.
fn client_settings() -> [(ClientConfigKey, String); 2] {
    let seconds = |deadline: Duration| format!("{} seconds", deadline.as_secs());
    [
        (ClientConfigKey::ConnectTimeout, seconds(CONNECT_DEADLINE)),
        (ClientConfigKey::Timeout, seconds(deadline(1 << 30))),
    ]
}

fn s3(bucket: &str, settings: &Settings) -> Result<Box<dyn ObjectStore>, String> {
    let endpoint = settings.get("AWS_ENDPOINT_URL_S3").or_else(|| settings.get("AWS_ENDPOINT_URL"));
    if endpoint.is_some_and(|url| url.starts_with("http://")) && settings.get("AWS_ALLOW_HTTP").is_none() {
        return Err("AWS_ENDPOINT_URL is not encrypted; use https://, or set AWS_ALLOW_HTTP=true".to_owned());
    }
    let mut builder = AmazonS3Builder::new().with_http_connector(Connector::default());
    for (name, value) in settings.iter() {
        // Others are for other programs.
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    for (key, value) in client_settings() {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    let built = builder.with_bucket_name(bucket).with_retry(no_retries()).build();
    built.map(|store| Box::new(store) as Box<dyn ObjectStore>).map_err(|error| plain::reason(&error))
}

fn web(url: &str, allow_http: bool) -> Result<Box<dyn ObjectStore>, String> {
    let mut builder =
        HttpBuilder::new().with_url(url).with_retry(no_retries()).with_http_connector(Connector::default());
    for (key, value) in client_settings() {
        builder = builder.with_config(key, value);
    }
    let built = builder.with_config(ClientConfigKey::AllowHttp, allow_http.to_string()).build();
    built.map(|store| Box::new(store) as Box<dyn ObjectStore>).map_err(|error| plain::reason(&error))
}
