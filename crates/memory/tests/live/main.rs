//! Live processes taken through eviction and restore, on the running kernel.
//!
//! The processes are this test binary itself, started again as one of the programs in
//! [`targets`]. Root and a cgroup v2 hierarchy are needed.

mod cycle;
mod deaths;
mod harness;
mod lazy;
mod leave;
mod obstacles;
mod scanning;
mod syscalls;
mod targets;
mod threads;
mod unprivileged;

/// Where a target process begins: before `main`, so that its main thread is the program's own
/// and not the test harness's.
#[used]
// SAFETY: the section holds pointers to functions that the C runtime calls once, without
// arguments that are looked at, after the standard library's own needs are met.
#[unsafe(link_section = ".init_array")]
static ENTRY: extern "C" fn() = {
    extern "C" fn enter() {
        if let Ok(name) = std::env::var(harness::TARGET_VARIABLE) {
            targets::run(&name);
        }
    }
    enter
};
