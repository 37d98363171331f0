//! The registry within one process.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use medes_core::{DomainId, FunctionId, PageRef, SnapshotId};
use medes_pages::{ChunkHash, Fingerprint};
use parking_lot::{RwLock, RwLockReadGuard};

use crate::snapshots::{MAX_SLOTS, Slot, Snapshots};
use crate::table::{Location, Table};
use crate::{Candidate, Near, Registry, RegistryError, RegistryStats, Scope};

/// Pages that are looked up or inserted before others get a turn.
const TURN: usize = 256;

/// Settings of a [`LocalRegistry`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegistryConfig {
    /// Parts of each domain's table that can be written at the same time, and that grow one at a
    /// time: 1 to 65,536. A part of 1.5 million entries takes about 15 ms to grow.
    pub shards: usize,
    /// Base pages that are kept for one chunk, at least 1. At most half of them, rounded up, are
    /// of one snapshot, so that a chunk survives the removal of one and finds local pages. Others
    /// are not entered.
    pub candidates_per_chunk: usize,
    /// The most entries in all domains together.
    pub max_entries: u64,
}

impl Default for RegistryConfig {
    /// 64 shards, 8 candidates per chunk and 100 million entries (about 1.5 GB).
    fn default() -> Self {
        Self { shards: 64, candidates_per_chunk: 8, max_entries: 100_000_000 }
    }
}

/// A fingerprint registry in the memory of this process.
///
/// Each domain has a table of its own, rather than its identity in the key of a shared one. So
/// what one domain enters moves no entry, lengthens no probe and grows no table of another's: no
/// lookup's duration tells of another domain's content. (Domains share the limit of entries.)
#[derive(Debug)]
pub struct LocalRegistry {
    config: RegistryConfig,
    directory: RwLock<Directory>,
    /// Entries of snapshots that have not been removed, and room reserved by inserts under way.
    entries: AtomicU64,
}

#[derive(Debug, Default)]
struct Directory {
    domains: HashMap<DomainId, Arc<Domain>>,
    /// The domain and function of each snapshot.
    owners: HashMap<SnapshotId, (DomainId, FunctionId)>,
}

/// Locks are taken in the order of the fields. At most one shard is locked for writing by a thread
/// at a time.
#[derive(Debug)]
struct Domain {
    snapshots: RwLock<Snapshots>,
    shards: Box<[RwLock<Table>]>,
}

impl Domain {
    fn new(shards: usize) -> Self {
        Self {
            snapshots: RwLock::default(),
            shards: std::iter::repeat_with(RwLock::default).take(shards).collect(),
        }
    }

    fn shard(&self, chunk: ChunkHash) -> usize {
        // The highest bits of a fingerprint's chunks are hardly random (see `ChunkHash`), the
        // lowest are the tag.
        ((chunk.0 >> 32 & 0xffff) as usize * self.shards.len()) >> 16
    }
}

fn tag(chunk: ChunkHash) -> u32 {
    chunk.0 as u32
}

impl LocalRegistry {
    /// An empty registry. Settings outside what [`RegistryConfig`] allows are moved inside.
    #[must_use]
    pub fn new(config: RegistryConfig) -> Self {
        let config = RegistryConfig {
            shards: config.shards.clamp(1, 1 << 16),
            candidates_per_chunk: config.candidates_per_chunk.max(1),
            ..config
        };
        Self { config, directory: RwLock::default(), entries: AtomicU64::new(0) }
    }

    fn domain(&self, domain: DomainId) -> Option<Arc<Domain>> {
        self.directory.read().domains.get(&domain).cloned()
    }

