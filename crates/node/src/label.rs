//! What the node has the keeper remember of a sandbox, for a node that comes after it.

use medes_core::{DomainId, FunctionId, FunctionName};
use serde::{Deserialize, Serialize};

/// A sandbox's label.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Label {
    pub(crate) function: FunctionId,
    pub(crate) name: FunctionName,
    pub(crate) domain: DomainId,
    pub(crate) host_uid: u32,
}

impl Label {
    /// As the keeper stores it. JSON: a node that knows more or less can still read it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data serialises")
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|error| format!("its label can't be read: {error}"))
    }
}
