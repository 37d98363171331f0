//! Finding, for each page, the cheapest way to bring it back.
//!
//! A page that an earlier image of the same sandbox has a patch for gets one like it, if it is still
//! about as small. Otherwise, in this order, each step only for the pages that the one before left
//! over:
//!
//! 1. a page of zeros needs nothing;
//! 2. the base page that lay at the same address in a sandbox of the same function: equal, or
//!    different in a few words (with equal layouts this settles nearly every page, without a hash);
//! 3. an equal base page anywhere in the domain, by content hash;
//! 4. the base page whose fingerprint overlaps most, from the registry (paper, section 4).
//!
//! What has no base page is compressed by itself. Every patch is decoded and compared with the page
//! before it counts.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use medes_core::{DomainId, PageRef, SnapshotId};
use medes_pages::{
    DecodeError, Decoder, Encoder, Fingerprint, Fingerprinter, PAGE_SIZE, Page, is_zero,
};
use medes_registry::{Candidate, Near, Registry, RegistryError, Scope};
use medes_store::{Snapshot, Store};

use crate::image::check;

/// A page that differs from its neighbour in time in at most this many of its 512 words gets a
/// patch against it without a look at the registry: nothing found there would be much smaller.
const FEW_WORDS: usize = 32;

/// A page that differs from its neighbour in time in more words than this is better off with what
/// the registry finds, or with nothing: patches of real pages become half a per cent larger, and
/// encoding twice as fast where much differs.
const MANY_WORDS: usize = 384;

/// Where one page comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageSource {
    /// It is zero.
    Zero,
    /// It is equal to a base page.
    Base(PageRef),
    /// It has a patch of this length.
    Patch {
        /// The patch's length, bytes.
        length: u16,
        /// The page's checksum ([`check`]).
        check: u32,
        /// The base page that the patch is against, if any.
        base: Option<PageRef>,
    },
}

/// Where an earlier image has a page from.
#[derive(Clone, Copy, Debug)]
pub struct Before<'a> {
    /// Its source.
    pub source: PageSource,
    /// Its patch, if that is a patch.
    pub patch: &'a [u8],
    /// Whether the page still is what the image has.
    pub same: bool,
}

/// Why encoding failed.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The registry did not answer.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A patch does not decode.
    #[error("a patch that was just made does not decode: {0}")]
    Decode(#[from] DecodeError),
    /// A patch decodes to something else.
    #[error("a patch that was just made decodes to another page than it was made from")]
    Differs,
    /// Somebody asked for it ([`PageEncoder::stop_on`]).
    #[error("encoding was stopped")]
    Stopped,
}

/// Everything that encoding looks pages up in.
#[derive(Clone, Copy)]
pub struct Bases<'a> {
    /// The page store of this node.
    pub store: &'a Store,
    /// The fingerprint registry.
    pub registry: &'a dyn Registry,
    /// Whose pages may be used.
    pub domain: DomainId,
    /// Which candidates are preferred.
    pub near: Near,
    /// Which functions' candidates are allowed.
    pub scope: Scope,
    /// Base snapshots of the same function, tried at the same address, newest first.
    pub own: &'a [Arc<Snapshot>],
}

/// Encodes pages; owns the buffers that this takes. One per thread.
pub struct PageEncoder<'a> {
    bases: Bases<'a>,
    fingerprinter: Fingerprinter,
    encoder: Encoder,
    decoder: Decoder,
    held: HashMap<SnapshotId, Option<Arc<Snapshot>>>,
    fingerprints: Vec<Fingerprint>,
    candidates: Vec<Option<Candidate>>,
    open: Vec<(usize, Option<PageRef>)>,
    trial: Vec<u8>,
    /// Patches like earlier ones, in the batch's order.
    alike: Vec<u8>,
    decoded: Box<Page>,
    stop: Option<&'a AtomicBool>,
}

impl<'a> PageEncoder<'a> {
    /// A new encoder.
    #[must_use]
    pub fn new(bases: Bases<'a>, fingerprinter: Fingerprinter) -> Self {
        Self {
            bases,
            fingerprinter,
            encoder: Encoder::new(),
            decoder: Decoder::new(),
            held: HashMap::new(),
            fingerprints: Vec::new(),
            candidates: Vec::new(),
            open: Vec::new(),
            trial: Vec::new(),
            alike: Vec::new(),
            decoded: Box::new([0; PAGE_SIZE]),
            stop: None,
        }
    }

