//! Bad input, and functions that misbehave: each meets a clear error, and the platform goes on.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::platform::{Platform, Setup, eventually, functions, runtime};

/// The platform serves a function that behaves.
#[track_caller]
fn goes_on(platform: &Platform) {
    platform.invoke("busy", &json!({})).expect_ok();
}

/// A platform with a function that behaves.
fn platform() -> Platform {
    let platform = Platform::start();
    platform.deploy("busy");
    platform
}

#[test]
fn what_can_not_be_deployed() {
    let platform = platform();
    let zip = |bytes: &[u8]| {
        use base64::Engine as _;
        json!({ "zip": base64::engine::general_purpose::STANDARD.encode(bytes) })
    };
    let deploy = |code: Value, more: Value| platform.deploy_code("x", code, more);
    let directory = json!({ "directory": functions().join("busy") });

    let why = deploy(zip(b"PK\x03\x04 and then nothing"), json!({})).expect_refusal(400, "BadCode");
    assert!(why.to_lowercase().contains("zip"), "{why}");
    deploy(json!({ "zip": "%%%" }), json!({})).expect_refusal(400, "BadRequest");
    let why =
        deploy(json!({ "directory": "/nonexistent" }), json!({})).expect_refusal(400, "BadCode");
    assert!(why.contains("/nonexistent"), "{why}");
    let why =
        deploy(directory.clone(), json!({ "runtime": "cobol" })).expect_refusal(400, "NoRuntime");
    assert!(why.contains(&runtime()), "{why}");
    for (key, value) in [("memory_mib", json!(1)), ("timeout_ms", json!(0)), ("handler", json!(""))]
    {
        let why = deploy(directory.clone(), json!({ key: value })).expect_refusal(400, "Invalid");
        assert!(why.contains(key), "{why}");
    }
    deploy(directory, json!({ "memory": 1 })).expect_refusal(400, "BadRequest");
    let unnamed = platform.client().put("/v1/functions/a%20b", &json!({}));
    unnamed.expect_refusal(400, "BadRequest");
    platform.invoke("x", &json!({})).expect_refusal(404, "NoSuchFunction");
    goes_on(&platform);
    platform.stop();
}

#[test]
fn what_is_no_request() {
    let platform = platform();
    for (sent, status) in [
        (&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..], "400"),
        (
            b"POST /v1/functions/busy/invoke HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n",
            "400",
        ),
        (b"GET /v1/nothing HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n", "404"),
        (b"PATCH /v1/functions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n", "404"),
    ] {
        let mut stream = TcpStream::connect(("127.0.0.1", platform.port())).unwrap();
        stream.write_all(sent).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    // A request that is never finished holds nobody up.
    let mut half = TcpStream::connect(("127.0.0.1", platform.port())).unwrap();
    half.write_all(b"POST /v1/functions/busy/invoke HTTP/1.1\r\ncontent-length: 10\r\n\r\n{")
        .unwrap();
    goes_on(&platform);
    drop(half);

    // What is no JSON reaches the runtime, which refuses it.
    let answer = platform.client().post("/v1/functions/busy/invoke", b"{");
    answer.expect_error("Runtime.UnmarshalError");
    // 6 MiB is the limit: what is longer is refused without being read.
    let fits = format!("\"{}\"", "x".repeat((6 << 20) - 2));
    let answer = platform.client().post("/v1/functions/busy/invoke", fits.as_bytes());
    answer.expect_error("AttributeError");
    let too_long = format!("{fits} ");
    let answer = platform.client().post("/v1/functions/busy/invoke", too_long.as_bytes());
    let why = answer.expect_refusal(413, "PayloadTooLarge");
    assert!(why.contains("6291456"), "{why}");
    platform.invoke("nobody", &json!({})).expect_refusal(404, "NoSuchFunction");
    goes_on(&platform);
    platform.stop();
}

#[test]
fn functions_that_fail() {
    let platform = platform();
    platform.deploy("broken");
    platform.deploy_as("no_handler", "busy", json!({ "handler": "app.absent" }));
    platform.deploy_as("bad", "bad", json!({ "timeout_ms": 1500 }));

    let error = platform.invoke("broken", &json!({})).expect_error("Runtime.ImportModuleError");
    assert!(
        error["errorMessage"].as_str().unwrap().contains("a_module_that_nobody_has"),
        "{error}"
    );
    platform.invoke("no_handler", &json!({})).expect_error("Runtime.HandlerNotFound");

    let bad = |what: &str| platform.invoke("bad", &json!({ "do": what }));
    let error = bad("raise").expect_error("ValueError");
    assert_eq!(error["errorMessage"], "no such luck");
    // An exception is the function's own affair: its sandbox stays.
    assert_eq!(bad("").expect_start("warm")["calls"], 2);
    bad("unserialisable").expect_error("Runtime.MarshalError");

    for (what, kind, message) in [
        ("exit", "Runtime.ExitError", "exit status 3"),
        ("crash", "Runtime.ExitError", "fault"),
        ("hang", "Sandbox.Timedout", "Task timed out after 1.50 seconds"),
        ("spin", "Sandbox.Timedout", "Task timed out after 1.50 seconds"),
    ] {
        let error = bad(what).expect_error(kind);
        assert!(error["errorMessage"].as_str().unwrap().ends_with(message), "{error}");
        platform.wait_for_states("bad", &[]);
        assert_eq!(bad("").expect_start("cold")["calls"], 1);
    }
    let error = platform.invoke("bad", &json!({ "do": "answer", "bytes": 7 << 20 }));
    error.expect_error("Function.ResponseSizeTooLarge");
    goes_on(&platform);
    platform.stop();
}

#[test]
fn functions_that_take_all_they_can_get() {
    let platform = Setup::new()
        .set("node", "pids_max", 32)
        .set("node", "scratch_size", "8MiB")
        .set("node", "log_bytes_per_function", "1MiB")
        .start();
    platform.deploy("busy");
    platform.deploy_as("bad", "bad", json!({ "memory_mib": 192, "timeout_ms": 3000 }));
    let bad = |what: &str| platform.invoke("bad", &json!({ "do": what }));

    bad("allocate").expect_error("Runtime.OutOfMemory");
    goes_on(&platform);
    // A child that the kernel kills for its memory is the function's loss alone.
    bad("allocate in a child").expect_ok();
    goes_on(&platform);

    let answer = std::thread::scope(|scope| {
        let request = scope.spawn(|| bad("fork"));
        let mut most = 0;
        eventually(|| {
            most = most.max(platform.sandbox_processes().len());
            goes_on(&platform);
            request.is_finished()
        });
        assert!(most <= 32 + 1, "{most} processes");
        request.join().unwrap()
    });
    answer.expect_error("Sandbox.Timedout");
    platform.wait_for_states("bad", &[]);
    assert!(platform.sandbox_processes().len() <= 1, "forked processes are left");

    bad("fill").expect_error("OSError");
    platform.invoke("bad", &json!({ "do": "log", "lines": 50_000 })).expect_ok();
    bad("long line").expect_ok();
    let logs = platform.data_dir().join("logs");
    let mut last = String::new();
    let complete = eventually(|| {
        last = String::from_utf8_lossy(&platform.medes(&["logs", "bad"]).stdout).into_owned();
        last.contains("yyy\n")
    });
    assert!(complete, "the log ends with {:?}", &last[last.len().saturating_sub(200)..]);
    let kept: u64 = walk(&logs).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(kept < 3 << 19, "the log takes {kept} bytes");
    goes_on(&platform);
    platform.stop();
}

fn walk(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files
}
