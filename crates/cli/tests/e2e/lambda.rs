//! Lambda's service API as AWS's own client speaks it.

use std::process::Command;

use crate::platform::{Platform, interpreter, prepared, program, runtime};

#[test]
fn boto3_deploys_invokes_and_removes() {
    let platform = Platform::start();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/lambda_client.py");
    let output = Command::new(interpreter())
        .arg(script)
        .arg(program())
        .args([format!("http://127.0.0.1:{}", platform.port()), runtime()])
        .env("PYTHONPATH", prepared("boto3"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        // Nothing of the user's own configuration, and no proxy on the way to loopback.
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("NO_PROXY", "127.0.0.1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said, "all as expected\n", "{}", String::from_utf8_lossy(&output.stderr));
    platform.stop();
}
