//! Which pages of a mapping hold content of the process's own.
//!
//! `PAGEMAP_SCAN` (6.7) answers for a whole mapping in one call and skips empty page tables,
//! so that a reservation of gigabytes costs nothing. Older kernels (5.15 and later) are asked
//! through `/proc/PID/pagemap`, 8 bytes a page of address space. Neither faults anything in.
//! See the kernel's Documentation/admin-guide/mm/pagemap.rst.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::mappings::{Mapping, stopped};
use crate::sys::{self, PAGE_SIZE};

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageClass {
    /// A private page of anonymous memory, in memory or swapped.
    Anonymous,
    /// The kernel's zero page: read, never written. Kernels before 6.7 report
    /// [`PageClass::Anonymous`] for it.
    ZeroPage,
    /// A page of a private file mapping that was written to and is the process's own.
    FileCow,
}

/// Adjacent pages of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first page.
    pub start: u64,
    /// Number of 4 KiB pages.
    pub pages: u32,
    /// What they hold.
    pub class: PageClass,
}

impl PageRun {
    /// Address after the last page.
    pub fn end(&self) -> u64 {
        self.start + self.bytes()
    }

    /// Bytes in the run.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE
    }

    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end()
    }
}

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// A lightweight guard region (6.13; reported since 6.15): a marker, no page.
const PAGE_IS_GUARD: u64 = 1 << 8;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// Regions a scan call returns at most.
const REGIONS: usize = 512;
/// Memory with less than so many bytes between it is better looked at in one call, which takes the
/// kernel several microseconds whatever there is; what lies between may hold pages too.
pub const GAP: u64 = 32 << 20;

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

impl PageRegion {
    /// What its pages hold, if private pages there are of this class.
    fn class(&self, class: PageClass) -> PageClass {
        match self.categories & PAGE_IS_PFNZERO {
            0 => class,
            _ => PageClass::ZeroPage,
        }
    }
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The private pages of a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PrivatePages {
    /// All of them, by ascending address.
    pub runs: Vec<PageRun>,
    /// Those that were written to since they were last write-protected
    /// ([`PageScanner::find_written`]).
    pub written: Vec<Range<u64>>,
}

/// How the kernel is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Scan { guard: bool },
    Pagemap,
}

/// Lists the private pages of one process.
pub struct PageScanner {
    pagemap: File,
    method: Method,
    regions: Vec<PageRegion>,
    entries: Vec<u8>,
}

