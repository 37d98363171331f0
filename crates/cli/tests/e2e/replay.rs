//! A trace played on a platform, and simulated beside it.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::platform::Platform;

#[test]
fn what_is_replayed_is_recorded_and_simulated_alike() {
    let platform = Platform::start();
    platform.deploy("busy");
    // One that was there before, which a fresh replay does not find.
    platform.invoke("busy", &json!({})).expect_start("cold");
    let path = |name: &str| platform.directory().join(name).to_str().unwrap().to_owned();
    let mut trace = "time_ms,function\n".to_owned();
    // A sandbox that is used, goes dedup, and is used again.
    for at in (0..20).map(|n| n * 50).chain((0..20).map(|n| 4_000 + n * 50)) {
        writeln!(trace, "{at},f").unwrap();
    }
    let (trace_csv, run) = (path("trace.csv"), path("run.csv"));
    std::fs::write(&trace_csv, trace).unwrap();
    let replay = [
        "replay",
        &trace_csv,
        "--functions",
        "busy",
        "--fresh",
        "--policy",
        "periods",
        "--idle",
        "500ms",
        "--out",
        &run,
        "--payload",
        "{}",
        "--json",
    ];
    let play = |more: &[&str]| {
        let output = platform.medes(&[&replay[..], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let played: Value = serde_json::from_slice(&play(&[])).unwrap();
    let starts = &played["starts"];
    assert!(starts["cold"].as_u64() >= Some(1) && starts["dedup"].as_u64() >= Some(1), "{starts}");
    // What was in force before is in force again.
    let policy = platform.client().get("/v1/policy").expect_ok();
    assert_eq!(
        (&policy["origin"], &policy["policy"]["idle_ms"]),
        (&json!("configuration"), &json!(3_600_000))
    );

    let text = std::fs::read_to_string(&run).unwrap();
    assert_eq!(text.lines().count(), 41);
    // In the order in which they were answered.
    assert!(text.lines().any(|line| line.starts_with("0,0,")), "{text}");
    // All were played: there is nothing to go on with. Without the end, there is.
    assert!(play(&["--resume"]).is_empty());
    let cut: String = text.lines().take(39).map(|line| format!("{line}\n")).collect();
    std::fs::write(&run, cut).unwrap();
    let other = platform.medes(&[&replay[..], &["--resume", "--seed", "9"]].concat());
    assert!(String::from_utf8_lossy(&other.stderr).contains("resume with the same"));
    play(&["--resume"]);
    let text = std::fs::read_to_string(&run).unwrap();
    assert_eq!(text.lines().count(), 41, "{text}");
    let compare = ["simulate", &trace_csv, "--compare", &run, "--calibrate", "--json"];
    let output = platform.medes(&compare);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let both: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(both["compared"], 40);
    for side in ["live", "simulated"] {
        let sum = ["cold", "warm", "dedup"].map(|k| both[side]["starts"][k].as_u64().unwrap());
        assert_eq!(sum.iter().sum::<u64>(), 40);
        assert!(both[side]["starts"]["dedup"].as_u64() >= Some(1), "{both}");
    }
    let unknown = platform.medes(&compare[..4]);
    let message = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(message.contains("busy") && message.contains("--calibrate"), "{message}");
    platform.stop();
}
