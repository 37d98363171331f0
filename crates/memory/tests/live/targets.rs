//! The programs that are evicted and restored: each fills and checks memory of its own.

use std::io::BufRead;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;

pub fn run(name: &str) {
    match name {
        "memory" => memory(),
        "waits" => waits(None),
        "suspended" => suspended(),
        "filtered" => filtered(),
        "uring" => uring(),
        "userfault" => own_userfault(),
        "aio" => aio(),
        "signals" => signals(),
        "fork" => fork(),
        "remap" => remap(),
        "tree" => tree(),
        "vfork" => vfork(),
        "threads" => churning_threads(),
        "idle" => serve(|_| "ok".to_owned()),
        wait if wait.starts_with("wait ") => waits(wait[5..].parse().ok()),
        other => panic!("no target {other}"),
    }
    std::process::exit(0);
}

/// Answers lines on stdin by lines on stderr, until stdin ends.
fn serve(answer: impl FnMut(&str) -> String) {
    serve_as("ready", answer);
}

fn serve_as(ready: &str, mut answer: impl FnMut(&str) -> String) {
    say(ready);
    for line in std::io::stdin().lock().lines() {
        say(&answer(&line.unwrap()));
    }
}

fn say(line: &str) {
    let line = format!("{line}\n");
    // SAFETY: writes a buffer of ours to a descriptor of ours.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
}

/// A private mapping filled with a known sequence.
struct Region {
    start: *mut u64,
    words: usize,
    seed: u64,
    protection: i32,
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ (value >> 29)
}

