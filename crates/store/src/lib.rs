//! The page store: base snapshots, patches and unique pages in shared memory.
