//! Code and layers on disk: unpacked once, named by what they hold, never changed afterwards.
//!
//! Archives come from strangers. Nothing is written outside the new directory, sizes are counted
//! as bytes come out of the decompressor and not as the archive claims them, and only directories,
//! plain files and symbolic links that stay inside are made.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nix::fcntl::OFlag;
use sha2::{Digest, Sha256};
use zip::ZipArchive;

/// Where a function's code comes from.
#[derive(Clone, Debug)]
pub enum CodeSource {
    /// A directory; it is copied, later changes have no effect.
    Directory(PathBuf),
    /// A zip archive.
    Zip(Vec<u8>),
}

/// What code or a layer may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CodeLimits {
    /// The largest archive, bytes.
    pub packed: u64,
    /// All files together, bytes.
    pub unpacked: u64,
    /// Files, directories and links together.
    pub entries: usize,
}

/// Code, or a layer, can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The archive can't be read.
    #[error("not a usable zip archive: {0}")]
    Archive(String),
    /// The archive is too large.
    #[error("the archive has {bytes} bytes, {limit} are allowed")]
    ArchiveTooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// There is too much in it.
    #[error("unpacked it has more than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// There are too many files in it.
    #[error("it has more than {limit} files and directories")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// One entry may not be there.
    #[error("{entry:?} {reason}")]
    Entry {
        /// The entry's name.
        entry: String,
        /// Why not.
        reason: &'static str,
    },
    /// The system refused something.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: String,
        /// What the system says.
        source: io::Error,
    },
}

/// Code that lies ready to be mounted into sandboxes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredCode {
    /// The directory.
    pub path: PathBuf,
    /// Base64 of the SHA-256 of the archive; of names, modes and contents for a directory.
    pub sha256: String,
    /// The size of the archive; of all files together for a directory. Bytes.
    pub size: u64,
}

/// The directory below which all unpacked code lies.
#[derive(Debug)]
pub(crate) struct CodeStore {
    root: PathBuf,
    limits: CodeLimits,
}

impl CodeStore {
    /// Opens the store, and removes what an interrupted deployment left.
    pub(crate) fn open(root: PathBuf, limits: CodeLimits) -> Result<Self, CodeError> {
        make_dir_all(&root)?;
        let store = Self { root, limits };
        store.keep_only(|path| !is_temporary(path))?;
        Ok(store)
    }

    /// Brings code into the store. Returns when it is on disk.
    pub(crate) fn add(&self, source: &CodeSource) -> Result<StoredCode, CodeError> {
        match source {
            CodeSource::Zip(bytes) => self.add_zip(bytes),
            CodeSource::Directory(path) => self.add_directory(path),
        }
    }

    /// A layer: a directory is used where it is, a zip file is unpacked into the store.
    pub(crate) fn add_layer(&self, path: &Path) -> Result<PathBuf, CodeError> {
        let meta = fs::metadata(path).map_err(|e| io_error(path, e))?;
        if meta.is_dir() {
            return path.canonicalize().map_err(|e| io_error(path, e));
        }
        if !meta.is_file() {
            return Err(entry(&path.display().to_string(), "is neither a directory nor a file"));
        }
        // A layer file comes from the operator's disk, so only its unpacked size is limited.
        let bytes = fs::read(path).map_err(|e| io_error(path, e))?;
        Ok(self.unpack(&bytes)?.path)
    }

    /// Removes every directory for which `keep` says no.
    pub(crate) fn keep_only(&self, keep: impl Fn(&Path) -> bool) -> Result<(), CodeError> {
        for found in fs::read_dir(&self.root).map_err(|e| io_error(&self.root, e))? {
            let path = found.map_err(|e| io_error(&self.root, e))?.path();
            if !keep(&path) {
                fs::remove_dir_all(&path).map_err(|e| io_error(&path, e))?;
            }
        }
        Ok(())
    }

