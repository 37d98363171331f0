//! The node daemon: runs sandboxes, deduplicates and restores them.
//!
//! A node carries out what the controller decides and reports what it sees. It knows nothing of
//! requests waiting, of keep-alive periods or of other nodes. [`api`] is its interface, the one
//! that a node on another machine will be driven through as well; [`Node`] is the node on this
//! machine.

#![forbid(unsafe_code)]

pub mod api;
mod bases;
mod config;
mod dedup;
mod error;
mod inspect;
mod label;
mod local;
mod operations;
mod recovery;
mod runtimes;
mod shared;
mod spec;
mod table;
mod takeover;

pub use api::{
    DedupFailure, DedupMode, DedupReport, Inheritance, InheritedSandbox, Invocation, NodeApi,
    NodeEvent, NodeMemory, Outcome, RestoreFailure, RestoreReport, StartFailure,
};
pub use config::{DedupConfig, NodeConfig};
pub use error::NodeError;
pub use inspect::InspectError;
pub use local::Node;
pub use runtimes::{RuntimeRecord, Runtimes};
