//! The daemon dies, or is replaced, while its sandboxes live; another one goes on with them.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::platform::{Platform, Setup, eventually};

/// Sends a function a request that it finds its memory right at; gives the digest that it should
/// find next.
#[track_caller]
fn check(platform: &Platform, name: &str, start: &str, calls: u64, digest: &Value) -> Value {
    let answer = platform.invoke(name, &json!({ "seed": calls })).expect_start(start);
    assert_eq!((&answer["calls"], &answer["intact"]), (&json!(calls), &json!(true)), "{name}");
    assert!(digest.is_null() || answer["found"] == *digest, "{name}");
    answer["digest"].clone()
}

/// A platform with a sandbox in every state that lasts, and their digests.
fn platform() -> (Platform, BTreeMap<&'static str, Value>) {
    let platform = Platform::start();
    let mut digests = BTreeMap::new();
    for name in ["warm", "dedup", "part", "watched"] {
        platform.deploy_as(name, "memory", json!({}));
        digests.insert(name, check(&platform, name, "cold", 1, &Value::Null));
    }
    for name in ["dedup", "part", "watched"] {
        platform.dedup(name);
    }
    platform.client().post("/v1/functions/part/restore", b"").expect_ok();
    digests.insert("watched", check(&platform, "watched", "dedup", 2, &digests["watched"]));
    (platform, digests)
}

#[test]
fn sandboxes_in_every_state_live_through_crashes_of_the_daemon() {
    let (mut platform, mut digests) = platform();
    platform.deploy_as("running", "busy", json!({}));
    let event = json!({ "seconds": 2 }).to_string();
    let (before, keeper) = std::thread::scope(|scope| {
        let client = platform.client();
        let path = "/v1/functions/running/invoke";
        let unheard = scope.spawn(|| client.try_send("POST", path, event.as_bytes()));
        platform.wait_for_states("running", &["running"]);
        let before = (platform.page_store(), platform.sandbox_processes());
        kill(Pid::from_raw(platform.pid()), Signal::SIGKILL).unwrap();
        assert!(unheard.join().unwrap().is_err(), "nobody was there to answer");
        (before, platform.keeper())
    });
    for _ in 0..2 {
        platform.crash();
        platform.restart();
        assert_eq!(platform.keeper(), keeper);
    }
    assert_eq!((platform.page_store(), platform.sandbox_processes()), before);
    assert_eq!(platform.states("dedup"), ["dedup"]);
    for name in ["warm", "part", "watched"] {
        assert_eq!(platform.states(name), ["warm"], "{name}");
    }
    platform.wait_for_states("running", &["warm"]);
    assert_eq!(platform.invoke("running", &json!({})).expect_start("warm")["calls"], 2);
    for (name, start, calls) in
        [("warm", "warm", 2), ("dedup", "dedup", 2), ("part", "warm", 2), ("watched", "warm", 3)]
    {
        digests.insert(name, check(&platform, name, start, calls, &digests[name]));
    }
    // What one daemon restored, another deduplicates again at the price of what was written.
    let report = &platform.dedup("watched")[0]["report"];
    assert!(report["reused_pages"].as_u64() > report["patched_pages"].as_u64(), "{report}");
    for (name, calls) in [("warm", 3), ("dedup", 3), ("part", 3), ("watched", 4)] {
        if name != "watched" {
            platform.dedup(name);
        }
        check(&platform, name, "dedup", calls, &digests[name]);
    }
    for name in ["warm", "dedup", "part", "watched", "running"] {
        platform.client().delete(&format!("/v1/functions/{name}")).expect_ok();
    }
    assert!(eventually(|| platform.page_store() == (0, 0)), "{:?} is left", platform.page_store());
    platform.stop();
}

#[test]
fn a_request_that_the_daemon_left_behind_is_ended_at_its_deadline() {
    let mut platform = Platform::start();
    platform.deploy_as("late", "busy", json!({ "timeout_ms": 3000 }));
    std::thread::scope(|scope| {
        let client = platform.client();
        let body = br#"{"seconds":600}"#;
        scope.spawn(|| client.try_send("POST", "/v1/functions/late/invoke", body));
        platform.wait_for_states("late", &["running"]);
        kill(Pid::from_raw(platform.pid()), Signal::SIGKILL).unwrap();
    });
    platform.crash();
    platform.restart();
    platform.wait_for_states("late", &[]);
    platform.wait_for_no_sandbox_process();
    assert_eq!(platform.invoke("late", &json!({})).expect_start("cold")["calls"], 1);
    platform.stop();
}

#[test]
fn a_daemon_is_replaced_by_signal_and_no_request_is_lost() {
    let (mut platform, digests) = platform();
    platform.deploy_as("running", "busy", json!({}));
    let (before, processes) = (platform.page_store(), platform.sandbox_processes());
    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| platform.invoke("running", &json!({ "seconds": 2 })));
        platform.wait_for_states("running", &["running"]);
        kill(Pid::from_raw(platform.pid()), Signal::SIGUSR2).unwrap();
        request.join().unwrap()
    });
    assert_eq!(answer.expect_start("cold")["calls"], 1);
    platform.leaves();
    platform.restart();
    assert_eq!(platform.page_store(), before);
    let now = platform.sandbox_processes();
    assert!(processes.iter().all(|pid| now.contains(pid)), "{processes:?} {now:?}");
    for (name, start, calls) in
        [("warm", "warm", 2), ("dedup", "dedup", 2), ("part", "warm", 2), ("watched", "warm", 3)]
    {
        check(&platform, name, start, calls, &digests[name]);
    }
    platform.stop();
}

#[test]
fn sandboxes_are_kept_at_sigterm_if_the_configuration_says_so() {
    let mut platform = Setup::new().set("lifecycle", "keep_sandboxes", true).start();
    platform.deploy("memory");
    let digest = check(&platform, "memory", "cold", 1, &Value::Null);
    platform.dedup("memory");
    kill(Pid::from_raw(platform.pid()), Signal::SIGTERM).unwrap();
    platform.leaves();
    platform.restart();
    check(&platform, "memory", "dedup", 2, &digest);
    platform.client().post("/v1/shutdown", b"");
    platform.ends_in_order();
}

#[test]
fn sandboxes_whose_function_has_changed_are_not_taken_over() {
    let mut platform = Platform::start();
    for name in ["one", "two"] {
        platform.deploy_as(name, "memory", json!({ "tenant": name }));
        check(&platform, name, "cold", 1, &Value::Null);
        platform.dedup(name);
    }
    platform.crash();
    // They share pages from now on, which the second one's sandbox was never asked for.
    platform.set("dedup", "joined_tenants", vec![vec!["one", "two"]]);
    platform.restart();
    assert!(eventually(|| platform.sandbox_processes().len() == 1));
    assert_eq!((platform.states("one"), platform.states("two")), (vec!["dedup".into()], vec![]));
    check(&platform, "one", "dedup", 2, &Value::Null);
    check(&platform, "two", "cold", 1, &Value::Null);
    platform.stop();
}

#[test]
fn a_keeper_that_does_not_answer_is_ended_with_its_sandboxes() {
    let (mut platform, _) = platform();
    let before = platform.sandbox_processes();
    let keeper = platform.keeper();
    platform.crash();
    fs::remove_file(platform.run_dir().join("keeper.sock")).unwrap();
    platform.restart();
    assert!(platform.log().contains("can't be taken over"), "{}", platform.log());
    assert_ne!(platform.keeper(), keeper);
    assert!(platform.sandbox_processes().iter().all(|pid| !before.contains(pid)));
    check(&platform, "dedup", "cold", 1, &Value::Null);
    platform.stop();
}
