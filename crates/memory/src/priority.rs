//! Scheduling priority of the platform's own threads.
//!
//! A thread that wakes up may have to wait until the one that runs has used up its time slice,
//! about 3 ms, even if that one yields to it otherwise (EEVDF, `RUN_TO_PARITY` in
//! kernel/sched/features.h). A thread that asks for long slices is preempted at once by whoever is
//! content with shorter ones (`PREEMPT_SHORT`, Linux 6.12); so work that nobody waits for asks for
//! the longest there are. Earlier kernels know no such wish.

use std::time::Duration;

/// The longest slice that may be asked for.
const LONGEST: Duration = Duration::from_millis(100);

/// Puts the calling thread before every thread of ordinary priority (nice -10), for short work that
/// stopped threads wait for. Best effort: it needs CAP_SYS_NICE.
pub fn raise_this_thread() {
    set(-10, Duration::ZERO);
}

/// Makes the calling thread yield to every thread of ordinary priority (nice 10), for work that
/// nobody waits for. Best effort; threads that it starts inherit it.
pub fn lower_this_thread() {
    set(10, LONGEST);
}

/// `struct sched_attr` of sched_setattr(2), its first version.
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// `slice` is how long the thread wants to run at a time, zero for the kernel's default.
fn set(nice: i32, slice: Duration) {
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice,
        priority: 0,
        runtime: slice.as_nanos() as u64,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads `size` bytes at the address, which are there. Thread 0 is the
    // calling one.
    unsafe {
        libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nice() -> i32 {
        // SAFETY: getpriority takes two integers.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[test]
    fn a_thread_is_lowered_and_what_it_starts_too() {
        std::thread::spawn(|| {
            lower_this_thread();
            assert_eq!(nice(), 10);
            assert_eq!(std::thread::spawn(nice).join().unwrap(), 10);
        })
        .join()
        .unwrap();
        assert_eq!(nice(), 0, "no other thread is");
    }
}
