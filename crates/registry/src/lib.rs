//! The fingerprint registry: which base pages hold a chunk.
//!
//! Base snapshots enter the fingerprints of their pages; a page that wants deduplication asks, with
//! its own fingerprint, for the base page that has the most chunks in common with it.
//!
//! Chunk hashes are truncated, so an answer may name a page that is less alike than it seems, or
//! not at all. That costs only time: whoever uses a candidate reads it and encodes against it,
//! which shows what it is worth.
#![forbid(unsafe_code)]

mod local;
mod snapshots;
mod table;

use medes_core::{DomainId, FunctionId, NodeId, PageRef, SnapshotId};
use medes_pages::Fingerprint;

pub use local::{LocalRegistry, RegistryConfig};

/// Where a lookup comes from: of base pages with the same overlap, one on the same node is
/// preferred (it costs no network to restore from), then one of the same function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Near {
    /// The node that will keep the patch.
    pub node: NodeId,
    /// The function that the page belongs to.
    pub function: FunctionId,
}

/// Which functions' base pages a lookup may return.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Scope {
    /// Those of all functions in the domain.
    #[default]
    Any,
    /// Only those of the function that asks.
    SameFunction,
    /// Only those of other functions than the one that asks: for measuring what functions have in
    /// common.
    OtherFunctions,
}

/// A base page for a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Candidate {
    /// The base page.
    pub base: PageRef,
    /// The number of chunks that both fingerprints have, at least 1.
    pub overlap: u8,
}

/// What a registry holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RegistryStats {
    /// Pairs of a chunk and a base page that has it.
    pub entries: u64,
    /// Memory for them, in bytes, with all that belongs to the registry.
    pub bytes: u64,
    /// Base snapshots.
    pub snapshots: u64,
}

/// Why the registry refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegistryError {
    /// There is no room for the entries.
    #[error(
        "the fingerprint registry is full: {wanted} more entries would exceed its limit of \
         {max_entries}; remove base snapshots or raise the limit"
    )]
    Full {
        /// The entries that were to be inserted, at most.
        wanted: u64,
        /// The limit, see [`RegistryConfig::max_entries`].
        max_entries: u64,
    },
    /// The domain has as many base snapshots as can be numbered.
    #[error("dedup domain {} already has {limit} base snapshots; remove some", domain.0)]
    TooManySnapshots {
        /// The domain.
        domain: DomainId,
        /// The largest number of snapshots in a domain.
        limit: usize,
    },
    /// The snapshot is registered for another domain or function.
    #[error(
        "base snapshot {snapshot} is registered in dedup domain {} for function {}, and can't be \
         in another",
        domain.0, function.0
    )]
    Conflict {
        /// The snapshot.
        snapshot: SnapshotId,
        /// The domain that it is registered in.
        domain: DomainId,
        /// The function that it is registered for.
        function: FunctionId,
    },
    /// The snapshot was removed while its pages were being inserted. None of them is left.
    #[error("base snapshot {snapshot} was removed while its pages were being inserted")]
    Removed {
        /// The snapshot.
        snapshot: SnapshotId,
    },
}

/// A fingerprint registry. All operations take batches, such as all pages of a sandbox, because a
/// network may lie between the caller and the registry.
///
/// Dedup domains never see each other's entries.
pub trait Registry: Send + Sync {
    /// Appends to `out`, for each fingerprint in order, the base page with the largest overlap
    /// within `scope`, or `None` if no base page has any of its chunks. Ties go to the node of
    /// `near`, then to its function, then to the smallest [`PageRef`].
    ///
    /// # Errors
    /// If the registry can't be asked; `out` may then have some of the answers.
    fn lookup_within(
        &self,
        domain: DomainId,
        near: Near,
        scope: Scope,
        fingerprints: &[Fingerprint],
        out: &mut Vec<Option<Candidate>>,
    ) -> Result<(), RegistryError>;

    /// [`lookup_within`](Self::lookup_within) with the base pages of all functions.
    ///
    /// # Errors
    /// As there.
    fn lookup(
        &self,
        domain: DomainId,
        near: Near,
        fingerprints: &[Fingerprint],
        out: &mut Vec<Option<Candidate>>,
    ) -> Result<(), RegistryError> {
        self.lookup_within(domain, near, Scope::Any, fingerprints, out)
    }

    /// Makes pages of a base snapshot known, by their index in the snapshot. May be called several
    /// times for one snapshot; what is known already stays as it is. Lookups see the pages one by
    /// one, not all at the same moment.
    ///
    /// # Errors
    /// If there is no room, or the snapshot belongs elsewhere: then none of `pages` has been
    /// inserted.
    fn insert(
        &self,
        domain: DomainId,
        function: FunctionId,
        snapshot: SnapshotId,
        pages: &[(u32, Fingerprint)],
    ) -> Result<(), RegistryError>;

    /// Forgets a base snapshot. No lookup that begins after this returned gives one of its pages.
    /// A snapshot that is not known is no error.
    ///
    /// # Errors
    /// If the registry can't be asked.
    fn remove(&self, snapshot: SnapshotId) -> Result<(), RegistryError>;

    /// What the registry holds, of all domains.
    fn stats(&self) -> RegistryStats;
}
