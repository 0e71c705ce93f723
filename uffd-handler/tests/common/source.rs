//! A source that does what a test wants, and a server of it in the test's own process.

use super::*;
use std::collections::BTreeMap;
use std::sync::Condvar;
use uffd_handler::event_loop;
use uffd_handler::listener::Listener;
use uffd_handler::region::CHUNK_SIZE;
use uffd_handler::server::{Limits, Server as Serving};
use uffd_handler::source::{Chunk, Source, SourceError};

/// What reading does just now.
#[derive(Clone, Debug, PartialEq)]
pub enum Weather {
    Fine,
    /// Whoever reads is held until that changes.
    Stuck,
    Away,
    /// Only this chunk cannot be had.
    AwayAt(u64),
    Damaged,
}

#[derive(Debug)]
struct State {
    weather: Weather,
    /// How often each chunk was asked for.
    reads: BTreeMap<u64, u64>,
}

/// Holds the words that a sample does, and never has any at hand.
#[derive(Debug)]
pub struct TestSource {
    root: String,
    size: usize,
    state: Arc<(Mutex<State>, Condvar)>,
}

/// The test's hand on a source.
#[derive(Clone, Debug)]
pub struct Hand(Arc<(Mutex<State>, Condvar)>);

impl Hand {
    pub fn set(&self, weather: Weather) {
        self.0.0.lock().unwrap().weather = weather;
        self.0.1.notify_all();
    }

    /// How often a chunk was asked for.
    pub fn reads(&self, chunk: u64) -> u64 {
        self.0.0.lock().unwrap().reads.get(&chunk).copied().unwrap_or_default()
    }
}

impl TestSource {
    pub fn boxed(root: &str, size: usize, weather: Weather) -> (Box<dyn Source>, Hand) {
        let state = Arc::new((Mutex::new(State { weather, reads: BTreeMap::new() }), Condvar::new()));
        (Box::new(TestSource { root: root.into(), size, state: state.clone() }), Hand(state))
    }
}

impl Source for TestSource {
    fn kind(&self) -> &'static str {
        "test"
    }

    fn root(&self) -> &str {
        &self.root
    }

    fn size(&self) -> u64 {
        self.size as u64
    }

    fn read_chunk(&self, index: u64, chunk: &mut Chunk) -> Result<usize, SourceError> {
        let mut state = self.state.0.lock().unwrap();
        *state.reads.entry(index).or_default() += 1;
        let state = self.state.1.wait_while(state, |state| state.weather == Weather::Stuck).unwrap();
        match state.weather {
            Weather::AwayAt(chunk) if chunk != index => {}
            Weather::Away | Weather::AwayAt(_) => return Err(SourceError::Away("the test has cut the line".into())),
            Weather::Damaged => return Err(SourceError::Damaged(format!("chunk {index} was spoilt by the test"))),
            Weather::Fine | Weather::Stuck => {}
        }
        let start = (index * CHUNK_SIZE) as usize;
        let len = CHUNK.min(self.size - start);
        for (at, bytes) in chunk[..len].chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(start / 8 + at).to_le_bytes());
        }
        Ok(len)
    }
}

/// A server in this process, which lives as long as that.
pub struct Local {
    dir: tempfile::TempDir,
}

impl Local {
    pub fn start(images: Vec<Box<dyn Source>>, limits: Limits) -> Local {
        let dir = tempfile::tempdir().unwrap();
        let socket = Listener::bind(&dir.path().join("s")).unwrap();
        let metrics = Listener::bind(&dir.path().join("m")).unwrap();
        std::thread::spawn(move || event_loop::run(Serving::new(images, socket, Some(metrics), None, limits).unwrap()));
        Local { dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn metrics(&self) -> Metrics {
        api_spec::client::metrics::read(&self.dir.path().join("m"), PATIENCE).unwrap()
    }

    pub fn greet(&self, root: &str, size: usize) -> Result<Greeted, ClientError> {
        client::greet(&self.socket(), &hello(root, size))
    }

    /// A guest that shares.
    pub fn share(&self, root: &str, size: usize) -> Client {
        let greeted = self.greet(root, size).unwrap();
        let view = View::map(&greeted.store, size);
        let uffd = register(&view);
        let stream = greeted.attach(vec![region(view.address(), size, 0)], &uffd).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream, view, uffd }
    }

    /// A guest that gets copies.
    pub fn copy(&self, root: &str, size: usize) -> CopyClient {
        CopyClient::ours(&self.socket(), &hello(root, size))
    }
}

pub fn hello(root: &str, size: usize) -> Hello {
    Hello { version: VERSION, image: root.into(), size: size as u64, mode: Mode::Shared }
}
