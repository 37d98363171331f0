//! The host's memory, as the kernel tells it.

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde::Serialize;

/// `/proc/meminfo`, as far as sandboxes show in it. Bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct HostMemory {
    /// What the kernel believes it could give to a new program without swapping.
    #[serde(skip)]
    pub available: i64,
    /// Page tables.
    pub page_tables: i64,
    /// Kernel stacks of threads.
    pub kernel_stacks: i64,
    /// The kernel's own objects that it can't give back.
    pub slab: i64,
    /// Memory that each processor has its own of, for cgroups among others.
    pub percpu: i64,
    /// Anonymous memory of all processes.
    pub anonymous: i64,
    /// Shared memory: the page store is there.
    pub shared: i64,
}

impl HostMemory {
    /// Now.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn now() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let number = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<i64>().ok());
            number.map_or(0, |kib| kib * 1024)
        };
        Ok(Self {
            available: field("MemAvailable"),
            page_tables: field("PageTables"),
            kernel_stacks: field("KernelStack"),
            slab: field("SUnreclaim"),
            percpu: field("Percpu"),
            anonymous: field("AnonPages"),
            shared: field("Shmem"),
        })
    }

    /// What came on top since `before`; `available` is what is used more.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            available: before.available - self.available,
            page_tables: self.page_tables - before.page_tables,
            kernel_stacks: self.kernel_stacks - before.kernel_stacks,
            slab: self.slab - before.slab,
            percpu: self.percpu - before.percpu,
            anonymous: self.anonymous - before.anonymous,
            shared: self.shared - before.shared,
        }
    }
}

/// Anonymous memory of a process that is in memory, bytes.
///
/// # Errors
/// If there is no such process.
pub fn private_memory(process: Pid) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let text = std::fs::read_to_string(&path).context(path)?;
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")?.trim().strip_suffix("kB"));
    Ok(line.and_then(|l| l.trim().parse::<u64>().ok()).unwrap_or(0) * 1024)
}
