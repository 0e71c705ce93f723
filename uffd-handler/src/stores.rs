//! All images and stores of a server: who gets which store, and when one is given up.
//!
//! A store belongs to one image and one user, or to the server itself, which copies from it. It stays warm for a while
//! when its guests are gone, so that the next one finds its pages.
//!
//! ```text
//!   made by the first grant --> clean --foreign pages found--> retired: given to nobody else --last guest gone--> dropped
//!                                 |
//!                                 +--a chunk of the image fails its check--> the image is damaged: nobody new is served
//!                                 +--unused for too long, or room is needed--> dropped
//! ```

use crate::fetch::{Fetched, Inbox};
use crate::huge::Joiner;
use crate::image::{Delivery, Image, Waiter};
use crate::learning::Learning;
use crate::region::{CHUNK_PAGES, PAGE_SIZE};
use crate::session::{Parting, Scratch, Session, SessionError, Turn};
use crate::source::{Chunk, Source};
use crate::store::{Audit, CreateError, Store};
use api_spec::handshake::Hello;
use api_spec::page_server::{HugeMetrics, ImageMetrics, StoreMetrics};
use snapshot::working_set::Used;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Chunks of a store with pages that nobody has put there, at most, that are put right. Who has spoilt more is one of those whose it is.
const MOST_MENDED: usize = 64;
/// How long a store may have wrong pages whose right bytes have to be waited for, before its guests are sent away.
const MENDING_DEADLINE: Duration = Duration::from_secs(5);

/// Why a client gets no store. The text is the answer that it gets.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// No such image here.
    #[error("image {wanted} is not served here, only {served}: start the page server with its snapshot")]
    Image {
        /// What the client asked for, cut to a sensible length.
        wanted: String,
        /// What there is.
        served: String,
    },
    /// The image has another size.
    #[error("the image has {image} bytes, not {client}: the snapshot was changed")]
    Size {
        /// What the image has.
        image: u64,
        /// What the client believes.
        client: u64,
    },
    /// A client that names no image has memory of a size that no image has.
    #[error("no image of {client} bytes is served here, only {served}: start the page server with its snapshot")]
    NoneOfSize {
        /// Sum of the client's regions.
        client: u64,
        /// The sizes that there are.
        served: String,
    },
    /// A client that names no image has memory of a size that several images have.
    #[error(
        "{images} images of {client} bytes are served here, and the client does not say which one it wants: start the \
         page server with --copy-snapshot SNAPSHOT"
    )]
    Ambiguous {
        /// Sum of the client's regions.
        client: u64,
        /// How many images have that size.
        images: usize,
    },
    /// A chunk of the image failed its check.
    #[error("the image is damaged: {0}")]
    Damaged(String),
    /// There is no store yet, and none can be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// There is no store yet, and no room for one.
    #[error(
        "no room for pages of image {image}: all stores together have {filled} bytes and may have {bound}: wait until \
         guests of other images are gone, or raise --max-stores-mib"
    )]
    Full {
        /// The image that was asked for.
        image: String,
        /// What is in the stores, in bytes.
        filled: u64,
        /// What may be, in bytes.
        bound: u64,
    },
    /// The store that was granted is not there any more.
    #[error("the store that was granted has been dropped: connect again")]
    Gone,
}

/// A store and whom it is for.
struct Entry {
    store: Store,
    image: usize,
    /// The user; `None` for the store that the server keeps for itself.
    uid: Option<u32>,
    retired: bool,
    /// Since when it has had wrong pages that wait for their right bytes.
    mending: Option<Instant>,
    /// Clients that have it.
    users: u64,
    /// Since when there have been none.
    unused_since: Option<Instant>,
}

/// What guests are to hear of a chunk that has come.
#[derive(Debug, Default)]
pub struct Delivered {
    /// The chunk.
    pub chunk: u64,
    /// Guests that waited for it, and how many pages were filled on their behalf.
    pub ready: Vec<(u32, u64)>,
    /// Guests that waited for it in vain.
    pub failed: Vec<(u32, Parting)>,
    /// Stores in which pages were met that the server had not put there.
    pub foreign: Vec<u64>,
}

/// The images and stores of a server. A store is known by its key.
pub struct Stores {
    images: Vec<Image>,
    /// Of each image.
    learning: Vec<Learning>,
    entries: BTreeMap<u64, Entry>,
    /// Most bytes in all stores together.
    bound: Option<u64>,
    last_key: u64,
    retired_total: u64,
    /// Makes huge pages of complete blocks, if that is wanted.
    joiner: Option<Joiner>,
}

