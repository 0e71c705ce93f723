//! An S3 server and a web server on loopback, which can be told to misbehave.

use crate::common::{PAGE, PATIENCE};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, JoinSet};

pub const KEY: &str = "AKEXAMPLE";
pub const SECRET: &str = "hush-hush";

/// What a server does with those who connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Open,
    /// Nobody listens.
    Shut,
    /// Connections are closed at once.
    Reset,
    /// Connections are accepted, and nothing follows.
    Hang,
}

/// An S3 server over a directory, whose subdirectories are the buckets.
pub struct S3 {
    pub address: SocketAddr,
    runtime: Runtime,
    service: S3Service,
    task: Option<JoinHandle<()>>,
}

impl S3 {
    pub fn start(root: &Path) -> S3 {
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
        service.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut server = S3 { address, runtime, service: service.build(), task: None };
        server.set_door(Door::Open);
        server
    }

    /// Ends all connections, and treats new ones like this.
    pub fn set_door(&mut self, door: Door) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = self.runtime.block_on(task);
        }
        if door != Door::Shut {
            let listener = self.runtime.block_on(TcpListener::bind(self.address)).unwrap();
            self.address = listener.local_addr().unwrap();
            self.task = Some(self.runtime.spawn(serve_s3(listener, self.service.clone(), door)));
        }
    }
}

async fn serve_s3(listener: TcpListener, service: S3Service, door: Door) {
    let (mut connections, mut held) = (JoinSet::new(), Vec::new());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        match door {
            Door::Open => {
                let http = hyper::server::conn::http1::Builder::new();
                connections.spawn(http.serve_connection(TokioIo::new(stream), service.clone()));
            }
            Door::Hang => held.push(stream),
            Door::Reset | Door::Shut => drop(stream),
        }
    }
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends before the body does.
    Truncated,
    /// It is of the range before, and says so.
    OtherRange,
    /// It is of the range before, and says otherwise.
    WrongBytes,
    /// The whole file.
    Whole,
    /// An error that repeats a secret.
    Status503,
    /// A refusal that does not end.
    Endless,
}

#[derive(Default)]
struct State {
    dir: PathBuf,
    etag: Mutex<Option<String>>,
    /// What to do with requests for `mem.bin`, and how often.
    fault: Mutex<Option<(Fault, usize)>>,
    asked: AtomicUsize,
}

/// A web server over a directory.
pub struct Web {
    pub address: SocketAddr,
    state: Arc<State>,
}

impl Web {
    pub fn start(dir: &Path) -> Web {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State { dir: dir.to_owned(), ..State::default() });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = shared.clone();
                // Whoever hangs up loses its answer.
                std::thread::spawn(move || state.answer(stream.unwrap()).unwrap_or_default());
            }
        });
        Web { address, state }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// From now on answers bear this tag.
    pub fn set_etag(&self, etag: &str) {
        *self.state.etag.lock().unwrap() = Some(etag.to_owned());
    }

    /// Answers the next requests for memory wrongly.
    pub fn misbehave(&self, fault: Fault, times: usize) {
        *self.state.fault.lock().unwrap() = Some((fault, times));
    }

    /// Requests for memory so far.
    pub fn asked(&self) -> usize {
        self.state.asked.load(Ordering::SeqCst)
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let request = lines.next().unwrap()?;
        let headers: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            let of = |line: &&String| line.to_ascii_lowercase().starts_with(&format!("{name}: "));
            headers.iter().find(of).map(|line| line[name.len() + 2..].to_owned())
        };
        let path = request.split(' ').nth(1).unwrap().trim_start_matches('/').to_owned();
        let Ok(body) = std::fs::read(self.dir.join(&path)) else {
            return respond(&mut stream, "404 Not Found", "", b"nothing here");
        };
        let etag = self.etag.lock().unwrap().clone();
        let tag = etag.as_ref().map_or(String::new(), |etag| format!("ETag: {etag}\r\n"));
        if header("if-match").is_some_and(|wanted| Some(wanted) != etag) {
            return respond(&mut stream, "412 Precondition Failed", &tag, b"");
        }
        let Some(range) = header("range") else { return respond(&mut stream, "200 OK", &tag, &body) };
        let fault = if path.ends_with("mem.bin") { self.next_fault() } else { None };
        respond_range(&mut stream, &tag, &body, &range, fault)
    }

    fn next_fault(&self) -> Option<Fault> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut fault = self.fault.lock().unwrap();
        let (kind, left) = fault.as_mut().filter(|(_, left)| *left > 0)?;
        *left -= 1;
        Some(*kind)
    }
}

fn respond(stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    stream.write_all(body)
}

fn respond_range(
    stream: &mut TcpStream,
    tag: &str,
    body: &[u8],
    range: &str,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let wanted = first.parse::<usize>().unwrap()..(last.parse::<usize>().unwrap() + 1).min(body.len());
    let before = wanted.start.saturating_sub(wanted.len())..wanted.end.saturating_sub(wanted.len());
    let line = |range: &Range<usize>| {
        format!("{tag}Content-Range: bytes {}-{}/{}\r\n", range.start, range.end - 1, body.len())
    };
    let partial = "206 Partial Content";
    match fault {
        None => respond(stream, partial, &line(&wanted), &body[wanted]),
        Some(Fault::OtherRange) => respond(stream, partial, &line(&before), &body[before]),
        Some(Fault::WrongBytes) => respond(stream, partial, &line(&wanted), &body[before]),
        Some(Fault::Whole) => respond(stream, "200 OK", tag, body),
        Some(Fault::Status503) => respond(stream, "503 Service Unavailable", "", b"<Code>SlowDown</Code>private"),
        Some(Fault::Endless) => {
            write!(stream, "HTTP/1.1 403 Forbidden\r\nContent-Length: {}\r\n\r\n", u64::MAX >> 1)?;
            // Until the other side has had enough.
            loop {
                stream.write_all(&[b'x'; PAGE])?;
            }
        }
        Some(Fault::Truncated) => {
            let head = format!("HTTP/1.1 {partial}\r\n{}Content-Length: {}\r\n\r\n", line(&wanted), wanted.len());
            stream.write_all(head.as_bytes())?;
            stream.write_all(&body[wanted][..1000])?;
            // Until the other side has seen all that, or gives up.
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read(&mut [0]).map(|_| ())
        }
    }
}
