//! The lifecycle of a sandbox and the memory it is charged for.

use serde::{Deserialize, Serialize};

/// The states of a sandbox (paper, section 3). A purged sandbox has no record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SandboxState {
    /// Being made: a cold start is under way.
    Starting,
    /// Serving a request.
    Running,
    /// Idle, all memory present.
    Warm,
    /// On the way from warm to dedup. Nothing has been dropped yet: a request may still take it.
    Deduping,
    /// Idle, frozen, only the unique part of its memory kept.
    Dedup,
    /// On the way back from dedup.
    Restoring,
}

impl std::fmt::Display for SandboxState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Warm => "warm",
            Self::Deduping => "deduping",
            Self::Dedup => "dedup",
            Self::Restoring => "restoring",
        })
    }
}

/// The memory of one sandbox, bytes. Page cache that sandboxes share is not part of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Private pages: anonymous memory, written private file pages, its temporary files.
    pub private: u64,
    /// Kernel memory charged to the sandbox: tasks, stacks, page tables, sockets.
    pub kernel: u64,
    /// What the page store keeps for this sandbox alone: patches, unique pages.
    pub store: u64,
    /// Tables that say where each dropped page comes from.
    pub metadata: u64,
}

impl MemoryUse {
    /// Everything together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.private + self.kernel + self.store + self.metadata
    }
}
