//! Base pages to deduplicate against, chosen by the measurement: a page store and a fingerprint
//! registry of their own, outside any node.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use medes_agent::dedup::{Cancel, Estimate, Operation, Options, Subject};
use medes_agent::encode::{Bases, PageEncoder, PageSource};
use medes_core::{DomainId, FunctionId, NodeId, PageRef};
use medes_pages::{Fingerprint, FingerprintConfig, Fingerprinter, Page, encoding, is_zero};
use medes_registry::{LocalRegistry, Near, Registry, RegistryConfig, Scope};
use medes_store::{Snapshot, Store};
use serde::Serialize;

use crate::dump::Dump;

/// All of a bank's pages are of one domain.
const DOMAIN: DomainId = DomainId(0);
const NODE: NodeId = NodeId(0);

/// Room for base pages; memory is taken only as it fills.
const CAPACITY: u64 = 8 << 30;

/// Pages encoded at a time, as the dedup operation does.
pub const BATCH: usize = 256;

/// Base snapshots, and a registry of their pages.
pub struct Bank {
    store: Store,
    registry: LocalRegistry,
    fingerprints: FingerprintConfig,
    snapshots: Vec<Arc<Snapshot>>,
}

/// A batch of pages, encoded.
#[derive(Clone, Debug, Default)]
pub struct EncodedBatch {
    /// One per page.
    pub sources: Vec<PageSource>,
    /// The patches, in order.
    pub patches: Vec<u8>,
}

/// What became of pages in one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// How many.
    pub pages: u64,
    /// Bytes of their patches.
    pub patch_bytes: u64,
}

/// What became of a sandbox's pages, by encoding and by what the memory is for.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Breakdown {
    /// By encoding, the largest first.
    pub encodings: BTreeMap<String, Tally>,
    /// By kind of memory.
    pub kinds: BTreeMap<String, Tally>,
}

impl Bank {
    /// An empty bank.
    ///
    /// # Errors
    /// If there is no memory file to be had.
    pub fn new(fingerprints: FingerprintConfig) -> Result<Self> {
        let store = Store::create(NODE, CAPACITY).context("making a page store")?;
        let registry = LocalRegistry::new(RegistryConfig::default());
        Ok(Self { store, registry, fingerprints, snapshots: Vec::new() })
    }

    /// A bank with one base snapshot of each of these functions.
    ///
    /// # Errors
    /// As [`Bank::new`] and [`Bank::add`].
    pub fn with<'d>(
        fingerprints: FingerprintConfig,
        bases: impl IntoIterator<Item = (FunctionId, &'d Dump)>,
    ) -> Result<Self> {
        let mut bank = Self::new(fingerprints)?;
        for (function, dump) in bases {
            bank.add(function, dump)?;
        }
        Ok(bank)
    }

    /// Makes the pages of a dump a base snapshot of `function`.
    ///
    /// # Errors
    /// If there is no room.
    pub fn add(&mut self, function: FunctionId, dump: &Dump) -> Result<()> {
        let fingerprinter = Fingerprinter::new(self.fingerprints);
        let mut builder = self.store.begin_snapshot(DOMAIN, function);
        let mut fingerprints: Vec<(u32, Fingerprint)> = Vec::new();
        for ((address, _), page) in dump.places().zip(dump.pages()) {
            if !is_zero(page) {
                let index = builder.push(address, page)?;
                fingerprints.push((index, fingerprinter.fingerprint(page)));
            }
        }
        let snapshot = builder.finish()?;
        self.registry.insert(DOMAIN, function, snapshot.id(), &fingerprints)?;
        self.snapshots.push(snapshot);
        Ok(())
    }

    /// What a dedup operation on the processes of a sandbox of `function` would come to. They
    /// should be frozen.
    ///
    /// # Errors
    /// What the operation says.
    pub fn estimate(&self, pids: &[i32], function: FunctionId, scope: Scope) -> Result<Estimate> {
        let near = Near { node: NODE, function };
        let subject = Subject { domain: DOMAIN, function, near, scope };
        let options = Options { fingerprints: self.fingerprints, workers: 1, new_base: false };
        let never = Cancel::default();
        let Self { store, registry, .. } = self;
        let operation =
            Operation { store, registry, subject, options, residents: &[], cancel: &never };
        Ok(operation.estimate(pids)?)
    }

