//! Settings of the host that are changed for a while.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A setting below `/sys`, set back when this is dropped.
pub(super) struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Sets it.
    ///
    /// # Errors
    /// If the kernel does not know it, or not this value.
    pub(super) fn set(path: impl Into<PathBuf>, value: &str) -> Result<Self> {
        let path = path.into();
        let before = chosen(&read(&path)?).to_owned();
        write(&path, value)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = write(&self.path, &self.before) {
            eprintln!("medes: setting back {error:#}");
        }
    }
}

/// Of a list of choices, `a [b] c`, the one that is in force; anything else as it is.
fn chosen(text: &str) -> &str {
    let inner = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inner.map_or(text, |(inner, _)| inner)
}

/// A small file of the kernel's, without the newline at its end.
pub(super) fn read(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(text.trim_end().to_owned())
}

pub(super) fn write(path: &Path, value: &str) -> Result<()> {
    std::fs::write(path, value).with_context(|| format!("{value:?} for {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_set_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "lzo [lz4] zstd\n").unwrap();
        let setting = Setting::set(file.path(), "zstd").unwrap();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "zstd");
        drop(setting);
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "lz4");
        assert!(Setting::set("/sys/no/such/setting", "1").is_err());
    }
}
