//! Keeps the memory of a guest coming, whatever its page server does: a thread that watches over the server, serves page faults in
//! its place, and attaches the guest to the next one. [`plan`] says when.
//!
//! The event loop itself may be waiting for a page while it loads a guest. So the thread needs nothing of it, and if the process is to end and the event
//! loop does not see to that, the thread does.
//!
//! Nor does whoever loads a guest wait for ever: see [`Keeper::loaded`].
//!
//! No guest reads wrong bytes meanwhile: the vmm holds its own descriptor of the userfaultfd, so pages that were not
//! delivered stay unreadable; and before the process ends, and that descriptor with it, guest memory is taken away, so
//! that a fault which is let go by that cannot put a page of zeros into a store that other clones still use.

mod link;
pub mod plan;

use crate::cli::{DONE, FAILED};
use crate::devices::lock;
use crate::host::proc;
use crate::logging::last_words;
use crate::machine::driver::RunError;
use crate::memory::kinds::{Kinds, ScanError};
use crate::memory::orphan::Orphan;
use crate::memory::pagemap::Pagemap;
use crate::memory::stand_in::{StandIn, StandInError};
use crate::memory::uffd::{self, ALL_AT_ONCE, Mode, Service, UffdError};
use crate::memory::{self, GuestMemory, GuestRam};
use crate::notice::{Notice, Notifier, PageServerWord};
use crate::sandbox::{self, Kind};
use api_spec::snapshot::OnHandlerLoss;
use api_spec::stats::{PageServerState, PageServerStats};
use link::{Heard, Link};
use plan::{Event, Plan, Step};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use snapshot::load::Snapshot;
use snapshot::page_runs::PageRuns;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use uffd_handler::listener::remove_all;
use uffd_handler::process::Signals;
use userfaultfd::Uffd;

/// How long the event loop has to end the process in good order after the page server is gone.
const LAST_ORDERS: Duration = Duration::from_millis(500);
/// How long it has after a signal; what it may have to wait for then is a disk.
const SIGNAL_ORDERS: Duration = Duration::from_secs(3);
/// How often, and after how long, to try again if the kernel refuses to watch: it may have no memory for that just now.
const TRIES: u32 = 20;
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// How often to look for faults that a server which is stood in for has read of.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How often to look at a store whose server is gone.
const AUDIT: Duration = Duration::from_secs(1);

/// Why a load was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GivenUp {
    /// This process is to end.
    Ending,
    /// Nobody serves the pages that it needs.
    Unserved(String),
}

/// How far the load of a guest is.
#[derive(Debug, Default)]
enum Load {
    #[default]
    UnderWay,
    Over,
    /// Guest memory reads as zeros.
    GivenUp(GivenUp),
}

/// What a keeper needs of a guest and of the process.
#[derive(Debug)]
pub struct Charge {
    /// Where the guest's pages are from.
    pub snapshot: Arc<Snapshot>,
    /// What becomes of the guest without its page server.
    pub policy: OnHandlerLoss,
    /// Those that ask this process to end.
    pub signals: Signals,
    /// The owner of the machine.
    pub notifier: Notifier,
    /// Is set when this process is about to end, for whatever the event loop is in the midst of and can give up.
    pub ending: Arc<AtomicBool>,
    /// Is set when pages are not to be got ready any more that nobody has asked for.
    pub replay_over: Arc<AtomicBool>,
    /// The guest is a fork: what it has of the image does not tell what clones of the image use.
    pub is_fork: bool,
}

/// The keeper of one guest's memory. It works until this is dropped.
#[derive(Debug)]
pub struct Keeper {
    session: u64,
    path: PathBuf,
    uffd: Arc<Uffd>,
    stats: Arc<Mutex<PageServerStats>>,
    load: Arc<Mutex<Load>>,
    /// Readable once the guest needs nobody more.
    released: OwnedFd,
}

