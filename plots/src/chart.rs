//! A chart that is done, and its files.

use crate::PlotError;
use crate::canvas::Canvas;
use crate::{raster, svg};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A chart, drawn.
#[derive(Debug, Clone)]
pub struct Chart {
    canvas: Canvas,
    svg: String,
}

impl Chart {
    /// What is on the canvas.
    pub(crate) fn of(canvas: Canvas) -> Self {
        let svg = svg::document(&canvas);
        Self { canvas, svg }
    }

    /// The chart as a document of SVG. It stands alone, and asks for nothing but the viewer's own sans-serif font.
    pub fn svg(&self) -> &str {
        &self.svg
    }

    /// The chart as a PNG on white, two pixels for each unit of the SVG. Its text needs no font of the machine's: Latin,
    /// Greek and Cyrillic come out, and other scripts as empty boxes.
    ///
    /// Errors: [`PlotError::Png`].
    pub fn png(&self) -> Result<Vec<u8>, PlotError> {
        raster::png(&self.canvas)
    }

    /// Writes `name.svg` and `name.png` into a directory that exists, and returns their paths in this order. Each is there
    /// whole or not at all, in place of what was there before.
    ///
    /// Errors: [`PlotError::FileName`] unless the name is that of a file, [`PlotError::Png`], [`PlotError::Io`].
    pub fn write(&self, dir: &Path, name: &str) -> Result<[PathBuf; 2], PlotError> {
        // A separator, `..` or a NUL would lead elsewhere, and a dot in front would hide the files.
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(PlotError::FileName(name.chars().take(100).collect()));
        }
        let png = self.png()?;
        let paths = [dir.join(format!("{name}.svg")), dir.join(format!("{name}.png"))];
        for (path, contents) in paths.iter().zip([self.svg.as_bytes(), &png]) {
            replace(path, contents).map_err(|source| PlotError::Io { path: path.clone(), source })?;
        }
        Ok(paths)
    }
}

/// Writes a file beside its place, then renames it.
fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let mut file = OpenOptions::new().write(true).create_new(true).open(&beside)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // The error to tell is the first one.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use crate::{PlotError, Series, lines};
    use std::fs;

    fn chart() -> crate::Chart {
        lines("A line", "x", "y", &[Series { name: "one".into(), points: vec![(0.0, 1.0), (1.0, 2.0)] }]).unwrap()
    }

    #[test]
    fn both_files_are_written_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.svg"), "what was there before").unwrap();
        let [svg, png] = chart().write(dir.path(), "a").unwrap();
        assert_eq!(fs::read_to_string(svg).unwrap(), chart().svg());
        assert_eq!(fs::read(png).unwrap(), chart().png().unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", "../a", "/a", "a/b", ".a", "a\0b"] {
            assert!(matches!(chart().write(dir.path(), name), Err(PlotError::FileName(_))), "{name:?}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let e = chart().write(&dir.path().join("absent"), "a").unwrap_err();
        assert!(e.to_string().contains("absent/a.svg"), "{e}");
    }

    #[test]
    fn what_cannot_be_renamed_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a.svg")).unwrap();
        chart().write(dir.path(), "a").unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
