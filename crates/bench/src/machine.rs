//! Where and when something was measured: figures mean nothing without it.

use serde::Serialize;

/// From here on stolen time is worth a word, percent.
const NOTEWORTHY: f64 = 0.5;

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
    /// How much of the processors' time the machine's host gave to others meanwhile, percent, once the
    /// measurement is over: all times are longer for it, the longest most.
    pub stolen_percent: Option<f64>,
    #[serde(skip)]
    began: ProcessorTime,
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
            stolen_percent: None,
            began: ProcessorTime::now(),
        }
    }

    /// Notes that the measurement is over.
    #[must_use]
    pub fn until_now(mut self) -> Self {
        self.stolen_percent = self.began.stolen_percent();
        self
    }

    /// What a reader of the figures should know of them; empty if there is nothing.
    #[must_use]
    pub fn note(&self) -> String {
        match self.stolen_percent {
            Some(percent) if percent >= NOTEWORTHY => format!(
                "\nThe machine's host gave {percent:.1} % of the processors' time to others \
                 meanwhile (steal): times are longer\nfor it, p99 most.\n"
            ),
            _ => String::new(),
        }
    }
}

/// The time of all processors so far, as the kernel counts it in `/proc/stat`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessorTime {
    all: u64,
    stolen: u64,
}

impl ProcessorTime {
    /// Until now.
    #[must_use]
    pub fn now() -> Self {
        Self::parse(&read("/proc/stat")).unwrap_or_default()
    }

    /// The share that a virtual machine's host has given to others since then, percent; nothing if the
    /// kernel does not tell.
    #[must_use]
    pub fn stolen_percent(&self) -> Option<f64> {
        Self::now().stolen_since(self)
    }

    fn stolen_since(&self, before: &Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        let percent = self.stolen.saturating_sub(before.stolen) as f64 / all as f64 * 100.0;
        Some((percent * 100.0).round() / 100.0)
    }

    /// The first line: user, nice, system, idle, iowait, irq, softirq and steal; guests' time, which
    /// follows, is part of the first two.
    fn parse(stat: &str) -> Option<Self> {
        let fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let fields: Vec<u64> = fields.take(8).map(|f| f.parse().ok()).collect::<Option<_>>()?;
        Some(Self { all: fields.iter().sum(), stolen: *fields.get(7)? })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_a_share_of_all() {
        let at = |stat| ProcessorTime::parse(stat).unwrap();
        let before = at("cpu  100 0 50 800 10 0 5 35 7 0\ncpu0 1 2 3\n");
        let after = at("cpu  200 0 100 1600 20 0 10 70 14 0\n");
        assert_eq!(after.stolen_since(&before), Some(3.5));
        assert_eq!(after.stolen_since(&after), None);
        assert!(ProcessorTime::parse("cpu  1 2 3\n").is_none());
    }
}
