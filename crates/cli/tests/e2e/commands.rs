//! The command line against a platform that runs.

use std::io::{BufRead, BufReader};
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::platform::{Platform, functions, runtime};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_tour_of_the_readme() {
    let platform = Platform::start();
    let code = functions().join("busy");
    let code = code.to_str().unwrap();
    let runtime = runtime();
    let deploy = ["deploy", "busy", "--runtime", &runtime, "--handler", "app.handler", code];
    let output = platform.medes(&deploy);
    assert_eq!(text(&output.stdout), format!("deployed busy ({runtime}, app.handler)\n"));

    for (start, calls) in [("cold", 1), ("warm", 2)] {
        let output = platform.medes(&["invoke", "busy", r#"{"say": "hello"}"#, "--timing"]);
        assert_eq!(text(&output.stdout), format!("{{\"calls\": {calls}}}"));
        let timing = text(&output.stderr);
        assert!(timing.starts_with(&format!("start {start}  queue ")), "{timing}");
    }
    let list = json_of(&platform.medes(&["ps", "--json"]));
    let warm = &list["sandboxes"][0];
    assert_eq!(warm["state"], "warm");
    assert_eq!(warm["requests"], 2);
    let id = warm["id"].as_str().unwrap();

    let done = json_of(&platform.medes(&["dedup", "busy", "--json"]));
    assert_eq!(done["results"][0]["sandbox"], id);
    let list = json_of(&platform.medes(&["ps", "--json"]));
    let dedup = &list["sandboxes"][0];
    assert_eq!((&dedup["id"], &dedup["state"]), (&json!(id), &json!("dedup")));
    assert!(dedup["memory_total"].as_u64() < warm["memory_total"].as_u64(), "{list}");
    assert!(dedup["saved"].as_f64().is_some_and(|saved| saved > 0.5), "{list}");
    assert!(text(&platform.medes(&["ps"]).stdout).contains(id));

    let answer = json_of(&platform.medes(&["invoke", "busy", "--json"]));
    assert_eq!((&answer["start"], &answer["payload"]["calls"]), (&json!("dedup"), &json!(3)));
    assert!(platform.medes(&["dedup", id]).status.success());
    assert!(platform.medes(&["restore", id]).status.success());
    platform.invoke("busy", &json!({})).expect_start("warm");
    assert!(platform.medes(&["purge", "busy"]).status.success());
    platform.invoke("busy", &json!({})).expect_start("cold");

    let list = json_of(&platform.medes(&["functions", "--json"]));
    assert_eq!(list["functions"][0]["counts"]["cold"], 2);
    assert_eq!(text(&platform.medes(&["rm", "busy"]).stdout), "removed busy\n");
    let list = json_of(&platform.medes(&["functions", "--json"]));
    assert_eq!(list, json!({ "functions": [] }));
    platform.stop();
}

#[test]
fn logs_are_shown_and_followed() {
    let platform = Platform::start();
    platform.deploy("busy");
    platform.invoke("busy", &json!({ "say": "first" })).expect_ok();
    let mut follow = platform.medes_command(&["logs", "-f", "busy"]);
    let mut follow = follow.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().ends_with(" call 1: first"));
    platform.dedup("busy");
    platform.invoke("busy", &json!({ "say": "second" })).expect_start("dedup");
    assert!(next().ends_with(" call 2: second"));
    let all = text(&platform.medes(&["logs", "busy"]).stdout);
    assert_eq!(all.lines().count(), 2, "{all}");
    let last = platform.medes(&["logs", "busy", "--bytes", "80", "--json"]);
    let last: Value = serde_json::from_slice(&last.stdout).unwrap();
    assert!(last["line"].as_str().unwrap().ends_with("call 2: second"), "{last}");
    // With the platform the log ends in order.
    platform.stop();
    assert!(follow.wait().unwrap().success());
}

#[test]
fn exit_codes_say_whose_fault_it_was() {
    let platform = Platform::start();
    platform.deploy("bad");
    let code = |arguments: &[&str]| platform.medes(arguments).status.code().unwrap();
    assert_eq!(code(&["invoke", "bad"]), 0);
    assert_eq!(code(&["invoke", "bad", r#"{"do": "raise"}"#]), 1);
    assert_eq!(code(&["invoke", "bad", r#"{"do": "exit"}"#]), 1);
    assert_eq!(code(&["invoke", "not a name"]), 2);
    assert_eq!(code(&["deploy", "x", "/nonexistent", "--runtime", "r", "--handler", "a.b"]), 2);
    assert_eq!(code(&["invoke", "nobody"]), 3);
    assert_eq!(code(&["rm", "nobody"]), 3);
    assert_eq!(code(&["logs", "nobody"]), 3);
    assert_eq!(code(&["dedup", "0123456789abcdef"]), 3);
    let unreachable = platform.medes(&["--url", "http://127.0.0.1:1", "ps"]);
    assert_eq!(unreachable.status.code(), Some(3));
    assert!(text(&unreachable.stderr).contains("is `medes serve` running?"));
    platform.stop();
}
