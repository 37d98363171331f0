//! Finding a source for each page of a plan.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use medes_core::{PageRef, SnapshotId};
use medes_pages::{Decoder, Fingerprint, Fingerprinter, PAGE_SIZE, Page};
use medes_registry::Scope;
use medes_store::Snapshot;
use parking_lot::Mutex;

use super::batch::{BATCH, Batch, Known, hash, page_buffer};
use super::{Counts, DedupError, Hindrance, Operation, Subject};
use crate::encode::{Bases, Before, EncodeError, PageEncoder, PageSource};
use crate::index::ImageIndex;

/// An image may take at most three quarters of the pages that it stands for.
const WORTH: (u64, u64) = (3, 4);

/// Pages that are counted between two looks at whether a request wants the sandbox.
const COUNTED: usize = 1024;

/// Where the pages of a plan come from, in the plan's order.
#[derive(Default)]
pub(super) struct Encoded {
    pub(super) sources: Vec<PageSource>,
    pub(super) patches: Vec<u8>,
    /// Pages that are as an earlier image has them, although they were written to.
    pub(super) unchanged: u64,
    /// For each batch, in order, a hash of its content, if it is one that is hashed.
    pub(super) hashes: Vec<Option<u64>>,
    /// Every snapshot that a source refers to; held so that none can go.
    pub(super) held: HashMap<SnapshotId, Arc<Snapshot>>,
}

#[derive(Default)]
struct Part {
    sources: Vec<PageSource>,
    patches: Vec<u8>,
    unchanged: u64,
    hash: Option<u64>,
}

/// What an earlier image has of each page of a batch, and whether that is what it still is. A page
/// that was written to often is: a reference count went up and down again.
fn before<'a>(
    batch: &Batch,
    pages: &[Page],
    old: &'a ImageIndex,
    decoder: &mut Decoder,
) -> Vec<Option<Before<'a>>> {
    let mut all = vec![None; pages.len()];
    for Known { pages: which, origin } in &batch.known {
        let first = which.start;
        let of_batch = &pages[which.clone()];
        old.for_each_known(batch.process, *origin, of_batch, decoder, |n, source, patch, same| {
            all[first + n] = Some(Before { source, patch, same });
        });
    }
    all
}

impl Part {
    /// Encodes the pages of a batch but those that are the same as `before`, if that is not empty.
    fn encode(
        &mut self,
        encoder: &mut PageEncoder<'_>,
        places: &[u64],
        pages: &[Page],
        before: &[Option<Before<'_>>],
    ) -> Result<(), DedupError> {
        let is_same = |before: &Option<Before<'_>>| before.is_some_and(|before| before.same);
        let mut at = 0;
        while at < pages.len() {
            if let Some(Some(Before { source, patch, same: true })) = before.get(at) {
                self.sources.push(*source);
                self.patches.extend_from_slice(patch);
                self.unchanged += 1;
                at += 1;
                continue;
            }
            let rest = before.iter().skip(at).position(is_same);
            let end = rest.map_or(pages.len(), |n| at + n);
            let (places, pages) = (&places[at..end], &pages[at..end]);
            let before = before.get(at..end).unwrap_or_default();
            let encoded =
                encoder.encode(places, pages, before, &mut self.sources, &mut self.patches);
            encoded.map_err(|error| match error {
                EncodeError::Stopped => DedupError::Cancelled,
                error => Hindrance::Encode(error).into(),
            })?;
            at = end;
        }
        Ok(())
    }
}

impl Operation<'_> {
    /// Encodes all batches. `reused` bytes of the sandbox's pages are in none of them, because an
    /// `old` image has them.
    pub(super) fn encode(
        &self,
        batches: &[Batch],
        reused: u64,
        old: Option<&ImageIndex>,
    ) -> Result<Encoded, DedupError> {
        if self.options.new_base {
            self.encode_as_base(batches)
        } else {
            self.encode_against_bases(batches, reused, old)
        }
    }

    /// Makes the sandbox's pages a base snapshot, to which all of them are then equal.
    fn encode_as_base(&self, batches: &[Batch]) -> Result<Encoded, DedupError> {
        let fingerprinter = Fingerprinter::new(self.options.fingerprints);
        let mut builder = self.store.begin_snapshot(self.subject.domain, self.subject.function);
        let id = builder.id();
        let mut encoded = Encoded::default();
        let mut fingerprints: Vec<(u32, Fingerprint)> = Vec::new();
        let mut buffer = page_buffer();
        for batch in batches {
            self.check_cancelled()?;
            let pages = batch.read(&mut buffer)?;
            encoded.hashes.push(batch.hashed.then(|| hash(pages)));
            for (address, page) in batch.addresses().zip(pages) {
                if medes_pages::is_zero(page) {
                    encoded.sources.push(PageSource::Zero);
                    continue;
                }
                let index = builder.push(address, page).map_err(Hindrance::Store)?;
                fingerprints.push((index, fingerprinter.fingerprint(page)));
                encoded.sources.push(PageSource::Base(PageRef { snapshot: id, page: index }));
            }
        }
        let snapshot = builder.finish().map_err(Hindrance::Store)?;
        let Subject { domain, function, .. } = self.subject;
        if let Err(error) = self.registry.insert(domain, function, id, &fingerprints) {
            // Still a base for its own function, found by address, if not for others.
            tracing::warn!(%error, snapshot = %id, "the registry took no fingerprints");
        }
        encoded.held.insert(id, snapshot);
        Ok(encoded)
    }

