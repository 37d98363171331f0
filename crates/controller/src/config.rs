//! The controller's settings.

use std::collections::BTreeMap;
use std::path::PathBuf;

use medes_core::Tenant;
use medes_policy::{DEFAULT_BASE_THRESHOLD, PolicySettings};
use serde::{Deserialize, Serialize};

/// The controller's settings. Periods are milliseconds, sizes bytes; a limit of 0 means none.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ControllerConfig {
    /// Where functions, their code and the state store are kept.
    pub data_dir: PathBuf,
    /// The policy that decides over idle sandboxes, unless another was set live.
    pub policy: PolicySettings,
    /// How many dedup operations run at the same time. They cost processor time and memory
    /// bandwidth that requests want as well.
    pub max_dedups: u32,
    /// After an attempt that failed for a passing reason: how long until the next.
    pub dedup_retry_ms: u64,
    /// Whether a restored sandbox stays partly deduplicated.
    pub partial_restore: PartialRestore,
    /// Dedup sandboxes per base snapshot before a function gets another (the paper's T).
    pub base_threshold: u32,
    /// Sandboxes of all functions at once.
    pub max_sandboxes: u32,
    /// Sandboxes of one function whose deployment sets no limit of its own.
    pub max_sandboxes_per_function: u32,
    /// Memory for sandboxes and page store together; 0 means what the node says.
    pub memory_budget: u64,
    /// Requests that may wait for a sandbox which is not being made yet, per function.
    pub queue_limit: usize,
    /// How long a request may wait for a sandbox which is not being made yet.
    pub queue_timeout_ms: u64,
    /// The longest payload of a request.
    pub max_payload: usize,
    /// The longest answer.
    pub max_response: usize,
    /// The largest code archive.
    pub max_code: u64,
    /// The largest code or layer, unpacked.
    pub max_code_unpacked: u64,
    /// The most files and directories in one code archive or directory.
    pub max_code_entries: usize,
    /// How long running requests may go on after a shutdown has begun.
    pub shutdown_grace_ms: u64,
    /// Groups of tenants that trust each other with what their pages have in common. A tenant in no
    /// group shares with nobody.
    pub joined_tenants: Vec<Vec<Tenant>>,
    /// Layers that clients may name: the name in a layer's ARN, and the directory or zip file.
    pub layers: BTreeMap<String, PathBuf>,
}

/// When the pages that nobody touches after a restore stay deduplicated while the sandbox serves
/// requests. It saves their memory; each that is touched after all makes its request wait a little.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PartialRestore {
    /// When memory is short at the time of the restore: within the policy's headroom of the
    /// budget.
    #[default]
    Pressure,
    /// Always.
    Always,
    /// Never: all are brought back in the background, once a sandbox turns out to be used often.
    Never,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/medes"),
            policy: PolicySettings::default(),
            max_dedups: 1,
            dedup_retry_ms: 60_000,
            partial_restore: PartialRestore::default(),
            base_threshold: DEFAULT_BASE_THRESHOLD,
            max_sandboxes: 0,
            max_sandboxes_per_function: 1000,
            memory_budget: 0,
            queue_limit: 1000,
            queue_timeout_ms: 60_000,
            // Lambda's limits: 6 MiB in, and 100 bytes more out.
            max_payload: 6_291_456,
            max_response: 6_291_556,
            max_code: 50 << 20,
            max_code_unpacked: 250 << 20,
            max_code_entries: 100_000,
            shutdown_grace_ms: 10_000,
            joined_tenants: Vec::new(),
            layers: BTreeMap::new(),
        }
    }
}

impl ControllerConfig {
    /// The name of the dedup domain that a tenant's functions belong to: the tenant's own, or that
    /// of the first tenant in its group.
    #[must_use]
    pub fn dedup_group<'a>(&'a self, tenant: &'a Tenant) -> &'a str {
        let group = self.joined_tenants.iter().find(|group| group.contains(tenant));
        group.and_then(|group| group.iter().min()).unwrap_or(tenant).as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_policy::PolicyName;

    #[test]
    fn absent_keys_have_their_defaults() {
        let c: ControllerConfig =
            serde_json::from_str(r#"{"policy":{"name":"latency","idle_ms":5},"max_dedups":2}"#)
                .unwrap();
        assert_eq!(
            c.policy,
            PolicySettings { name: PolicyName::Latency, idle_ms: 5, ..PolicySettings::default() }
        );
        assert_eq!(c.max_dedups, 2);
        assert_eq!(c.queue_limit, ControllerConfig::default().queue_limit);
        let again: ControllerConfig =
            serde_json::from_value(serde_json::to_value(&c).unwrap()).unwrap();
        assert_eq!(again, c);
    }
}