impl Region {
    fn map(bytes: usize, seed: u64) -> Self {
        Self::map_with(bytes, seed, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    fn map_with(bytes: usize, seed: u64, flags: i32, fd: i32) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { start: start.cast(), words: bytes / 8, seed, protection }
    }

    fn protect(&self, protection: i32) {
        // SAFETY: changes the protection of a mapping that only `self` uses.
        let result = unsafe { libc::mprotect(self.start.cast(), self.words * 8, protection) };
        assert_eq!(result, 0);
    }

    /// Every seventh page stays untouched.
    fn is_touched(index: usize) -> bool {
        index * 8 / PAGE % 7 != 3
    }

    fn fill(&mut self, seed: u64) {
        self.seed = seed;
        self.protect(libc::PROT_READ | libc::PROT_WRITE);
        for index in (0..self.words).filter(|index| Self::is_touched(*index)) {
            // SAFETY: within the mapping, which is writable now.
            unsafe { self.start.add(index).write_volatile(mix(self.seed + index as u64)) };
        }
        self.protect(self.protection);
    }

    fn check(&self, what: &str, untouched: impl Fn(usize) -> u64) -> Result<(), String> {
        if self.protection & libc::PROT_READ == 0 {
            self.protect(libc::PROT_READ);
        }
        for index in 0..self.words {
            // SAFETY: within the mapping, which is readable now.
            let found = unsafe { self.start.add(index).read_volatile() };
            let expected = match Self::is_touched(index) {
                true => mix(self.seed + index as u64),
                false => untouched(index),
            };
            if found != expected {
                return Err(format!("{what}: word {index} is {found:#x}, not {expected:#x}"));
            }
        }
        self.protect(self.protection);
        Ok(())
    }
}

static DATA: [AtomicU64; 4096] = [const { AtomicU64::new(7) }; 4096];

/// Memory of every kind, with threads that wait in every way.
fn memory() {
    start_waits();
    let mut anonymous = Region::map(8 << 20, 1);
    let mut hidden = Region::map(1 << 20, 2);
    hidden.protection = libc::PROT_NONE;
    let mut locked = Region::map(64 << 10, 3);
    // SAFETY: locks a mapping of ours.
    unsafe { libc::mlock(locked.start.cast(), locked.words * 8) };
    let mut huge = Region::map(8 << 20, 4);
    // SAFETY: advice on a mapping of ours.
    unsafe { libc::madvise(huge.start.cast(), huge.words * 8, libc::MADV_HUGEPAGE) };
    // A reservation that holds next to nothing.
    // SAFETY: a new mapping at an address of the kernel's choice.
    let reservation = unsafe {
        libc::mmap(
            ptr::null_mut(),
            64 << 30,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert_ne!(reservation, libc::MAP_FAILED);
    // A private file mapping: content of the file where it was not written to.
    let file_word = |index: usize| mix(0xf11e + index as u64);
    let file_bytes = 256 << 10;
    let content: Vec<u8> = (0..file_bytes / 8).flat_map(|i| file_word(i).to_ne_bytes()).collect();
    let path = std::env::temp_dir().join(format!("medes-memtest-{}", std::process::id()));
    std::fs::write(&path, content).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut mapped =
        Region::map_with(file_bytes, 5, libc::MAP_PRIVATE, std::os::fd::AsRawFd::as_raw_fd(&file));
    mapped.protection = libc::PROT_READ;
    let mut round = 1;
    let mut heap: Vec<Vec<u64>> = Vec::new();
    let mut fill = |round: u64, heap: &mut Vec<Vec<u64>>, check: bool| -> Result<(), String> {
        if check {
            anonymous.check("anonymous", |_| 0)?;
            hidden.check("hidden", |_| 0)?;
            locked.check("locked", |_| 0)?;
            huge.check("huge", |_| 0)?;
            mapped.check("file", file_word)?;
            let wrong = heap.iter().enumerate().find(|(index, block)| {
                block.iter().any(|word| *word != mix(round - 1 + *index as u64))
            });
            if let Some((index, _)) = wrong {
                return Err(format!("heap block {index}"));
            }
            if DATA.iter().any(|word| word.load(Ordering::Relaxed) != mix(round - 1)) {
                return Err("data".to_owned());
            }
        }
        for region in [&mut anonymous, &mut hidden, &mut locked, &mut huge, &mut mapped] {
            region.fill(round * 1_000_003);
        }
        heap.clear();
        heap.extend((0..200).map(|index| vec![mix(round + index); 64 + index as usize * 5]));
        DATA.iter().for_each(|word| word.store(mix(round), Ordering::Relaxed));
        Ok(())
    };
    fill(round, &mut heap, false).unwrap();
    deep_stack(200, &mut || {
        serve(|_| {
            round += 1;
            match fill(round, &mut heap, true) {
                Err(error) => error,
                Ok(()) => match waits_verdict() {
                    Some(error) => error,
                    None => "ok".to_owned(),
                },
            }
        });
    });
}

/// Calls `inner` with known words on every frame of a deep stack, and checks them after.
#[inline(never)]
fn deep_stack(depth: u64, inner: &mut dyn FnMut()) {
    let mut frame = [0u64; 256];
    for (index, word) in frame.iter_mut().enumerate() {
        // SAFETY: a word of a local array.
        unsafe { ptr::write_volatile(word, mix(depth + index as u64)) };
    }
    if depth == 0 {
        inner()
    } else {
        deep_stack(depth - 1, inner)
    }
    for (index, word) in frame.iter().enumerate() {
        // SAFETY: a word of a local array.
        let found = unsafe { ptr::read_volatile(word) };
        assert_eq!(found, mix(depth + index as u64), "stack frame {depth}");
    }
}

const TIMEOUT: Duration = Duration::from_millis(7);
/// For calls that take milliseconds and round them.
const TIMEOUT_MS: i32 = TIMEOUT.as_millis() as i32 + 1;
const TIMESPEC: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: TIMEOUT.as_nanos() as i64 };

/// The name of a wait, and the wait itself, which says whether it ended by its timeout.
type Wait = (&'static str, fn() -> bool);

/// Waits by one system call each.
pub const WAITS: [Wait; 9] = [
    ("nanosleep", || {
        // SAFETY: reads a constant timespec.
        unsafe { libc::syscall(libc::SYS_nanosleep, &TIMESPEC, ptr::null_mut::<u8>()) == 0 }
    }),
    ("futex", || {
        let wait = libc::FUTEX_WAIT;
        // SAFETY: waits on a static word.
        let result = unsafe { libc::syscall(libc::SYS_futex, &FUTEX, wait, 0, &TIMESPEC, 0, 0) };
        result == -1 && errno() == libc::ETIMEDOUT
    }),
    ("epoll_wait", || {
        // SAFETY: plain descriptors; the kernel writes one event at most.
        unsafe {
            let epoll = libc::epoll_create1(0);
            let mut event: libc::epoll_event = std::mem::zeroed();
            let result = libc::epoll_wait(epoll, &mut event, 1, TIMEOUT_MS);
            close_all(&[epoll]);
            result == 0
        }
    }),
    ("epoll_pwait", || {
        // SAFETY: plain descriptors and local structures.
        unsafe {
            let epoll = libc::epoll_create1(0);
            let mut event: libc::epoll_event = std::mem::zeroed();
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut mask);
            let result = libc::epoll_pwait(epoll, &mut event, 1, TIMEOUT_MS, &mask);
            close_all(&[epoll]);
            result == 0
        }
    }),
    ("poll", || {
        // SAFETY: no descriptors at all.
        unsafe { libc::poll(ptr::null_mut(), 0, TIMEOUT_MS) == 0 }
    }),
    ("ppoll", || {
        let mut timeout = TIMESPEC;
        // SAFETY: no descriptors at all; the kernel updates the local timespec.
        unsafe { libc::syscall(libc::SYS_ppoll, 0, 0, &mut timeout, 0, 8) == 0 }
    }),
    ("select", || {
        let mut timeout = libc::timeval { tv_sec: 0, tv_usec: TIMEOUT.as_micros() as i64 };
        let none = ptr::null_mut();
        // SAFETY: no descriptors at all; the kernel updates the local timeval.
        unsafe { libc::select(0, none, none, none, &mut timeout) == 0 }
    }),
    ("rt_sigtimedwait", || {
        // SAFETY: local structures.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGUSR2);
            libc::sigtimedwait(&set, ptr::null_mut(), &TIMESPEC) == -1 && errno() == libc::EAGAIN
        }
    }),
    ("read with a timeout", || {
        // SAFETY: plain descriptors and local structures.
        unsafe {
            let mut pair = [0; 2];
            libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr());
            let limit = libc::timeval { tv_sec: 0, tv_usec: TIMEOUT.as_micros() as i64 };
            let (option, size) = (ptr::from_ref(&limit).cast(), size_of_val(&limit) as u32);
            libc::setsockopt(pair[0], libc::SOL_SOCKET, libc::SO_RCVTIMEO, option, size);
            let mut byte = 0u8;
            let result = libc::read(pair[0], ptr::from_mut(&mut byte).cast(), 1);
            close_all(&pair);
            result == -1 && errno() == libc::EAGAIN
        }
    }),
];

