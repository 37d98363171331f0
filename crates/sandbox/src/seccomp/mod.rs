//! The system calls that a sandbox may make.
//!
//! The filter allows what language runtimes need, after the default profile of the OCI engines.
//! Calls that exist to act on the machine or on other processes answer EPERM, which is what
//! programs that probe for privileges expect. Every other call answers ENOSYS, so that a C library
//! which knows a newer call falls back to an older one. Calls of a foreign architecture kill the
//! process.

mod filter;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use libc::*;

use self::filter::{Answer, Rule, Test, compile};
use crate::spec::{Seccomp, SeccompProfile};

/// The filter program for `seccomp`, or none if nothing is filtered.
pub(crate) fn program(seccomp: &Seccomp) -> Option<&'static [sock_filter]> {
    type Program = LazyLock<Vec<sock_filter>>;
    static DEFAULT: Program = LazyLock::new(|| default_profile(false));
    static WITH_IO_URING: Program = LazyLock::new(|| default_profile(true));
    static NO_IO_URING: Program =
        LazyLock::new(|| compile(&rules(&IO_URING, Answer::Errno(ENOSYS as u16)), Answer::Allow));
    match (seccomp.profile, seccomp.deny_io_uring) {
        (SeccompProfile::Default, true) => Some(&DEFAULT),
        (SeccompProfile::Default, false) => Some(&WITH_IO_URING),
        (SeccompProfile::Unconfined, true) => Some(&NO_IO_URING),
        (SeccompProfile::Unconfined, false) => None,
    }
}

const REFUSE: Answer = Answer::Errno(EPERM as u16);

fn rules(calls: &[c_long], answer: Answer) -> BTreeMap<u32, Rule> {
    calls.iter().map(|nr| (*nr as u32, Rule::Always(answer))).collect()
}

fn default_profile(io_uring: bool) -> Vec<sock_filter> {
    let mut all = rules(ALLOWED, Answer::Allow);
    all.extend(rules(ALLOWED_LEGACY, Answer::Allow));
    all.extend(rules(REFUSED, REFUSE));
    if io_uring {
        all.extend(rules(&IO_URING, Answer::Allow));
    }
    all.extend(CONDITIONAL.map(|(nr, rule)| (nr as u32, rule)));
    compile(&all, Answer::Errno(ENOSYS as u16))
}

/// `prctl` option, from the kernel's `linux/prctl.h`.
const PR_SET_SYSCALL_USER_DISPATCH: u32 = 59;

/// Flags of `clone` for new namespaces, which would give the process capabilities over a lot of
/// kernel code.
const NEW_NAMESPACES: u32 = (CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET) as u32;

/// Anything but local, internet and routing sockets: vsock reaches the host, the others are seldom
/// used kernel code.
const SOCKET_FAMILIES: Rule = Rule::If {
    argument: 0,
    is: Test::OneOf(&[AF_UNIX as u32, AF_INET as u32, AF_INET6 as u32, AF_NETLINK as u32]),
    then: Answer::Allow,
    otherwise: Answer::Errno(EAFNOSUPPORT as u16),
};

/// Calls whose answer depends on an argument.
const CONDITIONAL: [(c_long, Rule); 6] = [
    (
        SYS_clone,
        Rule::If {
            argument: 0,
            is: Test::AnyBitOf(NEW_NAMESPACES),
            then: REFUSE,
            otherwise: Answer::Allow,
        },
    ),
    (SYS_socket, SOCKET_FAMILIES),
    (SYS_socketpair, SOCKET_FAMILIES),
    (
        // Typing into a terminal that somebody else reads.
        SYS_ioctl,
        Rule::If {
            argument: 1,
            is: Test::OneOf(&[TIOCSTI as u32, TIOCLINUX as u32]),
            then: REFUSE,
            otherwise: Answer::Allow,
        },
    ),
    (
        // Sends a process's system calls to itself, those that the platform injects among them.
        SYS_prctl,
        Rule::If {
            argument: 0,
            is: Test::OneOf(&[PR_SET_SYSCALL_USER_DISPATCH]),
            then: REFUSE,
            otherwise: Answer::Allow,
        },
    ),
    (
        // The personalities that change nothing but reported versions, and the query.
        SYS_personality,
        Rule::If {
            argument: 0,
            is: Test::OneOf(&[0, 0x8, 0x2_0000, 0x2_0008, u32::MAX]),
            then: Answer::Allow,
            otherwise: REFUSE,
        },
    ),
];

const IO_URING: [c_long; 3] = [SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register];