impl Keeper {
    /// Begins to watch over a server that serves a guest with this RAM, which is being loaded: see [`Keeper::loaded`].
    pub fn start(service: Service, ram: &GuestRam, charge: Charge) -> io::Result<Self> {
        static SESSIONS: AtomicU64 = AtomicU64::new(0);
        let keeper = Keeper {
            session: SESSIONS.fetch_add(1, Ordering::Relaxed),
            path: service.path.clone(),
            uffd: service.uffd.clone(),
            stats: Arc::default(),
            load: Arc::default(),
            released: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        };
        let began = Instant::now();
        let watch = Watch {
            session: keeper.session,
            memory: ram.memory().clone(),
            plan: Plan::new(charge.policy, service.mode.speaks()),
            link: Some(Link::new(&service)?),
            attempt: Errand::new()?,
            report: Errand::new()?,
            kinds: ram.kinds(),
            has_reported: charge.is_fork,
            sight: Sight::new(&service.uffd),
            stand_in: None,
            spare: None,
            store: ram.store(),
            orphan: None,
            audited_at: began,
            released: keeper.released.try_clone()?,
            stats: keeper.stats.clone(),
            load: keeper.load.clone(),
            has_given_up: false,
            last_orders: None,
            trouble_at: began,
            looked_at: began,
            began,
            service,
            charge,
        };
        sandbox::spawn("keeper", Kind::Peer, move || watch.run())?;
        Ok(keeper)
    }

    /// The guest is loaded, and may run; unless it has been given up, since when its memory is none.
    ///
    /// Until then whoever loads it may wait for pages. Where nobody serves them the keeper lets him go, with zeros in their
    /// place, so that he comes here.
    pub fn loaded(&self) -> Result<(), GivenUp> {
        let mut load = lock(&self.load);
        if let Load::GivenUp(why) = &*load {
            return Err(why.clone());
        }
        *load = Load::Over;
        Ok(())
    }

    /// Where the server listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unlike that of any other keeper that this process has had.
    pub fn session(&self) -> u64 {
        self.session
    }

    /// How it has gone.
    pub fn stats(&self) -> PageServerStats {
        lock(&self.stats).clone()
    }

    /// Why nobody serves the guest, if nobody does.
    pub fn unserved(&self) -> Option<String> {
        let stats = lock(&self.stats);
        stats.reason.clone().filter(|_| stats.state == PageServerState::Lost)
    }

    /// Whether anybody but the page server may have had to provide a page, or to hide one.
    pub fn was_without(&self) -> bool {
        let PageServerStats { losses, hangs, takeovers, .. } = *lock(&self.stats);
        losses + hangs + takeovers > 0
    }

    /// See [`uffd::let_go`].
    pub fn let_go(&self, ram: &GuestRam) {
        uffd::let_go(&self.uffd, ram);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // There is room for it: it is written once.
        let _ = rustix::io::write(&self.released, &1u64.to_ne_bytes());
    }
}

/// What can be seen of outstanding faults. The files are opened once: the process may come to live where there is no /proc.
#[derive(Debug)]
struct Sight {
    faults: Option<File>,
    memory: Option<File>,
}

impl Sight {
    fn new(uffd: &Arc<Uffd>) -> Self {
        use std::os::fd::AsRawFd;
        Sight {
            faults: File::open(format!("/proc/self/fdinfo/{}", uffd.as_raw_fd())).ok(),
            memory: File::open("/proc/self/statm").ok(),
        }
    }

    /// How many faults nobody has answered yet, if that can be told.
    fn outstanding(&self) -> Option<u64> {
        proc::number_after(&read_start(&self.faults)?, "total:")
    }

