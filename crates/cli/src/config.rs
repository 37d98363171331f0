//! The configuration file: its keys, their defaults, and where it is looked for.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use medes_controller::PartialRestore;
use medes_core::Tenant;
use medes_policy::{PolicyName, PolicySettings};
use serde::{Deserialize, Serialize};

use crate::units::{MemoryAmount, Period, Size};

/// Where the configuration is looked for when neither `--config` nor `$MEDES_CONFIG` names it.
pub const DEFAULT_PATH: &str = "/etc/medes/medes.toml";

/// The whole configuration of a platform.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The front door.
    pub api: Api,
    /// This machine as a node.
    pub node: Node,
    /// Who decides over idle sandboxes.
    pub policy: Policy,
    /// When sandboxes change state.
    pub lifecycle: Lifecycle,
    /// The dedup engine.
    pub dedup: Dedup,
    /// What one client or function may use.
    pub limits: Limits,
    /// The platform's own log.
    pub log: Log,
    /// Layers that clients of Lambda's API may name in an ARN: a directory or a `.zip` file each.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, PathBuf>,
    /// Interpreters for runtimes, by the runtime's name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub runtimes: BTreeMap<String, Runtime>,
}

/// The front door.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// Address and port of the HTTP API.
    pub listen: SocketAddr,
    /// Whether clients may have any process of this host deduplicated (`/v1/attached`).
    pub attach: bool,
}

impl Default for Api {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9400)), attach: false }
    }
}

/// This machine as a node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Node {
    /// Functions, layers, runtimes, logs and the state store.
    pub data_dir: PathBuf,
    /// Sockets and mount points; empty after a clean end.
    pub run_dir: PathBuf,
    /// The cgroup that all sandboxes live under, relative to each hierarchy's root.
    pub cgroup: String,
    /// The first of the user ids that sandboxes run under.
    pub uid_base: u32,
    /// Memory for sandboxes and the page store together.
    pub memory_budget: MemoryAmount,
    /// The most that the page store may hold.
    pub store_capacity: MemoryAmount,
    /// What is kept of each function's log.
    pub log_bytes_per_function: Size,
    /// The size of a sandbox's private scratch, its `/tmp`.
    pub scratch_size: Size,
    /// The most processes and threads that a sandbox may have.
    pub pids_max: u32,
    /// How long a runtime may take until it asks for its first request.
    pub init_timeout: Period,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            data_dir: "/var/lib/medes".into(),
            run_dir: "/run/medes".into(),
            cgroup: "medes".into(),
            uid_base: 2_000_000,
            memory_budget: MemoryAmount::Percent(80),
            store_capacity: MemoryAmount::Percent(40),
            log_bytes_per_function: Size::mib(8),
            scratch_size: Size::mib(512),
            pids_max: 1024,
            init_timeout: Period::secs(60),
        }
    }
}

/// Who decides over idle sandboxes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// The policy's name.
    pub name: PolicyName,
    /// The latency target, as a multiple of a warm startup.
    pub alpha: f64,
    /// The memory budget of all sandboxes; 0 for what the node has.
    pub budget: Size,
    /// The share of the memory that dedup keeps free ahead of time, percent.
    pub headroom: u8,
}

impl Default for Policy {
    fn default() -> Self {
        let PolicySettings { name, alpha, headroom_percent, .. } = PolicySettings::default();
        Self { name, alpha, budget: Size::default(), headroom: headroom_percent }
    }
}

/// When sandboxes change state.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lifecycle {
    /// How long a sandbox is idle before it is deduplicated.
    pub idle: Period,
    /// How long an idle sandbox stays warm before it is purged.
    pub keep_alive: Period,
    /// How long a sandbox stays in the dedup state before it is purged.
    pub keep_dedup: Period,
    /// How many dedup operations run at the same time.
    pub max_dedups: u32,
    /// How long running requests may go on after a shutdown has begun.
    pub shutdown_grace: Period,
    /// Whether sandboxes go on when the daemon ends in order, for the next one to take over.
    pub keep_sandboxes: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            idle: Period::secs(60),
            keep_alive: Period::secs(600),
            keep_dedup: Period::secs(900),
            max_dedups: 1,
            shutdown_grace: Period::secs(10),
            keep_sandboxes: false,
        }
    }
}

