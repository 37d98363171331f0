//! Real runtimes, with their compilers and collectors at work: each computes what depends on all
//! that it was asked before, and a second process that is left alone says what is right.

use std::path::PathBuf;
use std::process::Command;

use super::{Random, nothing, run};
use crate::harness::Target;

fn source(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/operations/torture")).join(name)
}

/// Whether a runtime is installed. The others are tested all the same.
fn is_installed(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("-version").output().is_ok();
    if !found {
        println!("SKIPPED: there is no {program} here; the package {package} has it");
    }
    found
}

fn torture(name: &str, command: impl Fn(&str) -> Command) {
    let mut random = Random::new(name);
    let seed = random.below(1 << 31).to_string();
    let (target, mut oracle) = (Target::run(&command(&seed)), Target::run(&command(&seed)));
    let mut number = 0;
    let mut ask = |target: &mut Target| {
        number += 1;
        let question = number.to_string();
        target.tell(&question);
        oracle.tell(&question);
        assert_eq!(target.line(), oracle.line(), "question {number}");
    };
    run(target, random, &mut ask, nothing);
}

#[test]
fn cpython() {
    torture("CPython", |seed| {
        let mut command = Command::new("python3");
        command.arg(source("workload.py")).arg(seed).env("PYTHONHASHSEED", "1");
        command
    });
}

#[test]
fn node() {
    if is_installed("node", "nodejs") {
        torture("Node", |seed| {
            let mut command = Command::new("node");
            command.arg(source("workload.js")).arg(seed);
            command
        });
    }
}

#[test]
fn java() {
    if is_installed("javac", "openjdk-17-jdk-headless") {
        let classes = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("torture-classes");
        let mut javac = Command::new("javac");
        let compiled = javac.arg("-d").arg(&classes).arg(source("Workload.java")).status();
        assert!(compiled.expect("javac").success());
        torture("Java", |seed| {
            let mut command = Command::new("java");
            command.args(["-Xmx64m", "-cp"]).arg(&classes).args(["Workload", seed]);
            command
        });
    }
}

#[test]
fn go() {
    if is_installed("go", "golang-go") {
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let program = directory.join("torture-go");
        let mut go = Command::new("go");
        go.args(["build", "-o"]).arg(&program).arg(source("workload.go"));
        let compiled = go.env("GO111MODULE", "off").env("GOCACHE", directory.join("go")).status();
        assert!(compiled.expect("go").success());
        torture("Go", |seed| {
            let mut command = Command::new(&program);
            command.arg(seed);
            command
        });
    }
}
