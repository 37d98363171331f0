//! The keeper: the small, long-lived process that sandboxes depend on.
//!
//! A sandbox lives as long as its keeper, not as long as the daemon: the keeper is the parent of
//! every sandbox, answers its runtime's Runtime API connection (which a runtime does not survive
//! losing), reads its log, and holds what brings a dedup sandbox's memory back: the userfaultfds
//! and a mapping of the page store. It decides nothing. It does what the daemon says over a Unix
//! socket ([`protocol`]) and reports what sandboxes do; it knows no function, no schedule, no
//! fingerprint.
//!
//! When the daemon's connection ends, the keeper by itself puts right what the daemon left in the
//! middle, and lets requests come to their end; the next daemon asks what there is
//! ([`Keeper::take_over`]) and goes on from there.
//!
//! [`run`] is the keeper itself; [`Keeper`] is the daemon's handle of it.

mod caller;
mod client;
pub mod logs;
pub mod protocol;
mod returning;
mod sandbox;
mod server;
mod spawner;

pub use client::{Inheritance, Inherited, InheritedMemory, Keeper, KeeperError, Unasked};
pub use server::{KeeperConfig, run};
