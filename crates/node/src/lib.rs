//! The node daemon: runs sandboxes, deduplicates and restores them.
//!
//! A node carries out what the controller decides and reports what it sees. It knows nothing of
//! requests waiting, of keep-alive periods or of other nodes. [`api`] is its interface, the one
//! that a node on another machine will be driven through as well.

#![forbid(unsafe_code)]

pub mod api;

pub use api::{
    DedupFailure, DedupReport, Invocation, NodeApi, NodeEvent, NodeMemory, Outcome, RestoreFailure,
    RestoreReport, StartFailure,
};