    /// An encoder for pages of a sandbox of `function`; `own` are the base snapshots to be tried
    /// at the same address ([`Bank::own`], or none).
    #[must_use]
    pub fn encoder<'b>(
        &'b self,
        function: FunctionId,
        scope: Scope,
        own: &'b [Arc<Snapshot>],
    ) -> PageEncoder<'b> {
        let bases = Bases {
            store: &self.store,
            registry: &self.registry,
            domain: DOMAIN,
            near: Near { node: NODE, function },
            scope,
            own,
        };
        PageEncoder::new(bases, Fingerprinter::new(self.fingerprints))
    }

    /// The base snapshots of `function`, as a sandbox of it would try them.
    #[must_use]
    pub fn own(&self, function: FunctionId, scope: Scope) -> Vec<Arc<Snapshot>> {
        match scope {
            Scope::OtherFunctions => Vec::new(),
            Scope::Any | Scope::SameFunction => self.store.snapshots_of(DOMAIN, function),
        }
    }

    /// Encodes all pages of a dump.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn encode(
        &self,
        dump: &Dump,
        function: FunctionId,
        scope: Scope,
    ) -> Result<Vec<EncodedBatch>> {
        let own = self.own(function, scope);
        let mut encoder = self.encoder(function, scope, &own);
        let addresses: Vec<u64> = dump.places().map(|(address, _)| address).collect();
        let batches = addresses.chunks(BATCH).zip(dump.pages().chunks(BATCH));
        batches
            .map(|(addresses, pages)| {
                let mut batch = EncodedBatch::default();
                encoder.encode(addresses, pages, &[], &mut batch.sources, &mut batch.patches)?;
                Ok(batch)
            })
            .collect()
    }

    /// Encodes all pages of a dump and counts what becomes of them.
    ///
    /// # Errors
    /// What the encoder says.
    pub fn break_down(&self, dump: &Dump, function: FunctionId, scope: Scope) -> Result<Breakdown> {
        let mut breakdown = Breakdown::default();
        let mut places = dump.places();
        for batch in self.encode(dump, function, scope)? {
            let mut patches = batch.patches.as_slice();
            for source in batch.sources {
                let (name, bytes) = match source {
                    PageSource::Zero => ("Zero".to_owned(), 0),
                    PageSource::Base(_) => ("Equal".to_owned(), 0),
                    PageSource::Patch { length, .. } => {
                        let (patch, rest) = patches.split_at(usize::from(length));
                        patches = rest;
                        (format!("{:?}", encoding(patch)?), u64::from(length))
                    }
                };
                let kind = places.next().map_or(String::new(), |(_, kind)| format!("{kind:?}"));
                let encodings = breakdown.encodings.entry(name).or_default();
                for tally in [encodings, breakdown.kinds.entry(kind).or_default()] {
                    tally.pages += 1;
                    tally.patch_bytes += bytes;
                }
            }
        }
        Ok(breakdown)
    }

    /// A base page.
    #[must_use]
    pub fn page(&self, at: PageRef) -> Option<&Page> {
        let snapshot = self.snapshots.iter().find(|s| s.id() == at.snapshot)?;
        self.store.page(snapshot, at.page)
    }

    /// The registry.
    #[must_use]
    pub fn registry(&self) -> &LocalRegistry {
        &self.registry
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_pages::PAGE_SIZE;

    fn page(seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        for (word, n) in page.chunks_exact_mut(8).zip(seed * 1000..) {
            word.copy_from_slice(&crate::registry::mix(n).to_le_bytes());
        }
        page
    }

    #[test]
    fn bases_are_those_of_the_scope() {
        let of = |seeds: std::ops::Range<u64>| {
            Dump::from_regions([(0x10_0000, seeds.map(page).collect::<Vec<_>>())])
        };
        let (own, other) = (FunctionId(1), FunctionId(2));
        let (first, second) = (of(0..40), of(20..60));
        let bank = Bank::with(FingerprintConfig::default(), [(own, &first), (other, &second)])
            .expect("a bank");
        let equal = |dump: &Dump, scope| {
            let breakdown = bank.break_down(dump, own, scope).expect("encodes");
            breakdown.encodings.get("Equal").copied().unwrap_or_default().pages
        };
        assert_eq!(equal(&first, Scope::SameFunction), 40);
        assert_eq!(equal(&first, Scope::Any), 40);
        assert_eq!(equal(&second, Scope::Any), 40);
        assert_eq!(equal(&of(50..70), Scope::OtherFunctions), 10);
        assert_eq!(equal(&of(50..70), Scope::SameFunction), 0);
    }
}
