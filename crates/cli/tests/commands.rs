//! The client commands against a small HTTP server that answers as a platform does.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// A request as the server saw it.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    body: Vec<u8>,
}

/// An answer: status, headers, body.
struct Reply(u16, Vec<(&'static str, &'static str)>, Vec<u8>);

impl Reply {
    fn json(status: u16, body: &Value) -> Self {
        Self(status, vec![("content-type", "application/json")], body.to_string().into_bytes())
    }
}

/// A platform for one test. It ends with the test's process.
struct Fake {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    fn new(answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve(&stream, &log, &answer);
            }
        });
        Self { url, seen }
    }

    fn medes(&self, args: &[&str]) -> Output {
        medes(&self.url, args, b"")
    }

    fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|s| s.line.clone()).collect()
    }
}

fn serve(stream: &TcpStream, log: &Mutex<Vec<Seen>>, answer: &impl Fn(&str) -> Reply) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let line = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            if let Some(n) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                length = n.trim().parse().unwrap();
            }
            if header.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        log.lock().unwrap().push(Seen { line: line.clone(), body });
        let Reply(status, headers, body) = answer(&line);
        let mut head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut out = stream;
        let _ = out.write_all(&[head.as_bytes(), b"\r\n", &body].concat());
    }
}

fn medes(url: &str, args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_medes"))
        .args(args)
        .env("MEDES_URL", url)
        .env_remove("MEDES_CONFIG")
        .env("http_proxy", "http://127.0.0.1:1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that does not read its input may end before it is written.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn function(name: &str) -> Value {
    json!({
        "id": 7, "name": name, "domain": 0, "runtime": "python3.11", "handler": "app.handler",
        "code": "/var/lib/medes/code/7", "code_sha256": "", "code_size": 10, "layers": [],
        "environment": {}, "memory_mib": 256, "timeout_ms": 30000, "max_sandboxes": 0,
        "layout": "function", "description": "", "deployed_at_ms": 0,
        "counts": {"cold": 1, "warm": 20, "dedup": 3, "errors": 0}, "sandboxes": 2
    })
}

#[test]
fn an_absent_platform_is_named_with_the_way_out() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for args in [&["ps"][..], &["functions"], &["invoke", "f"], &["rm", "f"], &["logs", "f"]] {
        let output = medes(&format!("http://{free}"), args, b"");
        assert_eq!(output.status.code(), Some(3), "{args:?}");
        assert_eq!(
            err(&output),
            format!(
                "medes: cannot reach the platform at http://{free}: connection refused; \
                 is `medes serve` running?\n"
            )
        );
    }
}

#[test]
fn wrong_usage_has_its_own_status() {
    for args in [
        &["invoke"][..],
        &["invoke", "../x"],
        &["deploy", "f", "/nonexistent", "--runtime", "r", "--handler", "h"],
        &["deploy", "f", "/etc/passwd", "--runtime", "r", "--handler", "h"],
        &["dedup"],
        &["dedup", "f", "--all"],
        &["--url", "ftp://x", "ps"],
        &["--config", "/nonexistent.toml", "config"],
    ] {
        let output = medes("http://127.0.0.1:1", args, b"");
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", err(&output));
    }
}

