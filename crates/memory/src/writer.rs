//! Writing a process's pages through `/proc/PID/mem`.
//!
//! The way back for pages of private file mappings, which no userfaultfd covers: the kernel
//! makes a private copy of the page and writes to it even where the process itself may only
//! read (`FOLL_FORCE`), such as relocated read-only data.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;

use crate::pages::PageRun;

/// Why pages could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The content does not have the size of the runs.
    #[error("{have} bytes of content for pages of {need} bytes")]
    WrongSize {
        /// Bytes of content.
        have: usize,
        /// Bytes in the runs.
        need: usize,
    },
    /// The process has exited, or may not be written to.
    #[error("cannot open the memory of process {pid}: {source}")]
    Open {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The address space is gone.
    #[error("process {0} is gone")]
    Gone(i32),
    /// A page could not be written. EIO or EFAULT on a read-only page means that the kernel
    /// forbids forced writes (`proc_mem.force_override`, 6.12).
    #[error("cannot write page {address:#x} of process {pid}: {source}")]
    Page {
        /// The process.
        pid: i32,
        /// Address of the page.
        address: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Writes `content` to the pages of `runs`, one after the other.
///
/// # Errors
/// See [`WriteError`]; part of the pages may then be written.
pub fn write_pages(pid: i32, runs: &[PageRun], content: &[u8]) -> Result<(), WriteError> {
    let need: usize = runs.iter().map(|run| run.bytes() as usize).sum();
    if need != content.len() {
        return Err(WriteError::WrongSize { have: content.len(), need });
    }
    if runs.is_empty() {
        return Ok(());
    }
    let file = OpenOptions::new()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .map_err(|source| WriteError::Open { pid, source })?;
    let mut rest = content;
    for run in runs {
        let (mut bytes, tail) = rest.split_at(run.bytes() as usize);
        let mut address = run.start;
        while !bytes.is_empty() {
            match file.write_at(bytes, address) {
                Ok(0) => return Err(WriteError::Gone(pid)),
                Ok(written) => {
                    bytes = &bytes[written..];
                    address += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(WriteError::Page { pid, address, source }),
            }
        }
        rest = tail;
    }
    Ok(())
}
