//! One shard of a domain's table: chunk tag to base pages, in buckets of one cache line.
//!
//! A chunk's entries lie in its home bucket, or, when that is full, in the next one that is not.
//! The home bucket is a multiple of the tag, so tables of any size do: they grow in small steps
//! that keep them more than 70 % full. Entries are not deleted: those of a removed snapshot are
//! dead, are skipped by lookups, make room for inserts, and go at the next rebuild.

use crate::snapshots::{Slot, Snapshots};

/// Entries in a bucket: as many as fit in a cache line.
const WIDTH: usize = 6;

/// A table is rebuilt when it is fuller than this (of 100), so that few chunks need a second cache
/// line.
const MAX_FILL: usize = 85;

/// How full a rebuilt table is (of 100): 1.2 times the room is what a growing table gets.
const NEW_FILL: usize = 71;

/// One base page that has a chunk: the slot of its snapshot, and its index there in the low 32
/// bits. One number, because lookups sort them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Location(u64);

impl Location {
    pub(crate) fn new(slot: Slot, page: u32) -> Self {
        Self(u64::from(slot) << 32 | u64::from(page))
    }

    pub(crate) fn slot(self) -> Slot {
        (self.0 >> 32) as Slot
    }

    pub(crate) fn page(self) -> u32 {
        self.0 as u32
    }
}

/// Entries of an array each, which leaves no gaps between fields of different sizes.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
struct Bucket {
    tags: [u32; WIDTH],
    pages: [u32; WIDTH],
    slots: [Slot; WIDTH],
    len: u8,
    /// Whether an entry whose home is here, or before here, lies further on.
    spilled: bool,
}

const _: () = assert!(size_of::<Bucket>() == 64);

impl Bucket {
    fn location(&self, at: usize) -> Location {
        Location::new(self.slots[at], self.pages[at])
    }

    fn set(&mut self, at: usize, tag: u32, location: Location) {
        self.tags[at] = tag;
        self.slots[at] = location.slot();
        self.pages[at] = location.page();
    }

    /// The positions of the entries with this tag. All positions are compared, whatever `len` is,
    /// because that takes no branches.
    #[inline]
    fn matches(&self, tag: u32) -> u32 {
        let mut matches = 0;
        for (at, other) in self.tags.iter().enumerate() {
            matches |= u32::from(*other == tag) << at;
        }
        matches & ((1 << self.len) - 1)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    buckets: Vec<Bucket>,
    /// Entries, dead ones too.
    len: usize,
    /// Entries of removed snapshots.
    dead: usize,
    /// By slot: the entries that name it.
    by_slot: Vec<u32>,
}

impl Table {
    /// Entries of snapshots that have not been removed.
    pub(crate) fn live(&self) -> usize {
        self.len - self.dead
    }

    /// Memory in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.buckets.capacity() * size_of::<Bucket>()
            + self.by_slot.capacity() * size_of::<u32>()
            + size_of::<Self>()
    }

    fn home(&self, tag: u32) -> usize {
        ((u64::from(tag) * self.buckets.len() as u64) >> 32) as usize
    }

    /// Reads from the bucket that a lookup of the tag begins with, so that it is in the cache when
    /// the lookup comes.
    #[inline]
    pub(crate) fn touch(&self, tag: u32) -> u8 {
        self.buckets.get(self.home(tag)).map_or(0, |bucket| bucket.len)
    }

    /// Appends the pages that have the chunk, also those of removed snapshots.
    #[inline]
    pub(crate) fn find(&self, tag: u32, out: &mut Vec<Location>) {
        if self.buckets.is_empty() {
            return;
        }
        let mut at = self.home(tag);
        // A table is never full, so the way ends.
        loop {
            let bucket = &self.buckets[at];
            let mut matches = bucket.matches(tag);
            while matches != 0 {
                out.push(bucket.location(matches.trailing_zeros() as usize));
                matches &= matches - 1;
            }
            if !bucket.spilled {
                return;
            }
            at = if at + 1 == self.buckets.len() { 0 } else { at + 1 };
        }
    }

