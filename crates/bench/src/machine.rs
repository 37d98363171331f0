//! Where and when something was measured: figures mean nothing without it.

use serde::Serialize;

/// The machine, the moment and the version that figures belong to. Part of every report's top
/// level.
#[derive(Clone, Debug, Serialize)]
pub struct Circumstances {
    /// The machine.
    pub machine: Machine,
    /// When the measurement began.
    pub date: String,
    /// The version of Medes.
    pub version: &'static str,
    /// The kernel's one-minute load average when the measurement began: what else was going on.
    pub load: f64,
    /// Whether this program was compiled with optimisation.
    pub release: bool,
}

/// A machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// Memory.
    pub memory_bytes: u64,
    /// The kernel's release.
    pub kernel: String,
}

impl Circumstances {
    /// Here and now.
    #[must_use]
    pub fn now() -> Self {
        let load = read("/proc/loadavg");
        Self {
            machine: Machine::this(),
            date: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            version: env!("CARGO_PKG_VERSION"),
            load: load.split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0),
            release: !cfg!(debug_assertions),
        }
    }
}

impl Machine {
    /// This machine.
    #[must_use]
    pub fn this() -> Self {
        let field = |path: &str, name: &str| {
            let text = read(path);
            let line = text.lines().find_map(|l| l.strip_prefix(name));
            line.map(|l| l.trim_start_matches([' ', '\t', ':']).to_owned())
        };
        let memory = field("/proc/meminfo", "MemTotal").unwrap_or_default();
        let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
        Self {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
