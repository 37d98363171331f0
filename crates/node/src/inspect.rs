//! A look at a sandbox's memory while it stands still, for measuring tools.

use medes_core::SandboxId;
use medes_memory::session::Freezer;

use crate::dedup::{Group, bring_all_back};
use crate::local::Node;

/// Why a sandbox could not be looked at.
#[derive(Clone, Debug, thiserror::Error)]
pub enum InspectError {
    /// There is no such sandbox.
    #[error("the sandbox {0} is gone")]
    Gone(SandboxId),
    /// It is in the dedup state, or its memory can't be brought back.
    #[error("the sandbox {sandbox} does not have its memory: {reason}")]
    Absent {
        /// The sandbox.
        sandbox: SandboxId,
        /// Why not.
        reason: String,
    },
    /// Its processes can't be stopped, listed, or let run again.
    #[error("freezing the sandbox {sandbox}: {error}")]
    Freeze {
        /// The sandbox.
        sandbox: SandboxId,
        /// What the kernel said.
        error: String,
    },
}

impl Node {
    /// Freezes an idle, warm sandbox, has `look` look at its processes, and lets it run again.
    /// Blocks the calling thread meanwhile; requests and dedup operations must stay away from the
    /// sandbox, which is the caller's to see to.
    ///
    /// # Errors
    /// [`InspectError`]; `look` may have been called if letting it run again failed.
    pub fn inspect<R>(
        &self,
        sandbox: SandboxId,
        look: impl FnOnce(&[i32]) -> R,
    ) -> Result<R, InspectError> {
        let entry = self.shared.table.get(sandbox).ok_or(InspectError::Gone(sandbox))?;
        bring_all_back(&self.shared, &entry)
            .map_err(|e| InspectError::Absent { sandbox, reason: e.to_string() })?;
        let broken = |e: std::io::Error| InspectError::Freeze { sandbox, error: e.to_string() };
        let mut group = Group(&entry.cgroup);
        let found = group.freeze().and_then(|()| group.processes()).map(|pids| look(&pids));
        group.thaw().map_err(broken)?;
        found.map_err(broken)
    }
}