static WAIT_ERRORS: AtomicU32 = AtomicU32::new(0);
static WAIT_ERROR: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());
static WAIT_ROUNDS: [AtomicU64; WAITS.len()] = [const { AtomicU64::new(0) }; WAITS.len()];
static FUTEX: AtomicU32 = AtomicU32::new(0);

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Closes descriptors and leaves the error of the call before alone.
fn close_all(descriptors: &[i32]) {
    let error = errno();
    // SAFETY: descriptors of the caller's, and this thread's own variable.
    unsafe {
        for fd in descriptors {
            libc::close(*fd);
        }
        libc::__errno_location().write(error);
    }
}

/// Waits over and over; every result other than a timeout that is not early is an error.
fn wait_for_ever(index: usize) {
    let (name, wait) = WAITS[index];
    loop {
        let start = Instant::now();
        let right = wait();
        if !right || start.elapsed() < TIMEOUT {
            let error = std::io::Error::last_os_error();
            if WAIT_ERRORS.fetch_add(1, Ordering::Relaxed) == 0 {
                let what = if right { "early".to_owned() } else { error.to_string() };
                *WAIT_ERROR.lock().unwrap() = format!("{name}: {what}");
            }
        }
        WAIT_ROUNDS[index].fetch_add(1, Ordering::Relaxed);
    }
}

