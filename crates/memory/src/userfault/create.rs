//! Making a userfaultfd of another process.
//!
//! A userfaultfd belongs to the address space of the process that makes it, so the target has
//! to. A privileged target calls `userfaultfd()`. An unprivileged one may not, unless
//! `vm.unprivileged_userfaultfd` is set for the whole host; but the right to make one can be
//! handed over as an open `/dev/userfaultfd` (6.1). It gets there over a socket pair that the
//! target makes and of which one end is taken with `pidfd_getfd`: no name, no listener, and
//! nobody else can connect, whatever namespaces the target is in.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::{UserFault, UserFaultFeatures, abi};
use crate::sys;
use crate::tracee::{InjectError, SeizedProcess};

/// Descriptors that the target keeps are moved to this number or above, out of the way of
/// programs that expect their next one to be small.
const KEPT_FD_MINIMUM: u64 = 120;

const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

/// How a userfaultfd is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct UserFaultOptions {
    /// Features wanted; those the kernel lacks are left out, see [`UserFault::features`].
    pub features: UserFaultFeatures,
    /// Leave a descriptor open in the target too: its userfaultfd is then not released while
    /// the process lives, and a missing page blocks, rather than reads as zeros, even after
    /// every other holder has died. The program sees a descriptor it did not open, could close
    /// it, and could read its own faults.
    pub keep_in_target: bool,
    /// Hand over `/dev/userfaultfd` at once, without trying the target's own privileges first.
    pub without_privilege: bool,
}

/// Why no userfaultfd could be made. The target is as before, or was killed.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// An injected call failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The target may not call `userfaultfd()` and the kernel has no device to hand over.
    #[error(
        "process {pid} may not make a userfaultfd, and /dev/userfaultfd cannot be opened to \
         hand it over (it needs Linux 6.1 and CONFIG_USERFAULTFD): {source}"
    )]
    NoDevice {
        /// The process.
        pid: i32,
        /// What opening it said.
        source: io::Error,
    },
    /// Another step on our side failed.
    #[error("{operation} for process {pid}: {source}")]
    Os {
        /// The process.
        pid: i32,
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UserFault {
    /// Makes a userfaultfd of a stopped process and takes it.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create(
        process: &mut SeizedProcess,
        options: &UserFaultOptions,
    ) -> Result<Self, CreateError> {
        let pid = process.pid();
        let listing = |source| CreateError::Os { pid, operation: "listing descriptors", source };
        let before = list_descriptors(pid).map_err(listing)?;
        Self::create_in(process, options).inspect_err(|error| {
            if let Err(also) = close_new(process, &before) {
                tracing::error!(pid, %error, %also, "it has a descriptor of ours: it is killed");
                process.kill();
            }
        })
    }

    fn create_in(
        process: &mut SeizedProcess,
        options: &UserFaultOptions,
    ) -> Result<Self, CreateError> {
        let pid = process.pid();
        let os = |operation| move |source| CreateError::Os { pid, operation, source };
        let number = match options.without_privilege {
            true => None,
            false => match process.inject_syscall(libc::SYS_userfaultfd, [FLAGS, 0, 0, 0, 0, 0])? {
                number if number >= 0 => Some(number as RawFd),
                // EPERM without privilege, ENOSYS of a filter or an old kernel: hand it over.
                refused if [-libc::EPERM, -libc::ENOSYS].contains(&(refused as i32)) => None,
                refused => {
                    process.checked("userfaultfd", refused)?;
                    None
                }
            },
        };
        let number = match number {
            Some(number) => number,
            None => hand_over_and_create(process)?,
        };
        let taken = sys::pidfd_getfd(process.pidfd(), number).map_err(os("pidfd_getfd"));
        let target_fd = if options.keep_in_target && taken.is_ok() {
            let kept = process.inject_syscall(
                libc::SYS_fcntl,
                [number as u64, libc::F_DUPFD_CLOEXEC as u64, KEPT_FD_MINIMUM, 0, 0, 0],
            )?;
            match kept {
                // A low limit of descriptors: it stays where it is.
                refused if refused < 0 => Some(number),
                kept => {
                    close(process, number)?;
                    Some(kept as RawFd)
                }
            }
        } else {
            close(process, number)?;
            None
        };
        let fd = taken?;
        let wanted = match UserFaultFeatures::supported() {
            Some(supported) => options.features.intersection(supported),
            None => options.features,
        };
        handshake(&fd, wanted).map_err(os("UFFDIO_API"))?;
        Ok(Self::from_parts(fd, wanted, Vec::new(), target_fd))
    }
}

/// Agrees on features; returns all that the kernel offers.
pub(super) fn handshake(fd: &OwnedFd, wanted: UserFaultFeatures) -> io::Result<UserFaultFeatures> {
    let mut arg = abi::Api { api: abi::UFFD_API, features: wanted.bits(), ioctls: 0 };
    // SAFETY: UFFDIO_API takes a struct uffdio_api, which holds no pointers.
    unsafe { sys::ioctl(fd.as_raw_fd(), abi::UFFDIO_API, &mut arg) }?;
    Ok(UserFaultFeatures::from_bits(arg.features))
}

