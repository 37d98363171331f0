//! The image of a dedup sandbox: where each dropped page of its memory comes from.
//!
//! An image is a table followed by patches, stored in one piece in the page store:
//!
//! ```text
//! magic (8)  table length (4, little endian)  table (postcard)  patches, one after the other
//! ```
//!
//! The table lists, per process, runs of consecutive pages. Pages equal to consecutive base pages
//! take one run however many they are, which is the common case when layouts agree. A page that
//! is not in the table, in a range that was dropped, is zero. Base pages are named by snapshot and
//! page, so that a snapshot may lie on another node; an image carries the place of each local
//! snapshot's own table, so that it can be read without asking anybody.

use medes_core::SnapshotId;
use medes_pages::{PAGE_SIZE, Page};
use medes_store::Extent;
use serde::{Deserialize, Serialize};

const MAGIC: u64 = u64::from_le_bytes(*b"medesim3");
const HEAD: usize = 12;

/// An image that can't be read. It is never used in part
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// Not an image, or cut short.
    #[error("the bytes are not an image of this version")]
    NotAnImage,
    /// The table contradicts itself.
    #[error("the image's table is broken: {0}")]
    Broken(&'static str),
}

/// A base snapshot that an image refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotUse {
    /// Which snapshot.
    pub id: SnapshotId,
    /// Where its table lies in this node's memory file.
    pub record: Extent,
}

/// The table of an image.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    /// The base snapshots, in the order in which runs refer to them.
    pub snapshots: Vec<SnapshotUse>,
    /// The sandbox's processes.
    pub processes: Vec<ProcessTable>,
    /// Whether the userfaultfds tell of writes to pages that were put back write-protected.
    pub tracks_writes: bool,
}

/// One process's part of an image.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ProcessTable {
    /// Its process id on the host.
    pub pid: i32,
    /// Address ranges (start, length) registered with its userfaultfd.
    pub registered: Vec<(u64, u64)>,
    /// Those of them that are the `brk` heap.
    pub heap: Vec<(u64, u64)>,
    /// Pages that are not zero, by rising address.
    pub runs: Vec<Run>,
}

/// Consecutive pages of one kind, all in one mapping.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The address of the first page.
    pub address: u64,
    /// Whether these are written pages of a private file mapping, which a userfaultfd can't fill.
    pub file: bool,
    /// Where the pages come from.
    pub source: Source,
}

/// Where the pages of a run come from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Source {
    /// Equal to consecutive pages of a base snapshot.
    Base {
        /// Its index in [`Table::snapshots`].
        snapshot: u16,
        /// The first base page.
        page: u32,
        /// How many.
        pages: u32,
    },
    /// Each page has a patch.
    Patches(Vec<PatchUse>),
}

/// One patch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PatchUse {
    /// Its length, bytes. A page of zeros that has to be put back has no patch: length 0.
    pub length: u16,
    /// What [`check`] says of the page that it decodes to.
    pub check: u32,
    /// Its base page, (index in [`Table::snapshots`], page), if it has one.
    pub base: Option<(u16, u32)>,
}

/// A checksum of a page's content: a patch or a base page that has changed since it was stored is
/// found out before a process sees it.
#[must_use]
pub fn check(page: &Page) -> u32 {
    xxhash_rust::xxh3::xxh3_64(page) as u32
}

impl Run {
    /// How many pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        match &self.source {
            Source::Base { pages, .. } => *pages,
            Source::Patches(patches) => patches.len() as u32,
        }
    }

    /// The address after the last page.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + u64::from(self.pages()) * PAGE_SIZE as u64
    }
}