fn waits_verdict() -> Option<String> {
    match WAIT_ERRORS.load(Ordering::Relaxed) {
        0 => None,
        count => Some(format!("{count} wrong waits: {}", WAIT_ERROR.lock().unwrap())),
    }
}

fn start_waits() {
    for index in 0..WAITS.len() {
        std::thread::spawn(move || wait_for_ever(index));
    }
}

/// All waits on threads of their own, or one of them on the main thread, on which injected calls
/// run. Answers how many ended, and whether all ended right.
fn waits(only: Option<usize>) {
    let serve = move || {
        serve(|_| {
            let rounds = |index: &usize| WAIT_ROUNDS[*index].load(Ordering::Relaxed);
            let indices = 0..WAITS.len();
            let fewest = indices.filter(|index| only.is_none_or(|only| only == *index));
            let fewest = fewest.map(|index| rounds(&index)).min().unwrap();
            waits_verdict().unwrap_or(fewest.to_string())
        });
        std::process::exit(0);
    };
    match only {
        None => {
            start_waits();
            serve();
        }
        Some(index) => {
            std::thread::spawn(serve);
            wait_for_ever(index);
        }
    }
}

/// Waits in sigsuspend, on the main thread, for a signal that is blocked otherwise.
fn suspended() {
    // SAFETY: local structures; the handler does nothing but add to an atomic.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_signal as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut());
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut blocked, libc::SIGUSR1);
        libc::sigprocmask(libc::SIG_BLOCK, &blocked, ptr::null_mut());
        let none: libc::sigset_t = std::mem::zeroed();
        say("ready");
        loop {
            let result = libc::sigsuspend(&none);
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::sigprocmask(libc::SIG_BLOCK, ptr::null(), &mut mask);
            let blocked = libc::sigismember(&mask, libc::SIGUSR1) == 1;
            let right = result == -1 && errno() == libc::EINTR && blocked;
            say(&format!("{} {right}", SIGNALS.load(Ordering::Relaxed)));
        }
    }
}

/// A filter that kills on every call that the program itself does not make.
fn filtered() {
    let mut region = Region::map(1 << 20, 9);
    region.fill(9);
    let allowed = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_mprotect,
        libc::SYS_exit_group,
        libc::SYS_futex,
        libc::SYS_restart_syscall,
        libc::SYS_brk,
        libc::SYS_munmap,
    ];
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (index, call) in allowed.iter().enumerate() {
        program.push(libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: (allowed.len() - index) as u8,
            jf: 0,
            k: *call as u32,
        });
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS));
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives until the kernel has copied it.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let result = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter);
        assert_eq!(result, 0);
    }
    serve(|line| match line {
        // Not in the list: the filter must be in force again.
        "break" => {
            // SAFETY: no arguments.
            unsafe { libc::getppid() };
            "not filtered".to_owned()
        }
        _ => region.check("region", |_| 0).err().unwrap_or("ok".to_owned()),
    });
}

fn uring() {
    let mut parameters = [0u8; 120];
    // SAFETY: io_uring_setup writes 120 bytes of parameters.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    serve_as(if fd < 0 { "ready unsupported" } else { "ready" }, |_| "ok".to_owned());
}

fn own_userfault() {
    // SAFETY: takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    assert!(fd >= 0);
    serve(|_| fd.to_string());
}

