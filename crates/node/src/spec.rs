//! From a function to the specification of its sandbox.

use std::path::PathBuf;

use medes_core::{FunctionSpec, Layout, SandboxId};
use medes_runtime::contract::RUNTIME_DIR;
use medes_runtime::lambda_process;
use medes_sandbox::{
    Layout as AddressLayout, Mount, Process, Resources, SandboxSpec, Seccomp, SmallFile,
};

use crate::config::NodeConfig;
use crate::runtimes::RuntimeRecord;

/// What a sandbox of `function` is made of.
///
/// Whatever reaches the process's memory (arguments, environment, host name) is the same for all
/// sandboxes of a function: equal content makes equal pages.
pub(crate) fn sandbox_spec(
    config: &NodeConfig,
    function: &FunctionSpec,
    runtime: &RuntimeRecord,
    sandbox: SandboxId,
    host_uid: u32,
) -> SandboxSpec {
    let process = lambda_process(function, &runtime.interpreter, runtime.short_version());
    let mut mounts = Mount::system();
    mounts.extend(runtime.mounts.iter().map(Mount::read_only));
    mounts.push(Mount {
        source: runtime.ric.clone(),
        target: PathBuf::from(RUNTIME_DIR),
        read_only: true,
    });
    let hostname = function.name.as_str();
    let mut files = SmallFile::system(hostname);
    let more = process.files.into_iter();
    files.extend(more.map(|(path, contents)| SmallFile { path: path.into(), contents }));
    SandboxSpec {
        id: sandbox.to_string(),
        hostname: hostname.to_owned(),
        mounts,
        files,
        code: Some(function.code.clone()),
        layers: function.layers.clone(),
        tmp_size_bytes: config.scratch_bytes,
        process: Process {
            args: process.args,
            env: process.env.into_iter().map(|(k, v)| format!("{k}={v}")).collect(),
            cwd: process.cwd.into(),
            rlimits: Vec::new(),
            oom_score_adj: 500,
        },
        host_uid,
        resources: Resources {
            memory_limit_bytes: u64::from(function.memory_mib) << 20,
            pids_max: config.pids_max,
            cpu_millicores: None,
        },
        layout: match function.layout {
            Layout::Function | Layout::Shared => AddressLayout::fixed(function.layout_seed),
            Layout::Random => AddressLayout::random(),
        },
        seccomp: Seccomp::default(),
        // Its keeper: without one nobody would bring its memory back.
        die_with_parent: true,
    }
}