impl Table {
    /// The head of the stored form: everything but the patches, which follow it.
    ///
    /// # Panics
    /// Never in practice: the table is plain data that always serialises.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let table = postcard::to_stdvec(self).expect("plain data serialises");
        let mut bytes = Vec::with_capacity(HEAD + table.len());
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&(table.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&table);
        bytes
    }

    /// Reads the stored form back: the table and the patches. Everything that a restore relies on
    /// is checked here: runs in order and in place, patches inside the bytes.
    ///
    /// # Errors
    /// [`ImageError`] if the bytes are no image, or one that contradicts itself.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), ImageError> {
        let word = |at: usize, n: usize| bytes.get(at..at + n).ok_or(ImageError::NotAnImage);
        if word(0, 8)? != MAGIC.to_le_bytes() {
            return Err(ImageError::NotAnImage);
        }
        let length: [u8; 4] = word(8, 4)?.try_into().map_err(|_| ImageError::NotAnImage)?;
        let table = word(HEAD, u32::from_le_bytes(length) as usize)?;
        let patches = &bytes[HEAD + table.len()..];
        let table: Self = postcard::from_bytes(table).map_err(|_| ImageError::NotAnImage)?;
        table.check(patches.len() as u64)?;
        Ok((table, patches))
    }

    fn check(&self, patch_bytes: u64) -> Result<(), ImageError> {
        let snapshots = self.snapshots.len();
        let mut used = 0u64;
        for process in &self.processes {
            let mut last = 0;
            for run in &process.runs {
                if run.address % PAGE_SIZE as u64 != 0 || run.address < last || run.pages() == 0 {
                    return Err(ImageError::Broken("runs out of order"));
                }
                let length = u64::from(run.pages()) * PAGE_SIZE as u64;
                last = run.address.checked_add(length).ok_or(ImageError::Broken("address"))?;
                let known = |s: u16| usize::from(s) < snapshots;
                let fine = match &run.source {
                    Source::Base { snapshot, page, pages } => {
                        known(*snapshot) && page.checked_add(*pages).is_some()
                    }
                    Source::Patches(patches) => {
                        used += patches.iter().map(|p| u64::from(p.length)).sum::<u64>();
                        patches.iter().all(|p| p.base.is_none_or(|(s, _)| known(s)))
                    }
                };
                if !fine {
                    return Err(ImageError::Broken("a reference to no snapshot"));
                }
            }
            if !process.heap.iter().all(|range| process.registered.contains(range)) {
                return Err(ImageError::Broken("a heap that is not registered"));
            }
            for (start, length) in &process.registered {
                if (start | length) % PAGE_SIZE as u64 != 0 || start.checked_add(*length).is_none()
                {
                    return Err(ImageError::Broken("a registered range"));
                }
            }
        }
        if used > patch_bytes {
            return Err(ImageError::Broken("patches beyond the end"));
        }
        Ok(())
    }
}

/// Collects the runs of one process, joining what can be joined.
#[derive(Debug, Default)]
pub struct RunBuilder {
    runs: Vec<Run>,
    /// The next page starts a new run even if it could join: a mapping begins there.
    border: bool,
}

impl RunBuilder {
    /// The next pages belong to another mapping.
    pub fn border(&mut self) {
        self.border = true;
    }

    /// Adds the page at `address`, equal to a base page. Addresses must rise.
    pub fn base(&mut self, address: u64, file: bool, snapshot: u16, page: u32) {
        if let Some(run) = self.last_if_joined(address, file)
            && let Source::Base { snapshot: s, page: first, pages } = &mut run.source
            && *s == snapshot
            && *first + *pages == page
        {
            *pages += 1;
            return;
        }
        self.push(address, file, Source::Base { snapshot, page, pages: 1 });
    }

    /// Adds the page at `address`, kept as a patch. Addresses must rise.
    pub fn patch(&mut self, address: u64, file: bool, patch: PatchUse) {
        if let Some(run) = self.last_if_joined(address, file)
            && let Source::Patches(patches) = &mut run.source
        {
            patches.push(patch);
            return;
        }
        self.push(address, file, Source::Patches(vec![patch]));
    }

    /// The runs.
    #[must_use]
    pub fn finish(self) -> Vec<Run> {
        self.runs
    }

