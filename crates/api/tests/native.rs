//! The native API as a client sees it.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::{Door, zip};
use serde_json::{Value, json};

fn deployment() -> Value {
    json!({
        "runtime": "python3.11",
        "handler": "app.handler",
        "code": { "zip": STANDARD.encode(zip("app.py", "def handler(e, c): return e")) },
        "environment": { "A": "b" },
    })
}

#[test]
fn a_function_is_deployed_invoked_and_removed() {
    let door = Door::open(|_| {});
    let f = door.json("PUT", "/v1/functions/f", &deployment());
    assert_eq!(f.status, 200, "{}", String::from_utf8_lossy(&f.body));
    let f = f.json();
    assert_eq!(
        (&f["memory_mib"], &f["timeout_ms"], &f["layout"]),
        (&json!(256), &json!(30_000), &json!("function"))
    );
    assert!(!f.to_string().contains("seed"));

    let r = door.post("/v1/functions/f/invoke", r#"{"x":1}"#);
    assert_eq!((r.status, r.body.as_slice()), (200, br#"{"x":1}"#.as_slice()));
    assert_eq!(r.header("x-medes-start"), "cold");
    assert_eq!(r.header("x-medes-sandbox").len(), 16);
    assert_eq!(r.header("x-medes-request").len(), 36);
    let us = |name: &str| r.header(name).parse::<u64>().unwrap();
    let sum = us("x-medes-queue-us") + us("x-medes-startup-us") + us("x-medes-execution-us");
    assert!(us("x-medes-startup-us") >= 5_000 && us("x-medes-total-us") >= sum);
    assert_eq!(door.post("/v1/functions/f/invoke", "2").header("x-medes-start"), "warm");

    let r = door.post("/v1/functions/f/invoke", r#"{"raise":"no"}"#);
    assert_eq!((r.status, r.header("x-medes-error")), (200, "ValueError"));
    assert_eq!(r.json()["errorMessage"], "no");
    let r = door.post("/v1/functions/f/invoke", r#"{"exit":"exit status 3"}"#);
    assert_eq!(r.header("x-medes-error"), "Runtime.ExitError");

    let f = door.get("/v1/functions/f").json();
    assert_eq!(f["counts"], json!({ "cold": 1, "warm": 3, "dedup": 0, "errors": 2 }));
    assert_eq!(door.get("/v1/functions").json()["functions"].as_array().unwrap().len(), 1);
    assert_eq!(door.send("DELETE", "/v1/functions/f", &[], b"").status, 204);
    assert_eq!(door.get("/v1/functions/f").status, 404);
    door.close();
}

#[test]
fn a_directory_is_deployed_as_it_is_then() {
    let door = Door::open(|_| {});
    let source = tempfile::tempdir().unwrap();
    let source = source.path();
    std::fs::write(source.join("app.py"), "x").unwrap();
    let mut body = deployment();
    body["code"] = json!({ "directory": source });
    let f = door.json("PUT", "/v1/functions/f", &body).json();
    std::fs::remove_file(source.join("app.py")).unwrap();
    let code = std::path::Path::new(f["code"].as_str().unwrap());
    assert_eq!(std::fs::read_to_string(code.join("app.py")).unwrap(), "x");
    door.close();
}

#[test]
fn sandboxes_are_shown_and_moved_by_hand() {
    let door = Door::open(|_| {});
    door.json("PUT", "/v1/functions/f", &deployment());
    door.post("/v1/functions/f/invoke", "1");
    let list = door.get("/v1/sandboxes").json();
    let s = &list["sandboxes"][0];
    assert_eq!((&s["state"], &s["function"]), (&json!("warm"), &json!("f")));
    let id = s["id"].as_str().unwrap().to_owned();

    let wrong = door.post(&format!("/v1/sandboxes/{id}/restore"), "");
    assert_eq!((wrong.status, &wrong.json()["error"]["code"]), (409, &json!("WrongState")));
    let r = door.post(&format!("/v1/sandboxes/{id}/dedup?base=true"), "").json();
    assert_eq!((&r["sandbox"], &r["report"]["base_bytes"]), (&json!(id), &json!(1 << 20)));
    let s = &door.get("/v1/sandboxes").json()["sandboxes"][0];
    assert_eq!((&s["state"], &s["saved"]), (&json!("dedup"), &json!(0.8)));
    assert!(door.post(&format!("/v1/sandboxes/{id}/restore"), "").json()["report"].is_object());

    let all = door.post("/v1/functions/f/dedup", "").json();
    assert_eq!(
        (&all["results"][0]["sandbox"], &all["results"][0]["error"]),
        (&json!(id), &Value::Null)
    );
    let r = door.post("/v1/functions/f/invoke", "1");
    assert_eq!(r.header("x-medes-start"), "dedup");
    let memory = ["pages-before", "prefetch-us", "thaw-us", "faults", "pages-on-demand"]
        .map(|name| r.header(&format!("x-medes-{name}")));
    assert_eq!(memory, ["7", "3", "1", "2", "2"]);
    assert_eq!(door.post("/v1/functions/f/invoke", "1").header("x-medes-faults"), "");
    door.node.behave(|b| b.stays_warm = 100);
    let all = door.post("/v1/functions/f/dedup", "").json();
    assert_eq!(all["results"][0]["error"]["code"], "StaysWarm");
    let s = &door.get("/v1/sandboxes").json()["sandboxes"][0];
    assert_eq!(s["stays_warm"], "it has io_uring");
    assert_eq!(door.get("/v1/info").json()["sandboxes"], json!({ "warm": 1 }));
    assert_eq!(door.post("/v1/functions/f/start", "").json()["sandbox"], "0000000000000002");
    assert_eq!(door.get("/v1/info").json()["sandboxes"], json!({ "warm": 2 }));
    assert_eq!(door.post("/v1/functions/g/start", "").status, 404);
    assert_eq!(door.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").status, 204);
    assert_eq!(door.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").status, 404);
    door.close();
}

#[test]
fn errors_name_their_cause() {
    let door = Door::open(|c| {
        c.max_payload = 1000;
        c.max_code_unpacked = 10_000;
    });
    door.json("PUT", "/v1/functions/f", &deployment());
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut body = deployment();
        change(&mut body);
        door.json("PUT", "/v1/functions/g", &body)
    };
    let big = STANDARD.encode(zip("big", &"x".repeat(20_000)));
    for (answer, status, code, part) in [
        (door.post("/v1/functions/nope/invoke", "1"), 404, "NoSuchFunction", "medes functions"),
        (door.post("/v1/functions/f/invoke", &"1".repeat(1001)), 413, "PayloadTooLarge", "1000"),
        (door.get("/v1/nonsense"), 404, "NoSuchRoute", "/v1/functions"),
        (door.send("PATCH", "/v1/functions", &[], b""), 404, "NoSuchRoute", "PATCH"),
        (door.post("/v1/sandboxes/zz/dedup", ""), 400, "BadRequest", "16 hexadecimal"),
        (door.post("/v1/sandboxes/00000000000000ff/dedup", ""), 404, "NoSuchSandbox", "medes ps"),
        (door.post("/v1/sandboxes/00000000000000ff/dedup?base=x", ""), 400, "BadRequest", "base"),
        (door.send("PUT", "/v1/functions/g", &[], b"{"), 400, "BadRequest", "EOF"),
        (door.json("PUT", "/v1/functions/a%20b", &deployment()), 400, "BadRequest", "a b"),
        (changed(&|b| b["memry"] = json!(1)), 400, "BadRequest", "memry"),
        (changed(&|b| b["runtime"] = json!("cobol")), 400, "NoRuntime", "python3.11"),
        (changed(&|b| b["code"] = json!({ "zip": "UEs=" })), 400, "BadCode", "zip"),
        (changed(&|b| b["code"] = json!({ "zip": "?" })), 400, "BadRequest", "code.zip"),
        (changed(&|b| b["code"] = json!({ "zip": big })), 413, "CodeTooLarge", "10000"),
        (changed(&|b| b["layers"] = json!(["/nonexistent"])), 400, "BadCode", "/nonexistent"),
        (changed(&|b| b["code"] = json!({ "directory": "x" })), 400, "BadRequest", "absolute"),
    ] {
        let body = answer.json();
        let message = body["error"]["message"].as_str().unwrap();
        assert_eq!((answer.status, &body["error"]["code"]), (status, &json!(code)), "{message}");
        assert!(message.contains(part), "{message}");
    }
    let page = [("origin", "https://evil.example")];
    assert_eq!(door.send("POST", "/v1/shutdown", &page, b"").status, 403);
    assert_eq!(door.get("/v1/health").json()["status"], "ok");
    door.close();
}

#[test]
fn a_log_is_followed_until_the_platform_ends() {
    let door = Door::open(|_| {});
    door.json("PUT", "/v1/functions/f", &deployment());
    door.node.log("f", "one\n");
    assert_eq!(door.get("/v1/functions/f/logs").body, b"one\n");
    assert_eq!(door.get("/v1/functions/f/logs?bytes=2").body, b"e\n");

    let mut stream = TcpStream::connect(door.address.strip_prefix("http://").unwrap()).unwrap();
    stream
        .write_all(b"GET /v1/functions/f/logs?follow=true HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .unwrap();
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    assert!(lines.any(|l| l == "one"));
    door.node.log("f", "two\n");
    assert!(lines.any(|l| l == "two"));
    // A function that is deployed again goes on in the same log.
    door.json("PUT", "/v1/functions/f", &deployment());
    door.node.log("f", "three\n");
    assert!(lines.any(|l| l == "three"));
    door.close();
    assert_eq!(lines.last().as_deref(), Some(""), "the stream is complete");
}

#[test]
fn the_policy_is_shown_changed_and_explained() {
    let door = Door::open(|_| {});
    door.json("PUT", "/v1/functions/f", &deployment());
    let view = door.get("/v1/policy").json();
    assert_eq!(
        (&view["policy"]["name"], &view["origin"]),
        (&json!("periods"), &json!("configuration"))
    );
    assert_eq!(view["functions"], json!([]));

    // What is not named stays as it is.
    let view = door.json("PUT", "/v1/policy", &json!({ "name": "latency", "alpha": 4 })).json();
    assert_eq!(
        (&view["policy"]["alpha"], &view["policy"]["idle_ms"]),
        (&json!(4.0), &json!(60_000))
    );
    assert_eq!((&view["origin"], &view["configured"]["name"]), (&json!("live"), &json!("periods")));
    assert_eq!(door.get("/v1/info").json()["config"]["policy"], view["policy"]);
    for (bad, part) in [
        (json!({ "alpah": 2 }), "there are alpha, "),
        (json!({ "alpha": 0.5 }), "alpha: 1 or more"),
        (json!({ "name": "lru" }), "greedy-dual"),
        (json!({ "idle_ms": -1 }), "-1"),
        (json!([]), "the body"),
    ] {
        let r = door.json("PUT", "/v1/policy", &bad);
        let text = r.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(r.status == 400 && text.contains(part), "{bad}: {text}");
    }

    let own = json!({ "idle_ms": 5_000, "priority": 3 });
    let r = door.json("PUT", "/v1/functions/f/policy", &own);
    assert_eq!(r.json()["settings"]["priority"], 3.0);
    let r = door.json("PUT", "/v1/functions/f/policy", &json!({ "priority": null, "alpha": 9 }));
    assert_eq!(r.json()["settings"]["idle_ms"], 5_000);
    assert_eq!(door.get("/v1/policy").json()["functions"][0]["settings"]["priority"], Value::Null);

    let e = door.get("/v1/functions/f/policy").json();
    assert_eq!((&e["model"], &e["population"]["warm"]), (&Value::Null, &json!(0)));
    for _ in 0..10 {
        door.post("/v1/functions/f/invoke", "1");
    }
    let e = door.get("/v1/functions/f/policy").json();
    assert!(e["model"]["warm_bytes"].as_f64().unwrap() > 1e7, "{e}");
    assert_eq!((&e["keep"]["warm_ms"], &e["settings"]["alpha"]), (&json!(5_000), &json!(9.0)));
    assert_eq!(e["targets"].as_array().unwrap().len(), 6);

    // With the function deployed anew, what was set stays; a deployment may bring its own.
    door.json("PUT", "/v1/functions/f", &deployment());
    assert_eq!(door.get("/v1/functions/f").json()["policy"]["alpha"], 9.0);
    let mut other = deployment();
    other["policy"] = json!({ "alpha": 2 });
    assert_eq!(door.json("PUT", "/v1/functions/f", &other).json()["policy"]["alpha"], 2.0);
    other["policy"] = json!({ "alpha": 0 });
    assert_eq!(door.json("PUT", "/v1/functions/f", &other).status, 400);

    assert_eq!(door.send("DELETE", "/v1/functions/f/policy", &[], b"").status, 200);
    assert_eq!(door.send("DELETE", "/v1/policy", &[], b"").json()["policy"]["name"], "periods");
    assert_eq!(door.get("/v1/policy").json()["functions"], json!([]));
    assert_eq!(door.get("/v1/functions/nobody/policy").status, 404);
    door.close();
}