/// A userfaultfd of this process.
pub(super) fn own() -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd takes flags and touches no memory.
    let result = sys::check(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) });
    let fd = match result {
        Ok(fd) => fd as RawFd,
        Err(_) => from_device(&open_device()?)?,
    };
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens the device that makes userfaultfds.
pub(crate) fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/userfaultfd")
}

fn from_device(device: &File) -> io::Result<RawFd> {
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), abi::USERFAULTFD_IOC_NEW as _, FLAGS) };
    sys::check(i64::from(fd)).map(|fd| fd as RawFd)
}

fn close(process: &mut SeizedProcess, number: RawFd) -> Result<(), InjectError> {
    process.call("close", libc::SYS_close, [number as u64, 0, 0, 0, 0, 0]).map(drop)
}

/// The numbers of a process's descriptors.
fn list_descriptors(pid: i32) -> io::Result<Vec<RawFd>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    Ok(numbers)
}

/// Closes what the target has open and had not `before`, whichever injected call made it: the
/// result of one that failed half way is not known.
fn close_new(process: &mut SeizedProcess, before: &[RawFd]) -> io::Result<()> {
    for number in list_descriptors(process.pid())? {
        if !before.contains(&number) {
            close(process, number).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// Hands the target an open `/dev/userfaultfd` and makes it use it; returns the number of the
/// new userfaultfd in the target.
fn hand_over_and_create(process: &mut SeizedProcess) -> Result<RawFd, CreateError> {
    let pid = process.pid();
    let device = open_device().map_err(|source| CreateError::NoDevice { pid, source })?;
    let scratch = process.scratch()?.address;
    process.call(
        "socketpair",
        libc::SYS_socketpair,
        [libc::AF_UNIX as u64, (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64, 0, scratch, 0, 0],
    )?;
    let mut pair = [0; 8];
    process.read_memory(scratch, &mut pair)?;
    let number = |bytes: &[u8]| RawFd::from_ne_bytes(bytes.try_into().expect("four bytes"));
    let (ours, theirs) = (number(&pair[..4]), number(&pair[4..]));
    let received = receive_device(process, &device, ours, theirs, scratch);
    close(process, ours)?;
    close(process, theirs)?;
    let received = received?;
    let made = process.call(
        "ioctl(USERFAULTFD_IOC_NEW)",
        libc::SYS_ioctl,
        [received as u64, abi::USERFAULTFD_IOC_NEW, FLAGS, 0, 0, 0],
    );
    close(process, received)?;
    Ok(made? as RawFd)
}

/// Sends `device` through the target's socket pair; returns its number in the target.
fn receive_device(
    process: &mut SeizedProcess,
    device: &File,
    ours: RawFd,
    theirs: RawFd,
    scratch: u64,
) -> Result<RawFd, CreateError> {
    /// Offsets in the scratch area: message header, one vector, one byte, control message.
    const VECTOR: u64 = 64;
    const BYTE: u64 = 96;
    const CONTROL: u64 = 128;
    /// `CMSG_SPACE(sizeof(int))` and the offset of its data.
    const CONTROL_SIZE: u64 = 24;
    const CONTROL_DATA: usize = 16;

    let pid = process.pid();
    let os = |operation| move |source| CreateError::Os { pid, operation, source };
    let socket = sys::pidfd_getfd(process.pidfd(), ours).map_err(os("pidfd_getfd"))?;
    send_descriptor(&socket, device).map_err(os("sending /dev/userfaultfd"))?;
    // struct msghdr: name, name length, vectors, their number, control, its length, flags.
    let header = [0, 0, scratch + VECTOR, 1, scratch + CONTROL, CONTROL_SIZE, 0];
    let vector = [scratch + BYTE, 1];
    let words =
        |words: &[u64]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    process.write_memory(scratch, &words(&header))?;
    process.write_memory(scratch + VECTOR, &words(&vector))?;
    process.call(
        "recvmsg",
        libc::SYS_recvmsg,
        [theirs as u64, scratch, (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as u64, 0, 0, 0],
    )?;
    let mut control = [0; CONTROL_SIZE as usize];
    process.read_memory(scratch + CONTROL, &mut control)?;
    let length = u64::from_ne_bytes(control[..8].try_into().expect("eight bytes"));
    if length < CONTROL_DATA as u64 + 4 {
        // The limit of descriptors is reached: the kernel left the descriptor out.
        return Err(os("receiving /dev/userfaultfd")(io::Error::from_raw_os_error(libc::EMFILE)));
    }
    let data = &control[CONTROL_DATA..CONTROL_DATA + 4];
    Ok(RawFd::from_ne_bytes(data.try_into().expect("four bytes")))
}

/// Sends one byte and a descriptor.
fn send_descriptor(socket: &OwnedFd, file: &File) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let descriptors = [file.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let byte = [io::IoSlice::new(&[0])];
    sendmsg::<()>(socket.as_raw_fd(), &byte, &control, MsgFlags::MSG_DONTWAIT, None)?;
    Ok(())
}
