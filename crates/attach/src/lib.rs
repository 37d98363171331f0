//! Dedup and restore of processes that somebody else started: a process tree, a cgroup, a
//! container.
//!
//! Whoever takes a process's memory away has to stay: to hold what brings it back, and to answer
//! its page faults meanwhile. That is the [`holder`], a small process of its own. Commands and the
//! platform's API talk to it through a [`Client`], which starts it when there is none; it ends when
//! nothing is attached any more, nor watched: for some minutes after a restore it follows what the
//! processes write to, so that another dedup costs that. If it is killed, so are the processes that
//! lack pages ([`medes_memory::guard`]): none ever reads a missing page as zeros.
//!
//! Nothing of a container is changed, neither its image nor its configuration: its processes are
//! frozen and traced from outside, with its seccomp filters suspended for what is injected.

#![forbid(unsafe_code)]

mod attached;
mod cells;
mod client;
mod container;
mod engines;
mod events;
pub mod holder;
mod processes;
pub mod protocol;
mod refusal;
mod returning;
mod target;
mod watched;

pub use client::{Client, ClientError};
pub use target::{Target, TargetError};

/// Where the holder's socket is unless told otherwise.
pub const RUN_DIR: &str = "/run/medes-attach";