    /// Counts entries that may be inserted, if there is room for them.
    fn reserve(&self, wanted: u64) -> Result<(), RegistryError> {
        let max_entries = self.config.max_entries;
        self.entries
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |entries| {
                entries.checked_add(wanted).filter(|entries| *entries <= max_entries)
            })
            .map(|_| ())
            .map_err(|_| RegistryError::Full { wanted, max_entries })
    }

    fn release(&self, entries: u64) {
        self.entries.fetch_sub(entries, Ordering::Relaxed);
    }

    /// Makes the snapshot known, if it is not, and gives its domain.
    fn register(
        &self,
        domain: DomainId,
        function: FunctionId,
        snapshot: SnapshotId,
    ) -> Result<Arc<Domain>, RegistryError> {
        let mut directory = self.directory.write();
        let Directory { domains, owners } = &mut *directory;
        if let Some((owner, of)) = owners.get(&snapshot)
            && (*owner, *of) != (domain, function)
        {
            return Err(RegistryError::Conflict { snapshot, domain: *owner, function: *of });
        }
        let tables =
            domains.entry(domain).or_insert_with(|| Arc::new(Domain::new(self.config.shards)));
        if let Entry::Vacant(vacant) = owners.entry(snapshot) {
            if tables.snapshots.write().register(snapshot, function).is_none() {
                return Err(RegistryError::TooManySnapshots { domain, limit: MAX_SLOTS });
            }
            vacant.insert((domain, function));
        }
        Ok(Arc::clone(tables))
    }

    /// Inserts pages of one turn, and tells how many entries that made.
    fn insert_turn(
        &self,
        domain: &Domain,
        snapshot: SnapshotId,
        pages: &[(u32, Fingerprint)],
    ) -> Result<u64, RegistryError> {
        let snapshots = domain.snapshots.read();
        let slot = snapshots.slot(snapshot).ok_or(RegistryError::Removed { snapshot })?;
        let limit = self.config.candidates_per_chunk;
        let mut added = 0;
        for (page, fingerprint) in pages {
            for chunk in fingerprint.chunks() {
                let mut table = domain.shards[domain.shard(*chunk)].write();
                let location = Location::new(slot, *page);
                added += u64::from(table.insert(tag(*chunk), location, limit, &snapshots));
            }
        }
        Ok(added)
    }
}

impl Registry for LocalRegistry {
    fn lookup_within(
        &self,
        domain: DomainId,
        near: Near,
        scope: Scope,
        fingerprints: &[Fingerprint],
        out: &mut Vec<Option<Candidate>>,
    ) -> Result<(), RegistryError> {
        let Some(domain) = self.domain(domain) else {
            out.resize(out.len() + fingerprints.len(), None);
            return Ok(());
        };
        out.reserve(fingerprints.len());
        let mut locations = Vec::new();
        for turn in fingerprints.chunks(TURN) {
            let snapshots = domain.snapshots.read();
            let choice = Choice { near, scope, snapshots: &snapshots };
            let shards = OpenShards::new(&domain, turn);
            // The time goes into waiting for memory: ask for it one page ahead.
            let mut ahead = turn.iter();
            ahead.next().inspect(|first| shards.touch(first));
            for fingerprint in turn {
                ahead.next().inspect(|next| shards.touch(next));
                locations.clear();
                shards.find(fingerprint, &mut locations);
                out.push(choice.best(&mut locations));
            }
        }
        Ok(())
    }

    fn insert(
        &self,
        domain: DomainId,
        function: FunctionId,
        snapshot: SnapshotId,
        pages: &[(u32, Fingerprint)],
    ) -> Result<(), RegistryError> {
        let wanted = pages.iter().map(|(_, fingerprint)| fingerprint.chunks().len() as u64).sum();
        self.reserve(wanted)?;
        let mut reserved = wanted;
        let result = self.register(domain, function, snapshot).and_then(|tables| {
            for turn in pages.chunks(TURN) {
                reserved -= self.insert_turn(&tables, snapshot, turn)?;
            }
            Ok(())
        });
        self.release(reserved);
        result
    }

    fn remove(&self, snapshot: SnapshotId) -> Result<(), RegistryError> {
        let domain = {
            let mut directory = self.directory.write();
            let Some((domain, _)) = directory.owners.remove(&snapshot) else { return Ok(()) };
            let Some(tables) = directory.domains.get(&domain).cloned() else { return Ok(()) };
            let mut snapshots = tables.snapshots.write();
            if let Some(slot) = snapshots.remove(snapshot) {
                let dead: usize = tables.shards.iter().map(|shard| shard.write().bury(slot)).sum();
                self.release(dead as u64);
            }
            if snapshots.len() == 0 {
                directory.domains.remove(&domain);
                return Ok(());
            }
            drop(snapshots);
            tables
        };
        for shard in &domain.shards {
            let snapshots = domain.snapshots.read();
            let mut table = shard.write();
            if table.is_wasteful() {
                table.rebuild(0, &snapshots);
            }
        }
        Ok(())
    }

