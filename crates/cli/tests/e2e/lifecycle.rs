//! States change by themselves, when their time has come.

use serde_json::json;

use crate::platform::{LIMIT, Platform, Setup, eventually};

/// Sends as many requests at once as sandboxes are wanted; each holds its sandbox for a while.
fn at_once(platform: &Platform, count: usize) -> Vec<String> {
    let one = || {
        let answer = platform.invoke("busy", &json!({ "seconds": 1 }));
        answer.expect_ok();
        answer.start().to_owned()
    };
    std::thread::scope(|scope| {
        let requests: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
        requests.into_iter().map(|request| request.join().unwrap()).collect()
    })
}

#[test]
fn an_idle_sandbox_is_deduplicated_and_later_purged() {
    let platform =
        Setup::new().set("lifecycle", "idle", "300ms").set("lifecycle", "keep_dedup", "2s").start();
    platform.deploy("busy");
    assert_eq!(platform.invoke("busy", &json!({})).expect_start("cold")["calls"], 1);
    platform.wait_for_states("busy", &["dedup"]);
    let answer = platform.invoke("busy", &json!({}));
    assert_eq!(answer.expect_start("dedup")["calls"], 2);
    assert!(answer.pages_back().is_some_and(|pages| pages > 0), "it needed no memory");
    platform.wait_for_states("busy", &["dedup"]);
    platform.wait_for_states("busy", &[]);
    platform.wait_for_no_sandbox_process();
    assert_eq!(platform.invoke("busy", &json!({})).expect_start("cold")["calls"], 1);
    platform.stop();
}

#[test]
fn what_stays_of_a_sandbox_goes_when_memory_gets_short() {
    let mut platform = Setup::new()
        .set("dedup", "restore_target", "1us")
        .set("lifecycle", "idle", "1h")
        .set("policy", "headroom", 0)
        .start();
    platform.deploy("memory");
    let request = |platform: &Platform, calls: u64, start: &str| {
        let answer = platform.invoke("memory", &json!({ "seed": calls })).expect_start(start);
        assert_eq!((&answer["calls"], &answer["intact"]), (&json!(calls), &json!(true)));
    };
    request(&platform, 1, "cold");
    for calls in 2..5 {
        platform.dedup("memory");
        request(&platform, calls, "dedup");
    }
    platform.dedup("memory");
    let private =
        |platform: &Platform| platform.sandboxes()[0]["memory"]["private"].as_i64().unwrap();
    let stays = private(&platform);
    let info = platform.client().get("/v1/info").expect_ok();
    let of = |part: &str| info["node"]["memory"][part].as_i64().unwrap();
    let used: i64 = ["sandboxes", "base", "patches", "registry"].map(of).into_iter().sum();
    // Another daemon, which knows nothing of the restores before, finds too little.
    platform.set("node", "memory_budget", format!("{} KiB", (used >> 10) - 1024));
    platform.crash();
    platform.restart();
    let goes = || stays - private(&platform);
    assert!(eventually(|| goes() > 1 << 20), "of {stays} bytes only {} go", goes());
    platform.wait_for_states("memory", &["dedup"]);
    request(&platform, 5, "dedup");
    platform.stop();
}

#[test]
fn a_fixed_keep_alive_never_deduplicates() {
    let platform = Setup::new()
        .set("policy", "name", "fixed")
        .set("lifecycle", "idle", "1ms")
        .set("lifecycle", "keep_alive", "1s")
        .start();
    platform.deploy("busy");
    platform.invoke("busy", &json!({})).expect_start("cold");
    platform.invoke("busy", &json!({})).expect_start("warm");
    let begin = std::time::Instant::now();
    while !platform.states("busy").is_empty() {
        assert!(begin.elapsed() < LIMIT, "it stays");
        assert!(platform.states("busy").iter().all(|state| state == "warm" || state == "purging"));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    platform.invoke("busy", &json!({})).expect_start("cold");
    platform.stop();
}

#[test]
fn requests_at_once_scale_out_and_quiet_scales_in() {
    let platform =
        Setup::new().set("lifecycle", "idle", "2s").set("lifecycle", "keep_dedup", "2s").start();
    platform.deploy("busy");
    assert_eq!(at_once(&platform, 4), ["cold"; 4]);
    assert_eq!(at_once(&platform, 4), ["warm"; 4]);
    platform.wait_for_states("busy", &["dedup"; 4]);
    let starts = at_once(&platform, 5);
    assert_eq!(starts.iter().filter(|start| *start == "cold").count(), 1, "{starts:?}");
    platform.wait_for_states("busy", &[]);
    platform.wait_for_no_sandbox_process();
    platform.stop();
}

#[test]
fn a_limit_of_sandboxes_makes_requests_wait() {
    let platform = Setup::new().set("limits", "queue", 1).start();
    platform.deploy_as("busy", "busy", json!({ "max_sandboxes": 1 }));
    std::thread::scope(|scope| {
        let hold = || platform.invoke("busy", &json!({ "seconds": 3 }));
        let first = scope.spawn(hold);
        platform.wait_for_states("busy", &["running"]);
        let second = scope.spawn(|| platform.invoke("busy", &json!({})));
        // Of two more requests one finds a place in the queue at most.
        let third = platform.invoke("busy", &json!({}));
        let answers = [first.join().unwrap(), second.join().unwrap(), third];
        let refused: Vec<_> = answers.iter().filter(|answer| answer.status != 200).collect();
        assert_eq!(refused.len(), 1);
        refused[0].expect_refusal(429, "QueueFull");
    });
    assert_eq!(platform.states("busy"), ["warm"]);
    platform.stop();
}

#[test]
fn a_new_version_takes_over_and_the_old_one_goes() {
    let platform = Platform::start();
    platform.deploy("busy");
    platform.invoke("busy", &json!({})).expect_start("cold");
    platform.dedup("busy");
    platform.deploy_as("busy", "memory", json!({}));
    let answer = platform.invoke("busy", &json!({ "seed": 1 })).expect_start("cold");
    assert_eq!(answer["intact"], true);
    platform.wait_for_states("busy", &["warm"]);
    platform.client().delete("/v1/functions/busy").expect_ok();
    platform.wait_for_states("busy", &[]);
    platform.invoke("busy", &json!({})).expect_refusal(404, "NoSuchFunction");
    platform.stop();
}
