//! What is mapped where in a process.
//!
//! `/proc/PID/maps` costs 0.3 ms for 245 mappings; `smaps`, which adds the kernel's flags, walks
//! every page table and costs five times that (1.5 ms for the same process with 34 MB). Whoever
//! drops memory needs the flags: nothing else tells of memory that is wiped in forked children.

use std::fs;
use std::io::{self, Read as _};
use std::ops::Range;

use crate::sys::{PAGE_SIZE, status_field};

/// What backs a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MappingKind {
    /// Private anonymous memory, `mmap`ed or unnamed.
    Anonymous,
    /// The `brk` heap.
    Heap,
    /// The main thread's stack, which grows down.
    Stack,
    /// A private mapping of a file: pages written to are the process's own, the others are
    /// the page cache's.
    FilePrivate {
        /// Device of the file: major and minor number.
        dev: (u32, u32),
        /// Inode of the file.
        inode: u64,
    },
    /// Shared memory or a shared file mapping. Its pages belong to no single process.
    Shared,
    /// Provided by the kernel: `[vdso]`, `[vvar]`, `[vsyscall]`, `[uprobes]`.
    Special,
}

/// Kernel flags of a mapping (`VmFlags` of `/proc/PID/smaps`, see proc(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmFlags {
    /// `lo`: pages are locked into memory.
    pub locked: bool,
    /// `ht`: huge pages of hugetlbfs.
    pub hugetlb: bool,
    /// `io`: memory-mapped I/O.
    pub io: bool,
    /// `pf`: page frames without `struct page`.
    pub pfnmap: bool,
    /// `mm`: may hold page frames without `struct page`.
    pub mixedmap: bool,
    /// `um`: registered with a userfaultfd for missing pages.
    pub userfault_missing: bool,
    /// `uw`: registered with a userfaultfd for write protection.
    pub userfault_wp: bool,
    /// `ui`: registered with a userfaultfd for minor faults.
    pub userfault_minor: bool,
    /// `dp`: the kernel may drop the pages at any time.
    pub droppable: bool,
    /// `dc`: not copied by fork.
    pub dont_copy: bool,
    /// `wf`: a forked child reads zeros.
    pub wipe_on_fork: bool,
    /// `dd`: left out of core dumps.
    pub dont_dump: bool,
    /// `gd`: grows down.
    pub grows_down: bool,
    /// `ss`: a shadow stack.
    pub shadow_stack: bool,
    /// `sl`: sealed by `mseal`; `MADV_DONTNEED` may be refused.
    pub sealed: bool,
    /// `mg`: merged by KSM.
    pub mergeable: bool,
}

impl VmFlags {
    fn parse(text: &str) -> Self {
        let mut flags = Self::default();
        for word in text.split_ascii_whitespace() {
            match word {
                "lo" => flags.locked = true,
                "ht" => flags.hugetlb = true,
                "io" => flags.io = true,
                "pf" => flags.pfnmap = true,
                "mm" => flags.mixedmap = true,
                "um" => flags.userfault_missing = true,
                "uw" => flags.userfault_wp = true,
                "ui" => flags.userfault_minor = true,
                "dp" => flags.droppable = true,
                "dc" => flags.dont_copy = true,
                "wf" => flags.wipe_on_fork = true,
                "dd" => flags.dont_dump = true,
                "gd" => flags.grows_down = true,
                "ss" => flags.shadow_stack = true,
                "sl" => flags.sealed = true,
                "mg" => flags.mergeable = true,
                _ => {}
            }
        }
        flags
    }
}

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Readable by the process.
    pub readable: bool,
    /// Writable by the process.
    pub writable: bool,
    /// Executable by the process.
    pub executable: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// What backs it.
    pub kind: MappingKind,
    /// The name `/proc/PID/maps` shows: a path, `[heap]`, `[anon:NAME]`, or nothing.
    pub name: String,
    /// Kernel flags; all false where [`Mapping::flags_known`] is false.
    pub flags: VmFlags,
    /// Whether [`Mapping::flags`] was read.
    pub flags_known: bool,
}

impl Mapping {
    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Bytes of address space.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it covers no address; the kernel shows no such mapping.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Number of 4 KiB pages of address space.
    pub fn pages(&self) -> u64 {
        self.len() / PAGE_SIZE
    }

