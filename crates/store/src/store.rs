//! The writer's side of the page store: base snapshots, images, references, accounting.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use medes_core::{DomainId, FunctionId, NodeId, PageRef, SnapshotId};
use medes_pages::{PAGE_SIZE, Page, content_hash};
use parking_lot::Mutex;

use crate::allocator::{Allocator, Extent, OutOfSpace};
use crate::shared::SharedMemory;

/// Why the store refuses.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room.
    #[error(transparent)]
    Full(#[from] OutOfSpace),
    /// A base snapshot that an image refers to is not (or no longer) there.
    #[error("the base snapshot {0} is not in the store")]
    NoSnapshot(SnapshotId),
}

/// A base snapshot: which pages it has, and where they came from.
///
/// As long as one of these is held, the snapshot's pages stay where they are.
#[derive(Debug)]
pub struct Snapshot {
    id: SnapshotId,
    domain: DomainId,
    function: FunctionId,
    slots: Vec<u32>,
    /// (first address, pages, index of the first page), ordered by address.
    places: Vec<(u64, u32, u32)>,
    record: Extent,
}

impl Snapshot {
    /// The snapshot's identity.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Whose sandboxes may use it.
    #[must_use]
    pub fn domain(&self) -> DomainId {
        self.domain
    }

    /// The function whose sandbox it was taken from.
    #[must_use]
    pub fn function(&self) -> FunctionId {
        self.function
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The slot in the memory file of one of its pages.
    #[must_use]
    pub fn slot(&self, page: u32) -> Option<u32> {
        self.slots.get(page as usize).copied()
    }

    /// The page that lay at `address` in the base sandbox.
    #[must_use]
    pub fn page_at(&self, address: u64) -> Option<u32> {
        let after = self.places.partition_point(|(start, ..)| *start <= address);
        let (start, pages, first) = *self.places.get(after.checked_sub(1)?)?;
        let n = (address - start) / PAGE_SIZE as u64;
        (n < u64::from(pages)).then(|| first + n as u32)
    }

    /// Where a reader of the memory file finds the snapshot's table ([`SnapshotRecord`]).
    #[must_use]
    pub fn record(&self) -> Extent {
        self.record
    }
}

/// A snapshot's table as it stands in the memory file: all that a reader needs to find its pages.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotRecord<'a> {
    id: SnapshotId,
    slots: &'a [u8],
}

const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"medesnp1");
const RECORD_HEAD: usize = 20;

impl<'a> SnapshotRecord<'a> {
    /// Reads a table; `None` if these bytes are not one.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        if u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?) != RECORD_MAGIC {
            return None;
        }
        let id = SnapshotId { node: NodeId(word(8)?), number: word(12)? };
        let length = (word(16)? as usize).checked_mul(4)?.checked_add(RECORD_HEAD)?;
        Some(Self { id, slots: bytes.get(RECORD_HEAD..length)? })
    }

    /// Which snapshot it belongs to.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// How many pages the snapshot has.
    #[must_use]
    pub fn pages(&self) -> u32 {
        (self.slots.len() / 4) as u32
    }

    /// The slot in the memory file of one of its pages.
    #[must_use]
    pub fn slot(&self, page: u32) -> Option<u32> {
        let at = page as usize * 4;
        Some(u32::from_le_bytes(self.slots.get(at..at + 4)?.try_into().ok()?))
    }
}

/// An image in the store: the opaque content that brings one sandbox's memory back.
///
/// Not freed by itself: [`Store::remove_image`] takes it back.
#[derive(Debug)]
#[must_use]
pub struct ImageHandle {
    extent: Extent,
    snapshots: Vec<SnapshotId>,
}

impl ImageHandle {
    /// Where it lies in the memory file.
    #[must_use]
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The memory that it takes, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        u64::from(self.extent.pages) * PAGE_SIZE as u64
    }

    /// The base snapshots that it refers to.
    #[must_use]
    pub fn snapshots(&self) -> &[SnapshotId] {
        &self.snapshots
    }
}

/// What the store holds, bytes unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct StoreUse {
    /// Room in all.
    pub capacity: u64,
    /// Pages of base snapshots, each counted once however many snapshots share it, and the
    /// snapshots' tables.
    pub snapshots: u64,
    /// Images of sandboxes.
    pub images: u64,
    /// Memory beside the file: indexes (an estimate from their capacity).
    pub index: u64,
    /// Number of base snapshots.
    pub snapshot_count: u64,
    /// Number of images.
    pub image_count: u64,
}

