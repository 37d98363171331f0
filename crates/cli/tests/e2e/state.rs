//! A function's state over many dedups: what is in its memory and what the kernel keeps for it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::platform::{Platform, Setup};

/// How often each function is deduplicated and restored.
const CYCLES: u64 = 30;

/// Invokes a function cold and warm, then over and over from the dedup state; always the same
/// sandbox. `check` gets the number of the request, from 1, and the answer.
fn cycle(platform: &Platform, function: &str, mut check: impl FnMut(u64, &Value)) {
    let event = |n: u64| json!({ "seed": n });
    let cold = platform.invoke(function, &event(1));
    check(1, &cold.expect_start("cold"));
    check(2, &platform.invoke(function, &event(2)).expect_start("warm"));
    for n in 3..3 + CYCLES {
        let reports = platform.dedup(function);
        assert_eq!(reports.len(), 1, "{reports:?}");
        assert_eq!(platform.states(function), ["dedup"]);
        let answer = platform.invoke(function, &event(n));
        check(n, &answer.expect_start("dedup"));
        assert_eq!(answer.sandbox(), cold.sandbox());
    }
    let view = platform.client().get(&format!("/v1/functions/{function}")).expect_ok();
    let counts = &view["counts"];
    assert_eq!(counts, &json!({ "cold": 1, "warm": 1, "dedup": CYCLES, "errors": 0 }));
}

#[test]
fn memory_is_intact_over_many_dedups() {
    let platform = Platform::start();
    platform.deploy("memory");
    let mut digest = Value::Null;
    let mut pid = Value::Null;
    cycle(&platform, "memory", |n, answer| {
        assert_eq!(answer["calls"], n);
        assert_eq!(answer["intact"], true, "request {n}: {answer}");
        if n > 1 {
            assert_eq!((&answer["found"], &answer["pid"]), (&digest, &pid));
        }
        digest = answer["digest"].clone();
        pid = answer["pid"].clone();
    });
    platform.stop();
}

#[test]
fn files_sockets_threads_and_children_live_through_many_dedups() {
    let platform = Platform::start();
    platform.deploy("kernel");
    let (mut ticks, mut alive) = (0, Value::Null);
    cycle(&platform, "kernel", |n, answer| {
        assert_eq!(answer["calls"], n);
        assert_eq!(answer["file_intact"], true, "request {n}: {answer}");
        assert_eq!(answer["position"], (n - 1) * 1000);
        assert_eq!(answer["ready"], true);
        assert_eq!(answer["over_pair"], format!("OVER A SOCKETPAIR {n}"));
        assert_eq!(answer["over_tcp"], format!("OVER TCP {n}"));
        assert_eq!(answer["child"], json!([n * (n + 1) / 2, n]));
        assert_eq!(answer["thread_runs"], true);
        assert!(answer["ticks"].as_u64().unwrap() > ticks, "{answer}");
        ticks = answer["ticks"].as_u64().unwrap();
        let now = json!([answer["child_pid"], answer["threads"]]);
        assert!(alive.is_null() || alive == now, "{alive} {now}");
        alive = now;
    });
    platform.stop();
}

#[test]
fn mappings_and_forks_after_a_restore_see_the_right_memory() {
    let platform = Platform::start();
    platform.deploy("mappings");
    cycle(&platform, "mappings", |n, answer| {
        assert_eq!(answer["calls"], n);
        assert_eq!(answer["wrong"], json!({}), "request {n}: {answer}");
        assert_eq!((&answer["private"], &answer["shared"]), (&json!(true), &json!(true)));
        assert_eq!(answer["children"], 0);
    });
    platform.stop();
}

#[test]
fn timers_and_waits_go_on_after_many_dedups() {
    let platform = Platform::start();
    platform.deploy("signals");
    cycle(&platform, "signals", |n, answer| {
        let right = json!({
            "calls": n, "alarms": true, "timeouts": true, "sleeper": true, "timer": true
        });
        assert_eq!(*answer, right, "request {n}");
    });
    platform.stop();
}

#[test]
fn base_pages_outlive_the_sandbox_that_they_came_from() {
    const SANDBOXES: usize = 4;
    let platform = Setup::new().set("dedup", "base_threshold", 2).start();
    platform.deploy("memory");
    let mut digests: BTreeMap<String, Value> = BTreeMap::new();
    for round in 0..6 {
        // Requests that hold their sandbox until all have one.
        let sandboxes = if round == 0 { SANDBOXES } else { digests.len() };
        let event = json!({ "seed": round, "hold": 0.5 });
        let answers: Vec<_> = std::thread::scope(|scope| {
            let invoke = || platform.invoke("memory", &event);
            let requests: Vec<_> = (0..sandboxes).map(|_| scope.spawn(invoke)).collect();
            requests.into_iter().map(|request| request.join().unwrap()).collect()
        });
        for answer in &answers {
            let body = answer.expect_start(if round == 0 { "cold" } else { "dedup" });
            assert_eq!(body["intact"], true, "{body}");
            let before = digests.insert(answer.sandbox().to_owned(), body["digest"].clone());
            assert_eq!(before.is_some(), round > 0, "a sandbox that was not there before");
            assert!(before.is_none_or(|digest| digest == body["found"]));
        }
        let reports = platform.dedup("memory");
        assert_eq!(reports.len(), digests.len());
        // In two of the rounds one whose pages became a base goes.
        let base = reports.iter().find(|report| report["report"]["base_bytes"] != 0);
        if let (Some(base), true) = (base, digests.len() > 2) {
            let id = base["sandbox"].as_str().unwrap();
            platform.client().delete(&format!("/v1/sandboxes/{id}")).expect_ok();
            digests.remove(id);
        }
    }
    assert!(digests.len() < SANDBOXES, "no sandbox was a base");
    platform.stop();
}
