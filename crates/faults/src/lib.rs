//! System calls that fail on purpose, one at a time, for tests.
//!
//! [`supervise`] runs an operation on a thread of its own, under a [seccomp filter] that shows each
//! system call of that thread, and of every thread it starts, to somebody who decides what becomes
//! of it: it is carried out, or returns an error without having been carried out. The one who
//! decides may do anything else meanwhile, such as killing a process at just that moment.
//!
//! [seccomp filter]: https://man7.org/linux/man-pages/man2/seccomp_unotify.2.html

mod call;
mod filter;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc;

pub use call::{Call, Verdict};

/// How long a supervised operation may go without a system call that is shown: longer than it waits
/// for anything. Then it hangs.
const HANGS_MS: i32 = 60_000;

/// Runs `operation` on a thread of its own. `judge` is shown, in turn, every system call that this
/// thread and those that it starts are about to make, but those on which nothing but the program
/// itself depends ([`Call::SILENT`]). Returns when all these threads have ended.
///
/// # Panics
/// As `operation` does; and if there are no seccomp notifications (Linux 5.5, `CAP_SYS_ADMIN`).
///
/// The whole process is aborted, with a word about where, when the operation hangs.
pub fn supervise<R: Send>(
    mut judge: impl FnMut(&Call) -> Verdict,
    operation: impl FnOnce() -> R + Send,
) -> R {
    std::thread::scope(|scope| {
        let (listener, listening) = mpsc::sync_channel::<io::Result<OwnedFd>>(1);
        let (ready, go) = mpsc::sync_channel::<()>(1);
        let thread = scope.spawn(move || {
            let installed = filter::install();
            let failed = installed.is_err();
            let _ = listener.send(installed);
            if failed || go.recv().is_err() {
                return None;
            }
            Some(operation())
        });
        let listener = listening.recv().expect("the thread lives");
        let listener = listener.expect("seccomp notifications: Linux 5.5, as root");
        let _ = ready.send(());
        let mut last = None;
        loop {
            match filter::next(&listener, HANGS_MS) {
                Ok(filter::Next::Call(id, call)) => {
                    let verdict = judge(&call);
                    last = Some(call);
                    filter::answer(&listener, id, verdict);
                }
                Ok(filter::Next::Nobody) => break,
                Ok(filter::Next::Silence) => {
                    eprintln!("a supervised operation hangs; its last system call: {last:?}");
                    std::process::abort();
                }
                Err(error) => {
                    eprintln!("supervising system calls: {error}; the last one: {last:?}");
                    std::process::abort();
                }
            }
        }
        drop(listener);
        match thread.join() {
            Ok(result) => result.expect("the filter was installed"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Gives the calling thread a table of descriptors of its own, with nothing in it but standard
/// input, output and error. Threads that it starts share it. So a test can say what it leaves open,
/// whatever other tests do in the same process.
///
/// # Errors
/// What the kernel says to close_range(2), which is there since Linux 5.9.
pub fn own_descriptors() -> io::Result<()> {
    // SAFETY: this thread gets a new table; the descriptors in the old one stay with whoever owns
    // them, on other threads. Of this thread's own none is in use that a library opened, since it
    // is the start of a test.
    let result = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_UNSHARE as i32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the descriptors of the calling thread's table are open on, in the words of
/// `/proc/thread-self/fd`.
///
/// # Errors
/// If they can't be listed.
pub fn descriptors() -> io::Result<Vec<String>> {
    let directory = "/proc/thread-self/fd";
    let own = std::fs::read_dir(directory)?;
    let mut found = Vec::new();
    for entry in own {
        // The directory's own descriptor is among them, and gone before it is looked at.
        if let Ok(target) = std::fs::read_link(entry?.path()) {
            found.push(target.to_string_lossy().into_owned());
        }
    }
    found.retain(|target| !target.ends_with("/fd"));
    found.sort_unstable();
    Ok(found)
}

/// Kills the calling process at once, as anybody might.
pub fn die() -> ! {
    // SAFETY: sends a signal to the calling process, which can't be caught.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    unreachable!("SIGKILL can't be survived")
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
