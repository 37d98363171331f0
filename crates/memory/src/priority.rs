//! Scheduling of the platform's own threads: their priority, and where they run.
//!
//! A thread that wakes up may have to wait until the one that runs has used up its time slice,
//! about 3 ms, even if that one yields to it otherwise (EEVDF, `RUN_TO_PARITY` in
//! kernel/sched/features.h). A thread that asks for long slices is preempted at once by whoever is
//! content with shorter ones (`PREEMPT_SHORT`, Linux 6.12); so work that nobody waits for asks for
//! the longest there are. Earlier kernels know no such wish.

use std::io;
use std::thread::{Scope, ScopedJoinHandle};
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

/// Runs `work` on a thread of its own that does not wait for the calling one's processor, if there is
/// another. A new thread may be put on the processor of the one that made it, and work of low
/// priority has that for a long time ([`lower_this_thread`]).
///
/// # Errors
/// If there can be no more threads.
pub fn spawn_elsewhere<'scope, R: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> R + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, R>> {
    let here = this_processor();
    let thread = std::thread::Builder::new().spawn_scoped(scope, move || {
        if this_processor() == here {
            leave(here);
        }
        work()
    })?;
    // It goes, if it is here.
    std::thread::yield_now();
    Ok(thread)
}

/// Moves the calling thread to another processor than this one, if it may run on any other; it may come
/// back. Best effort.
fn leave(processor: i32) {
    if let Some(before) = Processors::of_this_thread() {
        before.without(processor).set(0);
        before.set(0);
    }
}

/// The thread that made it comes before all that other threads do, but for work as urgent
/// (`SCHED_FIFO`), until this is dropped, by whichever thread: for what is waited for in fractions of
/// a millisecond. Best effort: it needs CAP_SYS_NICE.
///
/// Among ordinary threads priority does not settle it: one that another interrupts has to wait
/// until it is owed time again, and whoever is owed some meanwhile, of whatever priority, keeps the
/// processor until the next tick of the clock, up to 4 ms. The same happens to a thread that is
/// urgent no longer; so it better stays so until nothing of low priority is left to run.
#[derive(Debug)]
pub struct Urgent {
    thread: Thread,
    /// What the thread was before, unless it was that already.
    before: Option<Attributes>,
}

impl Urgent {
    /// The calling thread is urgent from now on.
    #[must_use]
    pub fn this_thread() -> Self {
        let (thread, before) = (Thread::this(), Attributes::of_this_thread());
        let before = before.filter(|before| before.policy != libc::SCHED_FIFO as u32);
        if before.is_some() {
            thread.hurry();
        }
        Self { thread, before }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // If the thread has ended, nobody has its number yet: numbers go round.
            apply(self.thread.0, before);
        }
    }
}

/// A thread of this process whose scheduling others may change.
#[derive(Debug)]
pub struct Thread(libc::pid_t);

impl Thread {
    /// The calling thread. What is returned must not be used when it has ended.
    #[must_use]
    pub fn this() -> Self {
        // SAFETY: gettid takes nothing and can't fail.
        Self(unsafe { libc::gettid() })
    }

    /// Has the thread come before all others, as [`Urgent`] does, until it is lowered or ends; threads
    /// that it starts don't. Best effort.
    pub fn hurry(&self) {
        apply(self.0, &Attributes::urgent());
    }

    /// Has the thread run on any processor but the one that the calling thread runs on now, until
    /// the next time. A thread that is woken may have to wait for its waker's though another is idle:
    /// where all have been busy lately, the kernel does not look for one (`SIS_UTIL` in
    /// kernel/sched/features.h). Best effort.
    pub fn keep_elsewhere(&self) {
        if let Some(processors) = Processors::of_this_thread() {
            processors.without(this_processor()).set(self.0);
        }
    }
}

/// Processors that a thread may run on.
#[derive(Clone, Copy)]
struct Processors(libc::cpu_set_t);

impl Processors {
    fn of_this_thread() -> Option<Self> {
        // SAFETY: cpu_set_t is plain data, for which zero is a valid value.
        let mut all: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes at most as many bytes as the set has to the address, which is
        // writable. Thread 0 is the calling one.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&all), &raw mut all) };
        (result == 0).then_some(Self(all))
    }