/// The dedup engine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dedup {
    /// Chunks in a page's fingerprint.
    pub cardinality: u32,
    /// Bytes in a chunk.
    pub chunk_size: u32,
    /// Dedup sandboxes per base sandbox before a function gets another base (T in the paper).
    pub base_threshold: u32,
    /// Groups of tenants that may use each other's base pages.
    pub joined_tenants: Vec<Vec<Tenant>>,
    /// When pages that nobody touches after a restore stay deduplicated.
    pub partial_restore: PartialRestore,
    /// How long bringing a dedup sandbox back may take before some of its working set stays in
    /// memory instead, or a sixteenth of what requests take if that is longer; zero: only what would
    /// take as much in the page store stays.
    pub restore_target: Period,
    /// Threads that one dedup operation uses.
    pub workers: u32,
}

impl Default for Dedup {
    fn default() -> Self {
        Self {
            cardinality: 5,
            chunk_size: 64,
            base_threshold: 40,
            joined_tenants: Vec::new(),
            partial_restore: PartialRestore::default(),
            restore_target: Period(Duration::from_millis(2)),
            workers: 1,
        }
    }
}

/// What one client or function may use.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The longest payload of a request.
    pub payload: Size,
    /// The longest answer.
    pub response: Size,
    /// The largest code archive, packed.
    pub code: Size,
    /// The largest code archive or layer, unpacked.
    pub code_unpacked: Size,
    /// Requests that may wait for a sandbox, per function.
    pub queue: u32,
    /// How long a request may wait for a sandbox.
    pub queue_wait: Period,
    /// Sandboxes of all functions at once; 0 for no limit but memory.
    pub max_sandboxes: u32,
    /// Sandboxes of one function, unless its deployment says otherwise.
    pub max_sandboxes_per_function: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Lambda's limits: 6 MiB in, and 100 bytes more out.
            payload: Size::mib(6),
            response: Size((6 << 20) + 100),
            code: Size::mib(50),
            code_unpacked: Size::mib(250),
            queue: 1000,
            queue_wait: Period::secs(60),
            max_sandboxes: 0,
            max_sandboxes_per_function: 1000,
        }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The platform's own log.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// error, warn, info, debug or trace, or directives such as `info,medes_node=debug`.
    pub level: String,
    /// The form of log lines.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Where a runtime's interpreter is, if not in `$PATH`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// The interpreter.
    pub path: PathBuf,
}

