//! What a userfaultfd reports.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{UserFault, abi};
use crate::sys;

/// Why a page fault was reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// A missing page was read.
    MissingRead,
    /// A missing page was written to.
    MissingWrite,
    /// A write-protected page was written to.
    WriteProtected,
}

/// One report. The reporting thread of all but faults waits until the report is read.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Where; to the page, unless exact addresses were asked for.
        address: u64,
        /// Why.
        kind: FaultKind,
        /// The thread, 0 unless thread ids were asked for.
        thread: u32,
    },
    /// The process forked; the child's missing pages are reported to its own userfaultfd.
    Fork {
        /// The child's userfaultfd.
        child: OwnedFd,
    },
    /// A mapping moved: registered pages are now elsewhere.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes moved.
        len: u64,
    },
    /// Pages were dropped by the process: they read as zeros from now on.
    Remove(Range<u64>),
    /// A range was unmapped.
    Unmap(Range<u64>),
}

impl UserFault {
    /// Appends the reports that wait, without waiting for any; returns their number.
    ///
    /// The kernel hands out faults before other reports. Whoever serves them should first take
    /// note of the changes that came with them, since a fault may be on a page that was just
    /// given up; and should keep faults that meet [`FillError::Changing`](super::FillError)
    /// for later, since a fork or a change of mappings is under way then, whose report may be
    /// yet to come.
    ///
    /// # Errors
    /// What the kernel reports, such as EMFILE when a fork's descriptor finds no place.
    pub fn read_events(&mut self, out: &mut Vec<Event>) -> io::Result<usize> {
        let before = out.len();
        out.extend(self.queued.drain(..));
        read_into(&self.fd, |event| out.push(event))?;
        Ok(out.len() - before)
    }

    /// Reads what waits and keeps it for [`read_events`](Self::read_events), except dropped
    /// ranges for which `expected` holds; returns the number read.
    pub(crate) fn queue_events(
        &mut self,
        expected: impl Fn(&Range<u64>) -> bool,
    ) -> io::Result<usize> {
        let queued = &mut self.queued;
        let mut read = 0;
        read_into(&self.fd, |event| {
            read += 1;
            match event {
                Event::Remove(range) if expected(&range) => {}
                event => queued.push_back(event),
            }
        })?;
        Ok(read)
    }
}

fn read_into(fd: &OwnedFd, mut found: impl FnMut(Event)) -> io::Result<()> {
    const BATCH: usize = 16;
    let mut messages = [abi::Message::default(); BATCH];
    loop {
        // SAFETY: the buffer has the given size, and any bytes make valid messages.
        let read = sys::check(unsafe {
            libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) as i64
        });
        let count = match read {
            Ok(bytes) => bytes as usize / size_of::<abi::Message>(),
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(()),
                    Some(libc::EINTR) => continue,
                    _ => Err(error),
                };
            }
        };
        messages[..count].iter().filter_map(decode).for_each(&mut found);
        if count < BATCH {
            return Ok(());
        }
    }
}

/// Decodes a message that was just read; a fork's descriptor becomes the event's.
fn decode(message: &abi::Message) -> Option<Event> {
    let [first, second, third] = message.args;
    Some(match message.event {
        abi::EVENT_PAGEFAULT => Event::Fault {
            address: second,
            kind: if first & abi::PAGEFAULT_FLAG_WP != 0 {
                FaultKind::WriteProtected
            } else if first & abi::PAGEFAULT_FLAG_WRITE != 0 {
                FaultKind::MissingWrite
            } else {
                FaultKind::MissingRead
            },
            thread: third as u32,
        },
        abi::EVENT_FORK => Event::Fork {
            // SAFETY: the kernel made this descriptor for the reader of this very message.
            child: unsafe { OwnedFd::from_raw_fd(first as u32 as i32) },
        },
        abi::EVENT_REMAP => Event::Remap { from: first, to: second, len: third },
        abi::EVENT_REMOVE => Event::Remove(first..second),
        abi::EVENT_UNMAP => Event::Unmap(first..second),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_faults_and_changes() {
        let message = |event, args| abi::Message { event, args, ..Default::default() };
        let fault = decode(&message(abi::EVENT_PAGEFAULT, [1, 0x7000, 42])).unwrap();
        assert!(matches!(
            fault,
            Event::Fault { address: 0x7000, kind: FaultKind::MissingWrite, thread: 42 }
        ));
        let remap = decode(&message(abi::EVENT_REMAP, [1, 2, 3])).unwrap();
        assert!(matches!(remap, Event::Remap { from: 1, to: 2, len: 3 }));
        assert!(decode(&message(0xff, [0; 3])).is_none());
    }
}