#[derive(Clone, Copy, Debug)]
struct Shared {
    slot: u32,
    /// How many snapshot pages are this page.
    references: u32,
    /// A snapshot page with this content; `None` when the snapshot that it named is gone.
    home: Option<PageRef>,
}

#[derive(Debug)]
struct Entry {
    snapshot: Arc<Snapshot>,
    images: u32,
    retired: bool,
}

#[derive(Debug)]
struct Inner {
    allocator: Allocator,
    snapshots: HashMap<SnapshotId, Entry>,
    /// Contents of base pages. One table per domain, so that no domain can feel another's pages.
    contents: HashMap<DomainId, HashMap<u128, Shared>>,
    next_snapshot: u32,
    images: u64,
    image_pages: u64,
}

/// The page store of a node.
#[derive(Debug)]
pub struct Store {
    memory: SharedMemory,
    node: NodeId,
    inner: Mutex<Inner>,
}

impl Store {
    /// An empty store with room for `capacity` bytes. Memory is taken only as it fills.
    ///
    /// # Errors
    /// When the memory file can't be made or mapped.
    pub fn create(node: NodeId, capacity: u64) -> std::io::Result<Self> {
        let pages = u32::try_from(capacity / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        let memory = SharedMemory::create(pages)?;
        let inner = Inner {
            allocator: Allocator::new(pages),
            snapshots: HashMap::new(),
            contents: HashMap::new(),
            next_snapshot: 1,
            images: 0,
            image_pages: 0,
        };
        Ok(Self { memory, node, inner: Mutex::new(inner) })
    }

    /// The memory file.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Starts a new base snapshot.
    #[must_use]
    pub fn begin_snapshot(&self, domain: DomainId, function: FunctionId) -> SnapshotBuilder<'_> {
        let mut inner = self.inner.lock();
        let number = inner.next_snapshot;
        inner.next_snapshot += 1;
        let id = SnapshotId { node: self.node, number };
        SnapshotBuilder {
            store: self,
            id,
            domain,
            function,
            slots: vec![],
            places: vec![],
            next: 0,
        }
    }

    /// A base snapshot. It stays as it is for as long as the answer is held.
    #[must_use]
    pub fn snapshot(&self, id: SnapshotId) -> Option<Arc<Snapshot>> {
        let inner = self.inner.lock();
        inner.snapshots.get(&id).filter(|e| !e.retired).map(|e| Arc::clone(&e.snapshot))
    }

    /// The function's base snapshots, oldest first.
    #[must_use]
    pub fn snapshots_of(&self, domain: DomainId, function: FunctionId) -> Vec<Arc<Snapshot>> {
        let inner = self.inner.lock();
        let of = |e: &&Entry| {
            !e.retired && e.snapshot.domain == domain && e.snapshot.function == function
        };
        let mut found: Vec<_> =
            inner.snapshots.values().filter(of).map(|e| Arc::clone(&e.snapshot)).collect();
        found.sort_by_key(|s| s.id);
        found
    }

    /// A base page of the domain with exactly this content.
    #[must_use]
    pub fn equal_page(&self, domain: DomainId, page: &Page) -> Option<PageRef> {
        let hash = content_hash(page);
        let inner = self.inner.lock();
        let shared = inner.contents.get(&domain)?.get(&hash)?;
        let home = shared.home?;
        // A snapshot in the making may still fail, a retired one takes no new references.
        let usable = inner.snapshots.get(&home.snapshot).is_some_and(|e| !e.retired);
        (usable && self.memory.page(shared.slot) == page).then_some(home)
    }

    /// The content of a page of a held snapshot.
    #[must_use]
    pub fn page(&self, snapshot: &Snapshot, page: u32) -> Option<&Page> {
        Some(self.memory.page(snapshot.slot(page)?))
    }

    /// Gives a base snapshot up: no new image may refer to it, and its pages go when the last
    /// image that does is gone. Returns whether there was one.
    pub fn retire_snapshot(&self, id: SnapshotId) -> bool {
        let mut inner = self.inner.lock();
        let found = inner.snapshots.get_mut(&id).map(|e| e.retired = true).is_some();
        self.collect(&mut inner);
        found
    }

    /// The base snapshots that no image refers to, with their functions, oldest first.
    #[must_use]
    pub fn unreferenced(&self) -> Vec<(SnapshotId, FunctionId)> {
        let inner = self.inner.lock();
        let unused = inner.snapshots.values().filter(|e| !e.retired && e.images == 0);
        let mut found: Vec<_> = unused.map(|e| (e.snapshot.id, e.snapshot.function)).collect();
        found.sort_unstable();
        found
    }