    fn without(mut self, processor: i32) -> Self {
        if let Ok(processor) = usize::try_from(processor)
            && processor < libc::CPU_SETSIZE as usize
        {
            // SAFETY: it clears one bit, which the set has.
            unsafe { libc::CPU_CLR(processor, &mut self.0) };
        }
        self
    }

    /// Has a thread, 0 being the calling one, run on these and no others. Nothing happens if there are
    /// none.
    fn set(&self, thread: libc::pid_t) {
        // SAFETY: the kernel reads as many bytes as the set has at the address. It refuses an empty set.
        unsafe { libc::sched_setaffinity(thread, size_of_val(&self.0), &raw const self.0) };
    }
}

/// Where the calling thread runs; negative if the kernel does not tell.
fn this_processor() -> i32 {
    // SAFETY: sched_getcpu takes nothing.
    unsafe { libc::sched_getcpu() }
}

/// Whether the calling thread is urgent.
pub(crate) fn is_urgent() -> bool {
    // SAFETY: sched_getscheduler takes a number; 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO
}

/// `struct sched_attr` of sched_setattr(2), its first version.
#[repr(C)]
#[derive(Debug, Default)]
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
        nice,
        runtime: slice.as_nanos() as u64,
        ..Attributes::default()
    };
    apply(0, &attributes);
}

impl Attributes {
    fn of_this_thread() -> Option<Self> {
        let mut attributes = Self::default();
        let size = size_of::<Self>() as u32;
        // SAFETY: the kernel writes at most `size` bytes to the address, which is writable and has
        // that many. Thread 0 is the calling one.
        let got =
            unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) == 0 };
        got.then_some(attributes)
    }

    fn urgent() -> Self {
        let size = size_of::<Self>() as u32;
        let flags = libc::SCHED_FLAG_RESET_ON_FORK as u64;
        Self { size, policy: libc::SCHED_FIFO as u32, flags, priority: 1, ..Self::default() }
    }
}

/// Gives a thread, 0 being the calling one, these attributes, if that is allowed.
fn apply(thread: libc::pid_t, attributes: &Attributes) {
    // SAFETY: the kernel reads `size` bytes at the address, which are there.
    unsafe {
        libc::syscall(libc::SYS_sched_setattr, thread, std::ptr::from_ref(attributes), 0);
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

    #[test]
    fn a_thread_is_kept_elsewhere() {
        let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        let (tell, told) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            tell.send(Thread::this()).unwrap();
            gone.recv().unwrap();
            this_processor()
        });
        let thread = told.recv().unwrap();
        // It may be moved in between, but not all the time.
        let here = loop {
            let here = this_processor();
            thread.keep_elsewhere();
            if this_processor() == here {
                break here;
            }
        };
        go.send(()).unwrap();
        assert!(other.join().unwrap() != here || alone);
    }

    #[test]
    fn a_thread_is_started_elsewhere() {
        let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        // The calling thread may be moved meanwhile, but not all the time.
        let elsewhere = || {
            std::thread::scope(|scope| {
                let here = this_processor();
                let there = spawn_elsewhere(scope, this_processor).unwrap().join().unwrap();
                there != here
            })
        };
        assert!((0..100).any(|_| elsewhere()) || alone);
    }

    #[test]
    fn an_urgent_thread_is_what_it_was_afterwards() {
        let policy = || {
            // SAFETY: sched_getscheduler takes an integer.
            unsafe { libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK }
        };
        std::thread::spawn(move || {
            lower_this_thread();
            let urgent = Urgent::this_thread();
            let meanwhile = policy();
            assert!([libc::SCHED_FIFO, libc::SCHED_OTHER].contains(&meanwhile));
            drop(Urgent::this_thread());
            assert_eq!(policy(), meanwhile, "it was urgent before");
            // By whichever thread.
            std::thread::spawn(|| drop(urgent)).join().unwrap();
            assert_eq!((policy(), nice()), (libc::SCHED_OTHER, 10));
            Thread::this().hurry();
            assert_eq!(policy(), meanwhile);
            lower_this_thread();
            assert_eq!((policy(), nice()), (libc::SCHED_OTHER, 10));
        })
        .join()
        .unwrap();
    }
}
