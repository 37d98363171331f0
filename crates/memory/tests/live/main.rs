//! Live processes taken through eviction and restore, on the running kernel.
//!
//! The processes are this test binary itself, started again as one of the programs in
//! [`targets`]. Root and a cgroup v2 hierarchy are needed.

mod cycle;
mod deaths;
mod harness;
mod lazy;
mod obstacles;
mod scanning;
mod syscalls;
mod targets;
mod unprivileged;

/// Not a test: the entry point of the target processes.
#[test]
fn target_main() {
    if let Ok(name) = std::env::var(harness::TARGET_VARIABLE) {
        targets::run(&name);
    }
}