    /// Has [`PageEncoder::encode`] give up soon after `stop` was set, even in the middle of a
    /// batch, which can take several milliseconds.
    #[must_use]
    pub fn stop_on(mut self, stop: &'a AtomicBool) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Encodes a batch: page `n` of `pages` lay at `addresses[n]`, and an earlier image has
    /// `before[n]` of it, or of none of them if that is empty. Appends one source per page to
    /// `sources`, and the patches, in the same order, to `patches`.
    ///
    /// # Errors
    /// [`EncodeError`]; what was appended is then of no use.
    pub fn encode(
        &mut self,
        addresses: &[u64],
        pages: &[Page],
        before: &[Option<Before<'_>>],
        sources: &mut Vec<PageSource>,
        patches: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let first = sources.len();
        self.open.clear();
        self.alike.clear();
        self.fingerprints.clear();
        self.candidates.clear();
        for (n, (address, page)) in addresses.iter().zip(pages).enumerate() {
            self.check_stopped()?;
            if let Some(Some(before)) = before.get(n)
                && let Some(source) = self.like(before, page)?
            {
                sources.push(source);
                continue;
            }
            let settled = self.without_fingerprint(*address, page);
            if let Err(near_miss) = settled {
                self.open.push((n, near_miss));
                self.fingerprints.push(self.fingerprinter.fingerprint(page));
            }
            // Patched pages are settled below, in order, so that patches are too.
            sources.push(settled.unwrap_or(PageSource::Patch { length: 0, check: 0, base: None }));
        }
        let Bases { registry, domain, near, scope, .. } = self.bases;
        registry.lookup_within(domain, near, scope, &self.fingerprints, &mut self.candidates)?;
        let mut open = std::mem::take(&mut self.open).into_iter().zip(0..).peekable();
        let mut alike = 0;
        for n in 0..pages.len() {
            let PageSource::Patch { base: same_place, length, .. } = sources[first + n] else {
                continue;
            };
            if length > 0 {
                let end = alike + usize::from(length);
                patches.extend_from_slice(&self.alike[alike..end]);
                alike = end;
                continue;
            }
            self.check_stopped()?;
            let (near_miss, found) = match open.next_if(|((page, _), _)| *page == n) {
                Some(((_, near_miss), k)) => (near_miss, self.candidates[k].map(|c| c.base)),
                None => (same_place, None),
            };
            let found = found.filter(|_| found != near_miss);
            sources[first + n] = self.patch(&pages[n], [near_miss, found], patches)?;
        }
        self.open = Vec::new();
        Ok(())
    }

    fn check_stopped(&self) -> Result<(), EncodeError> {
        match self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            true => Err(EncodeError::Stopped),
            false => Ok(()),
        }
    }

    /// A patch like the one that an earlier image has of the page, appended to `self.alike`, or the
    /// base page that the page has become; `None` if there is a reason to look further.
    fn like(
        &mut self,
        before: &Before<'_>,
        page: &Page,
    ) -> Result<Option<PageSource>, EncodeError> {
        let PageSource::Patch { base: at, .. } = before.source else { return Ok(None) };
        let base = at.and_then(|at| self.base_page(at));
        if let Some(at) = at
            && base == Some(page)
        {
            return Ok(Some(PageSource::Base(at)));
        }
        if is_zero(page) || at.is_some() && base.is_none() {
            return Ok(None);
        }
        let start = self.alike.len();
        if !self.encoder.encode_like(before.patch, page, base, &mut self.alike) {
            return Ok(None);
        }
        self.decoder.decode(&self.alike[start..], base, &mut self.decoded)?;
        if *self.decoded != *page {
            return Err(EncodeError::Differs);
        }
        let length = (self.alike.len() - start) as u16;
        Ok(Some(PageSource::Patch { length, check: check(page), base: at }))
    }

    /// Steps 1 to 3. A page with a near miss at the same address is `Ok(Patch)` if it is near
    /// enough to be taken at once, else `Err` with the near miss, if any.
    fn without_fingerprint(
        &mut self,
        address: u64,
        page: &Page,
    ) -> Result<PageSource, Option<PageRef>> {
        if is_zero(page) {
            return Ok(PageSource::Zero);
        }
        let mut nearest: Option<(usize, PageRef)> = None;
        for snapshot in self.bases.own {
            let Some(index) = snapshot.page_at(address) else { continue };
            let Some(base) = self.bases.store.page(snapshot, index) else { continue };
            let words = differing_words(page, base);
            let at = PageRef { snapshot: snapshot.id(), page: index };
            if words == 0 {
                return Ok(PageSource::Base(at));
            }
            if nearest.is_none_or(|(least, _)| words < least) {
                nearest = Some((words, at));
            }
        }
        if let Some((words, at)) = nearest
            && words <= FEW_WORDS
        {
            return Ok(PageSource::Patch { length: 0, check: 0, base: Some(at) });
        }
        if let Some(at) = self.bases.store.equal_page(self.bases.domain, page)
            && self.is_allowed(at)
        {
            return Ok(PageSource::Base(at));
        }
        Err(nearest.filter(|(words, _)| *words <= MANY_WORDS).map(|(_, at)| at))
    }

    /// The smallest patch against any of `candidates` or against nothing, verified and appended.
    fn patch(
        &mut self,
        page: &Page,
        candidates: [Option<PageRef>; 2],
        patches: &mut Vec<u8>,
    ) -> Result<PageSource, EncodeError> {
        let start = patches.len();
        let mut best: Option<Option<PageRef>> = None;
        for candidate in candidates.into_iter().flatten() {
            let Some(base) = self.base_page(candidate) else { continue };
            if base == page {
                patches.truncate(start);
                return Ok(PageSource::Base(candidate));
            }
            self.trial.clear();
            self.encoder.encode(page, Some(base), &mut self.trial);
            if best.is_none() || self.trial.len() < patches.len() - start {
                patches.truncate(start);
                patches.extend_from_slice(&self.trial);
                best = Some(Some(candidate));
            }
        }
        if best.is_none() {
            self.encoder.encode(page, None, patches);
            best = Some(None);
        }
        let patch = &patches[start..];
        // The encoder may have found that the base page is of no help.
        let needs_base = medes_pages::needs_base(patch)?;
        let base = best.flatten().filter(|_| needs_base);
        let content = base.and_then(|at| self.base_page(at));
        self.decoder.decode(patch, content, &mut self.decoded)?;
        if *self.decoded != *page {
            return Err(EncodeError::Differs);
        }
        Ok(PageSource::Patch { length: patch.len() as u16, check: check(page), base })
    }

    /// The content of a base page, if it is on this node and still there. Its snapshot is held
    /// from then on, so that it can't vanish before the image refers to it.
    fn base_page(&mut self, at: PageRef) -> Option<&'a Page> {
        let store = self.bases.store;
        let snapshot = self.held.entry(at.snapshot).or_insert_with(|| store.snapshot(at.snapshot));
        store.page(snapshot.as_ref()?, at.page)
    }