    fn add_zip(&self, bytes: &[u8]) -> Result<StoredCode, CodeError> {
        if bytes.len() as u64 > self.limits.packed {
            return Err(CodeError::ArchiveTooLarge {
                bytes: bytes.len() as u64,
                limit: self.limits.packed,
            });
        }
        self.unpack(bytes)
    }

    fn unpack(&self, bytes: &[u8]) -> Result<StoredCode, CodeError> {
        let digest = Sha256::digest(bytes);
        let path = self.root.join(hex(&digest));
        if !path.is_dir() {
            let temporary = self.temporary()?;
            let mut writer = Writer::new(temporary.path(), self.limits);
            unpack_zip(io::Cursor::new(bytes), &mut writer)?;
            writer.finish()?;
            self.publish(&temporary, &path)?;
        }
        Ok(StoredCode { path, sha256: STANDARD.encode(digest), size: bytes.len() as u64 })
    }

    fn add_directory(&self, from: &Path) -> Result<StoredCode, CodeError> {
        let temporary = self.temporary()?;
        let mut writer = Writer::new(temporary.path(), self.limits);
        copy_directory(from, Path::new(""), &mut writer)?;
        let size = writer.bytes;
        let digest = writer.finish()?;
        let path = self.root.join(hex(&digest));
        if !path.is_dir() {
            self.publish(&temporary, &path)?;
        }
        Ok(StoredCode { path, sha256: STANDARD.encode(digest), size })
    }

    fn temporary(&self) -> Result<TemporaryDir, CodeError> {
        let path = self.root.join(format!("{TEMPORARY}{:016x}", crate::random()));
        make_dir(&path)?;
        Ok(TemporaryDir(path))
    }

    /// Gives finished code its name. A crash leaves either nothing of that name or all of it.
    fn publish(&self, temporary: &TemporaryDir, path: &Path) -> Result<(), CodeError> {
        let sync = |p: &Path| -> io::Result<()> {
            // One syncfs instead of an fsync for each of perhaps ten thousand files.
            nix::unistd::syncfs(File::open(p)?).map_err(Into::into)
        };
        sync(temporary.path()).map_err(|e| io_error(temporary.path(), e))?;
        fs::rename(temporary.path(), path).map_err(|e| io_error(path, e))?;
        File::open(&self.root).and_then(|d| d.sync_all()).map_err(|e| io_error(&self.root, e))
    }
}

const TEMPORARY: &str = "new-";

fn is_temporary(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(TEMPORARY))
}

/// A directory that goes away unless it was renamed.
struct TemporaryDir(PathBuf);

impl TemporaryDir {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        if self.0.exists()
            && let Err(e) = fs::remove_dir_all(&self.0)
        {
            tracing::warn!(path = %self.0.display(), error = %e, "a temporary directory remains");
        }
    }
}

/// Makes entries below one directory, within limits. Links are made last, so that nothing is ever
/// written through one.
struct Writer<'a> {
    root: &'a Path,
    limits: CodeLimits,
    bytes: u64,
    entries: usize,
    directories: HashSet<PathBuf>,
    links: Vec<(PathBuf, PathBuf)>,
    /// What is hashed for a directory's name: kind, path, mode and content of each entry.
    digest: Sha256,
}

impl<'a> Writer<'a> {
    fn new(root: &'a Path, limits: CodeLimits) -> Self {
        Self {
            root,
            limits,
            bytes: 0,
            entries: 0,
            directories: HashSet::new(),
            links: Vec::new(),
            digest: Sha256::new(),
        }
    }