/// Calls that act on the machine, on namespaces, on other processes or on the kernel's rarely
/// travelled paths.
#[rustfmt::skip]
const REFUSED: &[c_long] = &[
    // Mounts, namespaces and the view of the file system.
    SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_unshare, SYS_setns, SYS_open_tree,
    SYS_move_mount, SYS_fsopen, SYS_fsconfig, SYS_fsmount, SYS_fspick, SYS_mount_setattr,
    SYS_quotactl, SYS_quotactl_fd, SYS_swapon, SYS_swapoff, SYS_open_by_handle_at,
    SYS_fanotify_init, SYS_fanotify_mark,
    // Other processes.
    SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_pidfd_getfd, SYS_kcmp,
    SYS_process_madvise, SYS_process_mrelease,
    // Kernel facilities with a long record of holes, or that hide memory from deduplication.
    SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_add_key, SYS_request_key, SYS_keyctl,
    SYS_vmsplice,
    // The machine.
    SYS_kexec_load, SYS_kexec_file_load, SYS_init_module, SYS_finit_module, SYS_delete_module,
    SYS_reboot, SYS_acct, SYS_syslog, SYS_sethostname, SYS_setdomainname, SYS_vhangup,
    SYS_settimeofday, SYS_clock_settime, SYS_adjtimex, SYS_clock_adjtime, SYS_mbind,
    SYS_set_mempolicy, SYS_migrate_pages, SYS_move_pages,
    #[cfg(target_arch = "x86_64")] SYS_iopl,
    #[cfg(target_arch = "x86_64")] SYS_ioperm,
    #[cfg(target_arch = "x86_64")] SYS_modify_ldt,
];

/// Calls that programs need. Absent on purpose, so answered with ENOSYS: clone3 (its flags lie in
/// memory, out of a filter's sight, and C libraries fall back to clone), memfd_secret and mseal
/// (memory that can't be deduplicated), and everything newer than this list.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // Files.
    SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev,
    SYS_preadv2, SYS_pwritev2, SYS_openat, SYS_openat2, SYS_close, SYS_close_range, SYS_lseek,
    SYS_fstat, SYS_newfstatat, SYS_statx, SYS_statfs, SYS_fstatfs, SYS_faccessat, SYS_faccessat2,
    SYS_fcntl, SYS_flock, SYS_fsync, SYS_fdatasync, SYS_sync, SYS_syncfs, SYS_sync_file_range,
    SYS_truncate, SYS_ftruncate, SYS_fallocate, SYS_fadvise64, SYS_readahead, SYS_getdents64,
    SYS_getcwd, SYS_chdir, SYS_fchdir, SYS_mkdirat, SYS_mknodat, SYS_unlinkat, SYS_linkat,
    SYS_symlinkat, SYS_readlinkat, SYS_renameat, SYS_renameat2, SYS_fchmod, SYS_fchmodat,
    SYS_fchown, SYS_fchownat, SYS_utimensat, SYS_umask, SYS_dup, SYS_dup3, SYS_pipe2, SYS_splice,
    SYS_tee, SYS_sendfile, SYS_copy_file_range, SYS_name_to_handle_at,
    SYS_memfd_create, SYS_getxattr, SYS_lgetxattr, SYS_fgetxattr, SYS_setxattr, SYS_lsetxattr,
    SYS_fsetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr, SYS_removexattr,
    SYS_lremovexattr, SYS_fremovexattr, SYS_inotify_init1, SYS_inotify_add_watch,
    SYS_inotify_rm_watch, SYS_io_setup, SYS_io_destroy, SYS_io_submit, SYS_io_cancel,
    SYS_io_getevents,
    // Waiting.
    SYS_ppoll, SYS_pselect6, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2,
    SYS_eventfd2, SYS_signalfd4, SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime,
    SYS_futex, SYS_futex_waitv, SYS_get_robust_list, SYS_set_robust_list, SYS_rseq,
    SYS_restart_syscall, SYS_nanosleep, SYS_clock_nanosleep,
    // Memory.
    SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_madvise, SYS_msync, SYS_mincore, SYS_brk,
    SYS_mlock, SYS_mlock2, SYS_munlock, SYS_mlockall, SYS_munlockall, SYS_remap_file_pages,
    SYS_membarrier, SYS_pkey_alloc, SYS_pkey_free, SYS_pkey_mprotect, SYS_get_mempolicy,
    // Processes and threads.
    SYS_execve, SYS_execveat, SYS_exit, SYS_exit_group, SYS_wait4, SYS_waitid,
    SYS_getpid, SYS_getppid, SYS_gettid, SYS_set_tid_address, SYS_getpgid, SYS_setpgid,
    SYS_getsid, SYS_setsid, SYS_seccomp, SYS_landlock_create_ruleset,
    SYS_landlock_add_rule, SYS_landlock_restrict_self, SYS_pidfd_open, SYS_pidfd_send_signal,
    SYS_sched_yield, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_getattr,
    SYS_sched_setattr, SYS_sched_getparam, SYS_sched_setparam, SYS_sched_getscheduler,
    SYS_sched_setscheduler, SYS_sched_get_priority_max, SYS_sched_get_priority_min,
    SYS_sched_rr_get_interval, SYS_getpriority, SYS_setpriority, SYS_ioprio_get, SYS_ioprio_set,
    SYS_getrlimit, SYS_setrlimit, SYS_prlimit64, SYS_getrusage, SYS_times, SYS_getcpu,
    // Signals.
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigpending, SYS_rt_sigqueueinfo,
    SYS_rt_tgsigqueueinfo, SYS_rt_sigreturn, SYS_rt_sigsuspend, SYS_rt_sigtimedwait,
    SYS_sigaltstack, SYS_kill, SYS_tkill, SYS_tgkill, SYS_getitimer, SYS_setitimer,
    SYS_timer_create, SYS_timer_delete, SYS_timer_getoverrun, SYS_timer_gettime,
    SYS_timer_settime,
    // Who and where.
    SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_getgroups, SYS_setgroups, SYS_getresuid,
    SYS_getresgid, SYS_setuid, SYS_setgid, SYS_setreuid, SYS_setregid, SYS_setresuid,
    SYS_setresgid, SYS_setfsuid, SYS_setfsgid, SYS_capget, SYS_capset, SYS_uname, SYS_sysinfo,
    SYS_getrandom, SYS_gettimeofday, SYS_clock_gettime, SYS_clock_getres,
    // Sockets and messages.
    SYS_bind, SYS_listen, SYS_accept, SYS_accept4, SYS_connect,
    SYS_getsockname, SYS_getpeername, SYS_getsockopt, SYS_setsockopt, SYS_shutdown, SYS_sendto,
    SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_sendmmsg, SYS_recvmmsg, SYS_shmget, SYS_shmat,
    SYS_shmdt, SYS_shmctl, SYS_semget, SYS_semop, SYS_semtimedop, SYS_semctl, SYS_msgget,
    SYS_msgsnd, SYS_msgrcv, SYS_msgctl, SYS_mq_open, SYS_mq_unlink, SYS_mq_timedsend,
    SYS_mq_timedreceive, SYS_mq_notify, SYS_mq_getsetattr,
];

