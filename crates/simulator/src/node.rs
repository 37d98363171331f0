//! One node: its memory and who may give way.

use std::collections::VecDeque;

use medes_policy::{AgingClock, Pressure};

/// A node.
#[derive(Default)]
pub(crate) struct Node {
    /// In use or promised, bytes.
    pub(crate) used: u64,
    pub(crate) sandboxes: u32,
    /// Places of idle sandboxes, warm or dedup, in no order.
    pub(crate) idle: Vec<u32>,
    /// What those use, bytes.
    pub(crate) idle_bytes: u64,
    /// Dedup operations under way.
    pub(crate) dedups: u32,
    /// What those will free, bytes.
    pub(crate) coming: u64,
    /// Sandboxes that should go dedup once an operation may begin, with their epochs.
    pub(crate) dedup_queue: VecDeque<(u32, u32)>,
    pub(crate) clock: AgingClock,
}

impl Node {
    pub(crate) fn pressure(&self, budget: u64) -> Pressure {
        Pressure { used: self.used, budget }
    }
}
