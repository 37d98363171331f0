//! AWS Lambda's dialect, as its clients send it.

mod common;

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::{Answer, Door, zip};
use serde_json::{Value, json};

const FUNCTIONS: &str = "/2015-03-31/functions";

fn creation(name: &str) -> Value {
    json!({
        "FunctionName": name,
        "Runtime": "python3.11",
        "Handler": "app.handler",
        "Role": "arn:aws:iam::123456789012:role/x",
        "Code": { "ZipFile": STANDARD.encode(zip("app.py", "x")) },
        "Timeout": 3,
        "MemorySize": 256,
        "Environment": { "Variables": { "A": "b" } },
        "Tags": { "team": "t" },
        "Publish": false,
    })
}

fn invoke(door: &Door, name: &str, headers: &[(&str, &str)], payload: &str) -> Answer {
    let path = format!("{FUNCTIONS}/{name}/invocations");
    door.send("POST", &path, headers, payload.as_bytes())
}

#[test]
fn a_functions_whole_life() {
    let door = Door::open(|_| {});
    let f = door.json("POST", FUNCTIONS, &creation("f"));
    assert_eq!(f.status, 201, "{}", String::from_utf8_lossy(&f.body));
    assert_eq!(f.header("x-amzn-requestid").len(), 36);
    let f = f.json();
    for (key, value) in [
        ("FunctionName", json!("f")),
        ("FunctionArn", json!("arn:aws:lambda:us-east-1:000000000000:function:f")),
        ("State", json!("Active")),
        ("LastUpdateStatus", json!("Successful")),
        ("Timeout", json!(3)),
        ("MemorySize", json!(256)),
        ("Version", json!("$LATEST")),
        ("Role", json!("arn:aws:iam::123456789012:role/x")),
        ("Environment", json!({ "Variables": { "A": "b" } })),
    ] {
        assert_eq!(f[key], value, "{key}");
    }
    assert!(f["LastModified"].as_str().unwrap().ends_with("+0000"));
    let again = door.json("POST", &format!("{FUNCTIONS}/"), &creation("f"));
    assert_eq!(
        (again.status, again.header("x-amzn-errortype")),
        (409, "ResourceConflictException")
    );

    let got = door.get(&format!("{FUNCTIONS}/f")).json();
    assert_eq!((&got["Configuration"], &got["Tags"]), (&f, &json!({ "team": "t" })));
    assert_eq!(door.get(&format!("{FUNCTIONS}/f/configuration")).json(), f);

    let path = format!("{FUNCTIONS}/f/configuration");
    let change = json!({ "Timeout": 9, "RevisionId": f["RevisionId"] });
    let g = door.json("PUT", &path, &change).json();
    assert_eq!((&g["Timeout"], &g["MemorySize"], &g["Role"]), (&json!(9), &json!(256), &f["Role"]));
    let stale = door.json("PUT", &path, &change);
    assert_eq!(
        (stale.status, stale.header("x-amzn-errortype")),
        (412, "PreconditionFailedException")
    );
    let code = json!({ "ZipFile": STANDARD.encode(zip("app.py", "y")) });
    let h = door.json("PUT", &format!("{FUNCTIONS}/f/code"), &code).json();
    assert_ne!(h["CodeSha256"], g["CodeSha256"]);
    assert_eq!(h["Timeout"], 9);

    let gone = door.send("DELETE", &format!("{FUNCTIONS}/f"), &[], b"");
    assert_eq!((gone.status, gone.body.len()), (204, 0));
    let missing = door.get(&format!("{FUNCTIONS}/f"));
    assert_eq!(
        (missing.status, missing.header("x-amzn-errortype")),
        (404, "ResourceNotFoundException")
    );
    assert_eq!(
        missing.json(),
        json!({
            "Type": "User",
            "Message": "Function not found: arn:aws:lambda:us-east-1:000000000000:function:f",
        })
    );
    door.close();
}

#[test]
fn names_are_understood_in_every_form() {
    let door = Door::open(|_| {});
    let arn = "arn:aws:lambda:eu-central-1:123456789012:function:f";
    assert_eq!(door.json("POST", FUNCTIONS, &creation(arn)).status, 201);
    for name in [
        "f",
        "f:$LATEST",
        "f%3A%24LATEST",
        arn,
        &arn.replace(':', "%3A"),
        "123456789012:function:f",
        "function%3Af",
    ] {
        assert_eq!(door.get(&format!("{FUNCTIONS}/{name}")).status, 200, "{name}");
        assert_eq!(invoke(&door, name, &[], "1").body, b"1", "{name}");
    }
    assert_eq!(door.get(&format!("{FUNCTIONS}/f?Qualifier=%24LATEST")).status, 200);
    assert_eq!(door.get(&format!("{FUNCTIONS}/f?Qualifier=7")).status, 404);
    assert_eq!(invoke(&door, "f:prod", &[], "1").status, 404);
    door.close();
}