    /// Pages of this process that are resident.
    fn resident(&self) -> u64 {
        let text = read_start(&self.memory);
        text.and_then(|text| text.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    }
}

fn read_start(file: &Option<File>) -> Option<String> {
    let mut text = [0; 512];
    let read = file.as_ref()?.read_at(&mut text, 0).ok()?;
    Some(String::from_utf8_lossy(&text[..read]).into_owned())
}

/// Something that takes a while, and is done on a thread of its own.
#[derive(Debug)]
struct Errand<T> {
    sender: mpsc::Sender<T>,
    outcome: mpsc::Receiver<T>,
    /// Readable when there is one.
    came: Arc<OwnedFd>,
}

impl<T: Send + 'static> Errand<T> {
    fn new() -> io::Result<Self> {
        let (sender, outcome) = mpsc::channel();
        let came = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Errand { sender, outcome, came })
    }

    fn begin(&self, name: &str, errand: impl FnOnce() -> T + Send + 'static) -> io::Result<()> {
        let (sender, came) = (self.sender.clone(), self.came.clone());
        // It inherits what the keeper's thread may do.
        std::thread::Builder::new().name(name.into()).spawn(move || {
            // Nobody waits for it any more if the guest is gone.
            let _ = sender.send(errand());
            let _ = rustix::io::write(&*came, &1u64.to_ne_bytes());
        })?;
        Ok(())
    }

    fn take(&self) -> Option<T> {
        let _ = rustix::io::read(&*self.came, &mut [0; 8]);
        self.outcome.try_recv().ok()
    }
}

/// When the thread is to end the process, if the event loop has not by then.
#[derive(Debug)]
struct LastOrders {
    at: Instant,
    /// What to say, and so to fail; nothing if this is no failure.
    words: Option<RunError>,
}

/// What the thread works with.
struct Watch {
    session: u64,
    service: Service,
    charge: Charge,
    memory: GuestMemory,
    plan: Plan,
    /// To the server, while it is there.
    link: Option<Link>,
    /// Attaching to a server, which may take seconds.
    attempt: Errand<Result<Service, UffdError>>,
    /// Looking at what the guest has used.
    report: Errand<Result<(PageRuns, PageRuns), ScanError>>,
    kinds: Kinds,
    /// A server asks for that once.
    has_reported: bool,
    sight: Sight,
    stand_in: Option<StandIn>,
    /// That of the last time.
    spare: Option<StandIn>,
    /// What the guest maps.
    store: Option<Arc<File>>,
    /// The same, once its server is gone.
    orphan: Option<Orphan>,
    audited_at: Instant,
    released: OwnedFd,
    stats: Arc<Mutex<PageServerStats>>,
    load: Arc<Mutex<Load>>,
    /// There is nothing more to watch over.
    has_given_up: bool,
    last_orders: Option<LastOrders>,
    /// When what led to the last takeover was first seen.
    trouble_at: Instant,
    /// When faults were last looked at while a server is stood in for.
    looked_at: Instant,
    began: Instant,
}

/// What has become ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    Released,
    Signal,
    ServerGone,
    Line,
    Fault,
    Attempt,
    Report,
}