    fn last_if_joined(&mut self, address: u64, file: bool) -> Option<&mut Run> {
        let border = self.border;
        self.runs.last_mut().filter(|r| !border && r.file == file && r.end() == address)
    }

    fn push(&mut self, address: u64, file: bool, source: Source) {
        self.border = false;
        self.runs.push(Run { address, file, source });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_core::NodeId;
    use proptest::prelude::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn table(runs: Vec<Run>) -> Table {
        let id = SnapshotId { node: NodeId(0), number: 1 };
        let snapshots = vec![SnapshotUse { id, record: Extent { start: 9, pages: 1 } }];
        let registered = vec![(PAGE, 64 * PAGE)];
        let process = ProcessTable { pid: 7, registered, heap: vec![], runs };
        Table { snapshots, processes: vec![process], tracks_writes: false }
    }

    #[test]
    fn neighbours_are_joined_but_not_over_a_border() {
        let mut builder = RunBuilder::default();
        for n in 1..5 {
            builder.base(n * PAGE, false, 0, n as u32 + 10);
        }
        builder.base(5 * PAGE, false, 0, 99);
        builder.border();
        builder.base(6 * PAGE, false, 0, 100);
        builder.patch(7 * PAGE, false, PatchUse { length: 3, check: 1, base: None });
        builder.patch(8 * PAGE, false, PatchUse { length: 2, check: 2, base: Some((0, 4)) });
        builder.patch(9 * PAGE, true, PatchUse { length: 2, check: 3, base: None });
        let runs = builder.finish();
        let shape: Vec<(u64, u32)> = runs.iter().map(|r| (r.address / PAGE, r.pages())).collect();
        assert_eq!(shape, [(1, 4), (5, 1), (6, 1), (7, 2), (9, 1)]);
        let table = table(runs);
        let mut bytes = table.encode();
        bytes.extend_from_slice(b"1234567");
        let (back, patches) = Table::decode(&bytes).expect("an image");
        assert_eq!((back, patches), (table.clone(), &b"1234567"[..]));
        let mut short = table.encode();
        short.extend_from_slice(b"123");
        assert_eq!(Table::decode(&short), Err(ImageError::Broken("patches beyond the end")));
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let run = |address, snapshot| Run {
            address,
            file: false,
            source: Source::Base { snapshot, page: 0, pages: 2 },
        };
        let refused = |runs| Table::decode(&table(runs).encode()).expect_err("broken");
        assert_eq!(refused(vec![run(PAGE, 1)]), ImageError::Broken("a reference to no snapshot"));
        assert_eq!(refused(vec![run(1, 0)]), ImageError::Broken("runs out of order"));
        let overlapping = vec![run(PAGE, 0), run(2 * PAGE, 0)];
        assert_eq!(refused(overlapping), ImageError::Broken("runs out of order"));
        assert_eq!(refused(vec![run(u64::MAX - PAGE + 1, 0)]), ImageError::Broken("address"));
        assert_eq!(Table::decode(b"medesim3"), Err(ImageError::NotAnImage));
    }

    proptest! {
        #[test]
        fn broken_bytes_are_refused_without_harm(
            flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8),
            cut in any::<usize>(),
        ) {
            let mut builder = RunBuilder::default();
            for n in 0..20u64 {
                builder.base(n * PAGE, false, 0, n as u32 * 3);
                builder.patch((n + 100) * PAGE, false, PatchUse { length: 1, check: 4, base: None });
            }
            // Out of order on purpose in part: only that nothing panics is asked here.
            let mut bytes = table(builder.finish()).encode();
            bytes.extend_from_slice(&[0; 20]);
            for (at, value) in flips {
                let at = at % bytes.len();
                bytes[at] ^= value;
            }
            bytes.truncate(cut % (bytes.len() + 1));
            let _ = Table::decode(&bytes);
        }
    }
}
