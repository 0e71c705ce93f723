//! Looks at guest memory for whoever asks, on a thread of its own: a large guest takes a while, and the event loop has other
//! work. Whoever has asked is answered when [`Notice::Scanned`] has come.

use crate::api::server::Pending;
use crate::memory::kinds::{Kinds, ScanError};
use crate::memory::pagemap::Pagemap;
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use api_spec::stats::{MemoryMap, MemoryMapQuery, MemoryStats};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// `GET /vm/stats`
    Stats,
    /// `GET /metrics`
    Metrics,
    /// `GET /vm/memory-map`
    Map(MemoryMapQuery),
}

/// What was found, and what it was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// For [`Wanted::Stats`].
    Stats(MemoryStats),
    /// For [`Wanted::Metrics`].
    Metrics(MemoryStats),
    /// For [`Wanted::Map`].
    Map(MemoryMap),
}

/// An answer for whoever has asked, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Who has asked.
    pub to: Pending,
    /// The answer.
    pub result: Result<Found, String>,
}

/// Asks the thread, which the first question starts, one question at a time: whoever has gone meanwhile is not looked for.
#[derive(Debug)]
pub struct Scanner {
    notifier: Notifier,
    /// Opened once: the process may come to live where there is no /proc. Taken by the thread.
    pagemap: Option<io::Result<Pagemap>>,
    jobs: Option<mpsc::Sender<Job>>,
    /// What was asked and waits for the thread.
    waiting: VecDeque<Job>,
    /// The thread has a question.
    busy: bool,
    /// The process is ending, or the machine is.
    cancelled: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Job {
    kinds: Kinds,
    wanted: Wanted,
    to: Pending,
}

impl Scanner {
    /// Answers are sent by `notifier`.
    pub fn new(notifier: Notifier) -> Self {
        Scanner {
            notifier,
            pagemap: Some(Pagemap::open()),
            jobs: None,
            waiting: VecDeque::new(),
            busy: false,
            cancelled: Arc::default(),
        }
    }

    /// Has the thread look for what is wanted, now or when it has answered those before. `is_there`: who still waits.
    pub fn ask(
        &mut self,
        kinds: Kinds,
        wanted: Wanted,
        to: Pending,
        is_there: impl Fn(Pending) -> bool,
    ) -> io::Result<()> {
        // Who comes and goes leaves nothing behind.
        self.waiting.retain(|job| is_there(job.to));
        let job = Job { kinds, wanted, to };
        if self.busy {
            self.waiting.push_back(job);
            return Ok(());
        }
        self.send(job)
    }

    /// Has the thread go on with the next question, once it has answered one.
    pub fn go_on(&mut self, is_there: impl Fn(Pending) -> bool) -> io::Result<()> {
        self.busy = false;
        while let Some(job) = self.waiting.pop_front() {
            if is_there(job.to) {
                return self.send(job);
            }
        }
        Ok(())
    }

    fn send(&mut self, job: Job) -> io::Result<()> {
        let jobs = match &self.jobs {
            Some(jobs) => jobs,
            None => {
                let (sender, jobs) = mpsc::channel();
                let pagemap = match self.pagemap.take() {
                    Some(Ok(pagemap)) => pagemap,
                    // It may have become possible meanwhile.
                    _ => Pagemap::open()?,
                };
                let (notifier, cancelled) = (self.notifier.clone(), self.cancelled.clone());
                sandbox::spawn("scan", Kind::Memory, move || serve(&jobs, &pagemap, &notifier, &cancelled))?;
                self.jobs.insert(sender)
            }
        };
        jobs.send(job).map_err(|_| io::Error::other("the thread that looks at memory is gone"))?;
        self.busy = true;
        Ok(())
    }
}

impl Drop for Scanner {
    /// The thread ends by itself, soon: nobody waits for it.
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

fn serve(jobs: &mpsc::Receiver<Job>, pagemap: &Pagemap, notifier: &Notifier, cancelled: &AtomicBool) {
    for Job { kinds, wanted, to } in jobs {
        let result = scan(&kinds, wanted, pagemap, cancelled).map_err(|e| e.to_string());
        notifier.send(Notice::Scanned(Scanned { to, result }));
    }
}

fn scan(kinds: &Kinds, wanted: Wanted, pagemap: &Pagemap, cancelled: &AtomicBool) -> Result<Found, ScanError> {
    Ok(match wanted {
        Wanted::Stats => Found::Stats(kinds.sum(pagemap, cancelled)?),
        Wanted::Metrics => Found::Metrics(kinds.sum(pagemap, cancelled)?),
        Wanted::Map(query) => Found::Map(kinds.map(query, pagemap, cancelled)?),
    })
}
