//! Base snapshots, and their tables in the memory file.

use medes_core::{DomainId, FunctionId, NodeId, SnapshotId};
use medes_pages::PAGE_SIZE;

use crate::allocator::Extent;

/// A base snapshot: which pages it has, and where they came from.
///
/// As long as one of these is held, the snapshot's pages stay where they are.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) id: SnapshotId,
    pub(crate) domain: DomainId,
    pub(crate) function: FunctionId,
    pub(crate) slots: Vec<u32>,
    /// (first address, pages, index of the first page), ordered by address.
    pub(crate) places: Vec<(u64, u32, u32)>,
    pub(crate) record: Extent,
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

/// A snapshot's table as it stands in the memory file: all that a reader needs to find its pages,
/// and all that another writer needs to take it over.
///
/// ```text
/// magic (8)  node (4)  number (4)  pages (4)  places (4)  domain (4)  function (8)
/// for each page: slot (4)        for each place: address (8)  pages (4)  first page (4)
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SnapshotRecord<'a> {
    id: SnapshotId,
    domain: DomainId,
    function: FunctionId,
    slots: &'a [u8],
    places: &'a [u8],
}

const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"medesnp2");
const RECORD_HEAD: usize = 36;
const PLACE: usize = 16;

/// The bytes of the table of a snapshot.
pub(crate) fn encode_record(
    id: SnapshotId,
    domain: DomainId,
    function: FunctionId,
    slots: &[u32],
    places: &[(u64, u32, u32)],
) -> Vec<u8> {
    let mut table = Vec::with_capacity(RECORD_HEAD + slots.len() * 4 + places.len() * PLACE);
    table.extend_from_slice(&RECORD_MAGIC.to_le_bytes());
    for word in [id.node.0, id.number, slots.len() as u32, places.len() as u32, domain.0] {
        table.extend_from_slice(&word.to_le_bytes());
    }
    table.extend_from_slice(&function.0.to_le_bytes());
    for slot in slots {
        table.extend_from_slice(&slot.to_le_bytes());
    }
    for (address, pages, first) in places {
        table.extend_from_slice(&address.to_le_bytes());
        table.extend_from_slice(&pages.to_le_bytes());
        table.extend_from_slice(&first.to_le_bytes());
    }
    table
}

impl<'a> SnapshotRecord<'a> {
    /// Reads a table; `None` if these bytes are not one.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        if word64(bytes, 0)? != RECORD_MAGIC {
            return None;
        }
        let id = SnapshotId { node: NodeId(word(bytes, 8)?), number: word(bytes, 12)? };
        let slots = (word(bytes, 16)? as usize).checked_mul(4)?;
        let places = (word(bytes, 20)? as usize).checked_mul(PLACE)?;
        let (domain, function) = (DomainId(word(bytes, 24)?), FunctionId(word64(bytes, 28)?));
        let (slots, rest) = bytes.get(RECORD_HEAD..)?.split_at_checked(slots)?;
        Some(Self { id, domain, function, slots, places: rest.get(..places)? })
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
        word(self.slots, page as usize * 4)
    }

    /// The snapshot, whose table lies at `record`; `None` if the table contradicts itself.
    pub(crate) fn snapshot(&self, record: Extent) -> Option<Snapshot> {
        let slots: Vec<u32> = (0..self.pages()).filter_map(|page| self.slot(page)).collect();
        let mut places: Vec<(u64, u32, u32)> = Vec::with_capacity(self.places.len() / PLACE);
        let mut next = 0u32;
        for place in self.places.chunks_exact(PLACE) {
            let (address, pages, first) = (word64(place, 0)?, word(place, 8)?, word(place, 12)?);
            if first != next {
                return None;
            }
            next = next.checked_add(pages)?;
            places.push((address, pages, first));
        }
        let Self { id, domain, function, .. } = *self;
        let complete = next == self.pages();
        complete.then_some(Snapshot { id, domain, function, slots, places, record })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
