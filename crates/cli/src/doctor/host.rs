//! The machine's resources: memory, disk, the API's port.

use std::net::TcpListener;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::Verdict::{Fail, Warn};
use super::{Check, read};
use crate::config::Config;

/// All checks of this module.
pub fn checks(config: &Config) -> Vec<Check> {
    vec![memory(config), disk(&config.node.data_dir), listen(config)]
}

/// The machine's memory: all of it, and what is available, bytes.
fn machine_memory() -> (u64, u64) {
    let table = read("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| -> u64 {
        table
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0)
    };
    (kib("MemTotal") << 10, kib("MemAvailable") << 10)
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn memory(config: &Config) -> Check {
    let (total, available) = machine_memory();
    let budget = config.node.memory_budget.of(total);
    let found = format!("{} of {} available, budget {}", gib(available), gib(total), gib(budget));
    if budget > available {
        return Check::not(
            Warn,
            "memory",
            found,
            "the budget is more than what is available now: the machine could run out of memory",
            "lower node.memory_budget, or end other programs",
        );
    }
    Check::ok("memory", found)
}

fn disk(data_dir: &Path) -> Check {
    let place = data_dir.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    match statvfs(place) {
        Ok(s) => {
            let free = s.blocks_available() * s.fragment_size();
            let found = format!("{} free for {}", gib(free), data_dir.display());
            if free < 2 << 30 {
                return Check::not(
                    Warn,
                    "disk",
                    found,
                    "code, layers and logs of functions may not fit",
                    "free some space, or move node.data_dir",
                );
            }
            Check::ok("disk", found)
        }
        Err(e) => Check::not(
            Fail,
            "disk",
            format!("{}: {e}", data_dir.display()),
            "the platform can't keep its state",
            "make node.data_dir usable",
        ),
    }
}

fn listen(config: &Config) -> Check {
    let address = config.api.listen;
    match TcpListener::bind(address) {
        Ok(_) if address.ip().is_loopback() => {
            Check::ok("API address", format!("{address} is free"))
        }
        Ok(_) => Check::not(
            Warn,
            "API address",
            format!("{address} is not loopback"),
            "the API has no authentication: whoever reaches it can run code here",
            "set api.listen to 127.0.0.1:9400, or protect the port",
        ),
        Err(e) => Check::not(
            Warn,
            "API address",
            format!("{address}: {e}"),
            "`medes serve` can't start, unless it is what listens there already",
            "end what listens there, or change api.listen",
        ),
    }
}