    fn stats(&self) -> RegistryStats {
        let directory = self.directory.read();
        let mut stats = RegistryStats::default();
        let per_owner = size_of::<(SnapshotId, (DomainId, FunctionId))>();
        let mut bytes = size_of::<Self>() + directory.owners.capacity() * per_owner;
        for domain in directory.domains.values() {
            let snapshots = domain.snapshots.read();
            stats.snapshots += snapshots.len() as u64;
            bytes += size_of::<Domain>() + snapshots.bytes();
            for shard in &domain.shards {
                let table = shard.read();
                stats.entries += table.live() as u64;
                bytes += size_of::<RwLock<Table>>() - size_of::<Table>() + table.bytes();
            }
        }
        stats.bytes = bytes as u64;
        stats
    }
}

/// The shards that the chunks of some fingerprints lie in, locked for reading.
struct OpenShards<'a> {
    domain: &'a Domain,
    open: Vec<Option<RwLockReadGuard<'a, Table>>>,
}

impl<'a> OpenShards<'a> {
    fn new(domain: &'a Domain, fingerprints: &[Fingerprint]) -> Self {
        let mut used = vec![false; domain.shards.len()];
        for chunk in fingerprints.iter().flat_map(Fingerprint::chunks) {
            used[domain.shard(*chunk)] = true;
        }
        // In ascending order, so that lookups and the writers between them can't wait in a circle.
        let open = used.iter().zip(&domain.shards).map(|(used, shard)| used.then(|| shard.read()));
        Self { domain, open: open.collect() }
    }

    fn table(&self, chunk: ChunkHash) -> Option<&Table> {
        self.open[self.domain.shard(chunk)].as_deref()
    }

    /// Brings what [`find`](Self::find) reads first into the cache.
    fn touch(&self, fingerprint: &Fingerprint) {
        for chunk in fingerprint.chunks() {
            std::hint::black_box(self.table(*chunk).map(|table| table.touch(tag(*chunk))));
        }
    }

    /// Appends, for each chunk, the pages that have it.
    fn find(&self, fingerprint: &Fingerprint, out: &mut Vec<Location>) {
        for chunk in fingerprint.chunks() {
            if let Some(table) = self.table(*chunk) {
                table.find(tag(*chunk), out);
            }
        }
    }
}

/// The choice of a base page.
struct Choice<'a> {
    near: Near,
    scope: Scope,
    snapshots: &'a Snapshots,
}

impl Choice<'_> {
    /// The best of the pages, each of which is named once for each chunk it has.
    fn best(&self, locations: &mut [Location]) -> Option<Candidate> {
        locations.sort_unstable();
        let mut best: Option<(usize, Location)> = None;
        for same in locations.chunk_by(|a, b| a == b) {
            let (overlap, location) = (same.len(), same[0]);
            let least = best.map_or(1, |(overlap, _)| overlap);
            if overlap < least || !self.allows(location.slot()) {
                continue;
            }
            let better = best.is_none_or(|(overlap_of_best, best)| {
                overlap > overlap_of_best || self.rank(location) > self.rank(best)
            });
            if better {
                best = Some((overlap, location));
            }
        }
        let (overlap, location) = best?;
        Some(Candidate {
            base: self.page(location),
            overlap: u8::try_from(overlap).unwrap_or(u8::MAX),
        })
    }

    fn allows(&self, slot: Slot) -> bool {
        self.snapshots.is_live(slot)
            && match self.scope {
                Scope::Any => true,
                Scope::SameFunction => self.snapshots.function(slot) == self.near.function,
                Scope::OtherFunctions => self.snapshots.function(slot) != self.near.function,
            }
    }

    /// Which of two pages with the same overlap is preferred: the greater.
    fn rank(&self, location: Location) -> (bool, bool, Reverse<PageRef>) {
        let page = self.page(location);
        (
            page.snapshot.node == self.near.node,
            self.snapshots.function(location.slot()) == self.near.function,
            Reverse(page),
        )
    }

    fn page(&self, location: Location) -> PageRef {
        PageRef { snapshot: self.snapshots.snapshot(location.slot()), page: location.page() }
    }
}