    /// Whether `address` lies in it.
    pub fn contains(&self, address: u64) -> bool {
        self.range().contains(&address)
    }

    /// Private anonymous memory: its pages can be dropped and put back by userfaultfd.
    pub fn is_anonymous(&self) -> bool {
        matches!(self.kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack)
    }

    /// A private file mapping: its own pages can be dropped and written back.
    pub fn is_file_private(&self) -> bool {
        matches!(self.kind, MappingKind::FilePrivate { .. })
    }

    /// Why this mapping is left resident, or `None` if its private pages may be dropped.
    pub fn left_resident(&self) -> Option<&'static str> {
        let flags = &self.flags;
        match self.kind {
            MappingKind::Shared => return Some("shared with other processes or a file"),
            MappingKind::Special => return Some("provided by the kernel"),
            _ => {}
        }
        [
            (flags.hugetlb || is_hugetlb_name(&self.name), "hugetlb pages"),
            (flags.io || flags.pfnmap || flags.mixedmap, "device memory"),
            (is_device_name(&self.name), "device memory"),
            (flags.shadow_stack, "shadow stack"),
            (flags.droppable, "memory that the kernel may drop by itself"),
            // The kernel does not tell which of a child's missing pages were wiped.
            (flags.wipe_on_fork, "wiped in forked children"),
            (flags.sealed && !self.writable, "sealed against discarding"),
        ]
        .into_iter()
        .find_map(|(applies, reason)| applies.then_some(reason))
    }
}

/// Names of device files, whose mappings may hold device memory. Private `/dev/zero` mappings
/// are ordinary anonymous memory, `/dev/shm` holds ordinary files.
pub(crate) fn is_device_name(name: &str) -> bool {
    name.starts_with("anon_inode:")
        || (name.starts_with("/dev/")
            && !name.starts_with("/dev/zero")
            && !name.starts_with("/dev/shm/")
            && !name.starts_with("/dev/hugepages/"))
}

fn is_hugetlb_name(name: &str) -> bool {
    name.starts_with("/anon_hugepage") || name.starts_with("/dev/hugepages/")
}

/// Reads the mappings of processes.
pub struct Mappings;

impl Mappings {
    /// The mappings of `pid` by ascending address, with kernel flags if some of its memory is
    /// locked or belongs to a device.
    ///
    /// # Errors
    /// `NotFound` or ESRCH if there is no such process, `PermissionDenied` if it may not be
    /// read. A process without an address space (zombie, kernel thread) has no mappings.
    pub fn read(pid: i32) -> io::Result<Vec<Mapping>> {
        let mappings = parse(&fs::read_to_string(format!("/proc/{pid}/maps"))?)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let locked = status_field(&status, "VmLck").is_some_and(|size| !size.starts_with("0 "));
        if locked || mappings.iter().any(|mapping| is_device_name(&mapping.name)) {
            return Self::read_with_flags(pid, &|| false);
        }
        Ok(mappings)
    }

    /// Like [`Mappings::read`], always with kernel flags. That takes several microseconds a
    /// mapping; `stop` is asked every few of them whether to give up.
    ///
    /// # Errors
    /// As for [`Mappings::read`]; [`stopped`].
    pub fn read_with_flags(pid: i32, stop: &(dyn Fn() -> bool + Sync)) -> io::Result<Vec<Mapping>> {
        let mut file = fs::File::open(format!("/proc/{pid}/smaps"))?;
        let (mut text, mut buffer) = (Vec::with_capacity(SMAPS), [0; 4096]);
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                // The kernel hands out a page of text at a time, whole lines.
                length => text.extend_from_slice(&buffer[..length]),
            }
            if stop() {
                return Err(stopped());
            }
        }
        let text = std::str::from_utf8(&text);
        parse(text.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?)
    }
}

/// The text of a few hundred mappings with their flags, bytes.
const SMAPS: usize = 256 << 10;

/// Somebody had it stop.
#[must_use]
pub fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "stopped")
}

