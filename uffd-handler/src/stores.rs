//! All images and stores of a server: who gets which store, and when one is given up.
//!
//! A store belongs to one image and one user. It stays when its guests are gone, so that the next one finds it warm.
//!
//! ```text
//!   made by the first grant --> clean --foreign pages found--> retired: given to nobody else --last guest gone--> dropped
//!                                 |
//!                                 +--a chunk of the image fails its check--> the image is damaged: nobody new is served
//! ```

use crate::region::PAGE_SIZE;
use crate::session::{Scratch, Session, SessionError, Turn};
use crate::source::{Chunk, Source};
use crate::store::{Audit, CreateError, FillError, Store};
use api_spec::handshake::Hello;
use api_spec::page_server::StoreMetrics;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

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
    /// A chunk of the image failed its check.
    #[error("the image is damaged: {0}")]
    Damaged(String),
    /// There is no store yet, and none can be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The store that was granted is not there any more.
    #[error("the store that was granted has been dropped: connect again")]
    Gone,
}

/// An image that is served, until it turns out to be damaged.
struct Image {
    source: Box<dyn Source>,
    damage: Option<String>,
}

impl Image {
    fn check(&self) -> Result<(), GrantError> {
        self.damage.clone().map_or(Ok(()), |damage| Err(GrantError::Damaged(damage)))
    }

    /// From now on nobody new is served this image; a guest that needs a bad chunk loses its connection.
    fn mark_damaged(&mut self, damage: &str) {
        if self.damage.is_none() {
            tracing::error!("image {} is damaged: {damage}; new clients are refused", self.source.root());
            self.damage = Some(damage.to_string());
        }
    }
}

/// A store and whom it is for.
struct Entry {
    store: Store,
    image: usize,
    uid: u32,
    retired: bool,
}

/// The images and stores of a server. A store is known by its key.
pub struct Stores {
    images: Vec<Image>,
    entries: BTreeMap<u64, Entry>,
    last_key: u64,
    retired_total: u64,
}

impl Stores {
    /// Images to serve; there are no stores yet.
    pub fn new(images: Vec<Box<dyn Source>>) -> Self {
        let images = images.into_iter().map(|source| Image { source, damage: None }).collect();
        Self { images, entries: BTreeMap::new(), last_key: 0, retired_total: 0 }
    }

    /// The store of an image for a user, and the descriptor to hand out. The caller has just seen to those that are
    /// [unclean](Self::unclean).
    pub fn grant(&mut self, hello: &Hello, uid: u32) -> Result<(u64, BorrowedFd<'_>), GrantError> {
        let image = self.find_image(hello)?;
        let key = match self.find(image, uid) {
            Some(key) => key,
            None => self.create(image, uid)?,
        };
        let entry = self.entries.get(&key).ok_or(GrantError::Gone)?;
        Ok((key, entry.store.hand_out()))
    }

    fn find_image(&self, hello: &Hello) -> Result<usize, GrantError> {
        let Some(index) = self.images.iter().position(|image| image.source.root() == hello.image) else {
            let served: Vec<&str> = self.images.iter().map(|image| image.source.root()).collect();
            return Err(GrantError::Image {
                wanted: hello.image.chars().take(64).collect(),
                served: served.join(", "),
            });
        };
        let image = &self.images[index];
        image.check()?;
        match image.source.size() {
            size if size == hello.size => Ok(index),
            size => Err(GrantError::Size { image: size, client: hello.size }),
        }
    }

    fn find(&self, image: usize, uid: u32) -> Option<u64> {
        let usable = |entry: &Entry| entry.image == image && entry.uid == uid && !entry.retired;
        self.entries.iter().find(|(_, entry)| usable(entry)).map(|(&key, _)| key)
    }

    fn create(&mut self, image: usize, uid: u32) -> Result<u64, GrantError> {
        let store = Store::create(self.images[image].source.size())?;
        self.last_key += 1;
        self.entries.insert(self.last_key, Entry { store, image, uid, retired: false });
        Ok(self.last_key)
    }

    /// Size of the image behind a store, if that is still fit to be served.
    pub fn sound_size(&self, key: u64) -> Result<u64, GrantError> {
        let image = &self.images[self.entries.get(&key).ok_or(GrantError::Gone)?.image];
        image.check()?;
        Ok(image.source.size())
    }

    /// Lets a session answer its faults from its store.
    pub fn serve(&mut self, session: &mut Session, scratch: &mut Scratch) -> Result<Turn, SessionError> {
        let Some(entry) = self.entries.get_mut(&session.store) else { return Ok(Turn::default()) };
        let image = &mut self.images[entry.image];
        let served = session.serve(&mut entry.store, &*image.source, scratch);
        if let Err(SessionError::Fill(FillError::Source(error))) = &served {
            image.mark_damaged(&error.to_string());
        }
        served
    }

    /// Keys of the stores that hold more than was put into them.
    pub fn unclean(&self) -> Vec<u64> {
        self.entries.keys().copied().filter(|&key| !self.is_clean(key)).collect()
    }

    /// One that cannot be looked at is not clean.
    fn is_clean(&self, key: u64) -> bool {
        self.entries.get(&key).is_none_or(|entry| matches!(entry.store.audit(), Ok(Audit::Clean)))
    }

    fn mark_retired(&mut self, key: u64) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if !std::mem::replace(&mut entry.retired, true) {
            self.retired_total += 1;
            let image = self.images[entry.image].source.root();
            tracing::warn!(
                "store of image {image} for uid {}: pages appeared that were not put there (somebody read it without \
                 userfaultfd); it is retired, its guests are served on, new ones get a fresh store",
                entry.uid
            );
        }
    }

    /// Gives a store to nobody else, and puts right what is wrong in it for those who have it. False if that cannot be
    /// done, so that they must not go on.
    pub fn retire(&mut self, key: u64, buffer: &mut Chunk) -> bool {
        self.mark_retired(key);
        let Some(entry) = self.entries.get_mut(&key) else { return true };
        let image = &mut self.images[entry.image];
        match entry.store.repair(&*image.source, buffer) {
            Ok(pages) => tracing::info!("retired store {key}: {pages} pages put right"),
            Err(FillError::Source(error)) => image.mark_damaged(&error.to_string()),
            Err(error) => tracing::error!("retired store {key}: {error}"),
        }
        // Pages that cannot be found cannot be put right: a guest must not run into their zeros.
        self.is_clean(key)
    }

    /// Drops what nobody uses and nobody will be given: retired stores and those of damaged images.
    pub fn drop_unused(&mut self, is_used: impl Fn(u64) -> bool) {
        let Self { entries, images, .. } = self;
        entries.retain(|&key, entry| {
            let doomed = entry.retired || images[entry.image].damage.is_some();
            !doomed || is_used(key)
        });
    }

    /// Stores retired so far.
    pub fn retired_total(&self) -> u64 {
        self.retired_total
    }

    /// The counters of each store.
    pub fn metrics(&self) -> Vec<StoreMetrics> {
        let one = |entry: &Entry| {
            let source = &self.images[entry.image].source;
            StoreMetrics {
                image: source.root().to_string(),
                uid: Some(entry.uid),
                sessions: 0,
                image_pages: source.size() / PAGE_SIZE,
                filled_pages: entry.store.filled_pages(),
                retired: entry.retired,
            }
        };
        self.entries.values().map(one).collect()
    }
}
