//! Bulk reading of a process's pages into a buffer of the caller's.
//!
//! Memory that was never touched costs 2-20 us a page on first use, more than the copy
//! itself: so the buffer is always the caller's, and is meant to be used again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::pages::{PageClass, PageRun};

/// Most vectors one `process_vm_readv` takes (IOV_MAX).
const MAX_VECTORS: usize = 1024;

/// Why pages could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The buffer is smaller than the runs.
    #[error("buffer of {have} bytes for pages of {need} bytes")]
    BufferTooSmall {
        /// Bytes in the buffer.
        have: usize,
        /// Bytes in the runs.
        need: usize,
    },
    /// The process has exited.
    #[error("process {0} is gone")]
    Gone(i32),
    /// A page could not be read.
    #[error("cannot read page {address:#x} of process {pid}: {source}")]
    Page {
        /// The process.
        pid: i32,
        /// Address of the page.
        address: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Reads the pages of `runs`, one after the other, into the start of `buffer`; returns the
/// number of bytes.
///
/// Zero pages are not read but cleared. Pages that the process itself may not read
/// (`PROT_NONE`) are read through `/proc/PID/mem`. A page registered with a userfaultfd and
/// missing would block for whoever serves its faults: pass only pages that a
/// [`PageScanner`](crate::pages::PageScanner) found, of a process that stands still.
///
/// # Errors
/// See [`ReadError`]; the buffer then holds part of the pages.
pub fn read_pages(pid: i32, runs: &[PageRun], buffer: &mut [u8]) -> Result<usize, ReadError> {
    let need: usize = runs.iter().map(|run| run.bytes() as usize).sum();
    let have = buffer.len();
    let buffer = buffer.get_mut(..need).ok_or(ReadError::BufferTooSmall { have, need })?;
    let mut memory = None;
    let mut rest = buffer;
    let mut runs = runs;
    while let Some(first) = runs.first() {
        if first.class == PageClass::ZeroPage {
            let (zeros, tail) = rest.split_at_mut(first.bytes() as usize);
            zeros.fill(0);
            (rest, runs) = (tail, &runs[1..]);
            continue;
        }
        let batch = runs
            .iter()
            .take(MAX_VECTORS)
            .take_while(|run| run.class != PageClass::ZeroPage)
            .count();
        let (batch, later) = runs.split_at(batch);
        let bytes: usize = batch.iter().map(|run| run.bytes() as usize).sum();
        let (target, tail) = rest.split_at_mut(bytes);
        read_batch(pid, batch, target, &mut memory)?;
        (rest, runs) = (tail, later);
    }
    Ok(need)
}

/// Reads up to [`MAX_VECTORS`] runs; what `process_vm_readv` refuses goes through `memory`.
fn read_batch(
    pid: i32,
    runs: &[PageRun],
    target: &mut [u8],
    memory: &mut Option<File>,
) -> Result<(), ReadError> {
    let mut runs = runs;
    let mut target = target;
    while !runs.is_empty() {
        let mut read = read_vectors(pid, runs, target)?;
        while let Some(run) = runs.first()
            && read >= run.bytes() as usize
        {
            read -= run.bytes() as usize;
            (target, runs) = (&mut target[run.bytes() as usize..], &runs[1..]);
        }
        let Some(run) = runs.first() else { break };
        let file = match memory {
            Some(file) => file,
            None => memory
                .insert(File::open(format!("/proc/{pid}/mem")).map_err(|_| ReadError::Gone(pid))?),
        };
        let (refused, tail) = target.split_at_mut(run.bytes() as usize);
        read_exact(file, pid, run.start + read as u64, &mut refused[read..])?;
        (target, runs) = (tail, &runs[1..]);
    }
    Ok(())
}

/// One `process_vm_readv`; returns the bytes read, 0 if the first page is refused.
fn read_vectors(pid: i32, runs: &[PageRun], target: &mut [u8]) -> Result<usize, ReadError> {
    let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
    let mut remote = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_VECTORS];
    for (vector, run) in remote.iter_mut().zip(runs) {
        *vector =
            libc::iovec { iov_base: run.start as *mut libc::c_void, iov_len: run.bytes() as usize };
    }
    // SAFETY: the local vector is `target`, exclusively borrowed; remote addresses are the
    // other process's and are checked by the kernel.
    let read = unsafe {
        libc::process_vm_readv(
            pid,
            &local,
            1,
            remote.as_ptr(),
            runs.len().min(MAX_VECTORS) as u64,
            0,
        )
    };
    match crate::sys::check(read as i64) {
        Ok(read) => Ok(read as usize),
        Err(error) => match error.raw_os_error() {
            Some(libc::EFAULT) => Ok(0),
            Some(libc::ESRCH) => Err(ReadError::Gone(pid)),
            _ => Err(ReadError::Page { pid, address: runs[0].start, source: error }),
        },
    }
}

fn read_exact(file: &File, pid: i32, address: u64, target: &mut [u8]) -> Result<(), ReadError> {
    let mut done = 0;
    while done < target.len() {
        match file.read_at(&mut target[done..], address + done as u64) {
            // End of file: the address space is gone.
            Ok(0) => return Err(ReadError::Gone(pid)),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(ReadError::Page { pid, address: address + done as u64, source });
            }
        }
    }
    Ok(())
}