impl Watch {
    fn run(mut self) {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                // A guest that nobody watches could wait for ever.
                Err(e) => return self.leave(Some(RunError::Guard(e.into()))),
            };
            if ready.contains(&Ready::Released) {
                return;
            }
            for one in ready {
                self.on_ready(one);
            }
            if self.stand_in.is_some() {
                self.serve();
                self.wake_forgotten();
            }
            if self.orphan.is_some() && self.audited_at.elapsed() >= AUDIT {
                self.audit();
            }
            let now = self.now();
            if self.plan.deadline().is_some_and(|at| now >= at) {
                self.on(Event::Time);
            }
            if self.has_given_up {
                return;
            }
            if let Some(LastOrders { words, .. }) = self.last_orders.take_if(|orders| Instant::now() >= orders.at) {
                return self.leave(words);
            }
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Waits until something is ready, or it is time for something.
    fn wait(&self) -> Result<Vec<Ready>, Errno> {
        let mut sources = vec![
            (Ready::Released, PollFd::new(&self.released, PollFlags::IN)),
            (Ready::Attempt, PollFd::new(&self.attempt.came, PollFlags::IN)),
            (Ready::Report, PollFd::new(&self.report.came, PollFlags::IN)),
        ];
        if self.last_orders.is_none() {
            sources.push((Ready::Signal, PollFd::new(&self.charge.signals, PollFlags::IN)));
        }
        if let Some(link) = &self.link {
            // What it has said comes before its end, which may have come as well.
            sources.extend(link.poll_fd().map(|lines| (Ready::Line, lines)));
            sources.push((Ready::ServerGone, link.sign.poll_fd()));
        }
        if self.plan.waits_for_faults() || self.stand_in.is_some() {
            sources.push((Ready::Fault, PollFd::from_borrowed_fd(self.service.uffd.as_fd(), PollFlags::IN)));
        }
        let orders = self.last_orders.as_ref().map(|orders| orders.at.saturating_duration_since(Instant::now()));
        let time = self.plan.deadline().map(|at| at.saturating_sub(self.now()));
        let look = self.stands_in().then_some(LOOK_AGAIN);
        let audit = self.orphan.as_ref().map(|_| AUDIT.saturating_sub(self.audited_at.elapsed()));
        let timeout = orders
            .into_iter()
            .chain(time)
            .chain(look)
            .chain(audit)
            .min()
            .map(|wait| Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) });
        let (kinds, mut fds): (Vec<_>, Vec<_>) = sources.into_iter().unzip();
        until_something_comes(|| poll(&mut fds, timeout.as_ref()))?;
        let ready = kinds.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(kind, _)| kind).collect())
    }

    fn on_ready(&mut self, ready: Ready) {
        match ready {
            Ready::Signal => {
                self.charge.ending.store(true, Ordering::Relaxed);
                if !self.give_up_load(GivenUp::Ending) {
                    self.last_orders = Some(LastOrders { at: Instant::now() + SIGNAL_ORDERS, words: None });
                }
            }
            Ready::Line => {
                let said = self.link.as_mut().map(Link::hear).unwrap_or_default();
                for word in said {
                    match word {
                        Heard::Event(event) => self.on(event),
                        Heard::Report => self.look_at_use(),
                    }
                }
            }
            Ready::Report => match (self.report.take(), &mut self.link) {
                (Some(Ok((read, written))), Some(link)) => link.report(&read, &written),
                (Some(Err(e)), _) => tracing::debug!("the page server is not told what the guest has used: {e}"),
                _ => {}
            },
            Ready::ServerGone => self.on(Event::Gone),
            Ready::Fault if self.plan.waits_for_faults() => {
                self.trouble_at = Instant::now();
                self.on(Event::Fault);
            }
            Ready::Attempt => match self.attempt.take() {
                Some(Ok(service)) => self.on_attached(service),
                Some(Err(e)) => {
                    // It may have read of faults before it failed.
                    self.wake_all();
                    self.on(Event::NotAttached(e.to_string()));
                }
                None => {}
            },
            Ready::Fault | Ready::Released => {}
        }
    }

    fn on_attached(&mut self, service: Service) {
        match Link::new(&service) {
            Ok(link) => {
                (self.link, self.service) = (Some(link), service);
                lock(&self.stats).reattachments += 1;
                tracing::info!("attached to the page server at {} again", self.service.path.display());
                self.on(Event::Attached);
                // Faults that somebody else had read before.
                self.wake_all();
            }
            Err(e) => self.on(Event::NotAttached(e.to_string())),
        }
    }

    /// Whether faults are served here and by a server too, which may read of some, and fall silent again.
    fn stands_in(&self) -> bool {
        self.stand_in.is_some() && self.link.is_some()
    }

    /// Has faults raised again that such a server has read of and not answered.
    fn wake_forgotten(&mut self) {
        if self.stands_in() && self.looked_at.elapsed() >= LOOK_AGAIN {
            self.looked_at = Instant::now();
            if self.sight.outstanding() != Some(0) {
                self.wake_all();
            }
        }
    }

    fn wake_all(&self) {
        if let Err(e) = uffd::wake_all(&self.service.uffd, &self.service.ranges) {
            tracing::warn!("cannot wake those who wait for pages: {e}");
        }
    }

    /// Takes in what has happened, and does what follows.
    fn on(&mut self, event: Event) {
        match event {
            Event::Gone if self.link.take().is_some() => {
                self.trouble_at = Instant::now();
                lock(&self.stats).losses += 1;
                if self.charge.policy != OnHandlerLoss::Kill && !self.plan.has_ended() {
                    tracing::warn!("the page server at {} is gone", self.service.path.display());
                }
                if self.stand_in.is_some() {
                    // What it had read of, when it had come to life again.
                    self.wake_all();
                }
            }
            _ => {}
        }
        let (now, lost) = (self.now(), event == Event::Gone && self.orphan.is_none());
        let mut steps = self.plan.on(now, event);
        // A look has consequences of its own, so it comes after all else.
        let looks = steps.contains(&Step::Look);
        steps.retain(|step| *step != Step::Look);
        for step in steps {
            self.take(step);
        }
        self.tell_state();
        if looks {
            self.look();
        }
        if lost {
            // After those who wait were served.
            self.adopt_store();
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Look => self.look(),
            Step::Wake => self.wake_all(),
            Step::Ping(number) => {
                if let Some(link) = &mut self.link {
                    link.ping(number);
                }
            }
            Step::TakeOver => self.take_over(),
            Step::StandDown => {
                self.spare = self.stand_in.take();
                tracing::info!("the page server at {} serves the guest again", self.service.path.display());
            }
            Step::Attach => self.attach(),
            Step::Pause(reason) => self.tell(PageServerWord::Pause(reason)),
            Step::Resume => self.tell(PageServerWord::Resume),
            Step::End(reason) => self.end(reason),
            Step::GiveUpLoad(reason) => {
                self.give_up_load(GivenUp::Unserved(reason));
            }
        }
    }

    fn look(&mut self) {
        // What cannot be seen is not held against one who could not contradict.
        let unseen = u64::from(self.service.mode.speaks());
        let outstanding = self.sight.outstanding().unwrap_or(unseen) > 0;
        if outstanding && self.plan.waits_for_faults() {
            self.trouble_at = Instant::now();
        }
        let resident = self.sight.resident();
        self.on(Event::Looked { outstanding, resident });
    }

    fn tell(&self, word: PageServerWord) {
        self.charge.notifier.send(Notice::PageServer(self.session, word));
    }

    fn take_over(&mut self) {
        let (uffd, path) = (self.service.uffd.clone(), self.service.path.display());
        if self.link.is_some() {
            lock(&self.stats).hangs += 1;
            tracing::warn!("the page server at {path} does not deliver: the guest is served without it meanwhile");
        }
        if let Err(e) = uffd_handler::uffd::make_nonblocking(&uffd) {
            tracing::warn!("the userfaultfd cannot be made non-blocking: {e}");
        }
        self.charge.replay_over.store(true, Ordering::Relaxed);
        let begun = match self.spare.take() {
            Some(stand_in) => stand_in.begin_again().map(|()| stand_in),
            None => StandIn::begin(&self.charge.snapshot, uffd, &self.service.ranges),
        };
        match begun {
            Ok(stand_in) => {
                self.stand_in = Some(stand_in);
                let before = lock(&self.stats).faults_served;
                self.serve();
                let mut stats = lock(&self.stats);
                stats.takeovers += 1;
                stats.faults_taken_over += stats.faults_served - before;
                stats.takeover_us = Some(self.trouble_at.elapsed().as_micros() as u64);
            }
            Err(e) => self.cannot_serve(e.to_string()),
        }
    }

    fn serve(&mut self) {
        match self.stand_in.as_mut().map(StandIn::serve) {
            Some(Ok(served)) => lock(&self.stats).faults_served += served,
            Some(Err(e)) => self.cannot_serve(e.to_string()),
            None => {}
        }
    }

    fn cannot_serve(&mut self, reason: String) {
        self.stand_in = None;
        tracing::error!("the guest cannot be served without its page server: {reason}");
        // Faults that were read here and not answered.
        self.wake_all();
        self.on(Event::CannotServe(reason));
    }

    /// Has the guest's view of a store whose server is gone looked after.
    fn adopt_store(&mut self) {
        let (Mode::Shared, Some(store)) = (&self.service.mode, &self.store) else { return };
        let size = self.service.ranges.iter().map(|range| range.size).sum();
        match store.try_clone().and_then(|store| Orphan::adopt(store, size)) {
            Ok((orphan, doubtful)) => {
                self.orphan = Some(orphan);
                self.hide_foreign(&doubtful);
            }
            Err(e) => tracing::error!("the store of the page server that is gone cannot be looked after: {e}"),
        }
    }

    /// Hides pages that have appeared in the store from the guest. If it may have seen one, it must not go on.
    fn audit(&mut self) {
        self.audited_at = Instant::now();
        match self.orphan.as_mut().map(Orphan::foreign) {
            Some(Ok(pages)) => self.hide_foreign(&pages),
            Some(Err(e)) => tracing::error!("the store of the page server that is gone cannot be looked at: {e}"),
            None => {}
        }
    }

    fn hide_foreign(&mut self, pages: &[u64]) {
        if pages.is_empty() {
            return;
        }
        match self.hide(pages) {
            Ok(true) => {}
            Ok(false) => {
                self.end("is gone, and the guest may have read zeros that somebody has put into its store".into())
            }
            Err(e) => {
                self.end(format!("is gone, and zeros that somebody has put into its store cannot be hidden: {e}"))
            }
        }
    }

    /// Puts pages of the guest's own before those of the store that are not the image's. False if the guest has mapped one of those
    /// already.
    fn hide(&mut self, pages: &[u64]) -> Result<bool, StandInError> {
        let Service { uffd, ranges, .. } = &self.service;
        let mut temporary = None;
        let stand_in = match self.stand_in.as_mut().or(self.spare.as_mut()) {
            Some(stand_in) => stand_in,
            None => temporary.insert(StandIn::begin(&self.charge.snapshot, uffd.clone(), ranges)?),
        };
        let (pagemap, mut hidden) = (Pagemap::open().ok(), 0);
        for &page in pages {
            // A server that has let this guest go, and lives, goes on filling the store for others.
            if self.orphan.as_ref().is_some_and(|orphan| stand_in.is_right(page, orphan.page(page))) {
                continue;
            }
            hidden += 1;
            // What is there may be the guest's own.
            let own = |at| pagemap.as_ref().is_some_and(|map| map.entry(at).is_ok_and(|entry| !entry.is_of_file()));
            if stand_in.provide(page)?.is_some_and(|at| !own(at)) {
                return Ok(false);
            }
        }
        if hidden > 0 {
            tracing::warn!(
                "{hidden} pages have appeared in the store of a page server that is gone, and are none of the image's"
            );
        }
        Ok(true)
    }

    /// Has the guest's pages looked at, if they tell what it has used: what was copied to it is all its own, read or written.
    fn look_at_use(&mut self) {
        let is_first = !std::mem::replace(&mut self.has_reported, true);
        if is_first && matches!(self.service.mode, Mode::Shared) && lock(&self.stats).takeovers == 0 {
            let (kinds, ending) = (self.kinds.clone(), self.charge.ending.clone());
            let begun = self.report.begin("report", move || kinds.used(&Pagemap::open()?, &ending));
            if let Err(e) = begun {
                tracing::debug!("the page server is not told what the guest has used: {e}");
            }
        }
    }

    fn attach(&mut self) {
        let Service { path, mode, uffd, ranges, uid, .. } = &self.service;
        let (path, uid, mode, uffd, ranges) = (path.clone(), *uid, mode.again(), uffd.clone(), ranges.clone());
        let snapshot = self.charge.snapshot.clone();
        let begun = self
            .attempt
            .begin("attach", move || uffd::enlist(&path, uid, &snapshot.manifest().memory.root, mode, &ranges, &uffd));
        if let Err(e) = begun {
            self.on(Event::NotAttached(e.to_string()));
        }
    }

    fn tell_state(&self) {
        let unserved = self.plan.unserved();
        let mut stats = lock(&self.stats);
        stats.state = match (&unserved, self.plan.serves_here()) {
            (Some(_), _) => PageServerState::Lost,
            (None, true) => PageServerState::Failover,
            (None, false) => PageServerState::Serving,
        };
        stats.reason = unserved.or_else(|| self.plan.serves_here().then(|| self.plan.reason()));
    }

    /// Lets a load fail that is under way; false if none is. Whoever loads may be waiting for a page: what he finds in its
    /// place does no harm, as the guest is not going to run.
    fn give_up_load(&mut self, why: GivenUp) -> bool {
        let mut load = lock(&self.load);
        if !matches!(*load, Load::UnderWay) {
            return false;
        }
        // Before there is anything wrong to be found.
        *load = Load::GivenUp(why);
        self.has_given_up = true;
        memory::blank(&self.memory);
        self.wake_all();
        true
    }

    /// Lets a load fail that is under way. Has the event loop end the process otherwise, in good order if it can.
    fn end(&mut self, reason: String) {
        // Whoever ends everything at once may have ended the server first.
        std::thread::sleep(ALL_AT_ONCE);
        let why =
            if self.charge.signals.have_come() { GivenUp::Ending } else { GivenUp::Unserved(format!("it {reason}")) };
        if self.has_given_up || self.give_up_load(why) {
            return;
        }
        self.charge.ending.store(true, Ordering::Relaxed);
        self.tell(PageServerWord::End(reason.clone()));
        let words = RunError::PageServer { path: self.service.path.clone(), reason };
        self.last_orders.get_or_insert(LastOrders { at: Instant::now() + LAST_ORDERS, words: Some(words) });
    }

    /// Ends the process.
    fn leave(&self, words: Option<RunError>) {
        self.charge.ending.store(true, Ordering::Relaxed);
        let code = match words {
            Some(words) if !self.charge.signals.have_come() => {
                last_words(&words);
                FAILED
            }
            _ => DONE,
        };
        remove_all();
        memory::cut_off(&self.memory);
        std::process::exit(code);
    }
}