fn aio() {
    let mut context = 0u64;
    // SAFETY: io_setup writes one context.
    let result = unsafe { libc::syscall(libc::SYS_io_setup, 8, &mut context) };
    assert_eq!(result, 0);
    serve(|_| "ok".to_owned());
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// Counts SIGUSR1 and real-time signals.
fn signals() {
    for signal in [libc::SIGUSR1, libc::SIGRTMIN() + 3] {
        // SAFETY: the handler does nothing but add to an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count_signal as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
    serve(|_| SIGNALS.load(Ordering::Relaxed).to_string());
}

/// Forks on request; the child checks the parent's memory.
fn fork() {
    let mut region = Region::map(1 << 20, 11);
    region.fill(11);
    serve(|_| {
        // SAFETY: the child only reads memory, writes a line and exits.
        unsafe {
            match libc::fork() {
                0 => {
                    let verdict = region.check("child", |_| 0);
                    libc::_exit(i32::from(verdict.is_err()));
                }
                child => {
                    let mut status = 0;
                    libc::waitpid(child, &mut status, 0);
                    if status == 0 { "ok".to_owned() } else { format!("status {status:#x}") }
                }
            }
        }
    });
}

/// Threads come and go all the time.
fn churning_threads() {
    for _ in 0..2 {
        std::thread::spawn(|| {
            loop {
                let short: Vec<_> = (0..4)
                    .map(|_| std::thread::spawn(|| std::thread::sleep(Duration::from_micros(200))))
                    .collect();
                short.into_iter().for_each(|thread| thread.join().unwrap());
            }
        });
    }
    serve(|_| "ok".to_owned());
}

/// Moves and extends its region on request, and then writes to the new part.
fn remap() {
    let mut region = Region::map(1 << 20, 12);
    region.fill(12);
    serve(|line| {
        let check = |region: &Region| region.check("moved", |_| 0).err().unwrap_or("ok".to_owned());
        if line == "move" {
            // SAFETY: nothing but `region` refers to the mapping.
            let moved = unsafe {
                libc::mremap(region.start.cast(), 1 << 20, 4 << 20, libc::MREMAP_MAYMOVE)
            };
            assert_ne!(moved, libc::MAP_FAILED);
            region.start = moved.cast();
        }
        if line == "extend" {
            region.words = (4 << 20) / 8;
            region.fill(13);
        }
        check(&region)
    });
}

/// A parent and three children, each of which checks memory of its own.
fn tree() {
    let mut region = Region::map(1 << 20, 14);
    region.fill(14);
    let children: Vec<(i32, [i32; 2], [i32; 2])> = (0..3u64)
        .map(|index| {
            let (mut to, mut from) = ([0; 2], [0; 2]);
            // SAFETY: plain descriptors; the child of this single thread only uses memory of
            // its own and leaves by _exit.
            unsafe {
                libc::pipe(to.as_mut_ptr());
                libc::pipe(from.as_mut_ptr());
                let child = libc::fork();
                if child == 0 {
                    let mut round = 20 + index;
                    region.fill(round);
                    loop {
                        let mut byte = 0u8;
                        if libc::read(to[0], ptr::from_mut(&mut byte).cast(), 1) != 1 {
                            libc::_exit(0);
                        }
                        byte = u8::from(region.check("child", |_| 0).is_ok());
                        round += 1;
                        region.fill(round);
                        libc::write(from[1], ptr::from_ref(&byte).cast(), 1);
                    }
                }
                (child, to, from)
            }
        })
        .collect();
    serve(|_| {
        let mut verdict = region.check("parent", |_| 0).err().unwrap_or("ok".to_owned());
        for (child, to, from) in &children {
            let mut byte = 0u8;
            // SAFETY: plain descriptors and a local byte.
            unsafe {
                libc::write(to[1], ptr::from_ref(&byte).cast(), 1);
                libc::read(from[0], ptr::from_mut(&mut byte).cast(), 1);
            }
            if byte != 1 {
                verdict = format!("child {child}");
            }
        }
        verdict
    });
}

/// Sits in vfork: its child shares the address space and waits.
fn vfork() {
    say("ready");
    // The group is joined before the child is born into it.
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    // SAFETY: the child makes system calls only and leaves by _exit.
    unsafe {
        if libc::syscall(libc::SYS_vfork) == 0 {
            libc::syscall(libc::SYS_pause);
            libc::_exit(0);
        }
    }
}
