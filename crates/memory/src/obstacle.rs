//! What makes a process unfit for having its memory dropped, found before any of it is.
//!
//! Mappings that cannot be dropped are no obstacle: they are left resident, see
//! [`Mapping::left_resident`](crate::mappings::Mapping::left_resident). An obstacle is something
//! that would make dropping the *other* memory unsafe.

use std::fs;
use std::io;

use crate::mappings::Mapping;
use crate::sys;

/// A reason to leave a process as it is. The message names the cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// It does not exist.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// It, or its main thread, has exited and waits for its parent.
    #[error("process {pid} is a zombie")]
    Zombie {
        /// The process.
        pid: i32,
    },
    /// It has no address space of its own.
    #[error("process {pid} is a kernel thread")]
    KernelThread {
        /// The process.
        pid: i32,
    },
    /// Somebody traces it; a task has one tracer at most.
    #[error("process {pid} is traced by {tracer} (a debugger, strace, or the like)")]
    Traced {
        /// The process.
        pid: i32,
        /// The thread that traces it.
        tracer: i32,
    },
    /// The kernel may use its memory behind its back, through the rings and registered buffers.
    #[error(
        "process {pid} uses io_uring (descriptor {fd}), which keeps pages of it pinned; \
         a seccomp rule that answers io_uring_setup with ENOSYS prevents it"
    )]
    IoUring {
        /// The process.
        pid: i32,
        /// One of the descriptors.
        fd: i32,
    },
    /// Asynchronous I/O may be writing to its memory.
    #[error("process {pid} uses kernel asynchronous I/O (io_setup), which may write to its memory")]
    Aio {
        /// The process.
        pid: i32,
    },
    /// It handles page faults of its own.
    #[error("process {pid} has a userfaultfd of its own (descriptor {fd})")]
    OwnUserfault {
        /// The process.
        pid: i32,
        /// The descriptor.
        fd: i32,
    },
    /// Pages are pinned for devices or the network.
    #[error("process {pid} has {kib} KiB of memory pinned (VmPin)")]
    PinnedMemory {
        /// The process.
        pid: i32,
        /// Pinned memory in KiB.
        kib: u64,
    },
    /// It drives a device that may access its memory directly.
    #[error("process {pid} has {device} open, which may access its memory directly")]
    DeviceAccess {
        /// The process.
        pid: i32,
        /// The device file.
        device: String,
    },
    /// Another process uses the same address space (`vfork`, `CLONE_VM`).
    #[error("processes {pid} and {other} share one address space (vfork or CLONE_VM)")]
    SharedAddressSpace {
        /// The process.
        pid: i32,
        /// The other one.
        other: i32,
    },
    /// Its program is a 32-bit one.
    #[error("process {pid} is a 32-bit program")]
    ThirtyTwoBit {
        /// The process.
        pid: i32,
    },
    /// Its threads have shadow stacks.
    #[error("process {pid} uses shadow stacks (x86 CET), which are not supported")]
    ShadowStack {
        /// The process.
        pid: i32,
    },
}

/// What [`find_obstacles`] needs to know besides the process.
#[derive(Debug, Clone, Copy, Default)]
pub struct ObstacleOptions<'a> {
    /// The other processes that may share its address space: those of the same sandbox.
    pub peers: &'a [i32],
    /// Number of the descriptor that an earlier
    /// [`UserFault`](crate::userfault::UserFault) left in the process.
    pub kept_userfault: Option<i32>,
}

/// What stands in the way of dropping the memory of `pid`, but for what its mappings tell
/// ([`find_mapping_obstacles`]). Best asked while the process stands still.
///
/// # Errors
/// What reading `/proc` reports, other than that the process is gone.
pub fn find_obstacles(pid: i32, options: &ObstacleOptions<'_>) -> io::Result<Vec<Obstacle>> {
    let status = match fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => status,
        Err(error) if is_gone(&error) => return Ok(vec![Obstacle::Gone { pid }]),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    let field = |name| sys::status_field(&status, name);
    if field("State").is_some_and(|state| state.starts_with(['Z', 'X'])) {
        return Ok(vec![Obstacle::Zombie { pid }]);
    }
    if field("VmSize").is_none() {
        return Ok(vec![Obstacle::KernelThread { pid }]);
    }
    if let Some(tracer) = field("TracerPid").and_then(|field| field.parse().ok())
        && tracer != 0
    {
        found.push(Obstacle::Traced { pid, tracer });
    }
    if let Some(kib) = field("VmPin").and_then(|field| field.split(' ').next()?.parse().ok())
        && kib != 0
    {
        found.push(Obstacle::PinnedMemory { pid, kib });
    }
    if field("x86_Thread_features").is_some_and(|features| features.contains("shstk")) {
        found.push(Obstacle::ShadowStack { pid });
    }
    if is_32_bit(pid) {
        found.push(Obstacle::ThirtyTwoBit { pid });
    }
    match find_descriptors(pid, options, &mut found) {
        Err(error) if is_gone(&error) => return Ok(vec![Obstacle::Gone { pid }]),
        other => other?,
    }
    for &other in options.peers.iter().filter(|&&other| other != pid) {
        match sys::same_address_space(pid, other) {
            Ok(true) => found.push(Obstacle::SharedAddressSpace { pid, other }),
            Ok(false) => {}
            // A peer that exited shares nothing any more.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// What of a process's mappings stands in the way of dropping its other memory.
pub fn find_mapping_obstacles(pid: i32, mappings: &[Mapping]) -> Vec<Obstacle> {
    let mut found = Vec::new();
    if mappings.iter().any(|mapping| mapping.name.starts_with("/[aio]")) {
        found.push(Obstacle::Aio { pid });
    }
    if let Some(mapping) = mappings.iter().find(|mapping| is_direct_device(&mapping.name)) {
        found.push(Obstacle::DeviceAccess { pid, device: mapping.name.clone() });
    }
    found
}

fn find_descriptors(
    pid: i32,
    options: &ObstacleOptions<'_>,
    found: &mut Vec<Obstacle>,
) -> io::Result<()> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Closed since it was listed.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let Some(target) = target.to_str() else { continue };
        let obstacle = match target {
            "anon_inode:[io_uring]" => Obstacle::IoUring { pid, fd },
            "anon_inode:[userfaultfd]" if options.kept_userfault != Some(fd) => {
                Obstacle::OwnUserfault { pid, fd }
            }
            device if is_direct_device(device) => {
                Obstacle::DeviceAccess { pid, device: device.to_owned() }
            }
            _ => continue,
        };
        // One of a kind is enough to say.
        if !found
            .iter()
            .any(|known| std::mem::discriminant(known) == std::mem::discriminant(&obstacle))
        {
            found.push(obstacle);
        }
    }
    Ok(())
}

/// Devices that read and write memory of the processes that use them: RDMA, VFIO, GPUs.
fn is_direct_device(path: &str) -> bool {
    ["/dev/infiniband/", "/dev/vfio/", "/dev/nvidia", "/dev/dri/", "/dev/kfd", "/dev/accel/"]
        .iter()
        .any(|prefix| path.starts_with(prefix))
}

fn is_32_bit(pid: i32) -> bool {
    use std::io::Read;
    const CLASS: usize = 4;
    const CLASS_32: u8 = 1;
    let mut header = [0; CLASS + 1];
    fs::File::open(format!("/proc/{pid}/exe"))
        .and_then(|mut file| file.read_exact(&mut header))
        .is_ok_and(|()| header[CLASS] == CLASS_32)
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}