/// Calls with which older architectures were born; newer ones have only the general forms above.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_LEGACY: &[c_long] = &[
    SYS_open, SYS_creat, SYS_stat, SYS_lstat, SYS_access, SYS_mkdir, SYS_rmdir, SYS_mknod,
    SYS_unlink, SYS_link, SYS_symlink, SYS_readlink, SYS_rename, SYS_chmod, SYS_chown, SYS_lchown,
    SYS_utime, SYS_utimes, SYS_futimesat, SYS_getdents, SYS_dup2, SYS_pipe, SYS_poll, SYS_select,
    SYS_epoll_create, SYS_epoll_wait, SYS_eventfd, SYS_signalfd, SYS_inotify_init, SYS_fork,
    SYS_vfork, SYS_getpgrp, SYS_alarm, SYS_pause, SYS_time, SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_LEGACY: &[c_long] = &[];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn answer(program: &[sock_filter], nr: c_long, first: u64) -> u32 {
        filter::tests::native(program, nr as u32, [first, first, 0, 0, 0, 0])
    }

    #[test]
    fn programs_are_short() {
        for profile in [SeccompProfile::Default, SeccompProfile::Unconfined] {
            for deny_io_uring in [true, false] {
                let program = program(&Seccomp { profile, deny_io_uring });
                assert!(program.is_none_or(|p| p.len() < 200), "{:?}", program.map(<[_]>::len));
            }
        }
    }

    #[test]
    fn no_call_is_listed_twice() {
        let mut seen = HashSet::new();
        let conditional = CONDITIONAL.map(|(nr, _)| nr);
        let lists = [ALLOWED, ALLOWED_LEGACY, REFUSED, &IO_URING, &conditional];
        for nr in lists.into_iter().flatten() {
            assert!(seen.insert(nr), "system call {nr}");
        }
    }

    #[test]
    fn the_default_profile() {
        let program = program(&Seccomp::default()).unwrap();
        let refused = SECCOMP_RET_ERRNO | EPERM as u32;
        let unknown = SECCOMP_RET_ERRNO | ENOSYS as u32;
        for nr in ALLOWED.iter().chain(ALLOWED_LEGACY) {
            assert_eq!(answer(program, *nr, 0), SECCOMP_RET_ALLOW, "system call {nr}");
        }
        for nr in REFUSED {
            assert_eq!(answer(program, *nr, 0), refused, "system call {nr}");
        }
        for nr in [SYS_clone3, SYS_memfd_secret, SYS_mseal, SYS_io_uring_setup, 9999] {
            assert_eq!(answer(program, nr, 0), unknown, "system call {nr}");
        }
        let thread = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD) as u64;
        assert_eq!(answer(program, SYS_clone, thread), SECCOMP_RET_ALLOW);
        for flag in [CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET] {
            assert_eq!(answer(program, SYS_clone, thread | flag as u64), refused);
        }
        assert_eq!(answer(program, SYS_socket, AF_INET as u64), SECCOMP_RET_ALLOW);
        assert_eq!(
            answer(program, SYS_socket, AF_VSOCK as u64),
            SECCOMP_RET_ERRNO | EAFNOSUPPORT as u32
        );
        assert_eq!(answer(program, SYS_ioctl, TIOCSTI), refused);
        assert_eq!(answer(program, SYS_ioctl, FIONREAD), SECCOMP_RET_ALLOW);
        assert_eq!(answer(program, SYS_personality, u64::MAX), SECCOMP_RET_ALLOW);
        assert_eq!(answer(program, SYS_personality, ADDR_NO_RANDOMIZE as u64), refused);
    }
}
