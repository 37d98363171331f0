//! The end of the platform while it is in use.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::platform::{Platform, Setup};

/// A platform with a warm and a dedup sandbox of one function and a request to the other.
fn platform(grace: &str) -> Platform {
    let platform = Setup::new().set("lifecycle", "shutdown_grace", grace).start();
    platform.deploy("busy");
    platform.deploy("memory");
    platform.invoke("busy", &json!({})).expect_start("cold");
    platform.invoke("memory", &json!({ "seed": 1 })).expect_start("cold");
    platform.dedup("memory");
    platform
}

#[test]
fn a_request_under_way_is_answered_after_sigterm() {
    let mut platform = platform("60s");
    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| platform.invoke("busy", &json!({ "seconds": 2 })));
        platform.wait_for_states("busy", &["running"]);
        kill(Pid::from_raw(platform.pid()), Signal::SIGTERM).unwrap();
        request.join().unwrap()
    });
    assert_eq!(answer.expect_start("warm")["calls"], 2);
    platform.ends_in_order();
}

#[test]
fn a_request_under_way_is_answered_after_a_shutdown_by_api() {
    let mut platform = platform("60s");
    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| platform.invoke("busy", &json!({ "seconds": 2 })));
        platform.wait_for_states("busy", &["running"]);
        assert_eq!(platform.client().post("/v1/shutdown", b"").status, 202);
        request.join().unwrap()
    });
    assert_eq!(answer.expect_start("warm")["calls"], 2);
    platform.ends_in_order();
}

#[test]
fn a_request_that_outlasts_the_grace_period_is_aborted() {
    let mut platform = platform("300ms");
    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| {
            let event = json!({ "seconds": 600 }).to_string();
            platform.client().try_send("POST", "/v1/functions/busy/invoke", event.as_bytes())
        });
        platform.wait_for_states("busy", &["running"]);
        kill(Pid::from_raw(platform.pid()), Signal::SIGINT).unwrap();
        request.join().unwrap()
    });
    answer.expect("an answer").expect_error("Runtime.ExitError");
    platform.ends_in_order();
}