impl PageScanner {
    /// Opens the page map of `pid`.
    ///
    /// # Errors
    /// `NotFound` if there is no such process, `PermissionDenied` if it may not be inspected.
    pub fn open(pid: i32) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let method = probe(&pagemap);
        Ok(Self { pagemap, method, regions: Vec::new(), entries: Vec::new() })
    }

    /// Like [`PageScanner::open`], without `PAGEMAP_SCAN` even where the kernel has it.
    ///
    /// # Errors
    /// As for [`PageScanner::open`].
    pub fn open_without_scan(pid: i32) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { pagemap, method: Method::Pagemap, regions: Vec::new(), entries: Vec::new() })
    }

    /// Appends the private pages of `mapping`, by ascending address. A shared or special
    /// mapping has none.
    ///
    /// # Errors
    /// What the kernel reports; ESRCH (or nothing found) once the process has exited.
    pub fn scan(&mut self, mapping: &Mapping, out: &mut Vec<PageRun>) -> io::Result<()> {
        if mapping.is_anonymous() {
            self.scan_range(mapping.range(), PageClass::Anonymous, out)
        } else if mapping.is_file_private() {
            self.scan_range(mapping.range(), PageClass::FileCow, out)
        } else {
            Ok(())
        }
    }

    /// Appends the private pages of an address range that lies in mappings of one kind;
    /// `class` is what a private page there is.
    ///
    /// # Errors
    /// As for [`PageScanner::scan`].
    pub fn scan_range(
        &mut self,
        range: Range<u64>,
        class: PageClass,
        out: &mut Vec<PageRun>,
    ) -> io::Result<()> {
        match self.method {
            Method::Scan { guard } => {
                let query = PmScanArg { return_mask: PAGE_IS_PFNZERO, ..private_pages(guard) };
                self.scan_with(range, query, |region| {
                    push(out, region.start..region.end, region.class(class));
                })
            }
            Method::Pagemap => self.read_pagemap(range, class, out),
        }
    }

    /// The private pages of many mappings, which are in order, for each of them. `stop` is asked now
    /// and then whether to give up.
    ///
    /// # Errors
    /// As for [`PageScanner::scan`]; [`stopped`].
    pub fn scan_all(
        &mut self,
        mappings: &[&Mapping],
        stop: &(dyn Fn() -> bool + Sync),
    ) -> io::Result<Vec<PrivatePages>> {
        let mut all: Vec<PrivatePages> = Vec::with_capacity(mappings.len());
        for together in mappings.chunk_by(|one, next| next.start - one.end < GAP) {
            if stop() {
                return Err(stopped());
            }
            let (Some(first), Some(last)) = (together.first(), together.last()) else { continue };
            let mut regions = Vec::new();
            self.look(first.start..last.end, |region| regions.push(*region))?;
            let mut rest = regions.as_slice();
            for mapping in together {
                rest = &rest[rest.partition_point(|region| region.end <= mapping.start)..];
                let class = match mapping.is_anonymous() {
                    true => PageClass::Anonymous,
                    false => PageClass::FileCow,
                };
                let mut pages = PrivatePages::default();
                for region in rest.iter().take_while(|region| region.start < mapping.end) {
                    // A region may reach over the border of two mappings.
                    let range = region.start.max(mapping.start)..region.end.min(mapping.end);
                    push(&mut pages.runs, range.clone(), region.class(class));
                    if region.categories & PAGE_IS_WRITTEN != 0 {
                        pages.written.push(range);
                    }
                }
                all.push(pages);
            }
        }
        Ok(all)
    }

    /// Appends the pages that are there in `range`, whatever is mapped, and were written to since they
    /// were last write-protected. All count as written to in memory that is not registered with a
    /// userfaultfd in asynchronous write-protect mode, and in a kernel that has none (6.7).
    ///
    /// # Errors
    /// As for [`PageScanner::scan`].
    pub fn find_written(&mut self, range: Range<u64>, out: &mut Vec<Range<u64>>) -> io::Result<()> {
        let found = |region: &PageRegion| out.push(region.start..region.end);
        if self.method == Method::Pagemap {
            return self.look(range, found);
        }
        // Whether pages are private is not asked: the kernel would have to look at each.
        let query = PmScanArg {
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN,
            ..PmScanArg::default()
        };
        self.scan_with(range, query, found)
    }

    /// Finds the private pages of a range, whatever is mapped there: which are written to, and
    /// which are zero.
    fn look(&mut self, range: Range<u64>, mut found: impl FnMut(&PageRegion)) -> io::Result<()> {
        match self.method {
            Method::Scan { guard } => {
                let return_mask = PAGE_IS_PFNZERO | PAGE_IS_WRITTEN;
                let query = PmScanArg { return_mask, ..private_pages(guard) };
                self.scan_with(range, query, found)
            }
            Method::Pagemap => {
                let mut runs = Vec::new();
                self.read_pagemap(range, PageClass::Anonymous, &mut runs)?;
                let region = |run: &PageRun| PageRegion {
                    start: run.start,
                    end: run.end(),
                    categories: PAGE_IS_WRITTEN,
                };
                runs.iter().for_each(|run| found(&region(run)));
                Ok(())
            }
        }
    }

    fn scan_with(
        &mut self,
        range: Range<u64>,
        query: PmScanArg,
        mut found: impl FnMut(&PageRegion),
    ) -> io::Result<()> {
        self.regions.resize(REGIONS, PageRegion::default());
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            end: range.end,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            ..query
        };
        let mut start = range.start;
        while start < range.end {
            arg.start = start;
            // SAFETY: PAGEMAP_SCAN takes a pm_scan_arg; its vector points at `self.regions`,
            // which has vec_len elements and outlives the call.
            let count =
                match unsafe { sys::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) } {
                    Ok(count) => count as usize,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                };
            self.regions[..count.min(REGIONS)].iter().for_each(&mut found);
            if arg.walk_end <= start {
                break;
            }
            start = arg.walk_end;
        }
        Ok(())
    }

    fn read_pagemap(
        &mut self,
        range: Range<u64>,
        class: PageClass,
        out: &mut Vec<PageRun>,
    ) -> io::Result<()> {
        const ENTRY: u64 = 8;
        const CHUNK_PAGES: u64 = 32 * 1024;
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        const FILE_OR_SHARED: u64 = 1 << 61;
        let mut page = range.start / PAGE_SIZE;
        let end = range.end / PAGE_SIZE;
        while page < end {
            let count = (end - page).min(CHUNK_PAGES);
            self.entries.resize((count * ENTRY) as usize, 0);
            let read = self.pagemap.read_at(&mut self.entries, page * ENTRY)?;
            if read < ENTRY as usize {
                break;
            }
            for (entry, page) in self.entries[..read].chunks_exact(ENTRY as usize).zip(page..) {
                let entry = u64::from_ne_bytes(entry.try_into().expect("chunks of eight bytes"));
                if entry & PRESENT_OR_SWAPPED != 0 && entry & FILE_OR_SHARED == 0 {
                    push(out, page * PAGE_SIZE..(page + 1) * PAGE_SIZE, class);
                }
            }
            page += read as u64 / ENTRY;
        }
        Ok(())
    }
}

