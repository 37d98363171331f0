//! Platforms that can't start, and what that does to those that run.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use serde_json::json;

use crate::platform::{Failed, Platform, Setup, functions, program};

#[track_caller]
fn refused(failed: Failed, because: &str) {
    assert_eq!(failed.code, Some(3), "{}", failed.log);
    assert!(failed.log.contains(because), "{}", failed.log);
}

/// A file system of `size` bytes on a directory of a platform that is not started yet.
fn small_disk(setup: &Setup, size: &str) {
    let data = setup.path("data");
    let options = format!("size={size}");
    mount(Some("none"), &data, Some("tmpfs"), MsFlags::empty(), Some(&*options)).unwrap();
    setup.link_runtimes(&data);
}

#[test]
fn a_thousand_sandboxes_would_find_room_for_their_descriptors() {
    let platform = Platform::start();
    for process in [platform.pid(), platform.keeper()] {
        let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let soft: u64 = line.split_whitespace().nth(3).unwrap().parse().unwrap();
        assert!(soft >= 10_000, "{line}");
    }
    platform.stop();
}

#[test]
fn a_port_or_a_run_directory_in_use() {
    let platform = Platform::start();
    platform.deploy("busy");
    refused(Setup::new().port(platform.port()).fail_to_start(), "cannot listen on 127.0.0.1:");
    let run_dir = platform.run_dir();
    let second = Setup::new().set("node", "run_dir", run_dir.to_str().unwrap()).fail_to_start();
    refused(second, "another instance is running with");
    platform.invoke("busy", &json!({})).expect_ok();
    platform.dedup("busy");
    platform.invoke("busy", &json!({})).expect_start("dedup");
    platform.stop();
}

#[test]
fn not_root() {
    // Nobody may not be able to reach the build directory.
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let copy = directory.path().join("medes");
    std::fs::copy(program(), &copy).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&copy);
        command.args(arguments).current_dir("/").uid(65_534).gid(65_534);
        let output = command.output().unwrap();
        Failed {
            code: output.status.code(),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    };
    refused(run(&["serve"]), "run it as root");
    assert_eq!(run(&["config"]).code, Some(0));
}

#[test]
fn a_bad_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("medes.toml");
    for (text, because) in [
        ("[node]\nuid_base = 0\n", "node.uid_base"),
        ("[api]\nlisten = \"here\"\n", "medes.toml:2"),
        ("[lifecycle]\nidle = \"soon\"\n", "medes.toml:2"),
    ] {
        std::fs::write(&file, text).unwrap();
        let output =
            Command::new(program()).arg("serve").arg("--config").arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(because), "{said}");
    }
}

#[test]
fn a_disk_that_is_full_from_the_start() {
    let setup = Setup::new();
    small_disk(&setup, "8k");
    refused(setup.fail_to_start(), "No space left on device");
}

#[test]
fn a_disk_that_becomes_full() {
    let setup = Setup::new();
    small_disk(&setup, "8m");
    let platform = setup.start();
    platform.deploy("bad");
    let large = tempfile::tempdir().unwrap();
    std::fs::copy(functions().join("bad/app.py"), large.path().join("app.py")).unwrap();
    let noise: Vec<u8> =
        (0..16_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(large.path().join("data"), noise).unwrap();
    let code = json!({ "directory": large.path() });
    let answer = platform.deploy_code("large", code, json!({}));
    assert!(answer.status >= 400, "{}", answer.text());
    assert!(answer.text().contains("No space left on device"), "{}", answer.text());
    assert!(!used_up(&platform.data_dir()), "the failed deployment still takes the disk");

    // A log that finds no room is lost; the function is not.
    let event = json!({ "do": "log", "lines": 20_000 });
    platform.invoke("bad", &event).expect_ok();
    platform.dedup("bad");
    platform.invoke("bad", &event).expect_start("dedup");
    // Not even a removal finds room now; after a look at the log, so to speak, it does.
    let why = platform.client().delete("/v1/functions/bad").expect_refusal(500, "Store");
    assert!(why.contains("No space left on device"), "{why}");
    std::fs::remove_dir_all(platform.data_dir().join("logs")).unwrap();
    platform.client().delete("/v1/functions/bad").expect_ok();
    platform.deploy("busy");
    platform.invoke("busy", &json!({})).expect_start("cold");
    platform.stop();
}

fn used_up(directory: &Path) -> bool {
    let probe = directory.join("probe");
    let written = std::fs::write(&probe, vec![1; 1 << 20]);
    std::fs::remove_file(&probe).unwrap();
    written.is_err()
}
