//! Opens what `--snapshot` names: a local directory, or a URL.

use super::Source;
use super::file::LocalImage;
use crate::options::{CacheSettings, Options};
use snapshot::image::ImageError;
use snapshot::load::LoadError;
use std::path::{Path, PathBuf};

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A snapshot cannot be opened.
    #[error("snapshot {0}: {1}")]
    Snapshot(PathBuf, LoadError),
    /// The memory image of a snapshot cannot be opened.
    #[error("snapshot {0}: {1}")]
    Image(PathBuf, ImageError),
    /// One that lies elsewhere.
    #[cfg(feature = "remote")]
    #[error(transparent)]
    Remote(#[from] super::remote::OpenError),
    /// One that lies elsewhere, and this program cannot read such.
    #[cfg(not(feature = "remote"))]
    #[error(
        "this program serves no snapshots from URLs, as it was built without the cargo feature `remote` of uffd-handler; use the \
         program `uffd-handler`, or name a local directory"
    )]
    NotBuilt,
}

/// Opens all images that are to be served.
pub fn open_images(options: &Options) -> Result<Vec<Box<dyn Source>>, OpenError> {
    let mut elsewhere = Elsewhere::new(options.cache.as_ref());
    let open = |path: &PathBuf| if is_url(path) { elsewhere.open(path) } else { open_local(path) };
    options.snapshots.iter().map(open).collect()
}

fn open_local(path: &Path) -> Result<Box<dyn Source>, OpenError> {
    let snapshot = snapshot::load::open(path).map_err(|error| OpenError::Snapshot(path.to_owned(), error))?;
    let image = LocalImage::open(snapshot).map_err(|error| OpenError::Image(path.to_owned(), error))?;
    Ok(Box::new(image))
}

/// Whether this is a URL: it begins with a scheme and `://`. A path that looks so is written `./...`.
pub(crate) fn is_url(path: &Path) -> bool {
    let text = path.as_os_str().to_string_lossy();
    let Some((scheme, _)) = text.split_once("://") else { return false };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(is_plain)
}

/// Opens images that lie elsewhere. What they need is made for the first of them.
struct Elsewhere<'a> {
    #[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "nothing is opened then"))]
    cache: Option<&'a CacheSettings>,
    #[cfg(feature = "remote")]
    opener: Option<super::remote::Opener>,
}

#[cfg(feature = "remote")]
impl<'a> Elsewhere<'a> {
    fn new(cache: Option<&'a CacheSettings>) -> Self {
        Self { cache, opener: None }
    }

    fn open(&mut self, url: &Path) -> Result<Box<dyn Source>, OpenError> {
        use super::remote::{Opener, Settings};
        let opener = match self.opener.take() {
            Some(opener) => opener,
            None => Opener::new(Settings::from_env(), self.cache)?,
        };
        let image = self.opener.insert(opener).open(&url.as_os_str().to_string_lossy())?;
        Ok(Box::new(image))
    }
}

#[cfg(not(feature = "remote"))]
impl<'a> Elsewhere<'a> {
    fn new(cache: Option<&'a CacheSettings>) -> Self {
        Self { cache }
    }

    fn open(&mut self, _url: &Path) -> Result<Box<dyn Source>, OpenError> {
        Err(OpenError::NotBuilt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_told_from_paths() {
        for url in ["s3://bucket/x", "https://host/x", "weird+scheme://x"] {
            assert!(is_url(Path::new(url)), "{url}");
        }
        for path in ["/var/x", "x", "./s3://x", "a/b://c", "://x", "s3:/x", "1://x"] {
            assert!(!is_url(Path::new(path)), "{path}");
        }
    }
}