    /// Adds a page that has the chunk, unless it is known or the chunk has enough pages: `limit`,
    /// of which those of one snapshot may be half. Tells whether it was added.
    pub(crate) fn insert(
        &mut self,
        tag: u32,
        location: Location,
        limit: usize,
        snapshots: &Snapshots,
    ) -> bool {
        if (self.len + 1) * 100 > self.buckets.len() * WIDTH * MAX_FILL {
            self.rebuild(1, snapshots);
        }
        let of_one = limit.div_ceil(2);
        let (mut pages, mut same_snapshot) = (0, 0);
        let mut free = None;
        let mut at = self.home(tag);
        loop {
            let bucket = &self.buckets[at];
            for i in 0..usize::from(bucket.len) {
                let other = bucket.location(i);
                if !snapshots.is_live(other.slot()) {
                    free = free.or(Some((at, i)));
                } else if bucket.tags[i] == tag {
                    pages += 1;
                    same_snapshot += usize::from(other.slot() == location.slot());
                    if other == location || pages == limit || same_snapshot == of_one {
                        return false;
                    }
                }
            }
            if usize::from(bucket.len) < WIDTH {
                free = free.or(Some((at, usize::from(bucket.len))));
            }
            if !bucket.spilled && free.is_some() {
                break;
            }
            at = if at + 1 == self.buckets.len() { 0 } else { at + 1 };
        }
        if let Some((at, i)) = free {
            self.place(at, i, tag, location, snapshots);
        }
        true
    }

    /// Writes an entry to a place that is empty or has a dead entry.
    fn place(&mut self, at: usize, i: usize, tag: u32, location: Location, snapshots: &Snapshots) {
        let mut spilling = self.home(tag);
        while spilling != at {
            self.buckets[spilling].spilled = true;
            spilling = if spilling + 1 == self.buckets.len() { 0 } else { spilling + 1 };
        }
        let bucket = &mut self.buckets[at];
        if i < usize::from(bucket.len) {
            let dead = bucket.slots[i];
            self.by_slot[usize::from(dead)] -= 1;
            snapshots.drop_entry(dead);
            self.dead -= 1;
        } else {
            bucket.len += 1;
            self.len += 1;
        }
        bucket.set(i, tag, location);
        let slot = usize::from(location.slot());
        if self.by_slot.len() <= slot {
            self.by_slot.resize(slot + 1, 0);
        }
        self.by_slot[slot] += 1;
        snapshots.add_entry(location.slot());
    }

    /// Counts the entries of a slot whose snapshot has just been removed as dead, and tells how
    /// many these are.
    pub(crate) fn bury(&mut self, slot: Slot) -> usize {
        let dead = self.by_slot.get(usize::from(slot)).map_or(0, |entries| *entries as usize);
        self.dead += dead;
        dead
    }

    /// Whether so many entries are dead that a rebuild pays.
    pub(crate) fn is_wasteful(&self) -> bool {
        self.dead * 4 > self.len
    }

    /// Makes a new table of the living entries, with room for `more`.
    pub(crate) fn rebuild(&mut self, more: usize, snapshots: &Snapshots) {
        let room = self.live() + more;
        let buckets = if room == 0 { 0 } else { (room * 100).div_ceil(WIDTH * NEW_FILL) };
        let old = std::mem::replace(&mut self.buckets, vec![Bucket::default(); buckets]);
        for bucket in &old {
            for i in 0..usize::from(bucket.len) {
                let location = bucket.location(i);
                if snapshots.is_live(location.slot()) {
                    self.append(bucket.tags[i], location);
                } else {
                    self.by_slot[usize::from(location.slot())] -= 1;
                    snapshots.drop_entry(location.slot());
                }
            }
        }
        self.len -= self.dead;
        self.dead = 0;
        let used = self.by_slot.iter().rposition(|entries| *entries > 0).map_or(0, |last| last + 1);
        self.by_slot.truncate(used);
        self.by_slot.shrink_to_fit();
    }

    /// Puts an entry in the first free place of a table without dead entries.
    fn append(&mut self, tag: u32, location: Location) {
        let mut at = self.home(tag);
        while usize::from(self.buckets[at].len) == WIDTH {
            self.buckets[at].spilled = true;
            at = if at + 1 == self.buckets.len() { 0 } else { at + 1 };
        }
        let bucket = &mut self.buckets[at];
        bucket.set(usize::from(bucket.len), tag, location);
        bucket.len += 1;
    }
}
