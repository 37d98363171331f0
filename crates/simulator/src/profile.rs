//! What functions take: times and memory, as they were measured.

use std::path::{Path, PathBuf};

use medes_trace::Quantiles;
use serde::{Deserialize, Serialize};

/// What was measured of a set of functions.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// Where the figures come from: how, when and on what they were measured.
    pub source: String,
    /// The functions.
    pub functions: Vec<FunctionProfile>,
}

/// What was measured of one function. Times are milliseconds, as distributions by some of their
/// quantiles; memory is bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FunctionProfile {
    /// Its name.
    pub name: String,
    /// A request's execution.
    pub execution_ms: Quantiles,
    /// What comes before it in a new sandbox.
    pub cold_ms: Quantiles,
    /// What comes before it in a warm sandbox.
    pub warm_ms: Quantiles,
    /// What comes before it in a dedup sandbox: the restore.
    pub restore_ms: Quantiles,
    /// How long a dedup operation takes.
    pub dedup_ms: Quantiles,
    /// Memory of a warm sandbox.
    pub warm_bytes: u64,
    /// Memory that remains for a dedup sandbox; base snapshots apart.
    pub dedup_bytes: u64,
    /// Memory of one base snapshot.
    pub base_bytes: u64,
    /// Memory that a restore needs besides the sandbox's own.
    #[serde(default)]
    pub restore_bytes: u64,
}

/// A profile can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The file can't be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no profile.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// There is no function in it.
    #[error("{}: a profile needs at least one function", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl Profile {
    /// The example functions on the machine that Medes was developed on.
    #[must_use]
    pub fn measured() -> Self {
        Self::built_in(include_str!("../profiles/measured.json"))
    }

    /// The ten functions of the paper, with the figures of its table 2 and figures 7 and 8.
    #[must_use]
    pub fn paper() -> Self {
        Self::built_in(include_str!("../profiles/paper.json"))
    }

    fn built_in(text: &str) -> Self {
        serde_json::from_str(text).unwrap_or_else(|e| unreachable!("a built-in profile: {e}"))
    }

    /// Reads a profile: `measured`, `paper`, or a JSON file.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn open(path: &Path) -> Result<Self, ProfileError> {
        match path.to_str() {
            Some("measured") => return Ok(Self::measured()),
            Some("paper") => return Ok(Self::paper()),
            _ => {}
        }
        let path = path.to_owned();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(ProfileError::Io { path, source }),
        };
        match serde_json::from_str::<Self>(&text) {
            Ok(profile) if profile.functions.is_empty() => Err(ProfileError::Empty { path }),
            Ok(profile) => Ok(profile),
            Err(source) => Err(ProfileError::Json { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_profiles_are_plausible() {
        for profile in [Profile::measured(), Profile::paper()] {
            assert_eq!(profile.functions.len(), 10);
            for f in &profile.functions {
                assert!(f.dedup_bytes < f.warm_bytes, "{}", f.name);
                assert!(f.restore_ms.median() < f.cold_ms.median(), "{}", f.name);
                assert!(f.warm_ms.median() < f.restore_ms.median(), "{}", f.name);
            }
        }
    }

    #[test]
    fn a_file_that_is_none_is_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        std::fs::write(&path, "{\"source\": 1}").unwrap();
        let message = Profile::open(&path).unwrap_err().to_string();
        assert!(message.contains("p.json") && message.contains("line 1"), "{message}");
        std::fs::write(&path, "{\"source\": \"\", \"functions\": []}").unwrap();
        assert!(matches!(Profile::open(&path), Err(ProfileError::Empty { .. })));
    }
}
