//! Names, identifiers and records that every part of Medes shares.
//!
//! This crate is vocabulary only: no I/O, no policy, no knowledge of Linux. Whatever two other
//! crates have to agree on (what a function is, which states a sandbox can be in, how a base page
//! is named) is written down here once.

#![forbid(unsafe_code)]

pub mod function;
pub mod id;
pub mod invocation;
pub mod sandbox;

pub use function::{FunctionName, FunctionSpec, Layout, Tenant};
pub use id::{DomainId, FunctionId, NodeId, PageRef, RequestId, SandboxId, SnapshotId};
pub use invocation::{InvocationError, InvocationResult, MemoryReturn, StartKind, Timing};
pub use sandbox::{MemoryUse, SandboxState};
