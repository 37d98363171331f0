//! What a vendor's runtime expects to find around it: arguments, environment, working directory.

use std::path::Path;

use medes_core::{FunctionSpec, Layout};

/// The port of the Runtime API on a sandbox's own loopback.
pub const PORT: u16 = 9001;

/// Where AWS's runtime interface client is mounted in a sandbox.
pub const RUNTIME_DIR: &str = "/var/runtime";

/// Where a function's code is mounted in a sandbox.
pub const TASK_DIR: &str = "/var/task";

/// The process of a Lambda function: what to execute and with which environment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LambdaProcess {
    /// The arguments; the first is the executable.
    pub args: Vec<String>,
    /// The environment, sorted by name.
    pub env: Vec<(String, String)>,
    /// The working directory.
    pub cwd: String,
    /// Small files that the process needs besides the runtime: path inside the sandbox, contents.
    pub files: Vec<(String, String)>,
}

/// Starts the runtime interface client and tidies the heap while the function is idle.
const BOOTSTRAP: &str = include_str!("bootstrap.py");

/// Where [`BOOTSTRAP`] is in a sandbox.
const BOOTSTRAP_PATH: &str = "/var/medes/bootstrap.py";

/// The ARN under which a function is known to Lambda's clients.
#[must_use]
pub fn lambda_arn(name: &str) -> String {
    format!("arn:aws:lambda:us-east-1:000000000000:function:{name}")
}

/// The process for a Python function under AWS's runtime interface client.
///
/// Every sandbox of a function gets the same arguments and environment, byte for byte, unless its
/// layout is random: they lie on the stack, and equal stacks make equal pages.
#[must_use]
pub fn lambda_process(function: &FunctionSpec, interpreter: &Path, version: &str) -> LambdaProcess {
    let name = function.name.as_str();
    let mut env: std::collections::BTreeMap<String, String> = [
        ("AWS_DEFAULT_REGION", "us-east-1".to_owned()),
        ("AWS_EXECUTION_ENV", format!("AWS_Lambda_python{version}")),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", function.memory_mib.to_string()),
        ("AWS_LAMBDA_FUNCTION_NAME", name.to_owned()),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST".to_owned()),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand".to_owned()),
        ("AWS_LAMBDA_LOG_GROUP_NAME", format!("/aws/lambda/{name}")),
        ("AWS_LAMBDA_LOG_STREAM_NAME", format!("{:016x}", function.id.0)),
        ("AWS_LAMBDA_RUNTIME_API", format!("127.0.0.1:{PORT}")),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("HOME", "/tmp".to_owned()),
        ("LAMBDA_RUNTIME_DIR", RUNTIME_DIR.to_owned()),
        ("LAMBDA_TASK_ROOT", TASK_DIR.to_owned()),
        ("LANG", "C.UTF-8".to_owned()),
        // Arenas are made by whichever thread allocates first; one arena keeps heaps alike.
        ("MALLOC_ARENA_MAX", "1".to_owned()),
        ("PATH", "/usr/local/bin:/usr/bin:/bin:/opt/bin".to_owned()),
        (
            "PYTHONPATH",
            format!(
                "{TASK_DIR}:/opt/python/lib/python{version}/site-packages:/opt/python:{RUNTIME_DIR}"
            ),
        ),
        ("TZ", ":UTC".to_owned()),
        ("_HANDLER", function.handler.clone()),
    ]
    .into_iter()
    .map(|(k, v)| (k.to_owned(), v))
    .collect();
    if function.layout != Layout::Random {
        // Python takes 0 to 4294967295; 0 would switch randomisation off altogether.
        let seed = (function.layout_seed >> 32) as u32 | 1;
        env.insert("PYTHONHASHSEED".to_owned(), seed.to_string());
    }
    for (key, value) in &function.environment {
        if key == "PYTHONPATH" {
            let ours = env.get(key).cloned().unwrap_or_default();
            env.insert(key.clone(), format!("{value}:{ours}"));
        } else if !RESERVED.contains(&key.as_str()) {
            env.insert(key.clone(), value.clone());
        }
    }
    LambdaProcess {
        args: vec![
            interpreter.to_string_lossy().into_owned(),
            BOOTSTRAP_PATH.to_owned(),
            function.handler.clone(),
        ],
        env: env.into_iter().collect(),
        cwd: TASK_DIR.to_owned(),
        files: vec![(BOOTSTRAP_PATH.to_owned(), BOOTSTRAP.to_owned())],
    }
}

/// Variables that belong to the platform, as on AWS: a function's own values are not taken.
pub const RESERVED: [&str; 10] = [
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
    "AWS_LAMBDA_FUNCTION_NAME",
    "AWS_LAMBDA_FUNCTION_VERSION",
    "AWS_LAMBDA_INITIALIZATION_TYPE",
    "AWS_LAMBDA_LOG_GROUP_NAME",
    "AWS_LAMBDA_LOG_STREAM_NAME",
    "AWS_LAMBDA_RUNTIME_API",
    "LAMBDA_TASK_ROOT",
    "_HANDLER",
];