/// The query that finds private pages; `guard` says whether the kernel knows guard regions.
fn private_pages(guard: bool) -> PmScanArg {
    let not = PAGE_IS_FILE | if guard { PAGE_IS_GUARD } else { 0 };
    PmScanArg {
        category_inverted: not,
        category_mask: not,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..PmScanArg::default()
    }
}

/// Adds a range to the runs, joined with the last one where it continues it.
fn push(out: &mut Vec<PageRun>, range: Range<u64>, class: PageClass) {
    let mut start = range.start;
    while start < range.end {
        if let Some(last) = out.last_mut()
            && last.end() == start
            && last.class == class
            && last.pages < u32::MAX
        {
            let room = u64::from(u32::MAX - last.pages);
            let pages = room.min((range.end - start) / PAGE_SIZE);
            last.pages += pages as u32;
            start += pages * PAGE_SIZE;
        } else {
            out.push(PageRun { start, pages: 0, class });
        }
    }
}

/// Finds out what the kernel's page map can do, by scanning nothing.
fn probe(pagemap: &File) -> Method {
    let supports = |categories: u64| {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            category_inverted: categories,
            category_mask: categories,
            return_mask: PAGE_IS_PFNZERO,
            ..PmScanArg::default()
        };
        // SAFETY: PAGEMAP_SCAN takes a pm_scan_arg; the vector is empty.
        unsafe { sys::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) }.is_ok()
    };
    if supports(PAGE_IS_FILE | PAGE_IS_GUARD) {
        Method::Scan { guard: true }
    } else if supports(PAGE_IS_FILE) {
        Method::Scan { guard: false }
    } else {
        Method::Pagemap
    }
}

/// Whether this kernel has `PAGEMAP_SCAN`.
pub(crate) fn scan_supported() -> bool {
    File::open("/proc/self/pagemap").is_ok_and(|pagemap| probe(&pagemap) != Method::Pagemap)
}

/// Whether this kernel's `PAGEMAP_SCAN` tells guard regions from pages (6.15).
pub(crate) fn guards_are_reported() -> bool {
    File::open("/proc/self/pagemap")
        .is_ok_and(|pagemap| probe(&pagemap) == Method::Scan { guard: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_and_split() {
        let mut out = Vec::new();
        push(&mut out, 0x1000..0x3000, PageClass::Anonymous);
        push(&mut out, 0x3000..0x4000, PageClass::Anonymous);
        push(&mut out, 0x4000..0x5000, PageClass::ZeroPage);
        push(&mut out, 0x6000..0x7000, PageClass::ZeroPage);
        let pages: Vec<_> = out.iter().map(|run| (run.start, run.pages)).collect();
        assert_eq!(pages, [(0x1000, 3), (0x4000, 1), (0x6000, 1)]);
    }

    #[test]
    fn a_run_holds_no_more_than_its_counter() {
        let mut out = Vec::new();
        push(&mut out, 0..(u64::from(u32::MAX) + 2) * PAGE_SIZE, PageClass::Anonymous);
        assert_eq!(
            out.iter().map(|run| u64::from(run.pages)).sum::<u64>(),
            u64::from(u32::MAX) + 2
        );
        assert_eq!(out.len(), 2);
    }
}
