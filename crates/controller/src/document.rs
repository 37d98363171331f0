//! The error documents that clients of Lambda know, for failures that no runtime reports itself.

use medes_core::{InvocationError, RequestId};

/// The error document (JSON) of a failure that the platform saw: `None` for errors that the
/// function or its runtime reported in its own words.
pub(crate) fn error_document(
    error: &InvocationError,
    request: RequestId,
    timeout_ms: u64,
    max_response: usize,
) -> Option<Vec<u8>> {
    let message = match error {
        InvocationError::Function | InvocationError::Init => return None,
        InvocationError::TimedOut => format!(
            "RequestId: {request} Error: Task timed out after {}.{:02} seconds",
            timeout_ms / 1000,
            timeout_ms % 1000 / 10
        ),
        InvocationError::Exited { how } if how.is_empty() => {
            format!("RequestId: {request} Error: Runtime exited without providing a reason")
        }
        InvocationError::Exited { how } => {
            format!("RequestId: {request} Error: Runtime exited with error: {how}")
        }
        InvocationError::OutOfMemory => {
            format!("RequestId: {request} Error: Runtime exited with error: signal: killed")
        }
        InvocationError::ResponseTooLarge { .. } => format!(
            "Response payload size exceeded maximum allowed payload size ({max_response} bytes)."
        ),
    };
    Some(document(error_type(error), &message))
}

/// The error document for an initialisation that failed without a word from the runtime.
pub(crate) fn init_document(request: RequestId) -> Vec<u8> {
    document(
        "Runtime.ExitError",
        &format!("RequestId: {request} Error: Runtime exited without providing a reason"),
    )
}

/// The `errorType` of an error, as Lambda's clients see it. For errors in the function's own words
/// its document has the exact one.
#[must_use]
pub fn error_type(error: &InvocationError) -> &'static str {
    match error {
        InvocationError::Function => "Function",
        InvocationError::Init => "Init",
        InvocationError::TimedOut => "Sandbox.Timedout",
        InvocationError::Exited { .. } => "Runtime.ExitError",
        InvocationError::OutOfMemory => "Runtime.OutOfMemory",
        InvocationError::ResponseTooLarge { .. } => "Function.ResponseSizeTooLarge",
    }
}

fn document(kind: &str, message: &str) -> Vec<u8> {
    serde_json::json!({ "errorType": kind, "errorMessage": message }).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_those_of_lambda() {
        let request = RequestId(7);
        for (error, kind, message) in [
            (
                InvocationError::TimedOut,
                "Sandbox.Timedout",
                format!("RequestId: {request} Error: Task timed out after 3.05 seconds"),
            ),
            (
                InvocationError::Exited { how: "exit status 1".into() },
                "Runtime.ExitError",
                format!("RequestId: {request} Error: Runtime exited with error: exit status 1"),
            ),
            (
                InvocationError::Exited { how: String::new() },
                "Runtime.ExitError",
                format!("RequestId: {request} Error: Runtime exited without providing a reason"),
            ),
            (
                InvocationError::OutOfMemory,
                "Runtime.OutOfMemory",
                format!("RequestId: {request} Error: Runtime exited with error: signal: killed"),
            ),
            (
                InvocationError::ResponseTooLarge { bytes: 9_000_000 },
                "Function.ResponseSizeTooLarge",
                "Response payload size exceeded maximum allowed payload size (6291556 bytes)."
                    .to_owned(),
            ),
        ] {
            let text = error_document(&error, request, 3_050, 6_291_556).unwrap();
            let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(value["errorType"], kind);
            assert_eq!(value["errorMessage"], message);
        }
        assert_eq!(error_document(&InvocationError::Function, request, 1, 1), None);
    }
}