impl Stores {
    /// Images to serve; there are no stores yet. What has to be waited for arrives in `inbox`.
    /// With `record`, their working sets are learnt from so many clones. Complete blocks of stores go to `joiner`.
    pub fn new(
        images: Vec<Box<dyn Source>>,
        bound: Option<u64>,
        record: usize,
        inbox: &Inbox,
        joiner: Option<Joiner>,
    ) -> Self {
        let learning = images.iter().map(|source| Learning::begin(source.snapshot(), record)).collect();
        let images = images.into_iter().map(Arc::from).enumerate();
        let images = images.map(|(number, source)| Image::new(number, source, inbox)).collect();
        Self { images, learning, entries: BTreeMap::new(), bound, last_key: 0, retired_total: 0, joiner }
    }

    /// Makes the stores that a user is likely to ask for: those of images whose working set is known. It is read into them
    /// meanwhile.
    pub fn prepare(&mut self, uid: u32, now: Instant) {
        for image in 0..self.images.len() {
            if !self.learning[image].hot().is_empty() {
                match self.grant(image, Some(uid)) {
                    Ok(key) => self.release(key, now),
                    Err(error) => tracing::warn!("no store is made ready: {error}"),
                }
            }
        }
    }

    // ---- working sets ----

    /// Whether another guest with this store is to be asked what it has used.
    pub fn wants_to_learn(&self, key: u64) -> bool {
        self.entries.get(&key).is_some_and(|entry| self.learning[entry.image].wants_more())
    }

    /// One is asked.
    pub fn asked(&mut self, key: u64) {
        if let Some(entry) = self.entries.get(&key) {
            self.learning[entry.image].asked();
        }
    }

    /// One that was asked will not tell.
    pub fn gave_up(&mut self, key: u64) {
        if let Some(entry) = self.entries.get(&key) {
            self.learning[entry.image].went();
        }
    }

    /// One tells what it has used.
    pub fn learn(&mut self, key: u64, used: Used) {
        if let Some(entry) = self.entries.get(&key) {
            self.learning[entry.image].hear(used);
        }
    }

    // ---- who gets what ----

    /// The image that a client asks for.
    pub fn find_image(&self, hello: &Hello) -> Result<usize, GrantError> {
        let Some(index) = self.images.iter().position(|image| image.root() == hello.image) else {
            let served: Vec<&str> = self.images.iter().map(Image::root).collect();
            return Err(GrantError::Image {
                wanted: hello.image.chars().take(64).collect(),
                served: served.join(", "),
            });
        };
        self.check(index)?;
        match self.images[index].size() {
            size if size == hello.size => Ok(index),
            size => Err(GrantError::Size { image: size, client: hello.size }),
        }
    }

    /// The image for a client that only has a size: the one that has it, or `preferred` if several do.
    pub fn find_image_of_size(&self, size: u64, preferred: Option<usize>) -> Result<usize, GrantError> {
        let fits = |&index: &usize| self.images[index].size() == size;
        let fitting: Vec<usize> = (0..self.images.len()).filter(fits).collect();
        let index = match fitting[..] {
            [] => {
                let served: Vec<String> = self.images.iter().map(|image| image.size().to_string()).collect();
                return Err(GrantError::NoneOfSize { client: size, served: served.join(", ") });
            }
            [only] => only,
            _ => preferred
                .filter(|index| fitting.contains(index))
                .ok_or(GrantError::Ambiguous { client: size, images: fitting.len() })?,
        };
        self.check(index)?;
        Ok(index)
    }

    fn check(&self, image: usize) -> Result<(), GrantError> {
        match self.images[image].damage() {
            Some(damage) => Err(GrantError::Damaged(damage.to_string())),
            None => Ok(()),
        }
    }

    /// The store of an image for a user, or for the server itself, for one client more. The caller has just seen to
    /// those that are [unclean](Self::unclean), and will [release](Self::release) it.
    pub fn grant(&mut self, image: usize, uid: Option<u32>) -> Result<u64, GrantError> {
        let key = match self.find(image, uid) {
            Some(key) => key,
            None => self.create(image, uid)?,
        };
        let entry = self.entries.get_mut(&key).ok_or(GrantError::Gone)?;
        entry.users += 1;
        entry.unused_since = None;
        Ok(key)
    }