#[test]
fn a_foreign_service_is_not_taken_for_a_platform() {
    let fake = Fake::new(|_| Reply(404, vec![], b"<html>not found</html>".to_vec()));
    let output = fake.medes(&["ps"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(err(&output).contains("another service"), "{}", err(&output));
}

#[test]
fn invoke_gives_the_answer_as_it_came_and_the_timing_apart() {
    let fake = Fake::new(|_| {
        let headers = vec![
            ("x-medes-start", "dedup"),
            ("x-medes-sandbox", "00000000000000aa"),
            ("x-medes-request", "01234567-89ab-4def-8123-456789abcdef"),
            ("x-medes-queue-us", "10"),
            ("x-medes-startup-us", "1500"),
            ("x-medes-execution-us", "2000"),
            ("x-medes-total-us", "3600"),
        ];
        Reply(200, headers, b"{\"n\":1}".to_vec())
    });
    let output = fake.medes(&["invoke", "f", r#"{"a":1}"#, "--timing"]);
    assert!(output.status.success());
    assert_eq!(out(&output), "{\"n\":1}");
    assert_eq!(
        err(&output),
        "start dedup  queue 0.01 ms  startup 1.50 ms  execution 2.00 ms  total 3.60 ms\n"
    );
    let output = fake.medes(&["invoke", "f", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["payload"], json!({"n": 1}));
    assert_eq!(document["start"], "dedup");
    assert_eq!(document["sandbox"], "00000000000000aa");
    assert_eq!(document["timing"]["startup_us"], 1500);
    let seen = fake.seen.lock().unwrap();
    assert_eq!(seen[0].line, "POST /v1/functions/f/invoke");
    assert_eq!(seen[0].body, br#"{"a":1}"#);
    assert_eq!(seen[1].body, b"{}");
}

#[test]
fn payloads_come_from_a_file_or_standard_input_too() {
    let fake = Fake::new(|_| Reply(200, vec![], b"null".to_vec()));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"\"\xc3\xa4\"").unwrap();
    assert!(fake.medes(&["invoke", "f", "--file", file.path().to_str().unwrap()]).status.success());
    assert!(medes(&fake.url, &["invoke", "f", "-"], b"[1,2]").status.success());
    let seen = fake.seen.lock().unwrap();
    assert_eq!(seen[0].body, b"\"\xc3\xa4\"");
    assert_eq!(seen[1].body, b"[1,2]");
}

#[test]
fn a_functions_own_error_has_status_1() {
    let fake = Fake::new(|_| {
        let body = json!({"errorMessage": "no", "errorType": "ValueError"});
        Reply(200, vec![("x-medes-error", "ValueError")], body.to_string().into_bytes())
    });
    let output = fake.medes(&["invoke", "f"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(out(&output).contains("\"errorMessage\""));
    assert_eq!(err(&output), "medes: f answered with an error: ValueError\n");
}

#[test]
fn the_platforms_own_errors_are_passed_on() {
    let fake = Fake::new(|_| {
        let message = "no function named f; `medes functions` lists them";
        let body = json!({"error": {"code": "NoSuchFunction", "message": message}});
        Reply::json(404, &body)
    });
    let output = fake.medes(&["invoke", "f"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        err(&output),
        "medes: no function named f; `medes functions` lists them (NoSuchFunction)\n"
    );
}

#[test]
fn deploy_sends_the_whole_description() {
    let fake = Fake::new(|_| Reply::json(200, &function("f")));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    let path = path.to_str().unwrap();
    let output = fake.medes(&[
        "deploy",
        "f",
        path,
        "--runtime",
        "python3.11",
        "--handler",
        "app.handler",
        "--layer",
        path,
        "--env",
        "A=b=c",
        "--memory",
        "128",
        "--timeout",
        "1.5s",
        "--layout",
        "random",
        "--max-sandboxes",
        "3",
    ]);
    assert!(output.status.success(), "{}", err(&output));
    assert_eq!(out(&output), "deployed f (python3.11, app.handler)\n");
    let seen = fake.seen.lock().unwrap();
    assert_eq!(seen[0].line, "PUT /v1/functions/f");
    assert_eq!(
        serde_json::from_slice::<Value>(&seen[0].body).unwrap(),
        json!({
            "runtime": "python3.11", "handler": "app.handler", "code": {"directory": path},
            "layers": [path], "environment": {"A": "b=c"}, "memory_mib": 128,
            "timeout_ms": 1500, "max_sandboxes": 3, "layout": "random", "tenant": "default",
            "description": ""
        })
    );
}

#[test]
fn an_archive_is_sent_as_it_is() {
    let fake = Fake::new(|_| Reply::json(200, &function("f")));
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("code.zip");
    std::fs::write(&archive, b"not really a zip").unwrap();
    let archive = archive.to_str().unwrap();
    let args = ["deploy", "f", archive, "--runtime", "python3.11", "--handler", "app.handler"];
    assert!(fake.medes(&args).status.success());
    let body: Value = serde_json::from_slice(&fake.seen.lock().unwrap()[0].body).unwrap();
    assert_eq!(body["code"], json!({"zip": "bm90IHJlYWxseSBhIHppcA=="}));
}

#[test]
fn lists_are_tables_or_json() {
    let fake = Fake::new(|line| match line {
        "GET /v1/functions" => Reply::json(200, &json!({"functions": [function("f")]})),
        _ => Reply::json(
            200,
            &json!({"sandboxes": [
                {"id": "00000000000000aa", "function": "f", "state": "dedup", "age_ms": 61_000,
                 "idle_ms": 1000, "requests": 2, "memory_total": 500_000, "warm_bytes": 10_000_000,
                 "memory": {"private": 1, "kernel": 2, "store": 3, "metadata": 4},
                 "saved": 0.95, "stays_warm": null, "dedups": 1, "restores": 0},
                {"id": "00000000000000ab", "function": "g", "state": "warm", "age_ms": 1,
                 "idle_ms": 1, "requests": 2, "memory_total": 10_000_000, "warm_bytes": 10_000_000,
                 "memory": {"private": 1, "kernel": 2, "store": 3, "metadata": 4},
                 "saved": null, "stays_warm": "it is traced", "dedups": 0, "restores": 0}
            ]}),
        ),
    });
    let text = out(&fake.medes(&["functions"]));
    assert!(text.starts_with("FUNCTION  RUNTIME     HANDLER"), "{text}");
    assert!(text.contains("python3.11"), "{text}");
    let text = out(&fake.medes(&["ps"]));
    assert!(text.contains("95 %") && text.contains("it is traced"), "{text}");
    let text = out(&fake.medes(&["ps", "--function", "g"]));
    assert!(!text.contains("00aa") && text.contains("00ab"), "{text}");
    let value: Value = serde_json::from_slice(&fake.medes(&["ps", "--json"]).stdout).unwrap();
    assert_eq!(value["sandboxes"][0]["saved"], 0.95);
}

#[test]
fn operations_find_out_whether_a_sandbox_or_a_function_is_meant() {
    const ID: &str = "00000000000000aa";
    let fake = Fake::new(|line| match line {
        "GET /v1/sandboxes" => {
            Reply::json(200, &json!({"sandboxes": [{"id": ID, "function": "f", "state": "warm"}]}))
        }
        "GET /v1/functions" => {
            Reply::json(200, &json!({"functions": [function("f"), function("g")]}))
        }
        l if l.starts_with("DELETE") => Reply(204, vec![], vec![]),
        l if l.ends_with("00aa/restore") => Reply::json(
            409,
            &json!({"error": {"code": "WrongState", "message": "it is warm, not dedup"}}),
        ),
        l if l.contains("/sandboxes/") => {
            Reply::json(200, &json!({"sandbox": ID, "report": {"pages": 1, "total_us": 1000}}))
        }
        _ => Reply::json(200, &json!({"results": []})),
    });
    let output = fake.medes(&["dedup", ID]);
    assert_eq!(out(&output), format!("{ID}  deduplicated in 1.00 ms\n"));
    let output = fake.medes(&["restore", ID]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(out(&output), format!("{ID}  it is warm, not dedup\n"));
    assert_eq!(out(&fake.medes(&["purge", ID])), format!("{ID}  purged\n"));
    assert_eq!(out(&fake.medes(&["purge", "f"])), "no sandbox to purge\n");
    assert!(fake.medes(&["dedup", "--all"]).status.success());
    assert!(fake.medes(&["dedup", ID, "--base"]).status.success());
    assert_eq!(fake.medes(&["dedup", "f", "--base"]).status.code(), Some(2));
    let requests = fake.requests();
    for expected in [
        format!("POST /v1/sandboxes/{ID}/dedup"),
        format!("POST /v1/sandboxes/{ID}/dedup?base=true"),
        format!("DELETE /v1/sandboxes/{ID}"),
        "POST /v1/functions/f/purge".to_owned(),
        "POST /v1/functions/g/dedup".to_owned(),
    ] {
        assert!(requests.contains(&expected), "{expected} not in {requests:?}");
    }
}

#[test]
fn logs_are_passed_on_line_by_line() {
    let fake = Fake::new(|_| Reply(200, vec![], b"one\ntwo\n".to_vec()));
    assert_eq!(out(&fake.medes(&["logs", "f", "--bytes", "10"])), "one\ntwo\n");
    assert_eq!(
        out(&fake.medes(&["logs", "f", "--json"])),
        "{\"line\":\"one\"}\n{\"line\":\"two\"}\n"
    );
    assert!(fake.medes(&["logs", "-f", "f"]).status.success());
    assert_eq!(
        fake.requests(),
        [
            "GET /v1/functions/f/logs?bytes=10",
            "GET /v1/functions/f/logs?bytes=65536",
            "GET /v1/functions/f/logs?bytes=65536&follow=true"
        ]
    );
}

#[test]
fn every_name_is_tried_by_rm() {
    let fake = Fake::new(|line| match line {
        "DELETE /v1/functions/b" => Reply::json(
            404,
            &json!({"error": {"code": "NoSuchFunction", "message": "no function named b"}}),
        ),
        _ => Reply(204, vec![], vec![]),
    });
    let output = fake.medes(&["rm", "a", "b", "c"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(out(&output), "removed a\nremoved c\n");
    assert!(err(&output).contains("no function named b"));
}

#[test]
fn the_configuration_that_is_shown_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("medes.toml");
    let shown = medes("http://x", &["config", "--default"], b"");
    std::fs::write(&file, &shown.stdout).unwrap();
    let file = file.to_str().unwrap();
    let again = medes("http://x", &["config", "--config", file], b"");
    assert!(again.status.success(), "{}", err(&again));
    let body = |o: &Output| out(o).split_once("\n\n").unwrap().1.to_owned();
    assert_eq!(body(&shown), body(&again));
    assert!(out(&again).starts_with(&format!("# From {file}")));
    std::fs::write(file, "[lifecycle]\nidel = \"1s\"\n").unwrap();
    let output = medes("http://x", &["config", "--config", file], b"");
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("medes.toml:2: ") && err(&output).contains("`idel`"));
}
