//! What a function is: its name, its code and its settings.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{DomainId, FunctionId};

/// A function's name: 1 to 64 letters, digits, `-` and `_`, as AWS Lambda allows.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FunctionName(String);

impl FunctionName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A function's name is 1 to 64 letters, digits, hyphens and underscores
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no function name: 1 to 64 letters, digits, hyphens and underscores")]
pub struct BadFunctionName(String);

impl FromStr for FunctionName {
    type Err = BadFunctionName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let fits = (1..=64).contains(&s.len())
            && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if fits {
            Ok(Self(s.to_owned()))
        } else {
            Err(BadFunctionName(s.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for FunctionName {
    type Error = BadFunctionName;

    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<FunctionName> for String {
    fn from(n: FunctionName) -> Self {
        n.0
    }
}

impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose a function is: 1 to 64 letters, digits, `-` and `_`. What belongs to different tenants is
/// kept apart: no page of one is ever compared with a page of another.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tenant(String);

impl Tenant {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

/// A tenant's name is 1 to 64 letters, digits, hyphens and underscores
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no tenant's name: 1 to 64 letters, digits, hyphens and underscores")]
pub struct BadTenant(String);

impl FromStr for Tenant {
    type Err = BadTenant;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        // The same alphabet as a function's name.
        match s.parse::<FunctionName>() {
            Ok(name) => Ok(Self(name.into())),
            Err(_) => Err(BadTenant(s.chars().take(80).collect())),
        }
    }
}

impl TryFrom<String> for Tenant {
    type Error = BadTenant;

    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<Tenant> for String {
    fn from(t: Tenant) -> Self {
        t.0
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which sandboxes share one address-space layout.
///
/// Equal layouts make equal pages: with them nine tenths of a sandbox's memory is found in
/// another one, without them a third.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// All sandboxes of one function have one layout, drawn at random for that function.
    #[default]
    Function,
    /// All functions of a dedup domain have one layout.
    Shared,
    /// Every sandbox has a layout of its own (the kernel's ASLR).
    Random,
}

/// A deployed function: everything that is needed to start a sandbox for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FunctionSpec {
    /// This version's identifier; another deployment of the same name gets another.
    pub id: FunctionId,
    /// The name that clients call it by.
    pub name: FunctionName,
    /// Whose function it is.
    #[serde(default)]
    pub tenant: Tenant,
    /// Whose base pages its sandboxes may use: those of its tenant, and of tenants that the
    /// operator has joined with it.
    pub domain: DomainId,
    /// The runtime's name, such as `python3.11`.
    pub runtime: String,
    /// The handler, in the runtime's own notation, such as `app.handler`.
    pub handler: String,
    /// The directory with the unpacked code, mounted read-only at `/var/task`.
    pub code: PathBuf,
    /// Base64 of the SHA-256 of the code archive, as Lambda's `CodeSha256`.
    pub code_sha256: String,
    /// The size of the code archive, bytes.
    pub code_size: u64,
    /// Directories merged, first to last, below `/opt`.
    pub layers: Vec<PathBuf>,
    /// Environment variables of the user's.
    pub environment: BTreeMap<String, String>,
    /// Memory limit of one sandbox, MiB.
    pub memory_mib: u32,
    /// How long one request may run, milliseconds.
    pub timeout_ms: u64,
    /// At most this many sandboxes at once; 0 means no limit of its own.
    pub max_sandboxes: u32,
    /// Which sandboxes share one address-space layout.
    pub layout: Layout,
    /// Where the layout and the runtime's hash seed come from: drawn once per function (or per
    /// domain, for [`Layout::Shared`]) and kept secret from others.
    pub layout_seed: u64,
    /// A description, free text.
    pub description: String,
    /// When this version was deployed, milliseconds since 1970.
    pub deployed_at_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!("html-serve_2".parse::<FunctionName>().is_ok());
        for bad in ["", "a b", "../x", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<FunctionName>().is_err(), "{bad:?}");
        }
    }
}
