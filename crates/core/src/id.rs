//! Identifiers, unique in a whole cluster.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One node of the cluster. Node 0 is the only one when all parts run in one process.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct NodeId(pub u32);

/// A dedup domain: the set of sandboxes that may use each other's base pages. One per tenant
/// unless the operator joins tenants on purpose.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct DomainId(pub u32);

/// One deployed version of a function's code and settings.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct FunctionId(pub u64);

/// A base snapshot: the pages of one base sandbox, frozen at one moment, owned by the page store
/// of `node`. Numbers are never used again on a node, so a stale reference can't name new pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SnapshotId {
    /// The node whose page store holds the snapshot.
    pub node: NodeId,
    /// The snapshot's number on that node.
    pub number: u32,
}

/// A base page: one page of a base snapshot, wherever in the cluster it lies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct PageRef {
    /// The snapshot that the page belongs to.
    pub snapshot: SnapshotId,
    /// The page's index in the snapshot, from 0.
    pub page: u32,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.node.0, self.number)
    }
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl $name {
            /// A new random identifier.
            ///
            /// # Panics
            /// If the kernel gives no random bytes, without which nothing here can run safely.
            #[must_use]
            pub fn random() -> Self {
                Self(getrandom::u64().expect("the kernel gives random bytes"))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(s: &str) -> Result<Self, Self::Err> {
                if s.len() != 16 {
                    return Err(ParseIdError);
                }
                u64::from_str_radix(s, 16).map(Self).map_err(|_| ParseIdError)
            }
        }
    };
}

random_id! {
    /// A sandbox, for as long as it lives; shown as 16 hexadecimal digits.
    SandboxId
}

/// An identifier is 16 hexadecimal digits
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an identifier is 16 hexadecimal digits")]
pub struct ParseIdError;

/// One request to a function; shown in the form of a UUID, as Lambda's clients expect.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u128);

impl RequestId {
    /// A new random identifier (UUID version 4).
    ///
    /// # Panics
    /// If the kernel gives no random bytes, without which nothing here can run safely.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = [0u8; 16];
        getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
        bytes[6] = (bytes[6] & 0x0f) | 0x40;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(u128::from_be_bytes(bytes))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            n >> 96,
            (n >> 80) & 0xffff,
            (n >> 64) & 0xffff,
            (n >> 48) & 0xffff,
            n & 0xffff_ffff_ffff
        )
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RequestId {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let digits: String = s.chars().filter(|c| *c != '-').collect();
        if digits.len() != 32 {
            return Err(ParseIdError);
        }
        u128::from_str_radix(&digits, 16).map(Self).map_err(|_| ParseIdError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_survive_their_text_form() {
        let s = SandboxId::random();
        assert_eq!(s.to_string().parse::<SandboxId>(), Ok(s));
        let r = RequestId::random();
        assert_eq!(r.to_string().parse::<RequestId>(), Ok(r));
        assert_eq!(r.to_string().len(), 36);
        assert!("xyz".parse::<SandboxId>().is_err());
    }
}
