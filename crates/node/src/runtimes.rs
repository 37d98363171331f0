//! The runtimes that are installed on this node.
//!
//! A runtime is a directory `<data>/runtimes/<name>` with a record, `runtime.json`. Installing one
//! is the command line's business; a node reads the records, again whenever it is asked, so that
//! a runtime can be installed while the platform runs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The record of an installed runtime.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RuntimeRecord {
    /// The runtime's name, such as `python3.11`.
    pub name: String,
    /// How the runtime speaks with the platform: `aws-lambda-python`.
    pub kind: String,
    /// The interpreter, with all symbolic links resolved.
    pub interpreter: PathBuf,
    /// The interpreter's installation prefix.
    pub prefix: PathBuf,
    /// The directory with the runtime interface client.
    pub ric: PathBuf,
    /// The interpreter's version, such as `3.11.7`.
    pub version: String,
    /// Directories that the interpreter needs and a sandbox does not have anyway; they are
    /// mounted read-only at the same path.
    pub mounts: Vec<PathBuf>,
    /// The packages in `ric`, with their versions.
    pub packages: Vec<String>,
}

impl RuntimeRecord {
    /// The version without its last part, such as `3.11`.
    #[must_use]
    pub fn short_version(&self) -> &str {
        self.version.rsplit_once('.').map_or(self.version.as_str(), |(short, _)| short)
    }
}

/// The installed runtimes.
#[derive(Clone, Debug)]
pub struct Runtimes {
    directory: PathBuf,
}

/// A runtime that can't be used; the text says what to do
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoRuntime(pub String);

impl Runtimes {
    /// The runtimes below a node's data directory.
    #[must_use]
    pub fn below(data_dir: &Path) -> Self {
        Self { directory: data_dir.join("runtimes") }
    }

    /// Their names, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return Vec::new() };
        let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<String> =
            names.filter(|n| !n.starts_with('.') && self.find(n).is_ok()).collect();
        names.sort();
        names
    }

    /// The record of a runtime.
    ///
    /// # Errors
    /// [`NoRuntime`] if it is not installed, or its record can't be used.
    pub fn find(&self, name: &str) -> Result<RuntimeRecord, NoRuntime> {
        let plain = !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
            && !name.starts_with('.');
        let path = self.directory.join(name).join("runtime.json");
        let text = if plain { std::fs::read(&path).ok() } else { None };
        let Some(text) = text else {
            let all = if plain { self.names_except(name) } else { String::new() };
            return Err(NoRuntime(format!(
                "the runtime {name:?} is not installed{all}; `medes runtime install {name}` \
                 installs it"
            )));
        };
        let record: RuntimeRecord = serde_json::from_slice(&text)
            .map_err(|e| NoRuntime(format!("{}: {e}", path.display())))?;
        if record.kind != "aws-lambda-python" {
            return Err(NoRuntime(format!("{}: unknown kind {:?}", path.display(), record.kind)));
        }
        Ok(record)
    }

    fn names_except(&self, name: &str) -> String {
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return String::new() };
        let mut others: Vec<String> = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| n != name && !n.starts_with('.'))
            .collect();
        others.sort();
        if others.is_empty() { String::new() } else { format!(" (there is {})", others.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_runtime_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let runtimes = Runtimes::below(dir.path());
        let error = runtimes.find("python3.99").expect_err("not there").to_string();
        assert!(error.contains("medes runtime install python3.99"), "{error}");
        for bad in ["../x", "", ".", "..", "a/b"] {
            assert!(runtimes.find(bad).is_err(), "{bad}");
        }
        assert!(runtimes.names().is_empty());
    }
}
