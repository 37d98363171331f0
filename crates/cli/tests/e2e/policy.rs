//! The policy, changed while the platform runs.

use serde_json::{Value, json};

use crate::platform::{Platform, Setup};

#[track_caller]
fn medes(platform: &Platform, arguments: &[&str]) -> Value {
    let output = platform.medes(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_policy_set_live_takes_hold_and_survives_a_restart() {
    let mut platform = Setup::new().set("policy", "name", "fixed").start();
    platform.deploy("busy");
    platform.invoke("busy", &json!({})).expect_start("cold");
    assert_eq!(platform.states("busy"), ["warm"]);
    assert_eq!(medes(&platform, &["policy", "show", "--json"])["policy"]["name"], "fixed");

    // From here on whoever is idle goes dedup, this one at once.
    let set = ["policy", "set", "latency", "--alpha", "50", "--idle", "200ms", "--json"];
    let view = medes(&platform, &set);
    assert_eq!((&view["origin"], &view["policy"]["idle_ms"]), (&json!("live"), &json!(200)));
    platform.wait_for_states("busy", &["dedup"]);
    for calls in 2..9 {
        assert_eq!(platform.invoke("busy", &json!({})).expect_start("dedup")["calls"], calls);
        platform.wait_for_states("busy", &["dedup"]);
    }
    let e = medes(&platform, &["policy", "explain", "busy", "--json"]);
    assert_eq!((&e["keep"]["warm_ms"], &e["population"]["dedup"]), (&json!(200), &json!(1)));
    let number = |name: &str| e["model"][name].as_f64().unwrap();
    assert!(number("dedup_bytes") < number("warm_bytes"), "{e}");
    assert!(number("dedup_startup") < number("cold_startup"), "{e}");
    assert_eq!(e["targets"].as_array().unwrap().len(), 6);
    let text = platform.medes(&["policy", "explain", "busy"]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("stays warm for 200ms, then dedup until"), "{text}");

    // One function alone may stay warm.
    medes(&platform, &["policy", "set", "--function", "busy", "--idle", "1h", "--json"]);
    platform.invoke("busy", &json!({})).expect_start("dedup");
    platform.invoke("busy", &json!({})).expect_start("warm");

    platform.crash();
    platform.restart();
    let view = medes(&platform, &["policy", "show", "--json"]);
    assert_eq!((&view["policy"]["alpha"], &view["origin"]), (&json!(50.0), &json!("live")));
    assert_eq!(view["functions"][0]["settings"]["idle_ms"], 3_600_000);
    let view = medes(&platform, &["policy", "set", "--reset", "--json"]);
    assert_eq!(view["policy"]["name"], "fixed");

    let wrong = platform.medes(&["policy", "set", "latency", "--alpha", "0.1"]);
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("alpha: 1 or more"));
    assert_eq!(platform.medes(&["policy", "set"]).status.code(), Some(2));
    assert_eq!(platform.medes(&["policy", "explain", "nobody"]).status.code(), Some(3));
    platform.stop();
}
