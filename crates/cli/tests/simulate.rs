//! From a made trace to a page, as an operator does it.

use std::process::{Command, Output};

use serde_json::Value;

fn medes(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_medes")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_trace_is_made_looked_at_played_and_reported_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (trace, runs, csv) = (path("trace"), path("runs"), path("requests.csv"));
    let made = medes(&[
        "trace",
        "make",
        &trace,
        "--functions",
        "30",
        "--length",
        "1h",
        "--requests",
        "3000",
    ]);
    assert!(made.status.success(), "{}", text(&made.stderr));

    let info = medes(&["trace", "info", &trace, "--json"]);
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let requests = info["requests"].as_u64().unwrap();
    assert!(requests > 1_000 && info["functions"] == 30, "{info}");

    let played = medes(&[
        "simulate",
        &trace,
        "--nodes",
        "2",
        "--pool",
        "2 GiB",
        "--policy",
        "fixed,memory",
        "--out",
        &runs,
        "--requests",
        &csv,
        "--json",
    ]);
    assert!(played.status.success(), "{}", text(&played.stderr));
    let played: Value = serde_json::from_slice(&played.stdout).unwrap();
    for run in played["runs"].as_array().unwrap() {
        let starts = &run["starts"];
        let sum: u64 = ["cold", "warm", "dedup"].iter().map(|k| starts[k].as_u64().unwrap()).sum();
        assert_eq!(sum, requests);
    }
    let lines = std::fs::read_to_string(&csv).unwrap().lines().count() as u64;
    assert_eq!(lines, requests + 1);

    let reported = medes(&["report", &runs, "--title", "A title"]);
    assert!(reported.status.success(), "{}", text(&reported.stderr));
    let page = std::fs::read_to_string(dir.path().join("runs/report.html")).unwrap();
    assert!(page.contains("<h1>A title</h1>") && page.contains("Cold starts"));
}

#[test]
fn what_can_t_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.csv");
    std::fs::write(&bad, "time_ms,function\n1,f\nx,f\n").unwrap();
    let bad = bad.display().to_string();
    let failed = medes(&["simulate", &bad]);
    assert_eq!(failed.status.code(), Some(3));
    let message = text(&failed.stderr);
    assert!(message.contains("bad.csv:3, column 1: \"x\" is no number"), "{message}");
    let none = medes(&["report", &dir.path().display().to_string()]);
    assert!(text(&none.stderr).contains("no results here"));
    let speed = medes(&["simulate", &bad, "--speed", "0"]);
    assert_eq!(speed.status.code(), Some(2));
}