    /// How many images refer to a snapshot.
    #[must_use]
    pub fn references(&self, id: SnapshotId) -> u32 {
        self.inner.lock().snapshots.get(&id).map_or(0, |e| e.images)
    }

    /// Stores an image that refers to `snapshots`.
    ///
    /// # Errors
    /// When there is no room, or a snapshot is gone; nothing is stored then.
    pub fn put_image(
        &self,
        content: &[&[u8]],
        snapshots: &[SnapshotId],
    ) -> Result<ImageHandle, StoreError> {
        let length: usize = content.iter().map(|c| c.len()).sum();
        let pages = u32::try_from(length.div_ceil(PAGE_SIZE)).unwrap_or(u32::MAX);
        let mut inner = self.inner.lock();
        if let Some(gone) = snapshots.iter().find(|id| !inner.snapshots.contains_key(id)) {
            return Err(StoreError::NoSnapshot(*gone));
        }
        self.collect(&mut inner);
        let extent = inner.allocator.take(pages)?;
        for id in snapshots {
            if let Some(entry) = inner.snapshots.get_mut(id) {
                entry.images += 1;
            }
        }
        inner.images += 1;
        inner.image_pages += u64::from(pages);
        drop(inner);
        let mut at = 0;
        for part in content {
            self.memory.write(extent, at, part);
            at += part.len();
        }
        Ok(ImageHandle { extent, snapshots: snapshots.to_vec() })
    }

    /// Takes an image back. Nobody may read it any more.
    pub fn remove_image(&self, image: ImageHandle) {
        let mut inner = self.inner.lock();
        for id in &image.snapshots {
            if let Some(entry) = inner.snapshots.get_mut(id) {
                entry.images -= 1;
            }
        }
        inner.images -= 1;
        inner.image_pages -= u64::from(image.extent.pages);
        self.memory.release(image.extent);
        inner.allocator.give_back(image.extent);
        self.collect(&mut inner);
    }

    /// What the store holds.
    #[must_use]
    pub fn usage(&self) -> StoreUse {
        let inner = self.inner.lock();
        let page = PAGE_SIZE as u64;
        let used = u64::from(inner.allocator.used_pages());
        let slots: usize = inner.snapshots.values().map(|e| e.snapshot.slots.capacity()).sum();
        let contents: usize = inner.contents.values().map(HashMap::capacity).sum();
        StoreUse {
            capacity: u64::from(inner.allocator.capacity()) * page,
            snapshots: (used - inner.image_pages) * page,
            images: inner.image_pages * page,
            index: (slots * 4 + contents * (size_of::<(u128, Shared)>() + 1)) as u64,
            snapshot_count: inner.snapshots.len() as u64,
            image_count: inner.images,
        }
    }

    /// The memory that base snapshots of one domain take: their pages, each counted once, and their
    /// tables. All domains together make [`StoreUse::snapshots`].
    #[must_use]
    pub fn snapshot_bytes(&self, domain: DomainId) -> u64 {
        let inner = self.inner.lock();
        let of = inner.snapshots.values().filter(|e| e.snapshot.domain == domain);
        let (mut slots, mut tables) = (HashSet::<u32>::new(), 0);
        for entry in of {
            slots.extend(entry.snapshot.slots.iter().copied());
            tables += u64::from(entry.snapshot.record.pages);
        }
        (slots.len() as u64 + tables) * PAGE_SIZE as u64
    }

    /// Frees retired snapshots that nobody refers to or holds.
    fn collect(&self, inner: &mut Inner) {
        let gone = |e: &Entry| e.retired && e.images == 0 && Arc::strong_count(&e.snapshot) == 1;
        let ids: Vec<SnapshotId> =
            inner.snapshots.iter().filter(|(_, e)| gone(e)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(entry) = inner.snapshots.remove(&id) {
                self.free_pages(inner, entry.snapshot.domain, id, &entry.snapshot.slots);
                self.memory.release(entry.snapshot.record);
                inner.allocator.give_back(entry.snapshot.record);
            }
        }
    }