#[test]
fn functions_are_listed_in_pages() {
    let door = Door::open(|_| {});
    for n in 0..5 {
        door.json("POST", FUNCTIONS, &creation(&format!("f{n}")));
    }
    let mut names = Vec::new();
    let mut marker = String::new();
    for _ in 0..3 {
        let page = door.get(&format!("{FUNCTIONS}?MaxItems=2&Marker={marker}")).json();
        for f in page["Functions"].as_array().unwrap() {
            names.push(f["FunctionName"].as_str().unwrap().to_owned());
        }
        marker = page["NextMarker"].as_str().unwrap_or("").to_owned();
    }
    assert_eq!(names, ["f0", "f1", "f2", "f3", "f4"]);
    assert_eq!(marker, "");
    assert_eq!(door.get(&format!("{FUNCTIONS}/?MaxItems=0")).status, 400);
    door.close();
}

#[test]
fn invocation_types_and_error_documents() {
    let door = Door::open(|_| {});
    door.json("POST", FUNCTIONS, &creation("f"));
    let r = invoke(&door, "f", &[("content-type", "application/octet-stream")], r#"{"x":1}"#);
    assert_eq!((r.status, r.body.as_slice()), (200, br#"{"x":1}"#.as_slice()));
    assert_eq!(r.header("x-amz-executed-version"), "$LATEST");
    assert_eq!(r.header("x-amz-function-error"), "");
    assert_eq!(r.header("x-amz-log-result"), "");
    assert_eq!(invoke(&door, "f", &[], "").body, b"{}");

    for (payload, kind, message) in [
        (r#"{"raise":"no"}"#, "ValueError", "no"),
        (r#"{"sleep_ms":9000}"#, "Sandbox.Timedout", "Task timed out after 3.00 seconds"),
        (r#"{"exit":"exit status 1"}"#, "Runtime.ExitError", "exited with error: exit status 1"),
        (r#"{"oom":true}"#, "Runtime.OutOfMemory", "exited with error: signal: killed"),
        (r#"{"bytes":6291557}"#, "Function.ResponseSizeTooLarge", "(6291556 bytes)."),
    ] {
        let r = invoke(&door, "f", &[], payload);
        assert_eq!((r.status, r.header("x-amz-function-error")), (200, "Unhandled"));
        let body = r.json();
        assert_eq!(body["errorType"], kind);
        let text = body["errorMessage"].as_str().unwrap();
        assert!(text.contains(message), "{text}");
        if message.contains("exit") || message.contains("Task") {
            assert!(
                text.starts_with(&format!("RequestId: {} Error: ", r.header("x-amzn-requestid")))
            );
        }
    }

    assert_eq!(invoke(&door, "f", &[("x-amz-invocation-type", "DryRun")], "{}").status, 204);
    let event = [("X-Amz-Invocation-Type", "Event")];
    let r = invoke(&door, "f", &event, r#"{"print":"seen\n","log":"f"}"#);
    assert_eq!((r.status, r.body.len()), (202, 0));
    let until = Instant::now() + Duration::from_secs(10);
    while door.get("/v1/functions/f/logs").body != b"seen\n" {
        assert!(Instant::now() < until, "the event was never run");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(invoke(&door, "f", &[("x-amz-invocation-type", "Later")], "{}").status, 400);
    door.close();
}

#[test]
fn the_log_tail_is_the_requests_own() {
    let door = Door::open(|_| {});
    door.json("POST", FUNCTIONS, &creation("f"));
    invoke(&door, "f", &[], "1");
    // The fake's sandboxes are numbered: the first is 0000000000000001.
    let printed = "2026-01-01T00:00:00.000Z 00000000 hello\n2026-01-01T00:00:00.000Z ffffffff no\n";
    let payload = json!({ "print": printed, "log": "f" }).to_string();
    let r = invoke(&door, "f", &[("x-amz-log-type", "Tail")], &payload);
    let text = STANDARD.decode(r.header("x-amz-log-result")).unwrap();
    let text = String::from_utf8(text).unwrap();
    let id = r.header("x-amzn-requestid");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], format!("START RequestId: {id} Version: $LATEST"));
    assert_eq!(lines[1], "hello");
    assert_eq!(lines[2], format!("END RequestId: {id}"));
    assert!(lines[3].starts_with(&format!("REPORT RequestId: {id}\tDuration: ")), "{text}");
    assert!(lines[3].contains("Memory Size: 256 MB\tMax Memory Used: 20 MB"), "{text}");
    door.close();
}

#[test]
fn bad_requests_get_awss_errors() {
    let door = Door::open(|c| c.max_code = 10_000);
    door.json("POST", FUNCTIONS, &creation("f"));
    let create = |change: &dyn Fn(&mut Value)| {
        let mut body = creation("g");
        change(&mut body);
        door.json("POST", FUNCTIONS, &body)
    };
    let invalid = "InvalidParameterValueException";
    let context = [("x-amz-client-context", "!!")];
    for (answer, status, kind, part) in [
        (invoke(&door, "f", &[], "{x"), 400, "InvalidRequestContentException", "Could not parse"),
        (
            invoke(&door, "f", &context, "1"),
            400,
            "InvalidRequestContentException",
            "Client context",
        ),
        (invoke(&door, "nope", &[], "1"), 404, "ResourceNotFoundException", "Function not found"),
        (invoke(&door, "a%20b", &[], "1"), 400, "ValidationException", "functionName"),
        (
            invoke(&door, "f", &[], &format!("\"{}\"", "x".repeat(6_291_456))),
            413,
            "RequestTooLargeException",
            "Request must be smaller than 6291456 bytes for the InvokeFunction operation",
        ),
        (
            invoke(
                &door,
                "f",
                &[("x-amz-invocation-type", "Event")],
                &format!("\"{}\"", "x".repeat(1 << 20)),
            ),
            413,
            "RequestTooLargeException",
            "too large for the Event invocation type (limit 1048576 bytes)",
        ),
        (door.post(FUNCTIONS, "{"), 400, "SerializationException", "EOF"),
        (
            door.post(FUNCTIONS, &"x".repeat(2 << 20)),
            413,
            "RequestEntityTooLargeException",
            "Create",
        ),
        (create(&|b| b["Runtime"] = json!("python2.6")), 400, invalid, "enum value set: [fake, "),
        (create(&|b| b["Timeout"] = json!(9999)), 400, "ValidationException", "'timeout'"),
        (create(&|b| b["MemorySize"] = json!(1)), 400, "ValidationException", "'memorySize'"),
        (create(&|b| b["Code"] = json!({ "ZipFile": "UEsF" })), 400, invalid, "Could not unzip"),
        (create(&|b| b["Code"] = json!({ "S3Bucket": "b" })), 400, invalid, "ZipFile"),
        (create(&|b| b["Layers"] = json!(["arn:aws:lambda:r:1:layer:np:1"])), 400, invalid, "np"),
        (create(&|b| b["PackageType"] = json!("Image")), 400, invalid, "PackageType"),
        (create(&|b| b["Publish"] = json!(true)), 400, invalid, "Publish"),
        (
            create(&|b| drop(b.as_object_mut().unwrap().remove("Handler"))),
            400,
            invalid,
            "mandatory",
        ),
        (
            create(&|b| b["Environment"]["Variables"]["AWS_REGION"] = json!("x")),
            400,
            invalid,
            "reserved keys",
        ),
        (
            door.get(&format!("{FUNCTIONS}/f/aliases")),
            404,
            "UnknownOperationException",
            "GetFunction",
        ),
    ] {
        let body = answer.json();
        let message = body["Message"].as_str().unwrap();
        let got = (answer.status, answer.header("x-amzn-errortype"));
        assert_eq!(got, (status, kind), "{message}");
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(invoke(&door, "f", &[], "1").status, 200);
    door.close();
}

#[test]
fn layers_are_named_in_the_configuration() {
    let layers = tempfile::tempdir().unwrap();
    let path = layers.path().to_owned();
    let door = Door::open(|c| drop(c.layers.insert("numpy".into(), path)));
    let mut body = creation("f");
    let layer = "arn:aws:lambda:us-east-1:123456789012:layer:numpy:3";
    body["Layers"] = json!([layer]);
    let f = door.json("POST", FUNCTIONS, &body).json();
    assert_eq!(f["Layers"][0]["Arn"], layer);
    let native = door.get("/v1/functions/f").json();
    assert_eq!(native["layers"], json!([layers.path().canonicalize().unwrap()]));
    door.close();
}

#[test]
fn too_many_requests_are_throttled() {
    let door = Door::open(|c| {
        c.max_sandboxes_per_function = 1;
        c.queue_limit = 0;
    });
    door.json("POST", FUNCTIONS, &creation("f"));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| invoke(&door, "f", &[], r#"{"sleep_ms":1500}"#));
        let until = Instant::now() + Duration::from_secs(10);
        while door.get("/v1/info").json()["sandboxes"] != json!({ "running": 1 }) {
            assert!(Instant::now() < until);
        }
        let second = invoke(&door, "f", &[], "1");
        assert_eq!(second.status, 429);
        assert_eq!(second.header("x-amzn-errortype"), "TooManyRequestsException");
        assert_eq!(first.join().unwrap().status, 200);
    });
    door.close();
}
