//! The page store: base snapshots, patches and unique pages in shared memory.
//!
//! All content lies in one memory file ([`SharedMemory`]) that another process can map: the daemon
//! writes it, the keeper reads it. [`Store`] is the writer's side: it allocates, counts references
//! and gives back. Content is written once, before anybody else learns where it lies, and never
//! changes while it is referred to; that is what makes reading it without locks sound.
//!
//! A store outlives its writer: what another process that has the memory file mapped needs to take
//! it over ([`Store::reopen`]) is in the file, but for the images, which their holders know.
//!
//! The store does not know what a patch or a fingerprint is, nor which sandbox an image belongs
//! to.

mod allocator;
mod catalogue;
mod reopen;
mod shared;
mod snapshot;
mod store;

pub use allocator::{Extent, OutOfSpace};
pub use reopen::ReopenError;
pub use shared::{SharedMemory, View};
pub use snapshot::{Snapshot, SnapshotRecord};
pub use store::{ImageHandle, SnapshotBuilder, Store, StoreError, StoreUse};