    fn count(&mut self) -> Result<(), CodeError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(CodeError::TooMany { limit: self.limits.entries });
        }
        Ok(())
    }

    fn hash(&mut self, kind: u8, path: &Path, rest: &[u8]) {
        let name = path.as_os_str().as_encoded_bytes();
        self.digest.update([kind]);
        self.digest.update((name.len() as u64).to_le_bytes());
        self.digest.update(name);
        self.digest.update((rest.len() as u64).to_le_bytes());
        self.digest.update(rest);
    }

    /// Makes a directory and those above it; `path` is relative and has plain components only.
    fn directory(&mut self, path: &Path) -> Result<(), CodeError> {
        if path.as_os_str().is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        self.count()?;
        self.hash(b'd', path, &[]);
        make_dir(&self.root.join(path)).map_err(|e| match e {
            CodeError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                entry(&path.display().to_string(), "is both a file and a directory")
            }
            other => other,
        })?;
        self.directories.insert(path.to_owned());
        Ok(())
    }

    fn file(
        &mut self,
        path: &Path,
        executable: bool,
        mut from: impl Read,
    ) -> Result<(), CodeError> {
        self.count()?;
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        let target = self.root.join(path);
        let mode = if executable { 0o755 } else { 0o644 };
        let mut file =
            OpenOptions::new().write(true).create_new(true).open(&target).map_err(|e| {
                match e.kind() {
                    io::ErrorKind::AlreadyExists => {
                        entry(&path.display().to_string(), "is there more than once")
                    }
                    _ => io_error(&target, e),
                }
            })?;
        let mut content = Sha256::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(CodeError::Archive(format!("{}: {e}", path.display()))),
            };
            self.bytes += n as u64;
            if self.bytes > self.limits.unpacked {
                return Err(CodeError::TooLarge { limit: self.limits.unpacked });
            }
            file.write_all(&buffer[..n]).map_err(|e| io_error(&target, e))?;
            content.update(&buffer[..n]);
        }
        // Set afterwards, so that the process's umask has no say.
        file.set_permissions(Permissions::from_mode(mode)).map_err(|e| io_error(&target, e))?;
        let mut rest = vec![u8::from(executable)];
        rest.extend_from_slice(&content.finalize());
        self.hash(b'f', path, &rest);
        Ok(())
    }

    fn link(&mut self, path: &Path, target: &Path) -> Result<(), CodeError> {
        self.count()?;
        if !stays_inside(path, target) {
            return Err(entry(
                &path.display().to_string(),
                "is a symbolic link that leads out of the code",
            ));
        }
        self.hash(b'l', path, target.as_os_str().as_encoded_bytes());
        self.links.push((path.to_owned(), target.to_owned()));
        Ok(())
    }

    /// Makes the links and gives the digest of all that was written.
    fn finish(mut self) -> Result<[u8; 32], CodeError> {
        for (path, target) in std::mem::take(&mut self.links) {
            if let Some(parent) = path.parent() {
                self.directory(parent)?;
            }
            let at = self.root.join(&path);
            symlink(&target, &at).map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => {
                    entry(&path.display().to_string(), "is there more than once")
                }
                _ => io_error(&at, e),
            })?;
        }
        Ok(self.digest.finalize().into())
    }
}

/// Whether a link at `path` to `target` can't lead out. `..` may only stand in front: behind a
/// component that is itself a link it would mean the parent of wherever that one leads.
fn stays_inside(path: &Path, target: &Path) -> bool {
    let mut depth = path.components().count().saturating_sub(1);
    let mut descended = false;
    for part in target.components() {
        match part {
            Component::Normal(_) => descended = true,
            Component::CurDir => {}
            Component::ParentDir if descended || depth == 0 => return false,
            Component::ParentDir => depth -= 1,
            Component::RootDir | Component::Prefix(_) => return false,
        }
    }
    !target.as_os_str().is_empty()
}

