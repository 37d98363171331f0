//! What a function sees of the machine that it runs on.

use std::fs;

use serde_json::json;

use crate::platform::Platform;

#[test]
fn a_function_sees_and_reaches_nothing_but_its_own() {
    let platform = Platform::start();
    platform.deploy("observer");
    platform.deploy_as("neighbour", "busy", json!({}));
    platform.invoke("neighbour", &json!({})).expect_start("cold");
    let neighbour = platform.sandbox_processes()[0];
    let code = platform.client().get("/v1/functions/neighbour").expect_ok()["code"].clone();
    let event = json!({
        "port": platform.port(),
        "host_pid": neighbour,
        "paths": [platform.data_dir(), platform.run_dir(), code, "/sys/fs/cgroup", "/var/lib",
                  "/etc/shadow", "/etc/hostname", "/dev/kmsg", "/dev/userfaultfd"],
    });
    for round in 0..2 {
        let seen = platform.invoke("observer", &event).expect_ok();
        let pids: Vec<_> = seen["pids"].as_array().unwrap().iter().collect();
        assert_eq!(pids, [&seen["pid"]], "other processes are in sight");
        assert_eq!(seen["ids"][0], 1000);
        assert!(!seen["ids"].as_array().unwrap().contains(&json!(0)), "{seen}");
        assert_eq!(seen["capabilities"], "0000000000000000");
        assert_eq!((&seen["no_new_privileges"], &seen["seccomp"]), (&json!("1"), &json!("2")));
        for (directory, result) in seen["writes"].as_object().unwrap() {
            assert_ne!(result, "allowed", "{directory} can be written to");
        }
        assert_eq!(seen["scratch"], "allowed");
        assert_eq!(seen["own_code"], "EROFS");
        assert_eq!(seen["interfaces"], json!(["lo"]));
        assert_eq!(seen["outside"], "ENETUNREACH");
        assert_eq!(seen["platform"], "ECONNREFUSED");
        for (path, exists) in seen["files"].as_object().unwrap() {
            assert_eq!(exists, false, "{path} is in sight");
        }
        assert_eq!(seen["tasks"], json!(["/var/task/", "/var/task/app.py"]));
        assert_eq!(seen["host"], "observer");
        for (call, result) in seen["system"].as_object().unwrap() {
            assert!(result != "allowed" && !result.is_null(), "{call} is allowed: {seen}");
        }
        // The same from the dedup state: nothing of the operation stays in the sandbox.
        if round == 0 {
            platform.dedup("observer");
        }
    }

    // From outside: each sandbox has a user id of its own, and no privileged one.
    let mut users: Vec<_> = platform
        .sandbox_processes()
        .iter()
        .map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
            let ids: Vec<u32> =
                line.split_whitespace().skip(1).map(|id| id.parse().unwrap()).collect();
            assert_eq!(ids, [ids[0]; 4]);
            ids[0]
        })
        .collect();
    users.sort_unstable();
    assert_eq!(users.len(), 2);
    assert_ne!(users[0], users[1]);
    assert!(users[0] >= platform.uid_base());
    platform.stop();
}