    fn free_pages(&self, inner: &mut Inner, domain: DomainId, of: SnapshotId, slots: &[u32]) {
        let Inner { allocator, contents, .. } = inner;
        let table = contents.entry(domain).or_default();
        let mut freed: Vec<u32> = Vec::with_capacity(slots.len());
        for &slot in slots {
            let hash = content_hash(self.memory.page(slot));
            match table.get_mut(&hash).filter(|s| s.slot == slot) {
                Some(shared) if shared.references > 1 => {
                    shared.references -= 1;
                    if shared.home.is_some_and(|h| h.snapshot == of) {
                        shared.home = None;
                    }
                }
                Some(_) => {
                    table.remove(&hash);
                    freed.push(slot);
                }
                // Another content with the same hash came first: this page was never shared.
                None => freed.push(slot),
            }
        }
        if table.is_empty() {
            contents.remove(&domain);
        }
        freed.sort_unstable();
        for run in freed.chunk_by(|a, b| a + 1 == *b) {
            let extent = Extent { start: run[0], pages: run.len() as u32 };
            self.memory.release(extent);
            allocator.give_back(extent);
        }
    }
}

/// A base snapshot in the making. Dropped before [`SnapshotBuilder::finish`], it leaves nothing.
#[derive(Debug)]
pub struct SnapshotBuilder<'a> {
    store: &'a Store,
    id: SnapshotId,
    domain: DomainId,
    function: FunctionId,
    slots: Vec<u32>,
    places: Vec<(u64, u32, u32)>,
    next: u32,
}

impl SnapshotBuilder<'_> {
    /// The identity that the snapshot will have.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Adds the page that lay at `address`; addresses must rise. Returns its index. Content that a
    /// base page of the domain has already is stored once.
    ///
    /// # Errors
    /// When there is no room; the snapshot can still be finished without this page.
    pub fn push(&mut self, address: u64, page: &Page) -> Result<u32, StoreError> {
        let index = self.slots.len() as u32;
        let home = Some(PageRef { snapshot: self.id, page: index });
        let hash = content_hash(page);
        let mut inner = self.store.inner.lock();
        let known = inner.contents.entry(self.domain).or_default().get_mut(&hash);
        let slot = match known {
            Some(shared) if self.store.memory.page(shared.slot) == page => {
                shared.references += 1;
                shared.home = shared.home.or(home);
                shared.slot
            }
            known => {
                let collides = known.is_some();
                let slot = inner.allocator.take_page(self.next)?;
                self.store.memory.write(Extent { start: slot, pages: 1 }, 0, page);
                if !collides {
                    let shared = Shared { slot, references: 1, home };
                    inner.contents.entry(self.domain).or_default().insert(hash, shared);
                }
                self.next = slot + 1;
                slot
            }
        };
        drop(inner);
        self.slots.push(slot);
        match self.places.last_mut() {
            Some((start, pages, _)) if *start + u64::from(*pages) * PAGE_SIZE as u64 == address => {
                *pages += 1;
            }
            _ => self.places.push((address, 1, index)),
        }
        Ok(index)
    }

    /// Completes the snapshot.
    ///
    /// # Errors
    /// When there is no room for its table; nothing of it stays then.
    pub fn finish(mut self) -> Result<Arc<Snapshot>, StoreError> {
        let length = RECORD_HEAD + self.slots.len() * 4;
        let mut table = Vec::with_capacity(length);
        table.extend_from_slice(&RECORD_MAGIC.to_le_bytes());
        table.extend_from_slice(&self.id.node.0.to_le_bytes());
        table.extend_from_slice(&self.id.number.to_le_bytes());
        table.extend_from_slice(&(self.slots.len() as u32).to_le_bytes());
        for slot in &self.slots {
            table.extend_from_slice(&slot.to_le_bytes());
        }
        let mut inner = self.store.inner.lock();
        let record = inner.allocator.take(length.div_ceil(PAGE_SIZE) as u32)?;
        self.store.memory.write(record, 0, &table);
        let snapshot = Arc::new(Snapshot {
            id: self.id,
            domain: self.domain,
            function: self.function,
            slots: std::mem::take(&mut self.slots),
            places: std::mem::take(&mut self.places),
            record,
        });
        let entry = Entry { snapshot: Arc::clone(&snapshot), images: 0, retired: false };
        inner.snapshots.insert(self.id, entry);
        Ok(snapshot)
    }
}

impl Drop for SnapshotBuilder<'_> {
    fn drop(&mut self) {
        if !self.slots.is_empty() {
            let mut inner = self.store.inner.lock();
            self.store.free_pages(&mut inner, self.domain, self.id, &self.slots);
        }
    }
}
