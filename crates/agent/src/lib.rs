//! The dedup agent: the dedup and restore operations.
//!
//! [`dedup`] turns a live sandbox's private memory into an [`image`]: a table that names, for each
//! page, a base page, a patch or both, and drops the pages. [`restore`] puts them back. The agent
//! knows processes and pages. It does not know which function a sandbox runs or why now, how its
//! cgroup is laid out, or who keeps hold of it meanwhile ([`dedup::Holder`]).

#![forbid(unsafe_code)]

pub mod dedup;
pub mod encode;
mod error;
pub mod image;
pub mod index;
pub mod plan;
mod put_back;
mod read_ahead;
pub mod restore;
pub mod view;
pub mod working_set;

pub use error::RestoreError;
