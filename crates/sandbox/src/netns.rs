//! Acting inside a sandbox's network namespace.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Runs `act` in the network namespace `namespace`, on a thread of its own that ends with it.
///
/// A socket belongs for ever to the namespace it was made in, so a listener bound here serves the
/// sandbox's own loopback from outside, with no network device in between. Such a socket also
/// keeps the namespace alive: close it when the sandbox is gone.
///
/// # Errors
/// If the namespace can't be entered, or the thread can't be started.
///
/// # Panics
/// If `act` panics.
pub fn in_network_namespace<T: Send>(
    namespace: BorrowedFd<'_>,
    act: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                // SAFETY: takes a descriptor and a flag, and changes this thread only.
                if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(act())
            })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