    /// Encodes all batches against the bases there are, on as many threads as allowed.
    fn encode_against_bases(
        &self,
        batches: &[Batch],
        reused: u64,
        old: Option<&ImageIndex>,
    ) -> Result<Encoded, DedupError> {
        let Subject { domain, function, near, scope } = self.subject;
        let mut own = match scope {
            Scope::Any | Scope::SameFunction => self.store.snapshots_of(domain, function),
            Scope::OtherFunctions => Vec::new(),
        };
        own.reverse();
        let bases =
            Bases { store: self.store, registry: self.registry, domain, near, scope, own: &own };
        let next = AtomicUsize::new(0);
        let all: u64 = reused + batches.iter().map(Batch::bytes).sum::<u64>();
        let kept = AtomicU64::new(0);
        let parts: Mutex<Vec<(usize, Part)>> = Mutex::new(Vec::with_capacity(batches.len()));
        let held: Mutex<HashMap<SnapshotId, Arc<Snapshot>>> = Mutex::default();
        let work = || -> Result<(), DedupError> {
            let fingerprinter = Fingerprinter::new(self.options.fingerprints);
            let mut encoder = PageEncoder::new(bases, fingerprinter).stop_on(self.cancel.flag());
            let mut buffer = page_buffer();
            let mut places = Vec::with_capacity(BATCH as usize);
            let mut decoder = Decoder::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(batch) = batches.get(n) else { break };
                self.check_cancelled()?;
                let pages = batch.read(&mut buffer)?;
                places.clear();
                places.extend(batch.addresses());
                let hash = batch.hashed.then(|| hash(pages));
                let mut part = Part { hash, ..Part::default() };
                let before = old.map(|old| before(batch, pages, old, &mut decoder));
                part.encode(&mut encoder, &places, pages, &before.unwrap_or_default())?;
                let image = part.patches.len() as u64;
                let image = kept.fetch_add(image, Ordering::Relaxed) + image;
                if image > all / WORTH.1 * WORTH.0 {
                    return Err(Hindrance::NothingToGain { bytes: all, image }.into());
                }
                parts.lock().push((n, part));
            }
            held.lock().extend(encoder.held().map(|s| (s.id(), Arc::clone(s))));
            Ok(())
        };
        let workers = self.options.workers.clamp(1, batches.len().max(1));
        // On threads of their own, of low priority: requests to other sandboxes come first.
        std::thread::scope(|scope| {
            let work = || {
                medes_memory::priority::lower_this_thread();
                work()
            };
            let start = |_| std::thread::Builder::new().spawn_scoped(scope, work);
            let threads: Vec<_> = (0..workers).map(start).collect();
            threads.into_iter().try_for_each(|thread| {
                let thread = thread.map_err(Hindrance::Thread)?;
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        let mut parts = parts.into_inner();
        parts.sort_unstable_by_key(|(n, _)| *n);
        let mut encoded = Encoded { held: held.into_inner(), ..Encoded::default() };
        for (_, part) in parts {
            self.check_cancelled()?;
            encoded.sources.extend(part.sources);
            encoded.patches.extend(part.patches);
            encoded.unchanged += part.unchanged;
            encoded.hashes.push(part.hash);
        }
        Ok(encoded)
    }

    pub(super) fn count(&self, encoded: &Encoded) -> Result<Counts, DedupError> {
        let foreign = |at: &PageRef| {
            let snapshot = encoded.held.get(&at.snapshot);
            u64::from(snapshot.is_some_and(|s| s.function() != self.subject.function))
        };
        let buffers = self.options.workers.max(1) as u64 * u64::from(BATCH) * PAGE_SIZE as u64;
        let sources = encoded.sources.len() * size_of::<PageSource>();
        let mut counts = Counts {
            patch_bytes: encoded.patches.len() as u64,
            // Parts are joined into one piece, so patches and sources are there twice for a moment.
            reused: encoded.unchanged,
            overhead_bytes: buffers + 2 * (encoded.patches.len() + sources) as u64,
            ..Counts::default()
        };
        for sources in encoded.sources.chunks(COUNTED) {
            self.check_cancelled()?;
            for source in sources {
                counts.add(source);
                if let PageSource::Base(at) | PageSource::Patch { base: Some(at), .. } = source {
                    counts.foreign += foreign(at);
                }
            }
        }
        Ok(counts)
    }
}