/// One line for each key, in the order in which they are shown.
const COMMENTS: &[(&str, &[(&str, &str)])] = &[
    (
        "api",
        &[
            (
                "listen",
                "Address and port of the HTTP API. There is no authentication: keep it on loopback.",
            ),
            (
                "attach",
                "Whether clients may have any process of this host deduplicated (/v1/attached).",
            ),
        ],
    ),
    (
        "node",
        &[
            ("data_dir", "Functions, layers, runtimes, logs and the state store."),
            ("run_dir", "Sockets and mount points; empty after a clean end."),
            (
                "cgroup",
                "The cgroup that all sandboxes live under, relative to each hierarchy's root.",
            ),
            (
                "uid_base",
                "The first of the user ids that sandboxes run under; nothing else may use them.",
            ),
            (
                "memory_budget",
                "Memory for sandboxes and the page store together: bytes, or a share of the machine's.",
            ),
            (
                "store_capacity",
                "The most that the page store may hold: bytes, or a share of the machine's memory.",
            ),
            ("log_bytes_per_function", "What is kept of each function's log."),
            ("scratch_size", "The size of a sandbox's private scratch, its /tmp."),
            ("pids_max", "The most processes and threads that a sandbox may have."),
            ("init_timeout", "How long a runtime may take until it asks for its first request."),
        ],
    ),
    (
        "policy",
        &[
            (
                "name",
                "\"periods\": dedup after the idle period; \"latency\", \"memory\": to a target; \
                 \"fixed\", \"adaptive\", \"greedy-dual\": never dedup.",
            ),
            ("alpha", "The latency target: the multiple of a warm startup that a startup may be."),
            ("budget", "The memory budget of all sandboxes; 0 for what the node has."),
            ("headroom", "The share of the memory that dedup keeps free ahead of time, percent."),
        ],
    ),
    (
        "lifecycle",
        &[
            ("idle", "How long a sandbox is idle before it is deduplicated."),
            ("keep_alive", "How long an idle sandbox stays warm before it is purged."),
            ("keep_dedup", "How long a sandbox stays in the dedup state before it is purged."),
            ("max_dedups", "How many dedup operations run at the same time."),
            ("shutdown_grace", "How long running requests may go on after a shutdown has begun."),
            (
                "keep_sandboxes",
                "Whether sandboxes go on when the daemon ends in order, for the next one to take over.",
            ),
        ],
    ),
    (
        "dedup",
        &[
            ("cardinality", "Chunks in a page's fingerprint: 5, 10 or 20."),
            ("chunk_size", "Bytes in a chunk: 32, 64 or 128."),
            (
                "base_threshold",
                "Dedup sandboxes per base sandbox before a function gets another base.",
            ),
            (
                "joined_tenants",
                "Groups of tenants that may use each other's base pages: [[\"a\", \"b\"], ...].",
            ),
            (
                "partial_restore",
                "Pages that nobody touches after a restore stay deduplicated: \"pressure\" (while memory \
                 is short), \"always\" or \"never\".",
            ),
            (
                "restore_target",
                "How long bringing a sandbox back may take; or a sixteenth of what the function's \
                 requests take, if that is longer. Of a larger working set some pages stay in memory, a \
                 sixth of the sandbox at most, while there is plenty; \"0\": for the least memory.",
            ),
            ("workers", "Threads that one dedup operation uses."),
        ],
    ),
    (
        "limits",
        &[
            ("payload", "The longest payload of a request."),
            ("response", "The longest answer."),
            ("code", "The largest code archive, packed."),
            ("code_unpacked", "The largest code archive or layer, unpacked."),
            ("queue", "Requests that may wait for a sandbox, per function."),
            ("queue_wait", "How long a request may wait for a sandbox."),
            ("max_sandboxes", "Sandboxes of all functions at once; 0 for no limit but memory."),
            (
                "max_sandboxes_per_function",
                "Sandboxes of one function, unless its deployment says otherwise.",
            ),
        ],
    ),
    (
        "log",
        &[
            (
                "level",
                "error, warn, info, debug, trace, or directives such as \"info,medes_node=debug\".",
            ),
            ("format", "\"text\" or \"json\"."),
        ],
    ),
];

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{path}: cannot read the configuration: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The text is not what it should be.
    #[error("{path}:{line}: {message} (`medes config --default` shows every key)")]
    Parse {
        /// The file.
        path: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value is well-formed but makes no sense.
    #[error("{path}: {key}: {message}")]
    Value {
        /// The file.
        path: String,
        /// Section and key.
        key: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

impl Config {
    /// Reads the configuration: the file that is named, else the default file if it exists,
    /// else the defaults. Gives the path that was read too.
    ///
    /// # Errors
    /// If a named file can't be read, or any file is not a valid configuration.
    pub fn load(named: Option<&Path>) -> Result<(Self, Option<PathBuf>), ConfigError> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let config = Self::parse(&text, &path.display().to_string())?;
                Ok((config, Some(path.to_owned())))
            }
            Err(e) if named.is_none() && e.kind() == std::io::ErrorKind::NotFound => {
                Ok((Self::default(), None))
            }
            Err(source) => Err(ConfigError::Read { path: path.display().to_string(), source }),
        }
    }

    /// Reads a configuration from text; `origin` names it in errors.
    ///
    /// # Errors
    /// If the text is not TOML, has keys that don't exist, or values that make no sense.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let start = e.span().map_or(0, |s| s.start).min(text.len());
            ConfigError::Parse {
                path: origin.to_owned(),
                line: 1 + text.as_bytes()[..start].iter().filter(|b| **b == b'\n').count(),
                message: e.message().to_owned(),
            }
        })?;
        config.check(origin)?;
        Ok(config)
    }

    fn check(&self, origin: &str) -> Result<(), ConfigError> {
        let is = |fits: bool, key: &'static str, message: &str| {
            if fits {
                return Ok(());
            }
            Err(ConfigError::Value { path: origin.to_owned(), key, message: message.to_owned() })
        };
        let simple_cgroup = !self.node.cgroup.is_empty()
            && !self.node.cgroup.starts_with('/')
            && self.node.cgroup.split('/').all(|part| !matches!(part, "" | "." | ".."));
        is(simple_cgroup, "node.cgroup", "a relative path without `..`")?;
        is(self.node.data_dir.is_absolute(), "node.data_dir", "must be an absolute path")?;
        is(self.node.run_dir.is_absolute(), "node.run_dir", "must be an absolute path")?;
        is(self.node.uid_base >= 65_536, "node.uid_base", "65536 or more: lower ids are in use")?;
        is(
            [5, 10, 20].contains(&self.dedup.cardinality),
            "dedup.cardinality",
            "must be 5, 10 or 20",
        )?;
        is(
            [32, 64, 128].contains(&self.dedup.chunk_size),
            "dedup.chunk_size",
            "must be 32, 64 or 128",
        )?;
        is(self.dedup.workers > 0, "dedup.workers", "must be 1 or more")?;
        is(self.dedup.base_threshold > 0, "dedup.base_threshold", "must be 1 or more")?;
        is(self.lifecycle.max_dedups > 0, "lifecycle.max_dedups", "must be 1 or more")?;
        self.policy_settings().check().map_err(|bad| {
            let key = match bad.setting {
                "alpha" => "policy.alpha",
                "headroom_percent" => "policy.headroom",
                "keep_alive_ms" => "lifecycle.keep_alive",
                "keep_dedup_ms" => "lifecycle.keep_dedup",
                _ => "lifecycle.idle",
            };
            let (path, message) = (origin.to_owned(), bad.message.to_owned());
            ConfigError::Value { path, key, message }
        })
    }

    /// The policy with its periods.
    pub fn policy_settings(&self) -> PolicySettings {
        PolicySettings {
            name: self.policy.name,
            alpha: self.policy.alpha,
            budget: self.policy.budget.0,
            idle_ms: self.lifecycle.idle.millis(),
            keep_alive_ms: self.lifecycle.keep_alive.millis(),
            keep_dedup_ms: self.lifecycle.keep_dedup.millis(),
            headroom_percent: self.policy.headroom,
        }
    }

    /// The configuration as TOML with a comment above each key.
    ///
    /// # Panics
    /// Never: every value has a TOML form.
    pub fn render(&self) -> String {
        let tree = toml::Table::try_from(self).expect("a configuration has a TOML form");
        let mut out = String::new();
        for (section, keys) in COMMENTS {
            let _ = writeln!(out, "[{section}]");
            for (key, comment) in *keys {
                let _ = writeln!(out, "# {comment}\n{key} = {}", tree[*section][*key]);
            }
            out.push('\n');
        }
        self.render_maps(&mut out);
        out
    }

    fn render_maps(&self, out: &mut String) {
        let text = |s: &str| toml::Value::from(s).to_string();
        out.push_str("# Layers that clients of Lambda's API may name in an ARN.\n");
        if self.layers.is_empty() {
            out.push_str("# [layers]\n# numpy = \"/srv/layers/numpy\"\n");
        } else {
            out.push_str("[layers]\n");
        }
        for (name, path) in &self.layers {
            let _ = writeln!(out, "{} = {}", text(name), text(&path.display().to_string()));
        }
        out.push_str("\n# Where a runtime's interpreter is, if not in $PATH.\n");
        if self.runtimes.is_empty() {
            out.push_str("# [runtimes.\"python3.11\"]\n# path = \"/usr/bin/python3.11\"\n");
        }
        for (name, runtime) in &self.runtimes {
            let path = text(&runtime.path.display().to_string());
            let _ = writeln!(out, "[runtimes.{}]\npath = {path}", text(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_reads_back_as_the_same() {
        let mut config = Config::default();
        assert_eq!(Config::parse(&config.render(), "x").unwrap(), config);
        config.lifecycle.idle = "1500ms".parse().unwrap();
        config.policy.name = PolicyName::LatencyPaper;
        config.policy.alpha = 1.25;
        config.policy.budget = Size::mib(3000);
        config.node.memory_budget = "3 GiB".parse().unwrap();
        config.log.level = "info,medes_node=\"debug\"".into();
        config.layers.insert("num py".into(), "/srv/numpy.zip".into());
        config.runtimes.insert("python3.11".into(), Runtime { path: "/opt/py thon".into() });
        assert_eq!(Config::parse(&config.render(), "x").unwrap(), config);
    }

    #[test]
    fn every_key_is_shown_with_a_comment() {
        let tree = toml::Table::try_from(Config::default()).unwrap();
        let shown: Vec<_> = COMMENTS
            .iter()
            .flat_map(|(s, keys)| keys.iter().map(move |(k, _)| format!("{s}.{k}")))
            .collect();
        let mut all: Vec<_> = tree
            .iter()
            .flat_map(|(s, keys)| keys.as_table().unwrap().keys().map(move |k| format!("{s}.{k}")))
            .collect();
        let mut sorted = shown.clone();
        sorted.sort();
        all.sort();
        assert_eq!(sorted, all);
    }

    #[test]
    fn absent_keys_have_their_defaults() {
        let config = Config::parse("[lifecycle]\nidle = \"2s\"\n", "x").unwrap();
        assert_eq!(config.lifecycle.idle, Period::secs(2));
        assert_eq!(config.lifecycle.keep_alive, Lifecycle::default().keep_alive);
        assert_eq!(config.api, Api::default());
    }

    #[test]
    fn unknown_keys_are_named_with_their_line() {
        let e = Config::parse("[node]\ncgroup = \"a\"\nmemroy = 1\n", "m.toml").unwrap_err();
        let text = e.to_string();
        assert!(text.starts_with("m.toml:3: "), "{text}");
        assert!(text.contains("`memroy`") && text.contains("`memory_budget`"), "{text}");
        let e = Config::parse("\n[nod]\n", "m.toml").unwrap_err().to_string();
        assert!(e.starts_with("m.toml:2: ") && e.contains("`nod`"), "{e}");
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, part) in [
            ("[lifecycle]\nidle = \"soon\"", "m.toml:2: \"soon\" is no duration"),
            ("[policy]\nname = \"lru\"", "greedy-dual"),
            ("[policy]\nalpha = 0.5", "policy.alpha: 1 or more"),
            ("[policy]\nheadroom = 60", "policy.headroom: at most 50"),
            ("[api]\nlisten = \"here\"", "m.toml:2: "),
            ("[dedup]\ncardinality = 6", "dedup.cardinality: must be 5, 10 or 20"),
            ("[node]\ncgroup = \"../x\"", "node.cgroup"),
            ("[node]\nuid_base = 1000", "node.uid_base"),
            ("[node\n", "m.toml:1: "),
        ] {
            let e = Config::parse(text, "m.toml").unwrap_err().to_string();
            assert!(e.contains(part), "{e}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let e = Config::load(Some(Path::new("/nonexistent/m.toml"))).unwrap_err().to_string();
        assert!(e.contains("/nonexistent/m.toml"), "{e}");
    }
}
