//! The base snapshots of one domain, numbered so that a table entry can name one in two bytes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};

use medes_core::{FunctionId, SnapshotId};

/// The number of a snapshot within its domain.
pub(crate) type Slot = u16;

/// The most snapshots, living and being forgotten, that a domain can number.
pub(crate) const MAX_SLOTS: usize = Slot::MAX as usize;

#[derive(Debug)]
struct Registered {
    snapshot: SnapshotId,
    function: FunctionId,
    live: bool,
    /// Table entries that still name the slot. It is used again only when there are none.
    entries: AtomicU32,
}

#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    slots: Vec<Registered>,
    by_id: HashMap<SnapshotId, Slot>,
    /// Slots of removed snapshots.
    removed: Vec<Slot>,
}

impl Snapshots {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Memory in bytes, about.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Registered>()
            + self.by_id.capacity() * size_of::<(SnapshotId, Slot)>()
            + self.removed.capacity() * size_of::<Slot>()
    }

    /// The slot of a snapshot that has not been removed.
    pub(crate) fn slot(&self, snapshot: SnapshotId) -> Option<Slot> {
        self.by_id.get(&snapshot).copied()
    }

    /// Gives a snapshot a slot, unless there is none left.
    pub(crate) fn register(&mut self, snapshot: SnapshotId, function: FunctionId) -> Option<Slot> {
        let registered = Registered { snapshot, function, live: true, entries: AtomicU32::new(0) };
        let unnamed =
            |slot: &Slot| self.slots[usize::from(*slot)].entries.load(Ordering::Relaxed) == 0;
        let slot = if let Some(at) = self.removed.iter().position(unnamed) {
            let slot = self.removed.swap_remove(at);
            self.slots[usize::from(slot)] = registered;
            slot
        } else if self.slots.len() < MAX_SLOTS {
            self.slots.push(registered);
            (self.slots.len() - 1) as Slot
        } else {
            return None;
        };
        self.by_id.insert(snapshot, slot);
        Some(slot)
    }

    /// Takes a snapshot's name away and gives its slot, whose entries are dead from now on.
    pub(crate) fn remove(&mut self, snapshot: SnapshotId) -> Option<Slot> {
        let slot = self.by_id.remove(&snapshot)?;
        self.slots[usize::from(slot)].live = false;
        self.removed.push(slot);
        Some(slot)
    }

    pub(crate) fn is_live(&self, slot: Slot) -> bool {
        self.slots[usize::from(slot)].live
    }

    pub(crate) fn snapshot(&self, slot: Slot) -> SnapshotId {
        self.slots[usize::from(slot)].snapshot
    }

    pub(crate) fn function(&self, slot: Slot) -> FunctionId {
        self.slots[usize::from(slot)].function
    }

    pub(crate) fn add_entry(&self, slot: Slot) {
        self.slots[usize::from(slot)].entries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn drop_entry(&self, slot: Slot) {
        self.slots[usize::from(slot)].entries.fetch_sub(1, Ordering::Relaxed);
    }
}