/// Parses `maps` or `smaps`.
fn parse(text: &str) -> io::Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::with_capacity(128);
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(mapping) = mappings.last_mut() {
                mapping.flags = VmFlags::parse(flags);
                mapping.flags_known = true;
            }
        } else if line.as_bytes().first().is_some_and(|byte| !byte.is_ascii_uppercase()) {
            mappings.push(parse_line(line).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("unknown maps line {line:?}"))
            })?);
        }
    }
    Ok(mappings)
}

fn parse_line(line: &str) -> Option<Mapping> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    // The name may contain spaces: five fields, then padding, then the name.
    let mut rest = line;
    let mut field = || {
        let trimmed = rest.trim_start_matches(' ');
        let (word, tail) = trimmed.split_at(trimmed.find(' ').unwrap_or(trimmed.len()));
        rest = tail;
        word
    };
    let (addresses, permissions, _offset, dev, inode) =
        (field(), field(), field(), field(), field());
    let name = rest.trim_start_matches(' ');
    let (start, end) = addresses.split_once('-')?;
    let (major, minor) = dev.split_once(':')?;
    let permission = |index: usize| permissions.as_bytes().get(index).copied();
    let shared = permission(3)? == b's';
    let inode: u64 = inode.parse().ok()?;
    let kind = match name {
        "[heap]" => MappingKind::Heap,
        "[stack]" => MappingKind::Stack,
        _ if shared => MappingKind::Shared,
        _ if name.starts_with("[anon:") || (name.is_empty() && inode == 0) => {
            MappingKind::Anonymous
        }
        _ if name.starts_with('[') && inode == 0 => MappingKind::Special,
        _ => MappingKind::FilePrivate { dev: (hex(major)? as u32, hex(minor)? as u32), inode },
    };
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        readable: permission(0)? == b'r',
        writable: permission(1)? == b'w',
        executable: permission(2)? == b'x',
        shared,
        kind,
        name: name.to_owned(),
        flags: VmFlags::default(),
        flags_known: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_kind() {
        let text = "\
555555554000-555555556000 r--p 00000000 fe:00 1234                       /usr/bin/a b c
555555576000-555555597000 rw-p 00000000 00:00 0                          [heap]
7ffff7d00000-7ffff7d01000 rw-p 00000000 00:00 0 
7ffff7d01000-7ffff7d02000 rw-s 00000000 00:01 99                         /dev/zero (deleted)
7ffff7d02000-7ffff7d03000 ---p 00000000 00:00 0                          [anon:arena]
7ffff7fc1000-7ffff7fc5000 r--p 00000000 00:00 0                          [vvar]
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
        let mappings = parse(text).unwrap();
        let kinds: Vec<_> = mappings.iter().map(|mapping| mapping.kind.clone()).collect();
        assert_eq!(
            kinds,
            [
                MappingKind::FilePrivate { dev: (0xfe, 0), inode: 1234 },
                MappingKind::Heap,
                MappingKind::Anonymous,
                MappingKind::Shared,
                MappingKind::Anonymous,
                MappingKind::Special,
                MappingKind::Stack,
                MappingKind::Special,
            ]
        );
        assert_eq!(mappings[0].name, "/usr/bin/a b c");
        assert_eq!(mappings[0].pages(), 2);
        assert!(!mappings[4].readable && !mappings[4].writable);
    }

    #[test]
    fn reads_flags_of_smaps() {
        let text = "\
7ffff7d00000-7ffff7d01000 rw-p 00000000 00:00 0 
Size:                  4 kB
VmFlags: rd wr mr mw me lo ac um 
";
        let mappings = parse(text).unwrap();
        assert!(mappings[0].flags_known && mappings[0].flags.locked);
        assert!(mappings[0].flags.userfault_missing && !mappings[0].flags.hugetlb);
    }

    #[test]
    fn own_mappings_agree_with_and_without_flags() {
        let pid = std::process::id() as i32;
        let plain = Mappings::read(pid).unwrap();
        let flagged = Mappings::read_with_flags(pid, &|| false).unwrap();
        let code = reads_every_kind as fn() as usize as u64;
        for list in [plain, flagged] {
            let mapping = list.iter().find(|mapping| mapping.contains(code)).unwrap();
            assert!(mapping.executable && mapping.is_file_private());
        }
    }

    #[test]
    fn a_missing_process_is_an_error() {
        assert!(Mappings::read(i32::MAX).is_err());
    }
}
