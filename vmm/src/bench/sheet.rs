//! What a benchmark has found out, as one document: what gates compare, charts draw and `docs/benchmarks.md` is made of.

use super::conditions::Conditions;
use super::figure::{Figure, Series};
use crate::host::Host;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The version of the document. Another one is refused.
pub const FORMAT: u32 = 1;
/// Longest document that is read, in bytes, and what it may hold.
const MAX_BYTES: u64 = 16 << 20;
const MAX_FIGURES: usize = 4096;
const MAX_NUMBERS: usize = 4096;
const MAX_TEXT: usize = 300;
const MAX_NUMBER: f64 = 1e12;

/// Why a document is not taken.
#[derive(Debug, thiserror::Error)]
pub enum SheetError {
    /// The file.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no such document.
    #[error("{}: neither what `vmm bench --json` prints, nor budgets: {problem}", path.display())]
    Bad {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// The document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sheet {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program.
    pub vmm_version: String,
    /// When it was done, as RFC 3339 writes it.
    pub taken: String,
    /// The host.
    pub host: Host,
    /// What else was seen of it.
    pub conditions: Conditions,
    /// What each benchmark was told that its figures depend on, by its name.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Every figure.
    pub figures: Vec<Figure>,
    /// How some of them grew.
    #[serde(default)]
    pub series: Vec<Series>,
    /// What each benchmark says in detail, by its name.
    #[serde(default)]
    pub reports: Map<String, Value>,
}

impl Sheet {
    /// Reads a document, and looks whether it makes sense.
    pub fn read(path: &Path) -> Result<Self, SheetError> {
        Sheet::parse(&read_file(path)?).map_err(|problem| SheetError::Bad { path: path.into(), problem })
    }

    /// The document that a text is.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let sheet: Sheet = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        sheet.check()?;
        Ok(sheet)
    }

    /// The figure of this name.
    pub fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
    }

    /// The benchmarks that there are figures of, in order.
    pub fn benchmarks(&self) -> Vec<&str> {
        let mut known = BTreeSet::new();
        self.figures.iter().map(Figure::benchmark).filter(|name| known.insert(*name)).collect()
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format is {}, and this program knows {FORMAT}", self.format));
        }
        if self.figures.len() > MAX_FIGURES || self.series.len() > MAX_FIGURES {
            return Err(format!("there are more than {MAX_FIGURES} figures or series"));
        }
        let mut names = BTreeSet::new();
        for figure in &self.figures {
            let Figure { name, title, unit: _, count: _, p50, quantiles, interval, parts } = figure;
            let texts = [name, title].into_iter().chain(parts.iter().map(|part| &part.name));
            check_texts(texts.map(String::as_str))?;
            if !names.insert(name) {
                return Err(format!("figure {name} is there twice"));
            }
            let ends = interval.iter().flat_map(|(low, high)| [low, high]);
            let numbers = quantiles.iter().chain([p50]).chain(ends).chain(parts.iter().map(|part| &part.p50));
            if quantiles.len() > MAX_NUMBERS || parts.len() > MAX_NUMBERS || numbers.clone().any(|n| !is_number(*n)) {
                return Err(format!("figure {name} has too many numbers, or one that is none"));
            }
            if !quantiles.is_sorted() {
                return Err(format!("the quantiles of figure {name} do not ascend"));
            }
        }
        for Series { name, title, x, y, points } in &self.series {
            check_texts([name, title, x, y].into_iter().map(String::as_str))?;
            if points.len() > MAX_NUMBERS || points.iter().any(|(x, y)| !is_number(*x) || !is_number(*y)) {
                return Err(format!("series {name} has too many points, or one that is none"));
            }
        }
        let Conditions { ksm, governor, transparent_huge_pages, noisy, .. } = &self.conditions;
        let of_host = [&self.vmm_version, &self.taken, &self.host.cpu, &self.host.kernel, ksm];
        let texts = of_host.into_iter().chain(governor).chain(transparent_huge_pages).chain(noisy);
        check_texts(texts.chain(self.settings.keys()).chain(self.settings.values()).map(String::as_str))
    }
}

fn check_texts<'a>(mut texts: impl Iterator<Item = &'a str>) -> Result<(), String> {
    match texts.find(|text| text.is_empty() || text.len() > MAX_TEXT || text.contains(char::is_control)) {
        Some(text) => Err(format!(
            "{:?} is no name: it is empty, longer than {MAX_TEXT} bytes, or has control characters",
            text.chars().take(40).collect::<String>()
        )),
        None => Ok(()),
    }
}

