//! What a sandbox is charged for, as the memory controller tells.

use std::path::Path;

use super::{CgroupError, read};

/// The memory charged to one sandbox, or to all of an instance, at one moment, bytes.
///
/// The kernel counts in batches per processor, so that each figure may be behind by up to
/// 64 pages per processor (`MEMCG_CHARGE_BATCH`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryReading {
    /// Private anonymous memory: heaps, stacks, written pages of private file mappings.
    pub anon: u64,
    /// Shared anonymous memory and files on the sandbox's own `/tmp` and `/dev/shm`.
    pub shmem: u64,
    /// Memory that the kernel holds for the sandbox: tasks, stacks, page tables, sockets.
    pub kernel: u64,
    /// Page cache of files that this sandbox happened to read first.
    pub file: u64,
    /// All that counts against the limit.
    pub total: u64,
    /// The limit; absent if there is none.
    pub limit: Option<u64>,
    /// How many of the sandbox's processes the kernel has killed at the limit so far.
    pub oom_kills: u64,
}

impl MemoryReading {
    /// Reads the version 2 files in `dir`.
    pub(super) fn read_v2(dir: &Path) -> Result<Self, CgroupError> {
        Ok(Self::parse_v2(
            &read(&dir.join("memory.stat"))?,
            &read(&dir.join("memory.current"))?,
            &read(&dir.join("memory.max"))?,
            &read(&dir.join("memory.events"))?,
        ))
    }

    /// Reads the version 1 files in `dir`.
    pub(super) fn read_v1(dir: &Path) -> Result<Self, CgroupError> {
        Ok(Self::parse_v1(
            &read(&dir.join("memory.stat"))?,
            // Kernels that count kernel memory only with the rest have no such file.
            &read(&dir.join("memory.kmem.usage_in_bytes")).unwrap_or_default(),
            &read(&dir.join("memory.usage_in_bytes"))?,
            &read(&dir.join("memory.limit_in_bytes"))?,
            &read(&dir.join("memory.oom_control"))?,
        ))
    }

    fn parse_v2(stat: &str, current: &str, max: &str, events: &str) -> Self {
        // `kernel` came with Linux 5.18; before, its parts have to be added up.
        let kernel = field(stat, "kernel").unwrap_or_else(|| {
            ["kernel_stack", "pagetables", "percpu", "sock", "vmalloc", "slab"]
                .iter()
                .filter_map(|part| field(stat, part))
                .sum()
        });
        let shmem = field(stat, "shmem").unwrap_or(0);
        Self {
            anon: field(stat, "anon").unwrap_or(0),
            shmem,
            kernel,
            file: field(stat, "file").unwrap_or(0).saturating_sub(shmem),
            total: number(current).unwrap_or(0),
            limit: number(max),
            oom_kills: field(events, "oom_kill").unwrap_or(0),
        }
    }

    fn parse_v1(stat: &str, kmem: &str, usage: &str, limit: &str, oom_control: &str) -> Self {
        // "No limit" is written as the largest number of whole pages.
        const NO_LIMIT: u64 = i64::MAX as u64 - 0xffff;
        // Version 2 counts what lies below, too; version 1 has other names for that.
        let with_below =
            |key| field(stat, &format!("total_{key}")).or_else(|| field(stat, key)).unwrap_or(0);
        let shmem = with_below("shmem");
        Self {
            anon: with_below("rss"),
            shmem,
            kernel: number(kmem).unwrap_or(0),
            file: with_below("cache").saturating_sub(shmem),
            total: number(usage).unwrap_or(0),
            limit: number(limit).filter(|l| *l < NO_LIMIT),
            oom_kills: field(oom_control, "oom_kill").unwrap_or(0),
        }
    }
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number after `key` in lines of the form `key number`.
pub(super) fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|l| number(l.strip_prefix(key)?.strip_prefix(' ')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT_V2: &str = "anon 9437184\nfile 5242880\nkernel 1048576\nkernel_stack 65536\n\
        pagetables 131072\nsec_pagetables 0\npercpu 1024\nsock 0\nvmalloc 0\nshmem 2097152\n\
        file_mapped 0\nslab 700000\n";

    #[test]
    fn version_2() {
        let r = MemoryReading::parse_v2(
            STAT_V2,
            "15728640\n",
            "max\n",
            "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
        );
        let want = MemoryReading {
            anon: 9 << 20,
            shmem: 2 << 20,
            kernel: 1 << 20,
            file: 3 << 20,
            total: 15 << 20,
            limit: None,
            oom_kills: 2,
        };
        assert_eq!(r, want);
        assert_eq!(MemoryReading::parse_v2(STAT_V2, "1", "4096\n", "").limit, Some(4096));
    }

    #[test]
    fn version_2_before_the_kernel_total() {
        let old: String = STAT_V2
            .lines()
            .filter(|l| !l.starts_with("kernel 1"))
            .map(|l| format!("{l}\n"))
            .collect();
        let r = MemoryReading::parse_v2(&old, "0", "max", "");
        assert_eq!(r.kernel, 65536 + 131_072 + 1024 + 700_000);
    }

    #[test]
    fn version_1() {
        let r = MemoryReading::parse_v1(
            "cache 9261056\nrss 7528448\nrss_huge 0\nshmem 9068544\ntotal_rss 31727616\n",
            "1234567\n",
            "18000000\n",
            "9223372036854771712\n",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
        );
        let want = MemoryReading {
            anon: 31_727_616,
            shmem: 9_068_544,
            kernel: 1_234_567,
            file: 192_512,
            total: 18_000_000,
            limit: None,
            oom_kills: 5,
        };
        assert_eq!(r, want);
    }
}
