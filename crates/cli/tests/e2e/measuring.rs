//! The measuring tools that work through the front door, on the smallest function.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::platform::program;

/// Runs `medes bench` and gives its JSON document.
fn bench(arguments: &[&str]) -> Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let output = Command::new(program())
        .arg("bench")
        .args(arguments)
        .args(["--json", "-"])
        .current_dir(root)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The one function of a document.
fn function(document: &Value) -> &Value {
    let functions = document["functions"].as_array().unwrap();
    assert_eq!((functions.len(), functions[0]["name"].as_str()), (1, Some("vanilla")));
    assert_eq!(functions[0]["answers_wrong"], 0);
    &functions[0]
}

#[test]
fn a_lifecycle_is_measured() {
    let document = bench(&["lifecycle", "--functions", "vanilla", "--cycles", "3", "--colds", "2"]);
    let of = function(&document);
    assert_eq!(of["answers_checked"], 2 * 3 + 3 * 5);
    for figure in ["cold_ms", "warm_ms", "dedup_ms", "next_ms"] {
        let p = ["p50", "p90", "p99"].map(|p| of[figure][p].as_f64().unwrap());
        assert!(p[0] > 0.0 && p[0] <= p[1] && p[1] <= p[2], "{figure}: {}", of[figure]);
    }
    assert_eq!((&of["warm_ms"]["samples"], &of["added_ms"]["samples"]), (&6.into(), &3.into()));
    assert_eq!(of["noise_ms"]["samples"], 3);
    assert!(of["unknown_ms"].as_f64().unwrap() > 0.0);
    for phase in ["schedule_ms", "prefetch_ms", "thaw_ms", "faults_ms"] {
        assert!(of["phases"][phase]["p50"].is_f64(), "{phase}: {}", of["phases"]);
    }
    assert!(of["pages_before"]["p50"].as_f64().unwrap() > 0.0);
    for kind in ["first", "repeated", "in_cycles"] {
        assert!(of["dedup"][kind]["pages"].as_u64().unwrap() > 100, "{kind}: {}", of["dedup"]);
    }
    assert!(of["dedup_bytes"].as_u64() < of["warm_bytes"].as_u64());
}

#[test]
fn a_density_is_measured() {
    let document = bench(&["density", "--function", "vanilla", "--sandboxes", "3"]);
    let of = function(&document);
    assert_eq!((&document["sandboxes"], &of["answers_checked"]), (&3.into(), &(1 + 3 * 3).into()));
    assert!(document["bytes_total"].is_i64() && document["bytes_per_sandbox"].is_i64());
    assert!(of["bytes_accounted"].as_u64().unwrap() > 0);
    let split = &of["split"];
    for part in ["kernel", "store"] {
        assert!(split["sandboxes"][part].as_u64().unwrap() > 0, "{part}: {split}");
    }
    assert_eq!((&of["answer_ms"]["samples"], &of["request_ms"]["samples"]), (&3.into(), &3.into()));
}

#[test]
fn ways_to_keep_sandboxes_are_compared() {
    // Those that change no setting of the host.
    let document = bench(&[
        "peers",
        "--functions",
        "vanilla",
        "--sandboxes",
        "2",
        "--cycles",
        "2",
        "--peers",
        "warm,medes,criu",
    ]);
    let of = function(&document);
    let peers = of["peers"].as_array().unwrap();
    let find = |name: &str| peers.iter().find(|p| p["peer"] == name).unwrap();
    assert_eq!(peers.len(), 3);
    for name in ["warm", "medes"] {
        assert_eq!(
            (&find(name)["available"], &find(name)["request_ms"]["samples"]),
            (&true.into(), &2.into())
        );
    }
    assert!(find("medes")["kept_bytes"].as_u64() < find("warm")["kept_bytes"].as_u64());
    assert_eq!(find("criu")["available"], false);
    assert!(find("criu")["reason"].as_str().is_some_and(|reason| reason.contains("criu")));
}
