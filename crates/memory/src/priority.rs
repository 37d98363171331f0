//! Scheduling priority of the platform's own threads.

/// Puts the calling thread before every thread of ordinary priority (nice -10), for short work that
/// stopped threads wait for. Best effort: it needs CAP_SYS_NICE.
pub fn raise_this_thread() {
    // SAFETY: as below.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, -10);
    }
}

/// Gives the calling thread the ordinary priority again (nice 0).
pub fn level_this_thread() {
    // SAFETY: as below.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 0);
    }
}

/// Makes the calling thread yield to every thread of ordinary priority (nice 10), for work that
/// nobody waits for. Best effort; threads that it starts inherit it.
pub fn lower_this_thread() {
    // SAFETY: setpriority takes three integers. For PRIO_PROCESS, 0 is the calling thread on Linux.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 10);
    }
}
