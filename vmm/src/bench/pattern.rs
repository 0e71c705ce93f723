//! Pages that a guest writes before something is measured that depends on them. Pure.

use api_spec::agent::Pages;
use serde::Serialize;
use std::fmt;

/// Memory of the guests, in MiB, and what they need of it themselves.
const MEMORY_MIB: u64 = 128;
const GUEST_OWN_MIB: u64 = 16;
/// How many pages are written.
const WRITTEN: [u32; 2] = [64, 2048];
/// Distance of scattered pages: one of each 64 KiB.
const STRIDE: u32 = 16;

/// Where the pages lie that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// One of each 64 KiB.
    Scattered,
    /// Beside each other.
    Contiguous,
}

impl Pattern {
    /// What a report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Pattern::Scattered => "one of each 64 KiB",
            Pattern::Contiguous => "neighbouring",
        }
    }

    /// What programs call it.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Scattered => "scattered",
            Pattern::Contiguous => "contiguous",
        }
    }
}

/// Which pages a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// How many pages the guest is told to write; it writes some more in order to be told.
    pub pages: u32,
    /// Where they lie.
    pub pattern: Pattern,
}

impl Case {
    /// All that are measured.
    pub fn all() -> Vec<Case> {
        let of = |pages| [Pattern::Contiguous, Pattern::Scattered].map(|pattern| Case { pages, pattern });
        WRITTEN.into_iter().flat_map(of).collect()
    }

    /// What programs call it.
    pub fn name(&self) -> String {
        format!("{}-{}", self.pages, self.pattern.name())
    }

    /// The pages.
    pub fn written(&self) -> Pages {
        let stride = if self.pattern == Pattern::Scattered { STRIDE } else { 1 };
        Pages { first: 0, count: self.pages, stride }
    }

    /// What the guest needs for that, in MiB.
    pub fn memory_mib(&self) -> u64 {
        let Pages { count, stride, .. } = self.written();
        (u64::from(count * stride).div_ceil(256) + GUEST_OWN_MIB).max(MEMORY_MIB)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages, {}", self.pages, self.pattern.title())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_fits_its_guest() {
        let cases = Case::all();
        assert_eq!(cases.len(), 4);
        for (number, case) in cases.iter().enumerate() {
            assert!(!cases[..number].contains(case), "{case:?}");
            assert!(case.written().fits(((case.memory_mib() - GUEST_OWN_MIB) << 8) as u32), "{case:?}");
            assert_eq!(case.written().numbers().count(), case.pages as usize);
        }
        assert_eq!(cases.iter().filter(|case| case.memory_mib() == MEMORY_MIB).count(), 3);
    }
}
