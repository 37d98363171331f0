//! The memory file that holds the store's content, mapped once at its full size.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU64;

use medes_pages::{PAGE_SIZE, Page};
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::allocator::Extent;

const NAME: &CStr = c"medes-pages";

/// The writer's mapping of the memory file. Memory is taken from the host only for pages that have
/// been written, and goes back when they are freed.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    map: MmapRaw,
    pages: u32,
}

impl SharedMemory {
    /// A new memory file with room for `pages` pages.
    ///
    /// # Errors
    /// When the kernel has no room for the mapping.
    pub fn create(pages: u32) -> io::Result<Self> {
        let fd = memfd_create(NAME, MFdFlags::MFD_CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(u64::from(pages) * PAGE_SIZE as u64)?;
        Self::map(file)
    }

    /// Maps a memory file that another process made.
    ///
    /// # Errors
    /// When the file's length is not a whole number of pages, or it can't be mapped.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        Self::map(File::from(fd))
    }

    fn map(file: File) -> io::Result<Self> {
        let pages = length_in_pages(&file)?;
        let map = MmapOptions::new().no_reserve_swap().map_raw(&file)?;
        Ok(Self { file, map, pages })
    }

    /// The memory file, to be handed to another process.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// How many pages fit.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// One of the 64-bit words of the file, counted from the start of a page.
    ///
    /// # Panics
    /// If it is not part of the file.
    pub(crate) fn word(&self, page: u32, index: u32) -> &AtomicU64 {
        let at = u64::from(page) * PAGE_SIZE as u64 + u64::from(index) * 8;
        assert!(at + 8 <= u64::from(self.pages) * PAGE_SIZE as u64, "a word past the end");
        // SAFETY: inside the mapping, which lives as long as the borrow, by the assertion, and
        // aligned: mappings start at pages. Words are only ever accessed as atomics here, and read
        // by other processes when their writer is dead.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at as usize).cast()) }
    }

    /// Reads content without the mapping.
    pub(crate) fn read(&self, page: u32, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, u64::from(page) * PAGE_SIZE as u64)
    }

    /// Copies `data` to `offset` bytes after the start of `extent`.
    ///
    /// # Panics
    /// If it does not fit into the extent.
    pub(crate) fn write(&self, extent: Extent, offset: usize, data: &[u8]) {
        let room = extent.pages as usize * PAGE_SIZE;
        assert!(extent.end() <= self.pages && offset + data.len() <= room, "write past an extent");
        let at = extent.start as usize * PAGE_SIZE + offset;
        // SAFETY: the assertion above keeps the target inside the mapping, which lives as long as
        // `self`. The caller owns the extent and has not told anybody of it yet (see the crate's
        // documentation), so nobody reads what is written here at the same time. `data` is an
        // ordinary slice, which can't overlap memory that no reference has been made to.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.map.as_mut_ptr().add(at), data.len());
        }
    }

    /// The bytes of an extent.
    ///
    /// # Panics
    /// If the extent is not part of the file.
    #[must_use]
    pub fn bytes(&self, extent: Extent) -> &[u8] {
        slice(&self.map, self.pages, extent)
    }

    /// One page.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn page(&self, slot: u32) -> &Page {
        page(&self.map, self.pages, slot)
    }

    /// Gives an extent's memory back to the host.
    pub(crate) fn release(&self, extent: Extent) {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (at, len) = (u64::from(extent.start), u64::from(extent.pages));
        let size = PAGE_SIZE as u64;
        #[allow(clippy::cast_possible_wrap, reason = "a file is shorter than 2^63 bytes")]
        if let Err(error) = fallocate(&self.file, flags, (at * size) as i64, (len * size) as i64) {
            // The pages are free all the same and will be overwritten; only the host's memory is
            // not smaller yet.
            debug_assert!(false, "punching a hole: {error}");
        }
    }
}

/// A reader's mapping of the memory file, in another process.
#[derive(Debug)]
pub struct View {
    file: File,
    map: MmapRaw,
    pages: u32,
}

impl View {
    /// Maps the memory file for reading.
    ///
    /// # Errors
    /// When the file's length is not a whole number of pages, or it can't be mapped.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let pages = length_in_pages(&file)?;
        let map = MmapOptions::new().no_reserve_swap().map_raw_read_only(&file)?;
        Ok(Self { file, map, pages })
    }

    /// The memory file, to be handed to another process.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// How many pages the file has room for.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The bytes of an extent.
    ///
    /// # Panics
    /// If the extent is not part of the file.
    #[must_use]
    pub fn bytes(&self, extent: Extent) -> &[u8] {
        slice(&self.map, self.pages, extent)
    }

    /// One page.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn page(&self, slot: u32) -> &Page {
        page(&self.map, self.pages, slot)
    }
}

fn slice(map: &MmapRaw, pages: u32, extent: Extent) -> &[u8] {
    let inside = extent.start.checked_add(extent.pages).is_some_and(|end| end <= pages);
    assert!(inside, "{extent:?} is not part of a file of {pages} pages");
    // SAFETY: inside the mapping by the assertion; the mapping lives as long as the borrow. The
    // file is never shortened, and the content of an extent that a reader knows of never changes
    // (see the crate's documentation).
    unsafe {
        std::slice::from_raw_parts(
            map.as_ptr().add(extent.start as usize * PAGE_SIZE),
            extent.pages as usize * PAGE_SIZE,
        )
    }
}

fn page(map: &MmapRaw, pages: u32, slot: u32) -> &Page {
    slice(map, pages, Extent { start: slot, pages: 1 }).try_into().expect("an extent of one page")
}

fn length_in_pages(file: &File) -> io::Result<u32> {
    let length = file.metadata()?.len();
    let pages = u32::try_from(length / PAGE_SIZE as u64).ok();
    pages.filter(|_| length % PAGE_SIZE as u64 == 0).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "not the memory file of a page store")
    })
}
