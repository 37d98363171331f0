//! The seccomp filter, and the conversation with the kernel about what meets it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::call::{Call, Verdict};
use crate::{check, raw};

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Offsets of `nr` and `arch` in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

/// Shows every system call of the calling thread, and of those that it starts, to the answer.
pub(crate) fn install() -> io::Result<OwnedFd> {
    let program = program(&Call::SILENT);
    let prog = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: `prog` describes a live program, which the kernel copies and does not change.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const prog,
        )
    })?;
    // SAFETY: the kernel has just made this descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Lets `silent` calls pass, and those of another architecture, and asks about all others.
fn program(silent: &[i64]) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let unless = |k: u32| {
        let code = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        libc::sock_filter { code, jt: 0, jf: 1, k }
    };
    let (load, answer) = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_RET | libc::BPF_K);
    let allow = statement(answer, libc::SECCOMP_RET_ALLOW);
    let mut program = vec![statement(load, ARCH), unless(AUDIT_ARCH_X86_64)];
    // A jump over one statement: on a match it is the next that counts.
    program.push(libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JA) as u16,
        jt: 0,
        jf: 0,
        k: 1,
    });
    program.push(allow);
    program.push(statement(load, NUMBER));
    for number in silent {
        program.push(unless(*number as u32));
        program.push(allow);
    }
    program.push(statement(answer, libc::SECCOMP_RET_USER_NOTIF));
    program
}

pub(crate) enum Next {
    /// A call, and what the kernel names it by.
    Call(u64, Call),
    /// Every thread under the filter has ended.
    Nobody,
    /// Nothing happened.
    Silence,
}

/// Waits for the next call.
pub(crate) fn next(listener: &OwnedFd, limit_ms: i32) -> io::Result<Next> {
    loop {
        let mut poll = libc::pollfd { fd: raw(listener), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live pollfd.
        match check(i64::from(unsafe { libc::poll(&raw mut poll, 1, limit_ms) })) {
            Ok(0) => return Ok(Next::Silence),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if poll.revents & libc::POLLIN == 0 {
            return Ok(Next::Nobody);
        }
        // SAFETY: seccomp_notif is plain integers, for which zeros are valid, and required.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: SECCOMP_IOCTL_NOTIF_RECV writes one seccomp_notif.
        let received =
            unsafe { libc::ioctl(raw(listener), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
        match check(i64::from(received)) {
            Ok(_) => {
                let number = i64::from(call.data.nr);
                let call_ = Call { tid: call.pid as i32, number, args: call.data.args };
                return Ok(Next::Call(call.id, call_));
            }
            // Killed before it was heard, or a signal to us.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Answers. Whoever waits for the answer may be dead.
pub(crate) fn answer(listener: &OwnedFd, id: u64, verdict: Verdict) {
    let (error, flags) = match verdict {
        Verdict::Go => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Verdict::Fail(errno) => (-errno, 0),
    };
    let mut answer = libc::seccomp_notif_resp { id, val: 0, error, flags };
    // SAFETY: SECCOMP_IOCTL_NOTIF_SEND reads one seccomp_notif_resp.
    unsafe { libc::ioctl(raw(listener), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
}
