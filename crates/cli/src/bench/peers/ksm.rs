//! The kernel's same-page merging.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use medes_memory::leave::allow_merging;
use medes_memory::session::on_tracer_thread;

use super::setting::{Setting, read, write};
use super::{FREEZE_LIMIT, Keeping, Sandbox};

const KSM: &str = "/sys/kernel/mm/ksm";

/// How long merging may take at the kernel's defaults, which look at 5,000 pages a second.
const DEFAULT_WAIT: Duration = Duration::from_secs(10);
/// The most that is waited for scans of the whole memory at full speed.
const TUNED_WAIT: Duration = Duration::from_secs(10);
/// Pages are remembered in one scan, found unchanged in the next, and merged in a third.
const FIRST_SCANS: u64 = 3;
/// Scans after a request, whose pages are known already.
const LATER_SCANS: u64 = 2;

/// What the kernel keeps for each page that it watches, bytes (`struct ksm_rmap_item`).
const RMAP_ITEM_BYTES: u64 = 64;

/// Frozen, equal pages merged.
pub(super) struct Ksm {
    tuned: bool,
    processes: Vec<i32>,
    _settings: Vec<Setting>,
}

fn file(name: &str) -> PathBuf {
    Path::new(KSM).join(name)
}

impl Ksm {
    /// At the kernel's defaults, or `tuned`: as fast as it can, for as long as it takes.
    pub(super) fn start(tuned: bool) -> Result<Self> {
        let run = Setting::set(file("run"), "0").context("no KSM in this kernel (CONFIG_KSM)")?;
        let (pages, sleep) = if tuned { ("20000", "0") } else { ("100", "20") };
        let mut settings = vec![run];
        if file("advisor_mode").exists() {
            // An advisor would set the pace by itself.
            settings.push(Setting::set(file("advisor_mode"), "none")?);
        }
        settings.push(Setting::set(file("pages_to_scan"), pages)?);
        settings.push(Setting::set(file("sleep_millisecs"), sleep)?);
        Ok(Self { tuned, processes: Vec::new(), _settings: settings })
    }

    fn scan(&self, scans: u64, limit: Duration) -> Result<()> {
        let count = || -> Result<u64> { Ok(read(&file("full_scans"))?.parse()?) };
        let (start, target) = (Instant::now(), count()? + scans);
        write(&file("run"), "1")?;
        while count()? < target && start.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Keeping for Ksm {
    fn note(&self) -> String {
        let pace = if self.tuned {
            "ksmd at full speed for two or three scans, then stopped".to_owned()
        } else {
            format!("ksmd at its defaults, {} s at first", DEFAULT_WAIT.as_secs())
        };
        format!("frozen, PR_SET_MEMORY_MERGE, {pace}")
    }

    fn prepare(&mut self, sandbox: &Sandbox) -> Result<()> {
        let processes = sandbox.cgroup.processes()?;
        for process in &processes {
            on_tracer_thread(|| allow_merging(*process))?;
        }
        self.processes.extend(processes);
        Ok(())
    }

    fn put_away(&mut self, sandbox: &Sandbox) -> Result<()> {
        Ok(sandbox.cgroup.freeze(FREEZE_LIMIT)?)
    }

    fn settle(&mut self, first: bool) -> Result<()> {
        match (self.tuned, first) {
            (false, true) => self.scan(u64::MAX / 2, DEFAULT_WAIT),
            (false, false) => Ok(()),
            (true, first) => {
                self.scan(if first { FIRST_SCANS } else { LATER_SCANS }, TUNED_WAIT)?;
                write(&file("run"), "0")
            }
        }
    }

    fn bring_back(&mut self, sandbox: &Sandbox) -> Result<()> {
        Ok(sandbox.cgroup.thaw()?)
    }

    fn store_bytes(&mut self) -> Result<u64> {
        let mut items = 0;
        for process in &self.processes {
            let Ok(text) = read(Path::new(&format!("/proc/{process}/ksm_stat"))) else { continue };
            let line = text.lines().find_map(|line| line.strip_prefix("ksm_rmap_items"));
            items += line.and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(items * RMAP_ITEM_BYTES)
    }
}
