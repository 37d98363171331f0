//! What an operator wants of the Medes policy.

use serde::{Deserialize, Serialize};

/// The trade-off between latency and memory.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// P1: the least memory such that a function's startup latency stays within this multiple of
    /// a warm startup. The paper's evaluation uses 2.5.
    Latency {
        /// The multiple.
        alpha: f64,
    },
    /// P2: the least startup latency such that the memory of all sandboxes stays within a budget.
    Memory {
        /// The budget, bytes; 0 means all memory that there is.
        budget: u64,
    },
}

/// How an [`Objective`] is worked out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// By the paper's equations, which count what sandboxes could serve, and with budgets in
    /// proportion to functions' rates.
    Paper,
    /// By the requests that idle sandboxes do serve, and with memory going where another byte
    /// saves the most waiting.
    #[default]
    Served,
}