    /// Whether the snapshot of `at` is one that may be used; if so it is held from now on.
    fn is_allowed(&mut self, at: PageRef) -> bool {
        if self.base_page(at).is_none() {
            return false;
        }
        let own = |s: &Arc<Snapshot>| s.function() == self.bases.near.function;
        let same = self.held.get(&at.snapshot).and_then(Option::as_ref).is_some_and(own);
        match self.bases.scope {
            Scope::Any => true,
            Scope::SameFunction => same,
            Scope::OtherFunctions => !same,
        }
    }

    /// The snapshots that any answer so far refers to, and that are held until this is dropped.
    pub fn held(&self) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.held.values().flatten().chain(self.bases.own)
    }
}

/// How many of the 512 words of two pages differ.
fn differing_words(a: &Page, b: &Page) -> usize {
    let word = |c: &[u8]| u64::from_ne_bytes(c.try_into().expect("eight bytes"));
    a.chunks_exact(8).zip(b.chunks_exact(8)).filter(|(a, b)| word(a) != word(b)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_core::{FunctionId, NodeId};
    use medes_registry::{LocalRegistry, RegistryConfig};

    const ADDRESS: u64 = 0x10_0000;

    fn page(seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        for (word, n) in page.chunks_exact_mut(8).zip(seed * 512..) {
            word.copy_from_slice(&(n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
        page
    }

    /// A store with one base snapshot that has one page.
    fn with_base<R>(base: &Page, run: impl FnOnce(Bases<'_>) -> R) -> R {
        let near = Near { node: NodeId(0), function: FunctionId(1) };
        let domain = DomainId(0);
        let store = Store::create(near.node, 1 << 20).expect("a store");
        let registry = LocalRegistry::new(RegistryConfig::default());
        let mut builder = store.begin_snapshot(domain, near.function);
        builder.push(ADDRESS, base).expect("room");
        let own = [builder.finish().expect("room")];
        let scope = Scope::SameFunction;
        run(Bases { store: &store, registry: &registry, domain, near, scope, own: &own })
    }

    #[test]
    fn encoding_stops_in_the_middle_of_a_batch() {
        with_base(&page(1), |bases| {
            let stop = AtomicBool::new(false);
            let encoder = PageEncoder::new(bases, Fingerprinter::default());
            let mut encoder = encoder.stop_on(&stop);
            let (mut sources, mut patches) = (Vec::new(), Vec::new());
            let mut encode = |encoder: &mut PageEncoder<'_>| {
                encoder.encode(&[ADDRESS], &[page(2)], &[], &mut sources, &mut patches)
            };
            encode(&mut encoder).expect("not stopped");
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(encode(&mut encoder), Err(EncodeError::Stopped)));
        });
    }

    #[test]
    fn a_base_page_at_the_same_place_counts_only_if_it_is_alike() {
        let base = page(1);
        let changed = |words: usize| {
            let mut page = base;
            page[..words * 8].iter_mut().for_each(|byte| *byte = !*byte);
            page
        };
        with_base(&base, |bases| {
            let mut encoder = PageEncoder::new(bases, Fingerprinter::default());
            for (words, alike) in [(1, true), (FEW_WORDS + 1, true), (MANY_WORDS + 1, false)] {
                let (mut sources, mut patches) = (Vec::new(), Vec::new());
                encoder
                    .encode(&[ADDRESS], &[changed(words)], &[], &mut sources, &mut patches)
                    .expect("encodes");
                let has_base = matches!(sources[0], PageSource::Patch { base: Some(_), .. });
                assert_eq!(has_base, alike, "{words}");
            }
        });
    }
}
