//! Crashes: of the daemon, of the keeper, of both; and what is there afterwards.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::platform::{Platform, eventually};
use crate::remains;

/// A platform with a warm and a dedup sandbox.
fn platform() -> Platform {
    let platform = Platform::start();
    platform.deploy_as("warm", "busy", json!({}));
    platform.deploy_as("dedup", "memory", json!({}));
    platform.invoke("warm", &json!({})).expect_start("cold");
    platform.invoke("dedup", &json!({ "seed": 1 })).expect_start("cold");
    platform.dedup("dedup");
    assert_eq!(platform.sandbox_processes().len(), 2);
    platform
}

fn is_alive(pid: i32) -> bool {
    // The name of a process that is dead and not buried is still there, its arguments are not.
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|arguments| !arguments.is_empty())
}

fn kill_now(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// After a restart: the functions are there, nothing of before is, and requests are served.
fn starts_afresh(platform: &Platform, before: &[i32]) {
    assert!(before.iter().all(|pid| !is_alive(*pid)), "processes of before are left");
    assert_eq!(platform.sandboxes(), Vec::<serde_json::Value>::new());
    platform.wait_for_no_sandbox_process();
    assert_eq!(platform.invoke("warm", &json!({})).expect_start("cold")["calls"], 1);
    platform.invoke("dedup", &json!({ "seed": 1 })).expect_start("cold");
    platform.dedup("dedup");
    let answer = platform.invoke("dedup", &json!({ "seed": 2 })).expect_start("dedup");
    assert_eq!((&answer["calls"], &answer["intact"]), (&json!(2), &json!(true)));
}

#[test]
fn after_a_crash_of_daemon_and_keeper_no_frozen_sandbox_stays() {
    let mut platform = platform();
    platform.deploy("stubborn");
    let answer = platform.invoke("stubborn", &json!({})).expect_start("cold");
    assert_eq!(answer, json!({ "refused": 0 }));
    let before = platform.sandbox_processes();
    let keeper = platform.keeper();
    // Runs, with its memory on the way back.
    platform.client().post("/v1/functions/dedup/restore", b"").expect_ok();
    platform.crash();
    kill_now(keeper);
    // Nobody is there any more to kill them.
    platform.wait_for_no_sandbox_process();
    platform.restart();
    starts_afresh(&platform, &before);
    platform.stop();
}

#[test]
fn when_the_keeper_crashes_its_sandboxes_end_and_another_one_serves() {
    let platform = platform();
    let before = platform.sandbox_processes();
    let keeper = platform.keeper();
    let aborted = std::thread::scope(|scope| {
        let running = scope.spawn(|| platform.invoke("warm", &json!({ "seconds": 60 })));
        platform.wait_for_states("warm", &["running"]);
        kill_now(keeper);
        running.join().unwrap()
    });
    aborted.expect_error("Runtime.ExitError");
    assert!(eventually(|| before.iter().all(|pid| !is_alive(*pid))), "sandboxes are left");
    assert!(eventually(
        || platform.run_dir().join("keeper.pid").exists() && platform.keeper() != keeper
    ));
    platform.wait_for_states("warm", &[]);
    platform.wait_for_states("dedup", &[]);
    starts_afresh(&platform, &before);
    platform.stop();
}

#[test]
fn a_sandbox_that_is_killed_from_outside_is_replaced() {
    let platform = platform();
    for (name, start) in [("warm", "warm"), ("dedup", "dedup")] {
        let all = platform.sandboxes();
        let own = all.iter().find(|sandbox| sandbox["function"] == name).unwrap();
        assert_eq!(own["state"], start);
    }
    for pid in platform.sandbox_processes() {
        kill_now(pid);
    }
    platform.wait_for_states("warm", &[]);
    platform.wait_for_states("dedup", &[]);
    starts_afresh(&platform, &[]);
    platform.stop();
}

#[test]
fn a_crashed_platform_leaves_nothing_once_it_was_run_again() {
    let mut platform = platform();
    platform.crash();
    assert!(!remains::cgroups(&platform.cgroup()).is_empty());
    platform.restart();
    platform.stop();
}
