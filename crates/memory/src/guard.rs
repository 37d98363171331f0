//! A second holder of this process's descriptors, for the moment in which this process dies.
//!
//! A userfaultfd whose last descriptor is closed lets threads that wait for a missing page read
//! zeros instead. The kernel closes the descriptors of a dying process first, and only then sends
//! its children the signal that they asked for ([`PR_SET_PDEATHSIG`]). In between, children that it
//! serves would run with wrong memory. A [`Guard`] is a tiny process that shares the table of
//! descriptors, whatever is opened later included, and lives until this one is wholly dead: by then
//! the signals have been sent.
//!
//! All others are killed by the guard itself, as [`Orders`] say: processes that are nobody's children
//! here, and what children have started in their turn. The kernel kills those too when the first
//! process of a PID namespace dies, but not before that one's memory is torn down, which takes
//! milliseconds.
//!
//! [`PR_SET_PDEATHSIG`]: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::sys;

/// A process that holds every descriptor of this one until this one is dead. Dropping it ends it.
#[derive(Debug)]
pub struct Guard {
    pidfd: OwnedFd,
    /// This process: what the guard waits for. Open as long as the guard needs it.
    _own: OwnedFd,
}

impl Guard {
    /// Starts a guard, which carries out `orders` at this process's death. Best called early, while
    /// this process is small: the guard has a copy of its memory, of which it touches one page.
    ///
    /// # Errors
    /// When there is no room for another process, or the kernel is older than 5.3.
    pub fn start(orders: &Orders) -> io::Result<Self> {
        let slots = orders.0.slots();
        let own = sys::pidfd_open(std::process::id() as i32)?;
        let mut pidfd: i32 = -1;
        let mut poll = libc::pollfd { fd: own.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: a sigset_t is plain data, for which zeros are valid.
        let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: both sets are live. The guard inherits the mask: what is sent to the process
        // group is not for it, and it must run no handler of this program.
        unsafe {
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        }
        let flags = libc::CLONE_FILES | libc::CLONE_PIDFD | libc::SIGCHLD;
        // SAFETY: without CLONE_VM this is a fork. The child, which may be a copy of a program with
        // many threads, allocates nothing, takes no lock and makes raw system calls only, on memory
        // of its own stack, until it exits. CLONE_PIDFD has the kernel write one descriptor.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
        if pid == 0 {
            loop {
                // SAFETY: `poll` is one live pollfd, and there is no timeout.
                let ready = unsafe { libc::syscall(libc::SYS_poll, &raw mut poll, 1, -1) };
                if ready == 1 {
                    let fds = slots.iter().map(|slot| slot.load(Ordering::SeqCst));
                    for fd in fds.filter(|fd| *fd >= 0) {
                        // SAFETY: writes one byte of a constant.
                        unsafe { libc::syscall(libc::SYS_write, fd, c"1".as_ptr(), 1) };
                    }
                    // SAFETY: ends the process.
                    unsafe { libc::syscall(libc::SYS_exit_group, 0) };
                }
            }
        }
        let result = sys::check(pid);
        // SAFETY: `before` is the mask that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
        result?;
        // SAFETY: the kernel has just made this descriptor, which nobody else owns.
        Ok(Self { pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) }, _own: own })
    }

    /// Waits for the guard's end, which comes before this process's own only if somebody kills it.
    ///
    /// # Errors
    /// What the kernel says to waitid(2).
    pub fn wait(&self) -> io::Result<()> {
        loop {
            // SAFETY: siginfo_t is plain data, for which zeros are valid.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            let fd = self.pidfd.as_raw_fd() as libc::id_t;
            // SAFETY: waitid writes one siginfo_t.
            let result = unsafe { libc::waitid(libc::P_PIDFD, fd, &mut info, libc::WEXITED) };
            match sys::check(result.into()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }
}

/// What a guard does at the death of the process that it guards: it writes `1` to files, such as
/// `cgroup.kill`, which killed everybody in the cgroup by the time that the write returns.
#[derive(Clone, Debug)]
pub struct Orders(Arc<Shared>);

/// Memory that guards, started before or after, see as it is at the moment.
#[derive(Debug)]
struct Shared(*mut [AtomicI32; SLOTS]);

/// Orders that there can be at a time: more than a machine has room for sandboxes.
const SLOTS: usize = 16 << 10;

/// The memory that they take, bytes.
const SIZE: usize = SLOTS * size_of::<AtomicI32>();

// SAFETY: the memory is mapped as long as this lives, and only ever used as atomics.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// An order. Dropping it takes it back.
#[derive(Debug)]
pub struct Order {
    orders: Orders,
    slot: usize,
    /// Open as long as the guard may write to it.
    _file: OwnedFd,
}

impl Orders {
    /// No orders yet.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new() -> io::Result<Self> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel likes.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, protection, flags, -1, 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let shared = Shared(memory.cast());
        shared.slots().iter().for_each(|slot| slot.store(-1, Ordering::SeqCst));
        Ok(Self(Arc::new(shared)))
    }

    /// Has `1` written to `file` at this process's death; `None` if there are too many orders.
    #[must_use]
    pub fn add(&self, file: OwnedFd) -> Option<Order> {
        let fd = file.as_raw_fd();
        let free = |slot: &AtomicI32| {
            slot.compare_exchange(-1, fd, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        let slot = self.0.slots().iter().position(free)?;
        Some(Order { orders: self.clone(), slot, _file: file })
    }
}

impl Shared {
    fn slots(&self) -> &[AtomicI32; SLOTS] {
        // SAFETY: a live mapping, aligned, and any bytes are valid atomics.
        unsafe { &*self.0 }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference to the memory any more; guards have mappings of their own.
        unsafe { libc::munmap(self.0.cast(), SIZE) };
    }
}

impl Drop for Order {
    fn drop(&mut self) {
        self.orders.0.slots()[self.slot].store(-1, Ordering::SeqCst);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = sys::pidfd_send_signal(&self.pidfd, libc::SIGKILL);
        let _ = self.wait();
    }
}
