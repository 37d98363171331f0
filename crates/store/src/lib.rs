//! The page store: base snapshots, patches and unique pages in shared memory.
//!
//! All content lies in one memory file ([`SharedMemory`]) that another process can map: the daemon
//! writes it, the keeper reads it. [`Store`] is the writer's side: it allocates, counts references
//! and gives back. Content is written once, before anybody else learns where it lies, and never
//! changes while it is referred to; that is what makes reading it without locks sound.
//!
//! The store does not know what a patch or a fingerprint is, nor which sandbox an image belongs
//! to.

mod allocator;
mod shared;
mod store;

pub use allocator::{Extent, OutOfSpace};
pub use shared::{SharedMemory, View};
pub use store::{
    ImageHandle, Snapshot, SnapshotBuilder, SnapshotRecord, Store, StoreError, StoreUse,
};