/// Polls until that succeeds, or has failed too often.
fn until_something_comes(mut poll: impl FnMut() -> Result<usize, Errno>) -> Result<(), Errno> {
    let mut failed = 0;
    loop {
        match poll() {
            // The signals that strike here mean that vCPUs are to stop; the time is looked at by whoever asks.
            Ok(_) | Err(Errno::INTR) => return Ok(()),
            Err(e) if failed == TRIES => return Err(e),
            Err(_) => {
                failed += 1;
                std::thread::sleep(TRY_AGAIN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_refuses_to_watch_is_asked_again_and_not_for_ever() {
        let mut answers = vec![Ok(1), Err(Errno::NOMEM), Err(Errno::NOMEM)];
        assert_eq!(until_something_comes(|| answers.pop().expect("not asked once more")), Ok(()));
        assert_eq!(until_something_comes(|| Err(Errno::NOMEM)), Err(Errno::NOMEM));
    }

    #[test]
    fn outstanding_faults_are_read_as_the_kernel_tells_them() {
        let text = "pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t1053\npending:\t1\ntotal:\t3\nAPI:\taa:0:7fff\n";
        assert_eq!(proc::number_after(text, "total:"), Some(3));
        assert_eq!(proc::number_after("pending:\t1\n", "total:"), None);
    }

    #[test]
    fn this_process_has_memory() {
        let Ok(uffd) = uffd_handler::uffd::create_user_only() else { return println!("skipped: no userfaultfd here") };
        let uffd = Arc::new(uffd);
        let sight = Sight::new(&uffd);
        assert!(sight.resident() > 0);
        assert_eq!(sight.outstanding(), Some(0));
    }
}
