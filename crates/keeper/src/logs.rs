//! Functions' logs: lines in files of bounded size, one directory per function.
//!
//! A log is a sequence of bytes with positions that never repeat. It is kept in segments, each a
//! file named after the position of its first byte; when the newest one is full another is
//! started, and only the two newest are kept. So a function that writes without end fills no disk,
//! and a reader that follows by position notices what it missed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The longest line kept in one piece, bytes; longer ones are cut into pieces.
pub const MAX_LINE: usize = 16 * 1024;

/// Writes one function's log.
#[derive(Debug)]
pub struct LogWriter {
    directory: PathBuf,
    segment_bytes: u64,
    file: Option<File>,
    start: u64,
    length: u64,
    failed: bool,
}

impl LogWriter {
    /// A log in `directory` that takes about `capacity` bytes at most. The directory is made when
    /// the first line is written.
    #[must_use]
    pub fn new(directory: PathBuf, capacity: u64) -> Self {
        let segment_bytes = (capacity / 2).max(4096);
        Self { directory, segment_bytes, file: None, start: 0, length: 0, failed: false }
    }

    /// Appends a line of output of a sandbox. When the disk is full or broken the line is lost:
    /// a log never stops a function.
    pub fn line(&mut self, sandbox: &str, line: &[u8]) {
        let now = jiff::Timestamp::now();
        let mut text = format!("{now:.3} {} ", &sandbox[..sandbox.len().min(8)]).into_bytes();
        text.extend(line.iter().map(|b| if *b == b'\n' || *b == 0 { b' ' } else { *b }));
        text.push(b'\n');
        match self.append(&text) {
            Ok(()) => self.failed = false,
            Err(error) => {
                if !self.failed {
                    tracing::warn!(directory = %self.directory.display(), %error, "log lines are lost");
                }
                self.failed = true;
                self.file = None;
            }
        }
    }

    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.resume()?;
        }
        if self.length >= self.segment_bytes {
            self.start += self.length;
            self.length = 0;
            self.file = Some(open_segment(&self.directory, self.start)?);
            let starts = segments(&self.directory)?;
            for old in starts.iter().rev().skip(2) {
                fs::remove_file(segment_path(&self.directory, *old))?;
            }
        }
        if let Some(file) = &mut self.file {
            file.write_all(text)?;
            self.length += text.len() as u64;
        }
        Ok(())
    }

    /// Goes on where the newest segment ends.
    fn resume(&mut self) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        self.start = segments(&self.directory)?.last().copied().unwrap_or(0);
        let file = open_segment(&self.directory, self.start)?;
        self.length = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }
}

/// Reads at most `limit` bytes of a log from `position` on; gives them with the position after
/// them. What is no longer kept is skipped.
///
/// # Errors
/// When the files can't be read. A log that does not exist is empty.
pub fn read_from(directory: &Path, position: u64, limit: usize) -> io::Result<(Vec<u8>, u64)> {
    let starts = match segments(directory) {
        Ok(starts) => starts,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((vec![], position)),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    let mut at = position.max(starts.first().copied().unwrap_or(position));
    for (n, start) in starts.iter().enumerate() {
        if bytes.len() >= limit || starts.get(n + 1).is_some_and(|next| *next <= at) {
            continue;
        }
        let mut file = match File::open(segment_path(directory, *start)) {
            Ok(file) => file,
            // Dropped between the listing and now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        file.seek(SeekFrom::Start(at.saturating_sub(*start)))?;
        let got = file.take((limit - bytes.len()) as u64).read_to_end(&mut bytes)?;
        at += got as u64;
    }
    Ok((bytes, at))
}

/// The position after the last byte of a log; 0 if there is none.
///
/// # Errors
/// When the files can't be read.
pub fn end(directory: &Path) -> io::Result<u64> {
    match segments(directory) {
        Ok(starts) => match starts.last() {
            Some(start) => Ok(start + fs::metadata(segment_path(directory, *start))?.len()),
            None => Ok(0),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn segment_path(directory: &Path, start: u64) -> PathBuf {
    directory.join(format!("{start:020}.log"))
}

fn open_segment(directory: &Path, start: u64) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(segment_path(directory, start))
}

fn segments(directory: &Path) -> io::Result<Vec<u64>> {
    let mut starts = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let start = name.to_str().and_then(|n| n.strip_suffix(".log")?.parse::<u64>().ok());
        starts.extend(start);
    }
    starts.sort_unstable();
    Ok(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_can_be_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("f");
        assert_eq!(read_from(&path, 0, 100).expect("empty"), (vec![], 0));
        let mut log = LogWriter::new(path.clone(), 16 * 1024);
        let mut position = 0;
        let mut seen = String::new();
        for n in 0..2000 {
            log.line("0123456789abcdef", format!("line {n}").as_bytes());
            if n % 7 == 0 {
                let (bytes, next) = read_from(&path, position, 1 << 20).expect("reads");
                seen.push_str(std::str::from_utf8(&bytes).expect("text"));
                position = next;
            }
        }
        let (rest, _) = read_from(&path, position, 1 << 20).expect("reads");
        seen.push_str(std::str::from_utf8(&rest).expect("text"));
        let lines: Vec<&str> = seen.lines().collect();
        assert_eq!(lines.len(), 2000);
        assert!(lines.iter().enumerate().all(|(n, l)| l.ends_with(&format!(" 01234567 line {n}"))));
        let kept: u64 = segments(&path)
            .expect("lists")
            .iter()
            .map(|s| fs::metadata(segment_path(&path, *s)).expect("a file").len())
            .sum();
        assert!(kept <= 17 * 1024, "{kept}");

        // Another writer goes on where the first one stopped.
        let before = end(&path).expect("an end");
        LogWriter::new(path.clone(), 16 * 1024).line("x", b"more");
        let (bytes, _) = read_from(&path, before, 1000).expect("reads");
        assert!(bytes.ends_with(b" x more\n"));
    }
}
