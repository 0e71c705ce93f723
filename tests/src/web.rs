//! A web server for files of one directory, which can be cut off and come back.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A server of `GET` and `HEAD`, with ranges, on loopback.
#[derive(Debug)]
pub struct Web {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    cut_off: AtomicBool,
    ended: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
    /// Requests answered with bytes.
    answered: AtomicU64,
}

impl Web {
    /// Serves the files of a directory.
    pub fn start(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it has an address");
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            cut_off: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            connections: Mutex::default(),
            answered: AtomicU64::new(0),
        });
        let server = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if server.ended.load(Ordering::Relaxed) {
                    return;
                }
                let shared = server.clone();
                std::thread::spawn(move || shared.serve(stream));
            }
        });
        Web { address, shared }
    }

    /// The URL of a file or directory.
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    /// Breaks all connections, and every new one.
    pub fn cut_off(&self) {
        self.shared.cut_off.store(true, Ordering::Relaxed);
        let mut connections = self.shared.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.drain(..).for_each(|connection| drop(connection.shutdown(Shutdown::Both)));
    }

    /// Serves again.
    pub fn come_back(&self) {
        self.shared.cut_off.store(false, Ordering::Relaxed);
    }

    /// How many requests it has answered with bytes.
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.cut_off();
        // So that the thread which accepts looks.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        if let Ok(again) = stream.try_clone() {
            self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(again);
        }
        let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
        let Ok(writer) = stream.try_clone() else { return };
        let (mut reader, mut writer) = (BufReader::new(stream), writer);
        while !self.cut_off.load(Ordering::Relaxed) {
            match self.answer(&mut reader, &mut writer) {
                Ok(true) => {}
                _ => break,
            }
        }
        let _ = writer.shutdown(Shutdown::Both);
    }

    /// Answers one request; false if there is none more.
    fn answer(&self, reader: &mut impl BufRead, writer: &mut impl Write) -> io::Result<bool> {
        let (mut request, mut range) = (String::new(), None);
        if reader.read_line(&mut request)? == 0 {
            return Ok(false);
        }
        loop {
            let mut line = String::new();
            if reader.by_ref().take(8192).read_line(&mut line)? == 0 || line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("range")
            {
                range = parse_range(value.trim());
            }
        }
        if self.cut_off.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut words = request.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let name = path.trim_start_matches('/');
        let Ok(file) = File::open(self.root.join(name)) else {
            writer.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            return Ok(true);
        };
        let size = file.metadata()?.len();
        let (first, end) = range.map_or((0, size), |(first, last): (u64, u64)| (first.min(size), (last + 1).min(size)));
        let status = match range {
            Some(_) => format!("206 Partial Content\r\nContent-Range: bytes {first}-{}/{size}", end.max(1) - 1),
            None => "200 OK".to_owned(),
        };
        write!(
            writer,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: \"{size:x}\"\r\nLast-Modified: Thu, 26 Nov 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n\r\n",
            end - first
        )?;
        if method != "HEAD" {
            let mut bytes = vec![0; (end - first) as usize];
            file.read_exact_at(&mut bytes, first)?;
            writer.write_all(&bytes)?;
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
        writer.flush()?;
        Ok(true)
    }
}

/// First and last byte.
fn parse_range(value: &str) -> Option<(u64, u64)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}