fn unpack_zip(from: impl Read + Seek, writer: &mut Writer<'_>) -> Result<(), CodeError> {
    let broken = |e: zip::result::ZipError| CodeError::Archive(e.to_string());
    let mut archive = ZipArchive::new(from).map_err(broken)?;
    if archive.len() > writer.limits.entries {
        return Err(CodeError::TooMany { limit: writer.limits.entries });
    }
    for i in 0..archive.len() {
        let mut file = archive.by_index(i).map_err(broken)?;
        let name = file.name().map_err(broken)?.into_owned();
        if file.encrypted() {
            return Err(entry(&name, "is encrypted"));
        }
        let path = plain_path(&name)?;
        const TYPE: u32 = 0o170_000;
        let mode = file.unix_mode().unwrap_or(0);
        match mode & TYPE {
            _ if file.is_dir() => writer.directory(&path)?,
            0o120_000 => {
                let mut target = Vec::new();
                (&mut file)
                    .take(4096)
                    .read_to_end(&mut target)
                    .map_err(|e| CodeError::Archive(format!("{name}: {e}")))?;
                let target = String::from_utf8(target)
                    .map_err(|_| entry(&name, "is a symbolic link to a name that is not UTF-8"))?;
                writer.link(&path, Path::new(&target))?;
            }
            0 | 0o100_000 => writer.file(&path, mode & 0o111 != 0, &mut file)?,
            _ => return Err(entry(&name, "is neither a file, a directory nor a symbolic link")),
        }
    }
    Ok(())
}

/// An archive's entry name as a relative path without `.` and `..`.
fn plain_path(name: &str) -> Result<PathBuf, CodeError> {
    let mut path = PathBuf::new();
    if name.contains(['\0', '\\']) {
        return Err(entry(name, "has a character that no path in an archive may have"));
    }
    for part in Path::new(name).components() {
        match part {
            Component::Normal(p) => path.push(p),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(entry(name, "leads out of the code's directory"));
            }
        }
    }
    if path.as_os_str().is_empty() && !name.ends_with('/') {
        return Err(entry(name, "is no file name"));
    }
    Ok(path)
}

fn copy_directory(from: &Path, below: &Path, writer: &mut Writer<'_>) -> Result<(), CodeError> {
    let here = from.join(below);
    let mut names = fs::read_dir(&here)
        .and_then(|entries| {
            entries.map(|e| e.map(|e| e.file_name())).collect::<Result<Vec<_>, _>>()
        })
        .map_err(|e| io_error(&here, e))?;
    names.sort();
    for name in names {
        let path = below.join(&name);
        let source = from.join(&path);
        let meta = fs::symlink_metadata(&source).map_err(|e| io_error(&source, e))?;
        if meta.is_dir() {
            writer.directory(&path)?;
            copy_directory(from, &path, writer)?;
        } else if meta.is_symlink() {
            let target = fs::read_link(&source).map_err(|e| io_error(&source, e))?;
            writer.link(&path, &target)?;
        } else if meta.is_file() {
            // The file may have been exchanged since: never follow a link, never block on a FIFO.
            let file = OpenOptions::new()
                .read(true)
                .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
                .open(&source)
                .map_err(|e| io_error(&source, e))?;
            writer.file(&path, meta.permissions().mode() & 0o111 != 0, file)?;
        } else {
            return Err(entry(
                &source.display().to_string(),
                "is neither a file, a directory nor a symbolic link",
            ));
        }
    }
    Ok(())
}

fn make_dir(path: &Path) -> Result<(), CodeError> {
    DirBuilder::new().mode(0o755).create(path).map_err(|e| io_error(path, e))?;
    fs::set_permissions(path, Permissions::from_mode(0o755)).map_err(|e| io_error(path, e))
}

fn make_dir_all(path: &Path) -> Result<(), CodeError> {
    DirBuilder::new().mode(0o755).recursive(true).create(path).map_err(|e| io_error(path, e))
}

fn entry(name: &str, reason: &'static str) -> CodeError {
    CodeError::Entry { entry: name.chars().take(200).collect(), reason }
}

fn io_error(path: &Path, source: io::Error) -> CodeError {
    CodeError::Io { path: path.display().to_string(), source }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
