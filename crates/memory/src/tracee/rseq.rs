//! Restartable sequences: the memory that the kernel touches on every return to user space.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::sys::{self, PAGE_SIZE, RseqConfiguration};

/// Offset of `rseq_cs` in `struct rseq`.
const CRITICAL_SECTION_OFFSET: u64 = 8;
/// Size of `struct rseq_cs`.
const DESCRIPTOR_SIZE: u64 = 32;
/// Offset of `abort_ip` in `struct rseq_cs`.
const ABORT_IP_OFFSET: usize = 24;

/// The restartable-sequence memory of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RseqArea {
    /// The thread.
    pub tid: i32,
    /// Its `struct rseq`.
    pub area: Range<u64>,
    /// The descriptor of the critical section it is in, if any, and the signature before its
    /// abort handler: the kernel reads both before the thread runs on.
    pub critical_section: Vec<Range<u64>>,
}

impl RseqArea {
    /// The pages that must stay resident.
    pub fn resident_pages(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        std::iter::once(&self.area)
            .chain(&self.critical_section)
            .map(|range| range.start / PAGE_SIZE * PAGE_SIZE..range.end.next_multiple_of(PAGE_SIZE))
    }
}

/// Address and size of a stopped thread's `struct rseq`, `None` if it registered none.
fn configuration(tid: i32) -> io::Result<Option<RseqConfiguration>> {
    let mut configuration = RseqConfiguration::default();
    // SAFETY: the request writes as many bytes as the address argument says.
    let result = sys::check(unsafe {
        libc::ptrace(
            libc::PTRACE_GET_RSEQ_CONFIGURATION,
            tid,
            size_of::<RseqConfiguration>(),
            &mut configuration,
        )
    });
    match result {
        Ok(_) => Ok((configuration.pointer != 0).then_some(configuration)),
        // The kernel does not know the request; harmless if it has no sequences at all.
        Err(error) if error.raw_os_error() == Some(libc::EIO) && !kernel_has_rseq() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the kernel has restartable sequences: the call fails either way.
pub(crate) fn kernel_has_rseq() -> bool {
    // SAFETY: a null area with size 0 is refused before anything is registered.
    let result = unsafe { libc::syscall(libc::SYS_rseq, 0, 0, 0, 0) };
    result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

/// The area of a stopped thread; `memory` is its process's `/proc/PID/mem`.
pub(super) fn area(memory: &File, tid: i32) -> io::Result<Option<RseqArea>> {
    let Some(configuration) = configuration(tid)? else { return Ok(None) };
    let mut critical_section = Vec::new();
    if let Some(section) = CriticalSection::read(memory, configuration.pointer)? {
        critical_section.push(section.descriptor..section.descriptor + DESCRIPTOR_SIZE);
        let mut descriptor = [0; DESCRIPTOR_SIZE as usize];
        if memory.read_exact_at(&mut descriptor, section.descriptor).is_ok() {
            let abort = u64::from_ne_bytes(
                descriptor[ABORT_IP_OFFSET..].try_into().expect("eight bytes remain"),
            );
            critical_section.push(abort.saturating_sub(4)..abort);
        }
    }
    let area = configuration.pointer..configuration.pointer + u64::from(configuration.size);
    Ok(Some(RseqArea { tid, area, critical_section }))
}

/// A critical section that a thread was stopped in, or has left without saying so.
///
/// The kernel clears the pointer to it when the thread returns to user space outside of it, as
/// a thread running an injected call does. Without the pointer an interrupted sequence would
/// go on as if it had not been interrupted, so it is put back with the registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct CriticalSection {
    field: u64,
    descriptor: u64,
}

impl CriticalSection {
    fn read(memory: &File, rseq: u64) -> io::Result<Option<Self>> {
        let field = rseq + CRITICAL_SECTION_OFFSET;
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, field)?;
        let descriptor = u64::from_ne_bytes(bytes);
        Ok((descriptor != 0).then_some(Self { field, descriptor }))
    }

    /// Of a stopped thread. A kernel without the request cannot tell, nor does it matter much:
    /// before 5.13 no C library registers an area.
    pub(super) fn of(memory: &File, tid: i32) -> Option<Self> {
        Self::read(memory, configuration(tid).ok()??.pointer).ok()?
    }

    pub(super) fn put_back(self, memory: &File) -> io::Result<()> {
        memory.write_all_at(&self.descriptor.to_ne_bytes(), self.field)
    }
}