/// Whether it can be what was measured of anything.
fn is_number(number: f64) -> bool {
    number.abs() <= MAX_NUMBER
}

/// A file that is not too long.
pub fn read_file(path: &Path) -> Result<Vec<u8>, SheetError> {
    let failed = |source| SheetError::Io { path: path.into(), source };
    // A FIFO would have whoever opens it wait.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(SheetError::Bad { path: path.into(), problem: "it is no regular file".into() });
    }
    let mut text = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    match text.len() as u64 > MAX_BYTES {
        true => Err(SheetError::Bad { path: path.into(), problem: format!("it is longer than {MAX_BYTES} bytes") }),
        false => Ok(text),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::figure::{Part, Unit};
    use super::*;

    /// A document with a figure, and what was measured of it.
    pub fn sheet(figures: &[(&str, Unit, f64, f64)]) -> Sheet {
        let figure = |(name, unit, p50, max): &(&str, Unit, f64, f64)| Figure {
            count: 200,
            quantiles: vec![*p50 - p50.abs() / 2.0, *p50, *max],
            parts: vec![Part { name: "part".into(), p50: *p50 / 2.0 }],
            ..Figure::value(*name, format!("what {name} is"), *unit, *p50)
        };
        Sheet {
            format: FORMAT,
            vmm_version: "1".into(),
            taken: "2026-01-01T00:00:00Z".into(),
            host: Host { cpu: "C".into(), cpus: 2, kernel: "6".into(), ring0_emulated: false },
            conditions: Conditions {
                ksm: "off".into(),
                governor: None,
                transparent_huge_pages: None,
                others_percent: 0.0,
                steal_percent: 0.0,
                jitter: 1.0,
                noisy: Vec::new(),
            },
            settings: BTreeMap::new(),
            figures: figures.iter().map(figure).collect(),
            series: Vec::new(),
            reports: Map::new(),
        }
    }

    fn read(text: &str) -> Result<Sheet, SheetError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Sheet::read(file.path())
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        let one = sheet(&[("a.b", Unit::Us, 2.0, 9.0), ("c.d", Unit::Kib, 1.0, 1.0)]);
        assert_eq!(read(&serde_json::to_string(&one).unwrap()).unwrap(), one);
        assert_eq!(one.benchmarks(), ["a", "c"]);
        let mixed = sheet(&[("a.b", Unit::Us, 2.0, 9.0), ("c.d", Unit::Us, 1.0, 1.0), ("a.e", Unit::Us, 1.0, 1.0)]);
        assert_eq!(mixed.benchmarks(), ["a", "c"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let good = || sheet(&[("a.b", Unit::Us, 2.0, 9.0)]);
        let mut bad: Vec<(Sheet, &str)> = Vec::new();
        let mut add = |change: &dyn Fn(&mut Sheet), problem: &'static str| {
            let mut sheet = good();
            change(&mut sheet);
            bad.push((sheet, problem));
        };
        add(&|sheet| sheet.format = 2, "format is 2");
        add(&|sheet| sheet.figures[0].name = String::new(), "is no name");
        add(&|sheet| sheet.figures[0].title = "x".repeat(301), "is no name");
        add(&|sheet| sheet.figures[0].title = "a\nb".into(), "is no name");
        add(&|sheet| sheet.conditions.noisy = vec!["a\u{7}".into()], "is no name");
        add(&|sheet| sheet.host.cpu = "\u{1b}[2J".into(), "is no name");
        add(&|sheet| sheet.figures[0].quantiles = vec![2.0, 1.0], "do not ascend");
        add(&|sheet| sheet.figures[0].quantiles = vec![1.0; 5000], "too many");
        add(&|sheet| sheet.figures[0].p50 = 1e13, "one that is none");
        add(&|sheet| sheet.figures.push(sheet.figures[0].clone()), "twice");
        for (sheet, problem) in bad {
            let error = read(&serde_json::to_string(&sheet).unwrap()).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        for text in ["", "[]", "{}", "{\"format\":1}", &"[".repeat(10_000)] {
            assert!(matches!(read(text), Err(SheetError::Bad { .. })), "{text}");
        }
        assert!(matches!(Sheet::read(Path::new("/nowhere")), Err(SheetError::Io { .. })));
    }
}
