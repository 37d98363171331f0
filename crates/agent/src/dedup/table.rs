//! Putting an image's table together.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use medes_core::{PageRef, SnapshotId};
use medes_pages::PAGE_SIZE;
use medes_store::Extent;

use super::encoding::Encoded;
use super::{Counts, DedupError, Hindrance};
use crate::encode::PageSource;
use crate::image::{PatchUse, ProcessTable, RunBuilder, SnapshotUse, Table};
use crate::index::ImageIndex;
use crate::plan::{MappingKind, MappingPlan, Plan, Reused};

/// The image's table, and the patches that it refers to, in order. What is reused of an earlier
/// image is counted in `counts`. `go_on` is asked again and again whether to give up.
pub(super) fn table<'e>(
    plan: &Plan,
    encoded: &'e Encoded,
    old: Option<&'e ImageIndex>,
    registered: &[Vec<Range<u64>>],
    tracks_writes: bool,
    counts: &mut Counts,
    go_on: &dyn Fn() -> Result<(), DedupError>,
) -> Result<(Table, Vec<&'e [u8]>), DedupError> {
    let mut build = Build {
        names: HashMap::new(),
        records: encoded.held.iter().map(|(id, snapshot)| (*id, snapshot.record())).collect(),
        table: Table { tracks_writes, ..Table::default() },
        patches: Vec::new(),
        sources: encoded.sources.iter(),
        rest: &encoded.patches,
        old,
        counts,
    };
    if let Some(old) = old {
        build.records.extend(old.table().snapshots.iter().map(|used| (used.id, used.record)));
    }
    for (n, (process, ranges)) in plan.processes.iter().zip(registered).enumerate() {
        let mut runs = RunBuilder::default();
        for mapping in &process.mappings {
            go_on()?;
            runs.border();
            build.mapping(n, mapping, ranges, &mut runs)?;
        }
        let is_heap = |range: &&Range<u64>| {
            process.mappings.iter().any(|mapping| mapping.heap && mapping.start == range.start)
        };
        let with_length = |range: &Range<u64>| (range.start, range.end - range.start);
        build.table.processes.push(ProcessTable {
            pid: process.pid,
            registered: ranges.iter().map(with_length).collect(),
            heap: ranges.iter().filter(is_heap).map(with_length).collect(),
            runs: runs.finish(),
        });
    }
    Ok((build.table, build.patches))
}

struct Build<'a, 'e> {
    names: HashMap<SnapshotId, u16>,
    records: HashMap<SnapshotId, Extent>,
    table: Table,
    patches: Vec<&'e [u8]>,
    sources: std::slice::Iter<'e, PageSource>,
    /// Patches not yet taken.
    rest: &'e [u8],
    old: Option<&'e ImageIndex>,
    counts: &'a mut Counts,
}

impl<'e> Build<'_, 'e> {
    /// The pages of one mapping, those that are encoded anew and those that are not in the order of
    /// their addresses.
    fn mapping(
        &mut self,
        process: usize,
        mapping: &MappingPlan,
        registered: &[Range<u64>],
        runs: &mut RunBuilder,
    ) -> Result<(), DedupError> {
        let file = mapping.kind == MappingKind::File;
        let known = registered.binary_search_by_key(&mapping.start, |r| r.start);
        let stays = !file && known.is_err();
        let mut reused = mapping.reused.iter().peekable();
        for run in &mapping.runs {
            while let Some(before) = reused.next_if(|r| r.range.start < run.start) {
                self.reuse(process, before, runs)?;
            }
            for n in 0..u64::from(run.pages) {
                let address = run.start + n * PAGE_SIZE as u64;
                let source = *self.sources.next().ok_or(Hindrance::Changed)?;
                let mut patch: &[u8] = &[];
                if let PageSource::Patch { length, .. } = source {
                    (patch, self.rest) = self.rest.split_at(usize::from(length));
                }
                if !stays {
                    self.page(address, file, source, patch, runs)?;
                }
            }
        }
        reused.try_for_each(|after| self.reuse(process, after, runs))
    }

    /// Pages that are what an earlier image has for them.
    fn reuse(
        &mut self,
        process: usize,
        reused: &Reused,
        runs: &mut RunBuilder,
    ) -> Result<(), DedupError> {
        let Some(old) = self.old else { return Err(Hindrance::Changed.into()) };
        let Reused { range, origin } = reused;
        let there = *origin..origin + (range.end - range.start);
        old.for_each_source(process, there, |address, source, patch| {
            self.counts.reused += 1;
            self.counts.add(&source);
            self.counts.patch_bytes += patch.len() as u64;
            self.page(range.start + (address - origin), false, source, patch, runs)
        })
    }

    fn page(
        &mut self,
        address: u64,
        file: bool,
        source: PageSource,
        patch: &'e [u8],
        runs: &mut RunBuilder,
    ) -> Result<(), DedupError> {
        match source {
            // A private copy of file content can't come back by itself.
            PageSource::Zero if file => {
                runs.patch(address, true, PatchUse { length: 0, check: 0, base: None });
            }
            PageSource::Zero => {}
            PageSource::Base(at) => {
                let (snapshot, page) = self.name(at)?;
                runs.base(address, file, snapshot, page);
            }
            PageSource::Patch { length, check, base } => {
                let base = base.map(|at| self.name(at)).transpose()?;
                runs.patch(address, file, PatchUse { length, check, base });
                self.patches.push(patch);
            }
        }
        Ok(())
    }

    /// A base page by the snapshot's index in the table.
    fn name(&mut self, at: PageRef) -> Result<(u16, u32), DedupError> {
        let next = u16::try_from(self.table.snapshots.len());
        let name = match self.names.entry(at.snapshot) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let record = *self.records.get(&at.snapshot).ok_or(Hindrance::Changed)?;
                let next = next.map_err(|_| Hindrance::ManySnapshots)?;
                self.table.snapshots.push(SnapshotUse { id: at.snapshot, record });
                *new.insert(next)
            }
        };
        Ok((name, at.page))
    }
}