    /// The descriptor that a client gets.
    pub fn hand_out(&self, key: u64) -> Result<BorrowedFd<'_>, GrantError> {
        self.entries.get(&key).map(|entry| entry.store.hand_out()).ok_or(GrantError::Gone)
    }

    fn find(&self, image: usize, uid: Option<u32>) -> Option<u64> {
        let usable = |entry: &Entry| entry.image == image && entry.uid == uid && !entry.retired;
        self.entries.iter().find(|(_, entry)| usable(entry)).map(|(&key, _)| key)
    }

    fn create(&mut self, image: usize, uid: Option<u32>) -> Result<u64, GrantError> {
        let root = self.images[image].root().to_string();
        if let Some(bound) = self.bound {
            let filled = self.make_room();
            if filled >= bound {
                return Err(GrantError::Full { image: root, filled, bound });
            }
        }
        let store = Store::create(self.images[image].size())?;
        self.last_key += 1;
        let entry = Entry { store, image, uid, retired: false, mending: None, users: 0, unused_since: None };
        self.entries.insert(self.last_key, entry);
        let hot = self.learning[image].hot().to_vec();
        let root = self.images[image].root().to_owned();
        let wanted = self.prefetch(&root, hot);
        if wanted > 0 {
            tracing::debug!("store {}: {wanted} chunks of the working set are read ahead", self.last_key);
        }
        Ok(self.last_key)
    }

    /// Size of the image behind a store, if that is still fit to be served.
    pub fn sound_size(&self, key: u64) -> Result<u64, GrantError> {
        let image = self.entries.get(&key).ok_or(GrantError::Gone)?.image;
        self.check(image)?;
        Ok(self.images[image].size())
    }

    /// Root digest of the image behind a store, for the log.
    pub fn root(&self, key: u64) -> &str {
        self.entries.get(&key).map_or("", |entry| self.images[entry.image].root())
    }

    /// Why the image behind a store cannot be read at present.
    pub fn away(&self, key: u64) -> Option<&str> {
        self.images[self.entries.get(&key)?.image].away()
    }

    // ---- pages ----

    /// Lets a session answer its faults from its store.
    pub fn serve(&mut self, session: &mut Session, scratch: &mut Scratch) -> Result<Turn, SessionError> {
        let Some(entry) = self.entries.get_mut(&session.store()) else { return Ok(Turn::default()) };
        session.serve(&mut entry.store, &mut self.images[entry.image], scratch)
    }

    /// A session ends: it waits no longer, and needs its store no longer.
    pub fn end(&mut self, session: &Session, now: Instant) {
        if let Some(entry) = self.entries.get(&session.store()) {
            let image = &mut self.images[entry.image];
            image.leave(session.waiter());
            if session.telling.is_awaited() {
                self.learning[entry.image].went();
            }
        }
        self.release(session.store(), now);
    }

    /// Takes a chunk that had to be waited for, and puts it into every store that needs it.
    pub fn receive(&mut self, fetched: Fetched, now: Instant) -> Option<Delivered> {
        let image = fetched.image;
        let Delivery { chunk, waiters, ahead, bytes } = self.images.get_mut(image)?.receive(fetched, now)?;
        let mut delivered = Delivered { chunk, ..Delivered::default() };
        let peers =
            |key: u64| waiters.iter().filter(move |waiter| waiter.store == key).filter_map(|waiter| waiter.peer);
        let mut keys: BTreeSet<u64> = waiters.iter().map(|waiter| waiter.store).collect();
        if ahead {
            let has_room = self.bound.is_none_or(|bound| self.filled() < bound);
            let takes = |entry: &Entry| has_room && entry.image == image && !entry.retired;
            keys.extend(self.entries.iter().filter(|(_, entry)| takes(entry)).map(|(&key, _)| key));
        }
        for key in keys {
            let filled = match &bytes {
                Ok((bytes, len)) => self.fill(key, chunk, &bytes[..*len]),
                Err(error) => Err(error.clone().into()),
            };
            match filled {
                Ok((pages, foreign)) => {
                    // All of them on behalf of the first.
                    delivered.ready.extend(peers(key).zip(std::iter::once(pages).chain(std::iter::repeat(0))));
                    delivered.foreign.extend((foreign > 0).then_some(key));
                }
                Err(error) => delivered.failed.extend(peers(key).map(|peer| (peer, Parting::from(&error)))),
            }
        }
        Some(delivered)
    }

    /// Puts a chunk into a store; returns the pages that were missing, and the foreign ones that were met.
    fn fill(&mut self, key: u64, chunk: u64, bytes: &[u8]) -> Result<(u64, u64), SessionError> {
        let Some(entry) = self.entries.get_mut(&key) else { return Ok((0, 0)) };
        let filled = entry.store.fill(chunk, bytes)?;
        self.images[entry.image].is_stored(chunk);
        Ok((filled.pages, filled.foreign))
    }

    /// Has chunks of an image read when there is nothing better to do, for the stores of it that there are; returns how
    /// many are new. Chunks that cannot be read at present are left to the guests that need them.
    pub fn prefetch(&mut self, root: &str, chunks: impl IntoIterator<Item = u64>) -> usize {
        let Self { images, entries, .. } = self;
        let Some(index) = images.iter().position(|image| image.root() == root) else { return 0 };
        let stores: Vec<&Store> = entries.values().filter(|e| e.image == index).map(|entry| &entry.store).collect();
        let mut wanted =
            |chunk: &u64| stores.iter().any(|store| !store.has_chunk(*chunk)) && images[index].read_ahead(*chunk);
        chunks.into_iter().filter(|chunk| wanted(chunk)).count()
    }

    /// When [`Stores::try_again`] is to be called.
    pub fn next_attempt(&self) -> Option<Instant> {
        self.images.iter().filter_map(Image::next_attempt).min()
    }

    /// Tries again what could not be read, where it is time.
    pub fn try_again(&mut self, now: Instant) {
        self.images.iter_mut().for_each(|image| image.try_again(now));
    }

    // ---- pages that nobody has put there ----

    /// Keys of the stores that hold more than was put into them.
    pub fn unclean(&self) -> Vec<u64> {
        self.entries.keys().copied().filter(|&key| self.surplus(key) > 0).collect()
    }

    /// How many pages a store has that were not put there. One that cannot be looked at has no end of them.
    fn surplus(&self, key: u64) -> u64 {
        match self.entries.get(&key).map(|entry| entry.store.audit()) {
            None | Some(Ok(Audit::Clean)) => 0,
            Some(Ok(Audit::Surplus(pages))) => pages,
            Some(Err(_)) => u64::MAX,
        }
    }

    fn mark_retired(&mut self, key: u64) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if !std::mem::replace(&mut entry.retired, true) {
            self.retired_total += 1;
            let whose = entry.uid.map_or("the server".to_string(), |uid| format!("uid {uid}"));
            tracing::warn!(
                "store of image {} for {whose}: pages appeared that were not put there (somebody read it without \
                 userfaultfd); it is retired, its guests are served on, new ones get a fresh store",
                self.images[entry.image].root()
            );
        }
    }

    /// Gives a store to nobody else, and puts right what is wrong in it for those who have it, or has the bytes for that
    /// read. False if that cannot be done, or takes too long, so that they must not go on.
    pub fn retire(&mut self, key: u64, buffer: &mut Chunk, now: Instant) -> bool {
        self.mark_retired(key);
        match self.mend(key, buffer) {
            Ok(pages) if pages > 0 => tracing::info!("retired store {key}: {pages} pages put right"),
            Ok(_) => {}
            Err(error) => {
                tracing::error!("retired store {key}: {error}");
                return false;
            }
        }
        let surplus = self.surplus(key);
        let Some(entry) = self.entries.get_mut(&key) else { return true };
        if surplus == 0 {
            entry.mending = None;
            return true;
        }
        // Pages that cannot be found cannot be put right: a guest must not run into their zeros.
        let found = entry.store.foreign_pages().map_or(0, |pages| pages.len() as u64);
        let since = *entry.mending.get_or_insert(now);
        surplus <= found && now < since + MENDING_DEADLINE
    }

    /// Puts right the pages whose bytes are at hand, and has the others read; returns how many were put right.
    fn mend(&mut self, key: u64, buffer: &mut Chunk) -> Result<u64, SessionError> {
        let Some(entry) = self.entries.get_mut(&key) else { return Ok(0) };
        let image = &mut self.images[entry.image];
        let foreign = entry.store.foreign_pages().map_err(SessionError::Look)?;
        let chunks: BTreeSet<u64> = foreign.into_iter().map(|page| page / CHUNK_PAGES).collect();
        if chunks.len() > MOST_MENDED {
            return Err(SessionError::Spoilt(chunks.len()));
        }
        let mut mended = 0;
        for chunk in chunks {
            match image.read_now(chunk, buffer)? {
                Some(len) => mended += entry.store.fill(chunk, &buffer[..len])?.foreign,
                None => image.wait(chunk, Waiter { store: key, peer: None }),
            }
        }
        Ok(mended)
    }

    /// Stores retired so far.
    pub fn retired_total(&self) -> u64 {
        self.retired_total
    }

    // ---- the end of stores ----

    /// A client has done with its store.
    pub fn release(&mut self, key: u64, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 {
                entry.unused_since = Some(now);
            }
        }
        self.drop_doomed();
    }

    /// Drops what nobody uses and nobody will be given: retired stores and those of damaged images.
    pub fn drop_doomed(&mut self) {
        let doomed = |entry: &Entry| entry.retired || self.images[entry.image].damage().is_some();
        let unused = self.entries.iter().filter(|(_, entry)| entry.users == 0 && doomed(entry));
        for key in unused.map(|(&key, _)| key).collect::<Vec<_>>() {
            self.drop_store(key);
        }
    }

    fn drop_store(&mut self, key: u64) {
        if let Some(entry) = self.entries.remove(&key) {
            self.images[entry.image].leave_store(key);
            // Giving its memory back takes the kernel a third of a second for each GiB.
            let dropped = std::thread::Builder::new().name("drop-store".into()).spawn(move || {
                crate::sandbox::confine(crate::sandbox::Kind::Memory);
                drop(entry.store);
            });
            if let Err(error) = dropped {
                tracing::debug!("no thread to drop a store: {error}");
            }
        }
    }

    /// Bytes in all stores.
    fn filled(&self) -> u64 {
        self.entries.values().map(|entry| entry.store.filled_pages() * PAGE_SIZE).sum()
    }

    /// Drops stores that nobody uses, longest unused first, until the bound is kept or there are no more. Returns what is
    /// in those that are left, in bytes.
    fn make_room(&mut self) -> u64 {
        while self.bound.is_some_and(|bound| self.filled() >= bound) {
            let unused = self.entries.iter().filter_map(|(&key, entry)| Some((entry.unused_since?, key)));
            let Some((_, key)) = unused.min() else { break };
            tracing::info!("store {key} of image {}: dropped to make room", self.root(key));
            self.drop_store(key);
        }
        self.filled()
    }

    /// What is done every second: drops what was kept warm for long enough, or has no room.
    pub fn tick(&mut self, now: Instant, keep_warm: Duration) {
        let cold = |entry: &Entry| entry.unused_since.is_some_and(|since| now.duration_since(since) >= keep_warm);
        let cold: Vec<u64> = self.entries.iter().filter(|(_, entry)| cold(entry)).map(|(&key, _)| key).collect();
        for key in cold {
            tracing::info!("store {key} of image {}: dropped, as nobody has used it for a while", self.root(key));
            self.drop_store(key);
        }
        self.make_room();
        self.join();
        self.images.iter_mut().for_each(Image::tick);
    }

    /// Has huge pages made of what has become complete, where guests map it.
    fn join(&mut self) {
        let Some(joiner) = &self.joiner else { return };
        for entry in self.entries.values_mut().filter(|entry| entry.uid.is_some()) {
            entry.store.take_complete().into_iter().for_each(|block| joiner.want(block));
        }
    }

    // ---- counters ----

    /// The counters of each store; `sessions` says how many guests one has.
    pub fn metrics(&self, sessions: &BTreeMap<u64, u64>) -> Vec<StoreMetrics> {
        let one = |(key, entry): (&u64, &Entry)| {
            let image = &self.images[entry.image];
            StoreMetrics {
                image: image.root().to_string(),
                uid: entry.uid,
                sessions: sessions.get(key).copied().unwrap_or_default(),
                image_pages: image.pages(),
                filled_pages: entry.store.filled_pages(),
                retired: entry.retired,
            }
        };
        self.entries.iter().map(one).collect()
    }

    /// What became of blocks that were complete.
    pub fn huge_metrics(&self) -> HugeMetrics {
        let (collapsed, failed) = self.joiner.as_ref().map_or((0, 0), Joiner::counts);
        HugeMetrics { collapsed, failed }
    }

    /// The counters of each image.
    pub fn image_metrics(&self) -> Vec<ImageMetrics> {
        self.images.iter().map(Image::metrics).collect()
    }
}
